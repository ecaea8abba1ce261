"""What is known of a compiled engine: what it follows from, what made it, and whether it may run here. Pure."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path

import msgspec

from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.trt.layers import LayerReport
from unipinrec.runtime.trt.library import NAMES, Flavor, TensorRT
from unipinrec.runtime.trt.profiles import ProfileShapes

PORTABLE, FIRST_PORTABLE = "portable", 80
MACHINE_IDS = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
COMPILE = "run unipinrec compile BUNDLE"


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a build may be asked beside its shapes.

    Attributes:
        optimization_level: 0 to 5: how long to look for fast kernels; None = the builder's own.
        workspace_bytes: The most scratch memory that a kernel may take; None = all of the GPU's.
        strip_weights: Leave the weights out of the plan; they are put back from the graph when it is loaded.
        version_compatible: Make a plan that later versions of the same TensorRT load as well.
    """

    optimization_level: int | None = None
    workspace_bytes: int | None = None
    strip_weights: bool = False
    version_compatible: bool = False


class EngineKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that an engine follows from.

    Attributes:
        graph: Its name.
        graph_sha256: Of the graph's file and of the weights that it refers to; see `graph_hash`.
        precision: Of the graph.
        profiles: Shapes that are covered.
        flavor, version: Of the TensorRT that builds it.
        target: The GPU architecture, as "sm_90"; several with commas; or "portable".
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
        """The key as one hash, which names the entry."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


class EngineHost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where an engine was built or is to run.

    Attributes:
        id: A hash that this machine keeps.
        gpu: Its name; "" where there is none.
        architecture: As "sm_90"; "" where there is no GPU.
        driver: Version of the driver; "" where there is none.
    """

    id: str
    gpu: str = ""
    architecture: str = ""
    driver: str = ""


class Verification(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the golden requests went through an engine.

    Attributes:
        passed: Whether they did; False only for engines that were built where they cannot run.
        how: In words, with figures.
    """

    passed: bool
    how: str


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An engine in the cache; `engine.json`.

    Attributes:
        key: What it was built from and for.
        plan_sha256, size_bytes: Of its plan.
        created: UTC time, ISO 8601.
        seconds: What the build took.
        machine: Where it was built, or taken over after the golden requests had passed there.
        layers: What it computes in.
        activation_bytes: Scratch memory of each profile, as far as the builder told.
        verified: The golden requests.
        kernels_sha256: Of the kernels that TensorRT-RTX compiled for this GPU, where they were kept.
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


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why there is no engine to use, and what to do about it."""

    reason: str
    remedy: str = COMPILE

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """What a server needs an engine of, and what is to run it; the fields are those of `EngineKey`."""

    graph: str
    graph_sha256: str
    precision: str
    flavor: Flavor
    version: str


def engine_host(gpu: str = "", architecture: str = "", driver: str = "") -> EngineHost:
    """This machine and a GPU of it. The system's own id is hashed: it is not to be shown around."""
    identity = next(filter(None, map(_text_of, MACHINE_IDS)), platform.node())
    digest = hashlib.sha256(f"unipinrec {identity}".encode()).hexdigest()
    return EngineHost(id=digest, gpu=gpu, architecture=architecture, driver=driver)


def _text_of(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def graph_hash(bundle: Bundle, graph: str, precision: str) -> str:
    """Hash of a graph and of every file of the bundle that its file names, which are those of its weights."""
    manifest = bundle.manifest
    file = manifest.graphs_in(precision)[graph].file
    listed = [(name, manifest.files[name].sha256) for name in (file, *sorted(bundle.files.graph(file).weights))]
    return hashlib.sha256(msgspec.json.encode(listed)).hexdigest()


def needs_of(bundle: Bundle, precision: str, trt: TensorRT) -> dict[str, Need]:
    """What serving a bundle in a precision takes, by graph."""
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


def unfit(record: EngineRecord, need: Need, machine: EngineHost) -> Refusal | None:
    """Why an engine cannot serve a need on a machine; None where it can. Nothing is read."""
    mismatch = next(_mismatches(record, need, machine), None)
    return Refusal(reason=f"the engine of {need.graph} in {need.precision} {mismatch}") if mismatch else None


def _mismatches(record: EngineRecord, need: Need, machine: EngineHost) -> Iterator[str]:
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
