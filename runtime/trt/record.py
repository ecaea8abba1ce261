"""The record of a compiled engine: its inputs, its builder, and whether it may run here. Pure."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import msgspec

from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.trt.cuda import GpuInfo
from unipinrec.runtime.trt.layers import LayerReport
from unipinrec.runtime.trt.library import NAMES, Flavor, TensorRT
from unipinrec.runtime.trt.profiles import ProfileShapes

PORTABLE, FIRST_PORTABLE = "portable", 80
MACHINE_IDS = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
COMPILE = "run unipinrec compile BUNDLE"


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a build beside its shapes.

    Attributes:
        optimization_level: 0 to 5: how long to look for fast kernels; None = the builder's default.
        workspace_bytes: Most scratch memory of a kernel; None = all of the GPU's.
        strip_weights: Leave the weights out of the plan; loading puts them back from the graph.
        version_compatible: Make a plan that later versions of the same TensorRT load as well.
    """

    optimization_level: int | None = None
    workspace_bytes: int | None = None
    strip_weights: bool = False
    version_compatible: bool = False


DEFAULT_OPTIONS = BuildOptions()


class EngineKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that determines an engine.

    Attributes:
        graph: Its name.
        graph_sha256: Of the graph's file and its weights; see `graph_hash`.
        precision: Of the graph.
        profiles: The covered shapes.
        flavor, version: Of the TensorRT that builds it.
        target: The GPU architecture, such as "sm_90"; several with commas; or "portable".
        options: Of the build.
    """

    graph: str
    graph_sha256: str
    precision: str
    profiles: tuple[ProfileShapes, ...]
    flavor: Flavor
    version: str
    target: str
    options: BuildOptions

    def digest(self) -> str:
        """The key as one hash, the name of the entry."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


class EngineHost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The machine that builds or runs an engine.

    Attributes:
        id: A hash that stays the same on this machine.
        gpu: Its name; "" without a GPU.
        architecture: Such as "sm_90"; "" without a GPU.
        driver: Version of the driver; "" without a GPU.
    """

    id: str
    gpu: str = ""
    architecture: str = ""
    driver: str = ""


class Verification(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of the golden requests on an engine.

    Attributes:
        passed: False only for engines that cannot run where they were built.
        how: The result in words, with figures.
    """

    passed: bool
    how: str


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An engine in the cache; `engine.json`.

    Attributes:
        key: All that determines it.
        plan_sha256, size_bytes: Of its plan.
        created: UTC time, ISO 8601.
        seconds: Duration of the build.
        machine: Where it was built and passed the golden requests.
        layers: The precision of its layers.
        activation_bytes: Scratch memory of each profile that the builder logged.
        verified: The result of the golden requests.
        kernels_sha256: Of the kernels that TensorRT-RTX compiled for this GPU; None = not stored.
    """

    key: EngineKey
    plan_sha256: str
    size_bytes: int
    created: str
    seconds: float
    machine: EngineHost
    layers: LayerReport
    activation_bytes: tuple[int, ...]
    verified: Verification
    kernels_sha256: str | None = None


class EngineProblem(msgspec.Struct, frozen=True, kw_only=True):
    """Why an engine cannot be used, and what to do about it."""

    reason: str
    remedy: str = COMPILE

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """The graph and the TensorRT that a server needs an engine for; see `EngineKey`."""

    graph: str
    graph_sha256: str
    precision: str
    flavor: Flavor
    version: str


def engine_host(gpu: GpuInfo | None = None) -> EngineHost:
    """This machine and its GPU. The system's id is confidential, and therefore hashed.

    Containers have ids of their own, which change when they start. An operator who sets `UNIPINREC_FLEET` lets all
    machines with that text and equal GPUs and drivers share engines; each proves them by the golden requests.
    """
    identity = os.environ.get("UNIPINREC_FLEET") or next(filter(None, map(_text_of, MACHINE_IDS)), platform.node())
    digest = hashlib.sha256(f"unipinrec {identity}".encode()).hexdigest()
    if gpu is None:
        return EngineHost(id=digest)
    return EngineHost(id=digest, gpu=gpu.name, architecture=gpu.architecture, driver=gpu.driver_version)


def _text_of(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def graph_hash(bundle: Bundle, graph: str, precision: str) -> str:
    """Hash of a graph's file and of the files of its weights."""
    manifest = bundle.manifest
    file = manifest.graphs_in(precision)[graph].file
    listed = [(name, manifest.files[name].sha256) for name in (file, *sorted(bundle.files.graph(file).weights))]
    return hashlib.sha256(msgspec.json.encode(listed)).hexdigest()


def needs_of(bundle: Bundle, precision: str, trt: TensorRT) -> dict[str, Need]:
    """The engines that serving a bundle in a precision needs, by graph."""
    return {
        graph: Need(
            graph=graph,
            graph_sha256=graph_hash(bundle, graph, precision),
            precision=precision,
            flavor=trt.flavor,
            version=trt.version,
        )
        for graph in bundle.manifest.graphs_in(precision)
    }


def unfit(record: EngineRecord, need: Need | EngineKey, machine: EngineHost) -> EngineProblem | None:
    """Why an engine does not meet a need on a machine; None where it does. Reads no file."""
    mismatch = next(_mismatches(record, need, machine), None)
    return EngineProblem(reason=f"the engine of {need.graph} in {need.precision} {mismatch}") if mismatch else None


def _mismatches(record: EngineRecord, need: Need | EngineKey, machine: EngineHost) -> Iterator[str]:
    key = record.key
    if (key.graph, key.precision, key.graph_sha256) != (need.graph, need.precision, need.graph_sha256):
        yield "was built from another graph"
    if key.flavor != need.flavor or not _version_fits(key, need.version):
        yield f"was built with {NAMES[key.flavor]} {key.version}, here is {NAMES[need.flavor]} {need.version}"
    if not runs_on(key.target, machine.architecture):
        yield f"was built for {key.target}, here is {machine.architecture or 'no GPU'}"
    if record.machine.id != machine.id:
        yield "was built on another machine; a plan is executable code, it is not run here"
    if record.machine.gpu != machine.gpu:
        yield f"was built on a {record.machine.gpu}, here is a {machine.gpu}"
    if not record.verified.passed:
        yield f"has not passed the golden requests: {record.verified.how}"


def _version_fits(key: EngineKey, version: str) -> bool:
    built, here = (tuple(int(part) for part in text.split(".") if part.isdecimal()) for text in (key.version, version))
    later = built[:1] == here[:1] and built <= here
    return key.version == version or (key.options.version_compatible and later)


def runs_on(target: str, architecture: str) -> bool:
    """Whether an engine for a target of `EngineKey` runs on a GPU architecture."""
    if target != PORTABLE:
        return architecture in target.split(",")
    number = architecture.removeprefix("sm_")
    return number.isdecimal() and int(number) >= FIRST_PORTABLE
