"""The engines to run a bundle on this machine, or why it has none.

A plan is executable code. It comes from the private cache if this machine built it and it passed the golden requests
here. A plan in the bundle itself may run only if the operator allows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.manifest import EngineSpec
from unipinrec.runtime.trt.cuda import GpuInfo
from unipinrec.runtime.trt.library import TensorRT
from unipinrec.runtime.trt.load import EnginePlan
from unipinrec.runtime.trt.record import COMPILE, EngineProblem, EngineRecord, Need, engine_host, needs_of, runs_on
from unipinrec.runtime.trt.store import EngineStore

ALLOW = "allow it with --allow-bundle-engines (in Python allow_bundle_engines=True) if you trust who built it"


@dataclass(frozen=True, kw_only=True, eq=False)
class ServingEngines:
    """Loads the engines of bundles.

    Attributes:
        trt: The TensorRT that runs them.
        gpu: The GPU that runs them.
        store: The private cache.
        allow_bundle_engines: Whether plans in a bundle may run.
    """

    trt: TensorRT
    gpu: GpuInfo
    store: EngineStore
    allow_bundle_engines: bool

    def load(self, bundle: Bundle, precision: str) -> tuple[dict[str, EnginePlan], dict[str, bytes]]:
        """The plans of all graphs, and the kernels that TensorRT-RTX compiled for some of them here earlier.

        Raises:
            BackendError: A graph has no engine that may run here, or a plan was altered.
        """
        machine = engine_host(self.gpu)
        files, problems = bundle.graph_files(precision), []
        plans: dict[str, EnginePlan] = {}
        kernels: dict[str, bytes] = {}
        for graph, need in needs_of(bundle, precision, self.trt).items():
            cached, carried = self.store.serving(need, machine), next(self._carried(bundle, need), None)
            if isinstance(cached, EngineRecord):
                plans[graph] = EnginePlan.of(self.store.plan(cached), cached.key.options, files[graph])
                kernels |= {graph: content} if (content := self.store.kernels(cached)) else {}
            elif carried and self.allow_bundle_engines:
                plans[graph] = EnginePlan(content=bundle.files[carried.file].read_bytes())
            else:
                problems.append(_problem(bundle, need, cached, carried))
        if problems:
            more = f" ({len(problems) - 1} more graphs have none either)" if len(problems) > 1 else ""
            raise BackendError(f"{problems[0]}{more}")
        return plans, kernels

    def _carried(self, bundle: Bundle, need: Need) -> Iterator[EngineSpec]:
        """The engines in the bundle that fit; its manifest names the graph of each."""
        for spec in bundle.manifest.engines:
            same = (spec.graph, spec.precision, spec.flavor, spec.version)
            fits = any(runs_on(target, self.gpu.architecture) for target in spec.targets)
            if fits and same == (need.graph, need.precision, need.flavor, need.version):
                yield spec


def _problem(bundle: Bundle, need: Need, cached: EngineProblem, carried: EngineSpec | None) -> str:
    """Why a graph has no engine, and what to do."""
    command = f"run unipinrec compile {bundle.path} --precision {need.precision}"
    if carried:
        return (
            f"the bundle carries an engine of {need.graph} in {need.precision}, but a plan is executable code: "
            f"{ALLOW}, or {command}"
        )
    return f"{cached.reason}; {command if cached.remedy == COMPILE else cached.remedy}"
