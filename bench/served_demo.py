"""True value of the ten items of a slate, on the simulated data of the demo, in every order.

    python bench/served_demo.py --out RUNS [--seeds 0 1 2] [--rows plain dropout ...]

The true value of ten items is the mean of their true chances of a click at the moment of the request. Only orders that
a model can choose without the truth are candidates: the blend's lambda is that with the best AUC within the slates of
the validation part. The truth is for reporting alone. "closed": share of the gap between popularity and the best ten.
"shipped" is what `export --data` stores in the manifest: the order that it chose, and the lists that it serves.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from common import ROOT, card
from numpy.typing import NDArray
from quality_runs import loaded
from served_orders import (
    LAMBDAS,
    SERVED,
    Floats,
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

from unipinrec.export.bundle_writer import ExportOptions, export_bundle
from unipinrec.export.checkpoint_source import source_from_checkpoint
from unipinrec.export.data_histories import histories_from_data
from unipinrec.models.data.schema import Dataset, read_dataset, write_dataset
from unipinrec.models.data.sequences import Sequences, sequences_of
from unipinrec.models.evaluate import NO_TARGET, Requests, held_out_requests, history_rows
from unipinrec.models.model import UniPinRec
from unipinrec.models.simulator.oracle import Oracle, oracle_click_chances, read_oracle, write_oracle
from unipinrec.models.simulator.simulator import simulate
from unipinrec.models.simulator.world import SimulatorConfig
from unipinrec.models.training.config import RunConfig, load_run_config
from unipinrec.models.training.train import EpochReport, Trainer

EPOCHS = 12
RESULT = ROOT / "bench" / "results" / "served_demo.json"
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "dropout": ({"dropout": 0.1}, {}),
    "dropout_18": ({"dropout": 0.1}, {"epochs": 18}),
    "dropout_wide": (
        {"dropout": 0.1, "hidden_size": 96, "num_heads": 3, "num_kv_heads": 3, "intermediate_size": 288},
        {},
    ),
    "dropout_history": ({"dropout": 0.1}, {"history_candidates": 8}),
}


def config_of(row: str, seed: int) -> RunConfig:
    """The demo's settings, changed as the row says."""
    model, train = ROWS[row]
    config = load_run_config("tiny", {"seed": seed, "epochs": EPOCHS, **train})
    return RunConfig(model=msgspec.structs.replace(config.model, **model), train=config.train)


def trained_model(dataset: Dataset, config: RunConfig, out: Path) -> UniPinRec:
    """Train, unless an earlier call has; the best epoch by validation."""
    if not (out / "done").exists():
        for report in Trainer(dataset, config, out).run():
            if isinstance(report, EpochReport):
                score = report.metrics.selection_score()
                sys.stderr.write(f"{out.name} epoch {report.epoch + 1} {report.seconds:.0f} s valid {score:.4f}\n")
        (out / "done").touch()
    return loaded(out, Trainer)


def references(data: Sequences, requests: Requests, chances: Floats, popular: Floats) -> dict[str, Floats]:
    """True value [R] of the ten most popular items that are eligible, and of the best ten."""
    eligible = np.ones(chances.shape, bool)
    for i, (user, end) in enumerate(zip(requests.users.tolist(), requests.ends.tolist(), strict=True)):
        eligible[i, history_rows(data, user, end)] = False
    best = -np.sort(-np.where(eligible, chances, -1.0), axis=1)[:, :SERVED].mean(1)
    ten = np.argsort(-np.where(eligible, popular, -1.0), axis=1, kind="stable")[:, :SERVED]
    return {"popularity": np.take_along_axis(chances, ten, axis=1).mean(1), "best": best}


def popularity(data: Sequences, positive: NDArray[np.bool_]) -> Floats:
    """Positive events [N] of each item before the test part."""
    assert data.split is not None
    counted = (data.timestamps_ms < data.split.test_start_ms) & (data.actions[:, positive] > 0).any(1)
    return np.bincount(data.rows[counted], minlength=data.num_items).astype(np.float64)


