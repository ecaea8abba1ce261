"""`ExportSource.simple` infers what a module shows by itself, and says in words what it cannot use."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipinrec.errors import ExportError
from unipinrec.export.bundle_writer import export_bundle
from unipinrec.export.protocol import Candidates, Events, ExportSource, KeyValues, Past
from unipinrec.runtime import Bundle, Recommender
from unipinrec.runtime.bundle.manifest import ModelSpec

ITEMS, LAYERS, HEADS, HEAD_DIM, DIM, HIDDEN = 30, 3, 2, 4, 5, 8
ACTIONS = ("click", "save")


class Encoder(nn.Module):
    """Three layers of two heads over events, behind a slot of the model's own; no two sizes are equal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.items = nn.Embedding(ITEMS, DIM)
        self.sink = nn.Parameter(torch.randn(LAYERS, 2, HEADS, 1, HEAD_DIM))
        self.kv = nn.ModuleList(nn.Linear(DIM + len(ACTIONS), 2 * HIDDEN) for _ in range(LAYERS))
        self.query = nn.ModuleList(nn.Linear(DIM, HIDDEN) for _ in range(LAYERS))
        self.head, self.search = nn.Linear(HIDDEN, len(ACTIONS)), nn.Linear(HIDDEN, DIM)

    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        sinks = [pair.expand(events.lengths.shape[0], -1, -1, -1, -1).unbind(1) for pair in self.sink]
        pairs = _joined(sinks, self._new(events))
        return pairs, self._last(events, pairs, _first(pairs, events.lengths + 1))

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        return F.normalize(self.search(last_hidden_state), dim=-1)[:, None]

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        return F.normalize(self.items(rows), dim=-1)

    def _new(self, events: Events) -> KeyValues:
        inputs = torch.cat([events.item_vectors, events.actions], -1)
        pairs = [_heads(layer(inputs)).chunk(2, -1) for layer in self.kv]
        return [(key, value) for key, value in pairs]

    def _last(self, events: Events, pairs: KeyValues, seen: Tensor) -> Tensor:
        last = events.item_vectors.gather(1, (events.lengths - 1)[:, None, None].expand(-1, 1, DIM))
        return self._read(last, pairs, seen)[:, 0]

    def _read(self, items: Tensor, pairs: KeyValues, seen: Tensor) -> Tensor:
        read = [
            F.scaled_dot_product_attention(
                _heads(query(items)), *pair, attn_mask=seen[:, None, None].expand(-1, 1, items.shape[1], -1)
            )
            for query, pair in zip(self.query, pairs, strict=True)
        ]
        return torch.stack(read).sum(0).transpose(1, 2).flatten(2)


class Own(Encoder):
    def extend(self, events: Events, past: Past) -> tuple[KeyValues, Tensor]:
        new = self._new(events)
        seen = torch.cat([_first(past.key_values, past.lengths + 1), _first(new, events.lengths)], 1)
        return new, self._last(events, _joined(past.key_values, new), seen)

    def rank(self, past: Past, candidates: Candidates) -> Tensor:
        seen = _first(past.key_values, past.lengths + 1)
        return self.head(self._read(candidates.item_vectors, past.key_values, seen))  # type: ignore[no-any-return]


class WithoutExtend(Encoder):
    rank = Own.rank


def _heads(values: Tensor) -> Tensor:
    return values.reshape(*values.shape[:2], HEADS, -1).transpose(1, 2)


def _joined(before: Any, after: KeyValues) -> KeyValues:
    return [(torch.cat([a, c], 2), torch.cat([b, d], 2)) for (a, b), (c, d) in zip(before, after, strict=True)]


def _first(pairs: KeyValues, slots: Tensor) -> Tensor:
    seen: Tensor = torch.arange(pairs[0][0].shape[2]) < slots[:, None]
    return seen


SPEC = ModelSpec(
    num_layers=LAYERS,
    num_kv_heads=HEADS,
    head_dim=HEAD_DIM,
    hidden_size=HIDDEN,
    item_dim=DIM,
    max_history=20,
    kv_prefix_slots=1,
    outcome_conditioned=False,
)


def simple(module: Any, ids: Any = range(100, 100 + ITEMS), history: Any = 20, **options: Any) -> ExportSource:
    return ExportSource.simple(module, ids, history, ACTIONS, **options)


def changed(**methods: Callable[..., Any]) -> nn.Module:
    """The model with other methods; each gets the model, and then its arguments."""
    module = Own()
    for name, method in methods.items():
        setattr(module, name, partial(method, module))
    return module


