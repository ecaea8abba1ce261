from __future__ import annotations

from pathlib import Path

import torch
from onnx import parser

from unipinrec.export.cases import Case
from unipinrec.export.graphs import Graph
from unipinrec.export.parity import check_graph

IN_BF16 = """
<ir_version: 10, opset_import: ["" : 24]>
retrieval (float[batch, 2] x) => (float[batch, batch] y) {
    low = Cast <to: int = 16> (x)
    turned = Transpose <perm = [1, 0]> (low)
    product = MatMul (low, turned)
    y = Cast <to: int = 1> (product)
}
"""


def test_a_graph_that_onnx_runtime_does_not_load_is_a_finding(tmp_path: Path) -> None:
    """A valid one: it has no product in bf16 on the CPU, as models make under autocast."""
    (tmp_path / "retrieval.onnx").write_bytes(parser.parse_model(IN_BF16).SerializeToString())
    graph = Graph(name="retrieval", inputs={"x": {0: "batch"}}, outputs=("y",), compute=lambda feeds: (feeds["x"],))
    *passed, last = check_graph(graph, tmp_path / "retrieval.onnx", [Case(name="one", feeds={"x": torch.ones(3, 2)})])
    assert [check.problem for check in passed] == [None] * 3
    assert (last.graph, last.check, last.max_abs_diff) == ("retrieval", "loads", None)
    assert last.problem is not None
    assert "NOT_IMPLEMENTED" in last.problem
