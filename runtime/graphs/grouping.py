"""Which requests of a batch are computed together, and what the padding of that costs.

Requests are computed together where they need the same stages and have histories of similar length, so that little is
padding: lengths of a group lie within the same half octave. A group is computed on its own from encoding to ranking.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["hit", "extended", "miss"]


MAX_SLOTS = 2048  # of a group: beyond it the matrix products are as fast as they get, and memory only grows
MAX_ROWS = 32


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
