from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from unipinrec.errors import BackendError, CacheError, ConfigError
from unipinrec.runtime import CacheOptions, KvCache
from unipinrec.runtime.bundle.manifest import Manifest, ModelSpec
from unipinrec.runtime.kv.cache import CacheKey, Lease

PAGE_BYTES = 32  # two slots of a key and a value of one head of two fp32 values


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def key(events: str, user: str = "u", namespace: str = "one", start: int = 0) -> CacheKey:
    """A history of one event for each letter."""
    return CacheKey(user=user, namespace=namespace, events=events.encode(), count=len(events), start=start)


def slots_of(asked: CacheKey, first: int = 0) -> list[NDArray[np.float32]]:
    """What encoding gives for slots `first` and after: values that depend on all events up to theirs."""
    beginnings = [asked.events[:index] for index in range(first, asked.count + 1)]
    numbers = [zlib.crc32(events) % 10_000 for events in beginnings]
    values = np.repeat(np.array(numbers, np.float32), 2).reshape(1, -1, 2)
    return [values, -values]


def state_of(asked: CacheKey) -> NDArray[np.float32]:
    return np.array([zlib.crc32(asked.events), asked.count], np.float32)


def ask(cache: KvCache, asked: CacheKey) -> Lease:
    """Answer a request: encode what is new and keep it."""
    with cache.lookup(asked) as lease:
        if lease.kind != "hit":
            assert lease.write(slots_of(asked, lease.slots)) == lease.written
        if lease.slots or lease.written:
            check_content(lease)
        lease.commit(state_of(asked))
    return lease


def check_content(lease: Lease) -> None:
    """What a lease reads is what encoding its history gives."""
    count = lease.key.count + 1 if lease.written else lease.slots
    out = np.full((2, 1, count, 2), np.nan, np.float32)
    lease.read(out)
    np.testing.assert_array_equal(out, [values[:, :count] for values in slots_of(lease.key)])


def found(lease: Lease) -> tuple[str, str | None]:
    return lease.kind, lease.reason


@pytest.fixture
def model(manifest: Manifest) -> ModelSpec:
    """One layer of one head of two, one prefix slot."""
    return manifest.model


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(model: ModelSpec, clock: Clock) -> Callable[..., KvCache]:
    """Makes a cache of some pages of two slots."""

    def cache(pages: int = 20, ttl_s: float | None = None) -> KvCache:
        options = CacheOptions(budget_bytes=pages * PAGE_BYTES, dtype="fp32", ttl_s=ttl_s, page_slots=2)
        return KvCache(model, options, clock)

    return cache


@pytest.fixture
def cache(make: Callable[..., KvCache]) -> KvCache:
    return make()


def test_what_a_request_finds(cache: KvCache) -> None:
    first = ask(cache, key("abc"))
    assert (first.kind, first.reason, first.count, first.slots) == ("miss", "new", 0, 0)
    again = ask(cache, key("abc"))
    assert (again.kind, again.reason, again.count, again.slots) == ("hit", None, 3, 4)
    np.testing.assert_array_equal(again.last_hidden_state, state_of(key("abc")))
    longer = ask(cache, key("abcde"))
    assert (longer.kind, longer.reason, longer.count, longer.slots) == ("extended", None, 3, 4)
    assert found(ask(cache, key("abcde"))) == ("hit", None)
    assert found(ask(cache, key("abcd"))) == ("miss", "truncated")
    assert found(ask(cache, key("xbcd"))) == ("miss", "edited")
    assert found(ask(cache, key("xbcd", start=2))) == ("miss", "shifted")
    assert found(ask(cache, key("xbcd", start=2, namespace="two"))) == ("miss", "version")
    assert found(ask(cache, key("xbcd", start=2, namespace="two"))) == ("hit", None)
    assert found(ask(cache, key("xbcd", user="v"))) == ("miss", "new")
    statistics = cache.statistics()
    assert (statistics.hits, statistics.extended, statistics.entries) == (3, 1, 2)
    assert statistics.misses == {"edited": 1, "new": 2, "shifted": 1, "truncated": 1, "version": 1}
    cache.check_integrity()


