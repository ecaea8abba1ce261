"""The devices that work on this machine, and why others do not: each probe gives a value or a reason.

No probe ends the process: a TensorRT `Runtime`, which dies without a driver, is made only to load a bundle on a GPU.
"""

from __future__ import annotations

import platform
import stat
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from unipinrec import __version__
from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.device import THIS_MACHINE, Machine
from unipinrec.runtime.graphs.backend import Device
from unipinrec.runtime.graphs.openvino_cpu import NO_BF16, import_openvino
from unipinrec.runtime.graphs.ort_cpu import import_onnxruntime
from unipinrec.runtime.graphs.ort_cuda import CUDA, installed_wheels, overwritten, preload, provider_problem
from unipinrec.runtime.machine import has_bf16, this_cpu, this_memory
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.retrieval.index import import_hnswlib
from unipinrec.runtime.tools.diagnosis import Choice, Diagnosis, EngineCache, EngineReport, Gpu, Library, OnnxRuntime
from unipinrec.runtime.tools.engines import ListedEngine, list_engines
from unipinrec.runtime.trt.cuda import GpuInfo
from unipinrec.runtime.trt.library import FLAVORS, NAMES, Flavor, TensorRT
from unipinrec.runtime.trt.record import engine_host
from unipinrec.runtime.trt.store import EngineStore

T = TypeVar("T")
AUTO = ("tensorrt", "cuda", "cpu")
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
CUDA_PACKAGES = ("cuda-bindings", "nvidia-cuda-runtime", "nvidia-cublas", "nvidia-cudnn-cu13")


class Reason(str):
    """Why a probe failed."""


def examine(bundle: Path | None = None, machine: Machine = THIS_MACHINE) -> Diagnosis:
    """Examine this machine, and the devices for a bundle. The result holds all problems; raises nothing."""
    gpu, ort, store = _gpu(machine), _onnxruntime(), _probed(EngineStore)
    flavors = {flavor: _probed(partial(machine.tensorrt, flavor)) for flavor in FLAVORS}
    tensorrt = tuple(
        _library(NAMES[flavor], trt if isinstance(trt, Reason) else trt.version) for flavor, trt in flavors.items()
    )
    openvino = _library("OpenVINO", _probed(lambda: str(import_openvino().__version__)))
    driver = machine.driver_problem()
    devices = _devices(driver, gpu, ort, tensorrt, openvino)
    installed = {flavor: trt for flavor, trt in flavors.items() if not isinstance(trt, Reason)}
    engines = _probed(partial(_engines, bundle, store, gpu.info, installed)) if bundle else ()
    return Diagnosis(
        unipinrec=__version__,
        python=platform.python_version(),
        system=platform.platform(),
        cpu=this_cpu(),
        memory=this_memory(),
        gpu=gpu,
        onnxruntime=ort,
        tensorrt=tensorrt,
        openvino=openvino,
        hnswlib=_library("hnswlib", _probed(_hnswlib)),
        cache=_cache(store),
        devices=devices,
        bundle=None if bundle is None else str(bundle),
        engines=() if isinstance(engines, Reason) else engines,
        engines_problem=str(engines) if isinstance(engines, Reason) else None,
        auto=_tried(bundle, machine) if bundle else _expected(devices, driver),
    )


def _probed(probe: Callable[[], T]) -> T | Reason:
    """The result of a probe, or why it failed."""
    try:
        return probe()
    except Exception as error:  # a broken installation may raise anything
        return Reason(str(error) or type(error).__name__)


def _gpu(machine: Machine) -> Gpu:
    info = machine.gpu()
    return Gpu(
        driver=_driver_version(),
        packages={name: installed for name in CUDA_PACKAGES if (installed := _installed(name))},
        info=None if isinstance(info, str) else info,
        problem=info if isinstance(info, str) else None,
    )


def _driver_version(path: Path = DRIVER_VERSION) -> str | None:
    """Such as "580.65.06", from "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  ..."."""
    try:
        words = path.read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdecimal() and "." in word), None)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hnswlib() -> str:
    import_hnswlib()  # it does not know its version
    return version("hnswlib")


