"""What was recommended becomes slates, with labels from what came after and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unipinrec.errors import DataError
from unipinrec.models.data.schema import Dataset, TimeSplit, event_columns, write_dataset
from unipinrec.models.data.served import HOUR_MS, SCHEMA, label, read_served
from unipinrec.models.data.validate import RawTables, build_dataset

ACTIONS = ("click", "buy")
ITEMS = pl.DataFrame({"item_id": ["a", "b", "c", "d"], "title": ["A", None, None, None], "dense_size": [1.0, 2, 3, 4]})
T = 1_760_000_000_000
DAY = 24 * HOUR_MS


def events(*rows: tuple[Any, ...]) -> pl.DataFrame:
    """Rows of (user, item, time after T, click, buy)."""
    timed = [(user, item, "home", None if at is None else T + at, *acted) for user, item, at, *acted in rows]
    return pl.DataFrame(timed, schema=event_columns(ACTIONS), orient="row")


def answer(request: str, user: str | None, at: int, *items: str, surface: str = "home") -> pl.DataFrame:
    """The rows that a server logs of an answer at T + at."""
    listed = [
        (request, user, item, index, 1.0 - index / 10, None, "model", surface, "hash", T + at)
        for index, item in enumerate(items)
    ]
    return pl.DataFrame(listed, schema=SCHEMA, orient="row")


def write_log(folder: Path, *answers: pl.DataFrame) -> Path:
    """A file for each answer."""
    folder.mkdir()
    for index, one in enumerate(answers):
        one.write_parquet(folder / f"served-{index}.parquet")
    return folder


def write_data(folder: Path, table: pl.DataFrame, **fields: Any) -> Path:
    raw = RawTables(
        name="shop", source="ours", actions=ACTIONS, positive_actions=("click",), events=table, items=ITEMS, **fields
    )
    write_dataset(build_dataset(raw), folder)
    return folder


EVENTS = events(
    ("ann", "a", -100, True, False),
    ("ann", "b", 50, True, False),
    ("ann", "b", 60, False, True),
    ("bob", "a", 70, True, None),
    ("bob", "c", 2_000, False, True),
    ("ann", "c", DAY + 2_000, True, False),
    ("bob", "d", 3 * DAY, True, False),
)
SPLIT = TimeSplit(valid_start_ms=T + 500, test_start_ms=T + DAY)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", EVENTS, split=SPLIT)


def joined(log: Path, data: Path, within_ms: int = DAY, split: TimeSplit | None = None) -> Dataset:
    return build_dataset(read_served(log, data, within_ms, split))


def test_answers_become_slates_with_the_labels_of_what_came_after(data: Path, tmp_path: Path) -> None:
    log = write_log(
        tmp_path / "log",
        answer("r-1", "ann", 0, "b", "c", "a"),
        answer("r-2", "bob", 10, "a", "b", surface="cart"),
        answer("r-3", "ann", 1_000, "c"),
        answer("r-4", "bob", DAY, "b"),
    )
    made = joined(log, data)
    assert made.slates.rows() == [
        (0, "ann", "b", "home", T, True, True, 0),
        (0, "ann", "c", "home", T, False, False, 1),  # served again before it was clicked
        (0, "ann", "a", "home", T, False, False, 2),  # clicked before it was served
        (1, "bob", "a", "cart", T + 10, True, False, 0),
        (1, "bob", "b", "cart", T + 10, False, False, 1),
        (2, "ann", "c", "home", T + 1_000, False, False, 0),  # clicked a day and a second later
        (3, "bob", "b", "home", T + DAY, False, False, 0),
    ]
    assert made.events.equals(build_dataset(_raw(EVENTS)).events)
    assert made.spec.split == SPLIT
    assert made.spec.surfaces == ("unknown", "cart", "home")
    assert made.spec.dropped == {}
    assert made.spec.source == "ours; with 4 answers of a server as slates"


def _raw(table: pl.DataFrame) -> RawTables:
    return RawTables(
        name="shop", source="ours", actions=ACTIONS, positive_actions=("click",), events=table, items=ITEMS
    )


def test_events_keep_the_order_of_the_data(data: Path, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", answer("r-1", "ann", 0, "b"))
    assert read_served(log, data, DAY).events["order"].to_list() == list(range(7))


def test_a_longer_window_sees_the_later_click(data: Path, tmp_path: Path) -> None:
    log = write_log(
        tmp_path / "log", answer("r-0", "bob", 0, "a"), answer("r-1", "ann", 1_000, "c"), answer("r-2", "bob", DAY, "b")
    )
    split = TimeSplit(valid_start_ms=T + 2_000, test_start_ms=T + 2_000)
    assert joined(log, data, DAY + 999, split).slates["action_click"].to_list() == [True, False, False]
    assert joined(log, data, DAY + 1_000, split).slates["action_click"].to_list() == [True, True, False]


def test_what_is_left_out_is_counted_in_rows(data: Path, tmp_path: Path) -> None:
    log = write_log(
        tmp_path / "log",
        answer("r-0", "ann", -10, "d", "b"),  # the client asked again, with the same id
        answer("r-0", "ann", 0, "c", "b"),
        answer("r-0", "ann", 0, "c", "b"),  # a copy of the file
        answer("r-1", None, 5, "a", "b"),
        answer("r-2", "eve", 5, "a", "b", "c"),
        answer("r-3", "bob", 600, "a", "x"),
        answer("r-4", "bob", 2 * DAY + 1, "a"),
        answer("r-5", "bob", 3 * DAY, "a", "b", "c", "d"),
    )
    made = joined(log, data)
    assert made.slates.select("user_id", "item_id", "timestamp_ms", "action_click").rows() == [
        ("ann", "c", T, False),
        ("ann", "b", T, True),
        ("bob", "a", T + 600, False),
        ("bob", "a", T + 2 * DAY + 1, False),
    ]
    assert made.spec.dropped == {
        "served: request id again": 4,
        "served: no user": 2,
        "served: unknown user": 3,
        "served: unknown item": 1,
        "served: no event of the data follows": 4,
        "served: the data ends before the answer's hours are over (kept)": 1,
    }


def test_slates_that_the_data_has_stay_as_they_are(data: Path, tmp_path: Path) -> None:
    given = (("r-1", "ann", 0, "b", "c"), ("r-2", "bob", 600, "a"), ("r-3", "bob", DAY, "b"))
    log = write_log(tmp_path / "log", *(answer(*one) for one in given))
    first = joined(log, data)
    write_dataset(first, tmp_path / "first")
    more = write_log(tmp_path / "more", answer("r-1", "ann", 0, "b", "c"), answer("r-4", "ann", 30, "b"))
    second = joined(more, tmp_path / "first")
    assert second.slates.filter(pl.col("timestamp_ms") != T + 30).drop("slate_id").equals(first.slates.drop("slate_id"))
    assert second.slates.filter(pl.col("timestamp_ms") == T + 30)["action_buy"].to_list() == [True]
    assert second.spec.dropped["served: slate that the data has"] == 2


def test_data_without_a_split_gets_one_by_the_times_of_its_slates(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", EVENTS, split=None)
    log = write_log(tmp_path / "log", *(answer(f"r-{n}", "ann", 10 * n, "c") for n in range(10)))
    assert joined(log, data, 2 * DAY).spec.split == TimeSplit(valid_start_ms=T + 80, test_start_ms=T + 90)


def test_a_split_that_leaves_a_part_empty_is_refused_and_another_one_taken(data: Path, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", answer("r-1", "ann", 0, "b"), answer("r-2", "ann", 20, "c"))
    with pytest.raises(DataError, match=r"split: no row falls into test with .* choose times inside it"):
        joined(log, data)
    other = TimeSplit(valid_start_ms=T + 10, test_start_ms=T + 10)
    assert joined(log, data, split=other).spec.split == other


def test_a_folder_without_files_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(DataError, match="log has no Parquet files; give the folder that `unipinrec serve"):
        read_served(tmp_path / "log", data, DAY)


def test_other_files_are_refused(data: Path, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", answer("r-1", "ann", 0, "b"), EVENTS)
    with pytest.raises(DataError, match=r"served-1.parquet is no log of .*it has \[\('user_id', String"):
        read_served(log, data, DAY)
    (log / "served-0.parquet").write_bytes(b"half a fi")
    with pytest.raises(DataError, match=r"served-0.parquet: not readable as Parquet: .* remove it from"):
        read_served(log, data, DAY)


def test_columns_of_other_types_are_refused(data: Path, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", answer("r-1", "ann", 0, "b").with_columns(pl.col("user").cast(pl.Binary)))
    with pytest.raises(DataError, match=r"it has .*'user', Binary.*, not .*'user': String"):
        read_served(log, data, DAY)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (
            3 * DAY,
            r"covers 2025-10-12T08:53:20\+00:00 to .*: none came after an answer; prepare data that has",
        ),
        (-2 * DAY, "the log ends more than 24 hours before every event"),
    ],
)
def test_times_that_are_apart_are_refused(at: int, message: str, data: Path, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", answer("r-1", "ann", at, "b"))
    with pytest.raises(DataError, match=message):
        read_served(log, data, DAY)


def test_events_without_times_are_refused(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", events(("ann", "a", None, True, False)), split=None)
    log = write_log(tmp_path / "log", answer("r-1", "ann", 0, "b"))
    with pytest.raises(DataError, match="no event of the data has a time"):
        read_served(log, data, DAY)


def test_nothing_in_common_is_refused_with_the_reasons(data: Path, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", answer("r-1", "eve", 0, "b"), answer("r-2", "ann", 0, "x"))
    with pytest.raises(DataError, match=r"none of the 2 rows .*'served: unknown user': 1, 'served: unknown item': 1"):
        read_served(log, data, DAY)


def test_events_in_whole_seconds_follow_the_answer_of_their_second() -> None:
    shown = answer("r-1", "ann", 7_000, "a", "b")
    acted = events(("ann", "a", 7_000, True, False), ("ann", "b", 6_000, True, False))
    assert _labels(label(shown, acted, ACTIONS, 5_000, same_time=True)) == [
        ("r-1", "a", True, False),
        ("r-1", "b", False, False),
    ]
    assert not any(row[2] for row in _labels(label(shown, acted, ACTIONS, 5_000)))


TIMES = st.integers(0, 12)
NAMES = st.sampled_from(["ann", "bob"])
SHOWN = st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True)


@settings(max_examples=200, deadline=None)
@given(
    answers=st.lists(st.tuples(NAMES, TIMES, SHOWN), min_size=1, max_size=6, unique_by=lambda one: one[:2]),
    acted=st.lists(st.tuples(NAMES, st.sampled_from("abc"), TIMES, st.booleans(), st.booleans()), max_size=12),
    within=st.integers(1, 8),
)
def test_a_label_comes_from_events_after_the_answer_and_inside_the_window(
    answers: list[tuple[str, int, list[str]]], acted: list[tuple[str, str, int, bool, bool]], within: int
) -> None:
    shown = pl.concat([answer(f"r-{n}", user, at, *items) for n, (user, at, items) in enumerate(answers)])
    made = label(shown, events(*acted), ACTIONS, within)
    expected = {}
    for number, (user, at, items) in enumerate(answers):
        for item in items:
            later = [time for name, time, other in answers if name == user and item in other and time > at]
            until = min([at + within, *later])
            found = [one for one in acted if one[:2] == (user, item) and at < one[2] <= until]
            expected[f"r-{number}", item] = tuple(any(one[index] for one in found) for index in (3, 4))
    assert {(row[0], row[1]): row[2:] for row in _labels(made)} == expected
    assert made.height == shown.height


def _labels(made: pl.DataFrame) -> list[tuple[Any, ...]]:
    return made.select("slate_id", "item_id", "action_click", "action_buy").rows()
