"""The contract between a model and the export. Any torch module that has the five methods can be exported.

    class MyModel(nn.Module):          # the five methods of ServableModel, with these names, shapes and dtypes
        def encode(self, ...): ...
    export_bundle(ExportSource.simple(MyModel(), item_ids, max_history=50), Path("bundle/"))

Symbols: B rows, n events, m new events, p cached slots, k candidates, C actions, S surfaces, N items, E item width,
d hidden size, Q queries, F width of all dense features.
Histories are right-padded; `lengths` counts the real events. A missing time is -1.
Key/value tensors are (B, kv heads, slots, head_dim) f32. Slots are `kv_prefix_slots` of the model's own (such as a
sink), then one per event.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Unpack, cast

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unipinrec.errors import ExportError, decoding, listed
from unipinrec.export import inferred
from unipinrec.runtime.bundle.manifest import ModelSpec, OrderSpec

KeyValues = Sequence[tuple[Tensor, Tensor]]
MISSING_TIMESTAMP_MS = -1
SAMPLED_ITEMS = 1000  # enough to see whether item vectors are of unit length
log = logging.getLogger(__name__)


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
class ExportSource:
    """A trained model with everything that its bundle must carry.

    Attributes:
        module: A torch module with the methods of `ServableModel`. bf16 and fp16 weights are exported as f32.
        model: Its shapes.
        actions, positive_actions, surfaces: Names, in the order of the tensors.
        dense, categories: Width of each dense item feature, and words of each categorical one.
        item_ids, titles: External ids and readable names, in row order. Integers are accepted as ids and become text.
        item_dense, item_categories: Raw features of the catalogue, [N, F] f32 and [N, features] i64.
        config: Full description of the model; informative. Numpy scalars in it become numbers.
        metrics: Offline metrics, if any.
        order: How slates are ordered; None means by value.
        metadata: Columns of the catalogue to display and to filter by, numbers or text, None = missing; the model does
            not see them.
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
    metadata: Mapping[str, Sequence[float | str | None]] = field(default_factory=dict)

    @classmethod
    def simple(
        cls,
        module: nn.Module,
        item_ids: Iterable[str | int | np.integer[Any]],
        max_history: int,
        actions: Iterable[str] = ("click",),
        **options: Unpack[inferred.SimpleOptions],
    ) -> ExportSource:
        """Make a source of a module; the rest of its `ModelSpec` is inferred from one call of each method.

        `retrieve` is taken to need outcomes only if it fails with None. `rank` may be missing; with a third parameter
        it gets `last_hidden_state`. Overrule what is inferred with `dataclasses.replace` on the source.

        Args:
            module: A torch module with the methods of `ServableModel`, on the CPU. It is put into eval mode. If it has
                bf16 or fp16 weights, the source holds a copy of it in f32, and a warning is logged.
            item_ids: One id per catalogue row, text or integers. Integers become text, in requests too: 7 is "7".
            max_history: Longest history in events.
            actions: Names of actions, in the order of the tensors.
            options: See `unipinrec.export.inferred.SimpleOptions`.

        Raises:
            ExportError: A method fails or returns something else than documented, or an argument is wrong.
        """
        if not isinstance(module, nn.Module):
            raise ExportError(f"module is a {type(module).__name__}; pass an instance of a torch module")
        given: dict[str, Any] = dict(options)
        declared = {name: given.pop(name) for name in ("similarity", "item_bias", "cache") if name in given}
        spec = {**inferred.UNKNOWN, "max_history": max_history, "ranker": inferred.ranker_input(module)}
        spec |= ({"similarity": "dot"} if declared.get("item_bias") else {}) | declared
        with decoding(ExportError, "ExportSource.simple", "see its documentation for what is accepted"):
            model = msgspec.convert(inferred.plain("ExportSource.simple", spec), ModelSpec)
        names, actions = inferred.item_names(item_ids), inferred.texts(actions)
        nothing = np.zeros((len(names), 0), np.int64)
        source = cls(
            module=inferred.in_float32(module).eval(),
            model=model,
            actions=actions,
            positive_actions=inferred.texts(given.pop("positive_actions", actions)),
            surfaces=inferred.texts(given.pop("surfaces", "unknown")),
            titles=list(given.pop("titles", [None] * len(names))),
            dense=given.pop("dense", {}),
            categories={name: inferred.texts(words) for name, words in given.pop("categories", {}).items()},
            item_dense=np.asarray(given.pop("item_dense", nothing), np.float32),
            item_categories=np.asarray(given.pop("item_categories", nothing)).astype(np.int64, casting="same_kind"),
            item_ids=names,
            config=given.pop("config", {"architecture": type(module).__name__}),
            **given,
        )
        return replace(
            source, model=_inferred(source, keep_similarity=bool({"similarity", "item_bias"} & declared.keys()))
        )

    @property
    def positive(self) -> NDArray[np.bool_]:
        """Which of the actions are positive, [C]."""
        return np.array([name in self.positive_actions for name in self.actions])

    def __post_init__(self) -> None:
        needed = {"encode": True, "extend": self.model.cache == "prefix", "retrieve": True}
        needed |= {"rank": self.model.ranker is not None, "embed_items": True}
        missing = [name for name, need in needed.items() if need and not hasattr(self.module, name)]
        if missing:
            remedy = '; without extend, pass cache="none"' if "extend" in missing else ""
            raise ExportError(
                f"{type(self.module).__name__} lacks {missing}; see unipinrec.export.protocol.ServableModel{remedy}"
            )
        if self.model.item_bias and self.model.similarity == "cosine":
            raise ExportError('item_bias=True needs similarity="dot"; a cosine has no bias')
        if self.model.max_history < 2:
            raise ExportError(
                f"max_history={self.model.max_history} leaves no history to extend; train with at least 2"
            )
        if len({len(self.item_ids), len(self.titles), len(self.item_dense), len(self.item_categories)}) != 1:
            raise ExportError(
                f"item_ids ({len(self.item_ids)}), titles ({len(self.titles)}), item_dense ({len(self.item_dense)}) "
                f"and item_categories ({len(self.item_categories)}) must have one entry per item"
            )
        object.__setattr__(self, "item_ids", inferred.item_names(self.item_ids))
        object.__setattr__(self, "config", inferred.plain("config", self.config))
        object.__setattr__(self, "metadata", inferred.plain("metadata", dict(self.metadata)))
        object.__setattr__(self, "metrics", inferred.plain("metrics", self.metrics))

    def problems(self) -> Iterator[str]:
        """How names, features and configuration contradict each other, in words; `export_bundle` refuses them."""
        for name in ("actions", "surfaces"):
            if len(set(names := getattr(self, name))) != len(names):
                yield f"{name}: {listed(names)} are not distinct"
        if self.surfaces[:1] != ("unknown",):
            yield f'surfaces: {listed(self.surfaces)} must begin with "unknown", for events and requests without one'
        if self.model.cache == "prefix" and not self.model.num_layers:
            yield 'model: num_layers=0 leaves nothing to cache; export with cache="none"'
        if not self.actions:
            yield "actions: there are none; name at least one, such as click"
        if strange := [name for name in self.positive_actions if name not in self.actions]:
            yield f"positive_actions: {listed(strange)} are not among the actions {listed(self.actions)}"
        yield from self._feature_problems()

    def _feature_problems(self) -> Iterator[str]:
        width, count = sum(self.dense.values()), len(self.item_ids)
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


