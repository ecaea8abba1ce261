"""Retrieval baseline by other authors: RecTools' SASRec (full softmax), on the splits and metrics of our own rows.

    python bench/baseline_rectools.py ml1m     ml-1m_sasrec.txt.gz [--epochs 30] [--seed 0]
    python bench/baseline_rectools.py kuairand KUAIRAND_FOLDER     [--epochs 10] [--last-fit]

ML-1M: trained on all but the last two events of a user. KuaiRand: trained on long views before 30 April, with
--last-fit to 30 April, as the rows of its table are; each test request is a user of its own with the long views before
it. Seen items are left out, as for every other scorer. Needs an environment with `rectools[torch]`, whose numpy is
older than the package's; the package contains none of this.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import rectools
from common import card
from numpy.typing import NDArray
from pytorch_lightning import Trainer, seed_everything
from quality_runs import CUTOFFS, keep
from rectools.dataset import Dataset as Interactions
from rectools.models import SASRecModel

from unipinrec.models.data import schema as data_schema
from unipinrec.models.data.kuairand import read_kuairand
from unipinrec.models.data.sasrec import read_sasrec
from unipinrec.models.data.sequences import Sequences, sequences_of
from unipinrec.models.data.validate import build_dataset
from unipinrec.models.evaluate import NO_TARGET, Requests, held_out_requests, history_rows
from unipinrec.models.metrics import retrieval_metrics


def interactions(users: NDArray[np.int64], items: NDArray[np.int64]) -> Interactions:
    """Events in input order; the index stands for the time."""
    when = pd.to_datetime(np.arange(len(users)), unit="s")
    return Interactions.construct(pd.DataFrame({"user_id": users, "item_id": items, "weight": 1.0, "datetime": when}))


def training_events(data: Sequences, positive: NDArray[np.bool_], *, last_fit: bool) -> NDArray[np.int64]:
    """Positive events that the model may be trained on; with `last_fit` those of the validation part too."""
    wanted = np.any(data.actions[:, positive] > 0, axis=1)
    if data.split is not None:
        end_ms = data.split.test_start_ms if last_fit else data.split.valid_start_ms
        return np.flatnonzero(wanted & (data.timestamps_ms < end_ms))
    last = np.repeat(data.event_start[1:], np.diff(data.event_start))
    return np.flatnonzero(wanted & (np.arange(len(data.rows)) < last - (1 if last_fit else 2)))


def ranks_of(
    model: SASRecModel, data: Sequences, requests: Requests, wanted: NDArray[np.bool_], known: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """0-based rank of each target among the unseen catalogue; the catalogue's size beyond the 200 best.

    Args:
        model: The fitted model.
        data: All events.
        requests: Those that have a target.
        wanted: [events] whether the model may read each event.
        known: [items] whether the model knows each item.
    """
    ranks = np.full(len(requests), float(data.num_items))
    histories = []
    for user, end in zip(requests.users.tolist(), requests.ends.tolist(), strict=True):
        rows = history_rows(data, user, end)[wanted[data.event_start[user] : end]]
        histories.append(rows[known[rows]][-model.session_max_len :])
    owners = np.repeat(np.arange(len(requests)), [len(rows) for rows in histories])
    asked = np.unique(owners)
    if not len(asked):
        return ranks
    seen = [history_rows(data, u, e) for u, e in zip(requests.users.tolist(), requests.ends.tolist(), strict=True)]
    best = min(int(known.sum()), max(CUTOFFS) + max(len(set(rows.tolist())) for rows in seen))
    context = interactions(owners, np.concatenate(histories))
    found = model.recommend(asked, context, k=best, filter_viewed=False, on_unsupported_targets="ignore")
    for index, items in found.groupby("user_id", sort=False)["item_id"]:
        left = items.to_numpy()[~np.isin(items.to_numpy(), seen[index])]
        hits = np.flatnonzero(left == requests.targets[index])
        ranks[index] = hits[0] if len(hits) else data.num_items
    return ranks


def measure(dataset: data_schema.Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """Train and rank."""
    seed_everything(options.seed)
    data = sequences_of(dataset)
    positive = np.array([name in dataset.spec.positive_actions for name in dataset.spec.actions])
    events = training_events(data, positive, last_fit=options.last_fit)
    owners = np.repeat(np.arange(data.num_users), np.diff(data.event_start))
    model = SASRecModel(
        n_blocks=2,
        n_heads=2,
        n_factors=options.width,
        session_max_len=200 if options.data == "ml1m" else 64,
        dropout_rate=0.2,
        loss="softmax",
        lr=1e-3,
        batch_size=128,
        epochs=options.epochs,
        get_trainer_func=lambda: Trainer(
            max_epochs=options.epochs, accelerator="cpu", logger=False, enable_checkpointing=False, deterministic=True
        ),
    )
    began = time.monotonic()
    model.fit(interactions(owners[events], data.rows[events]))
    trained = time.monotonic() - began
    requests = held_out_requests(data, positive, "test")
    requests = requests.take(np.flatnonzero(requests.targets != NO_TARGET))
    wanted = np.any(data.actions[:, positive] > 0, axis=1)
    known = np.bincount(data.rows[events], minlength=data.num_items) > 0
    chunks = np.array_split(np.arange(len(requests)), max(1, len(requests) // 1024))
    ranks = [ranks_of(model, data, requests.take(chunk), wanted, known) for chunk in chunks]
    found = retrieval_metrics(np.concatenate(ranks), CUTOFFS)
    return {"training_seconds": round(trained, 1), "metrics": msgspec.to_builtins(found, str_keys=True)}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["ml1m", "kuairand"])
    parser.add_argument("source", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--last-fit", action="store_true", help="train on the validation part too")
    options = parser.parse_args()
    raw = read_sasrec(options.source) if options.data == "ml1m" else read_kuairand(options.source)
    document = {
        **card("baseline_rectools"),
        "rectools": rectools.__version__,
        "epochs": options.epochs,
        "width": options.width,
        "seed": options.seed,
        "last_fit": options.last_fit,
        **measure(build_dataset(raw), options),
    }
    keep(document, f"{options.data}_rectools_sasrec_seed{options.seed}")
    print(document["metrics"])


if __name__ == "__main__":
    main()
