"""Requests at times that do not depend on the answers (open loop), and connections that carry them.

Arrivals are a Poisson process. A request's latency is counted from the moment it was due, not from when it was sent: a
server that stalls does not stall the clock (no coordinated omission). Two generators: MLCommons LoadGen in its Server
scenario (`bench/open_loop_mlperf.py`), and `arrive`, which needs no package and can run until it is stopped.

Connections are raw sockets, kept open: the issuing thread writes at once, one thread reads all answers with epoll. An
HTTP client library would take more of the two cores than the server does.
"""

from __future__ import annotations

import random
import re
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple

HEAD_END, LENGTH = b"\r\n\r\n", re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
MOST, GRACE_S = 1024, 30.0


class Answer(NamedTuple):
    """Status (0 = the connection was refused or broke), head and content."""

    status: int
    head: bytes
    content: bytes


class Sample(NamedTuple):
    """A request that was made: which, when it was due and sent and answered, and what came back."""

    position: int
    late_ms: float
    latency_ms: float
    answer: Answer


Done = Callable[[Answer], None]
BROKEN = Answer(0, b"", b"")


class _Connection:
    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.got = b""
        self.done: Done | None = None


class Connections:
    """As many connections to one port as there are requests under way, at most `MOST`; the others wait, and count."""

    def __init__(self, port: int) -> None:
        self._port, self._lock, self._closed = port, threading.Lock(), False
        self._free: deque[_Connection] = deque()
        self._waiting: deque[tuple[bytes, Done]] = deque()
        self._open: dict[int, _Connection] = {}
        self._epoll = select.epoll()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def send(self, message: bytes, done: Done) -> None:
        """Send, and have `done` called on the reading thread; on this one if the server cannot be reached."""
        with self._lock:
            if not self._free and len(self._open) >= MOST:
                self._waiting.append((message, done))
                return
            # The one that rested longest, so that none rests until the server closes it.
            connection = self._free.popleft() if self._free else None
        try:
            connection = connection or self._connect()
        except OSError:
            done(BROKEN)
            return
        connection.done = done
        try:
            connection.socket.sendall(message)
        except OSError:
            self._drop(connection)

    def close(self) -> None:
        self._closed = True
        self._reader.join()
        for connection in list(self._open.values()):
            self._drop(connection)
        self._epoll.close()

    def __enter__(self) -> Connections:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> _Connection:
        connection = _Connection(self._port)
        self._open[connection.socket.fileno()] = connection
        self._epoll.register(connection.socket.fileno(), select.EPOLLIN)
        return connection

    def _read(self) -> None:
        while not self._closed:
            for number, _ in self._epoll.poll(0.1):
                connection = self._open.get(number)
                if connection is not None:
                    self._receive(connection)

    def _receive(self, connection: _Connection) -> None:
        try:
            part = connection.socket.recv(1 << 18)
        except OSError:
            part = b""
        if not part:
            self._drop(connection)
            return
        connection.got += part
        head, end, content = connection.got.partition(HEAD_END)
        found = LENGTH.search(head)
        if not end or found is None or len(content) < int(found[1]):
            return
        connection.got, done, connection.done = b"", connection.done, None
        assert done is not None
        self._release(connection)
        done(Answer(int(head[9:12]), head, content))

    def _release(self, connection: _Connection) -> None:
        with self._lock:
            self._free.append(connection)
            waiting = self._waiting.popleft() if self._waiting else None
        if waiting is not None:
            self.send(*waiting)

    def _drop(self, connection: _Connection) -> None:
        with self._lock:
            known = self._open.pop(connection.socket.fileno(), None)
            if connection in self._free:
                self._free.remove(connection)
            done, connection.done = connection.done, None
            waiting = self._waiting.popleft() if self._waiting else None
        if known is not None:
            connection.socket.close()
        if done is not None:
            done(BROKEN)
        if waiting is not None:
            self.send(*waiting)


def post(path: str, content: bytes, *headers: str) -> bytes:
    """The bytes of a POST."""
    lines = "".join(f"{header}\r\n" for header in headers)
    return b"POST %s HTTP/1.1\r\nhost: x\r\n%scontent-length: %d\r\n\r\n%s" % (
        path.encode(),
        lines.encode(),
        len(content),
        content,
    )


def ask(port: int, messages: Sequence[bytes]) -> list[Answer]:
    """Send messages one after another and wait for each answer."""
    answers: list[Answer] = []
    with Connections(port) as connections:
        for message in messages:
            got: SimpleQueue[Answer] = SimpleQueue()
            connections.send(message, got.put)
            answers.append(got.get(timeout=GRACE_S))
    return answers


def arrive(issue: Callable[[float], None], qps: float, go_on: Callable[[], bool], seed: int = 0) -> None:
    """Call `issue` at Poisson times with the moment (`time.perf_counter`) at which the call was due."""
    rng, due = random.Random(seed), time.perf_counter()
    while go_on():
        due += rng.expovariate(qps)
        time.sleep(max(0.0, due - time.perf_counter()))
        issue(due)


def poisson(port: int, messages: Sequence[bytes], qps: float, seconds: float) -> list[Sample]:
    """Messages drawn at random, by `arrive`."""
    samples: list[Sample] = []
    rng, sent, end = random.Random(1), 0, time.perf_counter() + seconds

    def issue(due: float) -> None:
        nonlocal sent
        sent, index, late = sent + 1, rng.randrange(len(messages)), time.perf_counter() - due

        def done(answer: Answer) -> None:
            samples.append(Sample(index, late * 1e3, (time.perf_counter() - due) * 1e3, answer))

        connections.send(messages[index], done)

    with Connections(port) as connections:
        arrive(issue, qps, lambda: time.perf_counter() < end)
        limit = time.monotonic() + GRACE_S
        while len(samples) < sent and time.monotonic() < limit:
            time.sleep(0.01)
    lost = sent - len(samples)
    return samples + [Sample(0, 0.0, float("inf"), BROKEN)] * lost
