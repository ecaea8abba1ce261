"""Computes, in numpy, the network that NVIDIA's own ONNX parser made of a graph: what TensorRT was told to compute.

A value of a type with less precision than f32 is computed in f32 and rounded to that type, as a strongly typed network
says. An unknown layer, or a value that differs from what the network declares, fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from unipinrec.runtime.trt.library import LogLines, TensorRT, tensorrt_logger
from unipinrec.runtime.trt.network import ParsedGraph, parse_graph

Array = NDArray[Any]
NUMPY: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP8": np.dtype(ml_dtypes.float8_e4m3fn),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "BOOL": np.dtype(np.bool_),
}
REDUCED = {NUMPY[name] for name in ("HALF", "BF16", "FP8")}
FP8_MAX = 448.0


def _divide(dividend: Array, divisor: Array) -> Array:
    """TensorRT rounds a quotient of integers towards zero."""
    if dividend.dtype.kind == "f":
        return np.asarray(dividend / divisor)
    quotient = np.abs(dividend) // np.abs(divisor)
    return np.asarray((np.sign(dividend) * np.sign(divisor) * quotient).astype(dividend.dtype))


ELEMENTWISE: dict[str, Callable[[Array, Array], Array]] = {
    "SUM": np.add,
    "PROD": np.multiply,
    "MAX": np.maximum,
    "MIN": np.minimum,
    "SUB": np.subtract,
    "DIV": _divide,
    "FLOOR_DIV": np.floor_divide,
    "POW": np.power,
    "AND": np.logical_and,
    "OR": np.logical_or,
    "EQUAL": np.equal,
    "GREATER": np.greater,
    "LESS": np.less,
}
UNARY: dict[str, Callable[[Array], Array]] = {
    "EXP": np.exp,
    "LOG": np.log,
    "SQRT": np.sqrt,
    "RECIP": np.reciprocal,
    "ABS": np.abs,
    "NEG": np.negative,
    "SIN": np.sin,
    "COS": np.cos,
    "NOT": np.logical_not,
    "FLOOR": np.floor,
    "CEIL": np.ceil,
    "SIGN": np.sign,
}
REDUCE: dict[str, Callable[..., Array]] = {
    "SUM": np.sum,
    "AVG": np.mean,
    "MAX": np.max,
    "MIN": np.min,
    "PROD": np.prod,
}


@dataclass(frozen=True)
class Declared:
    """An input or output: TensorRT's name of its type, and its dimensions as the ONNX file names them."""

    dtype: str
    shape: tuple[int | str, ...]


