"""Ranking baseline by other authors: LightGBM on rates, counts, author, tag, time, user and video features.

    python bench/baseline_lightgbm.py KUAIRAND_FOLDER [--threads 2]

Rows, labels, split and metrics are those of `quality_kuairand.py`. Two sets of features: "before" takes rates from
before the training days alone; "running" adds rates over all strictly earlier slates, so that it knows all events up
to the request, as the sequence model does. Leave-one-out rates would leak the label and are not used.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import lightgbm
import msgspec
import numpy as np
import polars as pl
from common import card
from quality_runs import keep

from unipinrec.models.data.kuairand import read_kuairand
from unipinrec.models.data.schema import Dataset
from unipinrec.models.data.sequences import Sequences, sequences_of
from unipinrec.models.data.validate import build_dataset
from unipinrec.models.evaluate import held_out_requests, shown_items
from unipinrec.models.metrics import action_metrics

ACTIONS = ("click", "long_view", "like")
KEYS = ("user", "item", "author", "tag")
PAIRS = (("user", "tag"), ("user", "author"))
PRIOR_ROWS = 20.0
# The author as a category overfits: long_view AUC on the validation day is 0.7511 with it, 0.7578 without.
UNUSED = {"user", "slate", "item", "author", "time"}
SETTINGS = {
    "objective": "binary",
    "learning_rate": 0.05,
    "num_leaves": 63,
    "min_data_in_leaf": 100,
    "feature_fraction": 0.8,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "verbosity": -1,
}


def slate_table(data: Sequences, dataset: Dataset) -> pl.DataFrame:
    """One row per shown item: keys, context, item features, labels, and its split."""
    sizes = np.diff(data.slate_start)
    times = np.repeat(data.slate_timestamp_ms, sizes)
    categories = list(dataset.spec.categories)
    table = {
        "user": np.repeat(data.slate_user, sizes),
        "slate": np.repeat(np.arange(len(sizes)), sizes),
        "item": data.slate_rows,
        "author": data.features.categories[data.slate_rows, categories.index("author")],
        "tag": data.features.categories[data.slate_rows, categories.index("tag")],
        "time": times,
        "hour": (times // 3_600_000 + 8) % 24,
        "weekday": (times // 86_400_000) % 7,
        "surface": np.repeat(data.slate_surface, sizes),
        "slate_size": np.repeat(sizes, sizes),
        "history": np.repeat(data.slate_cutoff, sizes),
    }
    for name in ("video_type", "upload_type", "music_type"):
        table[name] = data.features.categories[data.slate_rows, categories.index(name)]
    for position, name in enumerate(("log_duration", "age_days")):
        table[name] = data.features.dense[data.slate_rows, position]
    for position, action in enumerate(dataset.spec.actions):
        if action in ACTIONS:
            table[f"label_{action}"] = data.slate_actions[:, position].astype(np.float64)
    return pl.DataFrame(table)


def rates_before(data: Sequences, dataset: Dataset, table: pl.DataFrame) -> pl.DataFrame:
    """Rates and counts of each key over the events without a time, which precede the training days."""
    old = data.timestamps_ms < 0
    rows = data.rows[old]
    categories = list(dataset.spec.categories)
    past = pl.DataFrame(
        {
            "user": np.repeat(np.arange(data.num_users), np.diff(data.event_start))[old],
            "item": rows,
            "author": data.features.categories[rows, categories.index("author")],
            "tag": data.features.categories[rows, categories.index("tag")],
            **{a: data.actions[old, dataset.spec.actions.index(a)].astype(np.float64) for a in ("long_view", "like")},
        }
    )
    for keys in (*((key,) for key in KEYS), *PAIRS):
        name = "_".join(keys)
        found = past.group_by(keys).agg(
            pl.len().alias(f"before_{name}_count"),
            *(
                ((pl.col(a).sum() + PRIOR_ROWS * _mean(past[a])) / (pl.len() + PRIOR_ROWS)).alias(f"before_{name}_{a}")
                for a in ("long_view", "like")
            ),
        )
        table = table.join(found, on=keys, how="left", maintain_order="left")
    return table


def running_rates(table: pl.DataFrame) -> pl.DataFrame:
    """Rates and counts of each key over slates of strictly earlier times."""
    for keys in (*((key,) for key in KEYS), *PAIRS):
        name = "_".join(keys)
        labels = [pl.col(f"label_{a}").sum().alias(a) for a in ACTIONS]
        moments = table.group_by(*keys, "time").agg(pl.len().alias("rows"), *labels).sort(*keys, "time")
        earlier = {c: (pl.col(c).cum_sum() - pl.col(c)).over(keys) for c in ("rows", *ACTIONS)}
        found = moments.select(
            *keys,
            "time",
            earlier["rows"].alias(f"running_{name}_count"),
            *(
                ((earlier[a] + PRIOR_ROWS * _mean(table[f"label_{a}"])) / (earlier["rows"] + PRIOR_ROWS)).alias(
                    f"running_{name}_{a}"
                )
                for a in ACTIONS
            ),
        )
        table = table.join(found, on=(*keys, "time"), how="left", maintain_order="left")
    return table


def with_user_features(table: pl.DataFrame, data: Sequences, folder: Path) -> pl.DataFrame:
    """Columns of the data set's user file, words as codes."""
    (path,) = folder.glob("user_features*.csv*")
    users = pl.read_csv(path, glob=False, infer_schema_length=None)
    words = [name for name, kind in users.schema.items() if kind == pl.String]
    users = users.with_columns(pl.col(name).cast(pl.Categorical).to_physical() for name in words)
    known = pl.DataFrame({"user_id": data.user_ids, "user": np.arange(data.num_users)})
    users = users.with_columns(pl.col("user_id").cast(pl.String)).join(known, on="user_id").drop("user_id")
    return table.join(users, on="user", how="left", maintain_order="left")


