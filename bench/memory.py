"""Memory of the graphs: the bound of `work_bytes` against measured peaks, and OpenVINO's kept kernels.

    python bench/memory.py BUNDLE [--runs 400]

Card: the fp32 graphs of a bundle on the CPU, one thread, each row in a process of its own.

`bounds`: peak over the memory before the run, and the bound over that peak; less than 1 would be wrong.
`kernels`: runs of the encoder and the ranker in random shapes, by `KEPT_KERNELS` (5,000 is OpenVINO's default).
`grown_mib` is the growth after each fifth of the runs, `ms` the mean of both graphs, `same_ms` that of one shape.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import card, finish
from numpy.typing import NDArray

from unipinrec.runtime import Bundle
from unipinrec.runtime.device import open_engine
from unipinrec.runtime.graphs import openvino_cpu
from unipinrec.runtime.graphs.engine import work_bytes
from unipinrec.runtime.machine import keep_memory_flat

SHAPES = (
    *(("ranker", 32, 1000, 2), ("ranker", 32, 500, 62), ("ranker", 1, 4000, 60), ("ranker", 8, 3000, 30)),
    *(("encoder", 32, 64, 65), ("encoder", 300, 64, 65), ("extend", 100, 16, 49)),
)
LONG = (("ranker", 4, 384, 993), ("ranker", 1, 4000, 993), ("encoder", 2, 992, 993), ("extend", 1, 384, 993))


def status(field: str) -> int:
    """Bytes in a field of /proc/self/status."""
    found = re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def inputs(bundle: Bundle, graph: str, rows: int, tokens: int, slots: int) -> dict[str, NDArray[Any]]:
    """Inputs of a graph, all ones, on the first surface."""
    past = slots - tokens if graph == "extend" else slots
    sizes: dict[str, int] = {"batch": rows, "history": tokens, "new": tokens, "candidates": tokens, "past": past}
    specs = bundle.manifest.graphs[graph].inputs
    filled = {
        spec.name: np.ones([sizes.get(n, 0) if isinstance(n, str) else n for n in spec.shape], spec.dtype)
        for spec in specs
    }
    return {**filled, "surfaces": np.zeros_like(filled["surfaces"])}


def bound(bundle: Bundle, device: str, graph: str, rows: int, tokens: int, slots: int) -> dict[str, Any]:
    """One run of a shape."""
    backend = open_engine(bundle, device, threads=1).backend
    backend.run(graph, inputs(bundle, graph, 1, 2, 5))
    given, before = inputs(bundle, graph, rows, tokens, slots), status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    outputs = backend.run(graph, given)
    peak, most = status("VmHWM") - before, work_bytes(bundle.manifest.model, rows, tokens, slots)
    del outputs
    kept = status("VmRSS") - before
    row = {"device": device, "graph": graph, "rows": rows, "tokens": tokens, "slots": slots}
    return {**row, "peak_mib": peak >> 20, "kept_mib": kept >> 20, "bound_over_peak": round(most / peak, 2)}


def kernels(bundle: Bundle, kept: int, runs: int) -> dict[str, Any]:
    """Runs in random shapes."""
    openvino_cpu.KEPT_KERNELS = kept
    backend, rng = open_engine(bundle, "openvino", threads=1).backend, np.random.default_rng(0)
    shapes = [(1, 40, 100)] * 20
    shapes += [(int(rng.integers(1, 9)), int(rng.integers(5, 60)), int(rng.integers(20, 130))) for _ in range(runs)]
    before, grown, times = status("VmRSS"), [], []
    for turn, (rows, events, candidates) in enumerate(shapes, 1 - 20):
        given = inputs(bundle, "encoder", rows, events, events + 1)
        ranked = inputs(bundle, "ranker", rows, candidates, events + 1)
        began = time.perf_counter()
        backend.run("encoder", given)
        backend.run("ranker", ranked)
        times.append((time.perf_counter() - began) * 1e3)
        if turn > 0 and turn % (runs // 5) == 0:
            grown.append((status("VmRSS") - before) >> 20)
    same, changing = float(np.median(times[5:20])), float(np.mean(times[20:]))
    return {"kept_kernels": kept, "runs": runs, "grown_mib": grown, "ms": round(changing, 2), "same_ms": round(same, 2)}


def main() -> None:
    """Start a process for each row; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--row", type=json.loads, help="used by the processes that it starts")
    options = parser.parse_args()
    if options.row:
        keep_memory_flat()
        kind, *sizes = options.row
        bundle = Bundle.open(options.bundle)
        row = bound(bundle, *sizes) if kind == "bound" else kernels(bundle, *sizes)
        sys.stdout.write(json.dumps(row) + "\n")
        return
    model = Bundle.open(options.bundle).manifest.model
    shapes = [shape for shape in (*SHAPES, *LONG) if shape[3] <= model.max_history + 1]
    tasks: list[list[Any]] = [["bound", device, *shape] for device in ("cpu", "openvino") for shape in shapes]
    tasks += [["kernels", kept, options.runs] for kept in (5_000, openvino_cpu.KEPT_KERNELS, 0)]
    rows = []
    for task in tasks:
        words = [sys.executable, __file__, str(options.bundle), "--row", json.dumps(task)]
        rows.append(json.loads(subprocess.run(words, capture_output=True, check=True).stdout.splitlines()[-1]))
        sys.stderr.write(f"{rows[-1]}\n")
    sizes = {"layers": model.num_layers, "hidden_size": model.hidden_size}
    found = {"bounds": [row for row in rows if "graph" in row], "kernels": [row for row in rows if "runs" in row]}
    finish({**card("memory"), **sizes, **found}, f"memory_{model.hidden_size}")


if __name__ == "__main__":
    main()
