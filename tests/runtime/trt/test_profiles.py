"""Profiles cover what was declared and what the runtime asks for, and say what they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unipinrec.errors import ConfigError
from unipinrec.runtime.bundle.manifest import GraphSpec, ModelSpec, TensorSpec
from unipinrec.runtime.graphs.backend import MAX_ROWS, MAX_SLOTS
from unipinrec.runtime.trt.profiles import (
    Bucket,
    covering,
    default_buckets,
    for_graph,
    gaps,
    parse_bucket,
    read_buckets,
)

PREFIX = 1
MODEL = ModelSpec(
    num_layers=4,
    num_kv_heads=8,
    head_dim=32,
    hidden_size=256,
    item_dim=64,
    max_history=992,
    kv_prefix_slots=PREFIX,
    outcome_conditioned=False,
)


def tensor(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


EXTEND = GraphSpec(
    file="extend.onnx",
    inputs=(
        tensor("item_vectors", "batch", "new", 64),
        tensor("past_key_values.0.key", "batch", 8, "past", 32),
        tensor("past_lengths", "batch"),
    ),
    outputs=(),
)
RANKER = GraphSpec(
    file="ranker.onnx",
    inputs=(
        tensor("past_key_values.0.key", "batch", 8, "past", 32),
        tensor("candidate_vectors", "batch", "candidates", 64),
    ),
    outputs=(),
)
RETRIEVAL = GraphSpec(file="retrieval.onnx", inputs=(tensor("last_hidden_state", "batch", 256),), outputs=())


def model(max_history: int) -> ModelSpec:
    return msgspec.structs.replace(MODEL, max_history=max_history)


def test_the_default_buckets_of_a_model() -> None:
    alone, few, many = default_buckets(MODEL)
    assert (alone.batch, few.batch, many.batch) == ((1, 1, 1), (1, 8, 8), (1, 16, 32))
    assert alone.history == few.history == alone.past == (1, 496, 992)
    assert many.history == many.past == (1, 113, 226)
    assert (alone.new, many.new) == ((1, 8, 992), (1, 8, 226))
    assert alone.candidates == many.candidates == (1, 200, 1024)
    assert [bucket.batch for bucket in default_buckets(model(64))] == [(1, 1, 1), (1, 16, 32)]
    assert default_buckets(model(1))[0].history == (1, 1, 1)


@given(st.integers(1, 3000), st.data())
def test_the_default_buckets_cover_every_group(max_history: int, data: Any) -> None:
    """Groups are bounded by `MAX_ROWS` and by `MAX_SLOTS` of the longest history, one request is not."""
    shape = model(max_history)
    past = data.draw(st.integers(1, max_history))
    rows = data.draw(st.integers(1, max(1, min(MAX_ROWS, MAX_SLOTS // (past + PREFIX)))))
    new, candidates = data.draw(st.integers(1, past)), data.draw(st.integers(1, 1024))
    buckets = default_buckets(shape)
    extend = {"item_vectors": (rows, new, 64), "past_key_values.0.key": (rows, 8, past + PREFIX, 32)}
    assert covering(for_graph(buckets, EXTEND, PREFIX), {**extend, "past_lengths": (rows,)}) is not None
    rank = {
        "past_key_values.0.key": (rows, 8, past + PREFIX, 32),
        "candidate_vectors": (rows, candidates, 64),
    }
    assert covering(for_graph(buckets, RANKER, PREFIX), rank) is not None


def test_a_graph_has_a_profile_per_bucket_with_a_past_in_slots() -> None:
    buckets = (parse_bucket("batch=2,new=1:2:3,past=4:5:6", MODEL), parse_bucket("batch=1:2:3", MODEL))
    assert for_graph(buckets[:1], EXTEND, 7) == (
        {
            "item_vectors": ((2, 1, 64), (2, 2, 64), (2, 3, 64)),
            "past_key_values.0.key": ((2, 8, 11, 32), (2, 8, 12, 32), (2, 8, 13, 32)),
            "past_lengths": ((2,), (2,), (2,)),
        },
    )
    assert len(for_graph(buckets, RETRIEVAL, 7)) == 2
    same = (parse_bucket("batch=2,new=1", MODEL), parse_bucket("batch=2,new=2", MODEL))
    assert len(for_graph(same, RETRIEVAL, 7)) == 1
    assert len(for_graph(same, EXTEND, 7)) == 2


def test_an_unknown_dimension_is_refused() -> None:
    graph = GraphSpec(file="x.onnx", inputs=(tensor("x", "s10"),), outputs=())
    with pytest.raises(ConfigError, match=r"input x has a dynamic dimension 's10', the known ones are batch, history"):
        for_graph(default_buckets(MODEL), graph, PREFIX)


def test_the_profile_with_the_nearest_usual_shapes_is_chosen() -> None:
    profiles = for_graph(default_buckets(MODEL), RETRIEVAL, PREFIX)
    chosen = [covering(profiles, {"last_hidden_state": (rows, 256)}) for rows in (1, 2, 8, 9, 32, 33)]
    assert chosen == [0, 1, 1, 2, 2, None]


@pytest.mark.parametrize(
    "shapes",
    [
        {"last_hidden_state": (1, 255)},
        {"last_hidden_state": (1, 256, 1)},
        {"last_hidden_state": (0, 256)},
        {"other": (1, 256)},
        {},
        {"last_hidden_state": (1, 256), "other": (1, 256)},
    ],
)
def test_other_shapes_and_names_are_covered_by_none(shapes: dict[str, tuple[int, ...]]) -> None:
    assert covering(for_graph(default_buckets(MODEL), RETRIEVAL, PREFIX), shapes) is None


def test_sizes_that_a_bucket_does_not_name_are_the_defaults() -> None:
    bucket = parse_bucket("candidates=1:500:2000,batch=4", MODEL)
    assert bucket.candidates == (1, 500, 2000)
    assert bucket.batch == (4, 4, 4)
    assert bucket.history == bucket.past == (1, 496, 992)
    assert parse_bucket("new=1:1:2", MODEL).batch == (1, 8, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch", r"'batch' is not NAME=SMALLEST:USUAL:LARGEST"),
        ("batch=1:2", r"'batch=1:2' is not NAME"),
        ("batch=1:2:x", r"'batch=1:2:x' is not NAME"),
        ("batch=-1", r"'batch=-1' is not NAME"),
        ("batch=1,batch=2", r"'batch=2' is not NAME.*each once"),
        ("slots=1", r"'slots=1' is not NAME.*batch, history, new, past, candidates"),
        ("batch=0:1:2", r"batch=0:1:2 is not SMALLEST:USUAL:LARGEST in ascending order, from 1 on"),
        ("batch=3:2:4", r"batch=3:2:4 is not"),
        ("batch=1:9:8", r"batch=1:9:8 is not"),
        ("history=1:1:993", r"history goes up to 993, histories of this model to 992"),
        ("past=1:1:993", r"past goes up to 993"),
        ("", r"'' is not NAME"),
    ],
)
def test_a_bucket_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_bucket(text, MODEL)


def test_buckets_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "buckets.json"
    path.write_text('[{"batch": [1, 1, 1]}, {"batch": [1, 4, 16], "history": [8, 64, 128]}]')
    first, second = read_buckets(path, MODEL)
    assert (first.batch, second.batch, second.history) == ((1, 1, 1), (1, 4, 16), (8, 64, 128))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "the list is empty"),
        ("{}", "Expected `array`"),
        ("[{", "buckets.json: Input data was truncated"),
        ('[{"batch": [1, 2]}]', "length 3"),
        ('[{"batch": [1, 2, 3]}, {"slots": [1, 2, 3]}]', "bucket 1: unknown slots; the names are batch, history"),
        ('[{"batch": [3, 2, 1]}]', "bucket 0: batch=3:2:1 is not"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "buckets.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_buckets(path, MODEL)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.json"):
        read_buckets(tmp_path / "absent.json", MODEL)


def test_what_the_runtime_may_ask_for_beyond_the_buckets_is_said() -> None:
    assert gaps(default_buckets(MODEL), MODEL) == []
    assert gaps(default_buckets(model(5)), model(5)) == []
    assert gaps((parse_bucket("batch=1,history=8:64:128", MODEL),), MODEL) == [
        "batch: 1 to 1 of 1 to 32",
        "history: 8 to 128 of 1 to 992",
    ]


def test_buckets_are_plain_values() -> None:
    bucket = default_buckets(MODEL)[0]
    assert msgspec.json.decode(msgspec.json.encode(bucket), type=Bucket) == bucket
