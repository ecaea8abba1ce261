from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unipinrec.models.batches import Batch, Batches, TrainBatchOptions, Window, pad_rows, training_windows
from unipinrec.models.data.schema import Dataset
from unipinrec.models.data.sequences import Sequences, sequences_of

Make = Callable[..., Dataset]
POSITIVE = np.array([True, True, False])
SPLITS = [(60, 80), None]

quick = settings(max_examples=25, deadline=None)
seeds, splits = st.integers(0, 10_000), st.sampled_from(SPLITS)


def _options(**overrides: float) -> TrainBatchOptions:
    known = {
        "batch_size": 3,
        "max_history": 6,
        "max_candidates": 8,
        "mask_probability": 0.3,
        "num_negatives": 5,
        "seed": 1,
    }
    return TrainBatchOptions(**{**known, **overrides})  # type: ignore[arg-type]  # ints and one float by name


def _batches(dataset: Dataset, **overrides: float) -> Batches:
    return Batches(sequences_of(dataset), POSITIVE, _options(**overrides))


def _train_ends(data: Sequences) -> list[int]:
    """End of each user's training events, literally from the rule."""
    ends = []
    for user in range(data.num_users):
        begin, end = data.event_start[user], data.event_start[user + 1]
        if data.split is None:
            ends.append(max(begin, end - 2))
        else:
            ends.append(begin + sum(data.timestamps_ms[i] < data.split.valid_start_ms for i in range(begin, end)))
    return ends


@dataclass(frozen=True)
class Row:
    """What one row of a batch says, traced back to the data: where its events lie, and which slates it shows."""

    batch: Batch
    at: int
    begin: int
    length: int


def _rows(batches: Batches, epoch: int = 0) -> Iterator[Row]:
    """All rows of an epoch, each with the window it was made from, found by its unique timestamps and items."""
    plan = batches._plan(epoch)
    for index, batch in enumerate(batches.epoch(epoch, range(len(batches)))):
        for at, number in enumerate(plan[index]):
            window = batches.windows[number]
            yield Row(batch, at, window.begin, window.end - window.begin)


@quick
@given(seed=seeds, split=splits, n=st.integers(1, 9))
def test_windows_cover_every_training_event_exactly_once(
    random_dataset: Make, seed: int, split: tuple[int, int] | None, n: int
) -> None:
    data = sequences_of(random_dataset(seed, split=split))
    windows = training_windows(data, n)
    covered = np.zeros(len(data.rows), int)
    for window in windows:
        covered[window.begin : window.end] += 1
        assert 1 <= window.end - window.begin <= n
    left_out = []
    for user, end in enumerate(_train_ends(data)):
        begin = int(data.event_start[user])
        assert not covered[end : data.event_start[user + 1]].any(), "held-out events are in no window"
        left_out += [i for i in range(begin, end) if covered[i] != 1]
        assert all(i == begin or n == 1 for i in range(begin, end) if covered[i] != 1)
    # An event alone, without a slate to rank, has nothing to learn from; with n = 1 every event is alone.
    starts = {w.begin for w in windows}
    assert all(covered[i] == 0 and i not in starts for i in left_out)


@quick
@given(seed=seeds, split=splits, n=st.integers(2, 9))
def test_a_slate_belongs_to_the_window_with_the_event_before_it(
    random_dataset: Make, seed: int, split: tuple[int, int] | None, n: int
) -> None:
    data = sequences_of(random_dataset(seed, split=split))
    windows = training_windows(data, n)
    ends = _train_ends(data)
    owners: dict[int, Window] = {}
    for window in windows:
        for slate in range(window.slate_begin, window.slate_end):
            assert slate not in owners
            owners[slate] = window
    for slate, user in enumerate(data.slate_user):
        first, cutoff = int(data.event_start[user]), int(data.slate_cutoff[slate])
        if data.split is not None:
            wanted = cutoff > 0 and data.slate_timestamp_ms[slate] < data.split.valid_start_ms
        else:
            # A slate after the last training event may show what was held out.
            wanted = 0 < cutoff < ends[user] - first
        assert (slate in owners) == wanted
        if wanted:
            assert owners[slate].begin <= first + cutoff - 1 < owners[slate].end


