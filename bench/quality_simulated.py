"""The effect of a mark on masked events, in histories of engagements alone: simulated users, three ways of training.

    python bench/quality_simulated.py --out RUNS [--seeds 0 1 2]

Rows: "marked" (ours), "unmarked" (the paper's form: a masked event has exactly the form of a candidate), "unmasked"
(p_mask 0). Settings of the demo. Popularity and the simulator's ceiling are measured on the same requests.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
import numpy as np
import torch
from common import card
from numpy.typing import NDArray
from quality_runs import figures, finished, keep, popularity_scores, summary, trained

from unipinrec.models.data.schema import DatasetSpec, read_dataset, write_dataset
from unipinrec.models.data.sequences import Sequences, sequences_of
from unipinrec.models.evaluate import Requests, Scores, held_out_requests, metrics_of, rank_catalogue, shown_items
from unipinrec.models.simulator.oracle import Oracle, oracle_item_scores, read_oracle, write_oracle
from unipinrec.models.simulator.simulator import simulate
from unipinrec.models.simulator.world import SimulatorConfig
from unipinrec.models.training.config import RunConfig, load_run_config

ROWS: dict[str, tuple[bool, float]] = {"marked": (True, 0.2), "unmarked": (False, 0.2), "unmasked": (False, 0.0)}
EPOCHS = 12
ACTIONS = ("click", "save", "share", "hide")


def config_of(row: str, seed: int) -> RunConfig:
    """The settings of one run."""
    marked, probability = ROWS[row]
    config = load_run_config("tiny", {"seed": seed, "epochs": EPOCHS, "mask_probability": probability})
    return RunConfig(model=msgspec.structs.replace(config.model, mark_masked=marked), train=config.train)


def ceiling_scores(oracle: Oracle, spec: DatasetSpec, data: Sequences, requests: Requests) -> Scores:
    """The simulator's own probabilities as a scorer: no model can rank better, other than by chance."""

    def catalogue(part: Requests) -> NDArray[np.float32]:
        return oracle_item_scores(oracle, data.slate_ids[part.slates].tolist())

    rows = oracle.rows.with_row_index()
    order = _rows_in_order(rows["slate_id"].to_numpy(), data)
    truth = np.stack([rows[f"p_{name}"].to_numpy() for name in spec.actions], axis=1)[order]
    return Scores(ranks=rank_catalogue(data, requests, catalogue), probabilities=truth[shown_items(data, requests)])


def _rows_in_order(slate_ids: NDArray[np.int64], data: Sequences) -> NDArray[np.int64]:
    """Where each slate item of `data` stands in the oracle's table, which keeps the order of `slates.parquet`."""
    sizes = np.diff(data.slate_start)
    wanted = np.repeat(data.slate_ids, sizes)
    order = np.argsort(slate_ids, kind="stable")
    begin = np.searchsorted(slate_ids[order], wanted)
    within = np.arange(len(wanted)) - np.repeat(data.slate_start[:-1], sizes)
    rows: NDArray[np.int64] = order[begin + within]
    return rows


def main() -> None:
    """Train and measure seed by seed, row by row, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.out / "data"
    if not folder.exists():
        made, oracle = simulate(SimulatorConfig())
        write_dataset(made, folder)
        write_oracle(oracle, folder)
    dataset = read_dataset(folder)
    for seed in options.seeds:
        for row in ROWS:
            name = f"simulated_{row}_seed{seed}"
            trained(dataset, config_of(row, seed), options.out / name, name)
    data = sequences_of(dataset)
    positive = np.array([name in dataset.spec.positive_actions for name in dataset.spec.actions])
    requests = held_out_requests(data, positive, "test")
    scorers = {
        "popularity": popularity_scores(data, positive, requests),
        "ceiling": ceiling_scores(read_oracle(folder), dataset.spec, data, requests),
    }
    bounds = {name: metrics_of(scores, data, requests, dataset.spec.actions) for name, scores in scorers.items()}
    document = {
        **card("quality_simulated"),
        "rows": {
            row: summary([figures(run["metrics"], ACTIONS) for run in finished(f"simulated_{row}")]) for row in ROWS
        },
        "seeds": options.seeds,
        "bounds": msgspec.to_builtins(bounds, str_keys=True),
    }
    keep(document, "simulated")


if __name__ == "__main__":
    main()
