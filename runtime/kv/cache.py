"""Who is cached, where, and whether it still serves: keys and values of users' histories across requests.

Life of an entry: `KvCache.lookup` pins it (a lease), `Lease.write` fills slots that no one else can see, `Lease.commit`
publishes them, `Lease.close` unpins. A lease that is closed without a commit leaves nothing behind.

An entry carries the events that it was computed from, and serves a request whose history begins with them, byte by
byte: no hash could collide, no length mislead. docs/kv-cache.md lists the reasons for a miss.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import CacheError, ConfigError
from unipinrec.runtime.bundle.manifest import ModelSpec
from unipinrec.runtime.kv.options import CacheOptions, CacheStatistics
from unipinrec.runtime.kv.pages import KvGeometry, KvPages

Kind = Literal["hit", "extended", "miss"]


REMEMBERED = 100_000  # users whose loss is remembered, so that their next miss has its true reason
NOTHING: NDArray[np.float32] = np.empty(0, np.float32)


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """Whose history, under which bundle, and its content.

    Attributes:
        user: External user id.
        namespace: What keys and values depend on besides the history: `Bundle.kv_namespace`, and the precision that
            they were computed in.
        events: The history, see `event_records`.
        count: Events in it.
        start: Place of the first of them in the user's whole history; not 0 where a window leaves the oldest out.
    """

    user: str
    namespace: str
    events: bytes
    count: int
    start: int


def mismatch(cached: CacheKey, asked: CacheKey) -> str | None:
    """Why a cached history does not serve the one asked for; None if it does, being a beginning of it."""
    if cached.namespace != asked.namespace:
        return "version"
    if cached.start != asked.start:
        return "shifted"
    if asked.events.startswith(cached.events):
        return None
    return "truncated" if cached.events.startswith(asked.events) else "edited"


@dataclass(kw_only=True, eq=False)
class _Entry:
    """Published keys and values of one user.

    `attached`: lookups can find it; pages of a detached entry go back when its last lease is closed. `writing`: a lease
    fills the slots behind the published ones; no other may. `published`: how many publications the cache had seen with
    this one.
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
        """Bytes held outside the pages."""
        return len(self.key.events) + self.last_hidden_state.nbytes


