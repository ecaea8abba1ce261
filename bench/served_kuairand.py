"""KuaiRand-Pure through a bundle: every order beside every other, by the logged next item and within logged slates.

    python bench/served_kuairand.py KUAIRAND_FOLDER CHECKPOINT [--requests 6000]

CHECKPOINT is the row "joint" of `quality_kuairand.py --last-fit`: long_view is positive, the validation day is trained
on. Nothing here says which order is best: see "shows" in the result for what each figure can and cannot show.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import card, finish
from numpy.typing import NDArray
from served_orders import (
    Floats,
    Lists,
    answers,
    blends,
    compared,
    hit_gains,
    log_value,
    mean_and_error,
    served,
    shown_labels,
    slate_auc,
)

from unipinrec.models.checkpoint import load_checkpoint
from unipinrec.models.data.kuairand import read_kuairand
from unipinrec.models.data.sequences import Sequences, sequences_of
from unipinrec.models.data.validate import build_dataset
from unipinrec.models.evaluate import NO_TARGET, Requests, held_out_requests
from unipinrec.models.metrics import action_metrics

ACTIONS = ("click", "long_view", "like")
SHOWS = {
    "logged_next": "Whether the ten hold the next item that was watched long. It can show that an order finds what the "
    "logging policy was about to show; it cannot show that other items would have been watched less, so it favours "
    "orders that imitate that policy, as retrieval's does.",
    "within_slates": "Whether an order puts what was clicked, watched or liked before what was shown beside it. Both "
    "had the same chance to be seen, so it says what people prefer among items that the old policy chose; it cannot "
    "show how an order does on the items that it never chose, which are most of the 200 candidates.",
    "users_gauc": "The same within users and across their slates: retrieval's score is no probability and may not be "
    "compared across requests, so only orders by probabilities can be read here.",
    "overlap": "How many of the ten an order shares with value order: how different the lists are at all.",
    "logged_value": "Mean long views over the served items that the logged slate happened to show, with their number: "
    "unbiased only if the policy had shown items at random, and few items are matched.",
}


def orders_of(lists: Lists, positive: NDArray[np.bool_], scale: float) -> dict[str, Floats]:
    """Scores [R, K] of each order; blend 1 is the entire-space order, which counts both chances in full."""
    mixed = {name: scores for name, scores in blends(lists, positive, scale).items() if name != "blend 0"}
    mixed["entire space"] = mixed.pop("blend 1")
    return {"retrieval": scale * lists.similarity, "value": log_value(lists, positive), **mixed}


def several(data: Sequences, positive: NDArray[np.bool_], limit: int) -> Requests:
    """Test requests whose slates have two items or more, drawn evenly: most have one, which no order can get wrong."""
    requests = held_out_requests(data, positive, "test")
    indices = np.flatnonzero(np.diff(data.slate_start)[requests.slates] > 1)
    return requests.take(indices[np.linspace(0, len(indices) - 1, min(limit, len(indices))).astype(np.int64)])


def within(
    lists: Lists, labels: NDArray[np.uint8], own: Floats, orders: dict[str, Floats], requests: Requests
) -> dict[str, Any]:
    """AUC of each action within slates (mean over slates with both outcomes, its error, against value) and users."""
    found: dict[str, Any] = {}
    real = lists.rows >= 0
    users = np.repeat(requests.users[:, None], real.shape[1], axis=1)[real]
    for index, action in enumerate(ACTIONS):
        scored = {**orders, "its own probability": own[..., index]}
        auc = {name: slate_auc(lists, labels[..., index], scores) for name, scores in scored.items()}
        both = ~np.isnan(auc["value"])
        found[action] = {
            "slates": int(both.sum()),
            "within_slates": compared({name: values[both] for name, values in auc.items()}, "value"),
            "users_gauc": {
                name: action_metrics(users, labels[..., index][real], scores[real]).gauc
                for name, scores in scored.items()
            },
        }
    return found


def logged_value(tens: dict[str, NDArray[np.int64]], shown: Lists, labels: Floats) -> dict[str, Any]:
    """Mean label [R, K] of the served items that were shown, and how many there are."""
    found = {}
    for name, ten in tens.items():
        matched = [labels[i][np.isin(shown.rows[i], row)] for i, row in enumerate(ten)]
        values = np.concatenate(matched)
        found[name] = {**mean_and_error(values), "items": len(values)}
    return found


def main() -> None:
    """Export, answer, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--requests", type=int, default=6000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = build_dataset(read_kuairand(options.folder))
    data = sequences_of(dataset)
    positive = np.array([name in dataset.spec.positive_actions for name in dataset.spec.actions])
    positions = [dataset.spec.actions.index(name) for name in ACTIONS]
    test = held_out_requests(data, positive, "test", options.requests)
    with served(load_checkpoint(options.checkpoint).model, dataset, data) as (recommender, scale):
        lists = answers(recommender, data, test)
        parts = {"all requests": test, "slates of two and more": several(data, positive, options.requests)}
        shown = {name: answers(recommender, data, part, shown=True) for name, part in parts.items()}
    labels = {name: shown_labels(shown[name], data, part)[..., positions] for name, part in parts.items()}
    tens = {name: lists.ten(scores) for name, scores in orders_of(lists, positive, scale).items()}
    has = test.targets != NO_TARGET
    hits = {name: hit_gains(ten[has], test.targets[has]) for name, ten in tens.items()}
    by_value = tens["value"]
    document = {
        **card("served_kuairand"),
        "requests": len(test),
        "targets": int(has.sum()),
        "shown_items": {name: int((found.rows >= 0).sum()) for name, found in shown.items()},
        "retrieval_scale": round(scale, 3),
        "shows": SHOWS,
        "logged_next": {
            figure: compared({name: gains[figure] for name, gains in hits.items()}, "value")
            for figure in ("HR@10", "NDCG@10")
        },
        "actions": {
            name: within(
                found, labels[name], found.probabilities[..., positions], orders_of(found, positive, scale), parts[name]
            )
            for name, found in shown.items()
        },
        "overlap": {
            name: mean_and_error((ten[:, :, None] == by_value[:, None, :]).any(2).sum(1).astype(np.float64))
            for name, ten in tens.items()
        },
        "logged_value": logged_value(
            tens, shown["all requests"], labels["all requests"][..., ACTIONS.index("long_view")].astype(np.float64)
        ),
    }
    finish(document, "served_kuairand")


if __name__ == "__main__":
    main()
