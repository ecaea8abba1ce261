"""Full-catalogue retrieval metrics and per-action ranking metrics. No sampled metrics."""

from __future__ import annotations

from collections.abc import Collection

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray


class RetrievalMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Hit rate and NDCG by cut-off k, and MRR, over `targets` requests with one target each.

    `hit_rate_se` and `ndcg_se` are their standard errors over the requests; empty for fewer than two requests, and in
    files of earlier versions.
    """

    hit_rate: dict[int, float]
    ndcg: dict[int, float]
    mrr: float
    targets: int
    hit_rate_se: dict[int, float] = {}
    ndcg_se: dict[int, float] = {}


class ActionMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """How well one action is predicted on shown items.

    Attributes:
        auc: Over all rows; None if only one class occurs.
        gauc: AUC per user, weighted by rows, over users with both classes; None without such users.
        logloss: Mean negative log-likelihood in nats.
        rate: Share of positive rows.
        rows: Rows scored.
    """

    auc: float | None
    gauc: float | None
    logloss: float
    rate: float
    rows: int


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """Retrieval and ranking quality of one scorer; a part is None if the data cannot measure it."""

    retrieval: RetrievalMetrics | None
    ranking: dict[str, ActionMetrics] | None

    def trained_part(self, *, retrieval: bool, actions: Collection[str]) -> Metrics:
        """The metrics of the trained heads; figures of others are chance. `actions` names the trained actions."""
        ranking = {name: measured for name, measured in (self.ranking or {}).items() if name in actions}
        return Metrics(retrieval=self.retrieval if retrieval else None, ranking=ranking or None)

    def selection_score(self) -> float:
        """The score that chooses the best epoch: NDCG@10 plus the mean AUC of the actions.

        AUCs are weighted by positive rows, so that an action with few positives does not decide by chance.
        """
        score = self.retrieval.ndcg[10] if self.retrieval else 0.0
        measured = [(m.auc, m.rate * m.rows) for m in (self.ranking or {}).values() if m.auc is not None]
        if measured:
            aucs, weights = zip(*measured, strict=True)
            score += float(np.average(aucs, weights=weights))
        return score


def target_ranks(
    scores: NDArray[np.float32], seen: list[NDArray[np.int64]], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """0-based rank of each row's target among the unseen catalogue; ties count half.

    Args:
        scores: [R, N]; overwritten where seen.
        seen: Per row the catalogue rows to leave out; the target is never left out. Missing rows leave out nothing.
        targets: [R] catalogue rows; a target whose score is not a number ranks behind everything.
    """
    at = np.arange(len(targets))
    own = scores[at, targets].copy()
    for row, items in enumerate(seen):
        scores[row, items] = -np.inf
    scores[at, targets] = own
    # "Not lower or level" instead of "higher": a score that is not a number must never look good.
    better = (~(scores <= own[:, None])).sum(axis=1)
    level = np.maximum((scores == own[:, None]).sum(axis=1) - 1, 0)
    ranks: NDArray[np.float64] = better + level / 2.0
    return ranks


def retrieval_metrics(ranks: NDArray[np.float64], cutoffs: tuple[int, ...] = (1, 10, 50)) -> RetrievalMetrics | None:
    """Metrics of 0-based ranks; None if there are none."""
    if not len(ranks):
        return None
    measured = cutoffs if len(ranks) > 1 else ()
    return RetrievalMetrics(
        hit_rate={k: float(hits(ranks, k).mean()) for k in cutoffs},
        ndcg={k: float(gains(ranks, k).mean()) for k in cutoffs},
        mrr=float((1.0 / (ranks + 1.0)).mean()),
        targets=len(ranks),
        hit_rate_se={k: standard_error(hits(ranks, k)) for k in measured},
        ndcg_se={k: standard_error(gains(ranks, k)) for k in measured},
    )


def hits(ranks: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """[R] 1 if the target of a 0-based rank is among the first k; their mean is the hit rate."""
    return (ranks < k).astype(np.float64)


def gains(ranks: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """[R] discounted gain of the target among the first k; their mean is NDCG."""
    discounted: NDArray[np.float64] = (ranks < k) / np.log2(ranks + 2.0)
    return discounted


def standard_error(values: NDArray[np.float64]) -> float:
    """Standard error of the mean of at least two values.

    To compare two scorers on the same requests, pass the differences of their values: the paired standard error.
    """
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def action_metrics(
    users: NDArray[np.int64], labels: NDArray[np.uint8], probabilities: NDArray[np.float64]
) -> ActionMetrics:
    """AUC, GAUC and logloss of one action; all arguments are [rows].

    A probability that is not a number counts as the worst mistake about its label.
    """
    worst = np.where(labels > 0, -np.inf, np.inf)
    probabilities = np.where(np.isnan(probabilities), worst, probabilities)
    frame = pl.DataFrame({"user": users, "label": labels.astype(np.float64), "score": probabilities})
    by_user = frame.group_by("user", maintain_order=True).agg(_auc(), pl.len().alias("rows")).drop_nulls("auc")
    auc, rows = by_user["auc"].to_numpy(), by_user["rows"].to_numpy()
    clipped = np.clip(probabilities, 1e-7, 1 - 1e-7)
    return ActionMetrics(
        auc=frame.select(_auc())["auc"][0],
        gauc=float(np.average(auc, weights=rows)) if len(rows) else None,
        logloss=float(-np.where(labels > 0, np.log(clipped), np.log1p(-clipped)).mean()),
        rate=float(labels.mean()),
        rows=len(labels),
    )


def _auc() -> pl.Expr:
    """Mann-Whitney AUC with ties at half; null if only one class occurs."""
    positives = pl.col("label").sum()
    negatives = pl.len() - positives
    rank_sum = (pl.col("score").rank("average") * pl.col("label")).sum()
    auc = (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
    return pl.when((positives > 0) & (negatives > 0)).then(auc).alias("auc")