def test_the_least_recently_used_makes_room(make: Callable[..., KvCache]) -> None:
    cache = make(pages=6)
    for user in "abc":
        ask(cache, key("xyz", user))  # two pages each
    assert found(ask(cache, key("xyz", "a"))) == ("hit", None)
    assert found(ask(cache, key("xyz", "d"))) == ("miss", "new")
    assert found(ask(cache, key("xyz", "b"))) == ("miss", "evicted")  # and makes c go
    assert found(ask(cache, key("xyz", "a"))) == ("hit", None)
    assert found(ask(cache, key("xyz", "c"))) == ("miss", "evicted")
    assert found(ask(cache, key("xyz", "d", namespace="two"))) == ("miss", "version")  # and evicted as well
    assert cache.statistics().evictions == 4
    cache.check_integrity()


def test_an_entry_grows_over_the_oldest(make: Callable[..., KvCache]) -> None:
    cache = make(pages=4)
    ask(cache, key("x", "a"))
    ask(cache, key("xyz", "b"))
    assert found(ask(cache, key("xyzxyz", "b"))) == ("extended", None)
    assert found(ask(cache, key("xyzxyz", "b"))) == ("hit", None)
    assert cache.statistics().evictions == 1
    assert found(ask(cache, key("x", "a"))) == ("miss", "evicted")


def test_what_is_in_use_is_not_evicted(make: Callable[..., KvCache]) -> None:
    cache = make(pages=4)
    ask(cache, key("xyz", "a"))
    ask(cache, key("xyz", "b"))
    with cache.lookup(key("xyz", "a")) as oldest:
        ask(cache, key("xyz", "b"))
        ask(cache, key("xyz", "c"))
        check_content(oldest)
        with cache.lookup(key("xyz", "c")):
            assert not ask(cache, key("x", "d")).written
            assert cache.statistics().unstored == 1
            assert cache.statistics().pinned == 2
            cache.check_integrity()
    assert found(ask(cache, key("xyz", "a"))) == ("hit", None)
    assert found(ask(cache, key("x", "b"))) == ("miss", "evicted")
    assert cache.statistics().pinned == 0


def test_what_is_not_used_expires(make: Callable[..., KvCache], clock: Clock) -> None:
    cache = make(ttl_s=10.0)
    ask(cache, key("x", "a"))
    clock.now += 4.0
    ask(cache, key("x", "b"))
    clock.now += 5.0
    assert found(ask(cache, key("x", "a"))) == ("hit", None)
    clock.now += 5.0
    assert cache.statistics().entries == 1
    assert found(ask(cache, key("x", "b"))) == ("miss", "expired")
    clock.now += 4.9
    assert found(ask(cache, key("x", "a"))) == ("hit", None)
    clock.now += 10.0
    assert found(ask(cache, key("x", "a"))) == ("miss", "expired")
    cache.check_integrity()


def test_what_expires_in_use_can_still_be_read(make: Callable[..., KvCache], clock: Clock) -> None:
    cache = make(ttl_s=10.0)
    ask(cache, key("x"))
    with cache.lookup(key("xy")) as lease:
        clock.now += 10.0
        assert cache.statistics().entries == 0
        ask(cache, key("z", "v"))
        check_content(lease)
        lease.write(slots_of(key("xy"), 2))
        lease.commit(state_of(key("xy")))
    assert found(ask(cache, key("xy"))) == ("miss", "expired")
    assert cache.statistics().unstored == 1
    cache.check_integrity()


