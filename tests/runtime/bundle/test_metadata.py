"""Metadata of items: checked when it is stored, grown with new items, and never a reason that an old bundle fails."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from unipinrec.errors import BundleError, DataError
from unipinrec.models.data import schema
from unipinrec.runtime import Bundle
from unipinrec.runtime.bundle.derived import seal_derived
from unipinrec.runtime.bundle.metadata import LONGEST_TEXT, MOST_COLUMNS, ItemMetadata, extended
from unipinrec.runtime.tools.item_input import NewItem
from unipinrec.runtime.tools.update_bundle import update_bundle


def test_a_column_is_numbers_or_text() -> None:
    stored = ItemMetadata.of({"price": [1, None, math.nan, 2.5], "brand": ["a", None, "", "b"], "none": [None] * 4}, 4)
    assert [stored.row(row) for row in range(4)] == [
        {"price": 1.0, "brand": "a", "none": None},
        {"price": None, "brand": None, "none": None},
        {"price": None, "brand": "", "none": None},
        {"price": 2.5, "brand": "b", "none": None},
    ]
    assert list(stored.numbers) == ["price"]


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"x": [1.0]}, "metadata: 'x' has 1 values for 2 items; give one for each"),
        ({"x": [1.0, "a"]}, r"metadata: 'x' holds \[.*\]; a column is all numbers or all text"),
        ({"x": [True, False]}, r"metadata: 'x' holds \[True\]; a column is all numbers or all text"),
        ({"x": [1.0, math.inf]}, "metadata: 'x' holds a number that is not finite; leave out what is unknown"),
        ({"x": [None, "y" * 4_097]}, r"a text of 4,097 characters; store at most 4,096"),
        ({f"c{i}": [None, None] for i in range(65)}, "metadata has 65 columns; keep at most 64"),
    ],
)
def test_what_no_bundle_stores_is_refused(columns: dict[str, list[Any]], match: str) -> None:
    with pytest.raises(DataError, match=match):
        ItemMetadata.of(columns, 2)


def test_prepared_data_has_the_same_limits() -> None:
    assert (schema.MOST_METADATA, schema.LONGEST_METADATA) == (MOST_COLUMNS, LONGEST_TEXT)


def test_added_items_have_their_values_or_none() -> None:
    stored = ItemMetadata.of({"price": [1.0], "brand": ["a"]}, 1)
    grown = extended(stored, {"line 1": {"price": 2.0}, "line 2": {"brand": "b"}}, 1)
    assert grown is not None
    assert grown.columns == {"price": [1.0, 2.0, None], "brand": ["a", None, "b"]}
    assert extended(None, {"line 1": {}}, 1) is None


@pytest.mark.parametrize(
    ("stored", "values", "match"),
    [
        ({"price": [1.0]}, {"cost": 1.0}, r"line 1: unknown metadata 'cost'; the columns of this bundle: \['price'\]"),
        (None, {"cost": 1.0}, r"line 1: unknown metadata 'cost'; the columns of this bundle: \[\]"),
        ({"price": [1.0]}, {"price": "1"}, r"line 1: metadata price=\['1'\] does not fit a column of numbers"),
        ({"brand": ["a"]}, {"brand": 1.0}, r"line 1: metadata brand=\[1.0\] does not fit a column of text"),
    ],
)
def test_values_of_added_items_must_fit(
    stored: dict[str, list[Any]] | None, values: dict[str, Any], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        extended(ItemMetadata.of(stored, 1) if stored else None, {"line 1": values}, 1)


def test_a_bundle_without_metadata_has_none(stored: Bundle) -> None:
    assert stored.catalogue.metadata is None
    assert stored.catalogue.metadata_of(3) is None


def test_an_updated_bundle_keeps_metadata(shop: Path, tmp_path: Path) -> None:
    item = NewItem(item="new", dense={"size": (0.5,)}, metadata={"price": 7.5, "url": "https://shop.example/new"})
    update_bundle(shop, tmp_path / "next", add={"line 1": item}, retire={})
    opened = Bundle.open(tmp_path / "next")
    assert opened.catalogue.metadata_of(24) == {"price": 7.5, "url": "https://shop.example/new", "image": None}
    assert opened.catalogue.metadata_of(2) == {"price": 2.0, "url": "https://shop.example/2", "image": None}
    assert opened.manifest.format_version == 1  # readers of that version ignore the file
    odd = NewItem(item="x", dense={"size": (0.5,)}, metadata={"cost": 1.0})
    with pytest.raises(DataError, match="line 1: unknown metadata 'cost'"):
        update_bundle(shop, tmp_path / "no", add={"line 1": odd}, retire={})


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"price": [1]}', "'price' has 1 values for 24 items"),
        ("[]", "Expected `object`"),
        ('{"price": [true]}', r"Expected `float \| str \| null`|Expected `str \| float \| null`"),
    ],
)
def test_a_wrong_file_is_refused(stored: Bundle, tmp_path: Path, content: str, match: str) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "item_metadata.json").write_text(content)
    seal_derived(folder, stored)
    with pytest.raises(BundleError, match=match):
        Bundle.open(folder)
