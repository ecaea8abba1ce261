"""Training runs of the quality benchmarks: each is kept, resumed where it was cut off, and never trained twice.

Ranking is measured three ways, because a scorer that knows its user's last outcomes loses GAUC by that alone (its score
rises after a positive row, and the rest of a finite test then holds fewer; docs/quality.md): "ranking", each request
with all events before it; "frozen", with no event of the test in any history; "by_request", the first one's AUC within
requests alone, whose items were scored with the same history.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from common import ROOT, card
from numpy.typing import NDArray

from unipinrec.models.baselines import training_popularity
from unipinrec.models.checkpoint import load_checkpoint
from unipinrec.models.data.schema import Dataset
from unipinrec.models.data.sequences import Sequences, sequences_of
from unipinrec.models.evaluate import (
    NO_TARGET,
    Requests,
    Scores,
    gather_scores,
    held_out_requests,
    metrics_of,
    model_scores,
    rank_catalogue,
    shown_items,
)
from unipinrec.models.metrics import action_metrics, retrieval_metrics
from unipinrec.models.model import UniPinRec
from unipinrec.models.training.config import RunConfig
from unipinrec.models.training.state import STATE_FILE
from unipinrec.models.training.train import EpochReport, Trainer

RESULTS = ROOT / "bench" / "results" / "quality"
CUTOFFS = (1, 10, 50, 200)


def trained(
    dataset: Dataset, config: RunConfig, out: Path, name: str, trainer: type[Trainer] = Trainer
) -> dict[str, Any]:
    """Train and measure one run, or return an earlier result; also written to bench/results/quality."""
    result = out / "result.json"
    if result.exists():
        document: dict[str, Any] = json.loads(result.read_bytes())
        _require_config(out, document["config"], config)
        return document
    reports = _train(trainer(dataset, config, out, resume=(out / STATE_FILE).exists()), name)
    began = time.monotonic()
    metrics = test_metrics(dataset, loaded(out, trainer))
    document = {
        **card("quality"),
        "name": name,
        "seed": config.train.seed,
        "data": dataset.spec.name,
        "config": msgspec.to_builtins(config),
        "parameters": _parameters(out),
        "training_seconds": round(sum(r.seconds for r in reports), 1),
        "test_seconds": round(time.monotonic() - began, 1),
        "best_epoch": max((r.epoch for r in reports if r.best), default=None),
        "metrics": metrics,
        "curve": [_curve_point(r) for r in reports],
    }
    result.write_text(json.dumps(document))
    keep(document, name)
    return document


def loaded(folder: Path, trainer: type[Trainer]) -> UniPinRec:
    """The model of a checkpoint as the trainer had it: variants have the same weights under the same names."""
    plain = load_checkpoint(folder).model
    model = trainer.model_type(plain.config, plain.vocabulary)
    model.load_state_dict(plain.state_dict())
    return model.eval()


def keep(document: Mapping[str, Any], name: str) -> None:
    """Write a result to bench/results/quality."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


def finished(name: str) -> list[dict[str, Any]]:
    """The results in bench/results/quality of one row, by seed."""
    runs = [json.loads(path.read_bytes()) for path in RESULTS.glob(f"{name}_seed*.json")]
    return sorted(runs, key=lambda run: int(run["seed"]))


def test_metrics(dataset: Dataset, model: UniPinRec) -> dict[str, Any]:
    """Metrics of a model on the whole test split; "frozen" and "by_request" where slates are split by time."""
    data = sequences_of(dataset)
    positive = np.array([name in dataset.spec.positive_actions for name in dataset.spec.actions])
    requests = held_out_requests(data, positive, "test")
    scores = gather_scores(list(model_scores(model, data, requests)))
    ranking = metrics_of(scores, data, requests, dataset.spec.actions).ranking
    found: dict[str, Any] = {"retrieval": retrieval_metrics(scores.ranks, CUTOFFS), "ranking": ranking}
    if data.split is not None and ranking is not None:
        old = frozen(data, requests, data.split.test_start_ms)
        frozen_scores = gather_scores(list(model_scores(model, data, old)))
        shown = shown_items(data, requests)
        slates = np.searchsorted(data.slate_start, shown, side="right") - 1
        found["frozen"] = metrics_of(frozen_scores, data, old, dataset.spec.actions).ranking
        found["by_request"] = {
            name: action_metrics(slates, data.slate_actions[shown, c], scores.probabilities[:, c])
            for c, name in enumerate(dataset.spec.actions)
        }
    built: dict[str, Any] = msgspec.to_builtins(found, str_keys=True)
    return built


