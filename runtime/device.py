"""Which device serves, why, and what was tried before it.

A wanted device stands for candidates, best first. The first that opens serves; each before it leaves a reason.
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
from unipinrec.runtime.trt.cuda import Cuda, GpuInfo, probe_gpu
from unipinrec.runtime.trt.library import FLAVORS, Flavor, TensorRT, import_tensorrt
from unipinrec.runtime.trt.serving import ServingEngines
from unipinrec.runtime.trt.session import TensorRtBackend
from unipinrec.runtime.trt.store import EngineStore

OPENVINO_DEVICES = ("openvino", "openvino-bf16")
CUDA_DEVICES = ("cuda", "cuda-fp32", "cuda-bf16", "cuda-fp16")
TENSORRT_DEVICES = ("tensorrt", "tensorrt-fp32", "tensorrt-bf16", "tensorrt-fp16", "tensorrt-fp8")
DEVICES = ("auto", "cpu", *OPENVINO_DEVICES, *CUDA_DEVICES, *TENSORRT_DEVICES)
log = logging.getLogger(__name__)


class Machine:
    """What this machine has of GPUs and their libraries. A test passes one of its own, in `DeviceRules`."""

    ort_cuda: type[OrtCudaBackend] = OrtCudaBackend

    def driver_problem(self) -> str | None:
        """Why the GPU's driver cannot be used."""
        return driver_problem()

    def gpu(self) -> GpuInfo | str:
        """The GPU, or why there is none."""
        return probe_gpu()

    def cuda(self) -> Cuda:
        """Use the GPU; see `Cuda.open`."""
        return Cuda.open()

    def tensorrt(self, flavor: Flavor | None = None) -> TensorRT:
        """See `import_tensorrt`."""
        return import_tensorrt(flavor)

    def engines(self, trt: TensorRT, gpu: GpuInfo, allow_bundle_engines: bool) -> ServingEngines:
        """Where compiled engines come from."""
        return ServingEngines(trt=trt, gpu=gpu, store=EngineStore(), allow_bundle_engines=allow_bundle_engines)


THIS_MACHINE = Machine()


class DeviceRules(TypedDict, total=False):
    """What an operator lays down beside the wanted device; what is left out is False.

    Attributes:
        strict: Fail instead of falling back to another device. With "auto": fail if this machine has an NVIDIA driver
            and TensorRT does not serve.
        allow_bundle_engines: Run engines that travel in the bundle, built elsewhere. They are executable code.
        threads: How many compute on the CPU; None = as many as this process may use.
        machine: Where to look for GPUs; left out = here.
    """

    strict: bool
    allow_bundle_engines: bool
    threads: int | None
    machine: Machine


def open_engine(
    bundle: Bundle,
    wanted: str | Backend,
    *,
    strict: bool = False,
    allow_bundle_engines: bool = False,
    threads: int | None = None,
    machine: Machine = THIS_MACHINE,
) -> Engine:
    """Load a bundle's graphs on the wanted device or, where it does not run, on the next; see `DeviceRules`.

    A backend of the caller's own is taken as it is.

    Raises:
        BackendError: There is no such device, or none that may be used runs; says why each does not.
    """
    if not isinstance(wanted, str):
        own = Device(name=type(wanted).__name__, reason="passed in")
        return Engine(wanted, bundle.manifest.model, bundle.item_vectors, own)
    names = candidates(wanted, bundle.manifest)
    has_driver = machine.driver_problem() is None
    bound = strict and (wanted != "auto" or has_driver)
    refused: list[str] = []
    for name in names[:1] if bound else names:
        try:
            backend = _open(name, bundle, allow_bundle_engines, threads, machine)
        except BackendError as error:
            if len(names) == 1:
                raise BackendError(f"{bundle.path} does not run on {name}: {error}") from error
            refused.append(f"{name}: {error}")
        else:
            device = Device(
                name=name,
                reason=_reason(wanted, name, refused),
                precision=precision_of(name),
                refused=tuple(refused),
                fell_back=bool(refused) and (wanted != "auto" or has_driver),
            )
            _tell(device, wanted)
            return Engine(backend, bundle.manifest.model, bundle.item_vectors, device)
    rule = " and strict allows no other device" if bound else ""
    raise BackendError(f"{bundle.path} does not run on {wanted}{rule}: {'; '.join(refused)}")


