from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from quality_runs import popularity_scores

from unipinrec.models.data.schema import Dataset
from unipinrec.models.data.sequences import Sequences, sequences_of, vocabulary_of
from unipinrec.models.evaluate import (
    Requests,
    Scores,
    Split,
    gather_scores,
    held_out_requests,
    item_vectors,
    metrics_of,
    model_scores,
    rank_catalogue,
    request_surfaces,
    request_times_ms,
    shown_items,
)
from unipinrec.models.model import CandidateTokens, HistoryTokens, UniPinRec

MakeData = Callable[..., Dataset]
MakeModel = Callable[..., UniPinRec]
POSITIVE = np.array([True, True, False])
ACTIONS = ("click", "like", "hide")

quick = settings(max_examples=25, deadline=None)


def _user(data: Sequences, user: int) -> slice:
    return slice(int(data.event_start[user]), int(data.event_start[user + 1]))


def test_requests_of_a_data_set_by_hand(make_dataset: MakeData) -> None:
    dataset = make_dataset(
        events=[("ann", "a", "feed", 1, "click"), ("ann", "b", "feed", 70, "click"), ("bob", "c", "feed", 90, "")],
        slates=[
            (1, "ann", "feed", 50, [("b", "click")]),  # training
            (2, "ann", "feed", 60, [("d", "hide"), ("c", "like"), ("b", "click")]),  # validation, from its first ms
            (3, "ann", "feed", 79, [("a", "click"), ("b", "like")]),  # validation, but both were seen by then
            (4, "ann", "feed", 80, [("a", "click"), ("d", "click")]),  # test
            (5, "bob", "feed", 90, [("a", "click")]),  # test, but nothing happened before it
            (6, "bob", "feed", 95, [("a", ""), ("b", "hide")]),  # test without a positive item
        ],
        split=(60, 80),
    )
    data = sequences_of(dataset)
    valid, test = (held_out_requests(data, POSITIVE, split) for split in ("valid", "test"))
    assert data.slate_ids[valid.slates].tolist() == [2, 3]
    assert (valid.users.tolist(), valid.ends.tolist()) == ([0, 0], [1, 2])
    assert valid.targets.tolist() == [2, -1]
    assert data.slate_ids[test.slates].tolist() == [4, 6]
    assert (test.users.tolist(), test.ends.tolist()) == ([0, 1], [2, 3])
    assert test.targets.tolist() == [3, -1]


def test_repeats_are_targets_on_request(make_dataset: MakeData) -> None:
    shop = [
        *[("ann", item, "feed", t, "click") for item, t in (("a", 1), ("b", 2), ("a", 90), ("c", 91))],
        ("bob", "a", "feed", 90, "click"),
    ]
    data = sequences_of(make_dataset(shop, items=list("abcd"), split=(60, 80)))
    new, every = (held_out_requests(data, POSITIVE, "test", repeats=repeats) for repeats in (False, True))
    assert (new.users.tolist(), new.targets.tolist()) == ([0], [2])
    assert (every.users.tolist(), every.ends.tolist(), every.targets.tolist()) == ([0, 0], [2, 3], [0, 2])
    # What was seen stays in the catalogue: both targets are behind b, which Ann had.
    scores = np.array([[0.5, 0.9, 0.5, 0.1]], np.float32)
    assert rank_catalogue(data, every, lambda part: np.repeat(scores, len(part), axis=0)).tolist() == [1.5, 1.5]
    assert rank_catalogue(data, new, lambda part: np.repeat(scores, len(part), axis=0)).tolist() == [0.0]
    slates = [(1, "ann", "feed", 90, [("d", ""), ("a", "click"), ("c", "click")])]
    data = sequences_of(make_dataset(shop[:2], slates, items=list("abcd"), split=(60, 80)))
    targets = [held_out_requests(data, POSITIVE, "test", repeats=repeats).targets.tolist() for repeats in (False, True)]
    assert targets == [[2], [0]]
    data = sequences_of(make_dataset([("ann", item, "feed", None, "click") for item in "abcaa"]))
    targets = [held_out_requests(data, POSITIVE, "test", repeats=repeats).targets.tolist() for repeats in (False, True)]
    assert targets == [[-1], [0]]


def test_a_model_is_measured_with_repeats_on_request(make_model: MakeModel, make_dataset: MakeData) -> None:
    """The target has the highest score of all but one item, which is in the history as well."""
    dataset = make_dataset([("ann", item, "feed", None, "click") for item in "abcaa"], items=list("abcdefgh"))
    data, model = sequences_of(dataset), make_model(vocabulary_of(dataset))
    request = held_out_requests(data, POSITIVE, "test", repeats=True)
    ranks = {}
    for target in range(8):
        one = replace(request, targets=np.array([target]))
        for repeats in (True, False):
            [ranks[target, repeats]] = gather_scores(
                list(model_scores(model, data, replace(one, repeats=repeats)))
            ).ranks.tolist()
    assert sorted(ranks[target, True] for target in range(8)) == list(range(8))
    # Without repeats the history's a, b and c are no rivals of the other five.
    assert sorted(ranks[target, False] for target in range(3, 8)) == list(range(5))


