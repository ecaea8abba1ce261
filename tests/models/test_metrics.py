from __future__ import annotations

import math
from itertools import product

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unipinrec.models.metrics import (
    ActionMetrics,
    Metrics,
    RetrievalMetrics,
    action_metrics,
    gains,
    hits,
    retrieval_metrics,
    standard_error,
    target_ranks,
)

quick = settings(max_examples=50, deadline=None)


def _auc(labels: NDArray[np.uint8], scores: NDArray[np.float64]) -> float | None:
    """The share of (positive, negative) pairs in the right order, ties counting half: the definition."""
    pairs = list(product(scores[labels == 1], scores[labels == 0]))
    return sum((p > n) + (p == n) / 2 for p, n in pairs) / len(pairs) if pairs else None


def _drawn(seed: int, rows: int) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.float64]]:
    """Few distinct scores, so that ties are common."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(rows) < 0.4).astype(np.uint8)
    return rng.integers(0, 4, rows), labels, rng.choice([0.1, 0.3, 0.5, 0.9], rows)


def test_action_metrics_of_a_few_rows() -> None:
    users = np.array([1, 1, 1, 2, 2, 3])
    labels = np.array([1, 0, 0, 1, 0, 1], np.uint8)
    metrics = action_metrics(users, labels, np.array([0.8, 0.8, 0.2, 0.4, 0.5, 0.9]))
    # pairs of (positive, negative): .8 beats .2 and .5, ties .8; .4 beats .2; .9 beats all three
    assert metrics.auc == pytest.approx((2.5 + 1 + 3) / 9)
    # user 1: 1.5 of 2 pairs over 3 rows; user 2: 0 of 1 over 2 rows; user 3 has one class only
    assert metrics.gauc == pytest.approx((0.75 * 3 + 0.0 * 2) / 5)
    logs = [0.8, 1 - 0.8, 1 - 0.2, 0.4, 1 - 0.5, 0.9]
    assert metrics.logloss == pytest.approx(-sum(map(math.log, logs)) / 6)
    assert (metrics.rate, metrics.rows) == (0.5, 6)


@quick
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 40))
def test_auc_and_gauc_equal_their_definition(seed: int, rows: int) -> None:
    users, labels, scores = _drawn(seed, rows)
    metrics = action_metrics(users, labels, scores)
    expected = _auc(labels, scores)
    assert metrics.auc == (None if expected is None else pytest.approx(expected))
    parts = [(_auc(labels[users == u], scores[users == u]), int((users == u).sum())) for u in range(4)]
    counted = [(auc, count) for auc, count in parts if auc is not None]
    if counted:
        expected = sum(auc * count for auc, count in counted) / sum(count for _, count in counted)
        assert metrics.gauc == pytest.approx(expected)
    else:
        assert metrics.gauc is None


@pytest.mark.parametrize("seed", range(5))
def test_the_same_rows_give_the_same_last_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    users, labels, scores = rng.integers(0, 30, 300), (rng.random(300) < 0.3).astype(np.uint8), rng.random(300)
    assert len({action_metrics(users, labels, scores).gauc for _ in range(20)}) == 1


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_has_no_auc_but_a_logloss(label: int) -> None:
    metrics = action_metrics(np.zeros(3, np.int64), np.full(3, label, np.uint8), np.full(3, 0.25))
    assert (metrics.auc, metrics.gauc, metrics.rate) == (None, None, label)
    assert metrics.logloss == pytest.approx(-math.log(0.25 if label else 0.75))


def test_a_certain_mistake_costs_much_but_not_everything() -> None:
    metrics = action_metrics(np.zeros(2, np.int64), np.array([1, 0], np.uint8), np.array([0.0, 1.0]))
    assert metrics.logloss == pytest.approx(-math.log(1e-7), rel=1e-6)


def test_a_probability_that_is_not_a_number_never_looks_good() -> None:
    users, labels = np.array([1, 1, 1, 2, 2]), np.array([1, 0, 0, 0, 1], np.uint8)
    for lost in range(5):
        probabilities = np.array([0.9, 0.1, 0.2, 0.3, 0.8])
        assert action_metrics(users, labels, probabilities).auc == 1.0
        probabilities[lost] = np.nan
        found = action_metrics(users, labels, probabilities)
        assert found.auc is not None
        assert found.gauc is not None
        assert max(found.auc, found.gauc) < 1.0
        assert found.logloss > -math.log(1e-7) / 5
    found = action_metrics(users, labels, np.full(5, np.nan))
    assert (found.auc, found.gauc) == (0.0, 0.0)
    assert found.logloss == pytest.approx(-math.log(1e-7), rel=1e-6)


def test_ranks_among_unseen_items() -> None:
    scores = np.array([[0.9, 0.5, 0.7, 0.5, 0.1]] * 4, np.float32)
    seen = [np.array([], np.int64), np.array([0]), np.array([0, 2, 0]), np.array([3, 1])]
    ranks = target_ranks(scores, seen, np.array([1, 1, 1, 1]))
    # items 0 and 2 are better, item 3 ties; then item 0 is seen, then 0 and 2, then the tie and the target itself
    assert ranks.tolist() == [2.5, 1.5, 0.5, 2.0]


@quick
@given(seed=st.integers(0, 10_000))
def test_ranks_equal_a_count_over_the_catalogue(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.choice([0.0, 0.25, 0.5, 1.0], (5, 12)).astype(np.float32)
    seen = [rng.integers(0, 12, rng.integers(0, 9)) for _ in range(5)]
    targets = rng.integers(0, 12, 5)
    expected = []
    for row, target in enumerate(targets):
        rest = [s for i, s in enumerate(scores[row]) if i != target and i not in set(seen[row])]
        own = scores[row, target]
        expected.append(sum(s > own for s in rest) + sum(s == own for s in rest) / 2)
    assert target_ranks(scores.copy(), seen, targets).tolist() == expected


def test_a_score_that_is_not_a_number_never_looks_good() -> None:
    scores = np.full((2, 6), np.nan, np.float32)
    scores[1, 3] = 0.5
    ranks = target_ranks(scores, [np.array([0])] * 2, np.array([3, 3]))
    assert ranks.min() >= 4.0
    metrics = retrieval_metrics(ranks, cutoffs=(1, 3))
    assert metrics is not None
    assert metrics.hit_rate == {1: 0.0, 3: 0.0}


def test_retrieval_metrics_of_a_few_ranks() -> None:
    metrics = retrieval_metrics(np.array([0.0, 2.0, 9.0, 9.5, 10.0, 0.5]))
    assert metrics is not None
    # 9.5 is a tie across the boundary: it counts as inside; 10.0 is the eleventh place
    assert metrics.hit_rate == {1: pytest.approx(2 / 6), 10: pytest.approx(5 / 6), 50: 1.0}
    gains = [1.0, 1 / math.log2(4), 1 / math.log2(11), 1 / math.log2(11.5), 1 / math.log2(12), 1 / math.log2(2.5)]
    assert metrics.ndcg[1] == pytest.approx((gains[0] + gains[5]) / 6)
    assert metrics.ndcg[10] == pytest.approx(sum(g for i, g in enumerate(gains) if i != 4) / 6)
    assert metrics.ndcg[50] == pytest.approx(sum(gains) / 6)
    assert metrics.mrr == pytest.approx((1 + 1 / 3 + 1 / 10 + 1 / 10.5 + 1 / 11 + 1 / 1.5) / 6)
    assert metrics.targets == 6


def test_standard_errors_of_a_few_ranks() -> None:
    metrics = retrieval_metrics(np.array([0.0, 2.0, 30.0, 60.0]), cutoffs=(10,))
    assert metrics is not None
    # hits 1, 1, 0, 0: variance 1/3 over n - 1; gains 1, 1/2, 0, 0: mean 3/8, squares sum to 11/16
    assert metrics.hit_rate_se == {10: pytest.approx(math.sqrt(1 / 3 / 4))}
    assert metrics.ndcg_se == {10: pytest.approx(math.sqrt(11 / 16 / 3 / 4))}
    alone = retrieval_metrics(np.array([3.0]))
    assert alone is not None
    assert (alone.hit_rate_se, alone.ndcg_se) == ({}, {})


def test_the_paired_error_is_smaller_where_two_scorers_agree() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 40, 500).astype(np.float64)
    second = first + (rng.random(500) < 0.1)
    paired = standard_error(gains(first, 10) - gains(second, 10))
    alone = math.hypot(standard_error(gains(first, 10)), standard_error(gains(second, 10)))
    assert paired < alone / 5
    assert standard_error(hits(np.array([0.0, 0.0, 20.0]), 10) - hits(np.array([0.0, 20.0, 20.0]), 10)) == (
        pytest.approx(1 / 3)
    )


def test_metrics_of_earlier_versions_have_no_standard_errors() -> None:
    old = b'{"hit_rate": {"10": 0.5}, "ndcg": {"10": 0.25}, "mrr": 0.2, "targets": 4}'
    expected = RetrievalMetrics(hit_rate={10: 0.5}, ndcg={10: 0.25}, mrr=0.2, targets=4)
    assert msgspec.json.decode(old, type=RetrievalMetrics) == expected


def test_no_targets_have_no_metrics() -> None:
    assert retrieval_metrics(np.zeros(0)) is None


def _action(auc: float | None, rate: float, rows: int) -> ActionMetrics:
    return ActionMetrics(auc=auc, gauc=None, logloss=0.5, rate=rate, rows=rows)


def test_the_selection_score_weighs_actions_by_their_positive_rows() -> None:
    retrieval = RetrievalMetrics(hit_rate={10: 0.5}, ndcg={10: 0.25}, mrr=0.2, targets=4)
    ranking = {"click": _action(0.8, 0.3, 100), "like": _action(0.6, 0.1, 100), "hide": _action(None, 0.0, 100)}
    assert Metrics(retrieval=retrieval, ranking=ranking).selection_score() == pytest.approx(0.25 + 0.75)
    assert Metrics(retrieval=None, ranking=ranking).selection_score() == pytest.approx(0.75)
    assert Metrics(retrieval=retrieval, ranking=None).selection_score() == 0.25
    assert Metrics(retrieval=None, ranking={"hide": _action(None, 0.0, 5)}).selection_score() == 0.0


def test_only_the_heads_that_were_trained_are_left() -> None:
    retrieval = RetrievalMetrics(hit_rate={10: 0.5}, ndcg={10: 0.25}, mrr=0.2, targets=4)
    whole = Metrics(retrieval=retrieval, ranking={"click": _action(0.8, 0.3, 100), "hide": _action(0.1, 0.3, 100)})
    part = whole.trained_part(retrieval=True, actions=["click"])
    assert part == Metrics(retrieval=retrieval, ranking={"click": _action(0.8, 0.3, 100)})
    assert part.selection_score() == pytest.approx(0.25 + 0.8)
    assert whole.trained_part(retrieval=False, actions=[]) == Metrics(retrieval=None, ranking=None)


def test_metrics_survive_json() -> None:
    retrieval = RetrievalMetrics(hit_rate={1: 0.1, 10: 0.5}, ndcg={10: 0.25}, mrr=0.2, targets=4)
    metrics = Metrics(retrieval=retrieval, ranking={"hide": _action(None, 0.0, 5)})
    assert msgspec.json.decode(msgspec.json.encode(metrics), type=Metrics) == metrics


def test_a_scorer_that_follows_its_users_outcomes_gains_auc_and_loses_gauc() -> None:
    """Users of constant taste: to follow it by what they did helps, and GAUC falls; to know it leaves GAUC alone."""
    rng = np.random.default_rng(0)
    rows = 12
    taste, appeal = rng.normal(-0.8, 1.0, (2000, 1)), rng.normal(0.0, 1.0, (2000, rows))
    labels = (rng.random(appeal.shape) < 1 / (1 + np.exp(-taste - appeal))).astype(np.uint8)
    earlier = np.cumsum(labels, axis=1) - labels
    rate = (earlier + 20 * labels.mean()) / (np.arange(rows) + 20)
    users = np.repeat(np.arange(len(labels)), rows)
    scorers = {"blind": appeal, "following": appeal + np.log(rate / (1 - rate)), "knowing": appeal + taste}
    found = {name: action_metrics(users, labels.ravel(), scores.ravel()) for name, scores in scorers.items()}
    assert (found["blind"].auc, found["blind"].gauc) == pytest.approx((0.7099, 0.7394), abs=1e-4)
    assert (found["following"].auc, found["following"].gauc) == pytest.approx((0.7361, 0.7193), abs=1e-4)
    assert (found["knowing"].auc, found["knowing"].gauc) == pytest.approx((0.8009, 0.7394), abs=1e-4)
