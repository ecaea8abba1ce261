"""FP8 (E4M3) for linear layers: explicit QuantizeLinear/DequantizeLinear, calibrated on real histories.

ONNX Runtime does the quantisation. Scales are per tensor: the largest value of the calibration, or of a weight, becomes
the largest of E4M3. Only layers between the first norm or attention and the last product are quantised, if their sizes
are multiples of 16; the first and last layers of a graph lose most and cost least. All else is as in bf16, the scales
too, since TensorRT needs them in the type of the values.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from unipinrec.errors import ExportError
from unipinrec.export.precision.typed import CHEAP, MOVES, PRODUCTS, PrecisionPlan
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.manifest import Tensor, host_array
from unipinrec.runtime.graphs.backend import Backend
from unipinrec.runtime.graphs.engine import Engine, pad_histories
from unipinrec.runtime.graphs.ort_cpu import OrtBackend
from unipinrec.runtime.requests import CANDIDATES, SOON_MS, History

E4M3, LARGEST = ml_dtypes.float8_e4m3fn, 448.0
MULTIPLE = 16
CALIBRATION_EVENTS = 16_384
Inputs = dict[str, NDArray[Any]]


class Quantizer:
    """Watches the inputs of an fp32 graph, then makes a graph whose inner linear layers multiply fp8 values."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Choose the layers to quantise.

        Args:
            model: An fp32 graph with its weights inside and distinct names of nodes; not modified.
        """
        self.graph = _with_folded_weights(model)
        self.plan = PrecisionPlan(self.graph, "bf16")
        self.layers = [self.plan.nodes[index] for index in _inner_layers(self.plan)]
        self.calibrator = _calibrator(self.graph) if self.layers else None

    def watch(self, inputs: Inputs) -> None:
        """Run the graph, and record the smallest and largest value of each input of a product."""
        if self.calibrator is not None:
            self.calibrator.collect_data(_Once(inputs))

    def quantized(self) -> onnx.ModelProto:
        """The new graph, in fp32 except between a QuantizeLinear and its DequantizeLinear."""
        if self.calibrator is None:
            return self.graph
        # Imported here: it loads slowly, and only fp8 needs it.
        from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData  # noqa: PLC0415

        measured, kind = self.calibrator.compute_data(), QuantType.QFLOAT8E4M3FN
        ranges = {layer.input[0]: measured[layer.input[0]] for layer in self.layers}
        largest = {name: np.abs(values.range_value).max() for name, values in ranges.items()}
        largest |= {layer.input[1]: np.abs(self.plan.array(layer.input[1])).max() for layer in self.layers}
        quantizer = QDQQuantizer(
            copy.deepcopy(self.graph),
            per_channel=False,
            reduce_range=False,
            weight_qType=kind,
            activation_qType=kind,
            tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
            nodes_to_quantize=[layer.name for layer in self.layers],
            nodes_to_exclude=[],
            op_types_to_quantize=["Gemm", "MatMul"],
            extra_options={
                "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
                "TensorQuantOverrides": {
                    name: [{"quant_type": kind, "scale": _scale(value), "zero_point": np.array(0, E4M3)}]
                    for name, value in largest.items()
                },
            },
        )
        quantizer.quantize_model()
        quantized: onnx.ModelProto = quantizer.model.model
        _restore_inputs(quantized, self.graph, {layer.name for layer in self.layers})
        quantizer.model.topological_sort()
        return quantized


class _Watched:
    """A backend that passes the inputs of each graph to its quantizer; see `Backend`."""

    prefill_chunk: int | None = None
    rank_chunk: int | None = None
    rank_runs = 1

    def __init__(self, inner: Backend, quantizers: Mapping[str, Quantizer]) -> None:
        self.inner, self.quantizers = inner, quantizers

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Tensor]:
        """See `Backend.run`."""
        if graph in self.quantizers:
            self.quantizers[graph].watch({name: host_array(value) for name, value in inputs.items()})
        return self.inner.run(graph, inputs)

    def close(self) -> None:
        """See `Backend.close`."""
        self.inner.close()


class _Once:
    """ONNX Runtime's reader of calibration data, with one batch of inputs."""

    def __init__(self, inputs: Inputs) -> None:
        self.batches = [inputs]

    def get_next(self) -> Inputs | None:
        """The next batch; None at the end."""
        return self.batches.pop() if self.batches else None


