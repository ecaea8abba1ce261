"""Order, ties, padding and extreme logits of a group of requests."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from unipinrec.runtime.ranking import Scoring, by_retrieval, rank, sigmoid
from unipinrec.runtime.requests import History, Order, ResolvedRequest
from unipinrec.runtime.retrieval.retriever import CandidateSet

SCORING = Scoring(positive=np.array([1.0, 1.0]), retrieval_scale=20.0, retrieval_weight=0.05)
NOTHING = History(
    item_rows=np.zeros(0, np.int64),
    actions=np.zeros((0, 2), np.float32),
    surfaces=np.zeros(0, np.int64),
    timestamps_ms=np.zeros(0, np.int64),
)


def asked(k: int, candidates: int, weights: list[float], order: Order = "value") -> ResolvedRequest:
    return ResolvedRequest(
        user=None,
        history=NOTHING,
        start=0,
        surface=0,
        now_ms=0,
        k=k,
        candidates=candidates,
        order=order,
        weights=np.array(weights),
        outcomes=np.zeros(2, np.float32),
        excluded=np.zeros(0, np.int64),
        allowed=None,
        exact=False,
        own=np.zeros(0, np.int64),
        unknown=(),
    )


def found(rows: list[int], similarity: list[float] | None = None) -> CandidateSet:
    near = np.zeros(len(rows), np.float32) if similarity is None else np.array(similarity, np.float32)
    return CandidateSet(rows=np.array(rows), similarity=near, exact=None)


def logits(*requests: list[list[float]]) -> NDArray[np.float32]:
    return np.array(requests, np.float32)


def test_each_request_is_ordered_by_its_own_weights_and_only_its_own_candidates() -> None:
    given = logits([[0.0, 5.0], [2.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [3.0, 9.0], [99.0, 99.0]])  # the last is padding
    first, second = rank([found([4, 7, 9]), found([8, 2])], given, [asked(2, 3, [1, 0]), asked(2, 2, [0, -1])], None)
    assert first.order.tolist() == [1, 2]
    assert first.scores.tolist() == pytest.approx([0.8807970779778823, 0.7310585786300049])
    assert first.probabilities is not None
    assert first.probabilities[0].tolist() == pytest.approx([0.8807970779778823, 0.5])
    assert second.order.tolist() == [0, 1]
    assert second.scores.tolist() == pytest.approx([-0.5, -0.9998766054240137])


def test_equal_scores_are_in_row_order() -> None:
    (ranked,) = rank([found([9, 3, 5])], logits([[1.0, 0.0]] * 3), [asked(3, 3, [1, 1])], None)
    assert ranked.order.tolist() == [1, 2, 0]


def test_a_product_is_the_chance_of_an_engagement_times_the_value() -> None:
    given = logits([[0.0, -2.0], [1.0, 3.0], [4.0, 4.0]])
    (ranked,) = rank([found([7, 8, 9], [0.5, 0.45, 0.1])], given, [asked(3, 3, [1, 0.5], "product")], SCORING)
    assert ranked.order.tolist() == [0, 1, 2]
    # 20 * .5 + log(.5596015 / .5596015), 20 * .45 + log(1.2073456 / .9872452), 20 * .1 + log(1.4730207 / .9996765)
    assert ranked.scores.tolist() == pytest.approx([10.0, 9.201261, 2.387639], abs=1e-5)
    assert ranked.values is not None
    assert ranked.values.tolist() == pytest.approx([0.5596015, 1.2073456, 1.4730207])


def test_a_blend_is_the_value_times_a_power_of_retrievals_chance() -> None:
    given = logits([[0.0, -2.0], [1.0, 3.0], [4.0, 4.0]])
    near = found([7, 8, 9], [0.9, 0.5, 0.1])
    (ranked,) = rank([near], given, [asked(3, 3, [1, 0], "blend")], SCORING)
    assert ranked.order.tolist() == [0, 1, 2]
    # .5 * e^.9, .7310586 * e^.5, .9820138 * e^.1
    assert ranked.scores.tolist() == pytest.approx([1.2298016, 1.2053118, 1.0852931])
    (ranked,) = rank([near], given, [asked(3, 3, [-1, 0], "blend")], SCORING)
    # -.5 / e^.9, -.7310586 / e^.5, -.9820138 / e^.1: the nearer item is the better one here too
    assert ranked.scores.tolist() == pytest.approx([-0.2032848, -0.4434095, -0.8885637])


def test_of_one_positive_action_retrieval_knows_all() -> None:
    near = found([4, 3, 2, 1], [0.9, 0.8, 0.7, 0.6])
    one = Scoring(positive=np.array([1.0]), retrieval_scale=20.0, retrieval_weight=0.0)
    for values in ([38.0, 45.0, 60.0, 41.0], [0.0, 2.0, 3.0, 1.0]):
        (ranked,) = rank([near], logits([[value] for value in values]), [asked(4, 4, [1], "product")], one)
        assert ranked.order.tolist() == [0, 1, 2, 3]
        assert ranked.scores.tolist() == pytest.approx([18.0, 16.0, 14.0, 12.0])
    (ranked,) = rank([near], logits([[-900.0], [-3e38], [3e38], [900.0]]), [asked(4, 4, [1], "product")], one)
    assert np.isfinite(ranked.scores).all()


def test_logits_order_what_probabilities_no_longer_tell_apart() -> None:
    given = logits([[38.0], [45.0], [60.0], [41.0]])  # each of probability 1
    (ranked,) = rank([found([4, 3, 2, 1])], given, [asked(4, 4, [1])], None)
    assert ranked.order.tolist() == [2, 1, 3, 0]
    assert ranked.scores.tolist() == [1.0, 1.0, 1.0, 1.0]


def test_an_order_by_retrieval_has_no_values() -> None:
    (ranked,) = by_retrieval([found([7, 8, 9], [0.5, 0.4, 0.1])], [asked(2, 3, [1], "retrieval")])
    assert ranked.order.tolist() == [0, 1]
    assert ranked.scores.tolist() == pytest.approx([0.5, 0.4])
    assert (ranked.values, ranked.probabilities) == (None, None)


def test_a_request_gets_the_same_alone_and_with_others() -> None:
    rng = np.random.default_rng(0)
    sizes = [5, 40, 17]
    candidates = [found(rng.permutation(100)[:size].tolist(), rng.uniform(-1, 1, size).tolist()) for size in sizes]
    given = rng.normal(size=(3, 40, 2)).astype(np.float32)
    orders: tuple[Order, ...] = ("value", "product", "blend")
    requests = [
        asked(size // 2, size, rng.uniform(size=2).tolist(), order) for size, order in zip(sizes, orders, strict=True)
    ]
    for index, together in enumerate(rank(candidates, given, requests, SCORING)):
        (alone,) = rank([candidates[index]], given[index : index + 1, : sizes[index]], [requests[index]], SCORING)
        np.testing.assert_array_equal(together.order, alone.order)
        np.testing.assert_array_equal(together.scores, alone.scores)
        np.testing.assert_array_equal(together.probabilities, alone.probabilities)


@pytest.mark.filterwarnings("error")
def test_no_logit_is_too_large_for_a_probability() -> None:
    probabilities = sigmoid(np.array([-3e38, -1e3, -50.0, 0.0, 50.0, 3e38], np.float32))
    assert probabilities.tolist() == pytest.approx([0.0, 0.0, 1.928749847963918e-22, 0.5, 1.0, 1.0], rel=1e-12)
