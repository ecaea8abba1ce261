"""Graphs in bf16 and fp16: what is low and what is not, and that the emulation computes what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from unipinrec.errors import ExportError
from unipinrec.export.precision.typed import LowType, emulated_graph, typed_graph
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.graphs.engine import pad_histories
from unipinrec.runtime.graphs.ort_cpu import import_onnxruntime

LOW = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}
NUMPY = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}
GRAPHS = ("encoder", "extend", "ranker")
Arrays = dict[str, NDArray[Any]]


def kinds(model: onnx.ModelProto) -> dict[str, int]:
    """Type of every value, after a strict check of all types."""
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    values = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.output, *graph.value_info]}
    return values | {t.name: t.data_type for t in graph.initializer}


def read_by(model: onnx.ModelProto, *operators: str) -> set[int]:
    """Floating-point types that operators of some kinds read or write."""
    of, found = kinds(model), set()
    for node in model.graph.node:
        if node.op_type in operators:
            found |= {of[name] for name in [*node.input, *node.output] if name}
    return found & {TensorProto.FLOAT, *LOW.values()}


@pytest.fixture(params=["bf16", "fp16"])
def precision(request: pytest.FixtureRequest) -> LowType:
    chosen: LowType = request.param
    return chosen


@pytest.mark.parametrize("name", GRAPHS)
def test_products_are_low_and_norms_angles_and_sums_are_not(bundle: Path, name: str, precision: LowType) -> None:
    model = typed_graph(onnx.load(bundle / f"{name}.onnx"), precision)
    onnx.checker.check_model(model, full_check=True)
    assert read_by(model, "MatMul", "Attention") == {LOW[precision]}
    assert read_by(model, "RMSNormalization", "Sin", "Cos", "Log", "Div", "ReduceSum") == {TensorProto.FLOAT}
    of = kinds(model)
    border = [*model.graph.input, *model.graph.output]
    low = {value.name for value in border if of[value.name] == LOW[precision]}
    assert low == {value.name for value in border if value.name.startswith(("past_key_values.", "present."))}
    assert len(low) == {"encoder": 4, "extend": 8, "ranker": 4}[name]


@pytest.mark.parametrize("name", GRAPHS)
def test_what_a_norm_reads_was_added_in_fp32(bundle: Path, name: str, precision: LowType) -> None:
    model = typed_graph(onnx.load(bundle / f"{name}.onnx"), precision)
    of, made_by = kinds(model), {output: node for node in model.graph.node for output in node.output}
    norms = [made_by[node.input[0]] for node in model.graph.node if node.op_type == "RMSNormalization"]
    # The token, and the sums behind attention and feed-forward; the last event's are picked out of one.
    assert [node.op_type for node in norms].count("Add") >= 4
    assert {of[node.output[0]] for node in norms} == {TensorProto.FLOAT}


@pytest.mark.parametrize("name", GRAPHS)
def test_no_value_is_converted_twice(bundle: Path, name: str, precision: LowType) -> None:
    model = typed_graph(onnx.load(bundle / f"{name}.onnx"), precision)
    of = kinds(model)
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    converted = [(node.input[0], node.attribute[0].i) for node in casts]
    assert len(set(converted)) == len(converted)
    assert all(of[name] != kind for name, kind in converted)
    assert not {name for name, _ in converted} & {node.output[0] for node in casts if of[node.input[0]] in {1, 10, 16}}
    weights = [tensor.name for tensor in model.graph.initializer]
    assert not {name for name, _ in converted} & set(weights)


@pytest.mark.parametrize("name", GRAPHS)
def test_matrices_are_stored_low_alone(bundle: Path, name: str, precision: LowType) -> None:
    model = typed_graph(onnx.load(bundle / f"{name}.onnx"), precision)
    # In fp32 there remain biases that are added in fp32, the norms' scales and the action heads' last, summed product.
    exact = [tensor.name for tensor in model.graph.initializer if tensor.data_type == 1 and len(tensor.dims) > 1]
    assert exact == (["module.model.action_heads.down"] if name == "ranker" else [])


def events(bundle: Path) -> Arrays:
    """Inputs of the encoder: seven histories, of fewer events than the reference's GatherElements can take."""
    opened = Bundle.open(bundle)
    histories = zip(opened.sample_histories(7), (40, 7, 21, 3, 12, 30, 16), strict=True)
    batch = pad_histories([history.part(-count) for history, count in histories])
    return {
        "item_vectors": opened.item_vectors[batch.item_rows],
        "actions": batch.actions,
        "surfaces": batch.surfaces,
        "timestamps_ms": batch.timestamps_ms,
        "lengths": batch.lengths,
    }


