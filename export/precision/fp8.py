"""FP8 (E4M3) for linear layers: explicit QuantizeLinear/DequantizeLinear, calibrated on real histories.

The quantisation itself is ONNX Runtime's. Scales are per tensor: the largest value that was seen, or that a weight has,
is the largest that E4M3 holds. Quantised are the layers between the first norm or attention and the last product, with
sizes that are multiples of 16; the first and last layers of a graph lose most and cost least. What is not quantised is
as in bf16, and so are the scales, since TensorRT wants them in the type of the values.
"""

from __future__ import annotations

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
MAX_EVENTS = 16_384
Inputs = dict[str, NDArray[Any]]


class Quantizer:
    """Watches what goes into an fp32 graph, and then makes one whose inner linear layers multiply fp8 values."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Prepare.

        Args:
            model: An fp32 graph with its weights inside and distinct names of nodes; not modified.
        """
        self.graph = _with_folded_weights(model)
        self.plan = PrecisionPlan(self.graph, "bf16")
        self.layers = [self.plan.nodes[index] for index in _inner_layers(self.plan)]
        self.calibrator = _calibrator(self.graph) if self.layers else None

    def watch(self, inputs: Inputs) -> None:
        """Run the graph once more, and note the smallest and largest value of what products read."""
        if self.calibrator is not None:
            self.calibrator.collect_data(_Once(inputs))

    def quantized(self) -> onnx.ModelProto:
        """The new graph, fp32 but for what is between a QuantizeLinear and its DequantizeLinear."""
        if self.calibrator is None:
            return self.graph
        # Imported here: it loads slowly, and who does not quantise needs none of it.
        from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData  # noqa: PLC0415

        found, kind = self.calibrator.compute_data(), QuantType.QFLOAT8E4M3FN
        ranges = {layer.input[0]: found[layer.input[0]] for layer in self.layers}
        largest = {name: np.abs(seen.range_value).max() for name, seen in ranges.items()}
        largest |= {layer.input[1]: np.abs(self.plan.array(layer.input[1])).max() for layer in self.layers}
        quantizer = QDQQuantizer(
            _copy(self.graph),
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
        _give_back(quantizer.model.model, self.graph, {layer.name for layer in self.layers})
        quantizer.model.topological_sort()
        quantized: onnx.ModelProto = quantizer.model.model
        return quantized


class _Watched:
    """A backend that shows to quantizers what goes into each graph; see `Backend`."""

    prefill_chunk: int | None = None
    rank_chunk: int | None = None
    rank_runs = 1

    def __init__(self, inner: Backend, quantizers: Mapping[str, Quantizer]) -> None:
        self.inner, self.quantizers = inner, quantizers

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Tensor]:
        """See `Backend.run`."""
        if graph in self.quantizers:
            self.quantizers[graph].watch({name: host_array(given) for name, given in inputs.items()})
        return self.inner.run(graph, inputs)

    def close(self) -> None:
        """See `Backend.close`."""
        self.inner.close()


class _Once:
    """Inputs in the way that ONNX Runtime asks for them."""

    def __init__(self, inputs: Inputs) -> None:
        self.left = [inputs]

    def get_next(self) -> Inputs | None:
        """The next, None at the end."""
        return self.left.pop() if self.left else None


def quantized_graphs(
    bundle: Bundle, models: Mapping[str, onnx.ModelProto], histories: Sequence[History]
) -> dict[str, onnx.ModelProto]:
    """fp32 graphs of a bundle, by name, with fp8 in them; calibrated by answering real users.

    Each user is encoded at once, extended half-way, and ranked for.

    Args:
        bundle: The bundle.
        models: Its graphs with their weights inside.
        histories: Of at least two events; the first are taken, up to MAX_EVENTS events, and always one.

    Raises:
        ExportError: No graph has a layer to quantise.
    """
    quantizers = {name: Quantizer(model) for name, model in models.items()}
    if not any(quantizer.layers for quantizer in quantizers.values()):
        raise ExportError(
            "no linear layer for fp8: it needs a norm or attention before it, a product behind it, and sizes that are "
            f"multiples of {MULTIPLE}; leave fp8 out"
        )
    watched = _Watched(OrtBackend(bundle.graph_files()), quantizers)
    with closing(Engine(watched, bundle.manifest.model, bundle.item_vectors)) as engine:
        events = 0
        for history in histories:
            if events and events + len(history) > MAX_EVENTS:
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


def _give_back(quantized: onnx.ModelProto, exact: onnx.ModelProto, layers: set[str]) -> None:
    """Let all nodes but some layers read what they read before: the quantiser gives them fp8 values too."""
    graph = quantized.graph
    inputs = {node.name: node.input for node in exact.graph.node}
    for node in graph.node:
        if node.name in inputs and node.name not in layers:
            node.input[:] = inputs[node.name]
    for tensor in graph.initializer:  # some lie in fields that no file beside the graph can hold
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    read, kept = {name for node in graph.node for name in node.input}, {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(t for t in exact.graph.initializer if t.name in read - kept)


def _scale(largest: Any) -> NDArray[np.float32]:
    """What one step of E4M3 stands for, as bf16 holds it."""
    scale: NDArray[np.float32] = np.array(max(largest, 1e-30) / LARGEST, ml_dtypes.bfloat16).astype(np.float32)
    return scale


def _with_folded_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which what only moves constants is a constant, as a weight of its own is what gets quantised."""
    weights, nodes = {tensor.name: tensor for tensor in model.graph.initializer}, []
    for node in model.graph.node:
        if node.op_type not in MOVES or not all(name in weights for name in node.input):
            nodes.append(node)
            continue
        given = {name: numpy_helper.to_array(weights[name]) for name in node.input}
        for name, array in zip(node.output, ReferenceEvaluator(node).run(None, given), strict=True):
            weights[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
    used = {name for node in nodes for name in node.input}
    folded = _copy(model)
    folded.graph.ClearField("node")
    folded.graph.ClearField("initializer")
    folded.graph.node.extend(nodes)
    folded.graph.initializer.extend(tensor for name, tensor in weights.items() if name in used)
    return folded


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _inner_layers(plan: PrecisionPlan) -> Iterator[int]:
    """Places of products with a weight that have a norm or attention before them and a product behind them."""
    computed: set[str] = set()  # by products, and what was made of it
    normed: set[str] = set()  # by whatever is neither a product nor cheap
    for node in plan.nodes:
        if node.op_type in PRODUCTS or computed.intersection(node.input):
            computed.update(node.output)
            if node.op_type == "Attention" or node.op_type not in PRODUCTS | CHEAP or normed.intersection(node.input):
                normed.update(node.output)
    wanted: set[str] = set()  # by products
    for index in reversed(range(len(plan.nodes))):
        node = plan.nodes[index]
        behind = bool(wanted.intersection(node.output))
        if behind or node.op_type in PRODUCTS:
            wanted.update(node.input)
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
