"""Quality of a bundle's answers in every order: each request is answered once, with all its candidates.

A model is exported to a temporary bundle and driven by `Recommender`, as it is served: items of the history are left
out, 200 candidates are ranked, ten are shown. The answers hold what every order is computed from: the similarity with
the query and the probability of each action. All items are scanned, so that no difference is the index's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.export.bundle_writer import export_bundle
from unipinrec.export.servable import source_from_model
from unipinrec.models.checkpoint import ItemList
from unipinrec.models.data.schema import Dataset
from unipinrec.models.data.sequences import Sequences
from unipinrec.models.evaluate import NO_SLATE, Requests
from unipinrec.models.model import UniPinRec
from unipinrec.runtime import Event, Recommender, RecommendOptions, Request
from unipinrec.runtime.bundle.manifest import OrderSpec
from unipinrec.runtime.requests import Slate

CANDIDATES = 200
SERVED = 10
GROUP = 64
LAMBDAS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lists:
    """Answers to R requests: rows [R, K] i64, -1 where padded; similarity [R, K]; probabilities [R, K, C]."""

    rows: NDArray[np.int64]
    similarity: Floats
    probabilities: Floats

    def ten(self, scores: Floats) -> NDArray[np.int64]:
        """Catalogue rows [R, 10] of the best by scores [R, K], equal ones in the order of their rows."""
        scores = np.where(self.rows >= 0, scores, -np.inf)
        order = np.lexsort((self.rows, -scores), axis=-1)[:, :SERVED]
        return np.take_along_axis(self.rows, order, axis=1)


@contextmanager
def served(model: UniPinRec, dataset: Dataset, data: Sequences) -> Iterator[tuple[Recommender, float]]:
    """A recommender of the model's bundle, and the factor of a similarity in retrieval's softmax."""
    scale = float(model.log_scale.detach().clamp(max=5.0).exp())
    catalogue = ItemList(item_ids=data.item_ids, titles=dataset.items["title"].to_list())
    order = OrderSpec(by="product", retrieval_scale=scale, reason="this benchmark compares all orders")
    source = replace(source_from_model(model, catalogue, data.features), order=order)
    with tempfile.TemporaryDirectory() as folder:
        export_bundle(source, Path(folder) / "bundle")
        with Recommender.load(Path(folder) / "bundle", "cpu", threads=1) as recommender:
            yield recommender, scale


def answers(recommender: Recommender, data: Sequences, requests: Requests, *, shown: bool = False) -> Lists:
    """Answer requests with all their candidates, or with exactly the items of their slates where `shown`."""
    slates: list[Slate] = []
    for begin in range(0, len(requests), GROUP):
        indices = range(begin, min(begin + GROUP, len(requests)))
        slates += recommender.recommend_many([_request(recommender, data, requests, i, shown) for i in indices])
    return _lists(recommender, slates)


def _request(recommender: Recommender, data: Sequences, requests: Requests, index: int, shown: bool) -> Request:
    user, end, slate = int(requests.users[index]), int(requests.ends[index]), int(requests.slates[index])
    manifest = recommender.bundle.manifest
    if slate == NO_SLATE:
        surface, now = int(data.surfaces[end]), int(data.timestamps_ms[end])
    else:
        surface, now = int(data.slate_surface[slate]), int(data.slate_timestamp_ms[slate])
    options = RecommendOptions(
        surface=manifest.surfaces[surface], now_ms=None if now < 0 else now, candidates=CANDIDATES, exact=True
    )
    history, k = tuple(_events(recommender, data, int(data.event_start[user]), end)), CANDIDATES
    if shown:
        items = data.slate_rows[data.slate_start[slate] : data.slate_start[slate + 1]]
        allow = tuple(data.item_ids[row] for row in items)
        options = RecommendOptions(
            surface=options.surface, now_ms=options.now_ms, exact=True, exclude_seen=False, allow=allow
        )
        k = len(allow)
    return Request(history=history, k=k, options=options)


def _events(recommender: Recommender, data: Sequences, begin: int, end: int) -> Iterator[Event]:
    actions, surfaces = recommender.bundle.manifest.actions, recommender.bundle.manifest.surfaces
    for i in range(begin, end):
        time = int(data.timestamps_ms[i])
        yield Event(
            item=data.item_ids[data.rows[i]],
            actions=tuple(name for name, done in zip(actions, data.actions[i].tolist(), strict=True) if done),
            surface=surfaces[data.surfaces[i]],
            timestamp_ms=None if time < 0 else time,
        )


def _lists(recommender: Recommender, slates: Sequence[Slate]) -> Lists:
    known, actions = recommender.bundle.rows, recommender.bundle.manifest.actions
    width = max(len(slate.items) for slate in slates)
    rows = np.full((len(slates), width), -1, np.int64)
    similarity = np.zeros(rows.shape)
    probabilities = np.zeros((*rows.shape, len(actions)))
    for i, slate in enumerate(slates):
        count = len(slate.items)
        rows[i, :count] = [known[item.item] for item in slate.items]
        similarity[i, :count] = [item.retrieval_score for item in slate.items]
        probabilities[i, :count] = [[item.actions[name] for name in actions] for item in slate.items]
    return Lists(rows=rows, similarity=similarity, probabilities=probabilities)


def log_value(lists: Lists, positive: NDArray[np.bool_]) -> Floats:
    """Logarithm [R, K] of the sum of the positive actions' probabilities."""
    total: Floats = np.log(np.maximum(lists.probabilities[..., positive].sum(-1), 1e-300))
    return total


