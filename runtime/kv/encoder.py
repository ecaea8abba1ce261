"""Encode the histories of requests: read cached events from the cache, encode and store new events.

A hit and a miss give the same answer: keys and values are rounded to the cache's precision before retrieval and
ranking use them, even if they were not cached.

A group of requests is computed together if they need the same stages and have histories of similar length: lengths of
a group lie within the same half octave, so there is little padding.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from unipinrec.runtime.graphs.backend import MAX_ROWS, MAX_SLOTS
from unipinrec.runtime.graphs.engine import Encoded, Engine, HostTensor, KvBuffer, on_host, pad_histories, row_of
from unipinrec.runtime.kv.cache import CacheKey, Kind, KvCache, Lease
from unipinrec.runtime.kv.pages import as_stored
from unipinrec.runtime.requests import History, ResolvedRequest

NO_CACHE, ANONYMOUS = "no cache", "anonymous"


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """A request and the cached part of its history.

    Attributes:
        request: The request.
        lease: Its lease; None if the cache was not searched.
        kind: hit, extended or miss.
        reason: Why it is a miss, or how many events are new; None for a hit.
        cached: Number of cached events.
    """

    request: ResolvedRequest
    lease: Lease | None = None
    kind: Kind = "miss"
    reason: str | None = None
    cached: int = 0

    @property
    def new(self) -> int:
        """Number of events to encode."""
        return len(self.request.history) - self.cached


class HistoryEncoder:
    """Encodes histories of one bundle; safe to use from several threads."""

    def __init__(self, engine: Engine, cache: KvCache | None, namespace: str, item_keys: NDArray[np.int64]) -> None:
        """Keep encoded histories in a cache, under a namespace and the bundle's `kv_item_keys` (see `CacheKey`)."""
        self.engine, self.cache, self.namespace, self.item_keys = engine, cache, namespace, item_keys
        self.padding = PaddingMeter()
        self._prefix = engine.model.kv_prefix_slots

    @contextmanager
    def look_up(self, requests: Sequence[ResolvedRequest]) -> Iterator[list[Lookup]]:
        """Look up all requests; when this ends, their leases are closed."""
        with ExitStack() as leases:
            yield [self._look_up(request, leases) for request in requests]

    def work(self, lookup: Lookup) -> Work:
        """Stages and sizes of a request."""
        slots = len(lookup.request.history) + self._prefix
        ranked = 0 if lookup.request.order == "retrieval" else lookup.request.candidates + len(lookup.request.own)
        return Work(kind=lookup.kind, slots=slots, new=lookup.new, candidates=ranked)

    @contextmanager
    def encoding(self, group: Sequence[Lookup]) -> Iterator[Encoded]:
        """Encode requests of one kind together, and publish their new events if the block succeeds.

        Raises:
            BackendError: A graph failed, or a value does not fit the cache's precision.
        """
        encoded = self._encode_all(group) if group[0].kind == "miss" else self._encode_new(group)
        yield encoded
        last = encoded.last_hidden_state.numpy()
        for row, lookup in enumerate(group):
            if lookup.lease is not None:
                lookup.lease.commit(last[row].copy())

    def _look_up(self, request: ResolvedRequest, leases: ExitStack) -> Lookup:
        if self.cache is None or request.user is None:
            return Lookup(request=request, reason=NO_CACHE if self.cache is None else ANONYMOUS)
        history = request.history
        key = CacheKey(
            user=request.user,
            namespace=self.namespace,
            events=event_records(replace(history, item_rows=self.item_keys[history.item_rows])),
            count=len(history),
            start=request.start,
        )
        lease = leases.enter_context(self.cache.lookup(key))
        reason, new = lease.reason, len(history) - lease.count
        if lease.kind == "extended":
            reason = "1 new event" if new == 1 else f"{new} new events"
        return Lookup(request=request, lease=lease, kind=lease.kind, reason=reason, cached=lease.count)

    def _encode_all(self, group: Sequence[Lookup]) -> Encoded:
        encoded = self.engine.prefill(pad_histories([lookup.request.history for lookup in group]))
        self.padding.add("encode", [lookup.new for lookup in group])
        if self.cache is None:
            return encoded
        slots, host = encoded.lengths + self._prefix, on_host(encoded.key_values)
        if self.cache.geometry.dtype == "fp32":
            for row, (lookup, count) in enumerate(zip(group, slots, strict=True)):
                self._store(lookup, row_of(host, row, count), None)
            return encoded
        buffer = KvBuffer(self.engine.model, len(group), int(slots.max()))
        for row, (lookup, count) in enumerate(zip(group, slots, strict=True)):
            self._store(lookup, row_of(host, row, count), buffer.row(row)[:, :, :count])
            buffer.clear_from(row, count)
        return encoded.over(buffer)

    def _store(
        self, lookup: Lookup, key_values: Sequence[NDArray[np.float32]], rounded: NDArray[np.float32] | None
    ) -> None:
        """Write new slots to the lease, if there is one and there is room; put the stored values into `rounded`."""
        stored = lookup.lease is not None and lookup.lease.write(key_values, rounded)
        if not stored and rounded is not None and self.cache is not None:
            for out, values in zip(rounded, key_values, strict=True):
                out[...] = as_stored(values, self.cache.geometry.dtype)

    def _encode_new(self, group: Sequence[Lookup]) -> Encoded:
        """Encode requests of which the cache holds a beginning, or all."""
        histories = [lookup.request.history for lookup in group]
        buffer = KvBuffer(self.engine.model, len(group), max(map(len, histories)) + self._prefix)
        leases = [lookup.lease for lookup in group if lookup.lease is not None]
        for row, lease in enumerate(leases):
            lease.read(buffer.row(row))
            buffer.clear_from(row, lease.slots)
        cached = np.array([lease.count for lease in leases])
        past = Encoded(
            key_values=buffer.tensors(),
            lengths=cached,
            last_timestamps_ms=np.array([h.timestamps_ms[m - 1] for h, m in zip(histories, cached, strict=True)]),
            last_hidden_state=HostTensor(np.stack([lease.last_hidden_state for lease in leases])),
        )
        if group[0].kind == "hit":
            return past
        added = pad_histories([h.part(int(m)) for h, m in zip(histories, cached, strict=True)])
        encoded = self.engine.extend_in_place(buffer, past, added)
        self.padding.add("extend", [lookup.new for lookup in group])
        for row, (lookup, count) in enumerate(zip(group, added.lengths, strict=True)):
            first = lookup.cached + self._prefix
            new = buffer.row(row)[:, :, first : first + count]
            self._store(lookup, list(new), new)
        return encoded


