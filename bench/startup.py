"""How long a server takes from its start to its first answer, step by step.

    python bench/startup.py [--items 100000] [--bundle FOLDER] [--rounds 9]

Card: a bundle of the `small` size (4 layers, d = 256) with random weights and `--items` items, or the one given. A new
process for each round, files in the page cache; median ms of the rounds:

    python      the interpreter, up to its first line
    import      numpy, ONNX Runtime, hnswlib and this package
    open        `Bundle.open`: sha256 of every file, ids, item table checked
    engine      the graphs in ONNX Runtime
    golden      the golden requests replayed and compared
    index       hnswlib's file loaded and compared with the items
    rest        of `Recommender.load`
    request     the first request: 20 items after 64 events
    total       all of it

`sha256` is the part of `open` that hashing takes, measured by itself at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import card, finish
from synthetic import random_source

from unipinrec.export.bundle_writer import export_bundle

ONCE = """
import sys, time
laps, began = {}, float(sys.argv[2])
def lap(name):
    global began
    now = time.time()
    laps[name], began = (now - began) * 1e3, now
def timed(name, function):
    def work(*arguments):
        start = time.perf_counter()
        result = function(*arguments)
        laps[name] = (time.perf_counter() - start) * 1e3
        return result
    return work
lap("python")
import hnswlib, onnxruntime
from unipinrec.runtime import Bundle, Recommender, recommender as module
from unipinrec.runtime.bundle_files import file_problems
lap("import")
for name, owner, function in (
    ("open", module.Bundle, "open"),
    ("engine", module.Engine, "open"),
    ("golden", module, "require_golden"),
    ("index", module.Retriever, "open"),
):
    setattr(owner, function, timed(name, getattr(owner, function)))
recommender = Recommender.load(sys.argv[1])
lap("rest")
laps["rest"] -= sum(laps[name] for name in ("open", "engine", "golden", "index"))
manifest, ids = recommender.bundle.manifest, recommender.bundle.item_ids
events = min(64, manifest.model.max_history)
recommender.recommend([{"item": ids[row], "actions": manifest.actions[:1]} for row in range(events)], 20)
lap("request")
laps["total"] = sum(laps.values())
assert not file_problems(recommender.bundle.path, manifest.files)
lap("sha256")
import json
print(json.dumps(laps))
"""


def one_start(bundle: Path) -> dict[str, float]:
    """Milliseconds of each step in a process of its own."""
    command = [sys.executable, "-c", ONCE, str(bundle), str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    laps: dict[str, float] = json.loads(done.stdout)
    return laps


def measure(bundle: Path, rounds: int) -> dict[str, Any]:
    """Medians of the rounds, after one that fills the page cache, and what was opened."""
    one_start(bundle)
    starts = [one_start(bundle) for _ in range(rounds)]
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    size = sum(file["size_bytes"] for file in manifest["files"].values())
    return {
        "items": manifest["num_items"],
        "bundle_mib": round(size / 2**20, 1),
        "median_ms": {name: round(float(np.median([start[name] for start in starts])), 1) for name in starts[0]},
        "total_ms": [round(start["total"], 1) for start in starts],
    }


def main() -> None:
    """Export a bundle unless one is given, start it again and again, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.bundle:
        result = measure(options.bundle, options.rounds)
    else:
        with tempfile.TemporaryDirectory() as folder:
            export_bundle(random_source("sink", options.items), Path(folder) / "bundle")
            result = measure(Path(folder) / "bundle", options.rounds)
    finish({**card("startup"), "rounds": options.rounds, **result}, "startup")


if __name__ == "__main__":
    main()
