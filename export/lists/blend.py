"""Choose the weight of retrieval in the order by value, on the labels of validation slates.

Both items of a pair were shown in one slate, so the logging policy does not bias the choice. The hit rate of the logged
next item would: it grows with retrieval's weight while lists get worse (docs/decisions/0014).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import NothingHeldOutError
from unipinrec.export.lists.held_out_requests import Client, HeldOut
from unipinrec.models.evaluate import NO_SLATE, Requests
from unipinrec.runtime import Recommender
from unipinrec.runtime.bundle.manifest import OrderSpec

WEIGHTS = (0.0, 0.05, 0.1, 0.2)
MOST_SLATES, FEWEST_SLATES = 2000, 100
SURE = 2.0  # standard errors
BATCH = 64


def chosen_blend(recommender: Recommender, folder: Path) -> OrderSpec | None:
    """For a bundle that is ordered by value: a blend, or retrieval, if that orders validation slates better.

    Returns:
        The new order, or None to keep the old one.

    Raises:
        DataError: The data does not belong to the bundle.
    """
    spec = recommender.bundle.manifest.order
    if spec is None or spec.by != "value":
        return None
    try:
        held = HeldOut.read(folder, "valid", None, repeats=True)
        client = Client(recommender, held)
        held = replace(held, requests=client.answerable(held.requests))
    except NothingHeldOutError:
        return None
    worth = held.data.slate_actions[:, held.positive].sum(axis=1, dtype=np.int64)
    indices = _telling_slates(held, worth)
    if len(indices) < FEWEST_SLATES:
        return None
    indices = indices[np.linspace(0, len(indices) - 1, min(MOST_SLATES, len(indices))).astype(np.int64)]
    agreements = _agreements(client, held.requests.take(indices), worth, spec.retrieval_scale)
    by_value, retrieved = agreements[:, 0].mean(), agreements[:, -1].mean()
    best = int(agreements[:, :-1].mean(axis=0).argmax())
    pairs = f"of the pairs within {len(indices)} validation slates are in the right order"
    ahead = agreements[:, -1] - agreements[:, best]
    if ahead.mean() > SURE * ahead.std() / len(ahead) ** 0.5:
        reason = f"by retrieval {retrieved:.4f} {pairs}, by value {by_value:.4f}: the ranker learned too little"
        return msgspec.structs.replace(spec, by="retrieval", reason=reason)
    if best == 0:
        return None
    figure = f"{WEIGHTS[best]:g} of retrieval's logit {agreements[:, best].mean():.4f}"
    reason = f"{spec.reason}; with {figure} {pairs}, by value alone {by_value:.4f}"
    return msgspec.structs.replace(spec, by="blend", retrieval_weight=WEIGHTS[best], reason=reason)


def _telling_slates(held: HeldOut, worth: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the requests whose slates show items of different worth; `worth` [K] counts positive actions."""
    start = held.data.slate_start
    slated = np.flatnonzero(held.requests.slates != NO_SLATE)
    spans = [worth[start[slate] : start[slate + 1]] for slate in held.requests.slates[slated]]
    return slated[[len(span) > 1 and span.min() < span.max() for span in spans]]


def _agreements(client: Client, requests: Requests, worth: NDArray[np.int64], scale: float) -> NDArray[np.float64]:
    """[slates, weights + 1] share of the pairs of different worth that each weight, and retrieval, orders correctly."""
    start, agreements = client.held.data.slate_start, []
    shown = [items for part in requests.chunks(BATCH) for items in client.shown(part)]
    for slate, items in zip(requests.slates, shown, strict=True):
        own = worth[start[slate] : start[slate + 1]]
        better, worse = np.nonzero(own[:, None] > own[None, :])
        values = np.array([item.value for item in items], np.float64)
        similarity = np.array([item.retrieval_score for item in items], np.float64)
        scores = np.vstack([values * np.exp(np.outer(WEIGHTS, scale * similarity)), similarity])
        ahead = scores[:, better] - scores[:, worse]
        agreements.append(((ahead > 0) + 0.5 * (ahead == 0)).mean(axis=1))
    return np.array(agreements)


def with_order(recommender: Recommender, order: OrderSpec) -> Recommender:
    """The same recommender with another order of slates."""
    manifest = msgspec.structs.replace(recommender.bundle.manifest, order=order)
    return replace(recommender, bundle=replace(recommender.bundle, manifest=manifest))
