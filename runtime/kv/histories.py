"""From requests to encoded histories, through the cache: what is known is read, what is new is encoded and kept.

What is ranked is always what the cache would give back: keys and values are rounded to its precision before anything
looks at them, whether they were found there or not, so that a hit and a miss answer alike.

Requests are computed together where they need the same stages and have histories of similar length, so that little is
padding: lengths of a group lie within the same half octave. A group is computed on its own from encoding to ranking.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from unipinrec.runtime.graphs.backend import MAX_ROWS, MAX_SLOTS, HostTensor, on_host, row_of
from unipinrec.runtime.graphs.engine import Encoded, Engine, KvBuffer, pad_histories
from unipinrec.runtime.kv.cache import CacheKey, Kind, KvCache, Lease
from unipinrec.runtime.kv.pages import as_stored
from unipinrec.runtime.requests import History, ResolvedRequest

NO_CACHE, ANONYMOUS = "no cache", "anonymous"


@dataclass(frozen=True, kw_only=True)
class Found:
    """A request and what the cache has of its history; `lease` is None for the reason `unasked`."""

    asked: ResolvedRequest
    lease: Lease | None
    unasked: str

    @property
    def kind(self) -> Kind:
        """hit, extended or miss."""
        return "miss" if self.lease is None else self.lease.kind

    @property
    def reason(self) -> str | None:
        """Why it is a miss, or what is new."""
        if self.lease is None:
            return self.unasked
        if self.kind != "extended":
            return self.lease.reason
        return "1 new event" if self.new == 1 else f"{self.new} new events"

    @property
    def cached(self) -> int:
        """Events that the cache has."""
        return 0 if self.lease is None else self.lease.count

    @property
    def new(self) -> int:
        """Events to encode."""
        return len(self.asked.history) - self.cached


class HistoryEncoder:
    """Encodes histories of one bundle; safe to use from several threads."""

    def __init__(self, engine: Engine, cache: KvCache | None, namespace: str, item_keys: NDArray[np.int64]) -> None:
        """Keep what is encoded in a cache, under a namespace and the bundle's `kv_item_keys` (see `CacheKey`)."""
        self.engine, self.cache, self.namespace, self.item_keys = engine, cache, namespace, item_keys
        self.padding = PaddingMeter()
        self._prefix = engine.model.kv_prefix_slots

    @contextmanager
    def find(self, asked: Sequence[ResolvedRequest]) -> Iterator[list[Found]]:
        """Look all requests up; what was found stays in place, and what was not kept is dropped, when this ends."""
        with ExitStack() as leases:
            unasked = NO_CACHE if self.cache is None else ANONYMOUS
            yield [Found(asked=one, lease=self._look_up(one, leases), unasked=unasked) for one in asked]

    def work(self, found: Found) -> Work:
        """What a request needs."""
        slots = len(found.asked.history) + self._prefix
        ranked = 0 if found.asked.order == "retrieval" else found.asked.candidates
        return Work(kind=found.kind, slots=slots, new=found.new, candidates=ranked)

    @contextmanager
    def encoding(self, group: Sequence[Found]) -> Iterator[Encoded]:
        """Encode requests of one kind together, and let later requests find what is new if the block succeeds.

        Raises:
            BackendError: A graph failed, or a value does not fit the cache's precision.
        """
        encoded = self._encode_all(group) if group[0].kind == "miss" else self._encode_new(group)
        yield encoded
        last = encoded.last_hidden_state.numpy()
        for row, found in enumerate(group):
            if found.lease is not None:
                found.lease.commit(last[row].copy())

    def _look_up(self, asked: ResolvedRequest, leases: ExitStack) -> Lease | None:
        if self.cache is None or asked.user is None:
            return None
        key = CacheKey(
            user=asked.user,
            namespace=self.namespace,
            events=event_records(replace(asked.history, item_rows=self.item_keys[asked.history.item_rows])),
            count=len(asked.history),
            start=asked.start,
        )
        return leases.enter_context(self.cache.lookup(key))

    def _encode_all(self, group: Sequence[Found]) -> Encoded:
        encoded = self.engine.prefill(pad_histories([found.asked.history for found in group]))
        self.padding.add("encode", [found.new for found in group])
        if self.cache is None:
            return encoded
        slots = encoded.lengths + self._prefix
        exact = self.cache.geometry.dtype == "fp32"
        buffer = None if exact else KvBuffer(self.engine.model, len(group), int(slots.max()))
        host = on_host(encoded.key_values)
        for row, (found, count) in enumerate(zip(group, slots, strict=True)):
            key_values = row_of(host, row, count)
            self._store(found, key_values, None if buffer is None else buffer.row(row)[:, :, :count])
            if buffer is not None:
                buffer.clear_from(row, count)
        return encoded if buffer is None else encoded.over(buffer)

    def _store(
        self, found: Found, key_values: Sequence[NDArray[np.float32]], rounded: NDArray[np.float32] | None
    ) -> None:
        """Put new slots into the lease, if there is one and there is room, and what they become into `rounded`."""
        if found.lease is not None and found.lease.write(key_values, rounded):
            return
        if rounded is not None and self.cache is not None:
            for place, values in zip(rounded, key_values, strict=True):
                place[...] = as_stored(values, self.cache.geometry.dtype)

    def _encode_new(self, group: Sequence[Found]) -> Encoded:
        """Of requests of which the cache has a beginning, or all."""
        assert self.cache is not None
        histories = [found.asked.history for found in group]
        buffer = KvBuffer(self.engine.model, len(group), max(map(len, histories)) + self._prefix)
        leases = [found.lease for found in group if found.lease is not None]
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
        self.padding.add("extend", [found.new for found in group])
        for row, (found, count) in enumerate(zip(group, added.lengths, strict=True)):
            first = found.cached + self._prefix
            new = buffer.row(row)[:, :, first : first + count]
            self._store(found, list(new), new)
        return encoded


