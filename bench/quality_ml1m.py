"""Retrieval on ML-1M: leave-one-out over the whole catalogue, no sampled metrics, several seeds.

    python bench/quality_ml1m.py ml-1m_sasrec.txt.gz --out RUNS [--seeds 0 1 2] [--config bench/configs/ml1m.toml]

The file is SASRec's ("user item" per line, 999,611 rows). Runs are kept in RUNS: the command goes on where it was
stopped. Every run is written to bench/results/quality, and so is the summary over the seeds. With `--last-fit` the
event before the last is trained on as well and the last epoch is measured, as generative-recommenders does; without,
the best epoch by validation is measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
import torch
from common import card
from quality_runs import figures, keep, summary, trained

from unipinrec.models.data.sasrec import read_sasrec
from unipinrec.models.data.validate import build_dataset
from unipinrec.models.training.config import RunConfig, load_run_config

# Marked: † sees the time of each event and of the target; ‡ scores by a mixture of logits, not a dot product.
PUBLISHED = {
    "SASRec (generative-recommenders)": {"HR@10": 0.2853, "NDCG@10": 0.1603},
    "gSASRec (same file)": {"HR@10": 0.3003, "NDCG@10": 0.1726},
    "HSTU (generative-recommenders) †": {"HR@10": 0.3097, "NDCG@10": 0.1720, "HR@50": 0.5754},
    "HSTU-large (generative-recommenders) †": {"HR@10": 0.3294, "NDCG@10": 0.1893, "HR@50": 0.5935},
    "HSTU with mixture of logits (arXiv 2407.15462) †‡": {"HR@10": 0.3412, "NDCG@10": 0.1979, "HR@50": 0.6013},
    "HSTU-large (RecTools' tutorial, stable sort) †": {"HR@10": 0.3642, "NDCG@10": 0.2164, "HR@50": 0.6194},
}


def config_of(options: argparse.Namespace, seed: int) -> RunConfig:
    """The settings of one run."""
    config = load_run_config(str(options.config), {"seed": seed, "epochs": options.epochs})
    if options.last_fit:
        config = msgspec.structs.replace(
            config, train=msgspec.structs.replace(config.train, fit_validation=True, patience=None)
        )
    return config


def main() -> None:
    """Train and measure every seed, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "configs" / "ml1m.toml")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--last-fit", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dataset = build_dataset(read_sasrec(options.data))
    name = f"{options.config.stem}{'_last_fit' if options.last_fit else ''}"
    runs: list[dict[str, Any]] = []
    for seed in options.seeds:
        run = f"{name}_seed{seed}"
        runs.append(trained(dataset, config_of(options, seed), options.out / run, run))
    document = {
        **card("quality_ml1m"),
        "seeds": options.seeds,
        "summary": summary([figures(run["metrics"], ()) for run in runs]),
        "published": PUBLISHED,
    }
    keep(document, name)
    print(msgspec.json.format(msgspec.json.encode(document["summary"])).decode())


if __name__ == "__main__":
    main()
