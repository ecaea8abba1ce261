"""The best order of a slate for data without slates: retrieval, value, a product of both, or a trained ranker?

    python bench/served_without_slates.py --out RUNS [--sets case_a always ...] [--rows marked ...] [--seeds 0 1]

Without slates the ranker learns P(action | engaged), and retrieval P(item | the next event is positive). Forms, up to a
constant of the request, where s is retrieval's logit and v the sum of the positive actions' probabilities:

    retrieval             s
    value                 log v
    product               s + log v
    conditional           s + log v - log P(any positive), which counts the chance of a positive action once; P as if
                          actions were independent
    conditional, largest  the same with the largest probability of a positive action as P
    product mu, blend l   s + mu log v, l s + log v
    chosen (by value)     of these that with the best NDCG@10 (value@10) on the validation part

Rows: "marked" (the default), "unmarked" (masked events look like candidates), "taught" (a ranker that also sees random
items that were not engaged with, all actions 0, by weight).

value@10 is the share of the held-out events' positive actions whose event was among the ten: HR@10 where there is one
action that always happens.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import torch
from common import ROOT, card
from numpy.typing import NDArray
from quality_runs import loaded
from served_orders import (
    LAMBDAS,
    Floats,
    Lists,
    answers,
    blends,
    compared,
    hit_gains,
    log_any_positive,
    log_value,
    served,
)

from unipinrec.models.batches import Batches, Window
from unipinrec.models.data.kuairand import read_kuairand
from unipinrec.models.data.movielens import read_movielens
from unipinrec.models.data.schema import Dataset
from unipinrec.models.data.sequences import Sequences, sequences_of
from unipinrec.models.data.validate import RawTables, SplitFractions, build_dataset
from unipinrec.models.evaluate import NO_TARGET, Requests, Split, held_out_requests
from unipinrec.models.model import UniPinRec
from unipinrec.models.training.config import RunConfig, load_run_config
from unipinrec.models.training.train import EpochReport, Trainer, batch_options

RESULT = ROOT / "bench" / "results" / "served_without_slates.json"
MUS = (0.25, 0.5)
POSITIONS, NEGATIVES = 6, 8
HOUR_MS = 3_600_000
START_MS = 1_735_689_600_000
# Of each row: whether masked events are marked, and the weight of random items as negatives.
ROWS: dict[str, tuple[bool, float]] = {
    "marked": (True, 0.0),
    "unmarked": (False, 0.0),
    "taught_1": (True, 1.0),
    "taught_0.1": (True, 0.1),
}
# Chances of (watch, save) where an item's kind (0 to 3) suits the user's device (a phone 0, a desktop 0 to 2), or not.
CHANCES = {"always": ((0.9, 0.9), (0.9, 0.05)), "sometimes": ((0.9, 0.9), (0.5, 0.05))}
STEPS, STEP_DECAY = 30, 0.95
USERS, ITEMS = 1200, 400
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "case_a": ({}, {"epochs": 12}),
    "always": ({"max_history": 32}, {"epochs": 8, "batch_size": 32}),
    "sometimes": ({"max_history": 32}, {"epochs": 8, "batch_size": 32}),
    "ml100k": ({"dropout": 0.2}, {"epochs": 8}),
    "kuairand_log": ({"dropout": 0.2, "id_dropout": 0.3}, {"epochs": 6}),
}


class TaughtBatches(Batches):
    """Instead of slates: some events of each window, and with each random items that its user did not engage with."""

    negative_weight = 1.0

    def _candidates(self, windows: list[Window], rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        data, width = self.data, POSITIONS * (1 + NEGATIVES)
        events = np.full((len(windows), POSITIONS), -1, np.int64)
        rows = rng.integers(0, data.num_items, (len(windows), POSITIONS, 1 + NEGATIVES))
        engaged = np.zeros(rows.shape, bool)
        for i, window in enumerate(windows):
            drawn = window.begin + 1 + rng.permutation(max(window.end - window.begin - 1, 0))[:POSITIONS]
            events[i, : len(drawn)] = drawn
            engaged[i] = np.isin(rows[i], data.rows[window.begin : window.end])
        real = np.repeat((events >= 0)[..., None], 1 + NEGATIVES, axis=2)
        rows[..., 0] = data.rows[events]
        real[..., 1:] &= ~engaged[..., 1:]
        first = np.zeros(rows.shape, bool)
        first[..., 0] = True
        at = np.repeat(events[..., None], 1 + NEGATIVES, axis=2)
        begin = np.array([window.begin for window in windows])[:, None, None]
        known = np.where(first[..., None], data.actions_known[at].astype(np.float32), self.negative_weight)
        shape = (len(windows), width)
        return {
            "rows": np.where(real, rows, 0).reshape(shape),
            "actions": (data.actions[at] * (first & real)[..., None]).astype(np.float32).reshape(*shape, -1),
            "known": (known * real[..., None]).astype(np.float32).reshape(*shape, -1),
            "surfaces": np.where(real, data.surfaces[at], 0).reshape(shape),
            "timestamps_ms": np.where(real, data.timestamps_ms[at], -1).reshape(shape),
            "cutoffs": np.where(real, at - begin, 0).reshape(shape),
            "valid": real.reshape(shape),
            "logged": np.zeros(shape, np.float32),
        }


class TaughtTrainer(Trainer):
    """Trains the ranker with random negatives."""

    negative_weight = 1.0

    def __init__(self, dataset: Dataset, config: RunConfig, out: Path) -> None:
        super().__init__(dataset, config, out)
        self.batches = TaughtBatches(self.data, self.positive, batch_options(config))
        self.batches.negative_weight = self.negative_weight


class TaughtLightlyTrainer(TaughtTrainer):
    """The same with negatives of a tenth of the weight."""

    negative_weight = 0.1


TRAINERS: dict[str, type[Trainer]] = {"taught_1": TaughtTrainer, "taught_0.1": TaughtLightlyTrainer}


def case_a() -> RawTables:
    """One action that always happens; the next item is one, two or three further."""
    random.seed(0)
    rows = []
    for user in range(1500):
        item, hours = random.randrange(1000), random.randrange(500)
        for _ in range(12):
            rows.append((f"u{user}", f"i{item}", START_MS + hours * HOUR_MS))
            item, hours = (item + random.choice((1, 2, 3))) % 1000, hours + random.randint(1, 47)
    return _log("case_a", rows, {"click": [True] * len(rows)}, 1000, SplitFractions())


def synthetic(kind: str) -> RawTables:
    """Users walk through the items; which actions an event ends in depends on the item's kind and the user's device."""
    rng = np.random.default_rng(11)
    kinds, rows, actions, devices = rng.integers(0, 4, ITEMS), [], [], []
    weights = STEP_DECAY ** np.arange(1, STEPS + 1)
    for user in range(USERS):
        device, item, hours = int(rng.integers(2)), int(rng.integers(ITEMS)), int(rng.integers(500))
        for _ in range(20):
            rows.append((f"u{user:04}", f"i{item}", START_MS + hours * HOUR_MS))
            actions.append(rng.random(2) < CHANCES[kind][int(kinds[item] > 2 * device)])
            devices.append(("phone", "desktop")[device])
            item = int(item + 1 + rng.choice(STEPS, p=weights / weights.sum())) % ITEMS
            hours += int(rng.integers(1, 48))
    done = np.array(actions)
    raw = _log(kind, rows, {"watch": done[:, 0].tolist(), "save": done[:, 1].tolist()}, ITEMS, None)
    items = raw.items.with_columns(pl.Series("category_kind", [f"kind-{name}" for name in kinds]))
    return replace(raw, items=items, events=raw.events.with_columns(pl.Series("surface", devices)))


def _log(
    name: str,
    rows: list[tuple[str, str, int]],
    actions: dict[str, list[bool]],
    items: int,
    split: SplitFractions | None,
) -> RawTables:
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp_ms"], orient="row").with_columns(
        pl.lit(None, pl.String).alias("surface"), *(pl.Series(f"action_{name}", done) for name, done in actions.items())
    )
    catalogue = pl.DataFrame({"item_id": [f"i{i}" for i in range(items)]}).with_columns(
        pl.lit(None, pl.String).alias("title")
    )
    return RawTables(
        name=name,
        source="made by a benchmark",
        actions=tuple(actions),
        positive_actions=tuple(actions),
        events=events,
        items=catalogue,
        split=split,
    )


def movielens(folder: Path) -> RawTables:
    """Ratings as events: liked from 4 on, loved at 5, disliked up to 2; nothing happens at 3."""
    raw = read_movielens(folder)
    columns = ["user", "item", "rating", "seconds"]
    ratings = pl.read_csv(folder / "u.data", glob=False, separator="\t", has_header=False, new_columns=columns)
    events = ratings.select(
        pl.col("user").alias("user_id"),
        pl.col("item").alias("item_id"),
        pl.lit(None, pl.String).alias("surface"),
        (pl.col("seconds") * 1000).alias("timestamp_ms"),
        (pl.col("rating") >= 4).alias("action_liked"),
        (pl.col("rating") == 5).alias("action_loved"),
        (pl.col("rating") <= 2).alias("action_disliked"),
    )
    return RawTables(
        name="ml100k",
        source=raw.source,
        actions=("liked", "loved", "disliked"),
        positive_actions=("liked", "loved"),
        events=events,
        items=raw.items,
        split=None,
    )


def kuairand_log(folder: Path, users: int = 3000) -> RawTables:
    """Engagements alone, of some users: without ignored items, slates and lists."""
    raw = read_kuairand(folder)
    engaged = pl.any_horizontal(pl.col(f"action_{name}") == 1 for name in ("click", "long_view", "like"))
    events = raw.events.filter(pl.col("timestamp_ms").is_not_null() & engaged)
    some = events.group_by("user_id").len().filter(pl.col("len") >= 8)["user_id"].sort()
    chosen = some.gather(np.linspace(0, len(some) - 1, users).astype(np.int64))
    names = ("click", "long_view", "like")
    events = events.filter(pl.col("user_id").is_in(chosen.implode()))
    return RawTables(
        name="kuairand_log",
        source=raw.source,
        actions=names,
        positive_actions=("long_view", "like"),
        events=events.select("user_id", "item_id", "surface", "timestamp_ms", *(f"action_{name}" for name in names)),
        items=raw.items,
        split=None,
    )


def best_ten(kind: str, data: Sequences, requests: Requests, surfaces: tuple[str, ...]) -> NDArray[np.int64]:
    """The ten [R, 10] that the truth gives the most value, in the synthetic sets; seen items are left out."""
    kinds = np.random.default_rng(11).integers(0, 4, ITEMS)
    row_of = np.argsort([int(item[1:]) for item in data.item_ids])
    place_of = np.argsort(row_of)
    good, poor = (sum(chances) for chances in CHANCES[kind])
    tens = np.zeros((len(requests), 10), np.int64)
    for i, (user, end) in enumerate(zip(requests.users.tolist(), requests.ends.tolist(), strict=True)):
        device = int(surfaces[data.surfaces[end]] == "desktop")
        following = (place_of[data.rows[end - 1]] + 1 + np.arange(STEPS)) % ITEMS
        worth = STEP_DECAY ** np.arange(STEPS) * np.where(kinds[following] <= 2 * device, good, poor)
        worth[np.isin(row_of[following], data.rows[data.event_start[user] : end])] = -1.0
        tens[i] = row_of[following][np.argsort(-worth)[:10]]
    return tens


def orders_of(lists: Lists, positive: NDArray[np.bool_], scale: float) -> dict[str, Floats]:
    """Scores [R, K] of every form."""
    logit, value = scale * lists.similarity, log_value(lists, positive)
    largest = np.log(np.maximum(lists.probabilities[..., positive].max(-1), 1e-300))
    return {
        "retrieval": logit,
        "value": value,
        "product": logit + value,
        "conditional": logit + value - log_any_positive(lists, positive),
        "conditional, largest": logit + value - largest,
        **{f"product {mu:g}": logit + mu * value for mu in MUS},
        **{name: scores for name, scores in blends(lists, positive, scale).items() if name != "blend 0"},
    }


def gains(
    data: Sequences, requests: Requests, ten: NDArray[np.int64], positive: NDArray[np.bool_]
) -> dict[str, Floats]:
    """HR@10, NDCG@10, value@10 and HR@10 of the targets with the rarest positive action, by request."""
    labels = data.actions[requests.ends][:, positive].astype(np.float64)
    found = hit_gains(ten, requests.targets)
    worth = labels.sum(1)
    rarest = labels[:, labels.sum(0).argmin()]
    return {
        **found,
        "value@10": found["HR@10"] * worth / worth.mean(),
        "HR@10 rarest": found["HR@10"] * rarest / rarest.mean(),
    }


def measured(kind: str, model: UniPinRec, dataset: Dataset, data: Sequences) -> dict[str, Any]:
    """Figures of every order on the test part; mu and lambda chosen on the validation part."""
    positive = np.array([name in dataset.spec.positive_actions for name in dataset.spec.actions])
    found: dict[str, dict[str, dict[str, Floats]]] = {}
    with served(model, dataset, data) as (recommender, scale):
        limits: dict[Split, int | None] = {"valid": 800, "test": None}
        for split, limit in limits.items():
            requests = held_out_requests(data, positive, split, limit)
            requests = requests.take(np.flatnonzero(requests.targets != NO_TARGET))
            lists = answers(recommender, data, requests)
            tens = {name: lists.ten(scores) for name, scores in orders_of(lists, positive, scale).items()}
            if kind in CHANCES and split == "test":
                tens["truth"] = best_ten(kind, data, requests, dataset.spec.surfaces)
            found[split] = {name: gains(data, requests, ten, positive) for name, ten in tens.items()}
    grid = [
        "retrieval",
        "value",
        "product",
        *(f"product {mu:g}" for mu in MUS),
        *(f"blend {x:g}" for x in LAMBDAS if x),
    ]
    chosen = max(grid, key=lambda name: float(found["valid"][name]["NDCG@10"].mean()))
    by_value = max(grid, key=lambda name: float(found["valid"][name]["value@10"].mean()))
    test = {**found["test"], "chosen": found["test"][chosen], "chosen by value": found["test"][by_value]}
    return {
        "targets": len(test["retrieval"]["HR@10"]),
        "retrieval_scale": round(scale, 3),
        "chosen": chosen,
        "chosen by value": by_value,
        "test": {
            figure: compared({name: by_figure[figure] for name, by_figure in test.items()}, "retrieval")
            for figure in test["retrieval"]
        },
    }


def config_of(kind: str, row: str, seed: int) -> RunConfig:
    """The settings of one run."""
    model, train = SETTINGS[kind]
    config = load_run_config("tiny", {"seed": seed, **train})
    changed = msgspec.structs.replace(config.model, **{"mark_masked": ROWS[row][0], **model})
    return RunConfig(model=changed, train=config.train)


def trained_model(dataset: Dataset, config: RunConfig, out: Path, trainer: type[Trainer]) -> UniPinRec:
    """Train, unless an earlier call has; the best epoch by validation, which is retrieval's alone here."""
    if not (out / "done").exists():
        for report in trainer(dataset, config, out).run():
            if isinstance(report, EpochReport):
                score = report.metrics.selection_score()
                sys.stderr.write(f"{out.name} epoch {report.epoch + 1} {report.seconds:.0f} s valid {score:.4f}\n")
                sys.stderr.flush()
        (out / "done").touch()
    return loaded(out, Trainer)


