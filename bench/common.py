"""Shared by all benchmarks: the card (machine, versions, commit, date) and the JSON document at the end."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("torch", "onnx", "onnxruntime", "numpy", "hnswlib", "openvino", "polars")
ROOT = Path(__file__).resolve().parent.parent


def card(name: str) -> dict[str, Any]:
    """Describe the machine and the software that a result belongs to."""
    return {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def finish(document: dict[str, Any], name: str) -> None:
    """Write `bench/results/<name>.json` and print the document as the last line of stdout."""
    path = ROOT / "bench" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(json.dumps(document) + "\n")


def milliseconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way in each round, all ways once per round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, work in ways.items():
            took = milliseconds(work)
            if turn:
                times[name].append(took)
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    low, middle, high = np.percentile(values, [10, 50, 90])
    return {"median": round(float(middle), 3), "p10": round(float(low), 3), "p90": round(float(high), 3)}


def ratio(times: Mapping[str, Sequence[float]], over: str, under: str) -> dict[str, float]:
    """Spread of one way's time over another's, round by round."""
    return spread([a / b for a, b in zip(times[over], times[under], strict=True)])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # a copy of the tree on a machine without git
        return ""


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
