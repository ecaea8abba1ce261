"""What an engine computes in, as TensorRT itself describes it, layer by layer.

With full profiling verbosity the engine inspector gives one line per layer where a GPU is present, and the builder logs
the same lines where none is; both are read here. The graph says what was asked for: the types of its products, which
TensorRT's strongly typed networks keep or refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from unipinrec.errors import BackendError

FP32 = "float32"
FLOATS = {"float": FP32, "half": "float16", "bfloat16": "bfloat16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
FORMATS = FLOATS | {"fp32": FP32, "fp16": "float16"}  # a word of such as "Row major linear FP16 format"
REDUCED = frozenset(FLOATS.values()) - {FP32}
ATTENTION_SUFFIX = "_AttentionInput"
LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<rest>.*)$")
TENSOR = re.compile(r"^\W*Name: (?P<name>.*?), IOMode: \w+, DataType: (?P<type>\w+),")
DATATYPE = re.compile(r"Datatype: ([^,}]+)")
NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
TACTIC = re.compile(r"TacticName: (.*?), StreamId: ")
FUSED = "mha"
CHEAP = "kgen"  # generated for what surrounds a product
MAX_NAMED = 5
UNTOLD = (
    "TensorRT did not describe the layers of the engine, so that their precision cannot be checked; the engine was not "
    "installed: report this with the version of TensorRT"
)
Attention = Literal["fused", "decomposed", "unseen"]


class Layer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One layer of an engine.

    Attributes:
        name: As TensorRT named it.
        kind: What it is, as "gemm".
        inputs, outputs: Types of its tensors, as numpy names them; constants left aside.
        nodes: Names of the graph's nodes that it computes, or a part of.
        tactic: The kernel, where one was chosen.
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
    """What an engine computes in.

    Attributes:
        layers: All its layers, for every profile.
        tensors: Type of each input and output.
        fallen: Names of layers or nodes that compute in another type than was asked for, and in which.
        attention: Whether each attention of the graph became one kernel.
    """

    layers: tuple[Layer, ...]
    tensors: dict[str, str]
    fallen: dict[str, str]
    attention: dict[str, Attention]


class Products(msgspec.Struct, frozen=True, kw_only=True):
    """The matrix products and attentions of a network as it was parsed: the type that each is to compute in."""

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
    """Type of a network's tensor as numpy names it; other types than floating-point ones as TensorRT does."""
    name: str = tensor.dtype.name.lower()
    return FLOATS.get(name, name)


def _type_read(module: Any, tensor: Any, producers: Mapping[str, Any]) -> str:
    """Type that a product reads: that before dequantisation, which becomes a part of the product."""
    producer = producers.get(tensor.name)
    while producer is not None and producer.type == module.LayerType.SHUFFLE:
        tensor = producer.get_input(0)
        producer = producers.get(tensor.name)
    if producer is not None and producer.type == module.LayerType.DEQUANTIZE:
        return network_type(producer.get_input(0))
    return network_type(tensor)


def report_layers(text: str, products: Products) -> LayerReport:
    """Read a description of an engine and compare it with what was asked for.

    Raises:
        BackendError: It does not tell what the products compute in.
    """
    layers = tuple(_layers(text))
    if not layers:
        raise BackendError(UNTOLD)
    tensors = {found["name"]: _type(found["type"]) for found in map(TENSOR.match, text.split("\n")) if found}
    return LayerReport(
        layers=layers,
        tensors=tensors,
        fallen=_fallen(layers, products),
        attention={node: _attention(node, layers) for node in products.attentions},
    )


def require_precision(report: LayerReport, precision: str) -> None:
    """Refuse an engine that does not compute in the precision that was asked for.

    Raises:
        BackendError: It does not; names the layers.
    """
    if report.fallen:
        named = ", ".join(f"{name} ({kind})" for name, kind in list(report.fallen.items())[:MAX_NAMED])
        others = ", and others" if len(report.fallen) > MAX_NAMED else ""
        raise BackendError(
            f"{len(report.fallen)} layers do not compute in {precision}: {named}{others}; "
            "the engine was not installed: this GPU or TensorRT may lack the precision, compile another one"
        )


def _layers(text: str) -> Iterator[Layer]:
    for line in text.split("\n"):  # `splitlines` also splits at what TensorRT puts between the names of nodes
        found = LAYER.match(line)
        if found:
            rest = found["rest"]
            tactic = TACTIC.search(rest)
            yield Layer(
                name=found["name"],
                kind=found["kind"],
                inputs=_types(rest, "Inputs: ["),
                outputs=_types(rest, "Outputs: ["),
                nodes=tuple(NODE.findall(rest)),
                tactic=tactic[1] if tactic else "",
            )


def _types(rest: str, section: str) -> tuple[str, ...]:
    """Types of the tensors that a section of a layer's line lists, each in braces."""
    _, _, after = rest.partition(section)
    within = "" if after.startswith("]") else after.partition("}]")[0]
    return tuple(map(_type, DATATYPE.findall(within)))


def _type(described: str) -> str:
    words = described.lower().split()
    return next((FORMATS[word] for word in words if word in FORMATS), described.strip().lower())


def _fallen(layers: tuple[Layer, ...], products: Products) -> dict[str, str]:
    """Layers that compute in less than every product asked for, and products that no layer computes as asked.

    Raises:
        BackendError: No product can be told.
    """
    wanted = {**products.matrices, **products.attentions}
    fallen = _reduced(layers) if set(wanted.values()) <= {FP32} else {}
    told = False
    for node, kind in wanted.items():
        computing = [layer for layer in layers if node in layer.nodes]
        computing = [layer for layer in computing if layer.kind != CHEAP or layer.fused_attention] or computing
        read = {name for layer in computing for name in layer.inputs} & {FP32, *REDUCED}
        told = told or bool(read)
        if read and kind not in read:
            fallen[node] = ", ".join(sorted(read))
    if wanted and not told:
        raise BackendError(UNTOLD)
    return fallen


def _reduced(layers: tuple[Layer, ...]) -> dict[str, str]:
    """Layers that compute in less than fp32."""
    found = {
        layer.name: sorted(
            (REDUCED & {*layer.inputs, *layer.outputs}) | ({"tf32"} if "tf32" in layer.tactic else set())
        )
        for layer in layers
    }
    return {name: ", ".join(kinds) for name, kinds in found.items() if kinds}


def _attention(node: str, layers: tuple[Layer, ...]) -> Attention:
    seen = [layer for layer in layers if node in layer.nodes]
    if not seen:
        return "unseen"
    return "fused" if any(layer.fused_attention for layer in seen) else "decomposed"
