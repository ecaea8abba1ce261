"""The cache of users' keys and values across requests: entries, leases and eviction.

Life of an entry: `KvCache.lookup` pins it with a lease, `Lease.write` fills slots that no other request sees,
`Lease.commit` publishes them, `Lease.close` unpins it. A lease that is closed without a commit leaves nothing behind.

An entry holds the events that it was computed from. It fits a request whose history begins with exactly these bytes,
so a hash collision cannot give a wrong answer. docs/kv-cache.md lists the reasons for a miss.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import CacheError, ConfigError
from unipinrec.runtime.bundle.manifest import ModelSpec
from unipinrec.runtime.bundle.quality import DEFAULT_KV_DTYPE
from unipinrec.runtime.kv.options import CacheOptions, CacheStatistics
from unipinrec.runtime.kv.pages import KvGeometry, KvPages

Kind = Literal["hit", "extended", "miss"]
REMEMBERED = 100_000  # dropped users to remember, so that their next miss has the right reason
NOTHING: NDArray[np.float32] = np.empty(0, np.float32)


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """User, namespace and history of an entry or a request.

    Attributes:
        user: External user id.
        namespace: `Bundle.kv_namespace` and the precision of the computation: keys and values depend on both.
        events: The history, see `event_records`.
        count: Number of events.
        start: Place of the first event in the user's whole history; not 0 if a window leaves out the oldest.
    """

    user: str
    namespace: str
    events: bytes
    count: int
    start: int


def mismatch(cached: CacheKey, key: CacheKey) -> str | None:
    """Why a cached history does not fit a request's; None if it is a beginning of it."""
    if cached.namespace != key.namespace:
        return "version"
    if cached.start != key.start:
        return "shifted"
    if key.events.startswith(cached.events):
        return None
    return "truncated" if cached.events.startswith(key.events) else "edited"


@dataclass(kw_only=True, eq=False)
class _Entry:
    """Published keys and values of one user.

    `attached`: lookups can find it; the pages of a detached entry are freed when its last lease is closed. `writing`: a
    lease is filling the slots behind the published ones, and no other lease may. `published`: number of this
    publication, counted over the cache.
    """

    key: CacheKey
    slots: int
    pages: list[int]
    last_hidden_state: NDArray[np.float32]
    used: float
    published: int = 0
    pins: int = 0
    writing: bool = False
    attached: bool = True

    @property
    def bytes_beside(self) -> int:
        """Bytes outside the pages."""
        return len(self.key.events) + self.last_hidden_state.nbytes


