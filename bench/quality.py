"""Quality of a checkpoint on held-out requests, beside popularity and, on simulated data, the ceiling.

python bench/quality.py CHECKPOINT --data DATA --name kuairand_pure
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import msgspec
from common import card, finish

from unipinrec.models.compare import compare_scorers
from unipinrec.models.data_schema import read_spec


def main() -> None:
    """Measure on the test split and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    scorers = compare_scorers(options.checkpoint, options.data, "test")
    run = json.loads((options.checkpoint / "metrics.json").read_bytes())
    document = {
        **card("quality"),
        "data": read_spec(options.data).name,
        "config": run["config"],
        "parameters": run["parameters"],
        "training_seconds": [epoch["seconds"] for epoch in run["epochs"]],
        "scorers": msgspec.to_builtins(scorers, str_keys=True),
    }
    finish(document, f"quality_{options.name}")


if __name__ == "__main__":
    main()
