"""From a plan to an engine that can run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import GraphSpec
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.trt.build import refit_engine
from unipinrec.runtime.trt.cuda import Cuda, suppressed
from unipinrec.runtime.trt.io import differences, engine_profiles
from unipinrec.runtime.trt.library import LogLines, TensorRT, tensorrt_logger
from unipinrec.runtime.trt.profiles import ProfileShapes
from unipinrec.runtime.trt.runner import ProfileRunner

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """A verified plan, and what else it takes to load it.

    Attributes:
        content: The plan: executable code.
        weights: Its graph, where it was built without its weights.
        host_code: Whether it was built to be version-compatible, and so holds code for the CPU as well.
    """

    content: bytes
    weights: GraphFile | None = None
    host_code: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedEngine:
    """A loaded engine.

    Attributes:
        profiles: Shapes of each optimisation profile, as the engine tells them.
        runners: What runs in each.
        engine: `ICudaEngine`.
        cache: `IRuntimeCache` of TensorRT-RTX.
    """

    profiles: tuple[ProfileShapes, ...]
    runners: tuple[ProfileRunner, ...]
    engine: Any
    cache: Any | None

    def release(self) -> None:
        """Wait for runs that are under way and release everything; may be called again."""
        for runner in self.runners:
            runner.release()


class EngineLoader:
    """Loads the engine of one graph."""

    def __init__(self, trt: TensorRT, cuda: Cuda, graph: str, lines: LogLines) -> None:
        self._trt, self._cuda, self._graph, self._lines = trt, cuda, graph, lines

    def load(self, plan: EnginePlan, spec: GraphSpec, kernels: bytes | None) -> LoadedEngine:
        """Load it, and make a runner for each of its profiles.

        Raises:
            BackendError: It does not load, or is not one of this graph; nothing is left in memory.
        """
        module = self._trt.module
        try:
            logger = tensorrt_logger(module, self._lines)
            runtime = module.Runtime(logger)
            runtime.engine_host_code_allowed = plan.host_code
            engine = runtime.deserialize_cuda_engine(plan.content)
            if engine is None:
                raise self._failed("does not load the engine")
            if plan.weights is not None:
                refit_engine(self._trt, engine, plan.weights, self._lines, logger)
            problems = differences(module, engine, spec)
            if problems:
                raise self._failed("loads an engine of another graph", "; ".join(problems))
            return self._with_lanes(engine, spec, kernels)
        except BackendError:
            raise
        except Exception as error:  # its exceptions share no base class
            raise self._failed("does not load the engine", str(error)) from error

    def _with_lanes(self, engine: Any, spec: GraphSpec, kernels: bytes | None) -> LoadedEngine:
        how, cache = self._context_options(engine, kernels)
        runners: list[ProfileRunner] = []
        try:
            for index in range(engine.num_optimization_profiles):
                runners.append(self._runner(engine, how, index, spec))
        except BaseException:
            for runner in runners:
                runner.release()
            raise
        return LoadedEngine(profiles=engine_profiles(engine, spec), runners=tuple(runners), engine=engine, cache=cache)

    def _context_options(self, engine: Any, kernels: bytes | None) -> tuple[Any, Any | None]:
        """What to make contexts with: memory for their own profile alone, and the kernels that are there already."""
        strategy = self._trt.module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        config = engine.create_runtime_config() if self._trt.flavor == "tensorrt_rtx" else None
        if config is None or not hasattr(config, "create_runtime_cache"):
            return strategy, None
        config.set_execution_context_allocation_strategy(strategy)
        cache = config.create_runtime_cache()
        if kernels is not None and not cache.deserialize(kernels):
            log.info("%s: the stored kernels are not of this GPU, driver and %s; compiling", self._graph, self._trt)
        return config, cache if config.set_runtime_cache(cache) else None

    def _runner(self, engine: Any, how: Any, index: int, spec: GraphSpec) -> ProfileRunner:
        stream = self._cuda.stream()
        try:
            context = engine.create_execution_context(how)
            if context is None or not context.set_optimization_profile_async(index, stream):
                free, total = self._cuda.memory_info()
                raise self._failed(f"makes no context for profile {index}, {free:,} of {total:,} bytes are free")
            self._cuda.synchronize(stream)
        except BaseException:
            with suppressed("a stream may be lost"):
                self._cuda.destroy(stream)
            raise
        return ProfileRunner(self._graph, spec, context, self._cuda, stream, self._lines)

    def _failed(self, what: str, reason: str | None = None) -> BackendError:
        return BackendError(
            f"{self._graph}: {self._trt} {what}: {reason or self._lines.reason()}; if it was compiled for another "
            "bundle, on another machine or by another version, run unipinrec compile BUNDLE here"
        )
