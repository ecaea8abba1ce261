from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from unipinrec.errors import DataError, RequestError
from unipinrec.runtime.bundle.catalogue import Catalogue, Eligible, as_known, mask_without, parse_ids
from unipinrec.runtime.bundle.metadata import ItemMetadata
from unipinrec.runtime.requests import Range

NONE = np.array([], np.int64)
CODES = np.array([[1, 0], [2, 1], [1, 2], [0, 1], [2, 2]], np.int32)


def catalogue(retired: tuple[int, ...] = (), codes: NDArray[np.int32] | None = CODES) -> Catalogue:
    return Catalogue(
        rows={"a": 0, "b": 1, "c": 2, "d": 3, "e": 4},
        num_rows=5,
        retired=np.array(retired, np.int64),
        words={"kind": ("red", "blue"), "size": ("s", "m")},
        codes=codes,
    )


def rows(mask: NDArray[np.bool_] | None) -> list[int]:
    assert mask is not None
    return np.flatnonzero(mask).tolist()


def test_nothing_is_masked_without_filters_and_retired_items() -> None:
    assert catalogue().allowed(None, None) is None
    assert catalogue().allowed(None, {}) is None
    assert catalogue().live is None
    assert catalogue().num_live == 5


def test_an_allow_list_ignores_ids_that_there_are_not() -> None:
    assert rows(catalogue().allowed(("e", "gone", "b", "e"), None)) == [1, 4]
    assert rows(catalogue().allowed((), None)) == []
    assert catalogue().known_rows(("e", "gone", "b")).tolist() == [4, 1]
    assert catalogue().known_rows(()).tolist() == []


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        ({"kind": ("red",)}, [0, 2]),
        ({"kind": ("blue", "red")}, [0, 1, 2, 4]),
        ({"kind": ("blue", "red"), "size": ("m",)}, [2, 4]),
        ({"kind": ("red",), "size": ("s",)}, []),
        ({"kind": ()}, []),
    ],
)
def test_an_item_has_a_word_of_every_feature(categories: dict[str, tuple[str, ...]], expected: list[int]) -> None:
    assert rows(catalogue().allowed(None, categories)) == expected


def test_filters_are_combined() -> None:
    assert rows(catalogue().allowed(("a", "b", "c"), {"size": ("s", "m")})) == [1, 2]


def test_retired_items_are_never_allowed() -> None:
    some = catalogue(retired=(1, 2))
    assert some.num_live == 3
    assert rows(some.live) == rows(some.allowed(None, None)) == [0, 3, 4]
    assert rows(some.allowed(("b", "e"), None)) == [4]
    assert rows(some.allowed(None, {"kind": ("blue",)})) == [4]
    assert rows(some.live) == [0, 3, 4]


def test_eligible_items_are_counted() -> None:
    some = catalogue(retired=(1,))
    assert Eligible().count(5) == 5
    assert Eligible(excluded=np.array([0, 4])).count(5) == 3
    assert Eligible(allowed=some.live, excluded=np.array([0, 1])).count(5) == 3
    assert Eligible(allowed=some.allowed(("a", "c"), None), excluded=np.array([0, 4])).count(5) == 1


