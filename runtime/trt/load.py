"""Loads a plan: an engine with a runner for each of its profiles."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import GraphSpec
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.trt.cuda import Cuda, suppressed
from unipinrec.runtime.trt.io import differences, engine_profiles
from unipinrec.runtime.trt.library import LogLines, TensorRT, tensorrt_logger
from unipinrec.runtime.trt.profiles import ProfileShapes
from unipinrec.runtime.trt.record import BuildOptions
from unipinrec.runtime.trt.runner import ProfileRunner

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """A verified plan, with all that loading it needs.

    Attributes:
        content: The plan: executable code.
        weights: Its graph, for a plan without weights.
        host_code: Whether the plan is version-compatible, and so holds code for the CPU as well.
    """

    content: bytes
    weights: GraphFile | None = None
    host_code: bool = False

    @classmethod
    def of(cls, content: bytes, options: BuildOptions, graph: GraphFile) -> EnginePlan:
        """A plan that was built from a graph with these options."""
        weights = graph if options.strip_weights else None
        return cls(content=content, weights=weights, host_code=options.version_compatible)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedEngine:
    """A loaded engine.

    Attributes:
        profiles: Shapes of each optimisation profile.
        runners: One per profile.
        engine: `ICudaEngine`.
        cache: `IRuntimeCache` of TensorRT-RTX.
    """

    profiles: tuple[ProfileShapes, ...]
    runners: list[ProfileRunner]
    engine: Any
    cache: Any | None

    def release(self) -> None:
        """Wait for present runs and release everything; may be called again."""
        for runner in self.runners:
            runner.release()


class EngineLoader:
    """Loads the engine of one graph."""

    def __init__(self, trt: TensorRT, cuda: Cuda, graph: str, lines: LogLines) -> None:
        self._trt, self._cuda, self._graph, self._lines = trt, cuda, graph, lines

    def load(self, plan: EnginePlan, spec: GraphSpec, kernels: bytes | None) -> LoadedEngine:
        """Load a plan, and make a runner for each of its profiles.

        Raises:
            BackendError: It does not load, or belongs to another graph; nothing is left in memory.
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
                self._refit(engine, plan.weights, logger)
            problems = differences(module, engine, spec)
            if problems:
                raise self._failed("loads an engine of another graph", "; ".join(problems))
            return self._with_runners(engine, spec, kernels)
        except BackendError:
            raise
        except Exception as error:  # TensorRT's exceptions share no base class
            raise self._failed("does not load the engine", str(error)) from error

    def _refit(self, engine: Any, graph: GraphFile, logger: Any) -> None:
        """Put the weights back into an engine that was built without them (`BuildOptions.strip_weights`).

        Raises:
            BackendError: They do not fit it.
        """
        refitter = self._trt.module.Refitter(engine, logger)
        with graph.in_folder() as file:
            fits = self._trt.module.OnnxParserRefitter(refitter, logger).refit_from_file(str(file))
        if not fits:
            problem = "its weights do not fit the engine"
        elif not refitter.refit_cuda_engine():
            problem = f"{self._trt} does not put its weights into the engine"
        else:
            return
        raise BackendError(f"{graph.name}: {problem}: {self._lines.reason()}; compile it again")

    def _with_runners(self, engine: Any, spec: GraphSpec, kernels: bytes | None) -> LoadedEngine:
        how, cache = self._context_options(engine, kernels)
        loaded = LoadedEngine(profiles=engine_profiles(engine, spec), runners=[], engine=engine, cache=cache)
        try:
            for index in range(len(loaded.profiles)):
                loaded.runners.append(self._runner(engine, how, index, spec))
        except BaseException:
            loaded.release()
            raise
        return loaded

    def _context_options(self, engine: Any, kernels: bytes | None) -> tuple[Any, Any | None]:
        """Options of contexts, which take memory for one profile alone, and the cache that holds the stored kernels."""
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

    def _failed(self, problem: str, reason: str | None = None) -> BackendError:
        return BackendError(
            f"{self._graph}: {self._trt} {problem}: {reason or self._lines.reason()}; if it was compiled for another "
            "bundle, on another machine or by another version, run unipinrec compile BUNDLE here"
        )