def probabilities(module: Own, vectors: Tensor, rows: list[int], actions: Tensor) -> Tensor:
    """Of all items and actions after a history, as the module itself computes them."""
    count = torch.tensor([len(rows)])
    times = torch.full((1, len(rows)), -1)
    events = Events(
        item_vectors=vectors[None, rows],
        actions=actions[None],
        surfaces=torch.zeros_like(times),
        timestamps_ms=times,
        lengths=count,
    )
    past = Past(key_values=module.encode(events)[0], lengths=count, timestamps_ms=times[:, -1])
    every = Candidates(item_vectors=vectors[None], surfaces=torch.zeros_like(count), timestamps_ms=count)
    return torch.sigmoid(module.rank(past, every))[0]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simple") / "bundle"
    export_bundle(simple(Own()), folder)
    return folder


def test_the_inferred_source_is_what_one_would_write_by_hand() -> None:
    module = Own()
    source = ExportSource.simple(module, range(100, 130), 20, ACTIONS)
    assert not module.training
    by_hand = ExportSource(
        module=module,
        model=SPEC,
        actions=ACTIONS,
        positive_actions=ACTIONS,
        surfaces=("unknown",),
        dense={},
        categories={},
        item_ids=[str(i) for i in range(100, 130)],
        titles=[None] * ITEMS,
        item_dense=np.zeros((ITEMS, 0), np.float32),
        item_categories=np.zeros((ITEMS, 0), np.int64),
        config={"architecture": "Own"},
    )
    for name, value in vars(by_hand).items():
        np.testing.assert_equal(getattr(source, name), value, err_msg=name)
    assert (source.item_dense.dtype.name, source.item_categories.dtype.name) == ("float32", "int64")


def test_the_bundle_answers_with_the_probabilities_of_the_module(bundle: Path) -> None:
    module = Own().eval()
    with torch.inference_mode():
        vectors = F.normalize(module.items.weight, dim=1)
        expected = probabilities(module, vectors, [4, 9, 2], torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
    did = [("104", ["click"]), ("109", ["save"]), ("102", ["click", "save"])]
    with Recommender.load(bundle, "cpu") as recommender:
        slate = recommender.recommend([{"item": item, "actions": actions} for item, actions in did], k=27)
    assert len({item.item for item in slate.items} - {item for item, _ in did}) == 27
    for item in slate.items:
        served = [item.actions[name] for name in ACTIONS]
        np.testing.assert_allclose(served, expected[int(item.item) - 100], atol=1e-5)


def test_options_go_into_the_source() -> None:
    features: dict[str, Any] = {
        "dense": {"price": 1, "shape": 2},
        "categories": {"kind": ["book", "film"]},
        "item_dense": np.ones((ITEMS, 3)),
        "item_categories": np.ones((ITEMS, 1), np.int32),
    }
    source = simple(
        Own(), positive_actions="save", surfaces=["unknown", "home"], titles=map(str, range(ITEMS)), **features
    )
    assert (source.positive_actions, source.surfaces, source.titles[3]) == (("save",), ("unknown", "home"), "3")
    assert source.categories == {"kind": ("book", "film")}
    assert (source.item_dense.dtype.name, source.item_categories.dtype.name) == ("float32", "int64")
    assert source.has_content
    with pytest.raises(TypeError, match="unexpected keyword argument 'cahce'"):
        simple(Own(), cahce="none")


@pytest.mark.parametrize("ids", [np.arange(ITEMS), [np.int32(i) for i in range(ITEMS)], map(str, range(ITEMS))])
def test_ids_may_be_integers(ids: Any) -> None:
    assert simple(Own(), ids).item_ids == [str(i) for i in range(ITEMS)]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([True], "item_ids: row 0 is [True], a bool; pass text or integers"),
        (["a", np.True_], "item_ids: row 1 is [np.True_], a bool"),
        (["a", None], "item_ids: row 1 is [None], a NoneType"),
        ([1.0], "item_ids: row 0 is [1.0], a float"),
        (np.ones(3), "item_ids: row 0 is [np.float64(1.0)], a float64"),
        ([1, "1", 2, "2", 2], "item_ids must be distinct as text; ['1', '2'] occur more than once"),
        ("abc", "item_ids is ['abc']; pass one id per item"),
        (500, "item_ids is [500]; pass one id per item"),
        ([], "item_ids is empty"),
    ],
)
def test_other_ids_are_refused(ids: Any, words: str) -> None:
    with pytest.raises(ExportError, match=re.escape(words)):
        simple(Own(), ids)


