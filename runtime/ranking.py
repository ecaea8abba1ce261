"""From logits to the order of a slate, for all requests of a group at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unipinrec.runtime.requests import ResolvedRequest
from unipinrec.runtime.retrieval import Candidates


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranked:
    """The k best of a request's candidates.

    Attributes:
        order: [k] i64, their places among the candidates, best first, equal scores in row order.
        scores: [k] f64, weighted sums of their probabilities.
        probabilities: [k, C] f64.
    """

    order: NDArray[np.int64]
    scores: NDArray[np.float64]
    probabilities: NDArray[np.float64]


def rank(
    candidates: Sequence[Candidates], logits: NDArray[np.float32], asked: Sequence[ResolvedRequest]
) -> list[Ranked]:
    """Order the candidates of each request by its weights.

    Args:
        candidates: Of each of B requests.
        logits: [B, n, C]; rows beyond a request's own candidates are padding.
        asked: The requests.
    """
    probabilities = sigmoid(logits)
    scores = np.einsum("bnc,bc->bn", probabilities, np.stack([one.weights for one in asked]))
    rows = np.full(scores.shape, np.iinfo(np.int64).max)
    for place, found in enumerate(candidates):
        rows[place, : len(found.rows)] = found.rows
        scores[place, len(found.rows) :] = -np.inf
    order = np.lexsort((rows, -scores), axis=-1)[:, : max(one.k for one in asked)]
    scores = np.take_along_axis(scores, order, axis=1)
    probabilities = np.take_along_axis(probabilities, order[..., None], axis=1)
    return [
        Ranked(order=order[place, : one.k], scores=scores[place, : one.k], probabilities=probabilities[place, : one.k])
        for place, one in enumerate(asked)
    ]


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities of logits, in double precision."""
    with np.errstate(over="ignore"):  # beyond -709 the probability is 0
        probabilities: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
    return probabilities