def test_requests_know_their_time_and_surface(make_dataset: MakeData) -> None:
    events = [("ann", "a", "feed", 1, "click"), ("ann", "b", "search", 90, "click")]
    slates = [(1, "ann", "search", 85, [("b", "click")]), (2, "ann", "feed", 95, [("c", "")])]
    data = sequences_of(make_dataset(events, slates, split=(60, 80)))
    requests = held_out_requests(data, POSITIVE, "test")
    assert request_times_ms(data, requests).tolist() == [85, 95], "the second slate follows the last event of all"
    assert request_surfaces(data, requests).tolist() == [2, 1]
    data = sequences_of(make_dataset(events, split=(60, 80)))
    requests = held_out_requests(data, POSITIVE, "test")
    assert (request_times_ms(data, requests).tolist(), request_surfaces(data, requests).tolist()) == ([90], [2])
    data = sequences_of(make_dataset([("ann", item, "feed", None, "click") for item in "abc"]))
    requests = held_out_requests(data, POSITIVE, "test")
    assert (request_times_ms(data, requests).tolist(), request_surfaces(data, requests).tolist()) == ([-1], [1])


@quick
@given(seed=st.integers(0, 10_000), split=st.sampled_from(["valid", "test"]))
def test_requests_by_time_equal_their_definition(random_dataset: MakeData, seed: int, split: Split) -> None:
    data = sequences_of(random_dataset(seed))
    requests = held_out_requests(data, POSITIVE, split)
    expected = []
    for slate, user in enumerate(data.slate_user):
        time, events = data.slate_timestamp_ms[slate], _user(data, user)
        seen = [r for r, t in zip(data.rows[events], data.timestamps_ms[events], strict=True) if t < time]
        if not seen or not (60 <= time < 80 if split == "valid" else time >= 80):
            continue
        shown = range(data.slate_start[slate], data.slate_start[slate + 1])
        wanted = [data.slate_rows[i] for i in shown if data.slate_actions[i, :2].any()]
        new = [row for row in wanted if row not in seen]
        expected.append((user, events.start + len(seen), new[0] if new else -1, slate))
    fields = (requests.users, requests.ends, requests.targets, requests.slates)
    assert list(zip(*(f.tolist() for f in fields), strict=True)) == expected


def test_requests_of_engagements_by_hand(make_dataset: MakeData) -> None:
    events = [
        ("ann", "a", "feed", None, "click"),
        ("ann", "b", "feed", 59, "click"),  # training
        ("ann", "c", "feed", 60, "like"),  # validation, from its first ms
        ("ann", "d", "feed", 60, "click"),  # of the same time: neither is in the other's history
        ("ann", "e", "feed", 70, "hide"),  # not positive
        ("ann", "b", "feed", 71, "click"),  # seen before
        ("ann", "f", "feed", 80, "click"),  # test
        ("bob", "a", "feed", 80, "click"),  # test, but nothing happened before it
        ("bob", "b", "feed", 80, "click"),
        ("bob", "c", "feed", 81, "click"),  # test
    ]
    data = sequences_of(make_dataset(events, split=(60, 80)))
    valid, test = (held_out_requests(data, POSITIVE, split) for split in ("valid", "test"))
    assert (valid.users.tolist(), valid.ends.tolist(), valid.targets.tolist()) == ([0, 0], [2, 2], [2, 3])
    assert (test.users.tolist(), test.ends.tolist(), test.targets.tolist()) == ([0, 1], [6, 9], [5, 2])
    assert test.slates.tolist() == [-1, -1]


@quick
@given(seed=st.integers(0, 10_000), split=st.sampled_from(["valid", "test"]))
def test_requests_of_engagements_equal_their_definition(random_dataset: MakeData, seed: int, split: Split) -> None:
    data = sequences_of(random_dataset(seed, slates=0, items=30, max_events=60))
    requests = held_out_requests(data, POSITIVE, split)
    expected = []
    for user in range(data.num_users):
        events = range(*_user(data, user).indices(len(data.rows)))
        for event in events:
            before = [e for e in events if data.timestamps_ms[e] < data.timestamps_ms[event]]
            held_out = 60 <= data.timestamps_ms[event] < 80 if split == "valid" else data.timestamps_ms[event] >= 80
            new = data.rows[event] not in data.rows[before]
            if held_out and data.actions[event, :2].any() and before and new:
                expected.append((user, before[-1] + 1, data.rows[event], -1))
    fields = (requests.users, requests.ends, requests.targets, requests.slates)
    assert list(zip(*(f.tolist() for f in fields), strict=True)) == expected


