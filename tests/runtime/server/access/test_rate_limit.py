from __future__ import annotations

import math

import pytest

from unipinrec.errors import ConfigError
from unipinrec.runtime.server.access.rate_limit import MOST_CLIENTS, RateLimit
from unipinrec.runtime.server.bodies import ApiError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def accepted(limit: RateLimit, client: str, count: int) -> int:
    taken = 0
    for _ in range(count):
        try:
            limit.take(client)
        except ApiError:
            continue
        taken += 1
    return taken


def test_a_burst_then_the_rate() -> None:
    clock = Clock()
    limit = RateLimit(10, 3, clock)
    assert accepted(limit, "a", 20) == 3
    assert accepted(limit, "b", 20) == 3, "each client has its own"
    for _ in range(50):
        clock.now += 0.1
        assert accepted(limit, "a", 5) == 1
    clock.now += 3600
    assert accepted(limit, "a", 20) == 3, "the bucket holds no more than the burst"


def test_retry_after_is_when_the_next_one_is_accepted() -> None:
    clock = Clock()
    limit = RateLimit(0.25, clock=clock)
    limit.take("a")
    clock.now += 0.5
    with pytest.raises(ApiError, match=r"may send 0.25 requests a second, 1 at once") as refused:
        limit.take("a")
    assert (refused.value.status, refused.value.detail.code) == (429, "rate_limited")
    assert refused.value.headers == {"retry-after": "4"}
    clock.now += 3.4
    assert accepted(limit, "a", 1) == 0
    clock.now += 0.1
    assert accepted(limit, "a", 1) == 1


def test_a_list_counts_as_many() -> None:
    clock = Clock()
    limit = RateLimit(10, 2, clock)
    limit.take("a")
    limit.charge("a", 30)
    clock.now += 2.9
    assert accepted(limit, "a", 1) == 0
    clock.now += 0.1
    assert accepted(limit, "a", 2) == 1


def test_memory_is_bounded() -> None:
    limit = RateLimit(1, clock=Clock())
    for index in range(MOST_CLIENTS + 500):
        limit.take(str(index))
        limit.charge("busy", 1)
    assert len(limit) == MOST_CLIENTS
    assert accepted(limit, str(MOST_CLIENTS + 499), 1) == 0
    assert accepted(limit, "busy", 1) == 0, "the client that was silent for longest is forgotten, not this one"
    assert accepted(limit, "0", 1) == 1


@pytest.mark.parametrize(("per_s", "burst"), [(0, None), (-1, 2), (math.inf, None), (math.nan, 1), (5, 0)])
def test_no_limit_at_all_is_refused(per_s: float, burst: int | None) -> None:
    with pytest.raises(ConfigError, match=f"rate_limit={per_s} must be more than 0 a second, and rate_burst={burst}"):
        RateLimit(per_s, burst)
