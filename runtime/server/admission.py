"""Admits requests: a bounded number, and none that would miss its deadline anyway.

Health checks and metrics are always admitted. Everything runs in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

from unipinrec.errors import ConfigError
from unipinrec.runtime.server.bodies import ApiError, whole_seconds

DEADLINE_EXCEEDED = 504
CAUTION = 2.0  # deviations that an answer may take longer than the mean
WEIGHT = 0.05  # of a new request in the running means, after the first few


class Admission:
    """Counts pending requests, which are admitted and not yet answered, and learns how long an answer takes.

    Attributes:
        limit: Most pending requests.
        pending: Pending requests, and those that were given up but still compute.
        arriving: Pending requests that the client has not sent completely. The others need not wait for them.
        most_pending: Largest value of `pending` so far.
        refused: Requests that were rejected.
        seconds_each: Running mean of the time to an answer, divided among the request and those ahead of it. It thus
            includes what batching saves, and the wait for the rest of a batch.
        deviation: Running mean of the distance from that mean.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.perf_counter) -> None:
        if limit < 1:
            raise ConfigError(f"a queue of {limit} requests must hold at least 1")
        self.limit, self.now = limit, clock
        self.pending = self.arriving = self.most_pending = self.refused = 0
        self.seconds_each = self.deviation = 0.0
        self._measured = 0

    @contextmanager
    def admit(self, within_s: float, *, measured: bool = True, arriving: bool = False) -> Iterator[Ticket]:
        """Hold a place until the request is answered.

        Args:
            within_s: How long the answer may take.
            measured: Whether to learn from how long it takes.
            arriving: Whether the client still has to send its body; until `Ticket.begin` it takes room, but no time.

        Raises:
            ApiError: 429, there is no room, or the requests ahead take longer than `within_s`.
        """
        ticket = Ticket(self, within_s)
        ticket.add(1)
        ticket.arriving = int(arriving)
        self.arriving += ticket.arriving
        try:
            yield ticket
        except ApiError as refusal:
            if measured and refusal.status == DEADLINE_EXCEEDED and ticket.seconds_each() > self.seconds_each:
                self.learn(ticket.seconds_each())  # an answer would have taken at least that long
            raise
        else:
            if measured:
                self.learn(ticket.seconds_each())
        finally:
            self.pending -= ticket.count - ticket.outlasting
            self.arriving -= ticket.arriving

    def take(self, count: int, within_s: float) -> None:
        """Take room for `count` requests; see `admit`."""
        ahead = self.pending - self.arriving
        longest_s = ahead * (self.seconds_each + CAUTION * self.deviation)
        if self.pending + count > self.limit or longest_s > within_s:
            self.refused += 1
            reason = f"{self.pending} requests are waiting, of at most {self.limit}"
            if longest_s > within_s:
                reason = f"{ahead} requests are ahead, which may take {longest_s * 1e3:.0f} ms"
            message = f"{reason}; send the request again after Retry-After seconds"
            raise ApiError(429, "overloaded", message, {"retry-after": whole_seconds(ahead * self.seconds_each)})
        self.pending += count
        self.most_pending = max(self.most_pending, self.pending)

    def learn(self, seconds: float) -> None:
        """Add a measurement to the means."""
        self._measured += 1
        weight = max(WEIGHT, 1 / self._measured)
        self.deviation += weight * (abs(seconds - self.seconds_each) * (self._measured > 1) - self.deviation)
        self.seconds_each += weight * (seconds - self.seconds_each)


class Ticket:
    """The place of one HTTP request, which may hold a list of requests."""

    def __init__(self, admission: Admission, within_s: float) -> None:
        self._admission, self._within_s = admission, within_s
        self.count = self.arriving = self.outlasting = 0
        self.begin()

    def add(self, count: int) -> None:
        """Take room for more requests.

        Raises:
            ApiError: 429, there is none.
        """
        self._admission.take(count, self._within_s)
        self.count += count

    def begin(self) -> None:
        """The client has sent all; the time to the answer is measured from here."""
        self._admission.arriving -= self.arriving
        self.arriving = 0
        self._ahead = self._admission.pending - self.count - self._admission.arriving
        self._began = self._admission.now()

    def outlast(self, computation: Future[Any]) -> None:
        """Keep the place of a request until its computation is done, although the request may end before."""
        if not computation.done():
            self.outlasting += 1
            when_done(computation, self._free)

    def _free(self) -> None:
        self._admission.pending -= 1

    def seconds_each(self) -> float:
        """Seconds since `begin`, divided among the request and those ahead of it."""
        return (self._admission.now() - self._began) / (self._ahead + self.count)


def when_done(computation: Future[Any] | asyncio.Future[Any], act: Callable[[], None]) -> None:
    """Act in the running event loop when a computation is done, unless the loop is closed by then."""
    loop = asyncio.get_running_loop()

    def done(_: Any) -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(act)

    computation.add_done_callback(done)


class UsersInFlight:
    """Users with requests in flight, so that forgetting a user can wait for earlier requests."""

    def __init__(self) -> None:
        self._calls: dict[str, set[asyncio.Future[None]]] = {}

    def enter(self, user: str | None) -> Callable[[], None]:
        """Note a request of this user; at its end call the returned function, in the loop's thread."""
        if user is None:
            return lambda: None
        token = asyncio.get_running_loop().create_future()
        calls = self._calls.setdefault(user, set())
        calls.add(token)

        def leave() -> None:
            if not token.done():
                token.set_result(None)
                calls.discard(token)
                if not calls and self._calls.get(user) is calls:
                    del self._calls[user]

        return leave

    def of(self, user: str) -> set[asyncio.Future[None]]:
        """A future for each request of the user that is in flight."""
        return set(self._calls.get(user, ()))