def test_windows_are_aligned_to_the_newest_event(make_dataset: Make) -> None:
    events = [("ann", "a", "feed", t, "click") for t in range(8)]
    dataset = make_dataset(
        events, [(1, "ann", "feed", 1, [("a", "")]), (2, "ann", "feed", 5, [("a", "")])], split=(7, 9)
    )
    assert training_windows(sequences_of(dataset), 3) == [
        Window(begin=4, end=7, slate_begin=1, slate_end=2),
        Window(begin=1, end=4, slate_begin=0, slate_end=0),
        Window(begin=0, end=1, slate_begin=0, slate_end=1),
    ]


def test_a_first_event_alone_is_left_out_unless_a_slate_follows(make_dataset: Make) -> None:
    events = [("ann", "a", "feed", t, "click") for t in range(4)]
    data = sequences_of(make_dataset(events, split=(9, 9)))
    assert [(w.begin, w.end) for w in training_windows(data, 3)] == [(1, 4)]


@quick
@given(seed=seeds, split=splits, n=st.integers(2, 9))
def test_rows_hold_their_window_and_nothing_held_out(
    random_dataset: Make, seed: int, split: tuple[int, int] | None, n: int
) -> None:
    batches = _batches(random_dataset(seed, split=split), max_history=n)
    data, ends = batches.data, _train_ends(batches.data)
    seen = []
    for row in _rows(batches):
        batch, at, events = row.batch, row.at, np.arange(row.begin, row.begin + row.length)
        user = int(np.searchsorted(data.event_start, row.begin, side="right")) - 1
        seen += events.tolist()
        assert batch.lengths[at] == row.length
        assert row.begin + row.length <= ends[user]
        items = batch.item_rows[batch.history_items[at, : row.length]]
        assert items.tolist() == data.rows[events].tolist()
        assert batch.history_actions[at, : row.length].tolist() == data.actions[events].tolist()
        assert batch.history_surfaces[at, : row.length].tolist() == data.surfaces[events].tolist()
        assert batch.history_timestamps_ms[at, : row.length].tolist() == data.timestamps_ms[events].tolist()
        assert not batch.history_actions[at, row.length :].any()
        assert not batch.masked[at, row.length :].any()
        assert (batch.history_timestamps_ms[at, row.length :] == -1).all()
    windows = [i for w in batches.windows for i in range(w.begin, w.end)]
    assert sorted(seen) == sorted(windows), "an epoch is every window once"


@quick
@given(seed=seeds, split=splits, n=st.integers(2, 9))
def test_a_target_is_the_next_event_where_it_is_positive_and_trained_on(
    random_dataset: Make, seed: int, split: tuple[int, int] | None, n: int
) -> None:
    batches = _batches(random_dataset(seed, split=split), max_history=n)
    data, ends = batches.data, _train_ends(batches.data)
    for row in _rows(batches):
        user = int(np.searchsorted(data.event_start, row.begin, side="right")) - 1
        for i in range(row.batch.targets.shape[1]):
            target = int(row.batch.targets[row.at, i])
            following = row.begin + i + 1
            if i < row.length and following < ends[user] and data.actions[following, :2].any():
                assert row.batch.item_rows[target] == data.rows[following]
                assert row.batch.target_actions[row.at, i].tolist() == data.actions[following].tolist()
            else:
                assert target == -1
                assert not row.batch.target_actions[row.at, i].any()


