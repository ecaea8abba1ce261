from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from quality_runs import popularity_scores

from unipinrec.models.baselines import baselines_of, training_popularity
from unipinrec.models.config import DAY_MS
from unipinrec.models.data.schema import Dataset
from unipinrec.models.data.sequences import Sequences, sequences_of
from unipinrec.models.evaluate import Requests, Split, held_out_requests, metrics_of, rank_catalogue, request_times_ms

MakeData = Callable[..., Dataset]
ACTIONS = ("click", "like", "hide")
POSITIVE = np.array([True, True, False])
DAY, ITEMS = DAY_MS, list("abcde")

quick = settings(max_examples=25, deadline=None)


@pytest.fixture
def shop(make_dataset: MakeData) -> Sequences:
    """`a` is liked of old, `b` this week, `c` today; `e` is only hidden. Two test requests, ten and twelve days in."""
    events = [
        *[(f"old{n}", "a", "feed", n, "click") for n in range(4)],
        *[(f"week{n}", "b", "feed", 5 * DAY + n, "like") for n in range(3)],
        *[(f"today{n}", "c", "feed", 10 * DAY - 9 + n, "click") for n in range(2)],
        *[(f"today{n}", "e", "feed", 10 * DAY - 5, "hide") for n in range(2)],
        ("ann", "e", "feed", 1, "hide"),
        ("ann", "d", "feed", 10 * DAY, "click"),
        ("bob", "e", "feed", 2, "hide"),
        ("bob", "b", "search", 12 * DAY, "click"),
    ]
    return sequences_of(make_dataset(events, items=ITEMS, split=(9 * DAY, 9 * DAY)))


def test_popularity_is_what_each_request_could_know(shop: Sequences) -> None:
    requests = held_out_requests(shop, POSITIVE, "test")
    assert [shop.user_ids[u] for u in requests.users] == ["ann", "bob"]
    found = {name: scores(requests) for name, scores in baselines_of(shop, POSITIVE).items()}
    assert list(found) == ["popular_all_time", "popular_week", "popular_day", "next_item"]
    # Ann's request is not yet in what she could know, two days later it is.
    assert found["popular_all_time"].tolist() == [[4, 3, 2, 0, 0], [4, 3, 2, 1, 0]]
    ties = np.array([4, 3, 2, 0, 0]) / 5
    assert found["popular_week"][0] == pytest.approx(ties + np.array([0, 3, 2, 0, 0]), abs=1e-6)
    assert found["popular_day"][0] == pytest.approx(ties + np.array([0, 0, 2, 0, 0]), abs=1e-6)
    ties = np.array([4, 3, 2, 1, 0]) / 5
    assert found["popular_week"][1] == pytest.approx(ties + np.array([0, 3, 2, 1, 0]), abs=1e-6)
    assert found["popular_day"][1] == pytest.approx(ties, abs=1e-6)
    assert {scores.dtype for scores in found.values()} == {np.dtype(np.float32)}


def test_ranks_of_the_baselines_by_hand(shop: Sequences) -> None:
    requests = held_out_requests(shop, POSITIVE, "test")
    ranks = {
        name: rank_catalogue(shop, requests, scores).tolist() for name, scores in baselines_of(shop, POSITIVE).items()
    }
    # Ann's target d is behind a, b and c everywhere; e was seen. Bob's target is b.
    assert ranks["popular_all_time"] == [3.0, 1.0]
    assert ranks["popular_week"] == [3.0, 0.0]
    assert ranks["popular_day"] == [3.0, 1.0]


@quick
@given(seed=st.integers(0, 10_000), slates=st.sampled_from([0, 25]), split=st.sampled_from([(60, 80), None]))
def test_popularity_equals_its_definition(
    random_dataset: MakeData, seed: int, slates: int, split: tuple[int, int] | None
) -> None:
    data = sequences_of(random_dataset(seed, slates=slates, split=split))
    requests = held_out_requests(data, POSITIVE, "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unipinrec.models.baselines.DAY_MS", 5)
        found = {name: scores(requests) for name, scores in baselines_of(data, POSITIVE).items()}
    training = training_popularity(data, POSITIVE)

    def count(begin: int, end: int) -> NDArray[np.int64]:
        inside = (begin <= data.timestamps_ms) & (data.timestamps_ms < end) & (data.actions[:, :2] > 0).any(axis=1)
        return np.bincount(data.rows[inside], minlength=data.num_items)

    for at, time in enumerate(request_times_ms(data, requests).tolist()):
        if time < 0:
            for name in ("popular_all_time", "popular_week", "popular_day"):
                assert found[name][at].tolist() == training.tolist()
            continue
        all_time = count(-1, time)
        assert found["popular_all_time"][at].tolist() == all_time.tolist()
        ties = all_time / (all_time.max() + 1)
        for name, span in (("popular_week", 35), ("popular_day", 5)):
            assert found[name][at] == pytest.approx(count(max(0, time - span), time) + ties, abs=1e-5)