def quantized_graphs(
    bundle: Bundle, models: Mapping[str, onnx.ModelProto], histories: Sequence[History]
) -> dict[str, onnx.ModelProto]:
    """Graphs of a bundle, by name, with fp8 layers, calibrated on requests of real users.

    Each history is encoded, extended half-way, and ranked for.

    Args:
        bundle: The bundle.
        models: Its graphs with their weights inside.
        histories: Histories of at least two events. Uses the first ones, up to CALIBRATION_EVENTS events, at least one.

    Raises:
        ExportError: No graph has a layer to quantise.
    """
    quantizers = {name: Quantizer(model) for name, model in models.items()}
    if not any(quantizer.layers for quantizer in quantizers.values()):
        raise ExportError(
            "no linear layer for fp8: a layer needs a norm or attention before it, a product behind it, and sizes that "
            f"are multiples of {MULTIPLE}; leave fp8 out"
        )
    watched = _Watched(OrtBackend(bundle.graph_files()), quantizers)
    with closing(Engine(watched, bundle.manifest.model, bundle.item_vectors)) as engine:
        events = 0
        for history in histories:
            if events and events + len(history) > CALIBRATION_EVENTS:
                break
            events += len(history)
            _answer(engine, bundle, history)
    return {name: quantizer.quantized() for name, quantizer in quantizers.items()}


def _answer(engine: Engine, bundle: Bundle, history: History) -> None:
    manifest, half = bundle.manifest, len(history) // 2
    positive = manifest.positive[None].astype(np.float32)
    engine.extend(engine.encode(pad_histories([history.part(0, half)])), pad_histories([history.part(half)]))
    encoded = engine.encode(pad_histories([history]))
    similarity = (bundle.item_vectors @ engine.retrieve(encoded, positive)[0].T).max(axis=1)
    candidates = np.argsort(-similarity, kind="stable")[None, :CANDIDATES]
    last = encoded.last_timestamps_ms
    engine.rank(encoded, candidates, history.surfaces[-1:], np.where(last < 0, last, last + SOON_MS))


def _restore_inputs(quantized: onnx.ModelProto, exact: onnx.ModelProto, layers: set[str]) -> None:
    """Undo the quantiser for all nodes except `layers`: it gives fp8 values to other nodes too."""
    graph = quantized.graph
    inputs = {node.name: node.input for node in exact.graph.node}
    for node in graph.node:
        if node.name in inputs and node.name not in layers:
            node.input[:] = inputs[node.name]
    for tensor in graph.initializer:  # some use fields that an external weight file cannot hold
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    read, kept = {name for node in graph.node for name in node.input}, {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(t for t in exact.graph.initializer if t.name in read - kept)


def _scale(largest: Any) -> NDArray[np.float32]:
    """The value of one step of E4M3, rounded to bf16."""
    scale: NDArray[np.float32] = np.array(max(largest, 1e-30) / LARGEST, ml_dtypes.bfloat16).astype(np.float32)
    return scale


def _with_folded_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which nodes that only move constants are constants: only a weight of its own can be quantised."""
    weights, nodes = {tensor.name: tensor for tensor in model.graph.initializer}, []
    for node in model.graph.node:
        if node.op_type not in MOVES or not all(name in weights for name in node.input):
            nodes.append(node)
            continue
        inputs = {name: numpy_helper.to_array(weights[name]) for name in node.input}
        for name, array in zip(node.output, ReferenceEvaluator(node).run(None, inputs), strict=True):
            weights[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
    used = {name for node in nodes for name in node.input}
    folded = copy.deepcopy(model)
    folded.graph.ClearField("node")
    folded.graph.ClearField("initializer")
    folded.graph.node.extend(nodes)
    folded.graph.initializer.extend(tensor for name, tensor in weights.items() if name in used)
    return folded


def _inner_layers(plan: PrecisionPlan) -> Iterator[int]:
    """Indices of products with a weight, a norm or attention before them, and a product behind them."""
    computed: set[str] = set()  # values that depend on a product
    normed: set[str] = set()  # those of them that also depend on an operator that is neither a product nor cheap
    for node in plan.nodes:
        if node.op_type in PRODUCTS or computed.intersection(node.input):
            computed.update(node.output)
            if node.op_type == "Attention" or node.op_type not in PRODUCTS | CHEAP or normed.intersection(node.input):
                normed.update(node.output)
    needed: set[str] = set()  # values that a product depends on
    for index in reversed(range(len(plan.nodes))):
        node = plan.nodes[index]
        behind = bool(needed.intersection(node.output))
        if behind or node.op_type in PRODUCTS:
            needed.update(node.input)
        if behind and plan.low[index] and _is_linear(plan, node) and node.input[0] in normed:
            yield index


def _is_linear(plan: PrecisionPlan, node: onnx.NodeProto) -> bool:
    if node.op_type not in ("Gemm", "MatMul") or node.input[1] not in plan.weights:
        return False
    sizes = plan.weights[node.input[1]].dims
    return len(sizes) == 2 and all(size % MULTIPLE == 0 for size in sizes)


def _calibrator(model: onnx.ModelProto) -> Any:
    from onnxruntime.quantization import create_calibrator  # noqa: PLC0415 - as above

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        onnx.save(model, path)
        return create_calibrator(path, ["Gemm", "MatMul"], augmented_model_path=str(path.with_name("more.onnx")))
