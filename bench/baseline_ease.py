"""Retrieval baseline by other authors: RecTools' EASE, a linear model, on the splits and metrics of our own rows.

    python bench/baseline_ease.py ml1m     ml-1m_sasrec.txt.gz
    python bench/baseline_ease.py kuairand KUAIRAND_FOLDER

It has the training data and the environment of `baseline_rectools.py`. The regularisation with the best NDCG@10
on the validation part is then measured on the test part; with --last-fit after a fit to the validation part as well.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import rectools
from baseline_rectools import interactions, training_events
from common import card
from numpy.typing import NDArray
from quality_runs import CUTOFFS, keep
from rectools.models import EASEModel

from unipinrec.models.data.kuairand import read_kuairand
from unipinrec.models.data.sasrec import read_sasrec
from unipinrec.models.data.schema import Dataset
from unipinrec.models.data.sequences import Sequences, sequences_of
from unipinrec.models.data.validate import build_dataset
from unipinrec.models.evaluate import NO_TARGET, Requests, Split, held_out_requests, history_rows
from unipinrec.models.metrics import RetrievalMetrics, retrieval_metrics

REGULARISATIONS = (30.0, 100.0, 300.0, 1000.0, 3000.0)


def fitted(data: Sequences, events: NDArray[np.int64], regularisation: float) -> NDArray[np.float32]:
    """[items, items] EASE's weights; of items that had no event, zero."""
    owners = np.repeat(np.arange(data.num_users), np.diff(data.event_start))
    pairs = np.unique(np.stack([owners[events], data.rows[events]], 1), axis=0)
    seen = interactions(pairs[:, 0], pairs[:, 1])
    model = EASEModel(regularization=regularisation).fit(seen)
    rows = seen.item_id_map.external_ids.astype(np.int64)
    weight = np.zeros((data.num_items, data.num_items), np.float32)
    weight[np.ix_(rows, rows)] = model.weight
    return weight


def ranks_of(
    weight: NDArray[np.float32], data: Sequences, requests: Requests, wanted: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """0-based rank of each target among the items that its user has not seen, equal scores counted half."""
    ranks = np.empty(len(requests))
    for index, (user, end) in enumerate(zip(requests.users.tolist(), requests.ends.tolist(), strict=True)):
        rows = history_rows(data, user, end)
        liked = np.unique(rows[wanted[data.event_start[user] : end]])
        scores = weight[liked].sum(0)
        target, wins = requests.targets[index], np.delete(scores, rows[rows != requests.targets[index]])
        ranks[index] = (wins > scores[target]).sum() + ((wins == scores[target]).sum() - 1) / 2
    return ranks


def measure(dataset: Dataset, *, last_fit: bool) -> dict[str, Any]:
    """Fit with each regularisation, choose by the validation part, measure on the test part."""
    data = sequences_of(dataset)
    positive = np.array([name in dataset.spec.positive_actions for name in dataset.spec.actions])
    wanted = np.any(data.actions[:, positive] > 0, axis=1)
    events = training_events(data, positive, last_fit=False)

    def measured(weight: NDArray[np.float32], part: Split) -> RetrievalMetrics:
        requests = held_out_requests(data, positive, part)
        requests = requests.take(np.flatnonzero(requests.targets != NO_TARGET))
        metrics = retrieval_metrics(ranks_of(weight, data, requests, wanted), CUTOFFS)
        if metrics is None:
            raise SystemExit(f"the {part} part of {dataset.spec.name} has no request with a target")
        return metrics

    began = time.monotonic()
    found = [(measured(fitted(data, events, value), "valid"), value) for value in REGULARISATIONS]
    best = max(found, key=lambda pair: pair[0].ndcg[10])[1]
    last = training_events(data, positive, last_fit=last_fit)
    return {
        "validation_ndcg_at_10": {str(value): round(metrics.ndcg[10], 5) for metrics, value in found},
        "regularisation": best,
        "seconds": round(time.monotonic() - began, 1),
        "metrics": msgspec.to_builtins(measured(fitted(data, last, best), "test"), str_keys=True),
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["ml1m", "kuairand"])
    parser.add_argument("source", type=Path)
    parser.add_argument("--last-fit", action="store_true")
    options = parser.parse_args()
    raw = read_sasrec(options.source) if options.data == "ml1m" else read_kuairand(options.source)
    document = {**card("baseline_ease"), "rectools": rectools.__version__, "last_fit": options.last_fit}
    document |= measure(build_dataset(raw), last_fit=options.last_fit)
    keep(document, f"{options.data}_rectools_ease")
    print(document["regularisation"], document["metrics"])


if __name__ == "__main__":
    main()
