"""The contract between a model and the export. Any torch module that has the five methods can be exported.

    class MyModel(nn.Module):          # the five methods of ServableModel, with these names, shapes and dtypes
        def encode(self, ...): ...
    export_bundle(ExportSource(module=MyModel(), model=ModelSpec(...), ...), Path("bundle/"))

Symbols: B rows, n events, m new events, p cached slots, k candidates, C actions, S surfaces, N items, E item width,
d hidden size, Q queries, F width of all dense features.
Histories are right-padded; `lengths` counts the real events. A missing time is -1.
Key/value tensors are (B, kv heads, slots, head_dim) f32. Slots are `kv_prefix_slots` of the model's own (such as a
sink), then one per event.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

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
    """Histories: item_vectors [B,n,E], actions [B,n,C] f32 0/1; surfaces, timestamps_ms [B,n] i64; lengths [B] i64."""

    item_vectors: Tensor
    actions: Tensor
    surfaces: Tensor
    timestamps_ms: Tensor
    lengths: Tensor


@dataclass(frozen=True, kw_only=True)
class Past:
    """Cached histories.

    Attributes:
        key_values: Per layer (key, value) with p slots, the prefix included.
        lengths: [B] i64, events per row.
        timestamps_ms: [B] i64, time of each row's last event.
    """

    key_values: KeyValues
    lengths: Tensor
    timestamps_ms: Tensor


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Items to rank: item_vectors [B,k,E] f32; surfaces [B] i64 and timestamps_ms [B] i64 ("now") hold for a row."""

    item_vectors: Tensor
    surfaces: Tensor
    timestamps_ms: Tensor


class ServableModel(Protocol):
    """The five methods that become the five graphs of a bundle.

    Each is a pure function of its arguments: no random numbers, no state, no Python branch on a value or a shape.
    Export calls them in eval mode. Padding must not change the result of a real event.
    """

    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        """Encode whole histories.

        Args:
            events: n events per row, at least one of them real.

        Returns:
            Per layer (key, value) with `kv_prefix_slots` + n slots, and the hidden state [B, d] f32 of each row's last
            real event. Keys and values of an event must not depend on later events.
        """

    def extend(self, events: Events, past: Past) -> tuple[KeyValues, Tensor]:
        """Encode new events after cached histories. Must give what `encode` gives for the whole history.

        Not needed with `ModelSpec.cache` = "none"; then keys and values may depend on later events.

        Args:
            events: m new events per row, at least one of them real.
            past: The cached histories, each with at least one event.

        Returns:
            Per layer (key, value) of the m new events alone, and the hidden state [B, d] f32 of each row's last event.
        """

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        """Make the queries that search the index. An item's score is its largest dot product with a query.

        Args:
            last_hidden_state: [B, d] f32, from `encode` or `extend`.
            outcomes: [B, C] f32, 1 for each action to aim at; None unless `ModelSpec.outcome_conditioned`.

        Returns:
            [B, Q, E] f32, each query of unit length unless `ModelSpec.similarity` is "dot".
        """

    def rank(self, past: Past, candidates: Candidates) -> Tensor:
        """Score candidates against cached histories. Candidates must not influence each other.

        Not needed with `ModelSpec.ranker` = None; slates are then in the order of retrieval. With
        "past+last_hidden_state" it takes a third argument, `last_hidden_state` [B, d] f32.

        Returns:
            Action logits [B, k, C] f32.
        """

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        """Make item vectors. Export calls this once for the catalogue; the graph serves items added later.

        Args:
            rows: [N] i64 catalogue rows; -1 for an item that training did not know.
            dense: [N, F] f32, the dense features side by side.
            categories: [N, features] i64 codes; 0 for an unknown word.

        Returns:
            [N, E] f32, each vector of unit length unless `ModelSpec.similarity` is "dot". Then a bias per item is one
            more number of its vector (`ModelSpec.item_bias`), and a 1 in the query.
        """


@dataclass(frozen=True, kw_only=True)
class Histories:
    """Events of some users, oldest first: user u has events offsets[u] up to offsets[u + 1].

    item_rows, surfaces, timestamps_ms [M] i64; actions [M, C] u8. `popularity` [S, N] f32 is that of the same data, see
    `Bundle.popularity`; None if unknown.
    """

    user_ids: list[str]
    offsets: NDArray[np.int64]
    item_rows: NDArray[np.int64]
    actions: NDArray[np.uint8]
    surfaces: NDArray[np.int64]
    timestamps_ms: NDArray[np.int64]
    popularity: NDArray[np.float32] | None = None

    def split(self) -> list[History]:
        """One history per user, as the runtime takes it."""
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
        module: A torch module with the methods of `ServableModel`.
        model: Its shapes.
        actions, positive_actions, surfaces: Names, in the order of the tensors.
        dense, categories: Width of each dense item feature, and words of each categorical one.
        item_ids, titles: External ids and readable names, in row order.
        item_dense, item_categories: Raw features of the catalogue, [N, F] f32 and [N, features] i64.
        config: Full description of the model; informative.
        metrics: Offline metrics, if any.
        order: How slates are ordered; None means by value.
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
        needed = {"encode": True, "extend": self.model.cache == "prefix", "retrieve": True}
        needed |= {"rank": self.model.ranker is not None, "embed_items": True}
        missing = [name for name, need in needed.items() if need and not hasattr(self.module, name)]
        if missing:
            raise ExportError(
                f"{type(self.module).__name__} lacks {missing}; see unipinrec.export.protocol.ServableModel"
            )
        if self.model.max_history < 2:
            raise ExportError(
                f"max_history={self.model.max_history} leaves no history to extend; train with at least 2"
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
        """The module, typed by its contract."""
        return cast(ServableModel, self.module)

    def logits(self, past: Past, candidates: Candidates, last_hidden_state: Tensor) -> Tensor:
        """Action logits [B, k, C]; the module reads what `ModelSpec.ranker` says."""
        rank: Any = self.servable.rank
        hidden = [last_hidden_state] if self.model.ranker == "past+last_hidden_state" else []
        logits: Tensor = rank(past, candidates, *hidden)
        return logits

    @property
    def has_content(self) -> bool:
        """Whether an item unknown to training can be embedded from its features."""
        return bool(self.dense or self.categories)
