"""Padding said by a mask: the same numbers, and nothing that TensorRT's parser would leave out."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from answers import STORED, graph_paths
from numpy.typing import NDArray

from unipinrec.errors import ExportError
from unipinrec.export.precision.masks import LENGTHS, MASK, with_masks
from unipinrec.runtime import Bundle

SIZES = {"batch": 3, "history": 8, "new": 3, "past": 6, "candidates": 5}
LENGTHS_OF = {"lengths": [3, 1, 2], "past_lengths": [5, 1, 3]}


def attentions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "Attention"]


def ragged(session: onnxruntime.InferenceSession) -> dict[str, NDArray[np.generic]]:
    """Inputs of rows of different lengths, with values in the padding too."""
    rng, feeds = np.random.default_rng(0), dict[str, NDArray[np.generic]]()
    for one in session.get_inputs():
        shape = [SIZES.get(size, size) for size in one.shape]
        if one.name in LENGTHS_OF:
            feeds[one.name] = np.array(LENGTHS_OF[one.name])
        elif one.type == "tensor(int64)":
            feeds[one.name] = rng.integers(0, 2, shape)
        else:
            feeds[one.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


@pytest.mark.parametrize("graph", ["encoder", "extend", "ranker"])
def test_a_mask_computes_what_lengths_compute(graph: str) -> None:
    model = onnx.load(graph_paths(Bundle.open(STORED))[graph])
    masked = with_masks(model)
    onnx.checker.check_model(masked, full_check=True)
    assert not any(any(node.input[LENGTHS:]) for node in attentions(masked))
    assert [any(node.input[MASK:]) for node in attentions(masked)] == [
        any(node.input[MASK:]) for node in attentions(model)
    ]
    before, after = (onnxruntime.InferenceSession(one.SerializeToString()) for one in (model, masked))
    feeds = ragged(before)
    for expected, computed in zip(before.run(None, feeds), after.run(None, feeds), strict=True):
        np.testing.assert_array_equal(computed, expected)


def test_padding_takes_no_part() -> None:
    session = onnxruntime.InferenceSession(
        with_masks(onnx.load(graph_paths(Bundle.open(STORED))["ranker"])).SerializeToString()
    )
    feeds = ragged(session)
    (expected,) = session.run(None, feeds)
    for name in (one for one in feeds if one.startswith("past_key_values")):
        for row, length in enumerate(LENGTHS_OF["past_lengths"]):
            feeds[name][row, :, length + 1 :] = 7.0  # one slot more than events: the sink
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, atol=1e-6)


def test_what_has_no_lengths_stays_as_it_is() -> None:
    model = onnx.load(graph_paths(Bundle.open(STORED))["extend"])
    assert with_masks(model) == model


@pytest.mark.parametrize(("mask", "causal"), [("", 1), ("mask", 0)])
def test_lengths_beside_another_limit_are_refused(mask: str, causal: int) -> None:
    node = onnx.helper.make_node("Attention", ["q", "k", "v", mask, "", "", "n"], ["y"], name="own", is_causal=causal)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "encoder", [], []))
    with pytest.raises(ExportError, match="encoder: attention own has lengths, and is causal or has a mask too"):
        with_masks(model)
