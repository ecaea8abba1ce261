"""A machine with a GPU, as device resolution sees it: CUDA and TensorRT are the doubles, ONNX Runtime's GPU the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import onnx
import pytest
from answers import graph_paths
from fake_tensorrt import VERSIONS, fake_tensorrt, make_plan
from host_cuda import HostRuntime, host_cuda

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.graphs.ort_cuda import OrtCudaBackend
from unipinrec.runtime.trt.cuda import Cuda, GpuInfo
from unipinrec.runtime.trt.layers import LayerReport
from unipinrec.runtime.trt.library import Flavor, TensorRT
from unipinrec.runtime.trt.load import Plan
from unipinrec.runtime.trt.profiles import default_buckets, for_graph
from unipinrec.runtime.trt.record import (
    BuildOptions,
    EngineKey,
    EngineRecord,
    Machine,
    Verification,
    needs_of,
    this_machine,
)
from unipinrec.runtime.trt.serving import ServingEngines
from unipinrec.runtime.trt.store import EngineStore

KNOW_THE_DRIVER = ("device", "tools.doctor", "graphs.ort_cuda")
KNOW_TENSORRT = ("device", "tools.doctor")
NOTHING_SEEN = LayerReport(layers=(), tensors={}, fallen={}, attention={})


def cuda_on_cpu(patch: pytest.MonkeyPatch) -> None:
    """Let ONNX Runtime's GPU backend run on the CPU: the same code with another provider and other memory."""
    for name, value in (("_provider", "CPUExecutionProvider"), ("_memory", "cpu"), ("_settings", {})):
        patch.setattr(OrtCudaBackend, name, value)


def put_gpu(patch: pytest.MonkeyPatch, memory: HostRuntime, flavors: Sequence[Flavor] = ("tensorrt",)) -> GpuInfo:
    """Put a GPU into this machine, and install TensorRT in some flavors."""
    for module in KNOW_THE_DRIVER:
        patch.setattr(f"unipinrec.runtime.{module}.driver_problem", lambda: None)
    for module in KNOW_TENSORRT:
        patch.setattr(f"unipinrec.runtime.{module}.import_tensorrt", lambda flavor: imported(memory, flavor, flavors))
    patch.setattr(Cuda, "open", lambda device=0: host_cuda(memory))
    info = host_cuda(memory).info
    patch.setattr("unipinrec.runtime.tools.doctor.probe_gpu", lambda: info)
    return info


def imported(memory: HostRuntime, flavor: Flavor, installed: Sequence[Flavor]) -> TensorRT:
    if flavor not in installed:
        raise BackendError(f"{flavor} is not installed")
    return fake_tensorrt(memory, flavor)


def record_of(bundle: Bundle, graph: str, machine: Machine, precision: str = "fp32") -> EngineRecord:
    """What the cache would say of an engine of TensorRT proper that was built and verified on a machine."""
    trt = TensorRT(module=None, flavor="tensorrt", version=VERSIONS["tensorrt"])
    need = needs_of(bundle, precision, trt)[graph]
    model, spec = bundle.manifest.model, bundle.manifest.graphs_in(precision)[graph]
    key = EngineKey(
        graph=graph,
        graph_sha256=need.graph_sha256,
        precision=precision,
        profiles=for_graph(default_buckets(model), spec, model.kv_prefix_slots),
        flavor="tensorrt",
        version=need.version,
        target=machine.architecture,
        options=BuildOptions(),
    )
    return EngineRecord(
        key=key,
        plan_sha256="",
        size_bytes=0,
        created="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        machine=machine,
        layers=NOTHING_SEEN,
        activation_bytes=(),
        verified=Verification(passed=True, how="tried"),
    )


def have_engines(patch: pytest.MonkeyPatch) -> None:
    """Let every bundle have engines of its graphs, as if it had been compiled."""

    def load(_: ServingEngines, bundle: Bundle, precision: str) -> tuple[dict[str, Plan], dict[str, bytes]]:
        model, files = bundle.manifest.model, bundle.graph_files(precision)
        profiles = {
            name: for_graph(default_buckets(model), spec, model.kv_prefix_slots)
            for name, spec in bundle.manifest.graphs_in(precision).items()
        }
        return {name: Plan(content=make_plan(files[name], shapes)) for name, shapes in profiles.items()}, {}

    patch.setattr(ServingEngines, "load", load)


def install_engines(
    bundle: Bundle, gpu: GpuInfo, machine: Machine | None = None, files: Mapping[str, Path] = MappingProxyType({})
) -> EngineStore:
    """Put an engine of each of a bundle's fp32 graphs into the cache; `files` are built instead of the bundle's."""
    store, here = EngineStore(), this_machine(gpu.name, gpu.architecture, gpu.driver_version)
    for graph, file in graph_paths(bundle).items():
        record = record_of(bundle, graph, machine or here)
        store.put(record, make_plan(files.get(graph, file), record.key.profiles))
    return store


def wrong_ranker(bundle: Bundle, folder: Path) -> Path:
    """The ranker with its weights grown by a half."""
    model = onnx.load(graph_paths(bundle)["ranker"])
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and len(weight.dims) > 1:
            grown = 1.5 * onnx.numpy_helper.to_array(weight)
            weight.CopyFrom(onnx.numpy_helper.from_array(grown.astype("float32"), weight.name))
    onnx.save(model, folder / "wrong.onnx")
    return folder / "wrong.onnx"
