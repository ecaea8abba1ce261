"""Swaps from outside: by HTTP with a token, or by a file that a deployment tool replaces.

Bundles have names, not paths: all of them lie in one folder, which is fixed at the start.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio.to_thread
import msgspec
from starlette.responses import Response
from starlette.routing import Route

from unipinrec.errors import BundleError, ConfigError, RequestError, SwapBusyError, SwapError, UnipinrecError, decoding
from unipinrec.runtime.bundle.bundle import read_manifest
from unipinrec.runtime.server.app import route
from unipinrec.runtime.server.bodies import ApiError
from unipinrec.runtime.server.call import Call, Handler, Server, as_json
from unipinrec.runtime.server.operations import ADMIN, Operation
from unipinrec.runtime.server.swap import Deployments, DeploymentStatus

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NAME_RULE = "a name is a letter or digit, then up to 127 letters, digits, dots, dashes or underscores"
CURRENT = "current.json"
SHORTEST_TOKEN = 16
BODY_BYTES = 4096
log = logging.getLogger(__name__)


class Current(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `current.json` and of the body of a reload; other fields are ignored."""

    bundle: str


@dataclass(frozen=True, kw_only=True)
class AdminOptions:
    """The bundles that /admin may swap to, and the token that it needs.

    Attributes:
        folder: Folder of all bundles.
        token: A caller must send it as `Authorization: Bearer TOKEN`.
    """

    folder: Path
    token: str = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.token) < SHORTEST_TOKEN or not self.token.isascii() or not self.token.isprintable():
            raise ConfigError(
                f"an admin token must be at least {SHORTEST_TOKEN} printable ASCII characters, such as "
                "`openssl rand -hex 32` prints"
            )


def read_token(*, file: Path | None = None, variable: str | None = None) -> str:
    """The token from a file, without spaces and line breaks around it, or else from an environment variable.

    Raises:
        ConfigError: There is none, or the file cannot be read.
    """
    if file is not None:
        try:
            return file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the admin token cannot be read from {file}: {error}") from error
    token = os.environ.get(variable or "", "")
    if not token:
        raise ConfigError(f"the environment variable {variable} holds no admin token; set it, or name a file")
    return token


def bundle_folder(folder: Path, name: str) -> Path:
    """The folder of a bundle; it need not exist.

    Raises:
        BundleError: `name` breaks the rule for names.
    """
    if not NAME.fullmatch(name):
        raise BundleError(f"{name[:40]!r} does not name a bundle: {NAME_RULE}")
    return folder / name


def read_current(folder: Path) -> Path:
    """The bundle that a folder's `current.json` names.

    Raises:
        BundleError: There is no such file, or it names no bundle.
    """
    path, remedy = folder / CURRENT, 'it must be a file such as {"bundle": "NAME"}'
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error}; {remedy}") from error
    with decoding(BundleError, path, remedy):
        return bundle_folder(folder, msgspec.json.decode(content, type=Current).bundle)


RELOAD = Operation(
    method="POST",
    path="/admin/reload",
    summary="Swap to another bundle",
    body=Current,
    answer=DeploymentStatus,
    statuses=(*ADMIN, 404, 408, 409, 413, 422),
    examples="reload",
)
ROLLBACK = Operation(
    method="POST",
    path="/admin/rollback",
    summary="Swap back to the previous bundle",
    answer=DeploymentStatus,
    statuses=(*ADMIN, 409, 422),
)
STATUS = Operation(
    path="/admin/status",
    summary="The active bundle, and the latest swaps",
    answer=DeploymentStatus,
    statuses=ADMIN,
)