@quick
@given(seed=seeds, split=splits, n=st.integers(2, 9))
def test_candidates_are_whole_slates_that_see_exactly_the_events_before_them(
    random_dataset: Make, seed: int, split: tuple[int, int] | None, n: int
) -> None:
    batches = _batches(random_dataset(seed, split=split), max_history=n, max_candidates=6)
    data = batches.data
    for row in _rows(batches):
        batch, at = row.batch, row.at
        valid = batch.candidate_valid[at]
        assert valid.tolist() == sorted(valid.tolist(), reverse=True), "padding is on the right"
        assert int(valid.sum()) <= 6
        assert not batch.candidate_actions[at, ~valid].any()
        user = int(np.searchsorted(data.event_start, row.begin, side="right")) - 1
        slates = {int(t): s for s, t in enumerate(data.slate_timestamp_ms) if data.slate_user[s] == user}
        same_time = len(slates) < int((data.slate_user == user).sum())
        for c in np.flatnonzero(valid.numpy()):
            time = int(batch.candidate_timestamps_ms[at, c])
            past = [i for i in range(row.begin, row.begin + row.length) if data.timestamps_ms[i] < time]
            assert batch.cutoffs[at, c] == len(past) >= 1
            if not same_time:
                assert batch.candidate_surfaces[at, c] == data.slate_surface[slates[time]]
        if not same_time:
            shown = [int(t) for t in dict.fromkeys(batch.candidate_timestamps_ms[at, valid].tolist())]
            spans = [range(data.slate_start[slates[t]], data.slate_start[slates[t] + 1]) for t in shown]
            where = [i for span in spans for i in span]
            assert batch.item_rows[batch.candidate_items[at, valid]].tolist() == data.slate_rows[where].tolist()
            assert batch.candidate_actions[at, valid].tolist() == data.slate_actions[where].tolist()


@pytest.mark.parametrize("limit", [6, 8])
def test_slates_beyond_the_limit_are_left_out_at_random(make_dataset: Make, limit: int) -> None:
    events = [("ann", "a", "feed", t, "click") for t in range(3)]
    slates = [(s, "ann", "feed", 3 + s, [(i, "") for i in "abc"]) for s in range(4)]
    batches = _batches(make_dataset(events, slates, split=(9, 9)), max_candidates=limit)
    kept = set()
    for epoch in range(30):
        (batch,) = batches.epoch(epoch, [0])
        times = batch.candidate_timestamps_ms[0].tolist()
        assert len(times) == 6
        kept |= set(times)
    assert kept == {3, 4, 5, 6}


def test_of_a_slate_beyond_the_limit_a_part_is_shown_and_the_others_keep_their_room(make_dataset: Make) -> None:
    events = [("ann", "a", "feed", t, "click") for t in range(3)]
    large = [(item, "click" if item in "ab" else "") for item in "abcdefgh"]
    slates = [(0, "ann", "feed", 3, large), *((s, "ann", "feed", 3 + s, [("a", ""), ("b", "")]) for s in (1, 2))]
    batches = _batches(make_dataset(events, slates, split=(9, 9)), max_candidates=5)
    shown, alone = set(), 0
    for epoch in range(60):
        (batch,) = batches.epoch(epoch, [0])
        times, items = batch.candidate_timestamps_ms[0].tolist(), batch.item_rows[batch.candidate_items[0]].tolist()
        assert sorted(times) in ([3] * 5, [4, 4, 5, 5])
        if times[0] == 3:
            alone += 1
            shown |= set(items)
            assert len(set(items)) == 5
            assert batch.candidate_actions[0, :, 0].tolist() == [float(row < 2) for row in items]
            assert batch.cutoffs[0].tolist() == [3] * 5
    assert 10 < alone < 30
    assert shown == set(range(8))


@quick
@given(seed=seeds, split=splits)
def test_sampled_items_are_distinct_sorted_and_hold_every_target(
    random_dataset: Make, seed: int, split: tuple[int, int] | None
) -> None:
    batches = _batches(random_dataset(seed, split=split, items=11), num_negatives=4)
    for batch in batches.epoch(0, range(len(batches))):
        sampled = batch.sampled_items.tolist()
        assert sampled == sorted(set(sampled))
        assert set(batch.targets[batch.targets >= 0].tolist()) <= set(sampled)
        assert batch.sampled_log_q.shape == (len(sampled),)
        assert batch.sampled_log_q.dtype == torch.float32
        assert batch.item_rows.tolist() == sorted(set(batch.item_rows.tolist())), "each item is embedded once"


