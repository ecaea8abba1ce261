"""The limit of the CPU: arithmetic over the measured rate of matrix products, and where the time above it goes.

    OMP_NUM_THREADS=1 python bench/limits.py [--rounds 31]

Card: the `small` size with random weights, one thread, ONNX Runtime. `limit_ms` of a stage is its multiplications over
the rate that ONNX Runtime's own matrix product reaches at the model's widest layer: the time if softmax,
norms, rotations, copies and the narrow products of attention (32 columns) cost nothing. `share` is the part of the
graph's time in each operator, from ONNX Runtime's profiler. `copy_gb_per_s` is the rate of copying 8 MB, the keys and
values of 992 events. `openvino_bf16` says the same of OpenVINO in bf16, where the CPU computes in it: its own rate, the
encoder's time and limit at 992 events, and its own profile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from backends import ITEMS, history_of
from common import card, finish, interleaved, spread
from onnx import TensorProto, helper, numpy_helper
from synthetic import NOW_MS, random_bundle

from unipinrec.models.config import SMALL
from unipinrec.runtime import Bundle
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.graphs.engine import Engine
from unipinrec.runtime.graphs.openvino_cpu import OpenVinoBackend, import_openvino
from unipinrec.runtime.graphs.ort_cpu import OrtBackend, flush_denormals, load_session
from unipinrec.runtime.machine import has_bf16

WIDTH, INNER, LAYERS = SMALL.hidden_size, SMALL.intermediate_size, SMALL.num_layers
ROWS = 496
LAYER = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER  # multiplications of one token in one layer, attention left out
KEYS = 2 * WIDTH * WIDTH


def encode_macs(events: int) -> float:
    """Causal attention, and nothing behind the last layer's keys and values."""
    attention = (LAYERS - 1) * 2 * WIDTH * events * (events + 1) / 2
    return events * ((LAYERS - 1) * LAYER + KEYS) + attention


def rank_macs(events: int, candidates: int, actions: int) -> float:
    attention = LAYERS * 2 * WIDTH * candidates * (events + 1)
    return candidates * (LAYERS * (LAYER - KEYS) + actions * WIDTH * WIDTH) + attention


def product() -> bytes:
    """The graph of a product [496, 256] x [256, 704], the model's widest, with fixed weights."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, WIDTH])]
    made = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, INNER])]
    weights = [numpy_helper.from_array(np.random.default_rng(0).random((WIDTH, INNER), np.float32), "w")]
    opset = [helper.make_opsetid("", 24)]
    graph = helper.make_graph(nodes, "product", given, made, weights)
    serialized: bytes = helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    return serialized


def rate_of(run: Callable[[], object], rounds: int) -> float:
    """Multiplications per millisecond of that product."""
    return ROWS * WIDTH * INNER / float(np.median(interleaved({"": run}, 20 * rounds)[""]))


def product_rate(rounds: int) -> float:
    """What ONNX Runtime reaches."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(product(), options, providers=["CPUExecutionProvider"])
    return rate_of(partial(session.run, None, {"x": np.ones((ROWS, WIDTH), np.float32)}), rounds)


def copy_rate(rounds: int) -> float:
    source = np.ones(2 * LAYERS * WIDTH * 993, np.float32)
    target = np.empty_like(source)
    times = interleaved({"copy": partial(np.copyto, target, source)}, 5 * rounds)["copy"]
    return source.nbytes / float(np.median(times)) / 1e6


class Profiled(OrtBackend):
    """Writes a profile of each graph."""

    def _load(self, graph: GraphFile, threads: int) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(tempfile.gettempdir()) / graph.name)
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        with flush_denormals():
            return load_session(onnxruntime, graph, options, "CPUExecutionProvider")

    def shares(self, graph: str) -> dict[str, float]:
        """Share of a graph's time by operator, the largest first."""
        events = json.loads(Path(self._sessions[graph].end_profiling()).read_text())
        spent: Counter[str] = Counter()
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                spent[event["args"]["op_name"]] += event["dur"]
        return {name: round(time / spent.total(), 3) for name, time in spent.most_common(8)}


