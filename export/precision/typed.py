"""A graph in less precision: which of its values become bf16 or fp16, and which stay fp32.

Works on any fp32 ONNX graph (docs/decisions/0009-precision-in-the-graph.md).
- Low: matrix products, attention, the cheap operators between two of them, keys and values.
- fp32: norms, softmax and every operator that is not listed here; the cheap operators between a product and one of
  those, such as the residual stream; values computed from positions and times; all other inputs and outputs.

The same decisions make a second graph, the emulation. It is fp32 throughout, and rounds each value that the typed graph
holds in the low type. It gives the results of the typed graph on hardware that accumulates in fp32. It also runs on
ONNX Runtime's CPU, which has no bf16 product.
"""

from __future__ import annotations

import copy
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from unipinrec.errors import ExportError

LowType = Literal["bf16", "fp16"]
State = Literal["plain", "low", "careful"]

TYPES: dict[LowType, int] = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}
NUMPY_TYPES: dict[LowType, np.dtype[np.generic]] = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16)}
KEY_VALUES = ("past_key_values.", "present.")
CONVERSIONS = {"QuantizeLinear", "DequantizeLinear"}  # to fp8 and back: they stand beside a product
PRODUCTS = {"Attention", "Gemm", "MatMul"}
# Operators that only move values: rounding before or after them is the same.
MOVES = {
    *("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity"),
    *("Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
}
CHEAP = MOVES | {
    *("Add", "Clip", "Gelu", "LeakyRelu", "Max", "Min", "Mul", "Neg", "Relu"),
    *("Sigmoid", "Sub", "Swish", "Tanh", "Where"),
}
BLIND = {"Shape", "Size"}  # they read no values
SMALL_BYTES = 1024  # shape inference may read weights up to this size


def typed_graph(model: onnx.ModelProto, precision: LowType) -> onnx.ModelProto:
    """The graph with low types.

    Args:
        model: An fp32 graph with its weights inside; not modified.
        precision: Type of products, and of `past_key_values.*` and `present.*`.

    Raises:
        ExportError: A weight does not fit the type, or the graph has control flow.
    """
    return rewritten(PrecisionPlan(model, precision), emulate=False)


def emulated_graph(model: onnx.ModelProto, precision: LowType) -> onnx.ModelProto:
    """The emulation: an fp32 graph, fp32 at its border too, that rounds each value which is low in `typed_graph`.

    Raises:
        ExportError: See `typed_graph`.
    """
    return rewritten(PrecisionPlan(model, precision), emulate=True)


def rewritten(plan: PrecisionPlan, *, emulate: bool) -> onnx.ModelProto:
    """Write the graph of a plan, with low types or as their emulation.

    Raises:
        ExportError: A weight does not fit the type.
    """
    return _Writer(plan, emulate=emulate).write()


class PrecisionPlan:
    """An fp32 graph, and the nodes that will compute in less precision.

    Attributes:
        floats: Names of all f32 values.
        weights: The constants, by name.
        low: Per node, whether its f32 inputs and outputs become low.
    """

    def __init__(self, model: onnx.ModelProto, precision: LowType) -> None:
        self.model, self.precision = model, precision
        self.nodes = list(model.graph.node)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        nested = [node.op_type for node in self.nodes if any(a.HasField("g") or a.graphs for a in node.attribute)]
        nested += [function.name for function in model.functions]
        if nested:
            raise ExportError(
                f"{model.graph.name}: {nested[0]} contains a graph, which less precision does not support; export in "
                "fp32 alone"
            )
        self.floats = _float_values(model)
        self.readers: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in set(node.input) & self.floats if node.op_type not in BLIND else ():
                self.readers.setdefault(name, []).append(index)
        self.outputs = {value.name for value in model.graph.output} & self.floats
        self.low = [False] * len(self.nodes)
        self._follow_inputs()
        self._follow_readers()

    def array(self, weight: str) -> NDArray[np.float32]:
        """Values of a weight."""
        array: NDArray[np.float32] = numpy_helper.to_array(self.weights[weight])
        return array

    def rounded(self, weight: str) -> NDArray[np.generic]:
        """Values of a weight in the low type.

        Raises:
            ExportError: A finite value becomes infinite.
        """
        array = self.array(weight)
        rounded, lost = _round(array, self.precision)
        if lost.any():
            raise ExportError(
                f"{self.model.graph.name}: {weight} holds {float(array[lost][0]):g}, too large for {self.precision}; "
                "export in bf16, which has the range of fp32, or in fp32 alone"
            )
        return rounded

    def at_border(self, name: str) -> bool:
        """Whether an input or output of the graph is low."""
        return name.startswith(KEY_VALUES)

    def _follow_inputs(self) -> None:
        """Products are low, and so are cheap operators behind them, up to the next operator that must be exact."""
        states: dict[str, State] = dict.fromkeys(self.floats, "plain")
        states |= {v.name: "low" for v in self.model.graph.input if v.name in self.floats and self.at_border(v.name)}
        for index, node in enumerate(self.nodes):
            inputs = {states[name] for name in node.input if name in self.floats}
            if node.op_type in PRODUCTS | CONVERSIONS:
                state: State = "low"
            elif node.op_type in CHEAP and "careful" not in inputs and not self._misfit(node):
                state = "low" if "low" in inputs else "plain"
            else:
                state = "careful" if inputs - {"plain"} else "plain"
            self.low[index] = state == "low"
            states |= {name: state for name in node.output if name in self.floats}

    def _follow_readers(self) -> None:
        """Cheap operators that only exact ones read are exact, and values are moved in the type of their readers."""
        final = [False] * len(self.nodes)
        for index in reversed(range(len(self.nodes))):
            node = self.nodes[index]
            outputs = [name for name in node.output if name in self.floats]
            readers = [reader for name in outputs for reader in self.readers.get(name, [])]
            read_low = {self.low[reader] for reader in readers}
            read_low |= {self.at_border(name) for name in outputs if name in self.outputs}
            # Only cheap operators lie between this node and the outputs: fp32 from the last product on.
            final[index] = (
                node.op_type in CHEAP | {"Gemm", "MatMul"}
                and read_low == {False}
                and all(final[reader] and self.nodes[reader].op_type in CHEAP for reader in readers)
            )
            if final[index] or (node.op_type in CHEAP and read_low == {False}):
                self.low[index] = False
            elif node.op_type in MOVES - {"Concat"} and read_low == {True}:
                self.low[index] = True

    def _misfit(self, node: NodeProto) -> bool:
        """Whether the node reads a constant that the low type cannot hold, such as a mask's -1e9."""
        if node.op_type in MOVES:
            return False
        constants = (name for name in node.input if name in self.weights and name in self.floats)
        return any(_round(self.array(name), self.precision)[1].any() for name in constants)


def _round(array: NDArray[np.float32], precision: LowType) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """Values in a low type, and which finite values became infinite."""
    with np.errstate(over="ignore"):
        rounded = array.astype(NUMPY_TYPES[precision])
    lost: NDArray[np.bool_] = np.isfinite(array) & ~np.isfinite(rounded.astype(np.float32))
    return rounded, lost


def _float_values(model: onnx.ModelProto) -> set[str]:
    """Names of all f32 values of a graph."""
    graph = onnx.GraphProto(name=model.graph.name, node=model.graph.node, output=model.graph.output)
    graph.input.extend(model.graph.input)
    for tensor in model.graph.initializer:  # large ones by type alone: inference takes at most 2 GiB
        if tensor.ByteSize() < SMALL_BYTES:
            graph.initializer.append(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    slim = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, graph=graph)
    try:
        typed = onnx.shape_inference.infer_shapes(slim, strict_mode=True).graph
    except onnx.shape_inference.InferenceError as error:
        reason = str(error).splitlines()[0]
        raise ExportError(f"{graph.name}: types cannot be inferred: {reason}; export in fp32 alone") from error
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*typed.input, *typed.output, *typed.value_info]}
    kinds |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        for name in node.output:
            if name and not kinds.get(name):
                raise ExportError(f"{graph.name}: {node.op_type} is not a standard ONNX operator; export in fp32 alone")
    return {name for name, kind in kinds.items() if kind == TensorProto.FLOAT}


