"""Choose the device that computes.

A requested device stands for candidates, best first. The first that opens is used; each one before it leaves a reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import TypedDict, Unpack, cast

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.manifest import Manifest
from unipinrec.runtime.graphs.backend import Backend, Device, Precision
from unipinrec.runtime.graphs.engine import WORK_BYTES, Engine
from unipinrec.runtime.graphs.openvino_cpu import OpenVinoBackend
from unipinrec.runtime.graphs.ort_cpu import OrtBackend
from unipinrec.runtime.graphs.ort_cuda import OrtCudaBackend
from unipinrec.runtime.machine import driver_problem, has_bf16
from unipinrec.runtime.trt.backend import TensorRtBackend
from unipinrec.runtime.trt.cuda import Cuda, GpuInfo, probe_gpu
from unipinrec.runtime.trt.library import FLAVORS, Flavor, TensorRT, import_tensorrt
from unipinrec.runtime.trt.serving import ServingEngines
from unipinrec.runtime.trt.store import EngineStore

OPENVINO_DEVICES = ("openvino", "openvino-bf16")
CUDA_DEVICES = ("cuda", "cuda-fp32", "cuda-bf16", "cuda-fp16")
TENSORRT_DEVICES = ("tensorrt", "tensorrt-fp32", "tensorrt-bf16", "tensorrt-fp16", "tensorrt-fp8")
DEVICES = ("auto", "cpu", *OPENVINO_DEVICES, *CUDA_DEVICES, *TENSORRT_DEVICES)
WITHOUT_BF16 = ("sm_70", "sm_72", "sm_75")
BLACKWELL = "sm_100"  # B200
NO_BLACKWELL = f"; onnxruntime-gpu 1.31 has no kernels for {BLACKWELL}: use TensorRT, or a build of your own"
log = logging.getLogger(__name__)


class Machine:
    """A GPU of this machine, by its number, and the libraries for it. A test passes its own, in `DeviceRules`."""

    ort_cuda: type[OrtCudaBackend] = OrtCudaBackend

    def __init__(self, index: int = 0) -> None:
        self.index = index

    def driver_problem(self) -> str | None:
        """Why the GPU's driver cannot be used."""
        return driver_problem()

    def gpu(self) -> GpuInfo | str:
        """The GPU, or why there is no GPU."""
        return probe_gpu(self.index)

    def cuda(self) -> Cuda:
        """Use the GPU; see `Cuda.open`."""
        return Cuda.open(self.index)

    def tensorrt(self, flavor: Flavor | None = None) -> TensorRT:
        """See `import_tensorrt`."""
        return import_tensorrt(flavor)

    def engines(self, trt: TensorRT, gpu: GpuInfo, allow_bundle_engines: bool) -> ServingEngines:
        """Source of compiled engines."""
        return ServingEngines(trt=trt, gpu=gpu, store=EngineStore(), allow_bundle_engines=allow_bundle_engines)


THIS_MACHINE = Machine()


class DeviceRules(TypedDict, total=False):
    """Rules for the choice of a device; the default of the first two is False.

    Attributes:
        strict: Fail instead of falling back to another device. With "auto": fail if this machine has an NVIDIA driver
            and TensorRT does not run.
        allow_bundle_engines: Run engines that are stored in the bundle and were built elsewhere. They are executable
            code.
        threads: Threads that compute on the CPU; None = as many as this process may use.
        machine: GPU to use, as `Machine(1)`; default = the first GPU of this machine.
        work_bytes: Most memory that a batch may take on the CPU; default = `WORK_BYTES`.
    """

    strict: bool
    allow_bundle_engines: bool
    threads: int | None
    machine: Machine
    work_bytes: int


def open_engine(
    bundle: Bundle,
    device: str | Backend,
    proof: Callable[[Engine], None] | None = None,
    **rules: Unpack[DeviceRules],
) -> Engine:
    """Load a bundle's graphs on a device or, if it does not run, on the next candidate; see `DeviceRules`.

    The caller's own backend is used unchanged.

    Args:
        bundle: The bundle.
        device: One of `DEVICES`, or a backend.
        proof: Runs the graphs. A `BackendError` means that the device cannot run, and leads to the next one; any other
            error ends the choice, because a device that computes wrong numbers has no substitute.
        **rules: See `DeviceRules`.

    Raises:
        BackendError: The device is unknown, or no allowed device runs; the message says why.
    """
    model, vectors = bundle.manifest.model, bundle.item_vectors
    if not isinstance(device, str):
        if not hasattr(device, "rank_runs"):
            raise BackendError(f"device={device!r} is neither one of {', '.join(DEVICES)} nor a backend")
        return _proven(Engine(device, model, vectors, Device(name=type(device).__name__, reason="passed in")), proof)
    machine = rules.get("machine", THIS_MACHINE)
    has_driver = machine.driver_problem() is None
    gpu = machine.gpu() if has_driver else None
    names = candidates(device, bundle.manifest, gpu)
    matters = device != "auto" or has_driver
    bound = rules.get("strict", False) and matters
    refused: list[str] = []
    for name in names[:1] if bound else names:
        chosen = Device(
            name=name,
            reason=_reason(device, name, refused),
            precision=precision_of(name),
            refused=tuple(refused),
            fell_back=bool(refused) and matters,
        )
        try:
            backend = _open(name, bundle, rules.get("allow_bundle_engines", False), rules.get("threads"), machine)
            on_cpu = name.startswith(("cpu", "openvino"))
            work_bytes = rules.get("work_bytes", WORK_BYTES) if on_cpu else None
            engine = _proven(Engine(backend, model, vectors, chosen, work_bytes), proof)
        except BackendError as error:
            if len(names) == 1:
                raise BackendError(f"{bundle.path} does not run on {name}: {error}") from error
            lacks_kernels = name.startswith("cuda") and isinstance(gpu, GpuInfo) and gpu.architecture == BLACKWELL
            refused.append(f"{name}: {error}{NO_BLACKWELL if lacks_kernels else ''}")
        else:
            _log_refused(chosen, device)
            return engine
    rule = " and strict allows no other device" if bound else ""
    raise BackendError(f"{bundle.path} does not run on {device}{rule}: {'; '.join(refused)}")


