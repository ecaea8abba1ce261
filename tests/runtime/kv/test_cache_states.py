"""The cache as a whole: against a simple model of itself, under threads, and when it was damaged."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.typing import NDArray

from unipinrec.errors import CacheError
from unipinrec.runtime import CacheOptions, KvCache
from unipinrec.runtime.bundle.manifest import ModelSpec
from unipinrec.runtime.kv.cache import CacheKey, Lease, mismatch

MODEL = ModelSpec(
    num_layers=1,
    num_kv_heads=1,
    head_dim=2,
    hidden_size=2,
    item_dim=2,
    max_history=64,
    kv_prefix_slots=1,
    outcome_conditioned=False,
)
PAGE_BYTES = 32  # two slots of a key and a value of one head of two fp32 values
PAGES, TTL_S = 7, 10.0
USERS, HISTORIES = "abc", ["x", "xx", "xxx", "xxxx", "xxxxx", "xxxxxxx", "xyx", "xxyx"]


def key(events: str, user: str = "u", namespace: str = "one", start: int = 0) -> CacheKey:
    """A history of one event for each letter."""
    return CacheKey(user=user, namespace=namespace, events=events.encode(), count=len(events), start=start)


def slots_of(asked: CacheKey, first: int = 0) -> list[NDArray[np.float32]]:
    """What encoding gives for slots `first` and after: values that depend on all events up to theirs."""
    beginnings = [asked.namespace.encode() + asked.events[:index] for index in range(first, asked.count + 1)]
    numbers = [zlib.crc32(events) % 10_000 for events in beginnings]
    values = np.repeat(np.array(numbers, np.float32), 2).reshape(1, -1, 2)
    return [values, -values]


def state_of(asked: CacheKey) -> NDArray[np.float32]:
    return np.array([zlib.crc32(asked.events), asked.count], np.float32)


def check_content(lease: Lease) -> None:
    """What a lease reads is what encoding its history gives."""
    count = lease.key.count + 1 if lease.written else lease.slots
    out = np.full((2, 1, count, 2), np.nan, np.float32)
    lease.read(out)
    np.testing.assert_array_equal(out, [values[:, :count] for values in slots_of(lease.key)])


def pages_of(asked: CacheKey) -> int:
    """Two slots a page, and one slot before the first event."""
    return (asked.count + 2) // 2


@dataclass(eq=False)
class Known:
    """What the model knows of an entry: of which history, and who reads and writes it."""

    key: CacheKey
    used: float
    published: int
    readers: list[Asked] = field(default_factory=list)
    writer: Asked | None = None
    kept: bool = True


@dataclass(eq=False)
class Asked:
    """A request that is being answered, and what the model expects of it."""

    lease: Lease
    entry: Known | None
    since: int
    staged: int = 0
    state: str = "found"
    revoked: bool = False
    unstored: bool = False


class CacheMachine(RuleBasedStateMachine):
    """Several requests open at once, in any order; after each step the cache is whole and equals the model."""

    def __init__(self) -> None:
        super().__init__()
        options = CacheOptions(budget_bytes=PAGES * PAGE_BYTES, dtype="fp32", ttl_s=TTL_S, page_slots=2)
        self.now = 0.0
        self.cache = KvCache(MODEL, options, lambda: self.now)
        self.known: dict[str, Known] = {}  # least recently used first
        self.lost: dict[str, tuple[str, str]] = {}
        self.open: list[Asked] = []
        self.counts: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.high_water = self.publications = 0

    # The model: what should happen.

    def lose(self, user: str, reason: str) -> None:
        entry = self.known.pop(user)
        entry.kept = False
        self.lost[user] = (entry.key.namespace, reason)

    def expire(self) -> None:
        for user, entry in list(self.known.items()):
            if entry.used + TTL_S <= self.now:
                self.lose(user, "expired")

    def pages_taken(self, *, only_in_use: bool) -> int:
        entries = {id(asked.entry): asked.entry for asked in self.open if asked.entry}
        if not only_in_use:
            entries |= {id(entry): entry for entry in self.known.values()}
        return sum(pages_of(entry.key) for entry in entries.values()) + sum(asked.staged for asked in self.open)

    def make_room(self, pages: int) -> bool:
        if self.pages_taken(only_in_use=True) + pages > PAGES:
            return False
        for user, entry in list(self.known.items()):
            if self.pages_taken(only_in_use=False) + pages <= PAGES:
                break
            if not entry.readers:
                self.counts["evictions"] += 1
                self.lose(user, "evicted")
        self.high_water = max(self.high_water, self.pages_taken(only_in_use=False) + pages)
        return True

    def expected(self, asked: CacheKey) -> tuple[str, str | None]:
        entry = self.known.get(asked.user)
        if entry is None:
            namespace, reason = self.lost.get(asked.user, (asked.namespace, "new"))
            return "miss", reason if namespace == asked.namespace else "version"
        reason_or_none = mismatch(entry.key, asked)
        if reason_or_none is not None:
            return "miss", reason_or_none
        return ("hit" if entry.key.count == asked.count else "extended"), None

    # The steps: what happens to the cache and to the model.

    @precondition(lambda self: len(self.open) < 4)
    @rule(
        user=st.sampled_from(USERS),
        events=st.sampled_from(HISTORIES),
        namespace=st.sampled_from(["one"] * 6 + ["two"]),
        start=st.sampled_from([0] * 6 + [4]),
    )
    def look_up(self, user: str, events: str, namespace: str, start: int) -> None:
        asked = key(events, user, namespace, start)
        self.expire()
        kind, reason = self.expected(asked)
        entry = self.known.get(user) if kind != "miss" else None
        lease = self.cache.lookup(asked)
        assert (lease.kind, lease.reason) == (kind, reason)
        assert lease.count == (entry.key.count if entry else 0)
        if reason is None:
            self.counts[kind] += 1
        else:
            self.misses[reason] += 1
        request = Asked(lease=lease, entry=entry, since=self.publications)
        if entry is not None:
            np.testing.assert_array_equal(lease.last_hidden_state, state_of(entry.key))
            entry.used = self.now
            entry.readers.append(request)
            self.known[user] = self.known.pop(user)
        self.open.append(request)

    @precondition(lambda self: self.open)
    @rule(index=st.integers(0, 3))
    def write(self, index: int) -> None:
        request = self.open[index % len(self.open)]
        asked, entry = request.lease.key, request.entry
        if request.state != "found" or request.lease.kind == "hit":
            return
        if entry is not None:
            free = entry.kept and entry.writer is None and entry.key.count == request.lease.count
            pages = pages_of(asked) - pages_of(entry.key)
        else:
            free, pages = True, pages_of(asked)
            if (old := self.known.get(asked.user)) is not None:
                as_much = old.key.namespace == asked.namespace and old.key.count >= asked.count
                free = old.published <= request.since or not as_much
                if free:
                    self.lose(asked.user, mismatch(old.key, asked) or "evicted")
        stored = free and self.make_room(pages)
        request.lease.write(slots_of(asked, request.lease.slots))
        assert request.lease.written == stored
        request.state, request.unstored = "written" if stored else "refused", not stored
        request.staged = pages if stored else 0
        if stored and entry is not None:
            entry.writer = request

    @precondition(lambda self: self.open)
    @rule(index=st.integers(0, 3))
    def commit(self, index: int) -> None:
        request = self.open[index % len(self.open)]
        asked, entry = request.lease.key, request.entry
        if request.state == "committed":
            return
        request.lease.commit(state_of(asked))
        if request.state == "written":
            request.unstored = request.revoked or (entry is not None and not entry.kept)
            if not request.unstored:
                request.staged = 0
                self.publish(asked, entry)
        request.state = "committed"

    def publish(self, asked: CacheKey, entry: Known | None) -> None:
        self.publications += 1
        if entry is not None:
            entry.key, entry.published = asked, self.publications
        else:
            if asked.user in self.known:
                self.known.pop(asked.user).kept = False
            self.known[asked.user] = Known(asked, self.now, self.publications)
        self.lost.pop(asked.user, None)

    @precondition(lambda self: self.open)
    @rule(index=st.integers(0, 3))
    def close(self, index: int) -> None:
        request = self.open.pop(index % len(self.open))
        request.lease.close()
        self.counts["unstored"] += request.unstored
        if request.entry is not None:
            request.entry.readers.remove(request)
            if request.entry.writer is request:
                request.entry.writer = None

    @rule(user=st.sampled_from(USERS), several=st.lists(st.sampled_from(HISTORIES), min_size=1, max_size=3))
    def answer(self, user: str, several: list[str]) -> None:
        for events in several:
            self.look_up(user, events, "one", 0)
            for step in (self.write, self.commit, self.close):
                step(len(self.open) - 1)

    @rule(what=st.sampled_from([*[0.5] * 12, 4.0, 4.0, 10.0, *USERS, "all"]))
    def disturb(self, what: float | str) -> None:
        """Time passes, or users are forgotten."""
        if isinstance(what, float):
            self.now += what
        elif what == "all":
            self.cache.clear()
            for user in USERS:
                self.forget(user)
        else:
            assert self.cache.invalidate(what) == (what in self.known)
            self.forget(what)

    def forget(self, user: str) -> None:
        for request in self.open:
            request.revoked = request.revoked or request.lease.key.user == user
        if user in self.known:
            self.lose(user, "invalidated")

    @invariant()
    def is_whole(self) -> None:
        self.cache.check_integrity()
        for request in self.open:
            if request.state != "committed" and (request.lease.slots or request.lease.written):
                check_content(request.lease)

    @invariant()
    def equals_the_model(self) -> None:
        self.expire()
        statistics = self.cache.statistics()
        assert statistics.entries == len(self.known)
        assert statistics.pinned == sum(bool(entry.readers) for entry in self.known.values())
        assert statistics.bytes_used == self.pages_taken(only_in_use=False) * PAGE_BYTES
        assert statistics.bytes_high_water == self.high_water * PAGE_BYTES
        assert statistics.bytes_beside == sum(entry.key.count + 8 for entry in self.known.values())
        counted = (statistics.hits, statistics.extended, statistics.evictions, statistics.unstored)
        assert counted == tuple(self.counts[name] for name in ("hit", "extended", "evictions", "unstored"))
        assert statistics.misses == dict(self.misses)

    def teardown(self) -> None:
        while self.open:
            self.close(0)
        self.cache.clear()
        statistics = self.cache.statistics()
        assert (statistics.bytes_used, statistics.bytes_beside, statistics.pinned) == (0, 0, 0)


CacheMachine.TestCase.settings = settings(
    max_examples=300, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)
TestCacheMachine = CacheMachine.TestCase


def test_threads_find_only_what_is_theirs() -> None:
    """Every slot that a lease can read is that of its own history, whatever the others do."""
    cache = KvCache(MODEL, CacheOptions(budget_bytes=30 * PAGE_BYTES, dtype="fp32", page_slots=2))

    def use(thread: int) -> None:
        rng = np.random.default_rng(thread)
        for step in range(1500):
            user, length = "abcdefgh"[rng.integers(8)], int(rng.integers(1, 12))
            asked = key("pqrstuvwxyzo"[:length] if rng.random() < 0.7 else "ppqrstuvwxyz"[:length], user)
            if rng.random() < 0.02:
                cache.invalidate(user)
            with cache.lookup(asked) as lease:
                if lease.slots:
                    check_content(lease)
                if lease.kind != "hit":
                    lease.write(slots_of(asked, lease.slots))
                    if lease.slots or lease.written:
                        check_content(lease)
                    if rng.random() < 0.9:
                        lease.commit(state_of(asked))
                else:
                    np.testing.assert_array_equal(lease.last_hidden_state, state_of(asked))
            if step % 50 == 0:
                cache.check_integrity()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(use, range(6)))
    cache.check_integrity()
    statistics = cache.statistics()
    assert (statistics.pinned, statistics.bytes_high_water) == (0, 30 * PAGE_BYTES)
    assert statistics.hits + statistics.extended + sum(statistics.misses.values()) == 9000
    assert {"edited", "evicted", "invalidated", "new", "truncated"} == set(statistics.misses)


def _lose_a_page(cache: KvCache) -> None:
    cache._free.pop()


def _free_a_used_page(cache: KvCache) -> None:
    cache._free.append(cache._entries["u"].pages[0])


def _share_a_page(cache: KvCache) -> None:
    cache._entries["u"].pages[0] = cache._entries["v"].pages[0]


def _invent_a_page(cache: KvCache) -> None:
    cache._free.append(99)


def _lose_a_pin(cache: KvCache) -> None:
    cache._entries["u"].pins -= 1


def _forget_a_page(cache: KvCache) -> None:
    cache._free.append(cache._entries["u"].pages.pop())


def _detach(cache: KvCache) -> None:
    cache._entries["v"].attached = False


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_lose_a_page, r"pages \[\d+\] of 20 have no owner, or more than one"),
        (_free_a_used_page, r"pages \[\d+\] of 20"),
        (_share_a_page, r"pages \[\d+, \d+\] of 20"),
        (_invent_a_page, r"pages \[\] of 20"),
        (_lose_a_pin, "user 'u' is pinned 0 times, but 1 leases hold it"),
        (_forget_a_page, "user 'u' holds 1 pages for 4 slots"),
        (_detach, "user 'v' has an entry that is attached and not in the table, or the reverse"),
    ],
)
def test_damage_is_found(damage: Callable[[KvCache], None], match: str) -> None:
    cache = KvCache(MODEL, CacheOptions(budget_bytes=20 * PAGE_BYTES, dtype="fp32", page_slots=2))
    for user in "uv":
        with cache.lookup(key("abc", user)) as lease:
            lease.write(slots_of(key("abc", user)))
            lease.commit(state_of(key("abc")))
    with cache.lookup(key("abc")):
        cache.check_integrity()
        damage(cache)
        with pytest.raises(CacheError, match=match):
            cache.check_integrity()