def test_numbers_of_numpy_in_the_config_become_numbers_of_python() -> None:
    config = {"dropout": np.float32(0.5), "sizes": [np.int64(3)], "on": np.True_}
    source = simple(Own(), history=np.int64(20), config=config, metrics={"auc": np.float64(0.5)})
    assert type(source.metrics["auc"]) is float if source.metrics else False
    assert source.config == {"dropout": 0.5, "sizes": [3], "on": True}
    assert msgspec.json.encode(source.config) == b'{"dropout":0.5,"sizes":[3],"on":true}'
    assert (source.model.max_history, type(source.model.max_history)) == (20, int)
    with pytest.raises(
        ExportError, match=r"config holds \[torch.bfloat16\], a dtype; pass text, numbers, lists, dicts"
    ):
        simple(Own(), config={"dtype": torch.bfloat16})


def test_a_module_in_half_precision_is_cast_in_a_copy(caplog: pytest.LogCaptureFixture) -> None:
    module = Own().to(torch.bfloat16)
    source = simple(module)
    assert caplog.messages == ["Own has weights in ['torch.bfloat16']; a copy in float32 is exported"]
    assert source.model == SPEC
    assert {weight.dtype for weight in module.parameters()} == {torch.bfloat16}
    assert module.training
    for copied, weight in zip(source.module.parameters(), module.parameters(), strict=True):
        assert copied.dtype == torch.float32
        assert torch.equal(copied, weight.float())


def test_export_casts_a_module_in_half_precision_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Own().half()
    export_bundle(replace(simple(Own()), module=module), tmp_path / "bundle")
    assert "Own has weights in ['torch.float16']; a copy in float32 is exported" in caplog.messages
    assert module.items.weight.dtype == torch.float16
    expected = F.normalize(module.items.weight.detach().float(), dim=1)
    np.testing.assert_allclose(Bundle.open(tmp_path / "bundle").item_vectors, expected, atol=1e-6)


def test_a_module_in_half_precision_that_cannot_be_copied_is_refused() -> None:
    module = Own().half()
    module.cached = module.items.weight * 2
    with pytest.raises(
        ExportError, match=r"\['torch.float16'\] and cannot be copied .*RuntimeError: Only .*; pass module"
    ):
        simple(module)


def test_outcomes_are_needed_if_none_will_not_do() -> None:
    needing = changed(retrieve=lambda own, last, outcomes: Own.retrieve(own, last * outcomes.sum(), None))
    assert simple(needing).model.outcome_conditioned