def test_log_q_is_the_log_of_how_often_an_item_is_expected_to_be_drawn(make_dataset: Make) -> None:
    history = ["a hide", "b click", "c like", "b click", "b", "c click", "d like"]
    events = [("ann", entry[0], "feed", t, entry[2:]) for t, entry in enumerate(history)]
    batches = _batches(make_dataset(events, items=list("abcdefghij"), split=(6, 9)), num_negatives=4)
    (batch,) = batches.epoch(0, [0])
    # Training ends before d. Four targets: b, c, b, c, each half of them; besides, 4 of 10 items are drawn evenly.
    expected = {0: 0.4, 1: 4 * 0.5 + 0.4, 2: 4 * 0.5 + 0.4}
    rows = batch.item_rows[batch.sampled_items].tolist()
    for row, log_q in zip(rows, batch.sampled_log_q.tolist(), strict=True):
        assert log_q == pytest.approx(math.log(expected.get(row, 0.4)), abs=1e-6)
    assert {1, 2} <= set(rows)


def test_the_correction_makes_the_sum_over_a_sample_an_estimate_of_the_sum_over_all_items(make_dataset: Make) -> None:
    """Where items are rarely drawn twice; sums of 1 estimate the number of items, sums of a score its total."""
    rng = np.random.default_rng(0)
    names = [f"i{n:04d}" for n in range(4000)]
    events = [(f"u{u:02d}", str(rng.choice(names)), "feed", t, "click") for u in range(60) for t in range(7)]
    batches = _batches(make_dataset(events, items=names, split=(9, 9)), max_history=7, num_negatives=40)
    totals = []
    for epoch in range(20):
        for batch in batches.epoch(epoch, range(len(batches))):
            weights = torch.exp(-batch.sampled_log_q.double())
            scores = (batch.item_rows[batch.sampled_items] % 10).double()
            totals.append([float(weights.sum()), float((weights * scores).sum())])
    assert len(totals) == 400
    assert np.mean(totals, axis=0) == pytest.approx([4000, 4.5 * 4000], rel=0.06)


def test_at_or_above_the_size_of_the_catalogue_the_softmax_is_full(random_dataset: Make) -> None:
    batches = _batches(random_dataset(3, items=11), num_negatives=11)
    for batch in batches.epoch(0, range(len(batches))):
        assert batch.item_rows[batch.sampled_items].tolist() == list(range(11))
        assert batch.sampled_log_q.tolist() == [0.0] * 11


def test_events_are_masked_at_the_given_rate(make_dataset: Make) -> None:
    events = [("ann", "a", "feed", t, "click") for t in range(4000)]
    dataset = make_dataset(events, split=(4000, 4000))
    (batch,) = _batches(dataset, max_history=4000, mask_probability=0.2).epoch(0, [0])
    assert 0.18 < float(batch.masked.mean()) < 0.22
    assert set(batch.masked.unique().tolist()) == {0.0, 1.0}
    (never,) = _batches(dataset, max_history=4000, mask_probability=0.0).epoch(0, [0])
    assert not never.masked.any()


def _same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(Batch))


def test_a_batch_follows_from_seed_epoch_and_number_alone(random_dataset: Make) -> None:
    dataset = random_dataset(3, users=30)
    whole = list(_batches(dataset).epoch(4, range(10)))
    resumed = list(_batches(dataset).epoch(4, range(6, 10)))
    assert all(_same(a, b) for a, b in zip(whole[6:], resumed, strict=True))
    (other_epoch,) = _batches(dataset).epoch(5, [6])
    (other_seed,) = _batches(dataset, seed=2).epoch(4, [6])
    assert not _same(whole[6], other_epoch)
    assert not _same(whole[6], other_seed)


