"""Order the slates of a group of requests (docs/ranking.md), and fill them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.manifest import Manifest
from unipinrec.runtime.requests import CandidateSource, ResolvedRequest, SlateItem
from unipinrec.runtime.retrieval.retriever import FOUND, NAMED, CandidateSet

SOURCES: dict[int, CandidateSource] = {FOUND: "retrieval", NAMED: "request", FOUND + NAMED: "both"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranked:
    """The k best of a request's candidates.

    Attributes:
        order: [k] i64, their places among the candidates, best first, equal ones in row order.
        scores: [k] f64, their scores.
        values: [k] f64, weighted sums of their probabilities; None if the ranker did not run.
        probabilities: [k, C] f64; None if the ranker did not run.
    """

    order: NDArray[np.int64]
    scores: NDArray[np.float64]
    values: NDArray[np.float64] | None = None
    probabilities: NDArray[np.float64] | None = None


def by_retrieval(candidates: Sequence[CandidateSet], requests: Sequence[ResolvedRequest]) -> list[Ranked]:
    """The k candidates most similar to each request's queries, in the order of retrieval."""
    return [
        Ranked(order=(first := request.first(nearest.rows)), scores=nearest.similarity[first].astype(np.float64))
        for nearest, request in zip(candidates, requests, strict=True)
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scoring:
    """Properties of a bundle for the orders that use retrieval.

    Attributes:
        positive: [C], 1 for each action that makes an event a target of retrieval.
        retrieval_scale, retrieval_weight: See `OrderSpec`.
    """

    positive: NDArray[np.float64]
    retrieval_scale: float
    retrieval_weight: float

    @classmethod
    def of(cls, manifest: Manifest) -> Scoring | None:
        """None if the bundle does not store how retrieval was trained."""
        if manifest.order is None:
            return None
        return cls(
            positive=manifest.positive.astype(np.float64),
            retrieval_scale=manifest.order.retrieval_scale,
            retrieval_weight=manifest.order.retrieval_weight,
        )

    def blend(self, values: NDArray[np.float64], similarity: NDArray[np.float32]) -> NDArray[np.float64]:
        """Values [n] times a power of retrieval's probability of the items, up to a factor per request.

        A negative value is divided by it, so that the nearer item is always better.
        """
        power = self.retrieval_weight * self.retrieval_scale * similarity.astype(np.float64)
        blended: NDArray[np.float64] = values * np.exp(np.sign(values) * power)
        return blended

    def product(
        self, logits: NDArray[np.float32], weights: NDArray[np.float64], similarity: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """Logarithm [n] of value times the probability of an engagement, up to a constant per request.

        Retrieval learned which item comes next *if* the next event is positive. So the probability of an engagement
        with an item is retrieval's probability of it, divided by the probability of a positive event on it.

        Args:
            logits: [n, C].
            weights: [C], none negative, at least one positive.
            similarity: [n], to the request's queries.
        """
        wide = logits.astype(np.float64)
        with np.errstate(divide="ignore"):  # a weight of 0 adds nothing
            log_values = np.logaddexp.reduce(np.log(weights) - np.logaddexp(0.0, -wide), axis=-1)
        no_positive = -(np.logaddexp(0.0, wide) @ self.positive)  # logarithm of the probability of none
        log_positive = np.log(np.maximum(-np.expm1(no_positive), np.finfo(np.float64).tiny))
        scores: NDArray[np.float64] = self.retrieval_scale * similarity.astype(np.float64) - log_positive + log_values
        return scores


def rank(
    candidates: Sequence[CandidateSet],
    logits: NDArray[np.float32],
    requests: Sequence[ResolvedRequest],
    scoring: Scoring | None,
) -> list[Ranked]:
    """Order the candidates of each request by value, by blend or by product.

    Args:
        candidates: Candidates of each of B requests.
        logits: [B, n, C]; rows after a request's own candidates are padding.
        requests: The requests; none is ordered by retrieval.
        scoring: Scoring of the bundle; None if all requests are ordered by value.
    """
    probabilities, weights = sigmoid(logits), np.stack([request.weights for request in requests])
    values = np.einsum("bnc,bc->bn", probabilities, weights)
    scores, rows = np.full(values.shape, -np.inf), np.full(values.shape, np.iinfo(np.int64).max)
    for index, (nearest, request) in enumerate(zip(candidates, requests, strict=True)):
        own = (index, slice(len(nearest.rows)))
        rows[own], scores[own] = nearest.rows, values[own]
        if scoring is not None and request.order == "blend":
            scores[own] = scoring.blend(values[own], nearest.similarity)
        elif scoring is not None and request.order == "product":
            scores[own] = scoring.product(logits[own], weights[index], nearest.similarity)
    # Logits far from 0 may differ although their probabilities are equal.
    saturated = np.einsum("bnc,bc->bn", logits.astype(np.float64), weights)
    order = np.lexsort((rows, -saturated, -scores), axis=-1)
    return [
        Ranked(order=best, scores=scores[row, best], values=values[row, best], probabilities=probabilities[row, best])
        for row, best in enumerate(map(_first, candidates, order, requests))
    ]


def _first(candidates: CandidateSet, order: NDArray[np.int64], request: ResolvedRequest) -> NDArray[np.int64]:
    """The places among a request's candidates that its slate has; padding is last in the order."""
    order = order[: len(candidates.rows)]
    return order[request.first(candidates.rows[order])]


def slate_items(bundle: Bundle, candidates: CandidateSet, ranked: Ranked) -> tuple[SlateItem, ...]:
    """The best of a request's candidates, best first."""
    columns = (candidates.rows[ranked.order], ranked.scores, candidates.similarity[ranked.order])
    values: Iterable[float | None] = repeat(None) if ranked.values is None else ranked.values.tolist()
    by_action: Iterable[list[float]] = repeat([]) if ranked.probabilities is None else ranked.probabilities.tolist()
    sources = repeat(FOUND) if candidates.sources is None else candidates.sources[ranked.order].tolist()
    return tuple(
        SlateItem(
            item=bundle.item_ids[row],
            title=bundle.titles[row],
            metadata=bundle.catalogue.metadata_of(row),
            score=score,
            value=value,
            actions=dict(zip(bundle.manifest.actions, probabilities, strict=False)),
            retrieval_score=similarity,
            source=SOURCES[source],
        )
        for row, score, similarity, value, probabilities, source in zip(
            *(column.tolist() for column in columns), values, by_action, sources, strict=False
        )
    )


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities of logits, in double precision."""
    with np.errstate(over="ignore"):  # beyond -709 the probability is 0
        probabilities: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
    return probabilities