def in_onnxruntime(model: onnx.ModelProto, inputs: Arrays) -> Arrays:
    """All outputs."""
    session = import_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


class Sigmoid(OpRun):
    """Computed in fp32 and rounded once; the reference's own rounds each of its steps."""

    op_domain = ""

    def _run(self, x: Any) -> tuple[NDArray[Any]]:
        return ((1.0 / (1.0 + np.exp(-x.astype(np.float32)))).astype(x.dtype),)


class Attention(OpRun):
    """Attention that keeps scores and softmax in fp32, as fused kernels do; the reference's own rounds them."""

    op_domain = ""

    def _run(self, query: Any, key: Any, value: Any, *more: Any, **attributes: Any) -> tuple[NDArray[Any]]:
        q, k, v = (array.astype(np.float32) for array in (query, key, value))
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]).astype(np.float32)
        seen = np.tri(q.shape[2], k.shape[2], dtype=bool) if attributes["is_causal"] else True
        if len(more) > 3:  # the number of slots that are not padding
            seen = (np.arange(k.shape[2]) < more[3][:, None])[:, None, None]
        weights = np.exp(np.where(seen, scores, -np.inf))
        return ((weights / weights.sum(-1, keepdims=True) @ v).astype(query.dtype),)


def test_the_emulation_computes_what_the_typed_graph_says(bundle: Path, precision: LowType) -> None:
    """The reference evaluator of ONNX runs the typed graphs, step by step in bf16 or fp16."""
    inputs = events(bundle)
    encoder = onnx.load(bundle / "encoder.onnx")
    exact, emulated = in_onnxruntime(encoder, inputs), in_onnxruntime(emulated_graph(encoder, precision), inputs)
    typed = typed_graph(encoder, precision)
    outputs = ReferenceEvaluator(typed, new_ops=[Attention, Sigmoid]).run(None, inputs)
    for value, output in zip(typed.graph.output, outputs, strict=True):
        assert np.dtype(output.dtype) == (NUMPY[precision] if value.name.startswith("present") else np.float32)
        difference = np.abs(output.astype(np.float32) - emulated[value.name])
        rounding = np.abs(exact[value.name] - emulated[value.name])
        # Sums in another order put a value that lies on an edge on its other side. Few histories have such a value;
        # in theirs, all that is computed from it differs.
        of_history = difference.reshape(len(difference), -1).mean(1)
        assert np.median(of_history) < 0.02 * rounding.mean(), value.name
        assert (rounding > 0).mean() > 0.9, value.name


def test_keys_and_values_of_the_emulation_are_those_of_the_type(bundle: Path, precision: LowType) -> None:
    emulated = in_onnxruntime(emulated_graph(onnx.load(bundle / "encoder.onnx"), precision), events(bundle))
    for name, values in emulated.items():
        kept = (values == values.astype(NUMPY[precision]).astype(np.float32)).all()
        assert kept == name.startswith("present."), name


READERS = """
<ir_version: 10, opset_import: ["" : 24]>
ranker (float[2, 2] "past_key_values.0.key") => (float[2, 2] product, float[2, 2] exact) {
    product = MatMul ("past_key_values.0.key", "past_key_values.0.key")
    exact = Exp ("past_key_values.0.key")
}
"""


def test_the_emulation_rounds_keys_and_values_that_it_is_given(precision: LowType) -> None:
    name, emulated = "past_key_values.0.key", emulated_graph(parser.parse_model(READERS), precision)
    onnx.checker.check_model(emulated, full_check=True)
    exact = np.array([[1.2345678, -0.7654321], [0.3333333, 2.7182817]], np.float32)
    rounded = exact.astype(NUMPY[precision]).astype(np.float32)
    given, expected = (in_onnxruntime(emulated, {name: array}) for array in (exact, rounded))
    np.testing.assert_array_equal(given["product"], expected["product"])
    np.testing.assert_array_equal(given["exact"], expected["exact"])
    np.testing.assert_allclose(given["exact"], np.exp(rounded), rtol=1e-6)


