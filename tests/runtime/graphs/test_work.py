"""The bound of a run's memory against its measured peak; `bench/memory.py` has more shapes, devices and sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RUN = """
import json, re, sys
from pathlib import Path

import numpy as np

from unipinrec.runtime import Bundle
from unipinrec.runtime.graphs.ort_cpu import OrtBackend
from unipinrec.runtime.graphs.engine import work_bytes
from unipinrec.runtime.machine import keep_memory_flat

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

keep_memory_flat()
bundle = Bundle.open(sys.argv[1])
graph, rows, tokens, slots = sys.argv[2], *map(int, sys.argv[3:])
sizes = {"batch": rows, "history": tokens, "candidates": tokens, "past": slots}
inputs = {}
for spec in bundle.manifest.graphs[graph].inputs:
    inputs[spec.name] = np.ones([sizes.get(size, size) for size in spec.shape], spec.dtype)
backend = OrtBackend(bundle.graph_files(), 1)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
backend.run(graph, inputs)
bound = work_bytes(bundle.manifest.model, rows, tokens, slots)
print(json.dumps([status("VmHWM") - before, status("VmRSS") - before, bound]))
"""
SHAPES = (("ranker", 32, 1000, 2), ("ranker", 4, 4096, 65), ("encoder", 300, 64, 65))


def test_a_run_takes_no_more_than_its_bound_and_gives_it_back(bundle: Path) -> None:
    for graph, *sizes in SHAPES:
        words = [sys.executable, "-c", RUN, str(bundle), graph, *map(str, sizes)]
        peak, kept, bound = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
        assert bound / 5 < peak < bound, (graph, sizes)
        assert kept < peak / 2, (graph, sizes)
