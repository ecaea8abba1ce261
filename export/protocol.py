"""What export asks of a model, and what it needs to know about it. Any module that keeps this contract can be exported.

    class MyModel(nn.Module):          # the five methods of ServableModel, with these names, shapes and dtypes
        def encode(self, ...): ...
    export_bundle(ExportSource(module=MyModel(), model=ModelSpec(...), ...), Path("bundle/"))

Symbols: B rows, n events, m new events, p cached slots, k candidates, C actions, E item width, Q queries, F dense.
Histories are right-padded; `lengths` counts real events. Key/value tensors are (B, kv heads, slots, head_dim); those of
a history may begin with `kv_prefix_slots` slots of the model's own (a sink). A missing time is -1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from unipinrec.errors import ExportError
from unipinrec.runtime.bundle.manifest import ModelSpec, OrderSpec
from unipinrec.runtime.requests import History

KeyValues = Sequence[tuple[Tensor, Tensor]]
MISSING_TIMESTAMP_MS = -1


@dataclass(frozen=True, kw_only=True)
class Events:
    """A history: item_vectors [B,n,E], actions [B,n,C] f32 0/1; surfaces, timestamps_ms [B,n] i64; lengths [B] i64."""

    item_vectors: Tensor
    actions: Tensor
    surfaces: Tensor
    timestamps_ms: Tensor
    lengths: Tensor


@dataclass(frozen=True, kw_only=True)
class Past:
    """A cached history: per-layer (key, value); lengths [B] i64, in events; timestamps_ms [B] i64 of the last."""

    key_values: KeyValues
    lengths: Tensor
    timestamps_ms: Tensor


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Items to rank: item_vectors [B,k,E] f32; surfaces [B] i64 and timestamps_ms [B] i64 ("now") shared by a row."""

    item_vectors: Tensor
    surfaces: Tensor
    timestamps_ms: Tensor


@runtime_checkable
class ServableModel(Protocol):
    """The five methods that become the five graphs. They must be pure, in eval mode, and free of branches on shapes."""

    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        """Per-layer (key, value) with prefix + n slots, and the last hidden state [B, d]."""

    def extend(self, events: Events, past: Past) -> tuple[KeyValues, Tensor]:
        """Per-layer (key, value) of the m new events alone, and the last hidden state [B, d]."""

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        """Queries [B, Q, E] of unit length; `outcomes` [B, C] f32 only where the model is outcome-conditioned."""

    def rank(self, past: Past, candidates: Candidates) -> Tensor:
        """Action logits [B, k, C]."""

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        """Item vectors [N, E] of unit length; rows [N] (-1: not in training), dense [N, F], categories [N, ...]."""


@dataclass(frozen=True, kw_only=True)
class Histories:
    """Event runs of some users, oldest first: user u has events offsets[u] .. offsets[u + 1].

    item_rows, surfaces, timestamps_ms [M] i64; actions [M, C] u8. `popularity` [S, N] f32 is that of the data that they
    are from, see `Bundle.popularity`; None = not known.
    """

    user_ids: list[str]
    offsets: NDArray[np.int64]
    item_rows: NDArray[np.int64]
    actions: NDArray[np.uint8]
    surfaces: NDArray[np.int64]
    timestamps_ms: NDArray[np.int64]
    popularity: NDArray[np.float32] | None = None

    def split(self) -> list[History]:
        """Each user's as the runtime takes it."""
        events = History(
            item_rows=self.item_rows,
            actions=self.actions.astype(np.float32),
            surfaces=self.surfaces,
            timestamps_ms=self.timestamps_ms,
        )
        return [events.part(*window) for window in itertools.pairwise(self.offsets.tolist())]


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """A trained model with everything that its bundle must carry.

    Attributes:
        module: A torch module that keeps `ServableModel`.
        model: Its shapes.
        actions, positive_actions, surfaces: Names, in the order of the tensors.
        dense, categories: Declared item features: widths, and words by feature.
        item_ids, titles: External ids and names for people, in row order.
        item_dense, item_categories: Raw features of the catalogue, [N, F] f32 and [N, features] i64.
        config: Full description of the model, for people.
        metrics: Offline metrics, if any.
        order: What slates are ordered by; None = by value.
    """

    module: nn.Module
    model: ModelSpec
    actions: tuple[str, ...]
    positive_actions: tuple[str, ...]
    surfaces: tuple[str, ...]
    dense: dict[str, int]
    categories: dict[str, tuple[str, ...]]
    item_ids: list[str]
    titles: list[str | None]
    item_dense: NDArray[np.float32]
    item_categories: NDArray[np.int64]
    config: dict[str, Any]
    metrics: dict[str, Any] | None = None
    order: OrderSpec | None = None

    @property
    def positive(self) -> NDArray[np.bool_]:
        """Which of the actions are positive, [C]."""
        return np.array([name in self.positive_actions for name in self.actions])

    def __post_init__(self) -> None:
        missing = [n for n in ("encode", "extend", "retrieve", "rank", "embed_items") if not hasattr(self.module, n)]
        if missing:
            raise ExportError(
                f"{type(self.module).__name__} lacks {missing}; see unipinrec.export.protocol.ServableModel"
            )
        if self.model.max_history < 2:
            raise ExportError(
                f"max_history={self.model.max_history}: no history could be extended; train with at least 2"
            )
        if len({len(self.item_ids), len(self.titles), len(self.item_dense), len(self.item_categories)}) != 1:
            raise ExportError(
                f"item_ids ({len(self.item_ids)}), titles ({len(self.titles)}), item_dense ({len(self.item_dense)}) "
                f"and item_categories ({len(self.item_categories)}) must have one entry per item"
            )
        if len(set(self.item_ids)) != len(self.item_ids):
            raise ExportError("item_ids must be distinct")

    @property
    def servable(self) -> ServableModel:
        """The module under its contract."""
        assert isinstance(self.module, ServableModel)
        return self.module

    @property
    def has_content(self) -> bool:
        """Whether an item unknown to training can be embedded from its features."""
        return bool(self.dense or self.categories)
