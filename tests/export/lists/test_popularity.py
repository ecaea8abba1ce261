"""What a bundle says is popular, by hand on a few events."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from unipinrec.errors import ExportError
from unipinrec.export.lists.popularity import RECENT_MS, item_shares
from unipinrec.models.data.schema import Dataset, DatasetSpec, TimeSplit, event_columns, item_columns, slate_columns
from unipinrec.models.data.sequences import sequences_of, vocabulary_of

ACTIONS = ("click", "save", "hide")
NOW = 100 * 86_400_000
EventRow = tuple[str, str, str, int | None, str]


def shares(
    events: Sequence[EventRow], items: str = "abcd", positive: tuple[str, ...] = ("click", "save")
) -> NDArray[np.float32]:
    """Of events (user, item, surface, time, action), oldest first."""
    spec = DatasetSpec(
        format_version=1,
        name="by-hand",
        actions=ACTIONS,
        positive_actions=positive,
        surfaces=("unknown", "home", "search"),
        dense={},
        categories={},
        split=TimeSplit(valid_start_ms=NOW - 10, test_start_ms=NOW - 5),
        dropped={},
        source="made for a test",
    )
    rows = [(*event[:4], *(event[4] == name for name in ACTIONS)) for event in events]
    dataset = Dataset(
        spec=spec,
        events=pl.DataFrame(rows, schema=event_columns(ACTIONS), orient="row"),
        slates=pl.DataFrame([], schema=slate_columns(ACTIONS), orient="row"),
        items=pl.DataFrame([(item, None) for item in items], schema=item_columns(spec), orient="row"),
    )
    return item_shares(sequences_of(dataset), vocabulary_of(dataset))


OLD: list[EventRow] = [*[("u", "a", "home", 0, "click")] * 3, ("u", "b", "search", 1, "save")]
RECENT: list[EventRow] = [
    ("v", "c", "home", NOW - 3, "click"),
    ("v", "b", "search", NOW - 2, "click"),
    ("v", "b", "search", NOW - 1, "save"),
    ("v", "d", "home", NOW, "hide"),
]


def test_literal_values() -> None:
    found = shares(OLD + RECENT)
    assert (found.shape, found.dtype.name) == ((3, 4), "float32")
    # Of 7 positive events a has 3, b 3, c 1: with one event for equal chances 3.25, 3.25, 1.25 and .25 of 8.
    # Together in the last week: b 2, c 1, and 100 events of those shares; home: c 1, search: b 2, and 100 of these.
    together = [40.625 / 103, 42.625 / 103, 16.625 / 103, 3.125 / 103]
    assert found[0].tolist() == pytest.approx(together)
    assert found[0].tolist() == pytest.approx([0.394417, 0.413835, 0.161408, 0.030340], abs=1e-6)
    home = [39.441748 / 101, 41.383495 / 101, (1 + 16.140777) / 101, 3.033981 / 101]
    search = [39.441748 / 102, (2 + 41.383495) / 102, 16.140777 / 102, 3.033981 / 102]
    assert found[1].tolist() == pytest.approx(home)
    assert found[2].tolist() == pytest.approx(search)
    assert found.sum(axis=1).tolist() == pytest.approx([1.0] * 3)


def test_an_event_counts_as_recent_for_less_than_a_week() -> None:
    late: EventRow = ("v", "a", "home", NOW, "click")
    before = shares([("u", "b", "home", NOW - RECENT_MS, "click"), late])
    within = shares([("u", "b", "home", NOW - RECENT_MS + 1, "click"), late])
    assert before[0, 0] > before[0, 1]
    assert within[0, 0] == within[0, 1]


def test_without_times_all_events_count() -> None:
    events: list[EventRow] = [*[("u", "a", "home", None, "click")] * 3, ("v", "b", "search", None, "save")]
    found = shares(events, items="ab")
    # All time: 3.5 and 1.5 of 5; together: 3 + 70 and 1 + 30 of 104.
    assert found[0].tolist() == pytest.approx([73 / 104, 31 / 104])
    assert found[2].tolist() == pytest.approx([100 * 73 / 104 / 101, (1 + 100 * 31 / 104) / 101])
    # An event whose time is not known is of no week where others are known.
    assert shares([*events, ("w", "b", "home", NOW, "click")], items="ab")[0].tolist() == pytest.approx(
        [100 * 3.5 / 6 / 101, (1 + 100 * 2.5 / 6) / 101]
    )


def test_every_item_has_a_chance_and_items_of_equal_counts_are_equal() -> None:
    found = shares(OLD + RECENT, items="abcdefgh")
    assert (found > 0).all()
    assert np.unique(found[0]).tolist() == sorted({*found[0, :4].tolist()})


def test_data_in_which_nothing_is_positive_is_refused() -> None:
    with pytest.raises(
        ExportError, match=r"no event of the data has a positive action \(save\), so no item is popular"
    ):
        shares([("u", "a", "home", NOW, "click")], positive=("save",))
