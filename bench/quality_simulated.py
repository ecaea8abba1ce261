"""What a mark on masked events does, where a history holds engagements alone: simulated users, three ways of training.

    python bench/quality_simulated.py --out RUNS [--seeds 0 1 2]

Rows: "marked" (ours), "unmarked" (the paper's form: a masked event has exactly the form of a candidate), "unmasked"
(p_mask 0). Settings of the demo. Popularity and the simulator's ceiling are measured on the same requests.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
import torch
from common import card
from quality_runs import figures, finished, keep, summary, trained

from unipinrec.models.compare import compare_scorers
from unipinrec.models.data_schema import read_dataset, write_dataset
from unipinrec.models.simulator import SimulatorConfig, simulate
from unipinrec.models.simulator_oracle import write_oracle
from unipinrec.models.train_config import RunConfig, load_run_config

ROWS: dict[str, tuple[bool, float]] = {"marked": (True, 0.2), "unmarked": (False, 0.2), "unmasked": (False, 0.0)}
EPOCHS = 12
ACTIONS = ("click", "save", "share", "hide")


def config_of(row: str, seed: int) -> RunConfig:
    """The settings of one run."""
    marked, probability = ROWS[row]
    config = load_run_config("tiny", {"seed": seed, "epochs": EPOCHS, "mask_probability": probability})
    return RunConfig(model=msgspec.structs.replace(config.model, mark_masked=marked), train=config.train)


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
    bounds = compare_scorers(options.out / f"simulated_marked_seed{options.seeds[0]}", folder, "test")
    document = {
        **card("quality_simulated"),
        "rows": {
            row: summary([figures(run["metrics"], ACTIONS) for run in finished(f"simulated_{row}")]) for row in ROWS
        },
        "seeds": options.seeds,
        "bounds": {name: msgspec.to_builtins(bounds[name], str_keys=True) for name in ("popularity", "ceiling")},
    }
    keep(document, "simulated")


if __name__ == "__main__":
    main()