def admin_routes(server: Server, options: AdminOptions) -> list[Route]:
    """POST /admin/reload and /admin/rollback, GET /admin/status."""

    async def reload(_server: Server, call: Call) -> Response:
        with decoding(RequestError, "the body", 'it must be {"bundle": "NAME"}'):
            name = msgspec.json.decode(await call.body(BODY_BYTES), type=Current).bundle
        try:
            folder = bundle_folder(options.folder, name)
        except BundleError as error:
            raise RequestError(str(error)) from error
        if not folder.is_dir():
            raise ApiError(404, "no_such_bundle", f"there is no bundle {name!r} to swap to")
        return await _swapped(server, lambda deployments: deployments.swap(folder))

    async def rollback(_server: Server, _call: Call) -> Response:
        return await _swapped(server, lambda deployments: deployments.rollback())

    async def status(_server: Server, _call: Call) -> Response:
        return as_json(server.loaded().status())

    digest = hashlib.sha256(options.token.encode()).digest()
    table: list[tuple[Operation, Handler]] = [(RELOAD, reload), (ROLLBACK, rollback), (STATUS, status)]
    return [route(server, operation, _guarded(handler, digest)) for operation, handler in table]


def _guarded(handler: Handler, token_sha256: bytes) -> Handler:
    async def guarded(server: Server, call: Call) -> Response:
        scheme, _, token = call.request.headers.get("authorization", "").partition(" ")
        # Digests have equal lengths, so that the time to compare them tells nothing about the token.
        valid = hmac.compare_digest(hashlib.sha256(token.strip().encode()).digest(), token_sha256)
        if not valid or scheme.lower() != "bearer":
            raise ApiError(401, "unauthorized", "send Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"})
        return await handler(server, call)

    return guarded


async def _swapped(server: Server, swap: Callable[[Deployments], Any]) -> Response:
    """Swap in a thread. A swap goes on even if the client leaves; the status then shows its result."""
    deployments = server.loaded()
    try:
        await anyio.to_thread.run_sync(swap, deployments)
    except SwapError as error:
        raise ApiError(409, "not_swapped", str(error)) from error
    except UnipinrecError as error:
        raise ApiError(422, "bundle_refused", f"{error}; the active bundle was not changed") from error
    return as_json(deployments.status())


class CurrentWatcher:
    """Swaps to the bundle in a folder's `current.json` when that file is replaced.

    A rejected bundle is not tried again until the file is replaced once more.
    """

    def __init__(
        self,
        deployments: Deployments,
        folder: Path,
        every_s: float = 1.0,
        swapped: Callable[[Path], object] = lambda _: None,
    ) -> None:
        """Check the file every `every_s` seconds; call `swapped` with the folder of each new active bundle.

        Raises:
            ConfigError: `every_s` is not more than 0.
        """
        if not every_s > 0:
            raise ConfigError(f"current.json cannot be checked every {every_s} s; give more than 0 s")
        self._deployments, self._folder, self._every_s = deployments, folder, every_s
        self._swapped = swapped
        self._seen: tuple[int, int, int] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="unipinrec-current", daemon=True)

    def start(self) -> None:
        """Start to watch, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop to watch; a running swap goes on."""
        self._stopped.set()

    def check(self) -> None:
        """Check once; swap if the file was replaced and names another bundle than the active one."""
        try:
            status = (self._folder / CURRENT).stat()
        except OSError:
            return
        seen = status.st_ino, status.st_size, status.st_mtime_ns
        if seen == self._seen:
            return
        try:
            try:
                folder = read_current(self._folder)
                version = read_manifest(folder)[1]
            except UnipinrecError as error:
                self._deployments.refuse(self._folder / CURRENT, error)
                raise
            if version != self._deployments.current.version:
                self._swapped(self._deployments.swap(folder).path)
        except SwapBusyError:
            return  # another swap is running: try again at the next check
        except UnipinrecError as error:
            log.warning("%s changed, but nothing was swapped: %s", self._folder / CURRENT, error)
        except Exception:
            log.exception("%s changed, but nothing was swapped", self._folder / CURRENT)
        self._seen = seen

    def _watch(self) -> None:
        while not self._stopped.wait(self._every_s):
            self.check()
