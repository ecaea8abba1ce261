"""Several processes with one socket and one store of users' events; each has its interpreter and threads.

The parent computes nothing. It holds the socket, so that no connection is lost while a process is replaced. It kills
processes that hang, restarts processes that die, and passes signals on.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType

from unipinrec.errors import BackendError, ConfigError
from unipinrec.runtime.server.process.lifecycle import RunOptions, Worker, listen, stop_connections

LOOK_S = 0.2
LONGEST_FOLDER = 92  # bytes; the path of a socket has at most 107, or 103 on macOS
GRACE_S = 10.0  # beyond the time for draining
RESTART_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # wait before the n-th restart in a row
STABLE_S = 60.0  # after running for so long, a death counts as the first in a row
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Member:
    """A process, and its deaths in a row."""

    worker: Worker
    process: SpawnProcess
    began: float
    deaths: int = 0
    again: float | None = None
    """When it is restarted; None = it runs."""
    beat_ns: int | None = None
    """Last beat of its event loop; None = it is not ready yet."""
    silent_s: float = 0.0
    """For how long the parent has watched since then without a new beat."""

    @property
    def socket(self) -> Path:
        return self.worker.socket_of(self.worker.index)


def serve_together(count: int, serve: Callable[[Worker], None], options: RunOptions) -> None:
    """Serve with several processes until a signal; accepted requests are answered before the end.

    Args:
        count: Number of processes.
        serve: Serves in one process; must be picklable.
        options: Where to listen, and how to end.

    Raises:
        ConfigError: The address is not available.
        BackendError: A process ended before any was ready, or did not end properly.
    """
    with (
        _noted_signals() as signals,
        listen(options) as listener,
        _folder_of_sockets() as folder,
    ):
        log.info("%d processes serve together", count)
        workers = [Worker(index=i, count=count, folder=Path(folder), listener=listener) for i in range(count)]
        _Parent(workers, serve, options).run(signals)


@contextmanager
def _folder_of_sockets() -> Iterator[str]:
    """A temporary folder for the processes' sockets.

    Raises:
        ConfigError: No folder can be made, or its path is too long for a socket.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="unipinrec-")
    except OSError as error:
        raise ConfigError(f"several processes need a folder for their sockets: {error}; set TMPDIR to one") from error
    with made as folder:
        if len(os.fsencode(folder)) > LONGEST_FOLDER:
            raise ConfigError(f"{folder} is too long for the path of a socket; set TMPDIR to a shorter folder")
        yield folder


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT, in order of arrival."""
    signals: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        signals.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Parent:
    """Starts, watches and ends the processes."""

    def __init__(self, workers: Sequence[Worker], serve: Callable[[Worker], None], options: RunOptions) -> None:
        self._workers, self._serve, self._options = workers, serve, options
        self._context = multiprocessing.get_context("spawn")
        self._members: list[_Member] = []
        self._served = False
        self._looked = time.monotonic()

    def _start(self, worker: Worker) -> _Member:
        process = self._context.Process(
            target=_in_process, args=(self._serve, worker), name=f"unipinrec-{worker.index}"
        )
        process.start()
        return _Member(worker=worker, process=process, began=time.monotonic())

    def run(self, signals: list[int]) -> None:
        """Watch until a signal, then end all processes.

        Raises:
            BackendError: See `serve_together`.
        """
        try:
            self._members += [self._start(worker) for worker in self._workers]
            while not signals:
                wait([member.process.sentinel for member in self._members if member.again is None], LOOK_S)
                if not signals:
                    self._look()
            self._end(signals)
        finally:
            for member in self._members:
                if member.process.is_alive():
                    member.process.kill()
                member.process.join()

    def _look(self) -> None:
        """Kill processes that hang, restart those that died."""
        now = time.monotonic()
        seen_s, self._looked = min(now - self._looked, 2 * LOOK_S), now  # less if the parent stood still
        self._served = self._served or any(member.socket.exists() for member in self._members)
        for at, member in enumerate(self._members):
            if member.again is not None and now >= member.again:
                self._members[at] = self._start(member.worker)
                self._members[at].deaths = member.deaths
            elif member.again is None and not member.process.is_alive():
                self._died(member, now)
            elif member.again is None:
                self._check_beat(member, seen_s)

    def _check_beat(self, member: _Member, seen_s: float) -> None:
        with suppress(FileNotFoundError):
            beat_ns = member.socket.stat().st_mtime_ns
            member.silent_s = member.silent_s + seen_s if beat_ns == member.beat_ns else 0.0
            member.beat_ns = beat_ns
        if member.silent_s > self._options.hung_s:
            log.error("process %d has stood still for %.0f s; it is killed", member.worker.index, member.silent_s)
            member.silent_s = 0.0
            member.process.kill()

    def _died(self, member: _Member, now: float) -> None:
        reason = _ended(member.process.exitcode)
        if not self._served:
            raise BackendError(f"process {member.worker.index} {reason} before it was ready; see its log above")
        member.deaths = 0 if now - member.began > STABLE_S else member.deaths
        delay_s = RESTART_S[min(member.deaths, len(RESTART_S) - 1)]
        member.deaths, member.again = member.deaths + 1, now + delay_s
        member.worker = replace(member.worker, again=not member.socket.exists())
        member.socket.unlink(missing_ok=True)
        log.error("process %d %s; it is restarted in %g s", member.worker.index, reason, delay_s)

    def _end(self, signals: list[int]) -> None:
        """Pass signals on until all have ended. The second SIGTERM tells a process that no new connection can begin.

        Raises:
            BackendError: See `serve_together`.
        """
        running = [member for member in self._members if member.again is None]
        listener = self._workers[0].listener
        stops = time.monotonic() + self._options.drain_delay_s
        limit = stops + self._options.drain_s + GRACE_S
        while alive := [member.process for member in running if member.process.is_alive()]:
            left_s = 0 if signal.SIGINT in signals else stops - time.monotonic()
            if left_s <= 0 and listener.fileno() >= 0:
                stop_connections(listener)
                listener.close()  # the last process to close it answers the requests that wait in it
                signals.append(signal.SIGTERM)
            for number, process in product(signals, alive):
                assert process.pid is not None  # it was started
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)
            signals.clear()
            if time.monotonic() > limit:
                raise BackendError(f"{len(alive)} processes did not end in time, and were killed")
            wait([process.sentinel for process in alive], min(LOOK_S, left_s) if left_s > 0 else LOOK_S)
        proper = (None, 0, -signal.SIGTERM, -signal.SIGINT)  # by signal: they had only just started
        bad = [_ended(member.process.exitcode) for member in running if member.process.exitcode not in proper]
        if bad:
            raise BackendError(f"of {len(running)} processes not all ended properly: {', '.join(bad)}")


def _ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was ended by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def _in_process(serve: Callable[[Worker], None], worker: Worker) -> None:
    """Runs in a new process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.setpgrp()  # Ctrl-C reaches only the parent, which passes it on
    threading.Thread(target=_end_with_parent, name="unipinrec-parent", daemon=True).start()
    serve(worker)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    log.error("the parent process is gone; ending")
    os.kill(os.getpid(), signal.SIGINT)  # at once, so that a restart finds the port free
