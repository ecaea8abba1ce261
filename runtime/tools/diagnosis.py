"""What `unipinrec doctor` reports; its JSON document has these names."""

from __future__ import annotations

from dataclasses import dataclass

from unipinrec.runtime.graphs.backend import Device
from unipinrec.runtime.machine import Cpu, Memory
from unipinrec.runtime.trt.cuda import GpuInfo


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The NVIDIA GPU and what drives it.

    Attributes:
        driver: As the kernel's module names its version; None where there is none.
        packages: Versions of CUDA's Python packages that are installed.
        info: The GPU; None where `problem` says why.
        problem: Why it cannot be used.
    """

    driver: str | None
    packages: dict[str, str]
    info: GpuInfo | None
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class Library:
    """An inference library; `problem` says why it is missing or cannot be used."""

    name: str
    version: str | None
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime(Library):
    """ONNX Runtime.

    Attributes:
        wheels: Which of its wheels are installed; more than one is broken.
        providers: What it was built for; a provider may still lack its libraries.
    """

    wheels: tuple[str, ...]
    providers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EngineCache:
    """The private cache of compiled engines.

    Attributes:
        path: Its folder; None where there can be none.
        mode: Its permissions in octal; None where it does not exist.
        entries: How many engines it holds, of all bundles.
        size_bytes: What they take.
        problem: Why it is not used.
    """

    path: str | None
    mode: str | None
    entries: int
    size_bytes: int
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """A compiled engine of a bundle, or an entry of the cache that cannot be trusted: then all but `id` is unknown.

    Attributes:
        id: Hash of its key; the name of its entry.
        source: "cache" or "bundle".
        problem: Why it is not used; None where it is.
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
    """What "auto" serves on.

    Attributes:
        device: What it is; None where nothing serves. Without a bundle, whether its engines are there is not known.
        problem: Why "auto" does not serve; `device` is then what serves when it is asked for.
    """

    device: Device | None
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that was found; see the classes.

    Attributes:
        bundle: The bundle that was asked about, if any.
        devices: By device, why it cannot run on this machine whatever the bundle; None where it can.
        engines: Those of the bundle.
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
    cache: EngineCache
    devices: dict[str, str | None]
    bundle: str | None
    engines: tuple[EngineReport, ...]
    engines_problem: str | None
    auto: Choice
