"""Who may wait: a bounded number of requests, and none that would miss its deadline anyway.

Health and metrics do not come here. Everything runs in the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from unipinrec.errors import ConfigError
from unipinrec.runtime.server_api import Refusal, whole_seconds

WEIGHT = 0.02  # of one answer in the running mean: the last hundred or so count


class Admission:
    """Counts what was admitted and not yet answered, and knows how long that will take.

    Attributes:
        limit: Most requests that are admitted and not yet answered.
        pending: Requests that are.
        most_pending: The most that ever were.
        refused: Requests that were turned away.
        seconds_each: Running mean of what a request takes, its share of a batch; 0 = not known yet.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ConfigError(f"a queue of {limit} requests must hold at least 1")
        self.limit = limit
        self.pending = self.most_pending = self.refused = 0
        self.seconds_each = 0.0

    @contextmanager
    def admit(self, within_s: float) -> Iterator[Place]:
        """Hold a place until the request is answered.

        Raises:
            Refusal: 429, there is no place, or those ahead take longer than `within_s`.
        """
        place = Place(self, within_s)
        place.add(1)
        try:
            yield place
        finally:
            place.leave()

    def expected_s(self) -> float:
        """How long what is pending will take, by the latest measurements."""
        return self.pending * self.seconds_each

    def take(self, count: int, within_s: float) -> None:
        """See `admit`; for `Place`."""
        ahead_s = self.expected_s()
        if self.pending + count > self.limit or ahead_s > within_s:
            self.refused += 1
            why = f"{self.pending} requests are waiting, of at most {self.limit}"
            if ahead_s > within_s:
                why = f"{self.pending} requests are ahead, which take about {ahead_s * 1e3:.0f} ms"
            raise Refusal(
                429,
                "overloaded",
                f"{why}; send the request again after Retry-After seconds",
                {"retry-after": whole_seconds(ahead_s)},
            )
        self.pending += count
        self.most_pending = max(self.most_pending, self.pending)

    def measured(self, seconds: float) -> None:
        """Take account of what one more request took."""
        self.seconds_each += (WEIGHT if self.seconds_each else 1.0) * (seconds - self.seconds_each)

    def give_back(self, count: int) -> None:
        """Free places."""
        self.pending -= count


class Place:
    """The place of one HTTP request, which may carry several."""

    def __init__(self, admission: Admission, within_s: float) -> None:
        self._admission, self._within_s, self._count = admission, within_s, 0

    def add(self, count: int) -> None:
        """Take room for more requests.

        Raises:
            Refusal: 429, there is none.
        """
        self._admission.take(count, self._within_s)
        self._count += count

    def leave(self) -> None:
        """Give all room back."""
        self._admission.give_back(self._count)