@pytest.mark.parametrize("events", ["xy", "xyz", "ab"], ids=["hit", "extended", "miss"])
@pytest.mark.parametrize("forget", ["invalidate", "clear"])
@pytest.mark.parametrize("when", ["before writing", "before committing"])
def test_a_forgotten_user_does_not_come_back(cache: KvCache, events: str, forget: str, when: str) -> None:
    ask(cache, key("xy"))
    asked = key(events)
    with cache.lookup(asked) as lease:
        if when == "before committing":
            lease.write(slots_of(asked, lease.slots))
        cache.clear() if forget == "clear" else cache.invalidate("u")
        if when == "before writing":
            lease.write(slots_of(asked, lease.slots))
        if lease.slots:
            check_content(lease)
        lease.commit(state_of(asked))
        cache.check_integrity()
    statistics = cache.statistics()
    assert (statistics.entries, statistics.bytes_used, statistics.bytes_beside) == (0, 0, 0)
    assert found(ask(cache, asked))[0] == "miss"
    assert found(ask(cache, asked)) == ("hit", None)
    cache.check_integrity()


def test_forgetting(cache: KvCache) -> None:
    ask(cache, key("x", "a"))
    ask(cache, key("x", "b"))
    assert [cache.invalidate(user) for user in ("a", "a", "nobody")] == [True, False, False]
    assert found(ask(cache, key("x", "a"))) == ("miss", "invalidated")
    assert found(ask(cache, key("x", "b"))) == ("hit", None)
    cache.clear()
    assert cache.statistics().entries == 0
    assert found(ask(cache, key("x", "a"))) == ("miss", "invalidated")
    assert found(ask(cache, key("x", "b"))) == ("miss", "invalidated")


def test_two_that_extend_the_same_entry_are_both_answered(cache: KvCache) -> None:
    ask(cache, key("ab"))
    first, second = cache.lookup(key("abcd")), cache.lookup(key("abxy"))
    first.write(slots_of(key("abcd"), 3))
    second.write(slots_of(key("abxy"), 3))
    assert (first.written, second.written) == (True, False)
    check_content(first)
    check_content(second)
    first.commit(state_of(key("abcd")))
    late = cache.lookup(key("abcde"))
    first.close()
    second.commit(state_of(key("abxy")))
    second.write(slots_of(key("abxy"), 3))  # the entry is now longer than what this lease has seen
    second.close()
    assert late.count == 4
    late.close()
    assert cache.statistics().unstored == 1
    assert found(ask(cache, key("abcd"))) == ("hit", None)
    cache.check_integrity()


def test_after_one_gave_up_another_may_extend(cache: KvCache) -> None:
    ask(cache, key("ab"))
    with cache.lookup(key("abxy")):
        with cache.lookup(key("abcd")) as first:
            first.write(slots_of(key("abcd"), 3))
        assert ask(cache, key("abxy")).written
    assert found(ask(cache, key("abxy"))) == ("hit", None)
    cache.check_integrity()


def test_an_edited_entry_is_replaced_while_another_reads_it(cache: KvCache) -> None:
    ask(cache, key("abc"))
    with cache.lookup(key("abc")) as reader, cache.lookup(key("abcd")) as writer:
        assert found(ask(cache, key("xbc"))) == ("miss", "edited")
        for user in "0123456":
            ask(cache, key("ppp", user))
        check_content(reader)
        writer.write(slots_of(key("abcd"), 4))
        writer.commit(state_of(key("abcd")))
        cache.check_integrity()
        used = cache.statistics().bytes_used
    assert cache.statistics().bytes_used == used - 2 * PAGE_BYTES
    assert found(ask(cache, key("xbc"))) == ("hit", None)
    assert cache.statistics().unstored == 1


@pytest.mark.parametrize("loss", ["edited", "expired"])
def test_what_is_lost_while_it_is_extended_stays_lost(make: Callable[..., KvCache], clock: Clock, loss: str) -> None:
    cache = make(ttl_s=10.0)
    ask(cache, key("abc"))
    with cache.lookup(key("abcd")) as lease:
        lease.write(slots_of(key("abcd"), 4))
        if loss == "edited":
            ask(cache, key("xbc"))
        else:
            clock.now += 10.0
            assert cache.statistics().entries == 0
        before = cache.statistics()
        lease.commit(state_of(key("abcd")))
        assert cache.statistics() == before
        check_content(lease)
    assert cache.statistics().unstored == 1
    assert found(ask(cache, key("abcd"))) == ("miss", loss)
    cache.check_integrity()


