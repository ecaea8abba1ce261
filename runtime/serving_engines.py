"""The engines that may serve a bundle on this machine, and why the others may not.

A plan is executable code. One that this machine built, and that passed the golden requests here, is taken from the
private cache. One that travels in the bundle is taken if the operator allows it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle import Bundle
from unipinrec.runtime.cuda import GpuInfo
from unipinrec.runtime.engine_record import COMPILE, EngineRecord, Need, Refusal, needs_of, runs_on, this_machine
from unipinrec.runtime.engine_store import EngineStore
from unipinrec.runtime.manifest import EngineSpec
from unipinrec.runtime.tensorrt_api import NAMES, TensorRT

ALLOW = "allow it with --allow-bundle-engines (in Python allow_bundle_engines=True) if you trust who built the bundle"


@dataclass(frozen=True, kw_only=True)
class FoundEngine:
    """A graph's engine, its plan unread, or why there is none.

    Attributes:
        graph: Name of the graph.
        precision: Of the bundle's graphs.
        engine: The entry of the cache, or what the bundle's manifest says; None where `problem` says why.
        problem: Why none may serve, and what to do.
    """

    graph: str
    precision: str
    engine: EngineRecord | EngineSpec | None = None
    problem: str | None = None

    @property
    def source(self) -> Literal["cache", "bundle"] | None:
        """Where the engine is."""
        if self.engine is None:
            return None
        return "cache" if isinstance(self.engine, EngineRecord) else "bundle"


@dataclass(frozen=True, kw_only=True)
class Plans:
    """What is loaded: per graph the plan, and the kernels that TensorRT-RTX compiled earlier where they were kept."""

    plans: dict[str, bytes]
    kernels: dict[str, bytes]


@dataclass(frozen=True, kw_only=True, eq=False)
class EngineFinder:
    """Finds the engines of bundles.

    Attributes:
        trt: What is to run them.
        gpu: Where.
        allow_bundle_engines: Whether plans that travel in a bundle may run.
        store: The private cache.
    """

    trt: TensorRT
    gpu: GpuInfo
    allow_bundle_engines: bool
    store: EngineStore

    def find(self, bundle: Bundle, precision: str) -> list[FoundEngine]:
        """What serves each graph of a bundle in a precision that it holds. Reads no plan."""
        return [self._find(bundle, need) for need in needs_of(bundle, precision, self.trt).values()]

    def load(self, bundle: Bundle, precision: str) -> Plans:
        """The plans of all graphs.

        Raises:
            BackendError: One has no engine that may run here, or a plan is not the one that is listed.
        """
        found = self.find(bundle, precision)
        problems = [one.problem for one in found if one.problem]
        if problems:
            more = f" ({len(problems) - 1} more graphs have none either)" if len(problems) > 1 else ""
            raise BackendError(f"{problems[0]}{more}")
        plans = {one.graph: self._plan(bundle, one.engine) for one in found if one.engine}
        records = {one.graph: one.engine for one in found if isinstance(one.engine, EngineRecord)}
        kernels = {graph: self.store.kernels(record) for graph, record in records.items()}
        return Plans(plans=plans, kernels={graph: content for graph, content in kernels.items() if content})

    def _find(self, bundle: Bundle, need: Need) -> FoundEngine:
        machine = this_machine(self.gpu.name, self.gpu.architecture, self.gpu.driver_version)
        cached = self.store.serving(need, machine)
        if isinstance(cached, EngineRecord):
            return FoundEngine(graph=need.graph, precision=need.precision, engine=cached)
        carried = next(self._carried(bundle, need), None)
        if carried and self.allow_bundle_engines:
            return FoundEngine(graph=need.graph, precision=need.precision, engine=carried)
        return FoundEngine(graph=need.graph, precision=need.precision, problem=_problem(bundle, need, cached, carried))

    def _carried(self, bundle: Bundle, need: Need) -> Iterator[EngineSpec]:
        """The engines in the bundle that fit; its manifest lists them beside the graph that they were built from."""
        for spec in bundle.manifest.engines:
            same = (spec.graph, spec.precision, spec.flavor, spec.version)
            fits = any(runs_on(target, self.gpu.architecture) for target in spec.targets)
            if fits and same == (need.graph, need.precision, need.flavor, need.version):
                yield spec

    def _plan(self, bundle: Bundle, engine: EngineRecord | EngineSpec) -> bytes:
        if isinstance(engine, EngineRecord):
            return self.store.plan(engine)
        content = (bundle.path / engine.file).read_bytes()
        if hashlib.sha256(content).hexdigest() != bundle.manifest.files[engine.file].sha256:
            raise BackendError(f"{bundle.path / engine.file} was altered since the bundle was opened; copy it again")
        return content


def _problem(bundle: Bundle, need: Need, cached: Refusal, carried: EngineSpec | None) -> str:
    command = f"run unipinrec compile {bundle.path} --precision {need.precision}"
    if carried:
        return (
            f"the engines in the bundle were built elsewhere for {NAMES[need.flavor]} {need.version}; a plan is "
            f"executable code: {ALLOW}, or {command}"
        )
    return f"{cached.reason}; {command if cached.remedy == COMPILE else cached.remedy}"
