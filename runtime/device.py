"""Choose the device that computes.

A requested device stands for candidates, best first. The first that opens is used; each one before it leaves a reason.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TypedDict, cast

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.manifest import Manifest
from unipinrec.runtime.graphs.backend import Backend, Device, Precision
from unipinrec.runtime.graphs.engine import Engine
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
log = logging.getLogger(__name__)


class Machine:
    """The GPUs of this machine and their libraries. A test passes its own, in `DeviceRules`."""

    ort_cuda: type[OrtCudaBackend] = OrtCudaBackend

    def driver_problem(self) -> str | None:
        """Why the GPU's driver cannot be used."""
        return driver_problem()

    def gpu(self) -> GpuInfo | str:
        """The GPU, or why there is no GPU."""
        return probe_gpu()

    def cuda(self) -> Cuda:
        """Use the GPU; see `Cuda.open`."""
        return Cuda.open()

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
        machine: Machine to look for GPUs; default = this machine.
    """

    strict: bool
    allow_bundle_engines: bool
    threads: int | None
    machine: Machine


def open_engine(
    bundle: Bundle,
    device: str | Backend,
    *,
    strict: bool = False,
    allow_bundle_engines: bool = False,
    threads: int | None = None,
    machine: Machine = THIS_MACHINE,
) -> Engine:
    """Load a bundle's graphs on a device or, if it does not run, on the next candidate; see `DeviceRules`.

    The caller's own backend is used unchanged.

    Raises:
        BackendError: The device is unknown, or no allowed device runs; the message says why.
    """
    model, vectors = bundle.manifest.model, bundle.item_vectors
    if not isinstance(device, str):
        return Engine(device, model, vectors, Device(name=type(device).__name__, reason="passed in"))
    names, has_driver = candidates(device, bundle.manifest), machine.driver_problem() is None
    matters = device != "auto" or has_driver
    bound = strict and matters
    refused: list[str] = []
    for name in names[:1] if bound else names:
        try:
            backend = _open(name, bundle, allow_bundle_engines, threads, machine)
        except BackendError as error:
            if len(names) == 1:
                raise BackendError(f"{bundle.path} does not run on {name}: {error}") from error
            refused.append(f"{name}: {error}")
        else:
            chosen = Device(
                name=name,
                reason=_reason(device, name, refused),
                precision=precision_of(name),
                refused=tuple(refused),
                fell_back=bool(refused) and matters,
            )
            _log_refused(chosen, device)
            return Engine(backend, model, vectors, chosen)
    rule = " and strict allows no other device" if bound else ""
    raise BackendError(f"{bundle.path} does not run on {device}{rule}: {'; '.join(refused)}")


def candidates(device: str, manifest: Manifest) -> tuple[str, ...]:
    """Devices to try for a requested device and a bundle, best first.

    Raises:
        BackendError: The device is unknown.
    """
    require_device(device)
    tensorrt = "tensorrt-bf16" if "bf16" in manifest.precisions else "tensorrt-fp32"
    if device in ("auto", "tensorrt"):
        return tensorrt, "cuda", "cpu"
    if device in TENSORRT_DEVICES:
        return device, "cuda", "cpu"
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
        return machine.ort_cuda(bundle.graph_files(precision), manifest.graphs_in(precision))
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
    return "auto: ONNX Runtime on the GPU" if name == "cuda" else "auto: engines of this bundle for this GPU"


def _log_refused(chosen: Device, device: str) -> None:
    """Log the devices that do not run; as a warning after a fallback."""
    level = logging.WARNING if chosen.fell_back else logging.INFO
    for reason in chosen.refused:
        log.log(level, "not used: %s", reason)
    if chosen.refused:
        log.log(level, "%s was requested, %s is used", device, chosen.name)
