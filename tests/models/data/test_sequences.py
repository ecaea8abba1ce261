from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unipinrec.errors import DataError
from unipinrec.models.data.item_features import ItemFeatures
from unipinrec.models.data.schema import Dataset
from unipinrec.models.data.sequences import Sequences, fingerprint, sequences_of, vocabulary_of

Make = Callable[..., Dataset]


def test_users_events_and_slates_of_a_data_set_by_hand(make_dataset: Make) -> None:
    data = sequences_of(
        make_dataset(
            events=[
                ("bob", "b", "search", None, "click"),
                ("ann", "a", "feed", 10, ""),
                ("bob", "a", "feed", 20, "click hide"),
                ("ann", "c", "feed", 20, "like"),
            ],
            slates=[
                (7, "bob", "feed", 20, [("c", ""), ("a", "click hide")]),
                (3, "ann", "search", 25, [("b", "")]),
                (9, "eve", "feed", 5, [("a", "like")]),
                (4, "ann", "feed", 20, [("c", "like"), ("b", "")]),
            ],
        )
    )
    assert (data.user_ids, data.item_ids) == (["ann", "bob", "eve"], ["a", "b", "c"])
    assert (data.num_users, data.num_items, data.split) == (3, 3, None)
    assert data.event_start.tolist() == [0, 2, 4, 4]
    assert data.rows.tolist() == [0, 2, 1, 0]
    assert data.actions.tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 1]]
    assert data.surfaces.tolist() == [1, 1, 2, 1]
    assert data.timestamps_ms.tolist() == [10, 20, -1, 20]
    assert data.slate_ids.tolist() == [4, 3, 7, 9]
    assert data.slate_user.tolist() == [0, 0, 1, 2]
    assert data.slate_cutoff.tolist() == [1, 2, 1, 0], "an event at the slate's own time is not before it"
    assert data.slate_surface.tolist() == [1, 2, 1, 1]
    assert data.slate_timestamp_ms.tolist() == [20, 25, 20, 5]
    assert data.slate_start.tolist() == [0, 2, 3, 5, 6]
    assert data.slate_rows.tolist() == [2, 1, 1, 2, 0, 0], "items keep the order in which they were shown"
    assert data.slate_actions.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert data.actions.dtype == np.uint8
    assert data.slate_actions.dtype == np.uint8


def test_item_features_are_raw_values_in_declared_order_and_codes(make_dataset: Make) -> None:
    dataset = make_dataset(events=[("ann", item, "feed", 1, "click") for item in "abcd"], features=True)
    features = sequences_of(dataset).features
    assert features.dense.dtype == np.float32
    assert features.dense.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.5, 0.0], [2.0, 1.0, -1.0], [3.0, 1.5, -2.0]]
    # topic: x, y, null, a word outside the vocabulary; maker: m, a foreign word, m, a foreign word
    assert features.categories.tolist() == [[1, 1], [2, 0], [0, 1], [0, 0]]


def test_a_catalogue_without_features_has_tables_of_no_width(make_dataset: Make) -> None:
    features = sequences_of(make_dataset(events=[("ann", "a", "feed", 1, "")], items=["a", "b"])).features
    assert (features.dense.shape, features.categories.shape) == ((2, 0), (2, 0))


def test_data_without_slates_have_empty_slate_arrays(make_dataset: Make) -> None:
    data = sequences_of(make_dataset(events=[("ann", "a", "feed", 1, "")]))
    assert data.slate_start.tolist() == [0]
    assert (len(data.slate_user), data.slate_actions.shape) == (0, (0, 3))


def test_the_vocabulary_repeats_the_declaration(make_dataset: Make) -> None:
    dataset = make_dataset(events=[("ann", "a", "feed", 1, "")], items=["a", "b"], features=True)
    vocabulary = vocabulary_of(dataset)
    assert vocabulary.num_items == 2
    assert vocabulary.actions == ("click", "like", "hide")
    assert vocabulary.positive_actions == ("click", "like")
    assert vocabulary.surfaces == ("unknown", "feed", "search")
    assert vocabulary.dense == {"size": 1, "content": 2}
    assert vocabulary.categories == {"topic": ("x", "y"), "maker": ("m",)}


