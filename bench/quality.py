"""Quality of a checkpoint's lists on held-out requests of its data, beside other orders and baselines.

python bench/quality.py CHECKPOINT --data DATA --name kuairand_pure
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from common import card, finish


def main() -> None:
    """Measure on the test split, as a user would, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    command = ["unipinrec", "evaluate", str(options.checkpoint), "--data", str(options.data), "--json"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    run = json.loads((options.checkpoint / "metrics.json").read_bytes())
    document = {
        **card("quality"),
        "config": run["config"],
        "parameters": run["parameters"],
        "training_seconds": [epoch["seconds"] for epoch in run["epochs"]],
        "evaluation": found["evaluation"],
    }
    finish(document, f"quality_{options.name}")


if __name__ == "__main__":
    main()