def test_data_without_times_has_one_popularity(make_dataset: MakeData) -> None:
    """Of the training part: the last two events of each user are not in it."""
    events = [
        (user, item, "feed", None, "click") for user, items in {"ann": "aabcd", "bob": "abde"}.items() for item in items
    ]
    data = sequences_of(make_dataset(events))
    requests = held_out_requests(data, POSITIVE, "test")
    found = baselines_of(data, POSITIVE)
    assert list(found) == ["popular_all_time", "next_item"]
    assert found["popular_all_time"](requests).tolist() == [[3, 2, 0, 0, 0]] * 2
    last = baselines_of(data, POSITIVE, fit_validation=True)
    assert last["popular_all_time"](requests).tolist() == [[3, 2, 1, 1, 0]] * 2


def test_what_followed_the_last_item(make_dataset: MakeData) -> None:
    events = [
        *[
            ("ann", item, "feed", t, acts)
            for t, (item, acts) in enumerate([("a", "click"), ("e", "hide"), ("b", "like")])
        ],
        *[("bob", item, "feed", t, "click") for t, item in enumerate("ab")],
        *[("cat", item, "feed", t, "click") for t, item in enumerate("acc")],
        ("dan", "a", "feed", 1, "click"),
        ("dan", "d", "feed", 90, "click"),  # test: what follows his `a` is held out
        ("eve", "b", "feed", 1, "click"),
        ("eve", "a", "feed", 90, "click"),
    ]
    data = sequences_of(make_dataset(events, items=ITEMS, split=(80, 80)))
    requests = held_out_requests(data, POSITIVE, "test")
    found = baselines_of(data, POSITIVE)["next_item"](requests)
    ties = np.array([4, 3, 2, 0, 0]) / 5  # positive training events: a 4, b 3, c 2
    # After `a` the next positive item was b twice (once past a hidden e) and c once; nothing followed a b.
    assert found[0] == pytest.approx(ties + np.array([0, 2, 1, 0, 0]), abs=1e-6)
    assert found[1] == pytest.approx(ties, abs=1e-6)
    assert rank_catalogue(data, requests, baselines_of(data, POSITIVE)["next_item"]).tolist() == [2.5, 0.0]


def test_without_a_positive_event_nothing_is_popular(make_dataset: MakeData) -> None:
    events = [("ann", item, "feed", t, "hide") for t, item in enumerate("abc")] + [("ann", "d", "feed", 90, "click")]
    data = sequences_of(make_dataset(events, split=(80, 80)))
    requests = held_out_requests(data, POSITIVE, "test")
    assert len(requests) == 1
    for scores in baselines_of(data, POSITIVE).values():
        assert scores(requests).tolist() == [[0.0] * 4]
        assert scores(requests.take(np.zeros(0, np.int64))).shape == (0, 4)