def test_two_that_miss_the_same_user_are_both_answered(cache: KvCache) -> None:
    with cache.lookup(key("ab")) as first, cache.lookup(key("ab")) as second:
        for lease in (first, second):
            lease.write(slots_of(key("ab")))
            lease.commit(state_of(key("ab")))
    statistics = cache.statistics()
    assert (statistics.entries, statistics.misses, statistics.unstored) == (1, {"new": 2}, 1)
    assert statistics.bytes_used == 2 * PAGE_BYTES
    cache.check_integrity()


def test_a_failed_replacement_has_a_reason(cache: KvCache) -> None:
    ask(cache, key("abc"))
    with cache.lookup(key("xbc")) as lease:
        lease.write(slots_of(key("xbc")))
    assert found(ask(cache, key("xbc"))) == ("miss", "edited")
    with cache.lookup(key("xb")) as lease:
        lease.write(slots_of(key("xb")))
    assert found(ask(cache, key("xb"))) == ("miss", "truncated")


def test_a_history_larger_than_the_cache_is_answered(make: Callable[..., KvCache]) -> None:
    cache = make(pages=2)
    ask(cache, key("x", "v"))
    lease = ask(cache, key("abcd"))
    assert (lease.kind, lease.written) == ("miss", False)
    assert found(ask(cache, key("x", "v"))) == ("hit", None)  # nobody is evicted in vain
    assert found(ask(cache, key("xyzxyz", "v"))) == ("extended", None)
    assert found(ask(cache, key("x", "v"))) == ("hit", None)
    statistics = cache.statistics()
    assert (statistics.unstored, statistics.entries, statistics.evictions) == (2, 1, 0)
    cache.check_integrity()


def test_what_is_not_committed_leaves_nothing(cache: KvCache) -> None:
    ask(cache, key("ab"))
    before = cache.statistics()
    for asked in (key("ab"), key("abc"), key("abc", "new")):
        lease = cache.lookup(asked)
        lease.write(slots_of(asked, lease.slots))
        lease.close()
        lease.close()
    after = cache.statistics()
    assert (after.entries, after.bytes_used, after.bytes_beside) == (1, before.bytes_used, before.bytes_beside)
    assert (after.pinned, after.unstored) == (0, 0)
    assert found(ask(cache, key("ab"))) == ("hit", None)
    assert found(ask(cache, key("abc", "new"))) == ("miss", "new")
    cache.check_integrity()


def test_a_value_that_does_not_fit_leaves_nothing(model: ModelSpec) -> None:
    cache = KvCache(model, CacheOptions(budget_bytes=1024, dtype="fp16", page_slots=2))
    values = np.array([[[1.0, 2.0], [3.0, 1e6]]], np.float32)
    with pytest.raises(BackendError, match=r"1e\+06 does not fit into fp16"), cache.lookup(key("a")) as lease:
        lease.write([values, values])
    assert (cache.statistics().entries, cache.statistics().bytes_used) == (0, 0)
    assert found(cache.lookup(key("a"))) == ("miss", "new")
    cache.check_integrity()


def test_statistics(make: Callable[..., KvCache]) -> None:
    cache = make(pages=10)
    for user in "abc":
        ask(cache, key("xyzz", user))  # three pages, four bytes of events, eight of state
    statistics = cache.statistics()
    assert (statistics.bytes_budget, statistics.bytes_used) == (10 * PAGE_BYTES, 9 * PAGE_BYTES)
    assert statistics.bytes_beside == 3 * (4 + 8)
    ask(cache, key("xyzzyx", "a"))
    cache.invalidate("b")
    statistics = cache.statistics()
    assert (statistics.bytes_used, statistics.bytes_high_water) == (7 * PAGE_BYTES, 10 * PAGE_BYTES)
    assert statistics.bytes_beside == (6 + 8) + (4 + 8)
    cache.clear()
    statistics = cache.statistics()
    assert (statistics.bytes_used, statistics.bytes_beside, statistics.bytes_high_water) == (0, 0, 10 * PAGE_BYTES)
    assert (statistics.hits, statistics.extended, statistics.misses) == (0, 1, {"new": 3})