def test_a_typed_fp16_graph_runs_and_is_as_exact_as_its_emulation(bundle: Path) -> None:
    """ONNX Runtime's CPU has few fp16 operators and computes the others in fp32, so it is a little more exact."""
    inputs, encoder = events(bundle), onnx.load(bundle / "encoder.onnx")
    exact = in_onnxruntime(encoder, inputs)
    for name, typed in in_onnxruntime(typed_graph(encoder, "fp16"), inputs).items():
        emulated = in_onnxruntime(emulated_graph(encoder, "fp16"), inputs)[name]
        errors = [np.abs(values.astype(np.float32) - exact[name]).mean() for values in (typed, emulated)]
        assert 0.2 < errors[0] / errors[1] < 1.2, name


NORM = """
<ir_version: 10, opset_import: ["" : 24]>
hand_made (float[batch, 4] x, float[batch] times) => (float[batch, 4] last_hidden_state) {
    token = MatMul (x, first)
    squares = Pow (token, two)
    mean = ReduceMean (squares, axes)
    safe = Add (mean, tiny)
    deviation = Sqrt (safe)
    unit = Div (token, deviation)
    normed = Mul (unit, scale)
    hidden = MatMul (normed, second)
    angle = Sin (times)
    turn = Unsqueeze (angle, axes)
    turned = Mul (hidden, turn)
    masked = Where (never, fill, turned)
    more = MatMul (masked, second)
    last_hidden_state = MatMul (more, second)
}
"""


def hand_made(**weights: Any) -> onnx.ModelProto:
    """A norm made of single operators, an angle, a mask and three products; the last gives the output."""
    model = parser.parse_model(NORM)
    arrays = {
        "first": np.eye(4, dtype=np.float32),
        "second": np.eye(4, dtype=np.float32),
        "two": np.array(2.0, np.float32),
        "axes": np.array([-1]),
        "tiny": np.array(1e-6, np.float32),
        "scale": np.ones(4, np.float32),
        "never": np.array(False),
        "fill": np.array(-1e9, np.float32),
        **weights,
    }
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


def test_a_norm_made_of_single_operators_is_fp32_and_an_angle_is_rounded_where_it_is_used() -> None:
    of = kinds(typed_graph(hand_made(), "bf16"))
    exact = ("squares", "mean", "safe", "deviation", "unit", "normed", "angle")
    assert {of[name] for name in exact} == {TensorProto.FLOAT}
    assert {of[name] for name in ("token", "hidden", "turned", "masked", "more")} == {TensorProto.BFLOAT16}


def test_the_last_product_before_an_output_is_fp32() -> None:
    model = typed_graph(hand_made(), "bf16")
    last = model.graph.node[-1]
    assert (last.op_type, last.output[0]) == ("MatMul", "last_hidden_state")
    assert {kinds(model)[name] for name in last.input} == {TensorProto.FLOAT}


def test_a_mask_that_fp16_cannot_hold_is_applied_in_fp32() -> None:
    of = kinds(typed_graph(hand_made(), "fp16"))
    assert (of["turned"], of["masked"], of["more"]) == (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT16)
    of = kinds(typed_graph(hand_made(fill=np.array(-np.inf, np.float32)), "fp16"))
    assert of["masked"] == TensorProto.FLOAT16


def test_a_weight_that_fp16_cannot_hold_is_named() -> None:
    model = hand_made(first=np.full((4, 4), 70_000.0, np.float32))
    with pytest.raises(ExportError, match="hand_made: first holds 70000, too large for fp16; export in bf16"):
        typed_graph(model, "fp16")
    with pytest.raises(ExportError, match="first holds 70000"):
        emulated_graph(model, "fp16")
    assert kinds(typed_graph(model, "bf16"))["token"] == TensorProto.BFLOAT16


def test_control_flow_is_refused() -> None:
    model = hand_made()
    branch = helper.make_graph([], "branch", [], [])
    model.graph.node.append(helper.make_node("If", ["never"], [], then_branch=branch, else_branch=branch))
    with pytest.raises(ExportError, match="hand_made: If contains a graph, which less precision does not support"):
        typed_graph(model, "bf16")


def test_an_operator_that_is_not_of_onnx_is_named() -> None:
    model = hand_made()
    model.graph.node.append(helper.make_node("Fused", ["token"], ["odd"], domain="somewhere"))
    with pytest.raises(ExportError, match=r"hand_made: types cannot be inferred: .*Fused"):
        typed_graph(model, "bf16")
    model.opset_import.append(helper.make_opsetid("somewhere", 1))
    with pytest.raises(ExportError, match="hand_made: Fused is not a standard ONNX operator; export in fp32 alone"):
        typed_graph(model, "bf16")
