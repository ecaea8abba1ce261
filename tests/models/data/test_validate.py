"""Every reason to drop a row and every reason to refuse a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unipinrec.errors import DataError
from unipinrec.models.data.schema import Dataset, TimeSplit, read_dataset, write_dataset
from unipinrec.models.data.validate import (
    RawTables,
    SplitFractions,
    build_dataset,
    slates_from_events,
    split_by_time,
)

T = 1_600_000_000_000  # times below are milliseconds after this one
ITEMS = pl.DataFrame(
    {
        "item_id": ["a", "b", "c"],
        "title": ["A", None, "C"],
        "dense_size": [1.0, 2.0, 3.0],
        "category_kind": ["x", None, "y"],
    }
)


def events(*rows: tuple[Any, ...], order: list[int | None] | None = None) -> pl.DataFrame:
    """Rows of (user, item, surface, time after T, buy, view)."""
    columns = {
        "user_id": pl.String,
        "item_id": pl.String,
        "surface": pl.String,
        "timestamp_ms": pl.Int64,
        "action_buy": pl.Boolean,
        "action_view": pl.Boolean,
    }
    frame = pl.DataFrame(rows, schema=columns, orient="row").with_columns(pl.col("timestamp_ms") + T)
    return frame if order is None else frame.with_columns(order=pl.Series(order, dtype=pl.Int64))


def slates(*rows: tuple[Any, ...]) -> pl.DataFrame:
    """Rows of (slate, position, user, item, surface, time after T, buy, view)."""
    frame = events(*(row[2:] for row in rows))
    ids = pl.Series("slate_id", [row[0] for row in rows])
    return frame.with_columns(ids, pl.Series("position", [row[1] for row in rows], dtype=pl.Int32))


def raw(events: pl.DataFrame, **changes: Any) -> RawTables:
    tables = RawTables(
        name="tiny",
        source="made up",
        actions=("buy", "view"),
        positive_actions=("buy",),
        events=events,
        items=ITEMS,
        split=None,
    )
    return replace(tables, **changes)


def rows(dataset: Dataset, table: str, *columns: str) -> list[tuple[Any, ...]]:
    frame: pl.DataFrame = getattr(dataset, table)
    return frame.with_columns(pl.col("^timestamp_ms$") - T).select(columns).rows()


def split_at(valid: int, test: int) -> TimeSplit:
    return TimeSplit(valid_start_ms=T + valid, test_start_ms=T + test)


GOOD = events(("u", "a", "home", 10, True, False), ("u", "b", None, 20, False, True))


def test_clean_tables_pass_unchanged_and_survive_a_round_trip(tmp_path: Path) -> None:
    dataset = build_dataset(raw(GOOD, slates=slates((7, 0, "u", "c", "home", 30, True, False))))
    assert dataset.spec.dropped == {}
    assert dataset.spec.surfaces == ("unknown", "home")
    assert dataset.spec.dense == {"size": 1}
    assert dataset.spec.categories == {"kind": ("x", "y")}
    assert rows(dataset, "events", "user_id", "item_id", "surface", "timestamp_ms") == [
        ("u", "a", "home", 10),
        ("u", "b", "unknown", 20),
    ]
    assert rows(dataset, "slates", "slate_id", "item_id", "action_buy") == [(0, "c", True)]
    write_dataset(dataset, tmp_path / "data")
    again = read_dataset(tmp_path / "data")
    assert again.spec == dataset.spec
    assert again.events.equals(dataset.events)
    assert again.slates.equals(dataset.slates)
    assert again.items.equals(dataset.items)


def test_each_dropped_event_is_counted_under_its_reason() -> None:
    dataset = build_dataset(
        raw(
            events(
                ("u", "a", "home", 10, True, False),
                (None, "a", "home", 11, True, False),
                ("", "a", "home", 12, True, False),
                ("u", None, "home", 13, True, False),
                ("u", "gone", "home", 14, True, False),
                ("v", "gone", "home", 15, True, False),
            )
        )
    )
    assert dataset.spec.dropped == {
        "events: no item": 1,
        "events: no user": 2,
        "events: unknown item": 2,
        "users: no events": 1,
    }
    assert rows(dataset, "events", "user_id", "item_id") == [("u", "a")]


def test_repeats_in_user_item_and_time_become_one_event_with_the_union_of_actions() -> None:
    dataset = build_dataset(
        raw(
            events(
                ("u", "a", "home", 10, True, False),
                ("u", "a", "search", 10, False, True),
                ("u", "b", "home", 10, False, False),
                ("u", "a", "home", 11, False, False),
                ("v", "a", "home", 10, False, False),
            )
        )
    )
    assert dataset.spec.dropped == {"events: duplicate": 1}
    assert rows(dataset, "events", "user_id", "item_id", "surface", "timestamp_ms", "action_buy", "action_view") == [
        ("u", "a", "home", 10, True, True),
        ("u", "b", "home", 10, False, False),
        ("u", "a", "home", 11, False, False),
        ("v", "a", "home", 10, False, False),
    ]


def test_repeated_items_without_time_are_kept_unless_their_order_repeats() -> None:
    twice = [("u", "a", None, None, True, False), ("u", "a", None, None, False, True)]
    plain = build_dataset(raw(events(*twice)))
    assert (plain.events.height, plain.spec.dropped) == (2, {})
    ordered = build_dataset(raw(events(*twice, order=[0, 1])))
    assert (ordered.events.height, ordered.spec.dropped) == (2, {})
    repeated = build_dataset(raw(events(*twice, order=[4, 4])))
    assert repeated.spec.dropped == {"events: duplicate": 1}
    assert rows(repeated, "events", "item_id", "action_buy", "action_view") == [("a", True, True)]


def test_events_are_sorted_by_user_with_unknown_times_first_in_their_given_order() -> None:
    dataset = build_dataset(
        raw(
            events(
                ("v", "a", None, 20, True, False),
                ("u", "c", None, 30, True, False),
                ("v", "b", None, 10, True, False),
                ("u", "b", None, None, True, False),
                ("u", "a", None, None, True, False),
            )
        )
    )
    assert rows(dataset, "events", "user_id", "item_id", "timestamp_ms") == [
        ("u", "b", None),
        ("u", "a", None),
        ("u", "c", 30),
        ("v", "b", 10),
        ("v", "a", 20),
    ]
    assert dataset.spec.dropped == {"events: out of order (sorted)": 2}


def test_order_sorts_events_without_time_and_breaks_ties_in_time() -> None:
    frame = events(
        ("u", "a", None, None, True, False),
        ("u", "b", None, None, True, False),
        ("u", "c", None, 10, True, False),
        ("u", "a", None, 10, True, False),
        order=[2, 1, 9, 8],
    )
    dataset = build_dataset(raw(frame))
    assert [row[0] for row in rows(dataset, "events", "item_id")] == ["b", "a", "a", "c"]
    assert dataset.spec.dropped == {"events: out of order (sorted)": 2}


def test_each_dropped_slate_row_is_counted_under_its_reason() -> None:
    dataset = build_dataset(
        raw(
            GOOD,
            slates=slates(
                ("s", 0, "u", "a", "home", 30, False, False),
                ("s", 1, "u", "a", "home", 30, True, False),
                ("s", 2, "u", "gone", "home", 30, True, False),
                ("s", 3, "u", None, "home", 30, True, False),
                ("s", 4, None, "a", "home", 30, True, False),
                (None, 5, "u", "a", "home", 30, True, False),
                ("t", 0, "u", "a", "home", None, True, False),
                ("w", 0, "new", "a", "home", 40, False, False),
                ("s", 6, "u", "b", "home", 31, True, False),
            ),
        )
    )
    assert dataset.spec.dropped == {
        "slates: duplicate row": 1,
        "slates: no item": 1,
        "slates: no slate id": 1,
        "slates: no time": 1,
        "slates: no user": 1,
        "slates: time in the future of its slate": 1,
        "slates: unknown item": 1,
        "slates: user without events (kept)": 1,
    }
    assert rows(dataset, "slates", "slate_id", "user_id", "item_id", "position", "action_buy") == [
        (0, "u", "a", 0, True),
        (1, "new", "a", 0, False),
    ]


def test_slates_are_numbered_by_time_and_ordered_by_position_with_unknown_last() -> None:
    dataset = build_dataset(
        raw(
            GOOD,
            slates=slates(
                ("late", 1, "u", "a", "home", 50, True, False),
                ("soon", None, "u", "a", "home", 40, False, False),
                ("late", 0, "u", "b", "home", 50, False, False),
                ("soon", 3, "u", "c", "home", 40, False, False),
                ("twin", 0, "v", "a", "home", 50, False, False),
            ),
        )
    )
    assert rows(dataset, "slates", "slate_id", "item_id", "position") == [
        (0, "c", 3),
        (0, "a", None),
        (1, "b", 0),
        (1, "a", 1),
        (2, "a", 0),
    ]


def test_repeated_and_nameless_items_are_dropped_and_the_first_wins() -> None:
    items = pl.DataFrame({"item_id": ["a", "b", "a", None], "title": ["first", "B", "second", "none"]})
    dataset = build_dataset(raw(GOOD, items=items))
    assert rows(dataset, "items", "item_id", "title") == [("a", "first"), ("b", "B")]
    assert dataset.spec.dropped == {"items: duplicate": 1, "items: no id": 1}


def test_whole_numbers_zero_and_one_and_numeric_features_are_cast() -> None:
    frame = GOOD.with_columns(
        user_id=pl.Series([7, 7]),
        action_buy=pl.Series([1, 0]),
        timestamp_ms=pl.Series([T + 10.0, T + 20.0]),
    )
    items = ITEMS.with_columns(
        dense_size=pl.Series([1, 2, 3]),
        dense_vector=pl.Series([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        category_kind=pl.Series([1, None, 2]),
    )
    dataset = build_dataset(raw(frame, items=items))
    assert rows(dataset, "events", "user_id", "timestamp_ms", "action_buy") == [("7", 10, True), ("7", 20, False)]
    assert rows(dataset, "items", "dense_size", "dense_vector", "category_kind")[0] == ([1.0], [1.0, 2.0], "1")
    assert dataset.spec.dense == {"size": 1, "vector": 2}


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (GOOD.drop("surface"), r"events: missing columns \['surface'\], unknown columns \[\]"),
        (GOOD.with_columns(action_bye=True), r"events: missing columns \[\], unknown columns \['action_bye'\]"),
        (GOOD.with_columns(user_id=1.5), r"events: column user_id of type Float64 is not usable as String"),
        (GOOD.with_columns(timestamp_ms=1.5), r"column timestamp_ms of type Float64 .* give whole numbers"),
        (GOOD.with_columns(timestamp_ms=pl.datetime(2020, 1, 1)), r"column timestamp_ms of type Datetime"),
        (GOOD.with_columns(timestamp_ms=pl.lit("soon")), r"column timestamp_ms of type String .* Int64: conversion"),
        (
            GOOD.with_columns(action_buy=pl.Series([2, 0])),
            r"action_buy of type Int64 .* 0/1, got \[2, 0\]",
        ),
        (GOOD.with_columns(action_buy=pl.lit("yes")), r"column action_buy of type String"),
        (
            GOOD.with_columns(timestamp_ms=-5),
            r"events: timestamp_ms is -5: .* not between 1990 and 2100 \(2 such values\)",
        ),
        (GOOD.with_columns(timestamp_ms=T * 1000), r"is 1600000000000000: .* looks like Unix time in us"),
        (GOOD.with_columns(item_id=pl.lit("gone")), r"tiny: no event is left of 2; dropped: .*unknown item': 2"),
    ],
)
def test_events_that_cannot_be_repaired_are_refused(frame: pl.DataFrame, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_dataset(raw(frame))


def test_an_unknown_action_stays_unknown_in_events_and_is_refused_in_slates() -> None:
    frame = GOOD.with_columns(action_buy=pl.Series([None, True]))
    assert build_dataset(raw(frame)).events["action_buy"].to_list() == [None, True]
    slates = frame.with_columns(slate_id=1, position=None, surface=pl.lit("feed"), timestamp_ms=T)
    with pytest.raises(DataError, match=r"slates: column action_buy .* 0/1 without gaps, got \[None, True\]"):
        build_dataset(raw(GOOD, slates=slates))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (ITEMS.drop("title"), r"items: missing columns \['title'\]"),
        (ITEMS.with_columns(price=1), r"unknown columns \['price'\]"),
        (
            ITEMS.with_columns(dense_size=pl.Series([1.0, float("nan"), 3.0])),
            r"dense_size of item 'b' is \[nan\]; every",
        ),
        (ITEMS.with_columns(dense_size=pl.Series([1.0, 1e39, 3.0])), r"dense_size of item 'b' is \[inf\]"),
        (ITEMS.with_columns(dense_size=pl.Series([1.0, None, 3.0])), r"dense_size of item 'b' is \[None\]"),
        (ITEMS.with_columns(dense_size=pl.Series([[1.0], None, [3.0]])), r"dense_size of item 'b' is None"),
        (
            ITEMS.with_columns(dense_size=pl.Series([[1.0], [2.0, 3.0], [3.0]])),
            r"item 'a' is \[1.0\]; .* needs 2 numbers",
        ),
        (ITEMS.with_columns(dense_size=pl.Series([[], [], []], dtype=pl.List(pl.Float32))), r"needs 1 numbers"),
        (ITEMS.with_columns(dense_size=pl.lit("big")), r"items: column dense_size of type String"),
        (ITEMS.with_columns(category_kind=1.5), r"items: column category_kind of type Float64"),
    ],
)
def test_items_that_cannot_be_repaired_are_refused(items: pl.DataFrame, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_dataset(raw(GOOD, items=items))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (("s", 1, "v", "b", "home", 30, True, False), r"user_id of slate s is \['u', 'v'\]; .* \(1 such slates\)"),
        (("s", 1, "u", "b", "search", 30, True, False), r"surface of slate s is \['home', 'search'\]"),
        (("s", -1, "u", "b", "home", 30, True, False), r"position -1 in slate s; positions count from 0"),
    ],
)
def test_slates_that_contradict_themselves_are_refused(second: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_dataset(raw(GOOD, slates=slates(("s", 0, "u", "a", "home", 30, False, False), second)))


def test_slates_with_a_foreign_column_are_refused() -> None:
    frame = slates((1, 0, "u", "a", "home", 30, False, False)).with_columns(rank=1)
    with pytest.raises(DataError, match=r"slates: missing columns \[\], unknown columns \['rank'\]"):
        build_dataset(raw(GOOD, slates=frame))


def test_positive_actions_must_be_actions() -> None:
    with pytest.raises(DataError, match=r"positive_actions \['like'\] must be a non-empty part"):
        build_dataset(raw(GOOD, positive_actions=("like",)))


@pytest.mark.parametrize("valid_and_test", [(-0.1, 0.2), (0.5, 0.5), (0.1, 0.0)])
def test_split_fractions_must_leave_something_for_training(valid_and_test: tuple[float, float]) -> None:
    valid, test = valid_and_test
    with pytest.raises(DataError, match=r"both are shares that sum to less than 1"):
        SplitFractions(valid=valid, test=test)


def test_fractions_cut_slate_times_by_row_count() -> None:
    times = [100] * 5 + [200] * 3 + [300, 400]
    shown = slates(*((i, 0, "u", "a", "home", time, True, False) for i, time in enumerate(times)))
    dataset = build_dataset(raw(GOOD, slates=shown, split=SplitFractions(valid=0.3, test=0.2)))
    assert dataset.spec.split == split_at(200, 300)


@pytest.mark.parametrize("times", [[100] * 6 + [200] * 4, [100, 200, 300]])
def test_fractions_that_leave_no_validation_are_refused(times: list[int]) -> None:
    shown = slates(*((i, 0, "u", "a", "home", time, True, False) for i, time in enumerate(times)))
    with pytest.raises(DataError, match=r"no row falls into validation.* give the times yourself \(--valid-start"):
        build_dataset(raw(GOOD, slates=shown, split=SplitFractions()))
    test_alone = build_dataset(raw(GOOD, slates=shown, split=SplitFractions(valid=0.0))).spec.split
    assert test_alone is not None
    assert test_alone.valid_start_ms == test_alone.test_start_ms


def test_fractions_use_events_where_there_are_no_slates_and_give_up_without_times() -> None:
    many = events(*(("u", "a", None, time, True, False) for time in range(10)))
    assert build_dataset(raw(many, split=SplitFractions())).spec.split == split_at(8, 9)
    assert build_dataset(raw(many.with_columns(timestamp_ms=None), split=SplitFractions())).spec.split is None


def test_splitting_nothing_by_time_is_refused() -> None:
    with pytest.raises(DataError, match=r"no row has a timestamp; use a leave-one-out split"):
        split_by_time(pl.Series([None], dtype=pl.Int64), SplitFractions())


@pytest.mark.parametrize(
    ("split", "part"),
    [
        (split_at(10, 20), "training"),
        (split_at(11, 12), "validation"),
        (split_at(15, 30), "test"),
    ],
)
def test_a_split_with_an_empty_part_is_refused(split: TimeSplit, part: str) -> None:
    with pytest.raises(DataError, match=rf"no row falls into {part} .* the data covers 2020-09-13T12:26:40"):
        build_dataset(raw(GOOD, split=split))


def test_a_split_without_validation_is_accepted() -> None:
    split = split_at(20, 20)
    assert build_dataset(raw(GOOD, split=split)).spec.split == split


def test_an_explicit_split_of_data_without_times_is_refused() -> None:
    frame = GOOD.with_columns(timestamp_ms=pl.lit(None, pl.Int64))
    with pytest.raises(DataError, match=r"the data covers no known time"):
        build_dataset(raw(frame, split=split_at(1, 2)))


def test_exposures_are_cut_into_slates_at_pauses_users_and_surfaces() -> None:
    frame = events(
        ("v", "a", "home", 1000, False, False),
        ("u", "b", "home", 1099, False, True),
        ("u", "a", "home", 1000, True, False),
        ("u", "c", "home", 1199, False, False),
        ("u", "b", "search", 1050, False, False),
        ("u", "a", None, 1060, False, False),
        ("u", "b", None, 1070, False, False),
        ("u", "c", "home", None, False, False),
        (None, "c", "home", 1000, False, False),
    )
    shown = slates_from_events(frame, gap_ms=100)
    found = shown.group_by("slate_id", maintain_order=True).agg(
        "user_id", "surface", "timestamp_ms", "item_id", "position"
    )
    assert found.drop("slate_id").with_columns(pl.col("timestamp_ms") - T).rows() == [
        (["u", "u"], [None, None], [1060, 1060], ["a", "b"], [0, 1]),
        (["u", "u"], ["home", "home"], [1000, 1000], ["a", "b"], [0, 1]),
        (["u"], ["home"], [1199], ["c"], [0]),
        (["u"], ["search"], [1050], ["b"], [0]),
        (["v"], ["home"], [1000], ["a"], [0]),
    ]
    dataset = build_dataset(raw(frame, slates=shown))
    assert dataset.slates.height == 7
    assert dataset.spec.dropped["events: no user"] == 1


def test_a_repeated_exposure_takes_one_position_in_its_slate() -> None:
    frame = events(
        ("u", "a", "home", 1000, False, False),
        ("u", "a", "home", 1000, True, False),
        ("u", "b", "home", 1001, False, False),
    )
    shown = slates_from_events(frame)
    assert shown.select("item_id", "position", "action_buy").rows() == [("a", 0, True), ("b", 1, False)]


def test_exposures_of_one_moment_keep_their_order_when_a_repeat_is_merged() -> None:
    names = [f"i{number}" for number in range(50, 0, -1)]
    frame = events(*(("u", name, "home", 1000, False, False) for name in [*names, "i50"]))
    assert slates_from_events(frame)["item_id"].to_list() == names


def test_a_slate_gap_must_be_positive() -> None:
    with pytest.raises(DataError, match=r"slate gap is 0 ms; it must be positive"):
        slates_from_events(GOOD, gap_ms=0)


EVENT = st.tuples(
    st.sampled_from(["u", "v", None]),
    st.sampled_from(["a", "b", "gone", None]),
    st.sampled_from(["home", "search", None]),
    st.none() | st.integers(min_value=0, max_value=3),
    st.booleans(),
    st.booleans(),
)


@settings(deadline=None)
@given(st.lists(EVENT, max_size=30))
def test_cleaning_what_is_clean_changes_nothing(found: list[tuple[Any, ...]]) -> None:
    frame = events(("u", "a", "home", 1, True, False), *found)
    once = build_dataset(raw(frame, slates=slates_from_events(frame, gap_ms=2)))
    twice = build_dataset(raw(once.events, slates=once.slates))
    assert {reason for reason in twice.spec.dropped if not reason.endswith("(kept)")} == set()
    assert twice.events.equals(once.events)
    assert twice.slates.equals(once.slates)


@settings(deadline=None)
@given(st.lists(EVENT, max_size=30))
def test_every_row_is_kept_or_counted_once(found: list[tuple[Any, ...]]) -> None:
    frame = events(("u", "a", "home", 1, True, False), *found)
    dataset = build_dataset(raw(frame))
    reasons = ("events: no user", "events: no item", "events: unknown item", "events: duplicate")
    lost = sum(dataset.spec.dropped.get(reason, 0) for reason in reasons)
    assert dataset.events.height + lost == frame.height