def _onnxruntime() -> OnnxRuntime:
    probed = _probed(lambda: (str(import_onnxruntime().__version__), import_onnxruntime().get_available_providers()))
    number, providers = (None, ()) if isinstance(probed, Reason) else probed
    return OnnxRuntime(
        name="ONNX Runtime",
        version=number,
        problem=str(probed) if isinstance(probed, Reason) else overwritten(),
        wheels=tuple(installed_wheels()),
        providers=tuple(providers),
    )


def _library(name: str, probed: str | Reason) -> Library:
    missing = isinstance(probed, Reason)
    return Library(name=name, version=None if missing else probed, problem=str(probed) if missing else None)


def _devices(
    driver: str | None, gpu: Gpu, ort: OnnxRuntime, tensorrt: Sequence[Library], openvino: Library
) -> dict[str, str | None]:
    """By device, why it cannot run with any bundle."""
    missing = ort.problem if ort.version is None else None
    absent = None if any(library.version for library in tensorrt) else "; ".join(str(t.problem) for t in tensorrt)
    return {
        "tensorrt": driver or gpu.problem or absent,
        "cuda": driver or missing or provider_problem(import_onnxruntime(), CUDA) or preload(import_onnxruntime()),
        "cpu": missing,
        "openvino": openvino.problem,
        "openvino-bf16": openvino.problem or (None if has_bf16() else NO_BF16),
    }


def _cache(store: EngineStore | Reason) -> EngineCache:
    """The cache; nothing is created or changed."""
    if isinstance(store, Reason):
        return EngineCache(path=None, mode=None, entries=0, size_bytes=0, problem=str(store))
    entries = _probed(store.entries)
    broken = entries if isinstance(entries, Reason) else entries.pop("", None)  # "" stands for the whole folder
    status = _probed(store.root.stat)
    sizes = _probed(lambda: sum(path.lstat().st_size for path in store.root.rglob("*") if path.is_file()))
    return EngineCache(
        path=str(store.root),
        mode=None if isinstance(status, Reason) else f"{stat.S_IMODE(status.st_mode):o}",
        entries=0 if isinstance(entries, Reason) else len(entries),
        size_bytes=0 if isinstance(sizes, Reason) else sizes,
        problem=None if broken is None else str(broken),
    )


def _engines(
    path: Path, store: EngineStore | Reason, gpu: GpuInfo | None, installed: Mapping[Flavor, TensorRT]
) -> tuple[EngineReport, ...]:
    if isinstance(store, Reason):
        raise BackendError(store)
    machine = engine_host(gpu)
    return tuple(map(_engine, list_engines(Bundle.open(path), store, machine, installed)))


def _engine(listed: ListedEngine) -> EngineReport:
    if listed.record is None:
        return EngineReport(id=listed.id, source=listed.source, problem=listed.problem)
    record, key = listed.record, listed.record.key
    return EngineReport(
        id=listed.id,
        source=listed.source,
        problem=listed.problem,
        graph=key.graph,
        precision=key.precision,
        library=f"{NAMES[key.flavor]} {key.version}",
        target=key.target,
        gpu=record.machine.gpu,
        created=record.created,
        size_bytes=record.size_bytes,
    )


def _expected(devices: Mapping[str, str | None], driver: str | None) -> Choice:
    """The device that "auto" chooses if the bundle has engines here."""
    refused: list[str] = []
    for name in AUTO:
        problem = devices[name]
        if problem is None:
            reason = f"auto, once its engines are compiled; {AUTO[1]} until then" if name == AUTO[0] else "auto"
            fell_back = bool(refused) and driver is None
            device = Device(name=name, reason=reason, refused=tuple(refused), fell_back=fell_back)
            return Choice(device=device, problem=None)
        refused.append(f"{name}: {problem}")
    return Choice(device=None, problem="; ".join(refused))


def _tried(bundle: Path, machine: Machine) -> Choice:
    """The device for a bundle, after loading it as a server does, with the golden requests."""
    problems: list[str] = []
    for device in ("auto", "cpu"):
        loaded = _probed(partial(Recommender.load, bundle, device, machine=machine))
        if not isinstance(loaded, Reason):
            loaded.close()
            problem = "; ".join(problems) or None
            return Choice(device=loaded.device, problem=problem, retrieval=loaded.retriever.way)
        problems.append(str(loaded))
    return Choice(device=None, problem="; ".join(dict.fromkeys(problems)))