def test_windows_of_like_length_share_a_batch_and_batches_come_in_random_order(make_dataset: Make) -> None:
    events = [(f"u{u:02d}", "a", "feed", t, "click") for u in range(30) for t in range(2 + u % 3 * 10)]
    batches = _batches(make_dataset(events, split=(99, 99)), batch_size=10, max_history=40)
    lengths = [batch.lengths.tolist() for batch in batches.epoch(0, range(3))]
    assert sorted(map(sorted, lengths)) == [[2] * 10, [12] * 10, [22] * 10]
    assert len({tuple(b.lengths[0].item() for b in batches.epoch(e, range(3))) for e in range(10)}) > 1


def test_the_last_batch_is_smaller(make_dataset: Make) -> None:
    events = [(f"u{u}", "a", "feed", t, "click") for u in range(7) for t in range(2)]
    batches = _batches(make_dataset(events, split=(9, 9)), batch_size=3)
    assert len(batches) == 3
    assert sorted(len(b.lengths) for b in batches.epoch(0, range(3))) == [1, 3, 3]


@pytest.mark.parametrize("split", SPLITS)
def test_history_events_are_candidates_that_see_what_came_before_them(
    random_dataset: Make, split: tuple[int, int] | None
) -> None:
    data = random_dataset(3, split=split)
    plain, batches = _batches(data), _batches(data, history_candidates=4)

    for batch, without in zip(batches.epoch(0, range(len(batches))), plain.epoch(0, range(len(plain))), strict=True):
        slates = without.candidate_items.shape[1]
        assert torch.equal(batch.candidate_actions[:, :slates], without.candidate_actions)
        assert batch.candidate_known[:, :slates].sum(-1).tolist() == (3.0 * without.candidate_valid).tolist()
        assert not without.candidate_logged.any()
        assert not batch.candidate_logged[:, :slates].any()
        assert torch.equal(batch.candidate_logged[:, slates:] > 0, batch.candidate_valid[:, slates:])
        for at in range(len(batch.lengths)):
            length = int(batch.lengths[at])
            valid = batch.candidate_valid[at, slates:]
            indices = batch.cutoffs[at, slates:][valid].tolist()
            assert len(indices) == len(set(indices)) == min(4, length)
            for name in ("items", "actions", "surfaces", "timestamps_ms"):
                drawn = getattr(batch, f"candidate_{name}")[at, slates:][valid]
                assert torch.equal(drawn, getattr(batch, f"history_{name}")[at, indices]), name
            assert torch.equal(batch.candidate_known[at, slates:][valid], batch.history_known[at, indices])


def test_a_batch_without_slates_has_no_candidates(make_dataset: Make) -> None:
    events = [("ann", "a", "feed", t, "click") for t in range(5)]
    (batch,) = _batches(make_dataset(events, split=None)).epoch(0, [0])
    assert batch.candidate_items.shape == (1, 0)
    assert batch.candidate_actions.shape == (1, 0, 3)
    assert batch.cutoffs.shape == batch.candidate_valid.shape == (1, 0)
    assert batch.lengths.tolist() == [3]


def test_a_batch_moves_to_a_device_with_all_its_parts(random_dataset: Make) -> None:
    (batch,) = _batches(random_dataset(3)).epoch(0, [0])
    moved = batch.to(torch.device("meta"))
    assert {getattr(moved, f.name).device.type for f in fields(Batch)} == {"meta"}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([[1, 2], [], [3]], [[1, 2], [-1, -1], [3, -1]]), ([[], []], [[], []]), ([], [])],
)
def test_pad_rows(rows: list[list[int]], expected: list[list[int]]) -> None:
    padded = pad_rows([np.array(row, dtype=np.int64) for row in rows])
    assert padded.tolist() == expected
    assert padded.dtype == np.int64