def candidates(wanted: str, manifest: Manifest) -> tuple[str, ...]:
    """What a wanted device stands for with a bundle, best first.

    Raises:
        BackendError: There is no such device.
    """
    require_device(wanted)
    tensorrt = "tensorrt-bf16" if "bf16" in manifest.precisions else "tensorrt-fp32"
    if wanted in ("auto", "tensorrt"):
        return tensorrt, "cuda", "cpu"
    if wanted in TENSORRT_DEVICES:
        return wanted, "cuda", "cpu"
    if wanted in CUDA_DEVICES:
        return wanted.removesuffix("-fp32"), "cpu"
    return (wanted,)


def require_device(wanted: str) -> None:
    """Check that there is such a device.

    Raises:
        BackendError: There is none.
    """
    if wanted not in DEVICES:
        raise BackendError(f"unknown device {wanted!r}; use one of {', '.join(DEVICES)}")


def precision_of(name: str) -> Precision:
    """What a device computes in."""
    return cast(Precision, name.partition("-")[2] or "fp32")


def _open(name: str, bundle: Bundle, allow_bundle_engines: bool, threads: int | None, machine: Machine) -> Backend:
    """Load a bundle's graphs on one device.

    Raises:
        BackendError: It is not there or not installed, does not run a graph, or the bundle has nothing for it.
    """
    kind, precision, manifest = name.partition("-")[0], precision_of(name), bundle.manifest
    if kind == "cpu":
        return OrtBackend(bundle.graph_files(), threads)
    if kind == "openvino":
        rounded = precision == "bf16"
        return OpenVinoBackend(bundle.graph_files(), manifest.graphs, threads, precision="bf16" if rounded else "fp32")
    if precision not in (manifest.precision, *manifest.precisions):
        raise BackendError(
            f"the bundle has graphs in {', '.join((manifest.precision, *manifest.precisions))}, not in {precision}; "
            f"export it again with --precision {precision}"
        )
    if kind == "cuda":
        return machine.ort_cuda(bundle.graph_files(precision), manifest.graphs_in(precision))
    return _open_tensorrt(bundle, precision, allow_bundle_engines, machine)


class _TensorRtOnOwnGpu(TensorRtBackend):
    """Closes what its GPU was opened with."""

    def close(self) -> None:
        """See `Backend.close`."""
        super().close()
        self.cuda.close()


def _open_tensorrt(bundle: Bundle, precision: Precision, allow_bundle_engines: bool, machine: Machine) -> Backend:
    """Load engines of the first installed TensorRT that has one for every graph."""
    missing = machine.driver_problem()
    if missing:
        raise BackendError(missing)
    installed, absent, problems = [], [], []
    for flavor in FLAVORS:
        try:
            installed.append(machine.tensorrt(flavor))
        except BackendError as error:
            absent.append(str(error))
    for trt in installed:
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


def _reason(wanted: str, name: str, refused: list[str]) -> str:
    if wanted != "auto":
        return f"instead of {wanted}, which does not run here" if refused else "asked for"
    if name == "cpu":
        return f"auto: ONNX Runtime on the CPU; {_others()}"
    return "auto: ONNX Runtime on the GPU" if name == "cuda" else "auto: engines of this bundle for this GPU"


def _others() -> str:
    """What else could be asked for on the CPU, which is never chosen unasked."""
    if find_spec("openvino") is None:
        return "openvino is not installed"
    return f"{' and '.join(OPENVINO_DEVICES if has_bf16() else OPENVINO_DEVICES[:1])} can be asked for"


def _tell(device: Device, wanted: str) -> None:
    """Say what was not used; as a warning where somebody wanted it, or paid for a GPU."""
    level = logging.WARNING if device.fell_back else logging.INFO
    for reason in device.refused:
        log.log(level, "not used: %s", reason)
    if device.refused:
        log.log(level, "%s was wanted, %s serves", wanted, device.name)
