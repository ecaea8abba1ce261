"""Several processes that serve together: one socket, one folder of users' events, an interpreter and threads for each.

The parent computes nothing. It holds the socket, so that no connection is lost while a process is replaced, kills what
hangs, restarts what dies, and hands signals on.
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
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType

from unipinrec.errors import BackendError
from unipinrec.runtime.server.process.lifecycle import Place, RunOptions, listen

LOOK_S = 0.2
GRACE_S = 10.0  # beyond what draining may take
RESTART_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # before a process that died is started again, the n-th time in a row
STABLE_S = 60.0  # a process that ran for so long has not died in a row
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Member:
    """A process, and how often in a row it died."""

    place: Place
    process: SpawnProcess
    began: float
    deaths: int = 0
    again: float | None = None
    """When it is started again; None = it runs."""
    beat_ns: int | None = None
    """When its event loop last said that it turns; None = it does not serve yet."""
    silent_s: float = 0.0
    """For how long the parent has looked since and seen no other."""


def serve_together(count: int, serve: Callable[[Place], None], options: RunOptions) -> None:
    """Let processes serve until a signal ends them; what was accepted is answered first.

    Args:
        count: How many.
        serve: What each of them does, with its place; a function of a module, with arguments that can be pickled.
        options: Where to listen, and how to end.

    Raises:
        ConfigError: The address cannot be had.
        BackendError: A process ended before any of them served, or did not end properly.
    """
    with (
        _noted_signals() as signals,
        listen(options.host, options.port) as listener,
        tempfile.TemporaryDirectory(prefix="unipinrec-") as folder,
    ):
        log.info("%d processes serve together", count)
        places = [Place(index=i, count=count, folder=Path(folder), listener=listener) for i in range(count)]
        _Parent(places, serve, options).run(signals)


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT in the order in which they come."""
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
    """Starts, watches, and ends."""

    def __init__(self, places: Sequence[Place], serve: Callable[[Place], None], options: RunOptions) -> None:
        self._places, self._serve, self._options = places, serve, options
        self._context = multiprocessing.get_context("spawn")
        self._members: list[_Member] = []
        self._served = False
        self._looked = time.monotonic()

    def _start(self, place: Place) -> _Member:
        process = self._context.Process(target=_in_process, args=(self._serve, place), name=f"unipinrec-{place.index}")
        process.start()
        return _Member(place=place, process=process, began=time.monotonic())

    def run(self, signals: list[int]) -> None:
        """Until a signal ends all of them.

        Raises:
            BackendError: See `serve_together`.
        """
        try:
            self._members += [self._start(place) for place in self._places]
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
        """Kill what hangs, start again what died."""
        now = time.monotonic()
        seen_s, self._looked = min(now - self._looked, 2 * LOOK_S), now  # less if the parent itself stood still
        self._served = self._served or any(one.place.socket_of(one.place.index).exists() for one in self._members)
        for at, member in enumerate(self._members):
            if member.again is not None and now >= member.again:
                self._members[at] = self._start(member.place)
                self._members[at].deaths = member.deaths
            elif member.again is None and not member.process.is_alive():
                self._died(member, now)
            elif member.again is None:
                self._listen_to(member, seen_s)

    def _listen_to(self, member: _Member, seen_s: float) -> None:
        with suppress(FileNotFoundError):
            beat_ns = member.place.socket_of(member.place.index).stat().st_mtime_ns
            member.silent_s = member.silent_s + seen_s if beat_ns == member.beat_ns else 0.0
            member.beat_ns = beat_ns
        if member.silent_s > self._options.hung_s:
            log.error("process %d has stood still for %.0f s; it is killed", member.place.index, member.silent_s)
            member.silent_s = 0.0
            member.process.kill()

    def _died(self, member: _Member, now: float) -> None:
        why = _ended(member.process.exitcode)
        if not self._served:
            raise BackendError(f"process {member.place.index} {why} before it served; what it said is above")
        member.deaths = 0 if now - member.began > STABLE_S else member.deaths
        delay_s = RESTART_S[min(member.deaths, len(RESTART_S) - 1)]
        member.deaths, member.again = member.deaths + 1, now + delay_s
        socket_path = member.place.socket_of(member.place.index)
        member.place = replace(member.place, again=not socket_path.exists())
        socket_path.unlink(missing_ok=True)
        log.error("process %d %s; it is started again in %g s", member.place.index, why, delay_s)

    def _end(self, signals: list[int]) -> None:
        """Hand signals on until all have ended."""
        running = [member for member in self._members if member.again is None]
        self._places[0].listener.close()  # the last process that closes it answers what waits in it
        limit = time.monotonic() + self._options.drain_delay_s + self._options.drain_s + GRACE_S
        while alive := [member.process for member in running if member.process.is_alive()]:
            for number in signals:
                for process in alive:
                    _send(process, number)
            signals.clear()
            if time.monotonic() > limit:
                raise BackendError(f"{len(alive)} processes did not end in time, and were killed")
            wait([process.sentinel for process in alive], LOOK_S)
        asked = (None, 0, -signal.SIGTERM, -signal.SIGINT)  # the latter of those that were only just starting
        bad = [_ended(member.process.exitcode) for member in running if member.process.exitcode not in asked]
        if bad:
            raise BackendError(f"of {len(running)} processes not all ended properly: {', '.join(bad)}")


def _send(process: SpawnProcess, number: int) -> None:
    if process.pid is not None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was ended by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def _in_process(serve: Callable[[Place], None], place: Place) -> None:
    """What a process runs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.setpgrp()  # Ctrl-C reaches the parent alone, which hands it on
    threading.Thread(target=_end_with_parent, name="unipinrec-parent", daemon=True).start()
    serve(place)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    log.error("the parent process is gone; ending")
    os.kill(os.getpid(), signal.SIGINT)  # without delay, so that who starts it again finds the port free