class Network:
    """A parsed graph that runs.

    Attributes:
        inputs, outputs: By name, in the network's order.
    """

    def __init__(self, module: Any, parsed: ParsedGraph, graph: onnx.GraphProto) -> None:
        """Order the layers.

        Args:
            module: TensorRT's.
            parsed: The network.
            graph: What it was made of, with all weights: numpy cannot read constants of every type from TensorRT.
        """
        network = parsed.network
        self._parsed = parsed  # the network refers to it
        self._constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        self._kinds = {layer.name: layer.type.name for layer in layers}
        self._layers = {layer.name: _typed(module, layer) for layer in layers}
        assert len(self._layers) == len(layers), "layers share a name"
        shapes = {one.name: _dimensions(one) for one in (*graph.input, *graph.output)}
        inputs = map(network.get_input, range(network.num_inputs))
        outputs = map(network.get_output, range(network.num_outputs))
        self.inputs, self.outputs = (
            {one.name: Declared(one.dtype.name, shapes[one.name]) for one in tensors} for tensors in (inputs, outputs)
        )
        producers = {tensor.name: name for name, layer in self._layers.items() for tensor in _outputs(layer)}
        self._needs = {name: self._tensors_of(name) for name in self._layers}
        sources = {name: {producers[one] for one in needs if one in producers} for name, needs in self._needs.items()}
        self._order = list(TopologicalSorter(sources).static_order())
        self._last_reader = {one: name for name in self._order for one in self._needs[name]}

    @classmethod
    def of(cls, trt: TensorRT, file: Path) -> Network:
        """What TensorRT's parser and our builder make of an ONNX file."""
        lines = LogLines()
        logger = tensorrt_logger(trt.module, lines)
        parsed = parse_graph(trt, trt.module.Builder(logger), logger, lines, file)
        return cls(trt.module, parsed, onnx.load(file).graph)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs, in the types that the network declares.

        Args:
            feeds: All inputs, in those types.
        """
        values: dict[str, Array] = dict(feeds)
        for name in self._order:
            layer, kind = self._layers[name], self._kinds[name]
            if kind == "ATTENTION_INPUT":
                continue  # computed where its output is
            compute = getattr(self, f"_{kind.lower()}", None)
            if compute is None:
                raise NotImplementedError(f"{name}: layers of type {kind} are not known")
            (output,) = _outputs(layer)
            result = np.asarray(compute(layer, [_wide(kind, values[one]) for one in self._needs[name]]))
            values[output.name] = _declared(name, output, result)
            for one in set(self._needs[name]) - set(self.outputs):
                if self._last_reader[one] == name:
                    del values[one]  # all values of a large model at once do not fit into memory
        return {name: values[name] for name in self.outputs}

    def _tensors_of(self, name: str) -> list[str]:
        """What a layer reads."""
        layer = self._layers[name]
        if self._kinds[name] == "ATTENTION_OUTPUT":
            attention = layer.attention
            lengths = (attention.mask, getattr(attention, "key_value_lengths", None))
            tensors = [*map(attention.get_input, range(3)), *lengths]
        else:
            tensors = [layer.get_input(index) for index in range(layer.num_inputs)]
        return [tensor.name for tensor in tensors if tensor is not None]

    def _shape(self, layer: Any, values: list[Array]) -> Array:
        return np.array(values[0].shape, np.int64)

    def _cast(self, layer: Any, values: list[Array]) -> Array:
        return values[0].astype(NUMPY[layer.to_type.name])

    def _identity(self, layer: Any, values: list[Array]) -> Array:
        return values[0]

    def _quantize(self, layer: Any, values: list[Array]) -> Array:
        return np.clip(values[0] / values[1], -FP8_MAX, FP8_MAX)

    def _dequantize(self, layer: Any, values: list[Array]) -> Array:
        return np.asarray(values[0] * values[1])

    def _constant(self, layer: Any, values: list[Array]) -> Array:
        weights = layer.weights
        if not isinstance(weights, np.ndarray):
            weights = weights.numpy()
        if not isinstance(weights, np.ndarray):
            weights = self._constants[layer.name]
        return np.array(weights).reshape(tuple(layer.shape)).astype(NUMPY[layer.get_output(0).dtype.name])

    def _slice(self, layer: Any, values: list[Array]) -> Array:
        start, size, stride, axes = (self._dynamic(layer, index, values) for index in (1, 2, 3, 5))
        start = layer.start if start is None else start
        size = layer.shape if size is None else size
        stride = layer.stride if stride is None else stride
        axes = layer.axes if axes is None else axes
        picked = [np.arange(length) for length in values[0].shape]
        on = list(axes) if axes is not None and len(axes) else range(values[0].ndim)
        for axis, first, count, step in zip(on, start, size, stride, strict=True):
            picked[axis] = int(first) + int(step) * np.arange(int(count))
            if len(picked[axis]) and not 0 <= picked[axis].min() <= picked[axis].max() < values[0].shape[axis]:
                raise IndexError(f"{layer.name}: reads beyond its input")
        return values[0][np.ix_(*picked)]

    def _dynamic(self, layer: Any, index: int, values: list[Array]) -> Array | None:
        """An optional input, if it is a tensor."""
        if index >= layer.num_inputs or layer.get_input(index) is None:
            return None
        there = [position for position in range(index) if layer.get_input(position) is not None]
        return values[len(there)]

    def _squeeze(self, layer: Any, values: list[Array]) -> Array:
        axes = None if len(values) == 1 else tuple(int(axis) for axis in np.atleast_1d(values[1]))
        return np.squeeze(values[0], axes)  # without axes: all of one element

    def _unsqueeze(self, layer: Any, values: list[Array]) -> Array:
        return np.expand_dims(values[0], tuple(int(axis) for axis in np.atleast_1d(values[1])))

    def _shuffle(self, layer: Any, values: list[Array]) -> Array:
        turned = np.transpose(values[0], tuple(layer.first_transpose)[: values[0].ndim])
        sizes: Any = self._dynamic(layer, 1, values)
        if sizes is None:
            static = layer.reshape_dims  # None, or without a length, where it does not reshape
            unset = static is None or (len(static) == 0 and len(layer.get_output(0).shape) > 0)
            sizes = list(turned.shape if unset else static)
        if layer.zero_is_placeholder:
            sizes = [turned.shape[index] if size == 0 else size for index, size in enumerate(sizes)]
        reshaped = turned.reshape([int(size) for size in sizes])
        return np.transpose(reshaped, tuple(layer.second_transpose)[: reshaped.ndim])

    def _elementwise(self, layer: Any, values: list[Array]) -> Array:
        return ELEMENTWISE[layer.op.name](*values)

    def _unary(self, layer: Any, values: list[Array]) -> Array:
        return UNARY[layer.op.name](values[0])

    def _gather(self, layer: Any, values: list[Array]) -> Array:
        if layer.mode.name == "ELEMENT":
            return np.take_along_axis(values[0], values[1], axis=layer.axis)
        if layer.mode.name != "DEFAULT" or layer.num_elementwise_dims:
            raise NotImplementedError(f"{layer.name}: gathers of mode {layer.mode} are not known")
        return np.take(values[0], values[1], axis=layer.axis)

    def _concatenation(self, layer: Any, values: list[Array]) -> Array:
        return np.concatenate(values, axis=layer.axis)

    def _matrix_multiply(self, layer: Any, values: list[Array]) -> Array:
        sides = []
        for operation, value in zip((layer.op0, layer.op1), values, strict=True):
            assert operation.name in ("NONE", "TRANSPOSE"), operation
            sides.append(np.swapaxes(value, -1, -2) if operation.name == "TRANSPOSE" else value)
        return np.matmul(*sides)

    def _select(self, layer: Any, values: list[Array]) -> Array:
        return np.where(*values)

    def _fill(self, layer: Any, values: list[Array]) -> Array:
        assert layer.operation.name == "LINSPACE", layer.operation
        shape, first, steps = (self._dynamic(layer, index, values) for index in (0, 1, 2))
        shape = layer.shape if shape is None else shape
        grid = np.asarray(layer.alpha if first is None else first)
        for axis, step in enumerate(np.atleast_1d(layer.beta if steps is None else steps)):
            ahead = [1] * len(shape)
            ahead[axis] = int(shape[axis])
            grid = grid + np.arange(int(shape[axis])).reshape(ahead) * step
        return grid.astype(NUMPY[layer.get_output(0).dtype.name])

    def _reduce(self, layer: Any, values: list[Array]) -> Array:
        axes = tuple(axis for axis in range(values[0].ndim) if layer.axes >> axis & 1)
        reduced = REDUCE[layer.op.name](values[0], axis=axes, keepdims=layer.keep_dims)
        return reduced.astype(values[0].dtype)

    def _softmax(self, layer: Any, values: list[Array]) -> Array:
        (axis,) = (axis for axis in range(values[0].ndim) if layer.axes >> axis & 1)
        weights = np.exp(values[0] - values[0].max(axis, keepdims=True))
        return np.asarray(weights / weights.sum(axis, keepdims=True))

    def _activation(self, layer: Any, values: list[Array]) -> Array:
        kind = layer.type.name
        if kind == "SIGMOID":
            return np.asarray((1 / (1 + np.exp(-values[0]))).astype(values[0].dtype))
        if kind == "RELU":
            return np.maximum(values[0], 0)
        if kind == "CLIP":
            return np.clip(values[0], layer.alpha, layer.beta)
        raise NotImplementedError(f"{layer.name}: activations of type {kind} are not known")

    def _attention_output(self, layer: Any, values: list[Array]) -> Array:
        attention = layer.attention
        assert attention.query_form.name == attention.key_value_form.name == "PADDED_BHND"
        assert attention.norm_op.name == "SOFTMAX"
        query, key, value, *rest = values
        groups = query.shape[1] // key.shape[1]
        key, value = np.repeat(key, groups, 1), np.repeat(value, groups, 1)
        scores = np.matmul(query, np.swapaxes(key, -1, -2))
        rows, slots = np.arange(scores.shape[2])[:, None], np.arange(scores.shape[3])[None]
        ahead = {"NONE": None, "UPPER_LEFT": 0, "LOWER_RIGHT": scores.shape[3] - scores.shape[2]}
        last = ahead[attention.causal_kind.name]
        if last is not None:
            scores = np.where(slots <= rows + last, scores, -np.inf)
        if attention.mask is not None:
            mask = rest.pop(0)
            scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
        if getattr(attention, "key_value_lengths", None) is not None:
            lengths = rest.pop(0)
            scores = np.where(slots[None, None] < lengths[:, None, None, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.asarray(np.matmul(weights / weights.sum(-1, keepdims=True), value).astype(np.float32))


def _dimensions(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(one.dim_param or one.dim_value for one in value.type.tensor_type.shape.dim)


def _typed(module: Any, layer: Any) -> Any:
    """A layer as its own class: the network hands out the base class alone."""
    special = {
        "ELEMENTWISE": "IElementWiseLayer",
        "MATRIX_MULTIPLY": "IMatrixMultiplyLayer",
        "SOFTMAX": "ISoftMaxLayer",
    }
    name = special.get(layer.type.name, f"I{layer.type.name.title().replace('_', '')}Layer")
    if hasattr(module, name):
        layer.__class__ = getattr(module, name)
    return layer


def _outputs(layer: Any) -> list[Any]:
    return [layer.get_output(index) for index in range(layer.num_outputs)]


def _wide(kind: str, value: Array) -> Array:
    """A layer's input, in f32 where it has less precision and is computed with."""
    return value.astype(np.float32) if value.dtype in REDUCED and kind not in ("CAST", "CONSTANT") else value


def _declared(name: str, output: Any, result: Array) -> Array:
    """A result as the network declares it: rounded to its type, and of its shape."""
    dtype = NUMPY[output.dtype.name]
    rounded = result.astype(dtype) if dtype in REDUCED and result.dtype == np.float32 else result
    fits = len(output.shape) == rounded.ndim and all(
        declared in (-1, size) for declared, size in zip(output.shape, rounded.shape, strict=True)
    )
    if rounded.dtype != dtype or not fits:
        raise AssertionError(
            f"{name}: computed {rounded.dtype} {rounded.shape}, the network declares {dtype} {tuple(output.shape)}"
        )
    return rounded
