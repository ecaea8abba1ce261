"""FP8: which layers are quantised, with which scales, and what is said of what it costs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper, parser

from unipinrec.errors import ExportError, ParityError
from unipinrec.export.bundle_writer import export_bundle
from unipinrec.export.checkpoint_source import source_from_checkpoint
from unipinrec.export.data_histories import histories_from_data
from unipinrec.export.precision.check import add_precisions, known_precisions
from unipinrec.export.precision.fp8 import Quantizer
from unipinrec.export.precision.typed import emulated_graph, typed_graph
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.graphs.ort_cpu import import_onnxruntime

FP8, BF16 = TensorProto.FLOAT8E4M3FN, TensorProto.BFLOAT16
E4M3 = ml_dtypes.float8_e4m3fn


def quantize(bundle: Path, checkpoint: Path, dataset: Path, folder: Path) -> Path:
    """A copy of a bundle with fp8."""
    shutil.copytree(bundle, folder)
    histories = histories_from_data(dataset, source_from_checkpoint(checkpoint), 20).split()
    add_precisions(folder, ("fp8",), histories, accept_loss=True)
    return folder


@pytest.fixture(scope="module")
def quantized(bundle: Path, checkpoint: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(bundle, checkpoint, dataset, tmp_path_factory.mktemp("quantized") / "bundle")


def products(model: onnx.ModelProto) -> dict[str, list[bool]]:
    """Of each product, whether each of its two operands comes out of fp8."""
    from_fp8 = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {node.name: [n in from_fp8 for n in node.input[:2]] for node in model.graph.node if node.op_type == "MatMul"}


@pytest.mark.parametrize(("name", "quantised", "others"), [("encoder", 13, 4), ("extend", 13, 4), ("ranker", 10, 4)])
def test_the_layers_between_the_first_norm_and_the_last_product_are_quantised(
    quantized: Path, name: str, quantised: int, others: int
) -> None:
    model = onnx.load(quantized / f"{name}_fp8.onnx")
    operands = list(products(model).values())
    assert (operands.count([True, True]), operands.count([False, False])) == (quantised, others)
    # The embedding of actions and times and the projection of tokens come first.
    assert operands[:3] == [[False, False]] * 3
    assert operands[-1] == [False, False]


@pytest.mark.parametrize("name", ["encoder", "extend", "ranker"])
def test_types_around_fp8(quantized: Path, name: str) -> None:
    model = onnx.load(quantized / f"{name}_fp8.onnx")
    onnx.checker.check_model(model, full_check=True)
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    of = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.output, *graph.value_info]}
    of |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in model.graph.node:
        kinds = [of[value] for value in (*node.input[:2], node.output[0])] if len(node.input) > 1 else []
        if node.op_type == "QuantizeLinear":
            assert kinds == [BF16, BF16, FP8]
        elif node.op_type == "DequantizeLinear":
            assert kinds == [FP8, BF16, BF16]
        elif node.op_type == "MatMul":
            assert kinds == [BF16, BF16, BF16]
    assert {of[v.name] for v in graph.output if v.name.startswith("present.")} <= {BF16}


def test_weights_are_stored_in_fp8_once(quantized: Path) -> None:
    indices = []
    for name in ("encoder", "ranker"):
        model = onnx.load(quantized / f"{name}_fp8.onnx", load_external_data=False)
        small = [t for t in model.graph.initializer if t.data_type == FP8 and len(t.dims) == 2]
        assert len(small) == {"encoder": 13, "ranker": 10}[name]
        indices.append({entry.value for t in small for entry in t.external_data if entry.key == "offset"})
    # The ranker makes no keys and values; the encoder's last layer is not quantised.
    assert len(indices[0] & indices[1]) == 9
    assert not list(quantized.glob("weights_bf16.bin"))


def test_the_same_bundle_gives_the_same_bytes(
    bundle: Path, quantized: Path, checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    again = quantize(bundle, checkpoint, dataset, tmp_path / "again")
    for path in quantized.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_what_it_costs_is_in_the_manifest(quantized: Path) -> None:
    spec = Bundle.open(quantized).manifest.precisions["fp8"]
    assert 1e-4 < spec.agreement.max_logit_diff < 0.1
    assert set(spec.auc_change) == {"click", "save", "share", "hide"}


def test_it_needs_real_histories(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="fp8 is calibrated on histories of real users; pass --data"):
        export_bundle(source_from_checkpoint(checkpoint), tmp_path / "bundle", precisions=["fp8"])
    assert list(tmp_path.iterdir()) == []


def test_it_needs_histories_with_events_to_hold_out(bundle: Path) -> None:
    histories = [history.part(0, 4) for history in Bundle.open(bundle).sample_histories(3)]
    with pytest.raises(
        ExportError, match="users with more than 4 events, and the longest history has 4; leave fp8 out"
    ):
        known_precisions(["fp8"], histories)
    assert known_precisions(["fp8", "bf16"], Bundle.open(bundle).sample_histories(3)) == ["bf16", "fp8"]


TWO_LAYERS = """
<ir_version: 10, opset_import: ["" : 24]>
hand_made (float[batch, 16] x) => (float[batch, 16] last_hidden_state) {
    token = MatMul (x, square)
    normed = RMSNormalization (token, scale)
    wide = MatMul (normed, unequal)
    narrow = MatMul (wide, back)
    inner = MatMul (normed, square)
    sum = Add (narrow, inner)
    last_hidden_state = MatMul (sum, square)
}
"""


def hand_made() -> onnx.ModelProto:
    model = parser.parse_model(TWO_LAYERS)
    for index, node in enumerate(model.graph.node):
        node.name = f"node {index}"
    arrays: dict[str, NDArray[Any]] = {
        "square": np.eye(16, dtype=np.float32) * 3.5,
        "scale": np.ones(16, np.float32),
        "unequal": np.ones((16, 24), np.float32),  # 24 is no multiple of 16
        "back": np.ones((24, 16), np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


def quantized_graph(model: onnx.ModelProto, *inputs: NDArray[np.float32]) -> onnx.ModelProto:
    quantizer = Quantizer(model)
    for x in inputs:
        quantizer.watch({"x": x})
    return quantizer.quantized()


def test_scales_are_the_largest_value_over_that_of_e4m3() -> None:
    one_hot = np.zeros((1, 16), np.float32)
    one_hot[0, 3] = 1.0  # normed to 4
    model = quantized_graph(hand_made(), -one_hot, one_hot + 1.0)
    assert {name: both for name, both in products(model).items() if any(both)} == {"node 4": [True, True]}
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantize = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    assert quantize.input[0] == "normed"
    assert weights[quantize.input[1]] == np.float32(ml_dtypes.bfloat16(4.0 / 448.0))
    scale = float(weights["square_scale"])
    assert scale == float(ml_dtypes.bfloat16(3.5 / 448.0))
    np.testing.assert_array_equal(weights["square_quantized"], (np.eye(16) * 3.5 / scale).astype(E4M3))


def test_values_beyond_those_of_the_calibration_are_cut_off_not_lost() -> None:
    model = quantized_graph(hand_made(), np.ones((1, 16), np.float32))  # normed to 1
    one_hot = np.zeros((1, 16), np.float32)
    one_hot[0, 3] = 1.0  # normed to 4
    run = import_onnxruntime().InferenceSession(
        emulated_graph(model, "bf16").SerializeToString(), providers=["CPUExecutionProvider"]
    )
    last = run.run(None, {"x": one_hot})[0]
    wide = 24 * 4.0 * 3.5  # not quantised
    np.testing.assert_allclose(last[0, [0, 3]], [wide, wide + 1.0 * 3.5 * 3.5], rtol=0.01)


def test_a_graph_without_such_layers_is_in_bf16() -> None:
    model = hand_made()
    for node in model.graph.node:
        if node.op_type == "RMSNormalization":
            node.op_type = "Identity"
            del node.input[1:]
    assert all(node.op_type != "QuantizeLinear" for node in quantized_graph(model).graph.node)
    assert {node.op_type for node in typed_graph(quantized_graph(model), "bf16").graph.node} >= {"MatMul", "Cast"}


def test_a_loss_is_refused_unless_it_is_accepted(lively: Path, checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    """Large random weights are harder to round than trained ones."""
    histories = histories_from_data(dataset, source_from_checkpoint(checkpoint), 20).split()
    folder = Path(shutil.copytree(lively, tmp_path / "bundle"))
    with pytest.raises(ParityError, match=r"fp8 does not recommend what fp32 recommends: .*or pass --accept-loss"):
        add_precisions(folder, ("fp8",), histories)
    precisions = add_precisions(folder, ("fp16", "fp8"), histories, accept_loss=True).precisions
    assert [bool(precisions[name].agreement.problem) for name in ("fp16", "fp8")] == [False, True]