def test_chunks_change_no_rank(random_dataset: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    data = sequences_of(random_dataset(5, users=30, slates=0, items=30, max_events=60))
    requests = held_out_requests(data, POSITIVE, "test")
    assert len(requests) > 40
    scorers = baselines_of(data, POSITIVE)
    whole = {name: rank_catalogue(data, requests, scores).tolist() for name, scores in scorers.items()}
    sizes: list[int] = []

    def noting(name: str, part: Requests) -> NDArray[np.float32]:
        sizes.append(len(part))
        return scorers[name](part)

    monkeypatch.setattr("unipinrec.models.evaluate.SCORES_AT_ONCE", 100)
    assert {name: rank_catalogue(data, requests, partial(noting, name)).tolist() for name in scorers} == whole
    assert max(sizes) == 3


def test_popularity_counts_positive_training_events_and_shrinks_rates(make_dataset: MakeData) -> None:
    dataset = make_dataset(
        events=[
            ("ann", "a", "feed", 1, "click"),
            ("ann", "b", "feed", 2, "like"),
            ("ann", "d", "feed", 3, "hide"),
            ("bob", "b", "feed", 4, "click"),
            ("bob", "d", "feed", 61, "click"),
            ("bob", "d", "feed", 62, "click"),
            ("bob", "d", "feed", 63, "click"),
        ],
        slates=[
            (1, "ann", "feed", 5, [("a", "click"), ("b", "")]),
            (2, "bob", "feed", 6, [("a", ""), ("c", "click hide")]),
            (3, "bob", "feed", 70, [("c", ""), ("a", "like")]),
            (4, "ann", "feed", 90, [("c", "click"), ("b", "")]),
        ],
        split=(60, 80),
    )
    data = sequences_of(dataset)
    requests = held_out_requests(data, POSITIVE, "valid")
    scores = popularity_scores(data, POSITIVE, requests)
    # The one target is `a`, bob has seen b and d; `a` was clicked once before 60 and beats c, which never was.
    assert requests.targets.tolist() == [0]
    assert scores.ranks.tolist() == [0.0]
    # Training slates: 4 rows, 2 clicks, 1 hide; c was shown once (click, hide), a twice (one click). 20 rows of prior.
    expected = [[(1 + 20 * 0.5) / 21, 0.0, (1 + 20 * 0.25) / 21], [(1 + 20 * 0.5) / 22, 0.0, 20 * 0.25 / 22]]
    assert scores.probabilities == pytest.approx(np.array(expected))


@quick
@given(seed=st.integers(0, 10_000), split=st.sampled_from([(60, 80), None]), part=st.sampled_from(["valid", "test"]))
def test_popularity_knows_nothing_held_out(
    random_dataset: MakeData, seed: int, split: tuple[int, int] | None, part: Split
) -> None:
    dataset = random_dataset(seed, split=split)
    data = sequences_of(dataset)
    requests = held_out_requests(data, POSITIVE, part)
    before = popularity_scores(data, POSITIVE, requests)
    if split is None:
        ends = np.repeat(data.event_start[1:], np.diff(data.event_start))
        held = np.arange(len(data.rows)) >= ends - 2
        changed = replace(data, actions=np.where(held[:, None], 1 - data.actions, data.actions))
    else:
        late = pl.col("timestamp_ms").fill_null(-1) >= 60
        flipped = [
            pl.when(late).then(~pl.col(f"action_{a}")).otherwise(pl.col(f"action_{a}")).alias(f"action_{a}")
            for a in ACTIONS
        ]
        other = replace(
            dataset, events=dataset.events.with_columns(flipped), slates=dataset.slates.with_columns(flipped)
        )
        changed = sequences_of(other)
        assert len(dataset.slates) == 0 or not np.array_equal(changed.slate_actions, data.slate_actions)
    after = popularity_scores(changed, POSITIVE, requests)
    assert np.array_equal(before.ranks, after.ranks)
    assert np.array_equal(before.probabilities, after.probabilities)


def test_popularity_without_slates_ranks_only(make_dataset: MakeData) -> None:
    data = sequences_of(make_dataset([("ann", item, "feed", None, "click") for item in "abcd"]))
    requests = held_out_requests(data, POSITIVE, "test")
    scores = popularity_scores(data, POSITIVE, requests)
    assert scores.ranks.tolist() == [0.0], "a, b and c are seen, so d is alone"
    assert scores.probabilities.shape == (0, 3)
    assert metrics_of(scores, data, requests, ACTIONS).ranking is None


def test_where_repeats_count_what_a_user_had_most_often_is_a_baseline(make_dataset: MakeData) -> None:
    events = [("ann", item, "feed", time, "click") for time, item in enumerate("abbca")]
    events += [("bob", "c", "feed", 0, "click"), ("ann", "b", "feed", 20, "click"), ("ann", "e", "feed", 21, "click")]
    data = sequences_of(make_dataset(events, items=ITEMS, split=(10, 10)))
    requests = held_out_requests(data, POSITIVE, "test", repeats=True)
    assert "had_most_often" not in baselines_of(data, POSITIVE)
    scores = baselines_of(data, POSITIVE, repeats=True)["had_most_often"](requests)
    # a, b and c are each had twice of 6 training events: ties of 2 / 3
    np.testing.assert_allclose(scores[0], [2 + 2 / 3, 2 + 2 / 3, 1 + 2 / 3, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(scores[1], [2 + 2 / 3, 3 + 2 / 3, 1 + 2 / 3, 0, 0], rtol=1e-6)
