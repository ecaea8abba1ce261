"""A machine with a GPU, as device resolution sees it: CUDA and TensorRT are the doubles, ONNX Runtime's GPU the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import onnx
from answers import graph_paths
from fake_tensorrt import VERSIONS, fake_tensorrt, make_plan
from host_cuda import DEVICE, HostRuntime, host_cuda

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.device import Machine
from unipinrec.runtime.graphs.ort_cuda import OrtCudaBackend
from unipinrec.runtime.trt.cuda import Cuda, GpuInfo
from unipinrec.runtime.trt.layers import LayerReport
from unipinrec.runtime.trt.library import Flavor, TensorRT
from unipinrec.runtime.trt.load import EnginePlan
from unipinrec.runtime.trt.profiles import default_buckets, for_graph
from unipinrec.runtime.trt.record import (
    BuildOptions,
    EngineHost,
    EngineKey,
    EngineRecord,
    Verification,
    engine_host,
    needs_of,
)
from unipinrec.runtime.trt.serving import ServingEngines
from unipinrec.runtime.trt.store import EngineStore

NOTHING_SEEN = LayerReport(layers=(), tensors={}, fallen={}, attention={})


class OrtOnCpu(OrtCudaBackend):
    """ONNX Runtime's GPU backend on the CPU: the same code with another provider and other memory."""

    _driver_problem = staticmethod(lambda: None)
    _provider, _memory, _settings = "CPUExecutionProvider", "cpu", {}


class OrtWithDriver(OrtCudaBackend):
    """As where there is a driver."""

    _driver_problem = staticmethod(lambda: None)


class CudaOnCpu(Machine):
    """This machine, with `OrtOnCpu` for a GPU."""

    ort_cuda = OrtOnCpu


class HostMachine(Machine):
    """A machine with a GPU that is none, and TensorRT in some flavors; `compiled`: it has engines of every bundle."""

    ort_cuda: type[OrtCudaBackend] = OrtWithDriver

    def __init__(
        self, memory: HostRuntime, flavors: Sequence[Flavor] = ("tensorrt",), *, compiled: bool = False
    ) -> None:
        super().__init__(DEVICE)
        self.memory, self.flavors, self.compiled = memory, flavors, compiled

    @property
    def info(self) -> GpuInfo:
        return host_cuda(self.memory).info

    def driver_problem(self) -> None:
        return None

    def gpu(self) -> GpuInfo:
        return self.info

    def cuda(self) -> Cuda:
        return host_cuda(self.memory, self.index)

    def tensorrt(self, flavor: Flavor | None = None) -> TensorRT:
        wanted = flavor or self.flavors[0]
        if wanted not in self.flavors:
            raise BackendError(f"{wanted} is not installed")
        return fake_tensorrt(self.memory, wanted)

    def engines(self, trt: TensorRT, gpu: GpuInfo, allow_bundle_engines: bool) -> ServingEngines:
        kind = Compiled if self.compiled else ServingEngines
        return kind(trt=trt, gpu=gpu, store=EngineStore(), allow_bundle_engines=allow_bundle_engines)


class Compiled(ServingEngines):
    """Engines of every bundle, as if it had been compiled."""

    def load(self, bundle: Bundle, precision: str) -> tuple[dict[str, EnginePlan], dict[str, bytes]]:
        model, files = bundle.manifest.model, bundle.graph_files(precision)
        profiles = {
            name: for_graph(default_buckets(model), spec, model.kv_prefix_slots)
            for name, spec in bundle.manifest.graphs_in(precision).items()
        }
        return {name: EnginePlan(content=make_plan(files[name], shapes)) for name, shapes in profiles.items()}, {}


def record_of(bundle: Bundle, graph: str, machine: EngineHost, precision: str = "fp32") -> EngineRecord:
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


def install_engines(
    bundle: Bundle, gpu: GpuInfo, machine: EngineHost | None = None, files: Mapping[str, Path] = MappingProxyType({})
) -> EngineStore:
    """Put an engine of each of a bundle's fp32 graphs into the cache; `files` are built instead of the bundle's."""
    store, here = EngineStore(), engine_host(gpu)
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