def test_engagements_are_scored_for_retrieval_alone(make_model: MakeModel, random_dataset: MakeData) -> None:
    dataset = random_dataset(1, slates=0, items=30, max_events=60)
    data = sequences_of(dataset)
    requests = held_out_requests(data, POSITIVE, "test")
    assert len(requests) > 5
    model = make_model(vocabulary_of(dataset))
    for scores in (
        gather_scores(list(model_scores(model, data, requests, batch_size=3))),
        popularity_scores(data, POSITIVE, requests),
    ):
        metrics = metrics_of(scores, data, requests, ACTIONS)
        assert metrics.ranking is None
        assert metrics.retrieval is not None
        assert metrics.retrieval.targets == len(requests)


def test_without_a_split_the_last_two_events_are_held_out(make_dataset: MakeData) -> None:
    events = [
        *[("ann", item, "feed", None, "click") for item in "abcd"],
        *[("bob", item, "feed", None, "click") for item in "ab"],
        ("cat", "a", "feed", None, "click"),
        *[("dan", item, "feed", None, "click") for item in "abab"],  # held-out items were seen before
    ]
    data = sequences_of(make_dataset(events))
    test, valid = held_out_requests(data, POSITIVE, "test"), held_out_requests(data, POSITIVE, "valid")
    assert (test.users.tolist(), test.ends.tolist(), test.targets.tolist()) == ([0, 1, 3], [3, 5, 10], [3, 1, -1])
    assert (valid.users.tolist(), valid.ends.tolist(), valid.targets.tolist()) == ([0, 3], [2, 9], [2, -1])
    assert test.slates.tolist() == [-1, -1, -1]
    assert shown_items(data, test).tolist() == []


def test_a_limit_draws_evenly_and_keeps_the_order(random_dataset: MakeData) -> None:
    data = sequences_of(random_dataset(3, slates=80))
    every = held_out_requests(data, POSITIVE, "test")
    some = held_out_requests(data, POSITIVE, "test", limit=5)
    assert len(every) > 10
    assert len(some) == 5
    chosen = [every.slates.tolist().index(s) for s in some.slates]
    assert chosen == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (0, len(every) - 1)
    assert len(held_out_requests(data, POSITIVE, "test", limit=1000)) == len(every)


@quick
@given(seed=st.integers(0, 10_000))
def test_metrics_pair_each_shown_item_with_its_label_and_user(random_dataset: MakeData, seed: int) -> None:
    data = sequences_of(random_dataset(seed))
    requests = held_out_requests(data, POSITIVE, "test")
    shown = shown_items(data, requests)
    owner = [user for user, s in zip(requests.users, requests.slates, strict=True) for _ in _shown(data, s)]
    assert shown.tolist() == [i for s in requests.slates for i in _shown(data, s)]
    # An oracle that answers with the labels is perfect; one that answers with the user's number has AUC 1/2 per user.
    perfect = Scores(ranks=np.zeros(2), probabilities=data.slate_actions[shown].astype(np.float64))
    constant = Scores(ranks=np.zeros(0), probabilities=np.repeat(np.array(owner, float)[:, None] / 99, 3, axis=1))
    best = metrics_of(perfect, data, requests, ACTIONS)
    chance = metrics_of(constant, data, requests, ACTIONS)
    if not len(shown):
        assert best.ranking is None
        return
    assert best.ranking is not None
    assert chance.ranking is not None
    assert list(best.ranking) == list(ACTIONS)
    assert {m.auc for m in best.ranking.values()} <= {1.0, None}
    assert {m.gauc for m in chance.ranking.values()} <= {0.5, None}
    assert best.retrieval is not None
    assert best.retrieval.targets == 2
    assert chance.retrieval is None


def _shown(data: Sequences, slate: int) -> range:
    return range(data.slate_start[slate], data.slate_start[slate + 1])


def test_the_catalogue_is_ranked_without_what_was_seen(make_dataset: MakeData) -> None:
    data = sequences_of(make_dataset([("ann", item, "feed", None, "click") for item in "abcd"], items=list("abcdef")))
    requests = held_out_requests(data, POSITIVE, "test")
    assert requests.targets.tolist() == [3]
    scores = np.array([[9.0, 9.0, 9.0, 0.5, 0.7, 0.1]], np.float32)
    assert rank_catalogue(data, requests, lambda part: np.repeat(scores, len(part), axis=0)).tolist() == [1.0]


