"""The engines that serve a bundle on this machine, or why there are none.

A plan is executable code. One that this machine built, and that passed the golden requests here, is taken from the
private cache. One that travels in the bundle is taken if the operator allows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.manifest import EngineSpec
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.trt.cuda import GpuInfo
from unipinrec.runtime.trt.library import TensorRT
from unipinrec.runtime.trt.load import Plan
from unipinrec.runtime.trt.record import COMPILE, EngineRecord, Need, Refusal, engine_host, needs_of, runs_on
from unipinrec.runtime.trt.store import EngineStore

ALLOW = "allow it with --allow-bundle-engines (in Python allow_bundle_engines=True) if you trust who built it"


@dataclass(frozen=True, kw_only=True, eq=False)
class ServingEngines:
    """Where the engines of bundles may come from.

    Attributes:
        trt: What is to run them.
        gpu: Where.
        store: The private cache.
        allow_bundle_engines: Whether plans that travel in a bundle may run.
    """

    trt: TensorRT
    gpu: GpuInfo
    store: EngineStore
    allow_bundle_engines: bool

    def load(self, bundle: Bundle, precision: str) -> tuple[dict[str, Plan], dict[str, bytes]]:
        """The plans of all graphs, and the kernels that TensorRT-RTX compiled of some of them here earlier.

        Raises:
            BackendError: A graph has no engine that may run here, or a plan is not the one that is listed.
        """
        machine = engine_host(self.gpu.name, self.gpu.architecture, self.gpu.driver_version)
        files, problems = bundle.graph_files(precision), []
        plans: dict[str, Plan] = {}
        kernels: dict[str, bytes] = {}
        for graph, need in needs_of(bundle, precision, self.trt).items():
            cached, carried = self.store.serving(need, machine), next(self._carried(bundle, need), None)
            if isinstance(cached, EngineRecord):
                plans[graph] = self._cached_plan(cached, files[graph])
                kernels |= {graph: content} if (content := self.store.kernels(cached)) else {}
            elif carried and self.allow_bundle_engines:
                plans[graph] = Plan(content=bundle.files[carried.file].read_bytes())
            else:
                problems.append(_problem(bundle, need, cached, carried))
        if problems:
            more = f" ({len(problems) - 1} more graphs have none either)" if len(problems) > 1 else ""
            raise BackendError(f"{problems[0]}{more}")
        return plans, kernels

    def _carried(self, bundle: Bundle, need: Need) -> Iterator[EngineSpec]:
        """The engines in the bundle that fit; its manifest lists them beside the graph that they were built from."""
        for spec in bundle.manifest.engines:
            same = (spec.graph, spec.precision, spec.flavor, spec.version)
            fits = any(runs_on(target, self.gpu.architecture) for target in spec.targets)
            if fits and same == (need.graph, need.precision, need.flavor, need.version):
                yield spec

    def _cached_plan(self, record: EngineRecord, graph_file: GraphFile) -> Plan:
        options = record.key.options
        return Plan(
            content=self.store.plan(record),
            weights=graph_file if options.strip_weights else None,
            host_code=options.version_compatible,
        )


def _problem(bundle: Bundle, need: Need, cached: Refusal, carried: EngineSpec | None) -> str:
    """Why a graph has no engine to run, and what to do."""
    command = f"run unipinrec compile {bundle.path} --precision {need.precision}"
    if carried:
        return (
            f"the bundle carries an engine of {need.graph} in {need.precision}, but a plan is executable code: "
            f"{ALLOW}, or {command}"
        )
    return f"{cached.reason}; {command if cached.remedy == COMPILE else cached.remedy}"