def test_an_item_outside_the_catalogue_is_an_error(make_dataset: Make) -> None:
    dataset = make_dataset(events=[("ann", "a", "feed", 1, ""), ("ann", "z", "feed", 2, "")], items=["a", "b"])
    with pytest.raises(DataError, match="item_id='z' is not in the catalogue; run `unipinrec prepare` again"):
        sequences_of(dataset)


def test_a_surface_that_was_not_declared_is_unknown(make_dataset: Make) -> None:
    assert sequences_of(make_dataset(events=[("ann", "a", "elsewhere", 1, "")])).surfaces.tolist() == [0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_arrays_hold_what_the_tables_hold(random_dataset: Make, seed: int) -> None:
    dataset = random_dataset(seed)
    data = sequences_of(dataset)
    users = sorted({*dataset.events["user_id"], *dataset.slates["user_id"]})
    assert data.user_ids == users
    for user, name in enumerate(users):
        rows = dataset.events.filter(pl.col("user_id") == name)
        span = slice(data.event_start[user], data.event_start[user + 1])
        assert [data.item_ids[r] for r in data.rows[span]] == rows["item_id"].to_list()
        assert data.timestamps_ms[span].tolist() == rows["timestamp_ms"].fill_null(-1).to_list()
        assert data.actions[span, 1].tolist() == rows["action_like"].cast(pl.Int64).to_list()
    assert sorted(data.slate_ids.tolist()) == sorted(dataset.slates["slate_id"].unique())
    for s, slate in enumerate(data.slate_ids.tolist()):
        rows = dataset.slates.filter(pl.col("slate_id") == slate)
        span = slice(data.slate_start[s], data.slate_start[s + 1])
        assert users[data.slate_user[s]] == rows["user_id"][0]
        assert [data.item_ids[r] for r in data.slate_rows[span]] == rows["item_id"].to_list()
        assert data.slate_actions[span, 0].tolist() == rows["action_click"].cast(pl.Int64).to_list()
        time = rows["timestamp_ms"][0]
        past = [t for t in data.timestamps_ms[_span(data.event_start, int(data.slate_user[s]))] if t < time]
        assert data.slate_cutoff[s] == len(past)
    order = list(zip(data.slate_user, data.slate_timestamp_ms, data.slate_ids, strict=True))
    assert order == sorted(order)


def _span(starts: np.ndarray[tuple[int], np.dtype[np.int64]], index: int) -> slice:
    return slice(int(starts[index]), int(starts[index + 1]))


def _altered(owner: Sequences | ItemFeatures) -> Iterator[dict[str, Any]]:
    """Each of its arrays by name, with another last entry."""
    for field in fields(owner):
        array = getattr(owner, field.name)
        if isinstance(array, np.ndarray):
            changed = array.copy()
            changed.flat[-1] += 1
            yield {field.name: changed}


def test_a_fingerprint_changes_with_every_part_of_the_data(random_dataset: Make) -> None:
    dataset = random_dataset(3, features=True)
    data, vocabulary = sequences_of(dataset), vocabulary_of(dataset)
    plain = fingerprint(data, vocabulary)
    assert plain == fingerprint(sequences_of(dataset), vocabulary_of(dataset))
    others = [replace(data, split=None), replace(data, item_ids=data.item_ids[::-1])]
    others += [replace(data, **part) for part in _altered(data)]
    others += [replace(data, features=replace(data.features, **part)) for part in _altered(data.features)]
    found = {fingerprint(other, vocabulary) for other in others}
    assert len(others) == 18
    assert len(found) == len(others)
    assert plain not in found
    assert fingerprint(data, msgspec.structs.replace(vocabulary, positive_actions=("hide",))) not in {plain, *found}