class WatchedRequests:
    """A compiled model of OpenVINO that keeps the requests made of it."""

    def __init__(self, compiled: Any) -> None:
        self.inputs, self.outputs, self._compiled = compiled.inputs, compiled.outputs, compiled
        self.requests: list[Any] = []

    def create_infer_request(self) -> Any:
        self.requests.append(self._compiled.create_infer_request())
        return self.requests[-1]


class ProfiledOpenVino(OpenVinoBackend):
    """Counts the time of each layer."""

    def _load(self, graph: GraphFile, inputs: Any) -> Any:
        self._core.set_property("CPU", {"PERF_COUNT": True})
        loaded = super()._load(graph, inputs)
        return dataclasses.replace(loaded, compiled=WatchedRequests(loaded.compiled))

    def shares(self, graph: str) -> dict[str, float]:
        """Share of the last run of a graph by kind of layer and the precision it ran in, the largest first."""
        spent: Counter[str] = Counter()
        for layer in self._graphs[graph].compiled.requests[-1].get_profiling_info():
            spent[f"{layer.node_type} {layer.exec_type.split('_')[-1]}"] += layer.real_time.total_seconds()
        return {name: round(time / spent.total(), 3) for name, time in spent.most_common(8) if time}


def openvino_bf16(bundle: Bundle, rounds: int) -> dict[str, Any]:
    graphs, specs, model = bundle.graph_files(), bundle.manifest.graphs, bundle.manifest.model
    backend = OpenVinoBackend(graphs, specs, 1, precision="bf16")
    engine = Engine(backend, model, bundle.item_vectors)
    profiled = ProfiledOpenVino(graphs, specs, 1, precision="bf16")
    history = history_of(992)
    took = spread(interleaved({"": partial(engine.prefill, history)}, rounds)[""])
    Engine(profiled, model, bundle.item_vectors).prefill(history)
    options = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    ov = import_openvino()
    core = ov.Core()
    request = core.compile_model(core.read_model(product(), b""), "CPU", options).create_infer_request()
    request.set_input_tensor(ov.Tensor(np.ones((ROWS, WIDTH), np.float32)))
    rate = rate_of(request.infer, rounds)
    return {
        "gflop_per_s": round(2 * rate / 1e6, 1),
        "encode_992_ms": took,
        "encode_992_limit_ms": round(encode_macs(992) / rate, 2),
        "share": profiled.shares("encoder"),
    }


def main() -> None:
    """Measure rates and stages, profile the graphs; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    rate = product_rate(rounds)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.open(random_bundle(Path(folder) / "bundle", ITEMS))
        model, actions = bundle.manifest.model, len(bundle.manifest.actions)
        engine = Engine(OrtBackend(bundle.graph_files(), 1), model, bundle.item_vectors)
        profiled = Profiled(bundle.graph_files(), 1)
        watched = Engine(profiled, model, bundle.item_vectors)
        context = np.zeros(1, np.int64), np.array([NOW_MS])
        for events in (256, 992):
            history = history_of(events)
            past = engine.prefill(history)
            took = spread(interleaved({"": partial(engine.prefill, history)}, rounds)[""])
            limit = round(encode_macs(events) / rate, 2)
            rows.append({"stage": "encode", "n": events, "ms": took, "limit_ms": limit})
            watched.prefill(history)
            for count in (128, 656):
                shown = np.arange(count)[None]
                took = spread(interleaved({"": partial(engine.rank, past, shown, *context)}, rounds)[""])
                limit = round(rank_macs(events, count, actions) / rate, 2)
                rows.append({"stage": "rank", "n": events, "k": count, "ms": took, "limit_ms": limit})
                watched.rank(past, shown, *context)
        beside = {"openvino_bf16": openvino_bf16(bundle, rounds)} if has_bf16() else {}
        shares = {graph: profiled.shares(graph) for graph in ("encoder", "extend", "ranker")}
    rates = {"gflop_per_s": round(2 * rate / 1e6, 1), "copy_gb_per_s": round(copy_rate(rounds), 1)}
    document = {**card("limits"), "threads": 1, "rounds": rounds, **rates, "rows": rows, "share": shares, **beside}
    finish(document, "limits")


if __name__ == "__main__":
    main()
