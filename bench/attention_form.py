"""Which attention form: quality of both on a prepared data set, several seeds each.

    python bench/attention_form.py DATA --out RUNS [--epochs 5] [--seeds 3] [--threads 2]

Each run is kept in RUNS and skipped when the command is repeated. The speed of both rankers is measured by
`bench/stages.py`; `docs/decisions/0001-attention-form.md` draws the conclusion.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from common import card, finish

from unipinrec.models.checkpoint import load_checkpoint
from unipinrec.models.config import TINY, AttentionForm
from unipinrec.models.data.schema import Dataset, read_dataset
from unipinrec.models.data.sequences import sequences_of
from unipinrec.models.evaluate import gather_scores, held_out_requests, metrics_of, model_scores
from unipinrec.models.training.config import RunConfig, TrainConfig
from unipinrec.models.training.train import EpochReport, Trainer

FORMS: tuple[AttentionForm, ...] = ("sink", "self")


def run_once(dataset: Dataset, form: AttentionForm, train: TrainConfig, out: Path) -> dict[str, Any]:
    """Train one model and measure it on the test split."""
    config = RunConfig(model=msgspec.structs.replace(TINY, attention=form), train=train)
    began = time.monotonic()
    trainer = Trainer(dataset, config, out, resume=(out / "state.safetensors").exists())
    for report in trainer.run():
        if isinstance(report, EpochReport):
            sys.stderr.write(f"{form} seed {train.seed} epoch {report.epoch} {report.metrics.selection_score():.4f}\n")
    model = load_checkpoint(out).model
    data = sequences_of(dataset)
    positive = np.array([name in dataset.spec.positive_actions for name in dataset.spec.actions])
    requests = held_out_requests(data, positive, "test")
    scores = gather_scores(list(model_scores(model, data, requests)))
    metrics = metrics_of(scores, data, requests, dataset.spec.actions)
    return {
        "form": form,
        "seed": train.seed,
        "seconds": round(time.monotonic() - began, 1),
        "metrics": msgspec.to_builtins(metrics, str_keys=True),
    }


def summary(runs: list[dict[str, Any]], actions: list[str]) -> dict[str, Any]:
    """Mean and spread (smallest, largest) over the seeds of each form."""
    rows: dict[str, Any] = {}
    for form in FORMS:
        chosen = [r["metrics"] for r in runs if r["form"] == form]
        figures = {
            "HR@10": [m["retrieval"]["hit_rate"]["10"] for m in chosen],
            "NDCG@10": [m["retrieval"]["ndcg"]["10"] for m in chosen],
        }
        for action in actions:
            figures[f"{action} AUC"] = [m["ranking"][action]["auc"] for m in chosen]
            figures[f"{action} GAUC"] = [m["ranking"][action]["gauc"] for m in chosen]
        rows[form] = {
            name: {"mean": round(statistics.fmean(v), 5), "min": round(min(v), 5), "max": round(max(v), 5)}
            for name, v in figures.items()
        }
    return rows


def main() -> None:
    """Run both forms, seed by seed, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--actions", nargs="+", default=["click", "long_view", "like"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dataset = read_dataset(options.data)
    runs = []
    for seed in range(options.seeds):
        for form in FORMS:
            out = options.out / f"{form}-{seed}"
            result = out / "result.json"
            if not result.exists():
                train = TrainConfig(epochs=options.epochs, seed=seed)
                document = run_once(dataset, form, train, out)
                result.write_text(json.dumps(document))
            runs.append(json.loads(result.read_text()))
    document = {
        **card("attention_form"),
        "data": dataset.spec.name,
        "model": msgspec.to_builtins(TINY),
        "epochs": options.epochs,
        "threads": options.threads,
        "summary": summary(runs, options.actions),
        "runs": runs,
    }
    finish(document, "attention_form")


if __name__ == "__main__":
    main()
