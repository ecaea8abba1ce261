"""One model for both jobs against one model for each, on KuaiRand-Pure; several seeds per row.

    python bench/quality_kuairand.py KUAIRAND_FOLDER --out RUNS [--rows joint retrieval_only ...] [--seeds 0 1 2]

Tested from 1 May 2022 on (on `time_ms`, repeated rows merged). Trained before 30 April, the best epoch chosen by 30
April; with `--last-fit` trained to 30 April for all epochs of the configuration, which a run without it has to have
chosen. All rows have the same budget and see the same batches. Runs are kept in RUNS: the command goes on where it was
stopped. Every run is written to bench/results/quality, and so is a summary of all that are there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
import torch
from common import card
from interleaved import InterleavedTrainer
from quality_runs import figures, finished, keep, summary, trained
from time_rotary import TimeRotaryTrainer

from unipinrec.models.data.kuairand import read_kuairand
from unipinrec.models.data.schema import CATEGORY_PREFIX, DENSE_PREFIX, Dataset
from unipinrec.models.data.validate import build_dataset
from unipinrec.models.training.config import RunConfig, load_run_config
from unipinrec.models.training.train import Trainer

ACTIONS = ("click", "long_view", "like")
ROWS: dict[str, dict[str, Any]] = {
    "joint": {},
    "retrieval_only": {"ranking_weight": 0.0},
    "ranking_only": {"retrieval_weight": 0.0},
    "retrieval_only_mask_0": {"ranking_weight": 0.0, "mask_probability": 0.0},
    "ranking_only_mask_0": {"retrieval_weight": 0.0, "mask_probability": 0.0},
    "mask_0": {"mask_probability": 0.0},
    "mask_0.1": {"mask_probability": 0.1},
    "mask_0.3": {"mask_probability": 0.3},
    "no_content": {},
    "self_attention": {},
    "interleaved": {"mask_probability": 0.0},
    "time_rotary": {},
    "marked": {},
    "masked_weight_0.25": {"masked_weight": 0.25},
    "wide": {},
    "wide_retrieval_only": {"ranking_weight": 0.0},
    "wide_ranking_only": {"retrieval_weight": 0.0},
}
TRAINERS: dict[str, type[Trainer]] = {"interleaved": InterleavedTrainer, "time_rotary": TimeRotaryTrainer}
WIDE = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 4, "intermediate_size": 384}
MODEL: dict[str, dict[str, Any]] = {
    "self_attention": {"attention": "self"},
    "marked": {"mark_masked": True},
    **dict.fromkeys(("wide", "wide_retrieval_only", "wide_ranking_only"), WIDE),
}


def without_content(dataset: Dataset) -> Dataset:
    """The same data with items that are ids alone."""
    content = [c for c in dataset.items.columns if c.startswith((DENSE_PREFIX, CATEGORY_PREFIX))]
    return Dataset(
        spec=msgspec.structs.replace(dataset.spec, dense={}, categories={}),
        events=dataset.events,
        slates=dataset.slates,
        items=dataset.items.drop(content),
    )


def config_of(options: argparse.Namespace, row: str, seed: int) -> RunConfig:
    """The settings of one run."""
    config = load_run_config(str(options.config), {"seed": seed, "epochs": options.epochs, **ROWS[row]})
    train = msgspec.structs.replace(config.train, fit_validation=options.last_fit)
    return RunConfig(model=msgspec.structs.replace(config.model, **MODEL.get(row, {})), train=train)


def row_figures(row: str, run: dict[str, Any]) -> dict[str, float | None]:
    """The figures of a run, without those of a head that was not trained."""
    found = figures(run["metrics"], ACTIONS)
    if "retrieval_only" in row:
        return {name: value for name, value in found.items() if "@" in name}
    if "ranking_only" in row:
        return {name: value for name, value in found.items() if "@" not in name}
    return found


def main() -> None:
    """Train and measure seed by seed, row by row, so that what is there can be compared at any time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "configs" / "kuairand.toml")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--last-fit", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dataset = build_dataset(read_kuairand(options.folder))
    table = f"{options.config.stem}{'_last_fit' if options.last_fit else ''}"
    for seed in options.seeds:
        for row in options.rows:
            name = f"{table}_{row}_seed{seed}"
            data = without_content(dataset) if row == "no_content" else dataset
            trained(data, config_of(options, row, seed), options.out / name, name, TRAINERS.get(row, Trainer))
            summarised(table)
    for row, found in summarised(table).items():
        print(row, " ".join(f"{name} {values['mean']:.4f}" for name, values in found.items()))


def summarised(table: str) -> dict[str, dict[str, dict[str, float]]]:
    """Write the summary of every finished run of a table, whichever call trained it; returns its rows."""
    runs = {row: finished(f"{table}_{row}") for row in ROWS}
    rows = {row: summary([row_figures(row, run) for run in found]) for row, found in runs.items() if found}
    seeds = {row: [run["seed"] for run in found] for row, found in runs.items() if found}
    keep({**card("quality_kuairand"), "seeds": seeds, "rows": rows}, table)
    return rows


if __name__ == "__main__":
    main()
