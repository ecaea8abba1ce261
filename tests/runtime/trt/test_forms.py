"""Attention in other forms than ours, as a user's own module may have it: TensorRT computes it, or we refuse it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from network import Network
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional

from unipinrec.errors import BackendError
from unipinrec.export.graphs import OPSET
from unipinrec.runtime.trt import network as our_network
from unipinrec.runtime.trt.library import TensorRT

ROWS, HEADS, QUERIES, WIDTH = 2, 4, 5, 8
LENGTHS = ["q", "k", "v", "", "", "", "lengths"]
Feeds = dict[str, NDArray[Any]]


def attention(inputs: list[str], name: str = "attention", output: str = "y", **attributes: Any) -> NodeProto:
    return helper.make_node("Attention", inputs, [output], name=name, **attributes)


def feeds_of(slots: int = QUERIES, kv_heads: int = HEADS, **more: NDArray[Any]) -> Feeds:
    rng = np.random.default_rng(0)
    sizes = {"q": (HEADS, QUERIES), "k": (kv_heads, slots), "v": (kv_heads, slots)}
    return {name: rng.standard_normal((ROWS, *size, WIDTH)).astype(np.float32) for name, size in sizes.items()} | more


def saved(folder: Path, nodes: list[NodeProto], feeds: Feeds, functions: tuple[Any, ...] = ()) -> Path:
    """A graph of these nodes, with dynamic rows and sequences."""
    kinds = {"f": TensorProto.FLOAT, "i": TensorProto.INT64, "b": TensorProto.BOOL}
    shapes: dict[str, Sequence[int | str | None]] = {name: one.shape for name, one in feeds.items()}
    shapes["q"] = ["rows", HEADS, "queries", WIDTH]
    given = [helper.make_tensor_value_info(name, kinds[one.dtype.kind], shapes[name]) for name, one in feeds.items()]
    made = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", HEADS, "queries", WIDTH])]
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("local", 1)]
    graph = helper.make_graph(nodes, "graph", given, made)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    onnx.save(model, folder / "graph.onnx")
    return folder / "graph.onnx"


def some(*shape: int) -> NDArray[np.bool_]:
    mask = np.random.default_rng(1).random(shape) < 0.6
    mask[..., 0] = True
    return mask


def added(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


TWO = np.array([5, 2])
MASKED = ["q", "k", "v", "mask"]
FORMS: dict[str, tuple[NodeProto, Feeds]] = {
    "no limit": (attention(["q", "k", "v"], scale=0.1), feeds_of(slots=9)),
    "shared heads": (attention(["q", "k", "v"]), feeds_of(slots=9, kv_heads=2)),
    "causal": (attention(["q", "k", "v"], is_causal=1), feeds_of(kv_heads=1)),
    "causal, more slots": (attention(["q", "k", "v"], is_causal=1), feeds_of(slots=9)),
    "lengths": (attention(LENGTHS), feeds_of(kv_heads=2, lengths=TWO)),
    "bool mask": (attention(MASKED), feeds_of(slots=9, kv_heads=2, mask=some(ROWS, 1, QUERIES, 9))),
    "bool mask without rows": (attention(MASKED), feeds_of(mask=some(QUERIES, QUERIES))),
    "float mask": (attention(MASKED), feeds_of(mask=added(ROWS, HEADS, QUERIES, QUERIES))),
    "bool mask and lengths": (
        attention([*MASKED, "", "", "lengths"]),
        feeds_of(mask=some(ROWS, 1, QUERIES, QUERIES), lengths=TWO),
    ),
    "float mask and lengths": (
        attention([*MASKED, "", "", "lengths"]),
        feeds_of(mask=added(QUERIES, QUERIES), lengths=TWO),
    ),
    "an input that no node reads": (attention(LENGTHS), feeds_of(lengths=TWO, surfaces=TWO)),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_a_form_is_computed_as_onnx_says(form: str, trt: TensorRT, tmp_path: Path) -> None:
    node, feeds = FORMS[form]
    file = saved(tmp_path, [node], feeds)
    (expected,) = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, feeds)
    np.testing.assert_allclose(Network.of(trt, file).run(feeds)["y"], expected, atol=1e-6, rtol=0)


class OfTorch(nn.Module):
    """Attention as torch has it: its own layer, and its function with heads that share keys."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.need_weights = nn.MultiheadAttention(HEADS * WIDTH, HEADS, batch_first=True), need_weights

    def forward(self, events: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        attended, _ = self.layer(
            events, events, events, key_padding_mask=padding, need_weights=self.need_weights, attn_mask=None
        )
        query = attended.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        key = query[:, : HEADS // 2]
        causal = functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
        return attended, causal


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_of_torch_is_computed(need_weights: bool, trt: TensorRT, tmp_path: Path) -> None:
    rows, events = torch.export.Dim("rows"), torch.export.Dim("events")
    padding = torch.tensor([[False] * 6, [False] * 2 + [True] * 4, [False] * 5 + [True]])
    given = {"events": torch.randn(3, 6, HEADS * WIDTH), "padding": padding}
    program = torch.onnx.export(
        OfTorch(need_weights).eval(),
        kwargs=given,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(given),
        output_names=["y", "z"],
        dynamic_shapes={name: {0: rows, 1: events} for name in given},
        verbose=False,
    )
    assert program is not None
    file = tmp_path / "graph.onnx"
    program.save(str(file))
    feeds = {name: one.numpy() for name, one in given.items()}
    with torch.no_grad():
        expected = OfTorch(need_weights).eval()(**given)
    computed = Network.of(trt, file).run(feeds)
    for name, values in zip(("y", "z"), expected, strict=True):
        np.testing.assert_allclose(computed[name], values.numpy(), atol=1e-6)


def branches() -> NodeProto:
    """An If with attention in both of its branches."""
    made = helper.make_tensor_value_info("made", TensorProto.FLOAT, None)
    graphs = {
        f"{branch}_branch": helper.make_graph([attention(inputs, name=branch, output="made")], branch, [], [made])
        for branch, inputs in (("then", LENGTHS), ("else", ["q", "k", "v"]))
    }
    return helper.make_node("If", ["condition"], ["y"], name="if", **graphs)


CALLED = helper.make_function(
    "local", "Attend", ["q", "k", "v", "lengths"], ["y"], [attention(LENGTHS)], [helper.make_opsetid("", 24)]
)
CALL = helper.make_node("Attend", ["q", "k", "v", "lengths"], ["y"], name="call", domain="local")
REFUSED: dict[str, tuple[list[NodeProto], Feeds, str]] = {
    "causal with lengths": (
        [attention(LENGTHS, is_causal=1)],
        feeds_of(lengths=TWO),
        "attention attention is causal and has lengths; its last query belongs to the last slot",
    ),
    "two of one name": (
        [attention(LENGTHS, output="x"), attention(["x", *LENGTHS[1:]])],
        feeds_of(lengths=TWO),
        "attention 'attention' with lengths has no name of its own",
    ),
    "without a name": ([attention(LENGTHS, name="")], feeds_of(lengths=TWO), "attention '' with lengths has no name"),
    "constant lengths": (
        [helper.make_node("Constant", [], ["lengths"], value_ints=[5, 2]), attention(LENGTHS)],
        feeds_of(),
        "no attention 'attention' with lengths 'lengths'",
    ),
    "in a branch": (
        [branches()],
        feeds_of(lengths=TWO, condition=np.array(True)),
        "attention then with lengths is inside another node",
    ),
    "in a function": ([CALL], feeds_of(lengths=TWO), "attention attention with lengths is inside .* a function"),
    "Trilu of ONNX's default": (
        [helper.make_node("Trilu", ["q"], ["y"], name="upper")],
        {"q": feeds_of()["q"]},
        "Trilu upper has no attribute upper; the parser takes 0 for it, ONNX 1",
    ),
    "causal with a mask": (
        [attention(MASKED, is_causal=1)],
        feeds_of(mask=some(ROWS, 1, QUERIES, QUERIES)),
        "does not read it: .*mask cannot be used together with CausalMaskKind",
    ),
    "softcap": ([attention(["q", "k", "v"], softcap=2.0)], feeds_of(), "Setting softcap is not supported"),
}


@pytest.mark.parametrize("form", list(REFUSED))
def test_a_form_that_tensorrt_would_compute_otherwise_is_refused(form: str, trt: TensorRT, tmp_path: Path) -> None:
    nodes, feeds, message = REFUSED[form]
    functions = (CALLED,) if nodes == [CALL] else ()
    with pytest.raises(BackendError, match=rf"(?s)graph.onnx: TensorRT-RTX .*{message}"):
        Network.of(trt, saved(tmp_path, nodes, feeds, functions))


@pytest.mark.parametrize("form", ["causal with lengths", "two of one name", "Trilu of ONNX's default"])
def test_what_is_refused_would_be_wrong(
    form: str, trt: TensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, feeds, _ = REFUSED[form]
    file = saved(tmp_path, nodes, feeds)
    monkeypatch.setattr(our_network, "_misread", lambda _: ())
    (expected,) = ReferenceEvaluator(str(file)).run(None, feeds)
    assert np.abs(Network.of(trt, file).run(feeds)["y"] - expected).max() > 0.1


@pytest.mark.parametrize("mask", [some(ROWS, 1, QUERIES, QUERIES), some(QUERIES, QUERIES)])
def test_of_two_limits_none_is_dropped_where_attention_takes_one(
    mask: NDArray[np.bool_], trt: TensorRT, tmp_path: Path, without_lengths: None
) -> None:
    file = saved(tmp_path, [FORMS["bool mask and lengths"][0]], feeds_of(mask=mask, lengths=TWO))
    with pytest.raises(BackendError, match="'attention' has a mask and lengths, and this version of TensorRT takes"):
        Network.of(trt, file)


def test_a_message_names_some_of_many(trt: TensorRT, tmp_path: Path) -> None:
    values = ["q", *(f"x{index}" for index in range(7)), "y"]
    nodes = [helper.make_node("Trilu", [before], [after]) for before, after in pairwise(values)]
    with pytest.raises(BackendError, match=r"ONNX 1; and 3 more; use another version"):
        Network.of(trt, saved(tmp_path, nodes, {"q": feeds_of()["q"]}))
