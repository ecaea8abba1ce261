"""Inputs on which exported graphs are traced and compared: random but plausible, at sizes that include the edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unipinrec.export.protocol import MISSING_TIMESTAMP_MS, Events, ExportSource

START_MS = 1_700_000_000_000
# None, a second, an hour, a day, 35 days (2^31 to 2^32 ms, where a 32-bit operation shows), ten years.
GAPS_MS = (0, 1_000, 3_600_000, 86_400_000, 3_000_000_000, 315_360_000_000)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Named inputs of one graph; `valid_slots` [B] says how much of each row's key/value outputs is not padding."""

    name: str
    feeds: dict[str, Tensor]
    valid_slots: Tensor | None = None


class CaseMaker:
    """Makes inputs for the graphs of one model from its own item vectors."""

    def __init__(self, source: ExportSource, item_vectors: NDArray[np.float32], seed: int = 0) -> None:
        self.source = source
        self.vectors = torch.from_numpy(item_vectors)
        self.generator = torch.Generator().manual_seed(seed)

    def example(self, graph: str) -> dict[str, Tensor]:
        """Inputs to trace a graph with: every axis at least 2 and different from every other."""
        sizes = {
            "encoder": lambda: self.encoder([7, 3]),
            "extend": lambda: self.extend([5, 2], [4, 1]),
            "retrieval": lambda: self.retrieval(2),
            "ranker": lambda: self.ranker([7, 3], 5),
            "item_embedder": lambda: self.item_embedder(6),
        }
        return sizes[graph]().feeds

    def cases(self, graph: str) -> list[Case]:
        """Inputs to compare a graph on: single, full length, padded, one candidate, many."""
        full = self.source.model.max_history
        half = max(1, full // 2)
        made = {
            "encoder": lambda: [self.encoder(n) for n in ([1], [full, 1], [min(9, full), 1, min(4, full)])],
            "extend": lambda: [
                self.extend(p, m)
                for p, m in (([1], [1]), ([half, 1], [1, max(1, full - half)]), ([3, 1, 2], [1, 4, 2]))
            ],
            "retrieval": lambda: [self.retrieval(b) for b in (1, 5)],
            "ranker": lambda: [self.ranker(p, k) for p, k in (([1], 1), ([full, 1], 64), ([2, 5, 1], 3))],
            "item_embedder": lambda: [self.item_embedder(count) for count in (1, 5)],
        }
        return made[graph]()

    def encoder(self, lengths: Sequence[int]) -> Case:
        """Histories of these lengths."""
        events = self._events(lengths)
        slots = events.lengths + self.source.model.kv_prefix_slots
        return Case(name=f"lengths={list(lengths)}", feeds=vars(events).copy(), valid_slots=slots)

    def extend(self, past: Sequence[int], new: Sequence[int]) -> Case:
        """New events after pasts of these lengths."""
        events = self._events(new)
        feeds = {**vars(events), **self._past(past)}
        return Case(name=f"past={list(past)}, new={list(new)}", feeds=feeds, valid_slots=events.lengths)

    def retrieval(self, batch: int) -> Case:
        """Last hidden states of short histories, with random outcomes where the model has them."""
        last = self.source.servable.encode(self._events([1 + i for i in range(batch)]))[1]
        outcomes = self._bits(batch, len(self.source.actions))
        feeds = {"last_hidden_state": last, "outcomes": outcomes}
        if not self.source.model.outcome_conditioned:
            del feeds["outcomes"]
        return Case(name=f"batch={batch}", feeds=feeds)

    def ranker(self, past: Sequence[int], candidates: int) -> Case:
        """Candidates for histories of these lengths."""
        batch, cached = len(past), self._past(past)
        feeds = {
            **cached,
            "candidate_vectors": self._items(batch, candidates),
            "surfaces": self._integers(batch, len(self.source.surfaces)),
            "timestamps_ms": cached["past_timestamps_ms"] + self._gaps(batch),
        }
        return Case(name=f"past={list(past)}, candidates={candidates}", feeds=feeds)

    def item_embedder(self, count: int) -> Case:
        """Features of catalogue items, taken as if training had not known them."""
        rows = self._integers(count, len(self.vectors)).numpy()
        feeds = {}
        if self.source.dense:
            feeds["dense"] = torch.from_numpy(self.source.item_dense[rows])
        if self.source.categories:
            feeds["categories"] = torch.from_numpy(self.source.item_categories[rows])
        return Case(name=f"items={count}", feeds=feeds)

    def _events(self, lengths: Sequence[int]) -> Events:
        batch, width = len(lengths), max(lengths)
        timestamps = START_MS + self._gaps(batch, width).cumsum(1)
        timestamps[:, 0] = torch.where(torch.arange(batch) % 2 == 0, timestamps[:, 0], MISSING_TIMESTAMP_MS)
        return Events(
            item_vectors=self._items(batch, width),
            actions=self._bits(batch, width, len(self.source.actions)),
            surfaces=self._integers((batch, width), len(self.source.surfaces)),
            timestamps_ms=timestamps,
            lengths=torch.tensor(list(lengths)),
        )

    def _past(self, lengths: Sequence[int]) -> dict[str, Tensor]:
        events = self._events(lengths)
        key_values, _ = self.source.servable.encode(events)
        names = self.source.model.kv_names("past_key_values")
        tensors = dict(zip(names, (t for pair in key_values for t in pair), strict=True))
        last = events.timestamps_ms.gather(1, (events.lengths - 1)[:, None])[:, 0]
        return {**tensors, "past_lengths": events.lengths, "past_timestamps_ms": last}

    def _gaps(self, *shape: int) -> Tensor:
        return torch.tensor(GAPS_MS)[self._integers(shape, len(GAPS_MS))]

    def _items(self, *shape: int) -> Tensor:
        return self.vectors[self._integers(shape, len(self.vectors))]

    def _bits(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < 0.3).float()

    def _integers(self, shape: int | tuple[int, ...], high: int) -> Tensor:
        size = (shape,) if isinstance(shape, int) else shape
        return torch.randint(0, high, size, generator=self.generator)
