"""A builder that makes engines for the doubles of `fake_tensorrt`."""

from __future__ import annotations

from pathlib import Path

from fake_tensorrt import make_plan

from unipinrec.runtime.trt.build import BuildTask, BuiltEngine
from unipinrec.runtime.trt.layers import LayerReport
from unipinrec.runtime.trt.library import TensorRT

REPORT = LayerReport(layers=(), tensors={}, fallen={}, attention={})


class Builder:
    """Stands for `build_engine`.

    Attributes:
        graphs: Of which engines were made.
        instead: Graph files to make engines of others from.
        reports: What engines are said to compute in.
        failing: What is raised instead of making an engine.
        types: TensorRT's types of inputs and outputs that ONNX Runtime gives another.
    """

    def __init__(self) -> None:
        self.graphs: list[str] = []
        self.instead: dict[str, Path] = {}
        self.reports: dict[str, LayerReport] = {}
        self.failing: dict[str, BaseException] = {}
        self.types: dict[str, str] = {}

    def __call__(self, trt: TensorRT, graph_file: Path, task: BuildTask) -> BuiltEngine:
        graph = graph_file.stem.removesuffix("_bf16")
        self.graphs.append(graph)
        task.progress(0.5, "half-way")
        if graph in self.failing:
            raise self.failing[graph]
        plan = make_plan(
            self.instead.get(graph, graph_file),
            task.profiles,
            types=self.types if graph_file.stem != "retrieval" else {},
            stripped=task.options.strip_weights,
            host_code=task.options.version_compatible,
        )
        return BuiltEngine(plan=plan, layers=self.reports.get(graph, REPORT), seconds=0.25, activation_bytes=(1, 2))
