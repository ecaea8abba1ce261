"""What a slate is ordered by, for all requests of a group at once (docs/ranking.md)."""

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
        order: [k] i64, their places among the candidates, best first, equal ones in row order.
        scores: [k] f64, what they are ordered by.
        values: [k] f64, weighted sums of their probabilities; None where the ranker did not run.
        probabilities: [k, C] f64; None likewise.
    """

    order: NDArray[np.int64]
    scores: NDArray[np.float64]
    values: NDArray[np.float64] | None
    probabilities: NDArray[np.float64] | None


def by_retrieval(candidates: Sequence[Candidates], asked: Sequence[ResolvedRequest]) -> list[Ranked]:
    """The k candidates that are most similar to each request's queries, as retrieval orders them."""
    return [
        Ranked(
            order=np.arange(one.k),
            scores=found.similarity[: one.k].astype(np.float64),
            values=None,
            probabilities=None,
        )
        for found, one in zip(candidates, asked, strict=True)
    ]


def rank(
    candidates: Sequence[Candidates],
    logits: NDArray[np.float32],
    asked: Sequence[ResolvedRequest],
    retrieval_scale: float,
) -> list[Ranked]:
    """Order the candidates of each request by value, or by value times the chance that retrieval gives them.

    Args:
        candidates: Of each of B requests.
        logits: [B, n, C]; rows beyond a request's own candidates are padding.
        asked: The requests; none is ordered by retrieval.
        retrieval_scale: See `OrderSpec`; of no effect where no request is ordered by product.
    """
    probabilities, weights = sigmoid(logits), np.stack([one.weights for one in asked])
    values = np.einsum("bnc,bc->bn", probabilities, weights)
    scores, rows = np.full(values.shape, -np.inf), np.full(values.shape, np.iinfo(np.int64).max)
    for place, (found, one) in enumerate(zip(candidates, asked, strict=True)):
        own = slice(len(found.rows))
        rows[place, own] = found.rows
        if one.order == "product":
            scores[place, own] = product_scores(logits[place, own], weights[place], found.similarity, retrieval_scale)
        else:
            scores[place, own] = values[place, own]
    # Far from 0 probabilities no longer differ where logits do.
    saturated = np.einsum("bnc,bc->bn", logits.astype(np.float64), weights)
    order = np.lexsort((rows, -saturated, -scores), axis=-1)
    return [
        Ranked(
            order=best, scores=scores[place, best], values=values[place, best], probabilities=probabilities[place, best]
        )
        for place, best in enumerate(order[place, : one.k] for place, one in enumerate(asked))
    ]


def product_scores(
    logits: NDArray[np.float32],
    weights: NDArray[np.float64],
    similarity: NDArray[np.float32],
    retrieval_scale: float,
) -> NDArray[np.float64]:
    """Logarithm [n] of value times the chance that retrieval gives an item, up to a constant of the request.

    Args:
        logits: [n, C].
        weights: [C], none negative, one of them positive.
        similarity: [n], with the request's queries.
        retrieval_scale: See `OrderSpec`.
    """
    with np.errstate(divide="ignore"):  # a weight of 0 adds nothing
        log_values = np.logaddexp.reduce(np.log(weights) - np.logaddexp(0.0, -logits.astype(np.float64)), axis=-1)
    scores: NDArray[np.float64] = retrieval_scale * similarity.astype(np.float64) + log_values
    return scores


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities of logits, in double precision."""
    with np.errstate(over="ignore"):  # beyond -709 the probability is 0
        probabilities: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
    return probabilities
