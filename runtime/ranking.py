"""What slates are ordered by, for all requests of a group at once (docs/ranking.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unipinrec.runtime.bundle.manifest import Manifest
from unipinrec.runtime.requests import ResolvedRequest
from unipinrec.runtime.retrieval.retriever import CandidateSet


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


def by_retrieval(candidates: Sequence[CandidateSet], asked: Sequence[ResolvedRequest]) -> list[Ranked]:
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Scoring:
    """What the orders that take retrieval into account need of a bundle.

    Attributes:
        positive: [C], 1 for each action that makes an event a target of retrieval.
        retrieval_scale, retrieval_weight: See `OrderSpec`.
    """

    positive: NDArray[np.float64]
    retrieval_scale: float
    retrieval_weight: float

    @classmethod
    def of(cls, manifest: Manifest) -> Scoring | None:
        """None for a bundle that does not say how retrieval was trained."""
        if manifest.order is None:
            return None
        return cls(
            positive=manifest.positive.astype(np.float64),
            retrieval_scale=manifest.order.retrieval_scale,
            retrieval_weight=manifest.order.retrieval_weight,
        )

    def blend(self, values: NDArray[np.float64], similarity: NDArray[np.float32]) -> NDArray[np.float64]:
        """Values [n] times a power of the chance that retrieval gives the items, up to a factor of the request.

        A negative value is divided by it: the nearer item is the better one either way.
        """
        power = self.retrieval_weight * self.retrieval_scale * similarity.astype(np.float64)
        blended: NDArray[np.float64] = values * np.exp(np.sign(values) * power)
        return blended

    def product(
        self, logits: NDArray[np.float32], weights: NDArray[np.float64], similarity: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """Logarithm [n] of value times the chance of an engagement, up to a constant of the request.

        Retrieval learned which item comes next *if* the next event is positive. The chance of an engagement with an
        item is therefore the chance that retrieval gives it, divided by the chance that the event is then positive.

        Args:
            logits: [n, C].
            weights: [C], none negative, one of them positive.
            similarity: [n], with the request's queries.
        """
        wide = logits.astype(np.float64)
        with np.errstate(divide="ignore"):  # a weight of 0 adds nothing
            log_values = np.logaddexp.reduce(np.log(weights) - np.logaddexp(0.0, -wide), axis=-1)
        no_positive = -(np.logaddexp(0.0, wide) @ self.positive)  # logarithm of the chance of none
        log_positive = np.log(np.maximum(-np.expm1(no_positive), np.finfo(np.float64).tiny))
        scores: NDArray[np.float64] = self.retrieval_scale * similarity.astype(np.float64) - log_positive + log_values
        return scores


def rank(
    candidates: Sequence[CandidateSet],
    logits: NDArray[np.float32],
    asked: Sequence[ResolvedRequest],
    scoring: Scoring | None,
) -> list[Ranked]:
    """Order the candidates of each request by value, by blend or by product.

    Args:
        candidates: Of each of B requests.
        logits: [B, n, C]; rows beyond a request's own candidates are padding.
        asked: The requests; none is ordered by retrieval.
        scoring: Of the bundle; None where all requests are ordered by value.
    """
    probabilities, weights = sigmoid(logits), np.stack([one.weights for one in asked])
    values = np.einsum("bnc,bc->bn", probabilities, weights)
    scores, rows = np.full(values.shape, -np.inf), np.full(values.shape, np.iinfo(np.int64).max)
    for index, (found, one) in enumerate(zip(candidates, asked, strict=True)):
        own = (index, slice(len(found.rows)))
        rows[own], scores[own] = found.rows, values[own]
        if scoring is not None and one.order == "blend":
            scores[own] = scoring.blend(values[own], found.similarity)
        elif scoring is not None and one.order == "product":
            scores[own] = scoring.product(logits[own], weights[index], found.similarity)
    # Far from 0 probabilities no longer differ where logits do.
    saturated = np.einsum("bnc,bc->bn", logits.astype(np.float64), weights)
    order = np.lexsort((rows, -saturated, -scores), axis=-1)
    return [
        Ranked(
            order=best, scores=scores[index, best], values=values[index, best], probabilities=probabilities[index, best]
        )
        for index, best in enumerate(order[index, : one.k] for index, one in enumerate(asked))
    ]


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities of logits, in double precision."""
    with np.errstate(over="ignore"):  # beyond -709 the probability is 0
        probabilities: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
    return probabilities
