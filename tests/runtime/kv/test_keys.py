from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unipinrec.runtime.kv.cache import CacheKey, mismatch
from unipinrec.runtime.kv.encoder import event_records
from unipinrec.runtime.requests import History

KEY = CacheKey(user="u", namespace="one", events=b"abcd", count=4, start=0)
quick = settings(max_examples=200, deadline=None)
events = st.integers(1, 12)
actions = st.integers(1, 20)
seeds = st.integers(0, 2**31)


def random_history(seed: int, count: int, bits: int) -> History:
    """Small values, so that neighbours are often equal."""
    rng = np.random.default_rng(seed)
    return History(
        item_rows=rng.integers(0, 3, count),
        actions=rng.integers(0, 2, (count, bits)).astype(np.float32),
        surfaces=rng.integers(0, 3, count),
        timestamps_ms=np.sort(rng.integers(-1, 4, count)),
    )


def test_the_record_of_an_event() -> None:
    history = History(
        item_rows=np.array([258]),
        actions=np.array([[1.0, 0.0, 0.0, 1.0]], np.float32),
        surfaces=np.array([3]),
        timestamps_ms=np.array([-1]),
    )
    row, time, surface = b"\x02\x01" + bytes(6), b"\xff" * 8, b"\x03" + bytes(7)
    assert event_records(history) == row + time + surface + b"\x90"


@pytest.mark.parametrize(("bits", "size"), [(1, 25), (4, 25), (8, 25), (9, 26), (16, 26), (17, 27)])
def test_all_records_of_a_bundle_are_of_equal_length(bits: int, size: int) -> None:
    for count in (1, 2, 7):
        assert len(event_records(random_history(count, count, bits))) == size * count


@quick
@given(data=st.data(), count=events, bits=actions, seed=seeds)
def test_whatever_differs_shows_in_its_own_record(data: st.DataObject, count: int, bits: int, seed: int) -> None:
    history = random_history(seed, count, bits)
    index = data.draw(st.integers(0, count - 1), label="place")
    bit = data.draw(st.integers(0, bits - 1), label="bit")
    column = data.draw(st.sampled_from(["item_rows", "actions", "surfaces", "timestamps_ms"]), label="column")
    step = data.draw(st.sampled_from([1, 256, 2**31, 2**40, -1]), label="step")
    values = getattr(history, column).copy()
    if column == "actions":
        values[index, bit] = 1.0 - values[index, bit]
    else:
        values[index] += step
    before, after = event_records(history), event_records(replace(history, **{column: values}))
    size = len(before) // count
    differ = [before[i : i + size] != after[i : i + size] for i in range(0, len(before), size)]
    assert differ == [i == index for i in range(count)]


@quick
@given(data=st.data(), count=events, bits=actions, seed=seeds)
def test_the_records_of_a_beginning_are_the_first(data: st.DataObject, count: int, bits: int, seed: int) -> None:
    history = random_history(seed, count, bits)
    cut = data.draw(st.integers(1, count), label="cut")
    whole, part = event_records(history), event_records(history.part(0, cut))
    assert whole[: len(part)] == part
    assert len(part) * count == len(whole) * cut
    assert event_records(history.part(cut - 1)) == whole[len(whole) // count * (cut - 1) :]


def test_arrays_of_any_layout_have_the_same_records() -> None:
    history = random_history(0, 6, 5)
    strided = History(**{name: np.repeat(values, 2, axis=0)[::2] for name, values in vars(history).items()})
    assert event_records(strided) == event_records(history)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, None),
        ({"events": b"abcde", "count": 5}, None),
        ({"user": "another"}, None),
        ({"events": b"abc", "count": 3}, "truncated"),
        ({"events": b"abcx"}, "edited"),
        ({"events": b"xbcdef", "count": 6}, "edited"),
        ({"events": b"bcd", "count": 3}, "edited"),
        ({"start": 2}, "shifted"),
        ({"start": 2, "events": b"cdef"}, "shifted"),
        ({"namespace": "two"}, "version"),
        ({"namespace": "two", "events": b"x", "start": 1}, "version"),
    ],
)
def test_why_an_entry_does_not_serve(asked: dict[str, Any], reason: str | None) -> None:
    assert mismatch(KEY, replace(KEY, **asked)) == reason