def test_a_module_without_rank_or_extend(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    expected = msgspec.structs.replace(SPEC, cache="none", ranker=None)
    assert simple(Encoder(), cache="none").model == expected
    assert caplog.messages == [f"inferred: {expected}"]
    with pytest.raises(ExportError, match=r"WithoutExtend lacks \['extend'\]; .*; without extend, pass cache=\"none\""):
        simple(WithoutExtend())
    assert simple(WithoutExtend(), cache="none").model == msgspec.structs.replace(SPEC, cache="none")


def test_a_third_parameter_of_rank_is_the_last_hidden_state() -> None:
    def needing(own: Own, past: Past, candidates: Candidates, hidden: Tensor) -> Tensor:
        assert hidden.shape == (3, HIDDEN)
        return Own.rank(own, past, candidates)

    def named(own: Own, past: Past, candidates: Candidates, last_hidden_state: Tensor | None = None) -> Tensor:
        assert last_hidden_state is not None
        return needing(own, past, candidates, last_hidden_state)

    def scaled(own: Own, past: Past, candidates: Candidates, scale: float = 2.0) -> Tensor:
        return scale * Own.rank(own, past, candidates)

    inputs = [simple(changed(rank=rank)).model.ranker for rank in (needing, named, scaled)]
    assert inputs == ["past+last_hidden_state", "past+last_hidden_state", "past"]


def test_nothing_may_be_kept_of_a_history_without_a_cache() -> None:
    nothing = changed(encode=lambda own, events: ((), Own.encode(own, events)[1]))
    nothing.rank = None  # type: ignore[assignment]
    expected = {
        "num_layers": 0,
        "num_kv_heads": 0,
        "head_dim": 0,
        "kv_prefix_slots": 0,
        "ranker": None,
        "cache": "none",
    }
    assert simple(nothing, cache="none").model == msgspec.structs.replace(SPEC, **expected)
    with pytest.raises(
        ExportError, match='returned no keys and values, so there is nothing to cache; pass cache="none"'
    ):
        simple(nothing)


def test_vectors_of_other_lengths_are_compared_by_their_inner_product(caplog: pytest.LogCaptureFixture) -> None:
    raw = changed(embed_items=lambda own, rows, *features: own.items(rows))
    assert simple(raw).model == msgspec.structs.replace(SPEC, similarity="dot")
    assert caplog.messages == [
        'similarity="dot" is inferred: of unit length are not 30 of 30 item vectors and 0 of 3 queries; pass '
        "similarity to choose, and item_bias=True if the last number of an item vector is a bias"
    ]
    caplog.clear()
    assert simple(raw, similarity="cosine").model.similarity == "cosine"  # and export refuses it
    assert simple(raw, item_bias=True).model == msgspec.structs.replace(SPEC, similarity="dot", item_bias=True)
    assert caplog.messages == []
    long = changed(retrieve=lambda own, last, outcomes: own.search(last)[:, None])
    assert simple(long).model.similarity == "dot"
    with pytest.raises(ExportError, match='item_bias=True needs similarity="dot"'):
        simple(Own(), item_bias=True, similarity="cosine")


def ragged(own: Own, events: Events) -> Any:
    pairs, last = Own.encode(own, events)
    return [*pairs[1:], (pairs[0][0][:, :1], pairs[0][1])], last


def two_slots(own: Own, events: Events) -> Any:
    pairs, last = Own.encode(own, events)
    return [(key[:, :, -2:], value[:, :, -2:]) for key, value in pairs], last


def without_first_slots(own: Own, events: Events) -> Any:
    pairs, last = Own.encode(own, events)
    return [(key[:, :, 2:], value[:, :, 2:]) for key, value in pairs], last


def failing(own: Own, *arguments: object) -> Any:
    raise ValueError("x" * 9_000)


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({"embed_items": failing}, "Own.embed_items failed on a tiny batch: ValueError: xxx"),
        (
            {"encode": lambda own, events: own.nonsense},
            "Own.encode failed on a tiny batch: AttributeError: 'Own' object",
        ),
        ({"retrieve": failing}, "Own.retrieve failed on a tiny batch: ValueError: xxx"),
        ({"rank": lambda own, past: past}, "Own.rank failed on a tiny batch: TypeError: "),
        (
            {"embed_items": lambda own, rows, *features: own.items.weight[0]},
            "embed_items: returned torch.float32 [5], exp",
        ),
        ({"embed_items": lambda own, rows, *features: rows}, "expected torch.float32 [30, E]"),
        (
            {"embed_items": lambda own, rows, *features: own.items(rows) / 0},
            "embed_items: returned values that are not f",
        ),
        (
            {"encode": lambda own, events: Own.encode(own, events)[1]},
            "encode: returned a Tensor; return (key_values, las",
        ),
        (
            {"encode": lambda own, events: ([()], events.lengths)},
            "encode: returned a tuple; return (key_values, last_hid",
        ),
        (
            {"encode": lambda own, events: ((), None)},
            "encode: last_hidden_state: returned a NoneType, expected torch.flo",
        ),
        (
            {"encode": ragged},
            "encode: keys and values have the shapes [(1, 2, 4), (2, 2, 4)] per row; pad them to a singl",
        ),
        (
            {"encode": two_slots},
            "events, head_dim) are [(3, 2, 0, 4), (3, 2, 1, 4)] for one and two events; there must",
        ),
        ({"encode": without_first_slots}, "slots without the events, head_dim) are [(3, 2, -1, 4)] for one and two ev"),
        (
            {"retrieve": lambda own, last, outcomes: last},
            "retrieve: returned torch.float32 [3, 8], expected torch.float",
        ),
        (
            {"rank": lambda own, past, candidates: candidates.item_vectors},
            "rank: returned torch.float32 [3, 4, 5], expe",
        ),
    ],
)
def test_a_wrong_method_is_named(methods: dict[str, Any], words: str) -> None:
    with pytest.raises(ExportError) as raised:
        simple(changed(**methods))
    assert words in str(raised.value)
    assert len(str(raised.value)) <= 4_000


def test_the_place_of_an_error_is_in_the_users_code() -> None:
    wrong = changed(encode=lambda own, events: own.head(events.item_vectors))
    with pytest.raises(ExportError, match=r"RuntimeError: mat1 and mat2 .*\(\S+test_simple.py:\d+\)$"):
        simple(wrong)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"module": Own}, "module is a type; pass an instance of a torch module"),
        ({"module": nn.Linear(2, 2)}, "Linear lacks ['encode', 'extend', 'retrieve', 'embed_items']; see"),
        ({"history": 2.5}, "Expected `int`, got `float` - at `$.max_history`"),
        ({"history": True}, "Expected `int`, got `bool` - at `$.max_history`"),
        ({"history": 1}, "max_history=1 leaves no history"),
        ({"cache": "off"}, "Invalid enum value 'off' - at `$.cache`"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ExportError, match=re.escape(words)):
        simple(**{"module": Own(), **arguments})
