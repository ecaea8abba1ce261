"""Order, ties, padding and extreme logits of a group of requests."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from unipinrec.runtime.ranking import rank, sigmoid
from unipinrec.runtime.requests import History, ResolvedRequest
from unipinrec.runtime.retrieval import Candidates

NOTHING = History(
    item_rows=np.zeros(0, np.int64),
    actions=np.zeros((0, 2), np.float32),
    surfaces=np.zeros(0, np.int64),
    timestamps_ms=np.zeros(0, np.int64),
)


def asked(k: int, candidates: int, weights: list[float]) -> ResolvedRequest:
    return ResolvedRequest(
        user=None,
        history=NOTHING,
        start=0,
        surface=0,
        now_ms=0,
        k=k,
        candidates=candidates,
        weights=np.array(weights),
        outcomes=np.zeros(2, np.float32),
        excluded=np.zeros(0, np.int64),
        allowed=None,
        exact=False,
    )


def found(rows: list[int]) -> Candidates:
    return Candidates(rows=np.array(rows), similarity=np.zeros(len(rows), np.float32), exact=None)


def logits(*requests: list[list[float]]) -> NDArray[np.float32]:
    return np.array(requests, np.float32)


def test_each_request_is_ordered_by_its_own_weights_and_only_its_own_candidates() -> None:
    given = logits([[0.0, 5.0], [2.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [3.0, 9.0], [99.0, 99.0]])  # the last is padding
    first, second = rank([found([4, 7, 9]), found([8, 2])], given, [asked(2, 3, [1, 0]), asked(2, 2, [0, -1])])
    assert first.order.tolist() == [1, 2]
    assert first.scores.tolist() == pytest.approx([0.8807970779778823, 0.7310585786300049])
    assert first.probabilities[0].tolist() == pytest.approx([0.8807970779778823, 0.5])
    assert second.order.tolist() == [0, 1]
    assert second.scores.tolist() == pytest.approx([-0.5, -0.9998766054240137])


def test_equal_scores_are_in_row_order() -> None:
    (ranked,) = rank([found([9, 3, 5])], logits([[1.0, 0.0]] * 3), [asked(3, 3, [1, 1])])
    assert ranked.order.tolist() == [1, 2, 0]


def test_a_request_gets_the_same_alone_and_with_others() -> None:
    rng = np.random.default_rng(0)
    sizes = [5, 40, 17]
    candidates = [found(rng.permutation(100)[:size].tolist()) for size in sizes]
    given = rng.normal(size=(3, 40, 2)).astype(np.float32)
    requests = [asked(size // 2, size, rng.normal(size=2).tolist()) for size in sizes]
    for place, together in enumerate(rank(candidates, given, requests)):
        (alone,) = rank([candidates[place]], given[place : place + 1, : sizes[place]], [requests[place]])
        np.testing.assert_array_equal(together.order, alone.order)
        np.testing.assert_array_equal(together.scores, alone.scores)
        np.testing.assert_array_equal(together.probabilities, alone.probabilities)


@pytest.mark.filterwarnings("error")
def test_no_logit_is_too_large_for_a_probability() -> None:
    probabilities = sigmoid(np.array([-3e38, -1e3, -50.0, 0.0, 50.0, 3e38], np.float32))
    assert probabilities.tolist() == pytest.approx([0.0, 0.0, 1.928749847963918e-22, 0.5, 1.0, 1.0], rel=1e-12)
