from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unipinrec.runtime.graphs.backend import MAX_ROWS, MAX_SLOTS
from unipinrec.runtime.kv.encoder import Padding, PaddingMeter, Work, grouped, half_octave

LIMITS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
WORK = Work(kind="miss", slots=33, new=32, candidates=200)
works = st.lists(
    st.builds(
        Work,
        kind=st.sampled_from(["hit", "extended", "miss"]),
        slots=st.integers(1, 1200),
        new=st.integers(0, 1200),
        candidates=st.integers(1, 700),
    ),
    max_size=60,
)


def test_a_half_octave_ends_at_its_limit() -> None:
    assert half_octave(0) == -1
    assert [half_octave(count) for count in (1, 7, 8)] == [0, 0, 0]
    for index, limit in enumerate(LIMITS):
        assert half_octave(limit) == index
        assert half_octave(limit + 1) == index + 1


def test_sizes_of_a_group_are_within_a_third() -> None:
    for below, limit in pairwise(LIMITS):
        assert 1 - (below + 1) / limit < 1 / 3


@settings(max_examples=300, deadline=None)
@given(works=works, chunk=st.sampled_from([None, 64, 256]))
def test_every_request_is_in_one_group_of_its_kind(works: list[Work], chunk: int | None) -> None:
    groups = grouped(works, chunk)
    assert sorted(index for group in groups for index in group) == list(range(len(works)))
    for group in groups:
        members = [works[index] for index in group]
        assert len({work.kind for work in members}) == 1
        assert len(group) <= MAX_ROWS
        assert len(group) == 1 or len(group) * max(work.slots for work in members) <= MAX_SLOTS
        if chunk is not None and any(work.new > chunk for work in members):
            assert len(group) == 1
        for sizes in ([work.slots for work in members], [work.new for work in members]):
            assert sum(sizes) * 3 > len(sizes) * max(sizes) * 2 or max(sizes) <= 8
        candidates = [work.candidates for work in members]
        assert min(candidates) * 3 > max(candidates) * 2 or max(candidates) <= 8


def test_like_requests_are_together_from_the_shortest_on() -> None:
    works = [replace(WORK, slots=slots) for slots in (48, 33, 64, 40, 49)]
    assert grouped(works, None) == [[1, 3, 0], [4, 2]]
    assert grouped([], None) == []


@pytest.mark.parametrize(
    "changes", [{"kind": "extended"}, {"slots": 32}, {"slots": 49}, {"new": 33}, {"candidates": 300}]
)
def test_what_differs_is_apart(changes: dict[str, int]) -> None:
    assert grouped([WORK, replace(WORK, **changes), WORK], None) == [[0, 2], [1]]  # type: ignore[arg-type]


def test_groups_are_limited() -> None:
    assert [len(group) for group in grouped([replace(WORK, slots=1)] * 70, None)] == [32, 32, 6]
    assert [len(group) for group in grouped([replace(WORK, slots=993)] * 5, None)] == [2, 2, 1]
    assert [len(group) for group in grouped([replace(WORK, slots=5000)] * 3, None)] == [1, 1, 1]


def test_what_is_encoded_in_chunks_is_alone() -> None:
    works = [replace(WORK, slots=301, new=300)] * 3
    assert grouped(works, 256) == [[0], [1], [2]]
    assert grouped(works, 300) == grouped(works, None) == [[0, 1, 2]]


def test_waste_is_what_was_computed_and_not_given() -> None:
    meter = PaddingMeter()
    assert meter.snapshot() == {}
    meter.add("encode", [10, 8, 6])
    meter.add("encode", [6])
    meter.add("rank", [200, 200])
    assert meter.snapshot() == {
        "encode": Padding(useful=30, computed=36),
        "rank": Padding(useful=400, computed=400),
    }
    assert meter.snapshot()["encode"].waste == pytest.approx(1 / 6)
    assert meter.snapshot()["rank"].waste == 0.0
    assert Padding(useful=0, computed=0).waste == 0.0


def test_threads_count_together() -> None:
    meter = PaddingMeter()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: meter.add("encode", [1, 3]), range(4000)))
    assert meter.snapshot() == {"encode": Padding(useful=16_000, computed=24_000)}