class KvCache:
    """A fixed number of pages shared by users, least recently used first out; safe to use from several threads."""

    def __init__(self, model: ModelSpec, options: CacheOptions, clock: Callable[[], float] = time.monotonic) -> None:
        """Allocate the budget.

        Args:
            model: Whose keys and values are stored.
            options: How much, and how.
            clock: Seconds that never run backwards.

        Raises:
            ConfigError: The budget does not hold a single page, or the memory is not there.
        """
        self.geometry = geometry = KvGeometry.of(model, options.dtype, options.page_slots)
        self.ttl_s = options.ttl_s
        if options.budget_bytes < geometry.page_bytes:
            raise ConfigError(
                f"a cache budget of {options.budget_bytes:,} bytes does not hold one page of {geometry.page_bytes:,} "
                f"bytes ({geometry.page_slots} events as {geometry.dtype}); raise it"
            )
        self.pages = KvPages(geometry, options.budget_bytes // geometry.page_bytes, options.threads)
        self._clock = clock
        self._lock = threading.Lock()
        self._free = list(range(self.pages.count))[::-1]
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lost: OrderedDict[str, tuple[str, str]] = OrderedDict()  # user -> namespace, reason
        self._leases: set[Lease] = set()
        self._counts: Counter[str] = Counter()
        self._most_used = self._publications = 0
        self._bytes_beside = 0

    def lookup(self, key: CacheKey) -> Lease:
        """Find what serves a history and pin it; close the lease when done."""
        with self._lock:
            self._expire()
            entry = self._entries.get(key.user)
            reason = self._lost_reason(key) if entry is None else mismatch(entry.key, key)
            if entry is None or reason is not None:
                self._counts[f"miss.{reason}"] += 1
                lease = Lease(self, key, None, reason)
            else:
                entry.pins += 1
                entry.used = self._clock()
                self._entries.move_to_end(key.user)
                lease = Lease(self, key, entry, None)
                self._counts[lease.kind] += 1
            lease.since = self._publications
            self._leases.add(lease)
            return lease

    def invalidate(self, user: str) -> bool:
        """Forget a user, whatever requests in flight still compute. Returns whether there was an entry."""
        with self._lock:
            return self._invalidate(user)

    def clear(self) -> None:
        """Forget all users."""
        with self._lock:
            for user in {*self._entries, *(lease.key.user for lease in self._leases)}:
                self._invalidate(user)

    def statistics(self) -> CacheStatistics:
        """A consistent snapshot."""
        with self._lock:
            self._expire()
            misses = {name[5:]: count for name, count in sorted(self._counts.items()) if name.startswith("miss.")}
            return CacheStatistics(
                entries=len(self._entries),
                pinned=sum(entry.pins > 0 for entry in self._entries.values()),
                bytes_budget=self.pages.nbytes,
                bytes_used=(self.pages.count - len(self._free)) * self.geometry.page_bytes,
                bytes_high_water=self._most_used * self.geometry.page_bytes,
                bytes_beside=self._bytes_beside,
                hits=self._counts["hit"],
                extended=self._counts["extended"],
                misses=misses,
                evictions=self._counts["evicted"],
                unstored=self._counts["unstored"],
            )

    def check_integrity(self) -> None:
        """Check that every page has exactly one owner and every entry is whole.

        Raises:
            CacheError: It is not so; names what contradicts what.
        """
        with self._lock:
            detached = {id(lease.entry): lease.entry for lease in self._leases if lease.entry}
            attached = {id(entry): entry for entry in self._entries.values()}
            owned = Counter(self._free)
            for entry in {**detached, **attached}.values():
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
        """Drop what has not been used for too long; the least recently used are the first in the table."""
        while self.ttl_s is not None and self._entries:
            user, entry = next(iter(self._entries.items()))
            if entry.used + self.ttl_s > self._clock():
                return
            self._drop(user, "expired")

    def _invalidate(self, user: str) -> bool:
        for lease in self._leases:
            lease.revoked = lease.revoked or lease.key.user == user
        known = user in self._entries
        if known:
            self._drop(user, "invalidated")
        return known

    def _drop(self, user: str, reason: str) -> None:
        """Take an entry out of the table and remember why."""
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
        """Take pages, evicting who was used least recently and is not in use; None if that is not enough."""
        in_use = {id(lease.entry): len(lease.entry.pages) for lease in self._leases if lease.entry}
        staged = sum(len(lease.staged) for lease in self._leases)
        if self.pages.count - sum(in_use.values()) - staged < count:
            return None
        victims, freed = [], len(self._free)
        for user, entry in self._entries.items():
            if freed >= count:
                break
            if entry.pins == 0:
                victims.append(user)
                freed += len(entry.pages)
        for user in victims:
            self._counts["evicted"] += 1
            self._drop(user, "evicted")
        taken = [self._free.pop() for _ in range(count)]
        self._most_used = max(self._most_used, self.pages.count - len(self._free))
        return taken

    # What follows serves leases.

    def stage(self, lease: Lease, slots: int) -> bool:
        """Give a lease the pages for a history of so many slots, if there is room and no other is writing it."""
        with self._lock:
            entry = lease.entry
            if entry is not None and (entry.writing or not entry.attached or entry.slots != lease.slots):
                return False
            replaced = self._entries.get(lease.key.user) if entry is None else None
            if replaced is not None:
                if replaced.published > lease.since and _knows_as_much(replaced.key, lease.key):
                    return False  # another request was quicker
                # It makes room now; should nothing come in its place, its loss has a reason.
                self._drop(lease.key.user, mismatch(replaced.key, lease.key) or "evicted")
            pages = self._allocate(self.geometry.pages_for(slots) - len(lease.pages))
            if pages is None:
                return False
            if entry is not None:
                entry.writing = lease.writing = True
            lease.staged = pages
            return True

    def publish(self, lease: Lease, slots: int, last_hidden_state: NDArray[np.float32]) -> bool:
        """Make what a lease has written visible; False if it must not be."""
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
            self._publications += 1
            entry.published = self._publications
            self._bytes_beside += entry.bytes_beside
            self._lost.pop(user, None)
            return True

    def release(self, lease: Lease, *, unstored: bool) -> None:
        """Take back what a lease holds."""
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
    """One request's hold on the cache: what was found, pinned until `close`, and a place for what it adds.

    Attributes:
        key: What was looked for.
        kind: hit (all events are cached), extended (a beginning is), or miss.
        reason: Why it is a miss, else None.
        count: Events that are cached.
        slots: Slots that are cached: events and the model's prefix slots.
        last_hidden_state: [d] f32 after the last cached event; empty on a miss.
        since: How many publications the cache had seen when it was asked.
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
        self.since = 0
        self._unstored = self._closed = False

    @property
    def kind(self) -> Kind:
        """hit, extended or miss."""
        if self.entry is None:
            return "miss"
        return "hit" if self.count == self.key.count else "extended"

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def written(self) -> bool:
        """Whether `write` found room."""
        return self._written is not None

    def read(self, out: NDArray[np.float32]) -> None:
        """Copy the slots that were cached or written into `out` [tensors, H_kv, at least so many, D] f32."""
        self._cache.pages.read([*self.pages, *self.staged], self._written or self.slots, out)

    def write(self, key_values: Sequence[NDArray[np.float32]], out: NDArray[np.float32] | None = None) -> bool:
        """Store the slots that follow the cached ones, visible to no one before `commit`.

        Args:
            key_values: Each tensor's new slots [H_kv, m, D] f32, the model's prefix slots included on a miss.
            out: Filled with what reading these slots gives, [tensors, H_kv, m, D]; may be the given ones.

        Returns:
            `written`; without room nothing is done.

        Raises:
            BackendError: A value is beyond what the precision can hold.
        """
        slots = self.slots + key_values[0].shape[1]
        self._unstored = not self._cache.stage(self, slots)
        if not self._unstored:
            self._cache.pages.write([*self.pages, *self.staged], self.slots, key_values, out)
            self._written = slots
        return self.written

    def commit(self, last_hidden_state: NDArray[np.float32]) -> None:
        """Let later requests find what was written, and the last hidden state [d] that belongs to it."""
        if self._written is not None:
            self._unstored = not self._cache.publish(self, self._written, last_hidden_state)

    def close(self) -> None:
        """Unpin, and give back what was written and not committed. Closing twice has no effect."""
        if not self._closed:
            self._closed = True
            self._cache.release(self, unstored=self._unstored)


def _knows_as_much(key: CacheKey, other: CacheKey) -> bool:
    return key.namespace == other.namespace and key.count >= other.count