def main() -> None:
    """Train and measure; earlier results are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="holds the folders ml-100k and kuairand-pure")
    parser.add_argument("--sets", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], RawTables]] = {
        "case_a": case_a,
        "always": lambda: synthetic("always"),
        "sometimes": lambda: synthetic("sometimes"),
        "ml100k": lambda: movielens(options.data / "ml-100k"),
        "kuairand_log": lambda: kuairand_log(options.data / "kuairand-pure"),
    }
    for kind in options.sets:
        dataset = build_dataset(makers[kind]())
        data = sequences_of(dataset)
        for seed in options.seeds:
            for row in options.rows:
                name = f"{kind}_{row}_seed{seed}"
                if name not in kept():
                    trainer = TRAINERS.get(row, Trainer)
                    model = trained_model(dataset, config_of(kind, row, seed), options.out / name, trainer)
                    run = measured(kind, model, dataset, data)
                    document = {**card("served_without_slates"), "settings": SETTINGS, "runs": {**kept(), name: run}}
                    RESULT.write_text(json.dumps(document, indent=1) + "\n")
                said(name, kept()[name])


def kept() -> dict[str, Any]:
    """The runs in the result, to which several processes may add."""
    runs: dict[str, Any] = json.loads(RESULT.read_bytes())["runs"] if RESULT.exists() else {}
    return runs


def said(name: str, run: dict[str, Any]) -> None:
    """Print the means."""
    sys.stdout.write(f"{name} targets {run['targets']} chosen {run['chosen']} / {run['chosen by value']}\n")
    for order in run["test"]["HR@10"]:
        figures = {figure: by_order[order] for figure, by_order in run["test"].items()}
        shown = " ".join(
            f"{figure} {f['mean']:.4f} ({f['minus retrieval']['mean']:+.4f} ± {f['minus retrieval']['se']:.4f})"
            for figure, f in figures.items()
        )
        sys.stdout.write(f"  {order:22} {shown}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