@torch.inference_mode()
def _inferred(source: ExportSource, *, keep_similarity: bool) -> ModelSpec:
    """The source's `ModelSpec` with the sizes that its methods show on three rows of one and of two events."""
    module, batch, candidates = source.module, 3, 4
    rows = torch.arange(0, len(source.item_ids), max(1, len(source.item_ids) // SAMPLED_ITEMS))
    features = (torch.from_numpy(values)[rows] for values in (source.item_dense, source.item_categories))
    vectors = inferred.called(module, "embed_items", rows, *features)
    vectors = inferred.of_shape(vectors, "embed_items", len(rows), "E")

    def items(width: int) -> Tensor:
        return vectors[torch.arange(batch * width).reshape(batch, width) % len(vectors)]

    layouts = set()
    surfaces, now = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), 1_700_000_000_000)
    for width in (1, 2):
        events = Events(
            item_vectors=items(width),
            actions=torch.ones(batch, width, len(source.actions)),
            surfaces=surfaces[:, None].expand(batch, width),
            timestamps_ms=now[:, None] + 1000 * torch.arange(width),
            lengths=torch.tensor([width, width, 1]),
        )
        result = inferred.called(module, "encode", events)
        key_values, hidden, layout = inferred.encoded(result, batch, width)
        layouts.add(layout)
    if len(layouts) > 1 or layout[2] < 0:
        raise ExportError(
            f"encode: (layers, kv heads, slots without the events, head_dim) are {sorted(layouts)} for one and two "
            "events; there must be a slot per event, after a fixed number of slots of the model's own"
        )
    if not key_values and source.model.cache == "prefix":
        raise ExportError('encode: returned no keys and values, so there is nothing to cache; pass cache="none"')
    conditioned, queries = inferred.retrieved(module, hidden, torch.ones(batch, len(source.actions)))
    queries = inferred.of_shape(queries, "retrieve", batch, "Q", vectors.shape[1])
    if source.model.ranker:
        slate = Candidates(item_vectors=items(candidates), surfaces=surfaces, timestamps_ms=now)
        past = Past(key_values=key_values, lengths=events.lengths, timestamps_ms=events.timestamps_ms[:, -1])
        last = (hidden,) if source.model.ranker == "past+last_hidden_state" else ()
        logits = inferred.called(module, "rank", past, slate, *last)
        inferred.of_shape(logits, "rank", batch, candidates, len(source.actions))
    declared = source.model.similarity
    sizes = dict(zip(("num_layers", "num_kv_heads", "kv_prefix_slots", "head_dim"), layout, strict=True))
    spec = msgspec.structs.replace(
        source.model,
        **sizes,
        hidden_size=hidden.shape[1],
        item_dim=vectors.shape[1],
        outcome_conditioned=conditioned,
        similarity=declared if keep_similarity else inferred.similarity_of(vectors, queries.flatten(0, 1)),
    )
    log.info("inferred: %s", spec)
    return spec
