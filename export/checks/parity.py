"""Checks that the written graphs are valid and compute what PyTorch computes. Collects all failures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from unipinrec.errors import ParityError
from unipinrec.export.cases import Case
from unipinrec.export.graphs import Graph
from unipinrec.runtime.bundle.manifest import GraphSpec, ParityCheck, ParityReport, TensorSpec
from unipinrec.runtime.golden_check import TOLERANCE, tolerance
from unipinrec.runtime.graphs.ort_cpu import import_onnxruntime


def graph_spec(path: Path) -> GraphSpec:
    """Inputs and outputs of a written graph, as the manifest lists them."""
    graph = onnx.load(path, load_external_data=False).graph
    return GraphSpec(
        file=path.name,
        inputs=tuple(_tensor_spec(value) for value in graph.input),
        outputs=tuple(_tensor_spec(value) for value in graph.output),
    )


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    shape = tuple(d.dim_param if d.HasField("dim_param") else int(d.dim_value) for d in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)


def check_graph(graph: Graph, path: Path, cases: list[Case]) -> list[ParityCheck]:
    """Check one written graph: format, names, axes, then shapes and values on every case."""
    spec = graph_spec(path)
    names = tuple(t.name for t in spec.inputs), tuple(t.name for t in spec.outputs)
    expected = tuple(graph.inputs), graph.outputs
    checks = [
        _check(graph, "onnx checker", format_problem(path)),
        _check(graph, "names", None if names == expected else f"file has {names}, expected {expected}"),
        _check(graph, "axes", _axes_problem(graph, spec)),
    ]
    if any(check.problem for check in checks):
        return checks
    try:
        session = import_onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many types; each is a failed check, not a crash
        return [*checks, _check(graph, "loads", f"onnxruntime: {error}")]
    return checks + [check for case in cases for check in _value_checks(graph, session, case)]


def report_of(checks: list[ParityCheck]) -> ParityReport:
    """Put all checks into the report that the manifest carries."""
    differences = [check.max_abs_diff for check in checks if check.max_abs_diff is not None]
    return ParityReport(tolerance=TOLERANCE, max_abs_diff=max(differences, default=0.0), checks=tuple(checks))


def require_parity(report: ParityReport) -> None:
    """Raise if anything failed.

    Raises:
        ParityError: Lists every failed check.
    """
    failed = [check for check in report.checks if check.problem]
    if failed:
        lines = [f"  {c.graph}: {c.check} ({c.case}): {c.problem}" for c in failed]
        raise ParityError(
            f"{len(failed)} of {len(report.checks)} checks failed, no bundle was written:\n" + "\n".join(lines)
        )


def format_problem(path: Path) -> str | None:
    """Why a written graph is invalid, or None."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error)
    return None


def _check(graph: Graph, check: str, problem: str | None, case: str = "file", diff: float | None = None) -> ParityCheck:
    return ParityCheck(graph=graph.name, check=check, case=case, max_abs_diff=diff, problem=problem)


def _axes_problem(graph: Graph, spec: GraphSpec) -> str | None:
    """An input axis that is frozen instead of dynamic, or the other way round."""
    for tensor in spec.inputs:
        dynamic = {axis: size for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        if dynamic != graph.inputs[tensor.name]:
            return (
                f"{tensor.name} has dynamic axes {dynamic}, expected {graph.inputs[tensor.name]}; if one is missing, "
                "the module makes its size a constant: read sizes from `tensor.shape`, not by `len` or `int`"
            )
    return None


def _value_checks(graph: Graph, session: Any, case: Case) -> Iterator[ParityCheck]:
    expected = graph.compute(case.feeds)
    try:
        actual = session.run(list(graph.outputs), {name: case.feeds[name].numpy() for name in graph.inputs})
    except Exception as error:  # as above
        yield _check(graph, "runs", f"onnxruntime: {error}", case.name)
        return
    for name, tensor, array in zip(graph.outputs, expected, actual, strict=True):
        exact, difference, problem = tensor.numpy(), None, None
        if exact.shape != array.shape:
            problem = f"shape is {array.shape}, PyTorch has {exact.shape}"
        else:
            valid = _valid(name, case, exact.shape)
            difference, allowed = float(np.abs(exact - array)[valid].max()), tolerance(exact[valid])
            if not difference <= allowed:
                problem = f"differs by {difference:.3g}, allowed {allowed:.2g}"
        yield _check(graph, name, problem, case.name, difference)


def _valid(name: str, case: Case, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Everything but the padding of key/value outputs (batch, heads, slots, head_dim)."""
    valid = np.ones(shape, bool)
    if case.valid_slots is not None and name.startswith("present."):
        valid &= (np.arange(shape[2]) < case.valid_slots.numpy()[:, None])[:, None, :, None]
    return valid
