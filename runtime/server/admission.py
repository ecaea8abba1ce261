"""Who may wait: a bounded number of requests, and none that would miss its deadline anyway.

Health and metrics do not come here. Everything runs in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from unipinrec.errors import ConfigError
from unipinrec.runtime.server.api import Refusal, whole_seconds

DEADLINE_EXCEEDED = 504
CAUTION = 2.0  # deviations that an answer may take longer than the mean
WEIGHT = 0.05  # of one request in the running means, once there were a few


class Admission:
    """Counts what was admitted and not yet answered, and learns how long that takes.

    Attributes:
        limit: Most requests that are admitted and not yet answered.
        pending: Requests that are.
        arriving: Those among them that the client has not sent yet: nobody waits for them.
        most_pending: The most that ever were.
        refused: Requests that were turned away.
        seconds_each: Running mean of the time to an answer over the requests that it shared the server with: those
            ahead and itself. It holds what batching saves, and what it costs to wait for the rest of a batch.
        deviation: Running mean of how far that is from its mean.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.perf_counter) -> None:
        if limit < 1:
            raise ConfigError(f"a queue of {limit} requests must hold at least 1")
        self.limit, self._clock = limit, clock
        self.pending = self.arriving = self.most_pending = self.refused = 0
        self.seconds_each = self.deviation = 0.0
        self._measured = 0

    @contextmanager
    def admit(self, within_s: float, *, measured: bool = True, arriving: bool = False) -> Iterator[Place]:
        """Hold a place until the request is answered.

        Args:
            within_s: How long that may take.
            measured: Whether how long it takes says something of those to come.
            arriving: Whether the client has yet to send it; until `Place.begin` it takes room, but nobody's time.

        Raises:
            Refusal: 429, there is no place, or those ahead take longer than `within_s`.
        """
        place = Place(self, within_s)
        place.add(1)
        place.arriving = int(arriving)
        self.arriving += place.arriving
        try:
            yield place
        except Refusal as refusal:
            if measured and refusal.status == DEADLINE_EXCEEDED and place.seconds_each() > self.seconds_each:
                self.learn(place.seconds_each())  # it took that long at least
            raise
        else:
            if measured:
                self.learn(place.seconds_each())
        finally:
            self.pending -= place.count
            self.arriving -= place.arriving

    def expected_s(self) -> float:
        """How long what is pending will take, by the latest measurements."""
        return (self.pending - self.arriving) * self.seconds_each

    def take(self, count: int, within_s: float) -> None:
        """See `admit`; for `Place`."""
        ahead = self.pending - self.arriving
        longest_s = ahead * (self.seconds_each + CAUTION * self.deviation)
        if self.pending + count > self.limit or longest_s > within_s:
            self.refused += 1
            why = f"{self.pending} requests are waiting, of at most {self.limit}"
            if longest_s > within_s:
                why = f"{ahead} requests are ahead, which may take {longest_s * 1e3:.0f} ms"
            raise Refusal(
                429,
                "overloaded",
                f"{why}; send the request again after Retry-After seconds",
                {"retry-after": whole_seconds(self.expected_s())},
            )
        self.pending += count
        self.most_pending = max(self.most_pending, self.pending)

    def learn(self, seconds: float) -> None:
        """Take account of one more measurement."""
        self._measured += 1
        weight = max(WEIGHT, 1 / self._measured)
        self.deviation += weight * (abs(seconds - self.seconds_each) * (self._measured > 1) - self.deviation)
        self.seconds_each += weight * (seconds - self.seconds_each)

    def now(self) -> float:
        """Seconds that never run backwards."""
        return self._clock()


class Place:
    """The place of one HTTP request, which may carry several."""

    def __init__(self, admission: Admission, within_s: float) -> None:
        self._admission, self._within_s, self.count, self.arriving = admission, within_s, 0, 0
        self.begin()

    def add(self, count: int) -> None:
        """Take room for more requests.

        Raises:
            Refusal: 429, there is none.
        """
        self._admission.take(count, self._within_s)
        self.count += count

    def begin(self) -> None:
        """From here on it is the server that takes its time: all that the client has to send is there."""
        self._admission.arriving -= self.arriving
        self.arriving = 0
        others = self._admission.pending - self.count - self._admission.arriving
        self._began, self._ahead = self._admission.now(), others

    def seconds_each(self) -> float:
        """What it took since, divided among those ahead and itself."""
        return (self._admission.now() - self._began) / (self._ahead + self.count)


class UsersInFlight:
    """Which users are being answered, so that forgetting one can wait for what was begun before."""

    def __init__(self) -> None:
        self._calls: dict[str, set[asyncio.Future[None]]] = {}

    def enter(self, user: str | None) -> Callable[[], None]:
        """From now on a request of this user is under way; call what is returned, in the loop's thread, at its end."""
        if user is None:
            return _nothing
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
        """What is under way for a user at this moment."""
        return set(self._calls.get(user, ()))


def _nothing() -> None:
    pass