def popularity_scores(data: Sequences, positive: NDArray[np.bool_], requests: Requests) -> Scores:
    """Items by popularity in the training part; actions by each item's smoothed rate."""
    training = training_popularity(data, positive)
    ranks = rank_catalogue(data, requests, lambda part: np.tile(training, (len(part), 1)))
    return Scores(ranks=ranks, probabilities=_item_rates(data)[data.slate_rows[shown_items(data, requests)]])


def _item_rates(data: Sequences, prior_rows: float = 20.0) -> NDArray[np.float64]:
    """[N, C] rate of each action per item on training slates, shrunk towards the overall rate by `prior_rows` rows."""
    sizes = np.diff(data.slate_start)
    kept = np.ones(len(sizes), bool) if data.split is None else data.slate_timestamp_ms < data.split.valid_start_ms
    train = np.repeat(kept, sizes)
    rows, labels = data.slate_rows[train], data.slate_actions[train]
    overall = labels.mean(axis=0) if len(labels) else np.full(labels.shape[1], 0.5)
    shown = np.bincount(rows, minlength=data.num_items)[:, None]
    hits = np.stack([np.bincount(rows, labels[:, c], data.num_items) for c in range(labels.shape[1])], axis=1)
    rates: NDArray[np.float64] = (hits + prior_rows * overall) / (shown + prior_rows)
    return rates


def frozen(data: Sequences, requests: Requests, start_ms: int) -> Requests:
    """The same requests with histories that end at `start_ms`, and nothing to retrieve."""
    before = np.concatenate([[0], np.cumsum(data.timestamps_ms < start_ms)])
    known = before[data.event_start[requests.users + 1]] - before[data.event_start[requests.users]]
    ends = np.minimum(requests.ends, data.event_start[requests.users] + known)
    return replace(requests, ends=ends, targets=np.full(len(requests), NO_TARGET))


def figures(metrics: Mapping[str, Any], actions: Sequence[str]) -> dict[str, float | None]:
    """The figures of a table row from the metrics of a run."""
    row: dict[str, float | None] = {}
    if metrics["retrieval"] is not None:
        for k in ("10", "50"):
            row[f"HR@{k}"] = metrics["retrieval"]["hit_rate"][k]
            row[f"NDCG@{k}"] = metrics["retrieval"]["ndcg"][k]
    for action in actions:
        for field in ("auc", "gauc", "logloss"):
            row[f"{action} {field}"] = metrics["ranking"][action][field]
        for field in ("auc", "gauc"):
            row[f"{action} frozen {field}"] = metrics["frozen"][action][field]
        row[f"{action} request gauc"] = metrics["by_request"][action]["gauc"]
    return row


def summary(rows: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float]]:
    """Mean, median, smallest and largest of each figure over the seeds."""
    merged: dict[str, dict[str, float]] = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row[name]) is not None]
        if values:
            merged[name] = {
                "mean": round(statistics.fmean(values), 7),
                "median": round(statistics.median(values), 7),
                "min": round(min(values), 7),
                "max": round(max(values), 7),
            }
    return merged


def _train(trainer: Trainer, name: str) -> list[EpochReport]:
    for report in trainer.run():
        if isinstance(report, EpochReport):
            score = report.metrics.selection_score()
            losses = " ".join(f"{part} {value:.4f}" for part, value in report.losses.items())
            best = " best" if report.best else ""
            sys.stderr.write(
                f"{name} epoch {report.epoch + 1} {report.seconds:.0f} s {losses} valid {score:.4f}{best}\n"
            )
            sys.stderr.flush()
    return trainer.reports


def _parameters(out: Path) -> int:
    count: int = json.loads((out / "metrics.json").read_bytes())["parameters"]
    return count


def _curve_point(report: EpochReport) -> dict[str, Any]:
    found = report.metrics.retrieval
    return {
        "epoch": report.epoch + 1,
        "losses": {name: round(value, 5) for name, value in report.losses.items()},
        "NDCG@10": round(found.ndcg[10], 5) if found else None,
        "auc": {name: round(m.auc, 5) for name, m in (report.metrics.ranking or {}).items() if m.auc is not None},
    }


def _require_config(out: Path, kept: dict[str, Any], config: RunConfig) -> None:
    wanted = msgspec.to_builtins(config)
    if kept != wanted:
        raise SystemExit(f"{out} holds a finished run with other settings; choose another --out or delete it")
