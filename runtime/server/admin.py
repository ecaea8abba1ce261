"""Swaps from outside: by HTTP with the scope admin, or by a file that a deployment tool replaces.

Bundles have names, not paths: all of them lie in one folder, which is fixed at the start.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
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
from unipinrec.runtime.server.call import Call, Server, as_json
from unipinrec.runtime.server.operations import READS, Operation
from unipinrec.runtime.server.swap import Deployments, DeploymentStatus

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NAME_RULE = "a name is a letter or digit, then up to 127 letters, digits, dots, dashes or underscores"
CURRENT = "current.json"
BODY_BYTES = 4096
log = logging.getLogger(__name__)


class Current(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `current.json` and of the body of a reload; other fields are ignored."""

    bundle: str


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
    scope="admin",
    summary="Swap to another bundle",
    body=Current,
    answer=DeploymentStatus,
    statuses=(*READS, 404, 408, 409, 413, 422),
    examples="reload",
)
ROLLBACK = Operation(
    method="POST",
    path="/admin/rollback",
    scope="admin",
    summary="Swap back to the previous bundle",
    answer=DeploymentStatus,
    statuses=(*READS, 409, 422),
)
STATUS = Operation(
    path="/admin/status",
    scope="admin",
    summary="The active bundle, and the latest swaps",
    answer=DeploymentStatus,
    statuses=READS,
)


def admin_routes(server: Server, bundles: Path) -> list[Route]:
    """POST /admin/reload and /admin/rollback, GET /admin/status; `bundles` is the folder of all bundles."""

    async def reload(_server: Server, call: Call) -> Response:
        with decoding(RequestError, "the body", 'it must be {"bundle": "NAME"}'):
            name = msgspec.json.decode(await call.body(BODY_BYTES), type=Current).bundle
        try:
            folder = bundle_folder(bundles, name)
        except BundleError as error:
            raise RequestError(str(error)) from error
        if not folder.is_dir():
            raise ApiError(404, "no_such_bundle", f"there is no bundle {name!r} to swap to")
        return await _swapped(server, lambda deployments: deployments.swap(folder))

    async def rollback(_server: Server, _call: Call) -> Response:
        return await _swapped(server, lambda deployments: deployments.rollback())

    async def status(_server: Server, _call: Call) -> Response:
        return as_json(server.loaded().status())

    return [route(server, RELOAD, reload), route(server, ROLLBACK, rollback), route(server, STATUS, status)]


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
