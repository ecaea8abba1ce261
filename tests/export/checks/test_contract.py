"""A module whose methods do not agree is refused in words, each fault by name; a module that keeps the rules passes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unipinrec.errors import ContractError, ExportError
from unipinrec.export.bundle_writer import export_bundle
from unipinrec.export.checkpoint_source import source_from_checkpoint
from unipinrec.export.checks.contract import check_contract
from unipinrec.export.golden import random_histories
from unipinrec.export.protocol import Candidates, Events, ExportSource, KeyValues, Past
from unipinrec.runtime import CacheOptions, Recommender, RecommendOptions, verify_bundle
from unipinrec.runtime.bundle.manifest import ModelSpec, OrderSpec

ITEMS = 40
SPEC = ModelSpec(
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
    hidden_size=8,
    item_dim=8,
    max_history=20,
    kv_prefix_slots=0,
    outcome_conditioned=False,
)


class Tiny(nn.Module):
    """SASRec with actions: learned positions, causal attention, candidates that attend to the history."""

    def __init__(self, spec: ModelSpec = SPEC, actions: int = 1, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        d, width = spec.hidden_size, spec.num_kv_heads * spec.head_dim
        self.spec, self.heads = spec, (spec.num_kv_heads, spec.head_dim)
        self.items = nn.Embedding(ITEMS, spec.item_dim)
        self.enter, self.ask = nn.Linear(spec.item_dim + actions, d), nn.Linear(spec.item_dim, d)
        self.positions = nn.Embedding(spec.max_history, d)
        self.prefix = nn.Parameter(
            torch.randn(spec.num_layers, 2, spec.num_kv_heads, spec.kv_prefix_slots, spec.head_dim)
        )
        self.qkv = nn.ModuleList(nn.Linear(d, 3 * width) for _ in range(spec.num_layers))
        self.out = nn.ModuleList(nn.Linear(width, d) for _ in range(spec.num_layers))
        self.query, self.outcome = nn.Linear(d, spec.item_dim), nn.Linear(actions, d)
        self.head, self.last = nn.Linear(d, actions), nn.Linear(d, d)

    def where(self, start: Tensor, count: int) -> Tensor:
        """Positions [B, count] of events."""
        return (start[:, None] + torch.arange(count)).clamp(max=self.spec.max_history - 1)

    def seen(self, count: int) -> Tensor:
        """Which new events [count, count] each new event sees."""
        return torch.ones(count, count, dtype=torch.bool).tril()

    def cached(self, slots: int, lengths: Tensor) -> Tensor:
        """Which cached slots [B, slots] hold something."""
        return torch.arange(slots) < lengths[:, None] + self.spec.kv_prefix_slots

    def split(self, projected: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.unflatten(-1, self.heads).transpose(1, 2) for part in projected.chunk(3, -1))

    def run(self, events: Events, past: Past) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        count, x = events.surfaces.shape[1], self.enter(torch.cat([events.item_vectors, events.actions], -1))
        x = x + self.positions(self.where(past.lengths, count))
        added = []
        for qkv, out, (old_key, old_value) in zip(self.qkv, self.out, past.key_values, strict=True):
            query, key, value = self.split(qkv(x))
            added.append((key, value))
            old = self.cached(old_key.shape[2], past.lengths)[:, None].expand(-1, count, -1)
            mask = torch.cat([old, self.seen(count).expand(x.shape[0], -1, -1)], 2)[:, None]
            key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
            read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            x = x + out(read.transpose(1, 2).flatten(2))
        return added, x.gather(1, (events.lengths - 1)[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]

    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        batch = events.lengths.shape[0]  # `len` would fix the axis in the graph
        own = [tuple(part[None].expand(batch, -1, -1, -1) for part in layer) for layer in self.prefix]
        start = torch.zeros_like(events.lengths)
        added, hidden = self.run(events, Past(key_values=[(k, v) for k, v in own], lengths=start, timestamps_ms=start))
        pairs = [
            (torch.cat([k, key], 2), torch.cat([v, value], 2)) for (k, v), (key, value) in zip(own, added, strict=True)
        ]
        return pairs, hidden

    def extend(self, events: Events, past: Past) -> tuple[KeyValues, Tensor]:
        return self.run(events, past)

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        wanted = 0.0 if outcomes is None else self.outcome(outcomes)
        queries = self.query(last_hidden_state + wanted)[:, None]
        if self.spec.item_bias:
            queries = torch.cat([queries[..., :-1], torch.ones_like(queries[..., :1])], -1)
        return F.normalize(queries, dim=-1) if self.spec.similarity == "cosine" else queries

    def rank(self, past: Past, candidates: Candidates, last_hidden_state: Tensor | None = None) -> Tensor:
        x = self.ask(candidates.item_vectors)
        if last_hidden_state is not None:
            x = x + self.last(last_hidden_state)[:, None]
        for qkv, out, (key, value) in zip(self.qkv, self.out, past.key_values, strict=True):
            mask = self.cached(key.shape[2], past.lengths)[:, None, None].expand(-1, -1, x.shape[1], -1)
            read = F.scaled_dot_product_attention(self.split(qkv(x))[0], key, value, attn_mask=mask)
            x = x + out(read.transpose(1, 2).flatten(2))
        return self.head(x)  # type: ignore[no-any-return]

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        vectors = self.items(rows)
        return F.normalize(vectors, dim=-1) if self.spec.similarity == "cosine" else vectors


def tiny_source(module: nn.Module | None = None, *, actions: tuple[str, ...] = ("click",), **spec: Any) -> ExportSource:
    """A source of a module; `spec` changes what `ModelSpec` says, whatever the module is."""
    return ExportSource(
        module=Tiny() if module is None else module,
        model=msgspec.structs.replace(SPEC, **spec),
        actions=actions,
        positive_actions=actions[:1],
        surfaces=("unknown", "home"),
        dense={},
        categories={},
        item_ids=[f"item-{i}" for i in range(ITEMS)],
        titles=[None] * ITEMS,
        item_dense=np.zeros((ITEMS, 0), np.float32),
        item_categories=np.zeros((ITEMS, 0), np.int64),
        config={"architecture": "Tiny"},
    )


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one action each": {"num_layers": 1, "num_kv_heads": 1, "head_dim": 2, "hidden_size": 6, "item_dim": 3},
    "two events": {"max_history": 2},
    "prefix slots": {"kv_prefix_slots": 2},
    "outcomes": {"outcome_conditioned": True},
    "dot": {"similarity": "dot"},
    "dot and bias": {"similarity": "dot", "item_bias": True},
    "no cache": {"cache": "none"},
    "no ranker": {"ranker": None},
    "hidden state for the ranker": {"ranker": "past+last_hidden_state"},
    "no layers": {"num_layers": 0, "cache": "none", "ranker": "past+last_hidden_state"},
}


def problems_of(source: ExportSource) -> str:
    with pytest.raises(ContractError, match="cannot be exported:") as caught:
        check_contract(source)
    return str(caught.value)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("actions", [1, 3])
def test_a_module_that_keeps_the_rules_passes(shape: dict[str, Any], actions: int) -> None:
    module = Tiny(msgspec.structs.replace(SPEC, **shape), actions)
    check_contract(tiny_source(module, actions=("a", "b", "c")[:actions], **shape))


def test_our_own_model_passes(checkpoint: Path) -> None:
    check_contract(source_from_checkpoint(checkpoint))


def test_a_module_without_the_methods_that_its_spec_rules_out_passes() -> None:
    class Retrieval(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Tiny()
            self.encode, self.retrieve, self.embed_items = (
                self.inner.encode,
                self.inner.retrieve,
                self.inner.embed_items,
            )

    check_contract(tiny_source(Retrieval(), cache="none", ranker=None))


# Faults in what the methods compute: how each is written, and what is said of it.


class NoOffset(Tiny):
    def extend(self, events: Events, past: Past) -> tuple[KeyValues, Tensor]:
        return self.run(events, past)

    def where(self, start: Tensor, count: int) -> Tensor:
        return super().where(torch.zeros_like(start), count)


class FromTheEnd(Tiny):
    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        self.ends = events.lengths
        return super().encode(events)

    def extend(self, events: Events, past: Past) -> tuple[KeyValues, Tensor]:
        self.ends = past.lengths + events.lengths
        return super().extend(events, past)

    def where(self, start: Tensor, count: int) -> Tensor:
        return (self.ends[:, None] - 1 - start[:, None] - torch.arange(count)).clamp(min=0)


class Bidirectional(Tiny):
    def run(self, events: Events, past: Past) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        self.real = torch.arange(events.surfaces.shape[1]) < events.lengths[:, None]
        return super().run(events, past)

    def seen(self, count: int) -> Tensor:
        return self.real[:, None].expand(-1, count, -1)


class ReadsWidth(Tiny):
    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        pairs, hidden = super().encode(events)
        return pairs, hidden + 0.01 * events.surfaces.shape[1]


class ReadsPadding(Tiny):
    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        pairs, hidden = super().encode(events)
        return pairs, hidden + 1e-3 * events.item_vectors.clamp(min=5.0).amax(1)


class ReadsOtherRows(Tiny):
    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        pairs, hidden = super().encode(events)
        return [(key + key[:, :, :1].mean(0), value) for key, value in pairs], hidden


class ExtendsWithoutMask(Tiny):
    def extend(self, events: Events, past: Past) -> tuple[KeyValues, Tensor]:
        every = torch.ones(1, dtype=torch.bool)
        self.cached = lambda slots, lengths: every.expand(len(lengths), slots)  # type: ignore[method-assign]
        try:
            return super().extend(events, past)
        finally:
            del self.cached


class ForgetsThePast(Tiny):
    def extend(self, events: Events, past: Past) -> tuple[KeyValues, Tensor]:
        empty = [(key[:, :, :0], value[:, :, :0]) for key, value in past.key_values]
        return self.run(events, replace(past, key_values=empty))


class ReturnsAllSlots(Tiny):
    def extend(self, events: Events, past: Past) -> tuple[KeyValues, Tensor]:
        added, hidden = super().extend(events, past)
        return [(torch.cat([o, n], 2), v) for (o, _), (n, v) in zip(past.key_values, added, strict=True)], hidden


class RanksWithoutMask(Tiny):
    def rank(self, past: Past, candidates: Candidates, last_hidden_state: Tensor | None = None) -> Tensor:
        slots = past.key_values[0][0].shape[2]
        return super().rank(replace(past, lengths=torch.full_like(past.lengths, slots)), candidates)


class RanksByRow(Tiny):
    def rank(self, past: Past, candidates: Candidates, last_hidden_state: Tensor | None = None) -> Tensor:
        return super().rank(past, candidates) + past.lengths.amax() * 0.1


class ComparesCandidates(Tiny):
    def rank(self, past: Past, candidates: Candidates, last_hidden_state: Tensor | None = None) -> Tensor:
        logits = super().rank(past, candidates)
        return logits - logits.mean(1, keepdim=True)


class CountsCandidates(Tiny):
    def rank(self, past: Past, candidates: Candidates, last_hidden_state: Tensor | None = None) -> Tensor:
        return super().rank(past, candidates) + float(candidates.item_vectors.shape[1] > 60)


class RanksAlike(Tiny):
    def rank(self, past: Past, candidates: Candidates, last_hidden_state: Tensor | None = None) -> Tensor:
        return torch.zeros_like(candidates.item_vectors[..., :1])


class RanksLoudly(Tiny):
    def rank(self, past: Past, candidates: Candidates, last_hidden_state: Tensor | None = None) -> Tensor:
        return 100.0 + 20.0 * super().rank(past, candidates)


class DropsAlways(Tiny):
    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        pairs, hidden = super().encode(events)
        return pairs, F.dropout(hidden, 0.5)


class DropsItems(Tiny):
    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        return F.normalize(F.dropout(self.items(rows), 0.3), dim=-1)


class CentresItems(Tiny):
    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        vectors = self.items(rows)
        return F.normalize(vectors - 0.5 * vectors.mean(0), dim=-1)


class RawItems(Tiny):
    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        return 3.0 * super().embed_items(rows, dense, categories)


class RawQueries(Tiny):
    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        return self.query(last_hidden_state)[:, None]  # type: ignore[no-any-return]


class FlatQueries(Tiny):
    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        return super().retrieve(last_hidden_state, outcomes)[:, 0]


class QueriesOfTheBatch(Tiny):
    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        return super().retrieve(last_hidden_state - last_hidden_state.mean(0), outcomes)


class DoubleLogits(Tiny):
    def rank(self, past: Past, candidates: Candidates, last_hidden_state: Tensor | None = None) -> Tensor:
        return super().rank(past, candidates).double()


class NotANumber(Tiny):
    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        pairs, hidden = super().encode(events)
        return pairs, torch.where(torch.arange(8) == 3, float("nan"), hidden)


class ShortTable(Tiny):
    def where(self, start: Tensor, count: int) -> Tensor:
        return (start[:, None] + torch.arange(count)).clamp(max=99) * 18 // 17 + (count > 17)


class NoClamp(Tiny):
    def where(self, start: Tensor, count: int) -> Tensor:
        return start[:, None] + torch.arange(count)


class Raises(Tiny):
    def rank(self, past: Past, candidates: Candidates, last_hidden_state: Tensor | None = None) -> Tensor:
        raise RuntimeError("mat1 and mat2\n" + "shapes cannot be multiplied " * 1000)


class OnlyTheState(Tiny):
    def encode(self, events: Events) -> Any:
        return super().encode(events)[1]


TRAPS: dict[type[Tiny], str] = {
    NoOffset: r"extend: 1 cached and 9 new events are not what encode gives for 10: .* off by .* at past\.lengths",
    FromTheEnd: (
        "encode: keys and values of the first 1 of 10 events change when the later ones are known: .* off by "
        r"(.|\n)*positions counted from the end\), export with cache=\"none\""
    ),
    Bidirectional: r"encode: keys and values of the first 1 of 10(.|\n)* \(bidirectional attention",
    ReadsWidth: r"encode: a history of 3 events alone .* batch of \[10, 3, 1\]: hidden state off by 0\.07 .*; mask",
    ReadsPadding: "encode: a history of 10 events alone is not what it is with large numbers in its padding of 5 more",
    ReadsOtherRows: r"encode: a history of 10 events alone .* in a batch of .*layer .*depend on other rows",
    ExtendsWithoutMask: r"extend: in a batch, pasts of \[5, 1\] and new events of \[5, 2\].*mask cached slots by past",
    ForgetsThePast: "extend: 1 cached and 9 new events are not .*new events see the cached ones",
    ReturnsAllSlots: r"extend: shape of key of layer 0 is \[2, 2, 10, 4\], as described it must be \[2, 2, 5, 4\]",
    RanksWithoutMask: r"rank: a history of 3 events alone is not what it is in a batch of \[10, 3, 1\].*mask slots",
    RanksByRow: "rank: a history of 3 events alone .* logits off by .*depend on other rows",
    ComparesCandidates: "rank: candidates among 1 are not what they are among 7: logits off by",
    CountsCandidates: "rank: candidates among 70 are not what they are among 7: logits off by 1 ",
    RanksAlike: r"rank cannot order candidates: action 'click' gives every candidate the same logit \(0\).*ranker=None",
    RanksLoudly: "rank cannot order candidates: action 'click' has logits of .*: beyond 36 a probability is 1; scale",
    DropsAlways: "encode returns other values on the second call: hidden state off by .*draw no random numbers",
    DropsItems: "embed_items returns other vectors on the second call: .*must not draw random numbers",
    CentresItems: "embed_items: a vector depends on the other items of the call: .*; embed each item for itself",
    RawItems: r'40 of 40 vectors of catalogue items are not of unit length, one has 3; .*similarity="dot"',
    RawQueries: r'retrieve: queries have lengths from .* to .*; normalise them, .*similarity="dot"',
    FlatQueries: r"retrieve: shape of queries is \[3, 8\], as described it must be \[3, 1, 8\]",
    QueriesOfTheBatch: "retrieve: a row depends on the other rows: queries off by",
    DoubleLogits: "rank: type of logits is torch.float64; return float32",
    NotANumber: "encode: 3 of 24 numbers of hidden state are not finite",
    ShortTable: "encode at max_history=20: encode raised IndexError: index out of range in self; have positions",
    NoClamp: (
        "extend of 19 cached events by 1, beside a row of 1 cached and more new ones, at max_history=20: extend raised "
        "IndexError: index out of range in self; have positions for that many events, clamp those of padding, or lower"
    ),
    Raises: "rank raised RuntimeError: mat1 and mat2 shapes cannot be",
    OnlyTheState: r"encode returns something else than \(\[\(key, value\) per layer\], hidden state\)",
}


@pytest.mark.parametrize("module", TRAPS, ids=lambda module: module.__name__)
def test_a_fault_is_named(module: type[Tiny]) -> None:
    words = problems_of(tiny_source(module()))
    assert re.search(TRAPS[module], words)
    assert len(words) < 2_500


def test_all_faults_are_listed_at_once() -> None:
    class Everything(ReadsPadding, ComparesCandidates, QueriesOfTheBatch):
        pass

    words = problems_of(tiny_source(Everything()))
    for line in ("encode: a history of 10", "extend: 1 cached", "retrieve: a row depends", "rank: candidates among 1 "):
        assert f"\n  {line}" in words


# Descriptions that do not fit the module.


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"num_layers": 3}, "encode gives keys and values of 2 layers, the source says num_layers=3"),
        ({"head_dim": 8}, r"encode: shape of key of layer 0 is \[3, 2, 10, 4\], .* must be \[3, 2, 10, 8\]"),
        ({"num_kv_heads": 4}, r"encode: shape of key of layer 0 is \[3, 2, 10, 4\], .* must be \[3, 4, 10, 4\]"),
        ({"hidden_size": 99}, r"encode: shape of hidden state is \[3, 8\], .* must be \[3, 99\]"),
        ({"item_dim": 32}, r"embed_items: shape of item vectors is \[40, 8\], .* must be \[40, 32\]"),
        ({"kv_prefix_slots": 1}, r"encode: shape of key of layer 0 is \[3, 2, 10, 4\], .* must be \[3, 2, 11, 4\]"),
        ({"similarity": "dot", "item_bias": True}, "retrieve: the last number of a query is off 1 by "),
        ({"num_layers": 0}, r"model: num_layers=0 leaves nothing to cache; export with cache=\"none\""),
        ({"max_history": 21}, "encode at max_history=21: encode raised IndexError: .*lower max_history"),
    ],
    ids=str,
)
def test_a_spec_that_does_not_fit_is_refused(spec: dict[str, Any], words: str) -> None:
    assert re.search(words, problems_of(tiny_source(NoClamp() if "max_history" in spec else Tiny(), **spec)))


def test_queries_that_ignore_the_outcomes_are_refused() -> None:
    class Ignores(Tiny):
        def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
            return super().retrieve(last_hidden_state, None)

    assert "queries do not depend on the outcomes" in problems_of(tiny_source(Ignores(), outcome_conditioned=True))


def test_what_cannot_be_cached_is_exported_without_a_cache() -> None:
    for module in (FromTheEnd(), Bidirectional(), NoOffset()):
        check_contract(tiny_source(module, cache="none"))


def test_an_action_that_orders_nothing_is_a_warning_if_another_one_does(caplog: pytest.LogCaptureFixture) -> None:
    class OneBlind(Tiny):
        def rank(self, past: Past, candidates: Candidates, last_hidden_state: Tensor | None = None) -> Tensor:
            return super().rank(past, candidates) * torch.tensor([0.0, 1.0]) + 2.0

    with caplog.at_level(logging.WARNING):
        check_contract(tiny_source(OneBlind(actions=2), actions=("seen", "click")))
    assert "by every action: 'seen' gives every candidate the same logit (2)" in caplog.text


def test_logits_that_order_nothing_are_a_warning_where_retrieval_orders(caplog: pytest.LogCaptureFixture) -> None:
    order = OrderSpec(by="retrieval", retrieval_scale=1.0, reason="the ranker says nothing")
    with caplog.at_level(logging.WARNING):
        check_contract(replace(tiny_source(RanksAlike()), order=order))
    assert "'click' gives every candidate the same logit" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"surfaces": ()}, r'surfaces: \[\] must begin with "unknown"'),
        ({"surfaces": ("app",)}, r"surfaces: \['app'\] must begin with \"unknown\""),
        ({"actions": (), "positive_actions": ()}, "actions: there are none; name at least one"),
        ({"actions": ("a", "a"), "positive_actions": ("a",)}, r"actions: \['a', 'a'\] are not distinct"),
        ({"positive_actions": ("buy",)}, r"positive_actions: \['buy'\] are not among the actions \['click'\]"),
        (
            {"item_dense": np.zeros((ITEMS, 3), np.float32)},
            r"item_dense is .* \[40, 3\], dense = \{\} needs .*\[40, 0\]",
        ),
        ({"item_dense": np.zeros((ITEMS, 0))}, r"item_dense is float64 \[40, 0\], .* needs float32 \[40, 0\]"),
        ({"categories": {"genre": ("a",)}}, r"item_categories is .*, categories = \['genre'\] needs int64 \[40, 1\]"),
        (
            {"categories": {"genre": ("a",)}, "item_categories": np.full((ITEMS, 1), 2)},
            "item_categories holds a code that stands for no word",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_catalogue_that_does_not_fit_is_refused(wrong: dict[str, Any], words: str) -> None:
    assert re.search(words, problems_of(replace(tiny_source(), **wrong)))


@pytest.mark.parametrize(
    ("column", "change", "words"),
    [
        ("item_rows", lambda a: a + ITEMS, "item_rows has values from .*, must be from 0 to 39"),
        ("item_rows", lambda a: a.astype(np.int32), "item_rows is int32 .*, must be int64"),
        ("actions", lambda a: np.repeat(a, 2, 1), r"actions is uint8 \[.*, 2\], must be uint8 \[.*, 1\]"),
        ("actions", lambda a: a + 1, "actions has values from 1 to 2, must be from 0 to 1"),
        ("surfaces", lambda a: a + 2, "surfaces has values from 2 to 3, must be from 0 to 1"),
        ("timestamps_ms", lambda a: a * 1_000, "timestamps_ms has values from .*, must be from -1 to"),
        ("offsets", lambda a: a + 1, r"offsets are \[1, .*\]; 4 users need 5 int64 from 0 to"),
        ("offsets", lambda a: np.array([0, 0, *a[2:]]), "user 'random-0' has no events; leave such users out"),
        ("user_ids", lambda _: ["twin"] * 4, "user_ids are not distinct"),
        ("popularity", lambda _: np.ones((2, 3), np.float32), r"popularity is \[2, 3\], must be .* = \[2, 40\]"),
    ],
)
def test_histories_that_do_not_fit_are_refused_before_anything_is_done(
    column: str, change: Callable[[Any], Any], words: str, tmp_path: Path
) -> None:
    source, stages = tiny_source(), list[str]()
    histories = random_histories(source)
    histories = replace(histories, **{column: change(getattr(histories, column))})
    with pytest.raises(ExportError, match=f"histories do not fit: .*{words}"):
        export_bundle(source, tmp_path / "bundle", histories=histories, progress=stages.append)
    assert stages == []


def test_a_faulty_module_leaves_nothing(tmp_path: Path) -> None:
    stages = list[str]()
    with pytest.raises(ContractError, match="NoOffset cannot be exported"):
        export_bundle(tiny_source(NoOffset()), tmp_path / "bundle", progress=stages.append)
    assert (stages, list(tmp_path.iterdir())) == (["contract"], [])


def test_a_branch_on_a_value_is_refused_by_its_line(tmp_path: Path) -> None:
    class Branches(Tiny):
        def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
            if events.lengths.max() > 1_000:
                raise ValueError("too long")
            return super().encode(events)

    with pytest.raises(
        ExportError, match=r"^encoder: a Python branch on .*\(use torch.where\).*max\(\) > 1_000"
    ) as caught:
        export_bundle(tiny_source(Branches()), tmp_path / "bundle")
    assert len(str(caught.value)) < 700


def test_a_table_that_is_clamped_before_the_longest_history_is_refused() -> None:
    words = problems_of(tiny_source(max_history=30))  # of a module that was trained with 20 positions
    assert "encode: only the first 20 positions differ, while max_history=30; export with max_history=20" in words


def test_a_model_without_positions_passes() -> None:
    module = Tiny()
    module.positions.weight.data[1:] = module.positions.weight.data[1]  # only the first event differs
    check_contract(tiny_source(module))


def test_a_module_for_very_short_histories_is_told_to_clamp(tmp_path: Path) -> None:
    class Short(Tiny):
        def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
            self.positions(torch.arange(events.surfaces.shape[1]))
            return super().encode(events)

    module = Short(msgspec.structs.replace(SPEC, max_history=4))
    with pytest.raises(ExportError, match=r"extend: the module fails on the sizes .*max_history=4 is less, clamp"):
        export_bundle(tiny_source(module, max_history=4), tmp_path / "bundle")


# Whatever the fault: it is refused, or it is too small to change an answer.


class Faulty(Tiny):
    """Breaks one rule by a strength: what it reads beside what it may read is added to what it returns."""

    def __init__(self, spec: ModelSpec, fault: str, strength: float) -> None:
        super().__init__(spec)
        self.by = {fault: strength}

    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        pairs, hidden = super().encode(events)
        width, real = events.surfaces.shape[1], torch.arange(events.surfaces.shape[1]) < events.lengths[:, None]
        every = (events.item_vectors * real[..., None]).sum(1)
        hidden = hidden + self.by.get("width", 0.0) * width + self.by.get("rows", 0.0) * hidden.mean(0)
        later = self.by.get("later", 0.0) * every.abs().mean(1)[:, None, None, None]
        return [(key + later, value) for key, value in pairs], hidden

    def extend(self, events: Events, past: Past) -> tuple[KeyValues, Tensor]:
        pairs, hidden = super().extend(events, past)
        return pairs, hidden + self.by.get("step", 0.0)

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        return super().retrieve(last_hidden_state, outcomes) * (1.0 + self.by.get("queries", 0.0))

    def rank(self, past: Past, candidates: Candidates, last_hidden_state: Tensor | None = None) -> Tensor:
        logits = super().rank(past, candidates, last_hidden_state)
        slots = past.key_values[0][0].shape[2] if past.key_values else 0
        others = self.by.get("candidates", 0.0) * (1.0 + logits.abs().sum(1, keepdim=True))
        return logits + others + self.by.get("slots", 0.0) * slots

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        return super().embed_items(rows, dense, categories) * (1.0 + self.by.get("items", 0.0))


@st.composite
def sources(draw: st.DrawFn, strengths: list[float], shapes: list[str]) -> ExportSource:
    heads, width = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    shape: dict[str, Any] = {
        **{"num_layers": draw(st.integers(1, 3)), "num_kv_heads": heads, "head_dim": width},
        **{"hidden_size": draw(st.integers(3, 9)), "item_dim": draw(st.integers(3, 9))},
        **{"max_history": draw(st.integers(12, 60)), "kv_prefix_slots": draw(st.integers(0, 2))},
    }
    shape |= SHAPES[draw(st.sampled_from(shapes))]
    faults = ["width", "rows", "later", "step", "queries", "candidates", "slots", "items"]
    module = Faulty(
        msgspec.structs.replace(SPEC, **shape), draw(st.sampled_from(faults)), draw(st.sampled_from(strengths))
    )
    return tiny_source(module, **shape)


def broken_rule(source: ExportSource) -> bool:
    """Whether the fault breaks a rule that the spec demands."""
    spec, (fault,) = source.model, source.module.by  # type: ignore[misc]
    if fault in ("queries", "items"):
        return spec.similarity == "cosine"
    if fault in ("later", "step"):
        return spec.cache == "prefix"
    if fault == "slots":
        return spec.ranker is not None and spec.num_layers > 0
    return fault != "candidates" or spec.ranker is not None


@given(source=sources([0.0, 1e-9], list(SHAPES)))
@settings(max_examples=15, deadline=None)
def test_without_a_fault_any_shape_passes(source: ExportSource) -> None:
    check_contract(source)


@given(source=sources([0.01, 1.0, -0.5], list(SHAPES)))
@settings(max_examples=40, deadline=None)
def test_a_fault_in_any_shape_is_refused(source: ExportSource) -> None:
    assume(broken_rule(source))
    problems_of(source)


@torch.inference_mode()
def own_scores(source: ExportSource, rows: list[int]) -> tuple[Tensor, Tensor | None]:
    """Of all items after a history, as the module itself computes them: similarity, and logit of the first action."""
    features = torch.from_numpy(source.item_dense), torch.from_numpy(source.item_categories)
    vectors, count = source.servable.embed_items(torch.arange(ITEMS), *features), len(rows)
    times = 1_000 * torch.arange(1, count + 1)[None]
    events = Events(
        item_vectors=vectors[rows][None],
        actions=torch.ones(1, count, 1),
        surfaces=torch.zeros(1, count, dtype=torch.int64),
        timestamps_ms=times,
        lengths=torch.tensor([count]),
    )
    key_values, hidden = source.servable.encode(events)
    query = source.servable.retrieve(hidden, torch.ones(1, 1) if source.model.outcome_conditioned else None)[0, 0]
    if source.model.ranker is None:
        return vectors @ query, None
    past = Past(key_values=key_values, lengths=events.lengths, timestamps_ms=times[:, -1])
    candidates = Candidates(item_vectors=vectors[None], surfaces=events.surfaces[:, 0], timestamps_ms=times[:, -1])
    return vectors @ query, source.logits(past, candidates, hidden)[0, :, 0]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@given(data=st.data())
@settings(max_examples=2, deadline=None, phases=[Phase.generate])  # an export takes too long to look for a simpler one
def test_what_is_not_refused_is_served_right(
    shape: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A module that passes is exported, verified on both devices of the CPU, and served as it scores."""
    strength, folder = data.draw(st.sampled_from([0.0, 1e-6, 1e-5, 1e-4])), tmp_path_factory.mktemp("any") / "bundle"
    source = data.draw(sources([strength], [shape]))
    try:
        check_contract(source)
    except ContractError:
        assert strength > 1e-6
        return
    export_bundle(source, folder)
    assert [verify_bundle(folder, device).ok for device in ("cpu", "openvino")] == [True, True]
    options, cached = RecommendOptions(exclude_seen=False), CacheOptions(budget_bytes=1 << 24, dtype="fp32")
    for recommender in (Recommender.load(folder), Recommender.load(folder, cache=cached)):
        for length in sorted({1, 2, 5, source.model.max_history - 1, source.model.max_history}):
            if length > source.model.max_history:
                continue
            rows = [row % 7 for row in range(1, length + 1)]
            history = [
                {"item": f"item-{row}", "actions": ["click"], "timestamp_ms": 1_000 * (i + 1)}
                for i, row in enumerate(rows)
            ]
            slate = recommender.recommend(history, k=ITEMS, options=options, user="u" if recommender.cache else None)
            assert slate.kv == ("extended" if recommender.cache and length > 1 else "miss")
            similarity, logits = own_scores(source, rows)
            order = [int(item.item.removeprefix("item-")) for item in slate.items]
            assert [item.retrieval_score for item in slate.items] == pytest.approx(similarity[order].tolist(), abs=1e-3)
            scores = similarity if logits is None else logits.sigmoid()
            assert [item.score for item in slate.items] == pytest.approx(scores[order].tolist(), abs=1e-3)