def log_any_positive(lists: Lists, positive: NDArray[np.bool_]) -> Floats:
    """Logarithm [R, K] of the chance of any positive action, as if they were independent."""
    none = np.prod(1.0 - lists.probabilities[..., positive], axis=-1)
    any_positive: Floats = np.log(np.maximum(1.0 - none, 1e-300))
    return any_positive


def blends(lists: Lists, positive: NDArray[np.bool_], scale: float) -> dict[str, Floats]:
    """Scores [R, K] of lambda * retrieval's logit + log value, by the name of lambda."""
    value = log_value(lists, positive)
    return {f"blend {share:g}": share * scale * lists.similarity + value for share in LAMBDAS}


def hit_gains(ten: NDArray[np.int64], targets: NDArray[np.int64]) -> dict[str, Floats]:
    """HR@10 and NDCG@10 of each request [R], whose targets are all known."""
    found = ten == targets[:, None]
    gains = 1.0 / np.log2(np.arange(SERVED) + 2.0)
    return {"HR@10": found.any(1).astype(np.float64), "NDCG@10": (found * gains).sum(1)}


def shown_labels(lists: Lists, data: Sequences, requests: Requests) -> NDArray[np.uint8]:
    """Actions [R, K, C] of the items of lists that were answered with exactly the items of their slates."""
    labels = np.zeros(lists.probabilities.shape, np.uint8)
    for i, slate in enumerate(requests.slates):
        items = slice(data.slate_start[slate], data.slate_start[slate + 1])
        order = np.argsort(data.slate_rows[items])
        own = lists.rows[i, : len(order)]
        indices = order[np.searchsorted(data.slate_rows[items][order], own)]
        labels[i, : len(order)] = data.slate_actions[items][indices]
    return labels


def slate_auc(lists: Lists, labels: NDArray[np.uint8], scores: Floats) -> Floats:
    """AUC [R] of scores [R, K] within each slate, ties at half; NaN where labels [R, K] are all the same."""
    found = np.full(len(labels), np.nan)
    for i, count in enumerate((lists.rows >= 0).sum(1).tolist()):
        done, own = labels[i, :count] > 0, scores[i, :count]
        if done.any() and not done.all():
            difference = own[done][:, None] - own[~done]
            found[i] = ((difference > 0) + 0.5 * (difference == 0)).mean()
    return found


def mean_and_error(values: Floats) -> dict[str, float]:
    """Mean over requests and its standard error."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return {"mean": round(float(values.mean()), 5), "se": round(float(error), 5)}


def compared(by_order: Mapping[str, Floats], base: str) -> dict[str, Any]:
    """Of each order's figures [R]: mean, standard error, and the paired difference from the base's."""
    return {
        name: {**mean_and_error(values), f"minus {base}": mean_and_error(values - by_order[base])}
        for name, values in by_order.items()
    }
