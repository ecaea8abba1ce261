"""The network that TensorRT computes: what its ONNX parser made of a graph, completed, and checked against the graph.

The parser ignores an input of an operator that it does not know how to use. `Attention`'s `nonpad_kv_seqlen` is one:
without it the padding of a batch takes part in every sum (docs/tensorrt.md says what each version does).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unipinrec.errors import BackendError
from unipinrec.runtime.trt.library import LogLines, TensorRT

if TYPE_CHECKING:
    import onnx

LENGTHS = 6  # `nonpad_kv_seqlen` among the inputs of ONNX's Attention
MOST_PROBLEMS = 5  # that a message names
ATTENTION = "_AttentionInput"  # what the parser appends to the name of the ONNX node


@dataclass(frozen=True, kw_only=True, eq=False)
class ParsedGraph:
    """A strongly typed network; what it refers to lives as long as this.

    Attributes:
        network: `INetworkDefinition`.
        parser: Holds the weights.
        constants: Values of constants that the parser did not make.
    """

    network: Any
    parser: Any
    constants: list[Any]


def parse_graph(trt: TensorRT, builder: Any, logger: Any, lines: LogLines, file: Path) -> ParsedGraph:
    """Make a network of an ONNX file that computes all that the file says.

    Args:
        trt: The library.
        builder: `IBuilder`.
        logger: Of the builder.
        lines: What it logs.
        file: The graph; its weights may lie beside it.

    Raises:
        BackendError: TensorRT does not read the file, leaves out an input, or reads a node in another way than ONNX.
    """
    import onnx  # noqa: PLC0415 - an extra

    module = trt.module
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise BackendError(f"{file}: {trt} does not read it: {errors or lines.reason()}")
    model = onnx.load(file, load_external_data=False)
    problems, constants = list(_misread(model)), []
    if not problems:
        try:
            constants = complete_attention(module, network, model.graph)
        except BackendError as error:
            raise BackendError(f"{file}: {trt}: {error}") from error
        problems = lost_inputs(module, network, model.graph)
    if problems:
        more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise BackendError(
            f"{file}: {trt} would not compute what the graph says: {'; '.join(problems[:MOST_PROBLEMS])}{more}; use "
            "another version, or device cuda"
        )
    return ParsedGraph(network=network, parser=parser, constants=constants)


def _misread(model: onnx.ModelProto) -> Iterator[str]:
    """Nodes that the parser reads in another way than ONNX, or that cannot be completed, in words."""
    nodes = list(_nodes(model.graph.node))
    for function in model.functions:
        nodes += _nodes(function.node, inner=True)
    attentions = Counter(node.name for node, _ in nodes if node.op_type == "Attention")
    for node, inner in nodes:
        attributes = {one.name: one.i for one in node.attribute}
        if node.op_type == "Trilu" and "upper" not in attributes:
            yield f"Trilu {node.name} has no attribute upper; the parser takes 0 for it, ONNX 1"
        if _lengths_of(node) is None:
            continue
        if inner:
            yield f"attention {node.name} with lengths is inside another node or a function"
        if attributes.get("is_causal"):
            yield (
                f"attention {node.name} is causal and has lengths; its last query belongs to the last slot that is not "
                "padding, in TensorRT to another one"
            )
        if not node.name or attentions[node.name] > 1:
            yield f"attention {node.name!r} with lengths has no name of its own"


def _nodes(nodes: Iterable[onnx.NodeProto], inner: bool = False) -> Iterator[tuple[onnx.NodeProto, bool]]:
    """All nodes, and whether each is inside another one."""
    for node in nodes:
        yield node, inner
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node, inner=True)


def complete_attention(module: Any, network: Any, graph: onnx.GraphProto) -> list[Any]:
    """Tell every attention how many of its slots are not padding, where the graph says so.

    Returns:
        What has to live until the engine is built.

    Raises:
        BackendError: The network has no attention of a node or no tensor of its lengths, or takes no second limit.
    """
    tensors, layers = dict(_tensors(network)), _attentions(module, network)
    masks: dict[tuple[str, str], Any] = {}
    alive: list[Any] = []
    for node in graph.node:
        lengths = _lengths_of(node)
        if lengths is None:
            continue
        if node.name not in layers or lengths not in tensors:
            raise BackendError(
                f"the parser kept no attention {node.name!r} with lengths {lengths!r}; use another version of "
                "TensorRT, or device cuda"
            )
        attention = layers[node.name]
        if hasattr(attention, "key_value_lengths"):
            attention.key_value_lengths = _output(network.add_cast(tensors[lengths], module.DataType.INT32))
        elif attention.mask is not None:
            raise BackendError(
                f"attention {node.name!r} has a mask and lengths, and this version of TensorRT takes a mask alone; use "
                "TensorRT 11, or device cuda"
            )
        else:
            key = attention.get_input(1)
            if (key.name, lengths) not in masks:
                masks[key.name, lengths] = _mask(module, network, key, tensors[lengths], alive)
            attention.mask = masks[key.name, lengths]
    return alive


def _mask(module: Any, network: Any, key: Any, lengths: Any, alive: list[Any]) -> Any:
    """[B, 1, 1, S] bool: which slots of a key [B, H, S, D] are not padding."""

    def constant(values: list[int] | int) -> Any:
        alive.append(np.array(values, np.int64))
        return _output(network.add_constant(alive[-1].shape, module.Weights(alive[-1])))

    slots = _output(network.add_gather(_output(network.add_shape(key)), constant([2]), 0))
    layer = network.add_fill((1,), module.FillOperation.LINSPACE, module.DataType.INT64)
    for position, tensor in enumerate((slots, constant(0), constant([1]))):
        layer.set_input(position, tensor)
    indices = _output(network.add_unsqueeze(_output(layer), constant([0, 1, 2])))
    limits = _output(network.add_unsqueeze(lengths, constant([1, 2, 3])))
    return _output(network.add_elementwise(indices, limits, module.ElementWiseOperation.LESS))


def _output(layer: Any) -> Any:
    return layer.get_output(0)


def lost_inputs(module: Any, network: Any, graph: onnx.GraphProto) -> list[str]:
    """What the graph computes with and the network does not, in words; empty if there is nothing.

    A tensor that no layer reads means that the parser left out an input of some operator. A layer that reads no more
    than its shape does not count.
    """
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    problems = [f"input {one.name} is not in the network" for one in graph.input if one.name not in names]
    layers, attentions = [network.get_layer(index) for index in range(network.num_layers)], _attentions(module, network)
    values = [tensor for layer in layers if layer.type != module.LayerType.SHAPE for tensor in _inputs(layer)]
    for attention in attentions.values():
        values += [*map(attention.get_input, range(3)), *_limits_of(attention)]
    read = {tensor.name for tensor in values if tensor is not None}
    read |= {network.get_output(index).name for index in range(network.num_outputs)}
    read |= {_output(layer).name for layer in layers if layer.type == module.LayerType.CONSTANT}
    used = {name for node in graph.node if node.op_type != "Shape" for name in node.input}
    problems += [f"no layer reads {name}" for name, _ in _tensors(network) if name in used - read]
    for node in graph.node:
        limits = (
            [*filter(None, node.input[3:4]), *filter(None, [_lengths_of(node)])] if node.op_type == "Attention" else []
        )
        there = _limits_of(attentions[node.name]) if node.name in attentions else ()
        if len(limits) > sum(limit is not None for limit in there):
            problems.append(
                f"attention {node.name!r} has lost a mask or lengths, the graph gives it {', '.join(limits)}"
            )
    return problems


def _inputs(layer: Any) -> list[Any]:
    return [layer.get_input(index) for index in range(layer.num_inputs)]


def _lengths_of(node: onnx.NodeProto) -> str | None:
    """The tensor of an attention's lengths, if it has any."""
    return node.input[LENGTHS] if node.op_type == "Attention" and any(node.input[LENGTHS:]) else None


def _limits_of(attention: Any) -> tuple[Any | None, Any | None]:
    return attention.mask, getattr(attention, "key_value_lengths", None)


def _attentions(module: Any, network: Any) -> Mapping[str, Any]:
    """By the name of its ONNX node."""
    found = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == module.LayerType.ATTENTION_INPUT:
            layer.__class__ = module.IAttentionInputLayer
            found[layer.name.removesuffix(ATTENTION)] = layer.attention
    return found


def _tensors(network: Any) -> Iterator[tuple[str, Any]]:
    """Inputs, and what layers compute, by name."""
    for index in range(network.num_inputs):
        yield network.get_input(index).name, network.get_input(index)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for output in range(layer.num_outputs):
            yield layer.get_output(output).name, layer.get_output(output)