def measured(model: UniPinRec, dataset: Dataset, data: Sequences, oracle: Oracle) -> dict[str, Any]:
    """All figures of one model."""
    positive = np.array([name in dataset.spec.positive_actions for name in dataset.spec.actions])
    valid, test = held_out_requests(data, positive, "valid"), held_out_requests(data, positive, "test")
    auc: dict[str, dict[str, float]] = {}
    with served(model, dataset, data) as (recommender, scale):
        lists = answers(recommender, data, test)
        for split, part in (("valid", valid), ("test", test)):
            shown = answers(recommender, data, part, shown=True)
            clicked = shown_labels(shown, data, part)[..., positive][..., 0]
            scored = {**blends(shown, positive, scale), "retrieval": shown.similarity}
            auc[split] = {
                name: round(float(np.nanmean(slate_auc(shown, clicked, scores))), 5) for name, scores in scored.items()
            }
    chosen = max((f"blend {share:g}" for share in LAMBDAS), key=auc["valid"].__getitem__)
    orders = {"value": log_value(lists, positive), "retrieval": lists.similarity, **blends(lists, positive, scale)}
    orders["chosen blend"] = orders[chosen]
    chances = oracle_click_chances(oracle, data.slate_ids[test.slates].tolist()).astype(np.float64)
    tens = {name: lists.ten(scores) for name, scores in orders.items()}
    true = {name: np.take_along_axis(chances, ten, axis=1).mean(1) for name, ten in tens.items()}
    true |= references(data, test, chances, popularity(data, positive))
    gap = true["best"].mean() - true["popularity"].mean()
    has = test.targets != NO_TARGET
    hits = {name: hit_gains(ten[has], test.targets[has]) for name, ten in tens.items()}
    return {
        "requests": len(test),
        "retrieval_scale": round(scale, 3),
        "chosen": chosen,
        "auc_within_slates": auc,
        "true_value": {
            name: {**mean_and_error(values), "value minus this": mean_and_error(true["value"] - values)}
            for name, values in true.items()
        },
        "closed": {name: round(float((v.mean() - true["popularity"].mean()) / gap), 4) for name, v in true.items()},
        "logged_next": {
            figure: compared({name: gains[figure] for name, gains in hits.items()}, "value")
            for figure in ("HR@10", "NDCG@10")
        },
    }


def shipped(checkpoint: Path, folder: Path, out: Path) -> dict[str, Any]:
    """The figures of `export --data` for its own lists, in the order that it chooses."""
    source = source_from_checkpoint(checkpoint, folder)
    manifest = export_bundle(
        source,
        out,
        histories=histories_from_data(folder, source, 100),
        options=ExportOptions(data=folder, evaluated=1_000_000),
    )
    found: dict[str, Any] = msgspec.to_builtins({"order": manifest.order, "evaluation": manifest.evaluation})
    return found


def main() -> None:
    """Train and measure; earlier results are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["plain"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.out / "data"
    if not folder.exists():
        made, truth = simulate(SimulatorConfig())
        write_dataset(made, folder, also=lambda partial: write_oracle(truth, partial))
    dataset, oracle = read_dataset(folder), read_oracle(folder)
    data = sequences_of(dataset)
    for row in options.rows:
        for seed in options.seeds:
            name = f"{row}_seed{seed}"
            if name not in kept():
                model = trained_model(dataset, config_of(row, seed), options.out / name)
                run = measured(model, dataset, data, oracle)
                runs = {**kept(), name: run}
                document = {**card("served_demo"), "rows": summary(runs), "runs": runs}
                RESULT.write_text(json.dumps(document, indent=1) + "\n")
            run = kept()[name]
            if "shipped" not in run:
                bundle = options.out / f"{name}_bundle"
                run = {**run, "shipped": shipped(options.out / name, folder, bundle)}
                runs = {**kept(), name: run}
                document = {**card("served_demo"), "rows": summary(runs), "runs": runs}
                RESULT.write_text(json.dumps(document, indent=1) + "\n")
            shown = ("value", "retrieval", "chosen blend", "popularity", "best")
            means = {order: run["true_value"][order]["mean"] for order in shown}
            sys.stdout.write(f"{name} {means} closed {run['closed']['value']} {run['chosen']}\n")
            sys.stdout.flush()


def kept() -> dict[str, Any]:
    """The runs in the result, to which several processes may add."""
    runs: dict[str, Any] = json.loads(RESULT.read_bytes())["runs"] if RESULT.exists() else {}
    return runs


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """Means over the seeds of each row."""
    rows: dict[str, Any] = {}
    for row in ROWS:
        found = [run for name, run in runs.items() if name.rpartition("_seed")[0] == row]
        if found:
            rows[row] = {
                "seeds": len(found),
                "settings": {**ROWS[row][0], **ROWS[row][1]},
                "true_value": {
                    name: round(float(np.mean([run["true_value"][name]["mean"] for run in found])), 5)
                    for name in found[0]["true_value"]
                },
                "closed by value": round(float(np.mean([run["closed"]["value"] for run in found])), 4),
                "closed as shipped": [
                    round(run["shipped"]["evaluation"]["gap_closed"], 4) for run in found if "shipped" in run
                ],
            }
    return rows


if __name__ == "__main__":
    main()