def event_records(history: History) -> bytes:
    """One record per event: item, time, surface, actions; all records of a bundle have equal length.

    `history.item_rows` holds the keys of the items: `Bundle.kv_item_keys`, so that bundles can share a cache.
    """
    columns = (history.item_rows, history.timestamps_ms, history.surfaces)
    raw = [np.ascontiguousarray(column).view(np.uint8).reshape(len(history), -1) for column in columns]
    return np.concatenate([*raw, np.packbits(history.actions != 0.0, axis=1)], axis=1).tobytes()


@dataclass(frozen=True, kw_only=True)
class Work:
    """Stages and sizes of one request.

    Attributes:
        kind: hit, extended or miss; it decides which graphs run.
        slots: Slots of the whole history.
        new: Events to encode.
        candidates: Items to rank; 0 = the ranker does not run.
    """

    kind: Kind
    slots: int
    new: int
    candidates: int


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Events (or candidates) of requests, and those that a stage computed, which include padding."""

    useful: int
    computed: int

    @property
    def waste(self) -> float:
        """Share of padding among the computed events."""
        return 1.0 - self.useful / self.computed if self.computed else 0.0


class PaddingMeter:
    """Counts useful and computed events by stage; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Padding] = {}

    def add(self, stage: str, sizes: Sequence[int]) -> None:
        """Count one run over rows of these sizes."""
        with self._lock:
            before = self._counts.get(stage, Padding(useful=0, computed=0))
            computed = before.computed + len(sizes) * max(sizes)
            self._counts[stage] = Padding(useful=before.useful + sum(sizes), computed=computed)

    def snapshot(self) -> dict[str, Padding]:
        """Totals by stage: encode, extend, rank."""
        with self._lock:
            return dict(self._counts)


def grouped(
    works: Sequence[Work], prefill_chunk: int | None, most_rows: Callable[[int, int], int] = lambda new, slots: MAX_ROWS
) -> list[list[int]]:
    """Groups of requests to compute together, each as places in `works`.

    Args:
        works: Stages and sizes of each request.
        prefill_chunk: Histories with more new events than this are encoded alone, in chunks; None = no limit.
        most_rows: Number of histories with this many new events and slots whose memory suffices.
    """
    buckets: dict[tuple[str, int, int, int], list[int]] = defaultdict(list)
    for index, work in enumerate(works):
        alone = prefill_chunk is not None and work.new > prefill_chunk
        size = -index - 1 if alone else half_octave(work.slots)
        buckets[work.kind, size, half_octave(work.new), half_octave(work.candidates)].append(index)
    groups = []
    for indices in buckets.values():
        indices.sort(key=lambda index: works[index].slots)
        slots, new = works[indices[-1]].slots, max(works[index].new for index in indices)
        rows = max(1, min(MAX_ROWS, MAX_SLOTS // slots, most_rows(new, slots)))
        groups += [indices[start : start + rows] for start in range(0, len(indices), rows)]
    return groups


def half_octave(count: int) -> int:
    """Index of the range that holds a size: up to 8, 12, 16, 24, 32, 48, ...; 0 has its own."""
    if count == 0:
        return -1
    index, limit = 0, 8
    while count > limit:
        limit = limit + limit // 2 if index % 2 == 0 else limit // 3 * 4
        index += 1
    return index