def _mean(values: pl.Series) -> float:
    return float(np.mean(values.to_numpy()))


def fit_and_measure(table: pl.DataFrame, split: dict[str, np.ndarray[Any, Any]], threads: int) -> dict[str, Any]:
    """One booster per action: rounds chosen by the validation day, then fitted to it as well; metrics on the test.

    "request_gauc" is the AUC within requests alone, whose rows were scored with the same knowledge (docs/quality.md).
    "early" is the booster that the validation day stopped; "refitted" was trained on that day as well.
    """
    features = [c for c in table.columns if not c.startswith("label_") and c not in UNUSED]
    matrix = table.select(features).cast(pl.Float32).to_numpy()
    categorical = [features.index(c) for c in ("tag", "surface", "video_type", "upload_type", "music_type")]
    users, slates = table["user"].to_numpy(), table["slate"].to_numpy()
    measured: dict[str, Any] = {}
    for action in ACTIONS:
        label = table[f"label_{action}"].to_numpy()
        train = lightgbm.Dataset(
            matrix[split["train"]], label[split["train"]], categorical_feature=categorical, free_raw_data=False
        )
        valid = lightgbm.Dataset(matrix[split["valid"]], label[split["valid"]], reference=train)
        began = time.monotonic()
        booster = lightgbm.train(
            {**SETTINGS, "metric": "auc", "num_threads": threads, "seed": 0},
            train,
            num_boost_round=1500,
            valid_sets=[valid],
            callbacks=[lightgbm.early_stopping(75, verbose=False)],
        )
        both = np.concatenate([split["train"], split["valid"]])
        whole = lightgbm.Dataset(matrix[both], label[both], categorical_feature=categorical)
        again = lightgbm.train({**SETTINGS, "num_threads": threads, "seed": 0}, whole, booster.best_iteration)
        test = split["test"]
        found = {}
        for name, fitted in (("early", booster), ("refitted", again)):
            answer = label[test].astype(np.uint8), np.asarray(fitted.predict(matrix[test]))
            within = action_metrics(slates[test], *answer).gauc
            found[name] = {**msgspec.to_builtins(action_metrics(users[test], *answer)), "request_gauc": within}
        gains = sorted(zip(booster.feature_importance("gain").tolist(), features, strict=True), reverse=True)
        measured[action] = {
            **found,
            "rounds": booster.best_iteration,
            "seconds": round(time.monotonic() - began, 1),
            "strongest_features": [name for _, name in gains[:8]],
        }
    return measured


def splits(data: Sequences, dataset: Dataset) -> dict[str, np.ndarray[Any, Any]]:
    """Row numbers of each part; all scorers are measured on the same test rows."""
    assert data.split is not None
    times = np.repeat(data.slate_timestamp_ms, np.diff(data.slate_start))
    positive = np.array([name in dataset.spec.positive_actions for name in dataset.spec.actions])
    return {
        "train": np.flatnonzero(times < data.split.valid_start_ms),
        "valid": np.flatnonzero((times >= data.split.valid_start_ms) & (times < data.split.test_start_ms)),
        "test": shown_items(data, held_out_requests(data, positive, "test")),
    }


def main() -> None:
    """Fit both feature sets and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    dataset = build_dataset(read_kuairand(options.folder))
    data = sequences_of(dataset)
    table = with_user_features(rates_before(data, dataset, slate_table(data, dataset)), data, options.folder)
    parts = splits(data, dataset)
    document = {
        **card("baseline_lightgbm"),
        "lightgbm": lightgbm.__version__,
        "settings": SETTINGS,
        "rows": {name: len(rows) for name, rows in parts.items()},
        "before": fit_and_measure(table, parts, options.threads),
        "running": fit_and_measure(running_rates(table), parts, options.threads),
    }
    keep(document, "kuairand_lightgbm")
    for kind in ("before", "running"):
        for action, found in document[kind].items():
            for name in ("early", "refitted"):
                row = found[name]
                figures = " ".join(f"{field} {row[field]:.4f}" for field in ("auc", "gauc", "request_gauc", "logloss"))
                print(kind, name, action, figures)


if __name__ == "__main__":
    main()