@pytest.mark.parametrize(
    ("categories", "match"),
    [
        ({"colour": ("red",)}, "categories: unknown feature 'colour'; this bundle has the features kind, size"),
        ({"kind": ("red", "green")}, "categories: kind has no word 'green'; it has \\['red', 'blue'\\]"),
    ],
)
def test_what_is_unknown_is_named(categories: dict[str, tuple[str, ...]], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        catalogue().allowed(None, categories)


def test_many_words_are_not_all_listed() -> None:
    many = Catalogue(rows={}, num_rows=0, retired=NONE, words={"kind": [f"w{i}" for i in range(30)]}, codes=None)
    with pytest.raises(RequestError, match=r"kind has no word 'x'; it has \['w0', .*, 'w19'\] and 10 more$"):
        many.allowed(None, {"kind": ("x",)})


def test_a_bundle_without_codes_says_so() -> None:
    with pytest.raises(RequestError, match=r"does not store the words of its items.*export it again"):
        catalogue(codes=None).allowed(None, {"kind": ("red",)})
    none = Catalogue(rows={"a": 0}, num_rows=1, retired=NONE, words={}, codes=None)
    with pytest.raises(RequestError, match="unknown feature 'kind'; this bundle has the features none"):
        none.allowed(None, {"kind": ("red",)})


def test_a_mask_of_all_but_some() -> None:
    assert mask_without(3, np.array([1])).tolist() == [True, False, True]


def test_ids_are_read_by_line() -> None:
    content = "\ufeffa\r\n\n  b c \n \nä\u2028ö".encode()
    expected = {"ids.txt line 1": "a", "ids.txt line 3": "  b c ", "ids.txt line 5": "ä\u2028ö"}
    assert parse_ids(content, "ids.txt") == expected
    with pytest.raises(DataError, match=r"ids\.txt: .*codec can't decode.*one item id per line, in UTF-8"):
        parse_ids(b"\xff", "ids.txt")


def test_spaces_around_an_id_count_where_it_is_known_with_them() -> None:
    known = {"sku 12 ", "sku 13"}
    assert [as_known(listed, known) for listed in ("sku 12 ", "sku 12", " sku 13 ", "x")] == [
        "sku 12 ",
        "sku 12",
        "sku 13",
        "x",
    ]


def priced(numbers: list[float | None]) -> Catalogue:
    """Items with a number `price` and a text `brand`; the first is retired."""
    count = len(numbers)
    return Catalogue(
        rows={str(row): row for row in range(count)},
        num_rows=count,
        retired=np.array([0], np.int64),
        words={"kind": ("red", "blue")},
        codes=(np.arange(count, dtype=np.int32) % 3)[:, None],
        metadata=ItemMetadata.of({"price": [*numbers], "brand": ["x"] * count}, count),
    )


@given(
    st.lists(st.one_of(st.none(), st.floats(-10, 10)), min_size=2, max_size=12).filter(any),
    st.one_of(st.none(), st.floats(-10, 10)),
    st.one_of(st.none(), st.floats(-10, 10)),
    st.booleans(),
)
def test_a_range_is_the_mask_of_its_numbers(
    numbers: list[float | None], low: float | None, high: float | None, words: bool
) -> None:
    assume(low is None or high is None or low <= high)
    catalogue = priced(numbers)
    categories = {"kind": ["red"]} if words else None
    mask = catalogue.allowed(None, categories, {"price": Range(min=low, max=high)})
    expected = [
        row
        for row, number in enumerate(numbers)
        if row != 0  # retired
        and number is not None
        and (low is None or number >= low)
        and (high is None or number <= high)
        and (not words or row % 3 == 1)
    ]
    assert rows(mask) == expected


@pytest.mark.parametrize(
    ("ranges", "match"),
    [
        ({"cost": {"min": 1}}, "ranges: 'cost' is unknown; this bundle has the numbers price"),
        ({"brand": {"min": 1}}, "ranges: 'brand' is text; this bundle has the numbers price"),
        ({"price": {"min": 2, "max": 1}}, r"ranges: price: min=2.0 must be at most max=1.0, and neither is NaN"),
        ({"price": {"min": math.nan}}, "ranges: price: min=nan must be at most max=inf, and neither is NaN"),
        ({"price": {"least": 1}}, r"ranges: price: Object contains unknown field `least`; send .*, or one of them"),
        ({"price": 5}, r"ranges: price: Expected `object`, got `int`; send \{"),
    ],
)
def test_a_range_that_fits_no_column_is_refused(ranges: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        priced([1.0, 2.0]).allowed(None, None, ranges)


def test_a_bundle_without_metadata_has_no_ranges() -> None:
    with pytest.raises(RequestError, match="ranges: 'price' is unknown; this bundle has the numbers none"):
        catalogue().allowed(None, None, {"price": Range(min=1)})