def _proven(engine: Engine, proof: Callable[[Engine], None] | None) -> Engine:
    try:
        if proof is not None:
            proof(engine)
    except BaseException:
        engine.close()
        raise
    return engine


def candidates(device: str, manifest: Manifest, gpu: GpuInfo | str | None = None) -> tuple[str, ...]:
    """Devices to try for a requested device, a bundle and a GPU, best first.

    Raises:
        BackendError: The device is unknown.
    """
    require_device(device)
    if device in ("auto", "tensorrt"):
        fast = "fp16" if isinstance(gpu, GpuInfo) and gpu.architecture in WITHOUT_BF16 else "bf16"
        device = f"tensorrt-{fast if fast in manifest.precisions else 'fp32'}"
    if device in TENSORRT_DEVICES:
        reduced = {"tensorrt-bf16": "bf16", "tensorrt-fp16": "fp16", "tensorrt-fp8": "bf16"}.get(device)
        return device, *((f"cuda-{reduced}",) if reduced in manifest.precisions else ()), "cuda", "cpu"
    if device in CUDA_DEVICES:
        return device.removesuffix("-fp32"), "cpu"
    return (device,)


def require_device(device: str) -> None:
    """Check that a device is known.

    Raises:
        BackendError: It is not.
    """
    if device not in DEVICES:
        raise BackendError(f"unknown device {device!r}; use one of {', '.join(DEVICES)}")


def precision_of(device: str) -> Precision:
    """Precision that a device computes in."""
    return cast(Precision, device.partition("-")[2] or "fp32")


def _open(name: str, bundle: Bundle, allow_bundle_engines: bool, threads: int | None, machine: Machine) -> Backend:
    """Load a bundle's graphs on one device.

    Raises:
        BackendError: The device is missing or not installed, or the bundle has no graphs that it runs.
    """
    kind, precision, manifest = name.partition("-")[0], precision_of(name), bundle.manifest
    if kind == "cpu":
        return OrtBackend(bundle.graph_files(), threads)
    if kind == "openvino":
        return OpenVinoBackend(bundle.graph_files(), manifest.graphs, threads, precision=precision)
    if precision not in (manifest.precision, *manifest.precisions):
        raise BackendError(
            f"the bundle has graphs in {', '.join((manifest.precision, *manifest.precisions))}, not in {precision}; "
            f"export it again with --precision {precision}"
        )
    if kind == "cuda":
        return machine.ort_cuda(bundle.graph_files(precision), manifest.graphs_in(precision), gpu=machine.index)
    return _open_tensorrt(bundle, precision, allow_bundle_engines, machine)


class _TensorRtOnOwnGpu(TensorRtBackend):
    """Closes its GPU too."""

    def close(self) -> None:
        """See `Backend.close`."""
        super().close()
        self.cuda.close()


def _open_tensorrt(bundle: Bundle, precision: Precision, allow_bundle_engines: bool, machine: Machine) -> Backend:
    """Load engines of the first installed TensorRT that has an engine for every graph."""
    missing = machine.driver_problem()
    if missing:
        raise BackendError(missing)
    absent, problems = [], []
    for flavor in FLAVORS:
        try:
            trt = machine.tensorrt(flavor)
        except BackendError as error:
            absent.append(str(error))
            continue
        try:
            return _open_engines(trt, bundle, precision, allow_bundle_engines, machine)
        except BackendError as error:
            problems.append(str(error))
    raise BackendError("; ".join(problems or absent))


def _open_engines(
    trt: TensorRT, bundle: Bundle, precision: Precision, allow_bundle_engines: bool, machine: Machine
) -> Backend:
    cuda = machine.cuda()
    try:
        plans, kernels = machine.engines(trt, cuda.info, allow_bundle_engines).load(bundle, precision)
        return _TensorRtOnOwnGpu(trt, cuda, plans, bundle.manifest.graphs_in(precision), precision, kernels)
    except BaseException:
        cuda.close()
        raise


def _reason(device: str, name: str, refused: list[str]) -> str:
    if device != "auto":
        return f"instead of {device}, which does not run here" if refused else "requested"
    if name == "cpu":
        others = "openvino is not installed"
        if find_spec("openvino") is not None:  # never chosen by "auto"
            names = OPENVINO_DEVICES if has_bf16() else OPENVINO_DEVICES[:1]
            others = f"{' and '.join(names)} can be requested"
        return f"auto: ONNX Runtime on the CPU; {others}"
    return "auto: ONNX Runtime on the GPU" if name.startswith("cuda") else "auto: engines of this bundle for this GPU"


def _log_refused(chosen: Device, device: str) -> None:
    """Log the devices that do not run; as a warning after a fallback."""
    level = logging.WARNING if chosen.fell_back else logging.INFO
    for reason in chosen.refused:
        log.log(level, "not used: %s", reason)
    if chosen.refused:
        log.log(level, "%s was requested, %s is used", device, chosen.name)
