"""Attention that says by a mask which slots are padding: what every engine for GPUs reads.

fp32 graphs say it by `nonpad_kv_seqlen`, which ONNX Runtime's CPU and OpenVINO understand. TensorRT's ONNX parser
leaves that input out without a word. A graph in less precision is for GPUs alone (docs/bundle.md).
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from unipinrec.errors import ExportError

MASK, LENGTHS = 3, 6  # `attn_mask` and `nonpad_kv_seqlen` among the inputs of Attention


def with_masks(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every attention with lengths has a bool mask [B, 1, q, S] instead.

    Args:
        model: An fp32 graph; keys are [B, H, S, D].

    Raises:
        ExportError: An attention has lengths, and is causal or has a mask too.
    """
    masked = onnx.ModelProto()
    masked.CopyFrom(model)
    graph, names = masked.graph, dict[tuple[str, str, str], str]()
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "Attention" and any(node.input[LENGTHS:]):
            if any(node.input[MASK:LENGTHS]) or any(one.name == "is_causal" and one.i for one in node.attribute):
                raise ExportError(
                    f"{graph.name}: attention {node.name} has lengths, and is causal or has a mask too, which less "
                    "precision does not support; say all of it by one mask, or export in fp32 alone"
                )
            read = node.input[0], node.input[1], node.input[LENGTHS]
            if read not in names:
                names[read] = f"padding_mask_{len(names)}"
                nodes += _mask(*read, names[read])
            node.input[MASK] = names[read]
            del node.input[MASK + 1 :]  # no cache of keys and values either
        nodes.append(node)
    if names:
        constants = {
            "mask_zero": np.array(0),
            "mask_one": np.array(1),
            "mask_slots": np.array(2),
            "mask_ones": np.array([1]),
        }
        constants |= {"mask_row": np.array([0, 1, 2]), "mask_column": np.array([1, 2, 3])}
        graph.initializer.extend(numpy_helper.from_array(one.astype(np.int64), name) for name, one in constants.items())
    del graph.node[:]
    graph.node.extend(nodes)
    return masked


def _mask(query: str, key: str, lengths: str, name: str) -> list[NodeProto]:
    """Nodes that compute which slots of a key [B, H, S, D] are below a length [B], as [B, 1, q, S]."""
    return [
        helper.make_node("Shape", [key], [f"{name}_shape"], name=f"{name}_shape"),
        helper.make_node("Gather", [f"{name}_shape", "mask_slots"], [f"{name}_slots"], name=f"{name}_slots"),
        helper.make_node("Range", ["mask_zero", f"{name}_slots", "mask_one"], [f"{name}_index"], name=f"{name}_index"),
        helper.make_node("Unsqueeze", [f"{name}_index", "mask_row"], [f"{name}_indices"], name=f"{name}_indices"),
        helper.make_node("Unsqueeze", [lengths, "mask_column"], [f"{name}_limits"], name=f"{name}_limits"),
        helper.make_node("Less", [f"{name}_indices", f"{name}_limits"], [f"{name}_slot"], name=f"{name}_slot"),
        helper.make_node("Shape", [query], [f"{name}_query"], name=f"{name}_query", start=2, end=3),
        helper.make_node(
            "Concat", ["mask_ones", f"{name}_query", "mask_ones"], [f"{name}_rows"], name=f"{name}_rows", axis=0
        ),
        helper.make_node("Expand", [f"{name}_slot", f"{name}_rows"], [name], name=name),
    ]
