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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from unipinrec.errors import ExportError, listed
from unipinrec.runtime.bundle.manifest import ModelSpec, OrderSpec
from unipinrec.runtime.requests import YEAR_10000_MS, History

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

    Export refuses a module that breaks one of these rules (`check_contract`):

    - Each method is a pure function of its arguments in eval mode: no random numbers, no state, no Python branch on a
      value or a shape.
    - A row depends on nothing but its own events: not on other rows, the width of the batch, or what stands in the
      padding of events and slots.
    - Nothing of an event depends on later events or on the length of the history, so positions count from the first
      event. `ModelSpec.cache` = "none" lifts this rule, and only this.
    - `encode` gives `kv_prefix_slots` + n slots. `extend` gives m, and the same numbers as `encode` for the whole
      history; its events continue at position `past.lengths`.
    - Candidates see the history and themselves, not each other. Their logits differ, and stay below 36, where a
      probability becomes 1.
    - Histories have up to `max_history` events. In a batch the padding of `extend` may lie beyond: clamp positions.
    - All results are finite f32. Surface 0 is "unknown", for requests that name none.
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

    def check(self, source: ExportSource) -> None:
        """Check that the histories fit a source.

        Raises:
            ExportError: Lists all misfits.
        """
        if problems := list(self._problems(source)):
            raise ExportError(f"histories do not fit: {'; '.join(problems)}")

    def _problems(self, source: ExportSource) -> Iterator[str]:
        events, actions, users = len(self.item_rows), len(source.actions), len(self.user_ids)
        columns: dict[str, tuple[NDArray[Any], tuple[int, ...], tuple[int, int]]] = {
            "item_rows": (self.item_rows, (events,), (0, len(source.item_ids) - 1)),
            "actions": (self.actions, (events, actions), (0, 1)),
            "surfaces": (self.surfaces, (events,), (0, len(source.surfaces) - 1)),
            "timestamps_ms": (self.timestamps_ms, (events,), (MISSING_TIMESTAMP_MS, YEAR_10000_MS - 1)),
        }
        for name, (array, shape, (least, most)) in columns.items():
            kind = "uint8" if name == "actions" else "int64"
            if array.dtype != kind or array.shape != shape:
                yield f"{name} is {array.dtype} {list(array.shape)}, must be {kind} {list(shape)}"
            elif events and not least <= array.min() <= array.max() <= most:
                yield f"{name} has values from {array.min()} to {array.max()}, must be from {least} to {most}"
        offsets = self.offsets
        if offsets.shape != (users + 1,) or offsets.dtype != "int64" or [*offsets[[0, -1]]] != [0, events]:
            yield f"offsets are {listed(offsets.tolist(), 5)}; {users} users need {users + 1} int64 from 0 to {events}"
        elif (np.diff(offsets) < 1).any():
            user = self.user_ids[int(np.argmax(np.diff(offsets) < 1))]
            yield f"user {user!r} has no events; leave such users out"
        if len(set(self.user_ids)) != users:
            yield "user_ids are not distinct"
        expected = (len(source.surfaces), len(source.item_ids))
        if self.popularity is not None and self.popularity.shape != expected:
            yield f"popularity is {list(self.popularity.shape)}, must be [surfaces, items] = {list(expected)}"


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

    def problems(self) -> Iterator[str]:
        """How names, features and configuration contradict each other, in words; `export_bundle` refuses them."""
        for name in ("actions", "surfaces"):
            if len(set(names := getattr(self, name))) != len(names):
                yield f"{name}: {listed(names)} are not distinct"
        if self.surfaces[:1] != ("unknown",):
            yield f'surfaces: {listed(self.surfaces)} must begin with "unknown", for events and requests without one'
        if not self.actions:
            yield "actions: there are none; name at least one, such as click"
        if strange := [name for name in self.positive_actions if name not in self.actions]:
            yield f"positive_actions: {listed(strange)} are not among the actions {listed(self.actions)}"
        yield from self._feature_problems()
        for name in ("config", "metrics"):
            try:
                msgspec.json.encode(getattr(self, name))
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                yield f"{name} is not JSON: {error}; use plain str, int, float, list and dict"

    def _feature_problems(self) -> Iterator[str]:
        width, count = sum(self.dense.values()), len(self.item_ids)
        if not count:
            yield "item_ids: there are none"
        arrays: dict[str, tuple[NDArray[Any], str, int, str]] = {
            "item_dense": (self.item_dense, "float32", width, f"dense = {self.dense}"),
            "item_categories": (
                self.item_categories,
                "int64",
                len(self.categories),
                f"categories = {[*self.categories]}",
            ),
        }
        for name, (array, dtype, columns, declared) in arrays.items():
            if array.dtype != dtype or array.shape != (count, columns):
                yield f"{name} is {array.dtype} {list(array.shape)}, {declared} needs {dtype} {[count, columns]}"
            elif not np.isfinite(array).all():
                yield f"{name} holds numbers that are not finite"
            elif dtype == "int64" and ((array < 0) | (array > [len(w) for w in self.categories.values()])).any():
                yield f"{name} holds a code that stands for no word; codes are from 0 (unknown) to the number of words"

    @property
    def servable(self) -> ServableModel:
        """The module, typed by its contract."""
        return cast(ServableModel, self.module)

    @property
    def has_content(self) -> bool:
        """Whether an item unknown to training can be embedded from its features."""
        return bool(self.dense or self.categories)
