"""The precision of each layer of an engine, read from TensorRT's own description.

With a GPU, the engine inspector gives one line per layer; without one, the builder logs the same lines. The graph sets
the types of its products, which TensorRT's strongly typed networks keep or reject.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from unipinrec.errors import BackendError

FP32 = "float32"
FLOATS = {"float": FP32, "half": "float16", "bfloat16": "bfloat16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
FORMATS = FLOATS | {"fp32": FP32, "fp16": "float16"}  # words as in "Row major linear FP16 format"
REDUCED = frozenset(FLOATS.values()) - {FP32}
ATTENTION_SUFFIX = "_AttentionInput"
LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<rest>.*)$")
TENSOR = re.compile(r"^\W*Name: (?P<name>.*?), IOMode: \w+, DataType: (?P<type>\w+),")
DATATYPE = re.compile(r"Datatype: ([^,}]+)")
NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
TACTIC = re.compile(r"TacticName: (.*?), StreamId: ")
FUSED = "mha"
CHEAP = "kgen"  # generated for the operations around a product
MAX_NAMED = 5
NOT_DESCRIBED = (
    "TensorRT did not describe the layers of the engine, so that their precision cannot be checked; the engine was not "
    "installed: report this with the version of TensorRT"
)
Attention = Literal["fused", "decomposed", "unseen"]


class Layer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One layer of an engine.

    Attributes:
        name: TensorRT's name.
        kind: Such as "gemm".
        inputs, outputs: Types of its tensors, as numpy names them, without constants.
        nodes: Names of the graph's nodes that it computes wholly or in part.
        tactic: The kernel; "" where none was chosen.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    tactic: str

    @property
    def fused_attention(self) -> bool:
        """Whether it is attention in one kernel."""
        return FUSED in f"{self.name} {self.kind} {self.tactic}".lower()


class LayerReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The precision of an engine's layers.

    Attributes:
        layers: All its layers, for every profile.
        tensors: Type of each input and output.
        fallen: Types of layers or nodes that compute in another type than the graph, by name.
        attention: Whether each attention of the graph became one kernel.
    """

    layers: tuple[Layer, ...]
    tensors: dict[str, str]
    fallen: dict[str, str]
    attention: dict[str, Attention]


class Products(msgspec.Struct, frozen=True, kw_only=True):
    """The types in which a parsed network computes its matrix products and attentions, by name."""

    matrices: dict[str, str]
    attentions: dict[str, str]


def products_of(module: Any, network: Any) -> Products:
    """Read the products of a parsed network, before it is built."""
    kinds = module.LayerType
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}
    matrices, attentions = {}, {}
    for layer in layers:
        if layer.type == kinds.MATRIX_MULTIPLY:
            matrices[layer.name] = _type_read(module, layer.get_input(0), producers)
        elif layer.type == kinds.ATTENTION_INPUT:
            attentions[layer.name.removesuffix(ATTENTION_SUFFIX)] = network_type(layer.get_input(0))
    return Products(matrices=matrices, attentions=attentions)


def network_type(tensor: Any) -> str:
    """Type of a network's tensor: numpy's name of a floating-point type, else TensorRT's."""
    name: str = tensor.dtype.name.lower()
    return FLOATS.get(name, name)


def _type_read(module: Any, tensor: Any, producers: Mapping[str, Any]) -> str:
    """Type that a product reads: before dequantisation, which becomes a part of the product."""
    producer = producers.get(tensor.name)
    while producer is not None and producer.type == module.LayerType.SHUFFLE:
        tensor = producer.get_input(0)
        producer = producers.get(tensor.name)
    if producer is not None and producer.type == module.LayerType.DEQUANTIZE:
        return network_type(producer.get_input(0))
    return network_type(tensor)


def report_layers(text: str, products: Products) -> LayerReport:
    """Read a description of an engine and compare it with the types of the graph.

    Raises:
        BackendError: It does not name the types of the products.
    """
    layers = tuple(_layers(text))
    if not layers:
        raise BackendError(NOT_DESCRIBED)
    tensors = {match["name"]: _type(match["type"]) for match in map(TENSOR.match, text.split("\n")) if match}
    return LayerReport(
        layers=layers,
        tensors=tensors,
        fallen=_fallen(layers, products),
        attention={node: _attention(node, layers) for node in products.attentions},
    )


def require_precision(report: LayerReport, precision: str) -> None:
    """Reject an engine with layers in another precision.

    Raises:
        BackendError: There are such layers; names them.
    """
    if report.fallen:
        named = ", ".join(f"{name} ({kind})" for name, kind in list(report.fallen.items())[:MAX_NAMED])
        others = ", and others" if len(report.fallen) > MAX_NAMED else ""
        raise BackendError(
            f"{len(report.fallen)} layers do not compute in {precision}: {named}{others}; "
            "the engine was not installed: this GPU or TensorRT may lack the precision, compile another one"
        )


def _layers(text: str) -> Iterator[Layer]:
    for match in map(LAYER.match, text.split("\n")):  # `splitlines` also splits between the names of nodes
        if match:
            rest = match["rest"]
            tactic = TACTIC.search(rest)
            yield Layer(
                name=match["name"],
                kind=match["kind"],
                inputs=_types(rest, "Inputs: ["),
                outputs=_types(rest, "Outputs: ["),
                nodes=tuple(NODE.findall(rest)),
                tactic=tactic[1] if tactic else "",
            )


def _types(rest: str, section: str) -> tuple[str, ...]:
    """Types of the tensors, each in braces, in a section of a layer's line."""
    _, _, after = rest.partition(section)
    within = "" if after.startswith("]") else after.partition("}]")[0]
    return tuple(map(_type, DATATYPE.findall(within)))


def _type(described: str) -> str:
    words = described.lower().split()
    return next((FORMATS[word] for word in words if word in FORMATS), described.strip().lower())


def _fallen(layers: tuple[Layer, ...], products: Products) -> dict[str, str]:
    """In a graph of fp32 alone, layers with less precision; and products that no layer computes in the graph's type.

    Raises:
        BackendError: The description names the types of no product.
    """
    expected = products.matrices | products.attentions
    fallen = _reduced(layers) if set(expected.values()) <= {FP32} else {}
    described = not expected
    for node, kind in expected.items():
        computing = [layer for layer in layers if node in layer.nodes]
        computing = [layer for layer in computing if layer.kind != CHEAP or layer.fused_attention] or computing
        read = {name for layer in computing for name in layer.inputs} & {FP32, *REDUCED}
        described = described or bool(read)
        if read and kind not in read:
            fallen[node] = ", ".join(sorted(read))
    if not described:
        raise BackendError(NOT_DESCRIBED)
    return fallen


def _reduced(layers: tuple[Layer, ...]) -> dict[str, str]:
    """Layers that compute in less than fp32."""
    reduced = {}
    for layer in layers:
        kinds = [*(REDUCED & {*layer.inputs, *layer.outputs}), *(["tf32"] if "tf32" in layer.tactic else [])]
        if kinds:
            reduced[layer.name] = ", ".join(sorted(kinds))
    return reduced


def _attention(node: str, layers: tuple[Layer, ...]) -> Attention:
    fused = [layer.fused_attention for layer in layers if node in layer.nodes]
    if not fused:
        return "unseen"
    return "fused" if any(fused) else "decomposed"