class KvCache:
    """A fixed number of pages for all users; evicts the least recently used. Safe to use from several threads."""

    def __init__(self, model: ModelSpec, options: CacheOptions, clock: Callable[[], float] = time.monotonic) -> None:
        """Allocate the budget.

        Args:
            model: The model of the keys and values.
            options: Size and precision; int8 if it names none.
            clock: Monotonic clock in seconds.

        Raises:
            ConfigError: The budget does not hold one page, or the memory does not suffice.
        """
        self.geometry = geometry = KvGeometry.of(model, options.dtype or DEFAULT_KV_DTYPE, options.page_slots)
        self.ttl_s = options.ttl_s
        if options.budget_bytes < geometry.page_bytes:
            raise ConfigError(
                f"a cache budget of {options.budget_bytes:,} bytes does not hold one page of {geometry.page_bytes:,} "
                f"bytes ({geometry.page_slots} events as {geometry.dtype}); raise it"
            )
        self.pages = KvPages(geometry, options.budget_bytes // geometry.page_bytes, options.threads)
        self._clock = clock
        self._lock = threading.RLock()
        self._free = list(range(self.pages.count))[::-1]
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lost: OrderedDict[str, tuple[str, str]] = OrderedDict()  # user -> namespace, reason
        self._leases: set[Lease] = set()
        self._counts: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._most_used = self.publications = 0
        self._bytes_beside = 0

    def lookup(self, key: CacheKey) -> Lease:
        """Find and pin the entry that fits a history; close the lease when done."""
        with self._lock:
            self._expire()
            entry = self._entries.get(key.user)
            reason = self._lost_reason(key) if entry is None else mismatch(entry.key, key)
            if entry is None or reason is not None:
                self._misses[str(reason)] += 1
                lease = Lease(self, key, None, reason)
            else:
                entry.pins += 1
                entry.used = self._clock()
                self._entries.move_to_end(key.user)
                lease = Lease(self, key, entry, None)
                self._counts[lease.kind] += 1
            self._leases.add(lease)
            return lease

    def invalidate(self, user: str) -> bool:
        """Forget a user, and keep running requests from storing one. Returns whether there was an entry."""
        with self._lock:
            for lease in self._leases:
                lease.revoked = lease.revoked or lease.key.user == user
            known = user in self._entries
            if known:
                self._drop(user, "invalidated")
            return known

    def clear(self) -> None:
        """Forget all users."""
        with self._lock:
            for user in {*self._entries, *(lease.key.user for lease in self._leases)}:
                self.invalidate(user)

    def statistics(self) -> CacheStatistics:
        """A consistent snapshot."""
        with self._lock:
            self._expire()
            return CacheStatistics(
                entries=len(self._entries),
                pinned=sum(entry.pins > 0 for entry in self._entries.values()),
                bytes_budget=self.pages.nbytes,
                bytes_used=(self.pages.count - len(self._free)) * self.geometry.page_bytes,
                bytes_high_water=self._most_used * self.geometry.page_bytes,
                bytes_beside=self._bytes_beside,
                hits=self._counts["hit"],
                extended=self._counts["extended"],
                misses=dict(sorted(self._misses.items())),
                evictions=self._counts["evicted"],
                unstored=self._counts["unstored"],
            )

    def check_integrity(self) -> None:
        """Check that every page has exactly one owner and every entry is whole.

        Raises:
            CacheError: It is not so; the message names the contradiction.
        """
        with self._lock:
            leased = [lease.entry for lease in self._leases if lease.entry]
            owned = Counter(self._free)
            for entry in {id(entry): entry for entry in (*leased, *self._entries.values())}.values():
                owned.update(entry.pages)
                self._check_entry(entry)
            for lease in self._leases:
                owned.update(lease.staged)
            wrong = [page for page in range(self.pages.count) if owned[page] != 1]
            if wrong or len(owned) != self.pages.count:
                raise CacheError(f"pages {wrong[:10]} of {self.pages.count} have no owner, or more than one")

    def _check_entry(self, entry: _Entry) -> None:
        user, pins = entry.key.user, sum(lease.entry is entry for lease in self._leases)
        if entry.pins != pins:
            raise CacheError(f"user {user!r} is pinned {entry.pins} times, but {pins} leases hold it")
        if len(entry.pages) != self.geometry.pages_for(entry.slots):
            raise CacheError(f"user {user!r} holds {len(entry.pages)} pages for {entry.slots} slots")
        if entry.attached != (self._entries.get(user) is entry):
            raise CacheError(f"user {user!r} has an entry that is attached and not in the table, or the reverse")

    def _lost_reason(self, key: CacheKey) -> str:
        namespace, reason = self._lost.get(key.user, (key.namespace, "new"))
        return reason if namespace == key.namespace else "version"

    def _expire(self) -> None:
        """Drop entries that were not used for `ttl_s`; the least recently used come first in the table."""
        while self.ttl_s is not None and self._entries:
            user, entry = next(iter(self._entries.items()))
            if entry.used + self.ttl_s > self._clock():
                return
            self._drop(user, "expired")

    def _drop(self, user: str, reason: str) -> None:
        """Remove an entry from the table and remember why."""
        self._lost[user] = (self._entries[user].key.namespace, reason)
        if len(self._lost) > REMEMBERED:
            self._lost.popitem(last=False)
        self._detach(user)

    def _detach(self, user: str) -> None:
        entry = self._entries.pop(user)
        entry.attached = False
        self._bytes_beside -= entry.bytes_beside
        self._reclaim(entry)

    def _reclaim(self, entry: _Entry) -> None:
        if entry.pins == 0 and not entry.attached:
            self._free.extend(entry.pages)
            entry.pages, entry.slots = [], 0

    def _allocate(self, count: int) -> list[int] | None:
        """Take pages, evicting the least recently used entries that are not in use; None if that is not enough."""
        in_use = {id(lease.entry): len(lease.entry.pages) for lease in self._leases if lease.entry}
        staged = sum(len(lease.staged) for lease in self._leases)
        if self.pages.count - sum(in_use.values()) - staged < count:
            return None
        while len(self._free) < count:
            self._counts["evicted"] += 1
            self._drop(next(user for user, entry in self._entries.items() if entry.pins == 0), "evicted")
        taken = [self._free.pop() for _ in range(count)]
        self._most_used = max(self._most_used, self.pages.count - len(self._free))
        return taken

    # Leases call the methods below.
    def stage(self, lease: Lease, slots: int) -> bool:
        """Give a lease the pages for `slots` slots, if there is room and no other lease is writing the entry."""
        with self._lock:
            entry = lease.entry
            if entry is not None and (entry.writing or not entry.attached or entry.slots != lease.slots):
                return False
            replaced = self._entries.get(lease.key.user) if entry is None else None
            if replaced is not None:
                as_much = replaced.key.namespace == lease.key.namespace and replaced.key.count >= lease.key.count
                if as_much and replaced.published > lease.since:
                    return False  # another request was quicker
                # It makes room now; if nothing takes its place, its loss has a reason.
                self._drop(lease.key.user, mismatch(replaced.key, lease.key) or "evicted")
            pages = self._allocate(self.geometry.pages_for(slots) - len(lease.pages))
            if pages is None:
                return False
            if entry is not None:
                entry.writing = lease.writing = True
            lease.staged = pages
            return True

    def publish(self, lease: Lease, slots: int, last_hidden_state: NDArray[np.float32]) -> bool:
        """Make the slots that a lease has written visible; False if they must not be."""
        with self._lock:
            entry = lease.entry
            if lease.revoked or (entry is not None and not entry.attached):
                return False
            user, pages, lease.staged = lease.key.user, [*lease.pages, *lease.staged], []
            if entry is None:
                if user in self._entries:
                    self._detach(user)
                entry = self._entries[user] = _Entry(
                    key=lease.key, slots=slots, pages=pages, last_hidden_state=last_hidden_state, used=self._clock()
                )
            else:
                self._bytes_beside -= entry.bytes_beside
                entry.key, entry.slots, entry.pages = lease.key, slots, pages
                entry.last_hidden_state = last_hidden_state
            self.publications += 1
            entry.published = self.publications
            self._bytes_beside += entry.bytes_beside
            self._lost.pop(user, None)
            return True

    def release(self, lease: Lease, *, unstored: bool) -> None:
        """Take back a lease's pages and its pin."""
        with self._lock:
            self._leases.discard(lease)
            self._counts["unstored"] += unstored
            self._free.extend(lease.staged)
            lease.staged = []
            if lease.entry is not None:
                lease.entry.writing = lease.entry.writing and not lease.writing
                lease.entry.pins -= 1
                self._reclaim(lease.entry)


class Lease:
    """One request's hold on the cache: an entry, pinned until `close`, and pages for new slots.

    Attributes:
        key: Key of the request.
        kind: hit (all events are cached), extended (a beginning is), or miss.
        reason: Why it is a miss, else None.
        count: Cached events.
        slots: Cached slots: events and the model's prefix slots.
        last_hidden_state: [d] f32 after the last cached event; empty on a miss.
        since: Number of publications of the cache before the lookup.
    """

    def __init__(self, cache: KvCache, key: CacheKey, entry: _Entry | None, reason: str | None) -> None:
        self._cache, self.key, self.entry, self.reason = cache, key, entry, reason
        self.count = 0 if entry is None else entry.key.count
        self.slots = 0 if entry is None else entry.slots
        self.pages = [] if entry is None else list(entry.pages)
        self.last_hidden_state = NOTHING if entry is None else entry.last_hidden_state
        self.staged: list[int] = []
        self.writing = self.revoked = False
        self._written: int | None = None
        self.since = cache.publications
        self._unstored = self._closed = self._committed = False

    @property
    def kind(self) -> Kind:
        """hit, extended or miss."""
        if self.entry is None:
            return "miss"
        return "hit" if self.count == self.key.count else "extended"

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def written(self) -> bool:
        """Whether `write` found room."""
        return self._written is not None

    def read(self, out: NDArray[np.float32]) -> None:
        """Copy the n cached and written slots into `out` [tensors, H_kv, >= n, D] f32."""
        self._cache.pages.read([*self.pages, *self.staged], self._written or self.slots, out)

    def write(self, key_values: Sequence[NDArray[np.float32]], out: NDArray[np.float32] | None = None) -> bool:
        """Store the slots that follow the cached ones, invisible to other requests until `commit`.

        Args:
            key_values: Each tensor's new slots [H_kv, m, D] f32, with the model's prefix slots on a miss.
            out: See `KvPages.write`.

        Returns:
            `written`; without room nothing is stored.

        Raises:
            BackendError: A value is out of the precision's range.
            CacheError: The lease is closed.
        """
        if self._closed:
            raise CacheError(f"user {self.key.user!r}: the lease is closed, and nothing can be stored under it")
        slots = self.slots + key_values[0].shape[1]
        self._unstored = not self._cache.stage(self, slots)
        if not self._unstored:
            self._cache.pages.write([*self.pages, *self.staged], self.slots, key_values, out)
            self._written = slots
        return self.written

    def commit(self, last_hidden_state: NDArray[np.float32]) -> None:
        """Publish the written slots and their last hidden state [d], once."""
        if self._written is not None and not self._closed and not self._committed:
            self._committed = True
            self._unstored = not self._cache.publish(self, self._written, last_hidden_state)

    def close(self) -> None:
        """Unpin the entry, and free written slots without a commit. Closing twice has no effect."""
        if not self._closed:
            self._closed = True
            self._cache.release(self, unstored=self._unstored)