def event_records(history: History) -> bytes:
    """One record for each event: item, time, surface, actions; of equal length for all events of a bundle.

    What stands for an item is in `history.item_rows`; where bundles share a cache, `Bundle.kv_item_keys`.
    """
    columns = (history.item_rows, history.timestamps_ms, history.surfaces)
    raw = [np.ascontiguousarray(column).view(np.uint8).reshape(len(history), -1) for column in columns]
    return np.concatenate([*raw, np.packbits(history.actions != 0.0, axis=1)], axis=1).tobytes()


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one request needs: the stages, and their sizes.

    Attributes:
        kind: What the cache had; says which graphs run.
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
    """Events (or candidates) that a stage was given, and that it computed, padding included."""

    given: int
    computed: int

    @property
    def waste(self) -> float:
        """Share of what was computed that was padding."""
        return 1.0 - self.given / self.computed if self.computed else 0.0


class PaddingMeter:
    """Counts given and computed events by stage; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Padding] = {}

    def add(self, stage: str, sizes: Sequence[int]) -> None:
        """Count one run over rows of these sizes."""
        with self._lock:
            before = self._counts.get(stage, Padding(given=0, computed=0))
            self._counts[stage] = Padding(
                given=before.given + sum(sizes), computed=before.computed + len(sizes) * max(sizes)
            )

    def snapshot(self) -> dict[str, Padding]:
        """Totals by stage: encode, extend, rank."""
        with self._lock:
            return dict(self._counts)


def grouped(works: Sequence[Work], prefill_chunk: int | None) -> list[list[int]]:
    """Places of the requests that are computed together.

    Args:
        works: What each needs.
        prefill_chunk: Histories with more new events than this are encoded alone, in chunks; None = no limit.
    """
    buckets: dict[tuple[str, int, int, int], list[int]] = defaultdict(list)
    for place, work in enumerate(works):
        alone = prefill_chunk is not None and work.new > prefill_chunk
        size = -place - 1 if alone else half_octave(work.slots)
        buckets[work.kind, size, half_octave(work.new), half_octave(work.candidates)].append(place)
    groups = []
    for places in buckets.values():
        places.sort(key=lambda place: works[place].slots)
        rows = max(1, min(MAX_ROWS, MAX_SLOTS // works[places[-1]].slots))
        groups += [places[start : start + rows] for start in range(0, len(places), rows)]
    return groups


def half_octave(count: int) -> int:
    """Index of the range that a size falls into: up to 8, 12, 16, 24, 32, 48, ...; 0 has its own."""
    if count == 0:
        return -1
    index, limit = 0, 8
    while count > limit:
        limit = limit + limit // 2 if index % 2 == 0 else limit // 3 * 4
        index += 1
    return index