def _alone(model: UniPinRec, data: Sequences, requests: Requests, at: int) -> tuple[float | None, NDArray[np.float32]]:
    """Serve one request as a server would: encode, retrieve, rank."""
    vectors = item_vectors(model, data)
    begin = max(int(data.event_start[requests.users[at]]), int(requests.ends[at]) - model.config.max_history)
    events = slice(begin, int(requests.ends[at]))
    count = torch.tensor([events.stop - events.start])
    history = HistoryTokens(
        vectors=vectors[torch.tensor(data.rows[events])][None],
        actions=torch.tensor(data.actions[events]).float()[None],
        surfaces=torch.tensor(data.surfaces[events])[None],
        timestamps_ms=torch.tensor(data.timestamps_ms[events])[None],
        lengths=count,
    )
    past, last = model.encode(history)
    wanted = torch.tensor([[1.0, 1.0, 0.0]]) if model.config.outcome_conditioned else None
    scores = (model.retrieve(last, wanted)[0, 0] @ vectors.T).tolist()
    target, rank = int(requests.targets[at]), None
    if target >= 0:
        seen = set(data.rows[data.event_start[requests.users[at]] : requests.ends[at]].tolist())
        rest = [s for row, s in enumerate(scores) if row not in seen and row != target]
        rank = float(sum(s > scores[target] for s in rest))
    slate = int(requests.slates[at])
    if slate < 0:
        return rank, np.zeros((0, 3), np.float32)
    rows = torch.tensor(data.slate_rows[_shown(data, slate)])[None]
    candidates = CandidateTokens(
        vectors=vectors[rows],
        surfaces=torch.full_like(rows, int(data.slate_surface[slate])),
        timestamps_ms=torch.full_like(rows, int(data.slate_timestamp_ms[slate])),
        cutoffs=count[:, None].expand(rows.shape),
    )
    logits = model.rank(past, count, history.timestamps_ms[:, -1], candidates)
    return rank, logits[0].sigmoid().numpy()


@pytest.mark.parametrize("split", [(30, 40), None])
@pytest.mark.parametrize("conditioned", [False, True])
def test_scores_of_a_batch_equal_requests_served_one_by_one(
    random_dataset: MakeData, make_model: MakeModel, split: tuple[int, int] | None, conditioned: bool
) -> None:
    """Among them histories longer than the model's window, of which only the newest events count."""
    dataset = random_dataset(4, users=9, items=30, split=split, features=True)
    data = sequences_of(dataset)
    model = make_model(vocabulary_of(dataset), num_kv_heads=2, outcome_conditioned=conditioned)
    requests = held_out_requests(data, POSITIVE, "test")
    assert len(requests) > 5
    assert (requests.ends - data.event_start[requests.users]).max() > model.config.max_history
    scores = gather_scores(list(model_scores(model, data, requests, batch_size=4)))
    with torch.inference_mode():
        alone = [_alone(model, data, requests, at) for at in range(len(requests))]
    assert scores.ranks.tolist() == [rank for rank, _ in alone if rank is not None]
    expected = np.concatenate([probabilities for _, probabilities in alone])
    assert len(expected) == len(shown_items(data, requests))
    np.testing.assert_allclose(scores.probabilities, expected, atol=1e-5)


def test_scoring_leaves_dropout_out(random_dataset: MakeData, make_model: MakeModel) -> None:
    dataset = random_dataset(4, users=9, features=True)
    data = sequences_of(dataset)
    model = make_model(vocabulary_of(dataset), dropout=0.5).train()
    requests = held_out_requests(data, POSITIVE, "test")
    first, second = (gather_scores(list(model_scores(model, data, requests))) for _ in range(2))
    assert np.array_equal(first.probabilities, second.probabilities)
    assert len(first.probabilities) > 3


def test_no_requests_give_no_metrics(random_dataset: MakeData, make_model: MakeModel) -> None:
    dataset = random_dataset(4, split=(80, 80))
    data = sequences_of(dataset)
    requests = held_out_requests(data, POSITIVE, "valid")
    assert len(requests) == 0
    scores = gather_scores(list(model_scores(make_model(vocabulary_of(dataset)), data, requests)))
    metrics = metrics_of(scores, data, requests, ACTIONS)
    assert (metrics.retrieval, metrics.ranking) == (None, None)
    popular = metrics_of(popularity_scores(data, POSITIVE, requests), data, requests, ACTIONS)
    assert (popular.retrieval, popular.ranking) == (None, None)


def test_item_vectors_come_in_row_order_whatever_the_chunk(random_dataset: MakeData, make_model: MakeModel) -> None:
    dataset = random_dataset(4, features=True)
    data = sequences_of(dataset)
    model = make_model(vocabulary_of(dataset))
    whole = item_vectors(model, data)
    assert whole.shape == (11, 8)
    torch.testing.assert_close(item_vectors(model, data, chunk=4), whole)
