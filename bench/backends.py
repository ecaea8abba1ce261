"""Encoding and ranking in PyTorch, ONNX Runtime and OpenVINO: the same model, one thread, interleaved.

    OMP_NUM_THREADS=1 python bench/backends.py [--rounds 31] [--threads 1]

Card: the `small` size with random weights, one user. PyTorch runs the eager model that was exported, in fp32 and with
its weights in bf16; the others run the exported graphs through the runtime's engine, in the chunks that it uses.
`over` is PyTorch's time divided by the backend's in the same round: above 1, the backend is faster.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from common import card, finish, interleaved, ratio, spread
from numpy.typing import NDArray
from synthetic import ACTIONS, NOW_MS, random_source

from unipinrec.export.bundle_writer import export_bundle
from unipinrec.export.protocol import Candidates, Events, ExportSource, Past, ServableModel
from unipinrec.runtime import Bundle
from unipinrec.runtime.graphs.engine import Encoded, Engine, HistoryBatch
from unipinrec.runtime.graphs.openvino_cpu import OpenVinoBackend
from unipinrec.runtime.graphs.ort_cpu import OrtBackend
from unipinrec.runtime.machine import has_bf16

HISTORIES, CANDIDATES, ITEMS = (256, 512, 768, 992), (100, 128, 656, 1000), 2_000
PAIRS = (
    ("torch fp32", "onnxruntime"),
    ("torch fp32", "openvino fp32"),
    ("torch fp32", "openvino bf16"),
    ("torch bf16", "openvino bf16"),
)
TOLERANCE = {
    "torch fp32": 0.0,
    "torch bf16": 0.1,
    "onnxruntime": 1e-4,
    "openvino fp32": 1e-3,
    "openvino bf16": 0.1,
}
Result = NDArray[np.float32]


class Torch:
    """Eager PyTorch; in bf16 its weights are, too, so that no call casts them."""

    def __init__(self, source: ExportSource, table: torch.Tensor, dtype: torch.dtype) -> None:
        module = copy.deepcopy(source.module).to(dtype)
        self.model, self.table = cast(ServableModel, module), table
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16)

    def encode(self, history: HistoryBatch) -> Past:
        events = Events(
            item_vectors=self.table[torch.from_numpy(history.item_rows)],
            actions=torch.from_numpy(history.actions),
            surfaces=torch.from_numpy(history.surfaces),
            timestamps_ms=torch.from_numpy(history.timestamps_ms),
            lengths=torch.from_numpy(history.lengths),
        )
        with torch.inference_mode(), self.autocast:
            key_values, self.last = self.model.encode(events)
        return Past(key_values=key_values, lengths=events.lengths, timestamps_ms=events.timestamps_ms[:, -1])

    def rank(self, past: Past, rows: NDArray[np.int64]) -> Result:
        slate = Candidates(
            item_vectors=self.table[torch.from_numpy(rows)],
            surfaces=torch.zeros(1, dtype=torch.int64),
            timestamps_ms=torch.tensor([NOW_MS]),
        )
        with torch.inference_mode(), self.autocast:
            return self.model.rank(past, slate).float().numpy()


class Runtime:
    """The runtime's engine on one backend."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def encode(self, history: HistoryBatch) -> Encoded:
        return self.engine.prefill(history)

    def rank(self, past: Encoded, rows: NDArray[np.int64]) -> Result:
        return self.engine.rank(past, rows, np.zeros(1, np.int64), np.array([NOW_MS]))


def open_all(folder: Path, threads: int) -> dict[str, Any]:
    """Every way to run the model, by name."""
    source = random_source("sink", ITEMS)
    export_bundle(source, folder)
    bundle = Bundle.open(folder)
    model, graphs, specs = bundle.manifest.model, bundle.graph_files(), bundle.manifest.graphs
    table = torch.from_numpy(np.array(bundle.item_vectors))
    ways: dict[str, Any] = {
        "torch fp32": Torch(source, table, torch.float32),
        "onnxruntime": Runtime(Engine(OrtBackend(graphs, threads), model, bundle.item_vectors)),
        "openvino fp32": Runtime(Engine(OpenVinoBackend(graphs, specs, threads), model, bundle.item_vectors)),
    }
    if has_bf16():
        ways["torch bf16"] = Torch(source, table, torch.bfloat16)
        backend = OpenVinoBackend(graphs, specs, threads, precision="bf16")
        ways["openvino bf16"] = Runtime(Engine(backend, model, bundle.item_vectors))
    return ways


def history_of(events: int) -> HistoryBatch:
    rng = np.random.default_rng(events)
    return HistoryBatch(
        item_rows=rng.integers(0, ITEMS, (1, events)),
        actions=(rng.random((1, events, len(ACTIONS))) < 0.3).astype(np.float32),
        surfaces=np.zeros((1, events), np.int64),
        timestamps_ms=NOW_MS - np.sort(rng.integers(1, 10**9, (1, events)))[:, ::-1],
        lengths=np.array([events]),
    )


def measured(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    times = interleaved(calls, rounds)
    over = {f"{a} / {b}": ratio(times, a, b) for a, b in PAIRS if a in times and b in times}
    return {"ms": {name: spread(values) for name, values in times.items()}, "over": over}


def check(name: str, given: Result, expected: Result) -> float:
    """Largest difference of the logits from PyTorch's in fp32: shows that all ways compute the same."""
    difference = float(np.abs(given - expected).max())
    assert difference <= TOLERANCE[name], (name, difference)
    return difference


def main() -> None:
    """Time all ways at all shapes; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        ways = open_all(Path(folder) / "bundle", options.threads)
        for events in HISTORIES:
            history = history_of(events)
            pasts = {name: way.encode(history) for name, way in ways.items()}
            encode = {name: partial(way.encode, history) for name, way in ways.items()}
            rows.append({"stage": "encode", "n": events, **measured(encode, options.rounds)})
            for candidates in CANDIDATES:
                shown = np.random.default_rng(candidates).integers(0, ITEMS, (1, candidates))
                rank = {name: partial(way.rank, pasts[name], shown) for name, way in ways.items()}
                expected = rank["torch fp32"]()
                differences = {name: check(name, call(), expected) for name, call in rank.items()}
                row = {"stage": "rank", "n": events, "k": candidates, "largest_logit_difference": differences}
                rows.append({**row, **measured(rank, options.rounds)})
    finish({**card("backends"), "threads": options.threads, "rounds": options.rounds, "rows": rows}, "backends")


if __name__ == "__main__":
    main()