class _Writer:
    """Writes a new graph with conversions where types meet. Converts each value at most once."""

    def __init__(self, graph: PrecisionPlan, *, emulate: bool) -> None:
        self.graph, self.emulate = graph, emulate
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, TensorProto] = {}
        self.low: dict[str, bool] = {}  # of every f32 value of the old graph, whether it is low in the new one
        self.names: dict[tuple[str, bool], str] = {}  # its name in the new graph, as low and as fp32

    def write(self) -> onnx.ModelProto:
        """The graph."""
        graph, new = self.graph, copy.deepcopy(self.graph.model)
        for field in ("node", "initializer", "value_info"):
            new.graph.ClearField(field)
        for value in new.graph.input:
            if value.name in graph.floats:
                self._enter(value.name)
        for node, low in zip(graph.nodes, graph.low, strict=True):
            self._add(node, low)
        for value in [*new.graph.input, *new.graph.output]:
            if value.name in graph.floats and graph.at_border(value.name) and not self.emulate:
                value.type.tensor_type.elem_type = TYPES[graph.precision]
        new.graph.node.extend(self.nodes)
        new.graph.initializer.extend(self.weights.values())
        return new

    def _enter(self, name: str) -> None:
        self.low[name] = low = self.graph.at_border(name)
        self.names[name, low] = self._suffixed(name, low) if low and self.emulate else name
        if low and self.emulate:  # inputs may not be rounded yet
            self._convert(name, self.names[name, low], low=True)

    def _add(self, node: NodeProto, low: bool) -> None:
        written = copy.deepcopy(node)
        for index, name in enumerate(node.input):
            written.input[index] = self._read(name, self.low.get(name, False) if node.op_type in BLIND else low)
        self.nodes.append(written)
        for index, name in enumerate(node.output):
            if name in self.graph.floats:
                written.output[index] = self._computed(node, name, low)

    def _computed(self, node: NodeProto, name: str, low: bool) -> str:
        """Register an output of a node; returns its name in the new node."""
        self.low[name] = low
        final = self.graph.at_border(name) if name in self.graph.outputs else low
        if self.emulate and low and node.op_type not in MOVES:
            self.names[name, True] = name
            self._convert(f"{name}_exact", name, low=True)
            return f"{name}_exact"
        if final == low or (self.emulate and low):
            self.names[name, low] = name
            return name
        own = self._suffixed(name, low)
        self.names[name, low], self.names[name, final] = own, name
        self._convert(own, name, low=final)
        return own

    def _read(self, name: str, low: bool) -> str:
        """The name of a value in a type; converts the value if needed."""
        if name not in self.graph.floats:
            if name in self.graph.weights:
                self.weights[name] = self.graph.weights[name]
            return name
        if name in self.graph.weights:
            return self._weight(name, low)
        if self.emulate and not low and self.low[name]:
            low = True  # a rounded value is in fp32
        if (name, low) not in self.names:
            self.names[name, low] = self._suffixed(name, low)
            self._convert(self.names[name, not low], self.names[name, low], low=low)
        return self.names[name, low]

    def _weight(self, name: str, low: bool) -> str:
        if not low:
            self.weights[name] = self.graph.weights[name]
            return name
        own = self._suffixed(name, low)
        if own not in self.weights:
            rounded = self.graph.rounded(name)
            self.weights[own] = numpy_helper.from_array(rounded.astype(np.float32) if self.emulate else rounded, own)
        return own

    def _convert(self, name: str, to: str, *, low: bool) -> None:
        """Convert a value; the emulation rounds it."""
        kind = TYPES[self.graph.precision] if low else TensorProto.FLOAT
        rounded = f"{to}_as_{self.graph.precision}" if self.emulate else to
        self.nodes.append(helper.make_node("Cast", [name], [rounded], name=f"cast {rounded}", to=kind))
        if self.emulate:
            self.nodes.append(helper.make_node("Cast", [rounded], [to], name=f"cast {to}", to=TensorProto.FLOAT))

    def _suffixed(self, name: str, low: bool) -> str:
        return f"{name}_{self.graph.precision if low else 'fp32'}"
