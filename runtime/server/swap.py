"""What serves, and how it is replaced while it serves.

The next bundle is opened beside the one that serves, proved, warmed up, and takes over at once. Graphs, items, index
and the cache's namespace belong to one deployment, and a request keeps the deployment that it acquired until it is
answered: no answer is ever made of two bundles. Whatever goes wrong before the switch leaves in place what served.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from unipinrec.errors import BackendError, BundleError, SwapBusyError, SwapError, UnipinrecError
from unipinrec.runtime.bundle.bundle import read_manifest
from unipinrec.runtime.bundle.integrity import file_problems
from unipinrec.runtime.kv.encoder import Padding
from unipinrec.runtime.machine import give_back_memory
from unipinrec.runtime.server.deployment import Deployment

SwapKind = Literal["swap", "rollback"]
SwapResult = Literal["swapped", "refused", "failed", "busy"]
REMEMBERED_SWAPS = 20
log = logging.getLogger(__name__)


class SwapRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt to put another bundle in service.

    Attributes:
        kind: swap or rollback.
        bundle: Name of the bundle's folder.
        version: The bundle's hash; None where it was not opened.
        result: swapped; refused (the bundle is at fault, or the machine lacks what it needs); failed (a fault that was
            not foreseen); busy (another swap was under way).
        reason: Why it was not swapped.
        seconds: What it took.
        at: When it ended, Unix time in seconds.
    """

    kind: SwapKind
    bundle: str
    version: str | None
    result: SwapResult
    reason: str | None
    seconds: float
    at: float


class DeploymentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What serves at this moment.

    Attributes:
        bundle, version: Folder name and hash of what serves.
        device, device_reason: What it runs on, and why.
        since: When it took over, Unix time in seconds.
        in_flight: Requests that hold it.
        draining: Requests that hold what it replaced, by hash.
        previous: Hash of what a rollback would bring back.
        opening: Folder name of the bundle that is being opened beside it.
        swaps: The latest attempts, newest last.
    """

    bundle: str
    version: str
    device: str
    device_reason: str
    since: float
    in_flight: int
    draining: dict[str, int]
    previous: str | None
    opening: str | None
    swaps: tuple[SwapRecord, ...]


@dataclass(frozen=True, kw_only=True)
class WorkTotals:
    """What all deployments did since the start, those that were replaced included.

    `padding` is by stage, see `Recommender.padding`.
    """

    requests: int
    batches: int
    padding: dict[str, Padding]


@dataclass(kw_only=True, eq=False)
class _Held:
    """A deployment and the requests that hold it."""

    deployment: Deployment
    since: float = field(default_factory=time.time)
    users: int = 0


class Deployments:
    """The deployment that serves, and those that it replaced until their last request is answered.

    Safe to use from several threads, an event loop's included: only `swap`, `rollback` and `close` take long.
    """

    def __init__(self, current: Deployment) -> None:
        """Serve `current`, which from now on is closed here."""
        self._changed = threading.Condition()  # guards what follows; told when a deployment is released or drained
        self._current = _Held(deployment=current)
        self._draining: list[_Held] = []
        self._freeing = 0
        self._previous: tuple[Path, str] | None = None
        self._swaps: deque[SwapRecord] = deque(maxlen=REMEMBERED_SWAPS)
        self._counts: Counter[tuple[str, SwapResult]] = Counter()
        self._done = WorkTotals(requests=0, batches=0, padding={})
        self._opening: str | None = None
        self._closed = False
        self._one_at_a_time = threading.Lock()

    @property
    def current(self) -> Deployment:
        """What serves now, to look at. Whoever computes with it holds it with `acquire`."""
        return self._current.deployment

    @contextmanager
    def acquire(self) -> Iterator[Deployment]:
        """The deployment that serves now; it stays open until it is released, whatever is swapped meanwhile.

        Raises:
            BackendError: All is closed.
        """
        with self._changed:
            if self._closed:
                raise BackendError("the server is shutting down; send the request again")
            held = self._current
            held.users += 1
        try:
            yield held.deployment
        finally:
            with self._changed:
                held.users -= 1
                if not held.users:
                    self._changed.notify_all()

    def swap(self, path: Path | str) -> Deployment:
        """Open a bundle beside the one that serves, in the calling thread, and let it take over; returns it.

        Requests go on meanwhile. What it replaces is closed, and its memory freed, when its last request is answered.
        If it is what serves already, nothing happens, and a rollback still brings back what was replaced before.

        Raises:
            SwapBusyError: Another swap is under way.
            SwapError: All is closed.
            UnipinrecError: The bundle cannot be served, see `Deployment.open`; what served before serves on.
        """
        return self._replace("swap", Path(path), None)

    def refuse(self, path: Path, problem: UnipinrecError) -> None:
        """Record as refused what could not even be looked at."""
        self._record("swap", path, None, problem, 0.0)

    def rollback(self) -> Deployment:
        """Bring back what the last swap replaced, by opening it again; a second rollback undoes the first.

        Raises:
            SwapError: There is nothing to bring back, or something else lies in its folder now; or as in `swap`.
        """
        with self._changed:
            previous = self._previous
        if previous is None:
            raise SwapError("nothing was replaced since the start, so there is nothing to go back to")
        return self._replace("rollback", *previous)

    def status(self) -> DeploymentStatus:
        """A consistent snapshot."""
        with self._changed:
            held, device = self._current, self._current.deployment.recommender.device
            return DeploymentStatus(
                bundle=held.deployment.path.name,
                version=held.deployment.version,
                device=device.name,
                device_reason=device.reason,
                since=held.since,
                in_flight=held.users,
                draining=_users(self._draining),
                previous=self._previous[1] if self._previous else None,
                opening=self._opening,
                swaps=tuple(self._swaps),
            )

    def swap_counts(self) -> dict[tuple[str, SwapResult], int]:
        """Attempts since the start by kind and result."""
        with self._changed:
            return dict(self._counts)

    def work(self) -> WorkTotals:
        """What was done since the start, by all deployments together."""
        with self._changed:
            return _total(self._done, *(_work(held.deployment) for held in (self._current, *self._draining)))

    def close(self, timeout_s: float | None = None) -> bool:
        """Refuse new requests and swaps, wait for those in flight, and close everything; twice has no effect.

        Returns:
            Whether all is closed; False if requests were still in flight after `timeout_s` (None = no limit).
        """
        with self._changed:
            if not self._closed:
                self._closed = True
                self._retire(self._current)
            return self._changed.wait_for(lambda: not self._draining and not self._freeing, timeout_s)

    def _replace(self, kind: SwapKind, path: Path, expected: str | None) -> Deployment:
        if not self._one_at_a_time.acquire(blocking=False):
            error = SwapBusyError(f"{self._opening} is being opened; wait for it, then ask again")
            self._record(kind, path, None, error, 0.0)
            raise error
        began, self._opening = time.perf_counter(), path.name
        try:
            if kind == "swap" and _whole_and_same(path, self.current):
                return self.current
            opened = self._take_over(path, expected)
        except BaseException as error:
            self._record(kind, path, None, error, time.perf_counter() - began)
            raise
        else:
            self._record(kind, path, opened, None, time.perf_counter() - began)
            return opened
        finally:
            self._opening = None
            self._one_at_a_time.release()

    def _take_over(self, path: Path, expected: str | None) -> Deployment:
        with self._changed:
            old = self._current.deployment
        other = f"{path.name} is no longer the bundle that served; swap to one by its name"
        if expected is not None and read_manifest(path)[1] != expected:
            raise SwapError(other)
        opened = Deployment.open(path, old.options, cache=old.recommender.cache)
        problem = None
        if expected not in (None, opened.version):  # it was replaced meanwhile
            problem = other
        elif not self._switch(opened):
            problem = "the server is shutting down; nothing is swapped any more"
        if problem:
            opened.close()
            raise SwapError(problem)
        return opened

    def _switch(self, opened: Deployment) -> bool:
        """The moment from which on requests get the new deployment; False if all is closed."""
        with self._changed:
            if self._closed:
                return False
            old, self._current = self._current, _Held(deployment=opened)
            self._previous = (old.deployment.path, old.deployment.version)
            self._retire(old)
            return True

    def _retire(self, held: _Held) -> None:
        self._draining.append(held)
        threading.Thread(target=self._drain, args=(held,), name="unipinrec-drain", daemon=True).start()

    def _drain(self, held: _Held) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not held.users)
        version = held.deployment.version
        try:
            held.deployment.close()
            log.info("bundle %s is drained and closed", version)
        except Exception:  # whoever waits for the end must not wait for ever
            log.exception("bundle %s was not closed as it should be", version)
        with self._changed:
            self._draining.remove(held)
            self._freeing += 1
            self._done = _total(self._done, _work(held.deployment))
        del held.deployment  # this thread still has `held`
        give_back_memory()
        with self._changed:
            self._freeing -= 1
            self._changed.notify_all()  # not before: the process may end then, and with it the runtime's libraries

    def _record(
        self,
        kind: SwapKind,
        path: Path,
        opened: Deployment | None,
        problem: BaseException | None,
        seconds: float,
    ) -> None:
        record = SwapRecord(
            kind=kind,
            bundle=path.name,
            version=opened.version if opened else None,
            result=_result(problem),
            reason=None if problem is None else str(problem) if isinstance(problem, UnipinrecError) else repr(problem),
            seconds=seconds,
            at=time.time(),
        )
        with self._changed:
            self._swaps.append(record)
            self._counts[kind, record.result] += 1
        if problem is None:
            log.info("%s to %s in %.2f s, bundle %s", kind, path, seconds, record.version)
        else:
            log.warning("%s to %s %s: %s", kind, path, record.result, record.reason)


def _whole_and_same(path: Path, serving: Deployment) -> bool:
    """Whether a folder holds what serves; what is not a bundle, or damaged, does not."""
    with suppress(BundleError):
        manifest, version = read_manifest(path)
        return version == serving.version and not file_problems(path, manifest.files)
    return False


def _users(draining: Sequence[_Held]) -> dict[str, int]:
    users: Counter[str] = Counter()
    for held in draining:
        users[held.deployment.version] += held.users
    return dict(users)


def _result(problem: BaseException | None) -> SwapResult:
    if problem is None:
        return "swapped"
    if isinstance(problem, SwapBusyError):
        return "busy"
    return "refused" if isinstance(problem, UnipinrecError) else "failed"


def _work(deployment: Deployment) -> WorkTotals:
    batches = deployment.batcher.statistics()
    return WorkTotals(requests=batches.requests, batches=batches.batches, padding=deployment.recommender.padding())


def _total(*parts: WorkTotals) -> WorkTotals:
    padding: dict[str, Padding] = {}
    for part in parts:
        for stage, counted in part.padding.items():
            before = padding.get(stage, Padding(given=0, computed=0))
            padding[stage] = Padding(given=before.given + counted.given, computed=before.computed + counted.computed)
    return WorkTotals(
        requests=sum(part.requests for part in parts), batches=sum(part.batches for part in parts), padding=padding
    )
