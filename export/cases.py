"""Inputs to trace and compare exported graphs with: random but plausible, at sizes that include the edges."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unipinrec.errors import ExportError, reason
from unipinrec.export.protocol import MISSING_TIMESTAMP_MS, Events, ExportSource, KeyValues

START_MS = 1_700_000_000_000
# Zero, a second, an hour, a day, 35 days (2^31 to 2^32 ms, where 32-bit arithmetic fails), ten years.
GAPS_MS = (0, 1_000, 3_600_000, 86_400_000, 3_000_000_000, 315_360_000_000)

Sizes = tuple[Any, ...]  # arguments of a method of `CaseMaker`
EXAMPLES: dict[str, Sizes] = {
    "encoder": ([7, 3],),
    "extend": ([5, 2], [4, 1]),
    "retrieval": (2,),
    "ranker": ([7, 3], 5),
    "item_embedder": (6,),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Named inputs of one graph; `valid_slots` [B] counts the slots of each key/value output that are not padding."""

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
        return self._case(graph, EXAMPLES[graph]).feeds

    def cases(self, graph: str) -> list[Case]:
        """Inputs to compare a graph on: single, full length, padded, one candidate, many."""
        full = self.source.model.max_history
        half = max(1, full // 2)
        sizes: dict[str, list[Sizes]] = {
            "encoder": [([1],), ([full, 1],), ([min(9, full), 1, min(4, full)],)],
            "extend": [([1], [1]), ([half, 1], [1, max(1, full - half)]), ([3, 1, 2], [1, 4, 2])],
            "retrieval": [(1,), (5,)],
            "ranker": [([1], 1), ([full, 1], 64), ([2, 5, 1], 3)],
            "item_embedder": [(1,), (5,)],
        }
        return [self._case(graph, size) for size in sizes[graph]]

    def _case(self, graph: str, sizes: Sizes) -> Case:
        """The inputs of a graph, made by the method of that name."""
        try:
            case: Case = getattr(self, graph)(*sizes)
        except Exception as error:  # a module raises what it likes
            raise ExportError(
                f"{graph}: the module fails on the sizes {sizes}, with which export traces and compares graphs: "
                f"{reason(error)}; if max_history={self.source.model.max_history} is less, clamp positions in `encode`"
            ) from error
        return case

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
        outcomes = self._bits(batch, len(self.source.actions))  # drawn in any case: later cases stay the same
        conditioned = {"outcomes": outcomes} if self.source.model.outcome_conditioned else {}
        return Case(name=f"batch={batch}", feeds={"last_hidden_state": last, **conditioned})

    def ranker(self, past: Sequence[int], candidates: int) -> Case:
        """Candidates for histories of these lengths."""
        batch, feeds = len(past), self._past(past)
        feeds |= {
            "candidate_vectors": self._items(batch, candidates),
            "surfaces": self._integers((batch,), len(self.source.surfaces)),
            "timestamps_ms": feeds["past_timestamps_ms"] + self._gaps(batch),
        }
        return Case(name=f"past={list(past)}, candidates={candidates}", feeds=feeds)

    def item_embedder(self, count: int) -> Case:
        """Features of catalogue items, treated as unknown to training."""
        rows = self._integers((count,), len(self.vectors)).numpy()
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
            lengths=torch.tensor(lengths),
        )

    def _past(self, lengths: Sequence[int]) -> dict[str, Tensor]:
        events = self._events(lengths)
        key_values, last_hidden_state = self.source.servable.encode(events)
        tensors = named_key_values(self.source, "past_key_values", key_values)
        last = at_last(events.timestamps_ms, events.lengths)
        return {
            **tensors,
            "past_lengths": events.lengths,
            "past_timestamps_ms": last,
            "last_hidden_state": last_hidden_state,
        }

    def _gaps(self, *shape: int) -> Tensor:
        return torch.tensor(GAPS_MS)[self._integers(shape, len(GAPS_MS))]

    def _items(self, *shape: int) -> Tensor:
        return self.vectors[self._integers(shape, len(self.vectors))]

    def _bits(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < 0.3).float()

    def _integers(self, shape: tuple[int, ...], high: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)


def at_last(values: Tensor, lengths: Tensor) -> Tensor:
    """Each row's last valid value [B] of right-padded values [B, n]."""
    return values.gather(1, (lengths - 1)[:, None])[:, 0]


def named_key_values(source: ExportSource, prefix: str, key_values: KeyValues) -> dict[str, Tensor]:
    """Key/value tensors by name, see `ModelSpec.kv_names`."""
    return dict(zip(source.model.kv_names(prefix), itertools.chain.from_iterable(key_values), strict=True))
