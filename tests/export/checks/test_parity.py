from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser
from torch import Tensor

from unipinrec.export.cases import Case
from unipinrec.export.checks.parity import check_graph
from unipinrec.export.graphs import Graph
from unipinrec.runtime.golden_check import TOLERANCE

IN_BF16 = """
<ir_version: 10, opset_import: ["" : 24]>
retrieval (float[batch, 2] x) => (float[batch, batch] y) {
    low = Cast <to: int = 16> (x)
    turned = Transpose <perm = [1, 0]> (low)
    product = MatMul (low, turned)
    y = Cast <to: int = 1> (product)
}
"""


def test_large_values_may_differ_by_their_rounding_and_a_size_made_constant_is_explained(as_given: Path) -> None:
    def off(by: float, size: float) -> set[str]:
        graph = Graph(
            name="encoder",
            inputs={"x": {0: "batch", 2: "slots"}},
            outputs=("present.0.key", "last"),
            compute=lambda feeds: (feeds["x"], feeds["x"] + by),
        )
        case = Case(name="one", feeds={"x": torch.full((3, 2, 4, 3), size)}, valid_slots=torch.tensor(SLOTS))
        return {check.check for check in check_graph(graph, as_given, [case]) if check.problem}

    assert (off(2e-4, 9.0), off(2e-4, 100.0), off(2e-3, 100.0)) == ({"last"}, set(), {"last"})
    graph = Graph(name="encoder", inputs={"x": {0: "batch"}}, outputs=("present.0.key", "last"), compute=lambda _: ())
    (axes,) = (check for check in check_graph(graph, as_given, []) if check.problem)
    assert "read sizes from `tensor.shape`, not by `len`" in str(axes.problem)


def test_a_graph_that_onnx_runtime_does_not_load_is_a_finding(tmp_path: Path) -> None:
    """A valid one: it has no product in bf16 on the CPU, as models make under autocast."""
    (tmp_path / "retrieval.onnx").write_bytes(parser.parse_model(IN_BF16).SerializeToString())
    graph = Graph(name="retrieval", inputs={"x": {0: "batch"}}, outputs=("y",), compute=lambda feeds: (feeds["x"],))
    *passed, last = check_graph(graph, tmp_path / "retrieval.onnx", [Case(name="one", feeds={"x": torch.ones(3, 2)})])
    assert [check.problem for check in passed] == [None] * 3
    assert (last.graph, last.check, last.max_abs_diff) == ("retrieval", "loads", None)
    assert last.problem is not None
    assert "NOT_IMPLEMENTED" in last.problem


AS_GIVEN = """
<ir_version: 10, opset_import: ["" : 24]>
encoder (float[batch, 2, slots, 3] x) => (float[batch, 2, slots, 3] "present.0.key", float[batch, 2, slots, 3] last) {
    "present.0.key" = Identity (x)
    last = Identity (x)
}
"""
SLOTS = (4, 2, 1)


@pytest.fixture(scope="module")
def as_given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "encoder.onnx"
    path.write_bytes(parser.parse_model(AS_GIVEN).SerializeToString())
    return path


@settings(max_examples=60, deadline=None)
@given(
    output=st.sampled_from(["present.0.key", "last"]),
    index=st.tuples(*(st.integers(0, size - 1) for size in (3, 2, 4, 3))),
    by=st.sampled_from([float("nan"), float("inf"), 1.01 * TOLERANCE, -1.0, 0.99 * TOLERANCE]),
)
def test_a_difference_is_found_wherever_it_is_but_for_padding(
    as_given: Path, output: str, index: tuple[int, ...], by: float
) -> None:
    def compute(feeds: dict[str, Tensor]) -> tuple[Tensor, ...]:
        outputs = {name: feeds["x"].clone() for name in ("present.0.key", "last")}
        outputs[output][index] += by
        return tuple(outputs.values())

    graph = Graph(
        name="encoder", inputs={"x": {0: "batch", 2: "slots"}}, outputs=("present.0.key", "last"), compute=compute
    )
    case = Case(name="one", feeds={"x": torch.zeros(3, 2, 4, 3)}, valid_slots=torch.tensor(SLOTS))
    problems = {check.check: check.problem for check in check_graph(graph, as_given, [case])}
    padding = output == "present.0.key" and index[2] >= SLOTS[index[0]]
    wrong = {output} if not padding and not abs(by) < TOLERANCE else set()
    assert {name for name, problem in problems.items() if problem} == wrong
    assert all((problems[name] or "").startswith("differs by ") for name in wrong)
