"""The active deployment, and how another takes over while requests are answered.

The next bundle is opened beside the active one, verified, warmed up, and takes over at once. Graphs, items, index and
the cache's namespace belong to one deployment, and a request keeps its deployment until it is answered: no answer is
ever made of two bundles. A failure before the switch leaves the active deployment in place.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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
REMEMBERED_SWAPS = 20
log = logging.getLogger(__name__)


class SwapRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt to swap the bundle.

    Attributes:
        kind: swap or rollback.
        bundle: Name of the bundle's folder.
        version: The bundle's hash; null if it was not opened.
        result: swapped; refused (a problem of the bundle, or of this machine); failed (an unexpected error); busy
            (another swap was running).
        reason: Why it was not swapped.
        seconds: Duration.
        at: When it ended, Unix time in seconds.
    """

    kind: SwapKind
    bundle: str
    version: str | None
    result: Literal["swapped", "refused", "failed", "busy"]
    reason: str | None
    seconds: float
    at: float


class DeploymentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The active deployment at this moment.

    Attributes:
        bundle, version: Folder name and hash of the active bundle.
        device, device_reason: The device, and why it was chosen.
        since: When the bundle took over, Unix time in seconds.
        in_flight: Requests that hold it.
        draining: Requests that hold replaced bundles, by hash.
        previous: Hash of the bundle that a rollback would bring back.
        opening: Folder name of the bundle that is being opened.
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
    """Work of all deployments since the start, with the replaced ones.

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
    """The active deployment, and replaced ones until their last request is answered.

    Safe to use from several threads, and from an event loop: only `swap`, `rollback` and `close` take long.
    """

    def __init__(self, current: Deployment) -> None:
        """Make `current` active, and close it in the end."""
        self._changed = threading.Condition()  # guards the fields below; notified at a release and after a drain
        self._current = _Held(deployment=current)
        self._draining: list[_Held] = []
        self._freeing = 0
        self._previous: tuple[Path, str] | None = None
        self._swaps: deque[SwapRecord] = deque(maxlen=REMEMBERED_SWAPS)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._done = WorkTotals(requests=0, batches=0, padding={})
        self._opening: str | None = None
        self._closed = False
        self._one_at_a_time = threading.Lock()

    @property
    def current(self) -> Deployment:
        """The active deployment, to read its facts; computing with it needs `acquire`."""
        return self._current.deployment

    @contextmanager
    def acquire(self) -> Iterator[Deployment]:
        """Hold the active deployment; it stays open until it is released, even if a swap happens.

        Raises:
            BackendError: The deployments are closed.
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
        """Open a bundle in the calling thread and make it active; returns its deployment.

        Requests are answered meanwhile. The replaced deployment is closed, and its memory freed, after its last
        request. If the bundle is already active, nothing happens, and a rollback means the same as before.

        Raises:
            SwapBusyError: Another swap is running.
            SwapError: The deployments are closed.
            UnipinrecError: The bundle cannot be used, see `Deployment.open`; the active one stays.
        """
        return self._replace("swap", Path(path), None)

    def refuse(self, path: Path, problem: UnipinrecError) -> None:
        """Record a swap as refused whose bundle could not be read."""
        self._record("swap", path, None, problem, 0.0)

    def rollback(self) -> Deployment:
        """Open the bundle again that the last swap replaced; a second rollback undoes the first.

        Raises:
            SwapError: Nothing was replaced, or its folder holds another bundle now; or as in `swap`.
        """
        with self._changed:
            previous = self._previous
        if previous is None:
            raise SwapError("no bundle was replaced since the start, so there is none to go back to")
        return self._replace("rollback", *previous)

    def status(self) -> DeploymentStatus:
        """A consistent snapshot."""
        with self._changed:
            held, device = self._current, self._current.deployment.recommender.device
            draining: Counter[str] = Counter()
            for replaced in self._draining:
                draining[replaced.deployment.version] += replaced.users
            return DeploymentStatus(
                bundle=held.deployment.path.name,
                version=held.deployment.version,
                device=device.name,
                device_reason=device.reason,
                since=held.since,
                in_flight=held.users,
                draining=dict(draining),
                previous=self._previous[1] if self._previous else None,
                opening=self._opening,
                swaps=tuple(self._swaps),
            )

    def swap_counts(self) -> dict[tuple[str, str], int]:
        """Attempts since the start by kind and result."""
        with self._changed:
            return dict(self._counts)

    def work(self) -> WorkTotals:
        """The work of all deployments since the start."""
        with self._changed:
            return _total(self._done, *(_work(held.deployment) for held in (self._current, *self._draining)))

    def close(self, timeout_s: float | None = None) -> bool:
        """Reject new requests and swaps, wait for those in flight, and close everything; a second call has no effect.

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
            error = SwapBusyError(f"{self._opening} is being opened; wait for it, then try again")
            self._record(kind, path, None, error, 0.0)
            raise error
        began, self._opening = time.perf_counter(), path.name
        try:
            if kind == "swap" and _is_whole(path, self.current.version):
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
        """Open a bundle, of an expected version if there is one, and make it active."""
        changed = SwapError(f"{path.name} is no longer the bundle that was replaced; swap to one by its name")
        if expected is not None and read_manifest(path)[1] != expected:
            raise changed
        before = self.current
        opened = Deployment.open(path, before.options, cache=before.recommender.cache)
        with ExitStack() as unless_active:
            unless_active.callback(opened.close)
            if expected not in (None, opened.version):  # its folder was changed in between
                raise changed
            with self._changed:
                if self._closed:
                    raise SwapError("the server is shutting down and swaps no more")
                self._retire(self._current)
                self._previous = (before.path, before.version)
                self._current = _Held(deployment=opened)  # from here on requests get it
            unless_active.pop_all()
        return opened

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
        except Exception:  # `close` must not wait for ever
            log.exception("bundle %s could not be closed properly", version)
        with self._changed:
            self._draining.remove(held)
            self._freeing += 1
            self._done = _total(self._done, _work(held.deployment))
        del held.deployment  # this thread still refers to `held`
        give_back_memory()
        with self._changed:
            self._freeing -= 1
            self._changed.notify_all()  # last, for then the process may end and unload the runtime's libraries

    def _record(
        self, kind: SwapKind, path: Path, opened: Deployment | None, problem: BaseException | None, seconds: float
    ) -> None:
        result: Literal["swapped", "refused", "failed", "busy"] = "swapped"
        if problem is not None:
            result = "refused" if isinstance(problem, UnipinrecError) else "failed"
        record = SwapRecord(
            kind=kind,
            bundle=path.name,
            version=opened.version if opened else None,
            result="busy" if isinstance(problem, SwapBusyError) else result,
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


def _is_whole(path: Path, expected: str) -> bool:
    """Whether a folder holds an undamaged bundle of this version."""
    with suppress(BundleError):
        manifest, version = read_manifest(path)
        return version == expected and not file_problems(path, manifest.files)
    return False


def _work(deployment: Deployment) -> WorkTotals:
    batches = deployment.batcher.statistics()
    return WorkTotals(requests=batches.requests, batches=batches.batches, padding=deployment.recommender.padding())


def _total(*parts: WorkTotals) -> WorkTotals:
    padding: dict[str, Padding] = {}
    for part in parts:
        for stage, counted in part.padding.items():
            before = padding.get(stage, Padding(useful=0, computed=0))
            padding[stage] = Padding(useful=before.useful + counted.useful, computed=before.computed + counted.computed)
    return WorkTotals(
        requests=sum(part.requests for part in parts), batches=sum(part.batches for part in parts), padding=padding
    )
