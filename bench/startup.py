"""How long a server takes from its start to its first answer, step by step.

    python bench/startup.py [--items 100000] [--rough-index] [--bundle FOLDER] [--rounds 9] [--processes 2]

Card: a bundle of the `small` size (4 layers, d = 256) with random weights and `--items` items, or that of `--bundle`. A
new process for each round, files in the page cache; median ms of the rounds:

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

Memory after that request, in MiB: `anonymous` (index, graphs, ids), `sealed` (what is mapped of sealed files), `file`
(libraries), and `peak`, the most that the process ever had. `together` is what `--processes` that share their sealed
files take in sum, each page counted once (Pss), beside as many that do not.
"""

from __future__ import annotations

import argparse
import contextlib
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

from unipinrec.export.bundle_writer import ExportOptions, export_bundle
from unipinrec.runtime.retrieval import index_build
from unipinrec.runtime.retrieval.index_build import RECALL_TARGET

ONCE = """
import sys, time
from pathlib import Path
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
from unipinrec.runtime.bundle.integrity import file_problems
lap("import")
for name, owner, function in (
    ("open", module.Bundle, "open"),
    ("engine", module.Engine, "open"),
    ("golden", module, "require_golden"),
    ("index", module.Retriever, "open"),
):
    setattr(owner, function, timed(name, getattr(owner, function)))
shared = sys.argv[3:]
recommender = Recommender.load(Bundle.open(sys.argv[1], Path(shared[0])) if shared else sys.argv[1])
lap("rest")
laps["rest"] -= sum(laps[name] for name in ("open", "engine", "golden", "index"))
manifest, ids = recommender.bundle.manifest, recommender.bundle.item_ids
events = min(64, manifest.model.max_history)
recommender.recommend([{"item": ids[row], "actions": manifest.actions[:1]} for row in range(events)], 20)
lap("request")
laps["total"] = sum(laps.values())
def figures(file, *names):
    lines = (line.split() for line in Path("/proc/self", file).read_text().splitlines())
    found = {line[0].rstrip(":"): int(line[1]) / 1024 for line in lines if line[0].rstrip(":") in names}
    return [found[name] for name in names]
names = ("anonymous", "sealed", "file", "peak")
memory = dict(zip(names, figures("status", "RssAnon", "RssShmem", "RssFile", "VmHWM")))
if not shared:
    assert not file_problems(recommender.bundle.path, manifest.files)
    lap("sha256")
import json
print(json.dumps({"laps": laps, "memory": memory}), flush=True)
for line in sys.stdin:
    print(figures("smaps_rollup", "Pss")[0], flush=True)
"""


def one_start(bundle: Path) -> dict[str, dict[str, float]]:
    """Milliseconds of each step, and memory, of a process of its own."""
    command = [sys.executable, "-c", ONCE, str(bundle), str(time.time())]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def together(bundle: Path, count: int, shared: bool) -> float:
    """MiB of processes that hold a bundle at the same time."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        command = [sys.executable, "-c", ONCE, str(bundle), str(time.time()), *([folder] if shared else [])]
        pipe = subprocess.PIPE
        running = [
            stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)) for _ in range(count)
        ]
        said = [process.stdout.readline() for process in running if process.stdout]
        assert all(said)
        total = 0.0
        for process in running:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("now\n")
            process.stdin.flush()
            total += float(process.stdout.readline())
        for process in running:
            assert process.stdin is not None
            process.stdin.close()
        return total


def measure(bundle: Path, rounds: int, processes: int) -> dict[str, Any]:
    """Medians of the rounds, after one that fills the page cache, and the size of the bundle."""
    one_start(bundle)
    found = [one_start(bundle) for _ in range(rounds)]
    starts, memory = [one["laps"] for one in found], [one["memory"] for one in found]
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    size = sum(file["size_bytes"] for file in manifest["files"].values())
    return {
        "items": manifest["num_items"],
        "bundle_mib": round(size / 2**20, 1),
        "median_ms": {name: round(float(np.median([start[name] for start in starts])), 1) for name in starts[0]},
        "total_ms": [round(start["total"], 1) for start in starts],
        "memory_mib": {name: round(float(np.median([one[name] for one in memory])), 1) for name in memory[0]},
        "together_mib": {
            "processes": processes,
            "shared": round(together(bundle, processes, True), 1),
            "alone": round(together(bundle, processes, False), 1),
        },
    }


def main() -> None:
    """Export a bundle unless one is given, start it again and again, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--rough-index", action="store_true", help="a quick index of the same size, with low recall")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.rough_index:
        index_build.EF_CONSTRUCTION = 40
    if options.bundle:
        result = measure(options.bundle, options.rounds, options.processes)
    else:
        with tempfile.TemporaryDirectory() as folder:
            recall = 0.01 if options.rough_index else RECALL_TARGET
            export_options = ExportOptions(recall=recall)
            export_bundle(random_source("sink", options.items), Path(folder) / "bundle", options=export_options)
            result = measure(Path(folder) / "bundle", options.rounds, options.processes)
    finish({**card("startup"), "rounds": options.rounds, **result}, "startup")


if __name__ == "__main__":
    main()
