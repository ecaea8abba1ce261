from __future__ import annotations

from typing import Any

import msgspec
import pytest

from unipinrec.errors import BundleError, DataError
from unipinrec.runtime.bundle.manifest import GraphSpec, Manifest
from unipinrec.runtime.tools.item_input import ItemRows, NewItem, check_items, parse_items

EMBEDDER = {"item_embedder": GraphSpec(file="item_embedder.onnx", inputs=(), outputs=())}


@pytest.fixture
def declared(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(
        manifest,
        dense={"size": 1, "look": 2},
        categories={"kind": ("red", "blue"), "brand": ("x",)},
        graphs=EMBEDDER,
    )


def item(name: str | int = "n", **fields: Any) -> dict[str, Any]:
    return {"item": name, "dense": {"look": [1, 2.5], "size": [0.5]}, "categories": {"kind": "blue"}, **fields}


def check(manifest: Manifest, *items: dict[str, Any], taken: tuple[str, ...] = ("a", "b")) -> ItemRows:
    return check_items(parse_items(msgspec.json.encode(items), "items.json"), manifest, taken)


def test_a_list_and_lines_are_read_alike() -> None:
    expected = NewItem(item=7, title="Seven", dense={"size": (0.5,)}, categories={"kind": "red"})
    text = b'{"item": 7, "title": "Seven", "dense": {"size": [0.5]}, "categories": {"kind": "red"}}'
    assert parse_items(b" [" + text + b"]\n", "f") == {"f[0]": expected}
    assert parse_items(text + b"\r\n\n" + text, "f") == {"f line 1": expected, "f line 3": expected}
    assert parse_items(b"", "f") == parse_items(b"[]", "f") == {}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[{", r"^items: .*truncated.*; an item is \{"),
        (b'{"item": "a"}\n{"item": ', r"^items line 2: .*truncated"),
        (b'[{"item": "a"}, {"item": "b", "colour": 1}]', r"^items\[1\]: Object contains unknown field `colour`"),
        (b'{"item": null}', r"^items line 1: Expected `int \| str`, got `null`"),
        (b'{"title": "x"}', r"^items line 1: Object missing required field `item`"),
        (b'{"item": "a", "dense": {"size": 1}}', r"^items line 1: Expected `array`, got `int` - at `\$\.dense"),
        (b'{"item": "a", "dense": {"size": [NaN]}}', r"^items line 1: JSON is malformed"),
        (b'{"item": "a", "categories": {"kind": 1}}', r"^items line 1: Expected `str`, got `int`"),
    ],
)
def test_what_is_no_item_is_named_by_place(content: bytes, match: str) -> None:
    with pytest.raises(DataError, match=match):
        parse_items(content, "items")


def test_items_become_rows(declared: Manifest) -> None:
    rows = check(declared, item("n"), item(7, title="Seven", categories={"brand": "x", "kind": "red"}))
    assert rows.ids == ("n", "7")
    assert rows.titles == ("kind blue", "Seven")
    assert rows.dense.tolist() == [[0.5, 1, 2.5]] * 2
    assert rows.codes.tolist() == [[2, 0], [1, 1]]
    assert rows.unknown_words == {}


def test_an_unknown_word_counts_as_unknown(declared: Manifest) -> None:
    rows = check(
        declared, *(item(i, categories={"kind": word, "brand": "x"}) for i, word in enumerate(("red", "green", "Red")))
    )
    assert rows.codes.tolist() == [[1, 1], [0, 1], [0, 1]]
    assert rows.unknown_words == {"kind": 2}
    assert check(declared, item(categories={})).titles == (None,)


@pytest.mark.parametrize(
    ("items", "match"),
    [
        ([item(), item()], r"items\.json\[1\]: item 'n' occurs twice, first at items\.json\[0\]; give each item once"),
        ([item("")], r"items\.json\[0\]: item '': an id is not empty and has no line break"),
        ([item("a\nb")], r"items\.json\[0\]: item 'a\\nb': an id is not empty and has no line break"),
        ([item("7"), item(7)], r"items\.json\[1\]: item '7' occurs twice"),
        ([item("b")], r"\[0\]: item 'b' is already in the catalogue; retire it at the same time to replace it"),
        ([item(dense={"size": [1]})], r"\[0\]: dense feature 'look' is missing; the model needs 2"),
        (
            [item(dense={"size": [1, 2], "look": [1, 2]})],
            r"\[0\]: dense feature 'size' has 2 values; the model needs 1",
        ),
        ([item(dense={"age": [1]})], r"\[0\]: unknown dense feature 'age'; the model's dense features: size, look"),
        ([item(dense={"size": [1e39], "look": [1, 2]})], r"\[0\]: a dense value of .*1e\+39.* is not a finite 32-bit"),
        ([item(categories={"tag": "x"})], r"unknown categorical feature 'tag'; .* categorical features: kind, brand"),
    ],
)
def test_an_item_that_cannot_be_taken_is_named(declared: Manifest, items: list[dict[str, Any]], match: str) -> None:
    with pytest.raises(DataError, match=match):
        check(declared, *items)


def test_infinite_values_are_refused(declared: Manifest) -> None:
    given = {"here": NewItem(item="n", dense={"size": (float("nan"),), "look": (1.0, 2.0)})}
    with pytest.raises(DataError, match=r"^here: a dense value of \[\(nan,\), \(1\.0, 2\.0\)\] is not a finite"):
        check_items(given, declared, ())


def test_a_model_without_features_has_no_vectors_for_new_items(manifest: Manifest) -> None:
    with pytest.raises(BundleError, match=r"this model knows items by their id alone.*export again"):
        check(manifest, {"item": "n"})
    assert check(manifest).ids == ()