@pytest.mark.parametrize(("late", "kept"), [("abc", True), ("abcde", True), ("abcdef", False), ("xyz", True)])
def test_a_late_miss_does_not_drop_what_another_request_just_published(cache: KvCache, late: str, kept: bool) -> None:
    slow = cache.lookup(key(late))
    ask(cache, key("abcde"))
    assert slow.write(slots_of(key(late))) != kept
    after = "hit" if kept else "miss"
    assert ask(cache, key("abcde")).kind == after
    slow.close()
    assert cache.statistics().evictions == 0
    cache.check_integrity()


def test_a_miss_that_is_not_late_takes_the_place_of_a_longer_history(cache: KvCache) -> None:
    ask(cache, key("abcde"))
    assert found(ask(cache, key("abc"))) == ("miss", "truncated")
    assert ask(cache, key("abc")).kind == "hit"


def test_a_late_miss_of_another_bundle_is_kept(cache: KvCache) -> None:
    with cache.lookup(key("abc", namespace="two")) as slow:
        ask(cache, key("abcde"))
        assert slow.write(slots_of(key("abc")))


def test_a_budget_is_rounded_down_to_pages(model: ModelSpec) -> None:
    cache = KvCache(model, CacheOptions(budget_bytes=3 * PAGE_BYTES + 31, dtype="fp32", page_slots=2))
    assert cache.statistics().bytes_budget == 3 * PAGE_BYTES


def test_only_so_many_losses_are_remembered(cache: KvCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unipinrec.runtime.kv.cache.REMEMBERED", 2)
    for user in "abc":
        ask(cache, key("x", user))
        cache.invalidate(user)
    assert [ask(cache, key("x", user)).reason for user in "abc"] == ["new", "invalidated", "invalidated"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"budget_bytes": 63}, "a cache budget of 63 bytes does not hold one page of 64 bytes .4 events as fp32."),
        ({"budget_bytes": 0}, "a cache budget of 0 bytes"),
        ({"budget_bytes": 4e9}, r"budget_bytes=4000000000\.0 must be an integer"),
        ({"page_slots": 2.5}, r"page_slots=2\.5 must be an integer"),
        ({"threads": -1}, "threads=-1 must be an integer of at least 1, or None"),
        ({"threads": 2.0}, r"threads=2\.0 must be an integer"),
        ({"ttl_s": "5"}, "ttl_s='5' must be more than 0"),
        ({"ttl_s": 0.0}, r"ttl_s=0\.0 must be more than 0, or None"),
        ({"ttl_s": float("nan")}, "ttl_s=nan must be more than 0"),
        ({"dtype": "fp8"}, "kv dtype 'fp8' is not one of"),
        ({"page_slots": 0}, "page_slots=0 must be at least 1"),
    ],
)
def test_options_that_cannot_be(model: ModelSpec, changes: dict[str, Any], match: str) -> None:
    options = CacheOptions(budget_bytes=1 << 10, dtype="fp32", page_slots=4)
    with pytest.raises(ConfigError, match=match):
        KvCache(model, replace(options, **changes))


def test_a_lease_that_is_closed_stores_nothing_more(cache: KvCache) -> None:
    asked = key("abc")
    with cache.lookup(asked) as lease:
        assert lease.write(slots_of(asked))
    lease.commit(state_of(asked))
    with pytest.raises(CacheError, match="user 'u': the lease is closed"):
        lease.write(slots_of(asked))
    cache.check_integrity()
    assert cache.statistics().entries == 0


def test_a_lease_is_committed_once(cache: KvCache) -> None:
    asked = key("abc")
    with cache.lookup(asked) as lease:
        assert lease.write(slots_of(asked))
        for _ in range(2):
            lease.commit(state_of(asked))
        cache.check_integrity()
    with cache.lookup(asked) as lease:
        assert lease.kind == "hit"
        check_content(lease)
