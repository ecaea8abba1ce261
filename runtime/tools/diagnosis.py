"""The report of `unipinrec doctor`; its JSON document has these names."""

from __future__ import annotations

from dataclasses import dataclass

from unipinrec.runtime.graphs.backend import Device
from unipinrec.runtime.machine import Cpu, Memory
from unipinrec.runtime.trt.cuda import GpuInfo


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The NVIDIA GPU, its driver and CUDA's packages.

    Attributes:
        driver: Version of the kernel's driver; None without a driver.
        packages: Versions of the installed Python packages of CUDA.
        info: The GPU; None if it cannot be used.
        problem: Why it cannot be used.
    """

    driver: str | None
    packages: dict[str, str]
    info: GpuInfo | None
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class Library:
    """An inference library, or the problem with it."""

    name: str
    version: str | None
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime(Library):
    """ONNX Runtime.

    Attributes:
        wheels: Its installed wheels; more than one do not work together.
        providers: Its built-in providers; a provider may still lack its libraries.
    """

    wheels: tuple[str, ...]
    providers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EngineCache:
    """The private cache of compiled engines.

    Attributes:
        path: Its folder; None if it cannot have one.
        mode: Its permissions in octal; None if it does not exist.
        entries: Number of engines of all bundles.
        size_bytes: Their total size.
        problem: Why it cannot be used.
    """

    path: str | None
    mode: str | None
    entries: int
    size_bytes: int
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """A compiled engine of a bundle, or an entry of the cache that cannot be trusted and has only an `id`.

    Attributes:
        id: Hash of its key; the name of its entry.
        source: "cache" or "bundle".
        problem: Why it cannot be used; None where it can.
    """

    id: str
    source: str
    problem: str | None
    graph: str | None = None
    precision: str | None = None
    library: str | None = None
    target: str | None = None
    gpu: str | None = None
    created: str | None = None
    size_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The device that "auto" chooses, and what finds the candidates.

    Attributes:
        device: None if no device works. Without a bundle, its engines are not checked.
        problem: Why "auto" fails; `device` then works if it is requested by name.
        retrieval: The index or the scan, and why; None without a bundle.
    """

    device: Device | None
    problem: str | None
    retrieval: str | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The whole report; see the classes.

    Attributes:
        bundle: The examined bundle, if any.
        devices: By device, why it cannot run on this machine with any bundle; None where it can.
        engines: The bundle's engines.
        engines_problem: Why they could not be listed.
    """

    unipinrec: str
    python: str
    system: str
    cpu: Cpu
    memory: Memory
    gpu: Gpu
    onnxruntime: OnnxRuntime
    tensorrt: tuple[Library, ...]
    openvino: Library
    hnswlib: Library
    cache: EngineCache
    devices: dict[str, str | None]
    bundle: str | None
    engines: tuple[EngineReport, ...]
    engines_problem: str | None
    auto: Choice
