"""Loads a plan: an engine with a runner for each of its profiles."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import GraphSpec, TensorSpec
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.trt.cuda import Cuda, suppressed
from unipinrec.runtime.trt.library import LogLines, TensorRT, tensorrt_logger
from unipinrec.runtime.trt.profiles import ProfileShapes
from unipinrec.runtime.trt.record import BuildOptions
from unipinrec.runtime.trt.runner import ProfileRunner

TYPE_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}  # TensorRT's: numpy's
T = TypeVar("T")


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
        # Kernels specialised in the background would change the last bits of answers while a server runs.
        kernel_strategy = self._trt.module.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kernel_strategy.NONE
        config.cuda_graph_strategy = self._trt.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
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
            context.nvtx_verbosity = self._trt.module.ProfilingVerbosity.NONE  # each run would pay for its markers
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


def differences(module: Any, engine: Any, spec: GraphSpec) -> list[str]:
    """How an engine's inputs and outputs differ from those of its graph, one sentence each.

    Args:
        module: TensorRT's module.
        engine: `ICudaEngine`.
        spec: The graph in the manifest.
    """
    actual = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = "input" if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT else "output"
        dtype = engine.get_tensor_dtype(name).name
        where = "" if engine.get_tensor_location(name) == module.TensorLocation.DEVICE else " on the host"
        actual[name] = (kind, TYPE_NAMES.get(dtype, dtype) + where, tuple(engine.get_tensor_shape(name)))
    expected = {tensor.name: ("input", tensor.dtype, tensor.shape) for tensor in spec.inputs}
    expected |= {tensor.name: ("output", tensor.dtype, tensor.shape) for tensor in spec.outputs}
    problems = [f"{name} is missing" for name in expected.keys() - actual.keys()]
    problems += [f"{name} is not known" for name in actual.keys() - expected.keys()]
    for name in actual.keys() & expected.keys():
        if not _same(actual[name], expected[name]):
            problems.append(f"{name} is {_described(*actual[name])}, expected {_described(*expected[name])}")
    return sorted(problems)


def _same(actual: tuple[str, str, tuple[int, ...]], expected: tuple[str, str, tuple[int | str, ...]]) -> bool:
    """Whether kind, type and shape agree. A named dimension is -1, or has the same size in all profiles."""
    sizes, dimensions = actual[2], expected[2]
    return (actual[:2], len(sizes)) == (expected[:2], len(dimensions)) and all(
        isinstance(dimension, str) or size == dimension for size, dimension in zip(sizes, dimensions, strict=True)
    )


def _described(kind: str, dtype: str, shape: tuple[int | str, ...]) -> str:
    return f"an {kind} of {dtype} {list(shape)}"


def engine_profiles(engine: Any, spec: GraphSpec) -> tuple[ProfileShapes, ...]:
    """The shapes that an engine was built for, profile by profile."""
    profiles: list[ProfileShapes] = []
    for index in range(engine.num_optimization_profiles):
        shapes = {tensor.name: engine.get_tensor_profile_shape(tensor.name, index) for tensor in spec.inputs}
        profiles.append({name: (tuple(low), tuple(usual), tuple(high)) for name, (low, usual, high) in shapes.items()})
    return tuple(profiles)


def uncovered(
    graph: str, spec: GraphSpec, profiles: Sequence[ProfileShapes], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    """The message for shapes that no profile covers, with the command that builds one."""
    request = _named(spec.inputs, shapes)
    covered = []
    for profile in profiles:
        limits = {name: list(zip(low, high, strict=True)) for name, (low, _, high) in profile.items()}
        ranges = _named(spec.inputs, limits).items()
        covered.append(", ".join(f"{name} {low} to {high}" for name, (low, high) in ranges))
    # The default sizes of the other dimensions cover all lengths of a history.
    bucket = ",".join(f"{name}=1:{size}:{size}" for name, size in request.items() if name in ("batch", "candidates"))
    sizes = ", ".join(f"{name} {size}" for name, size in request.items())
    return (
        f"{graph}: no profile of the engine covers {sizes}; they cover {'; or '.join(covered)}. Send less, or compile "
        f"for it as well: unipinrec compile BUNDLE --profile {bucket}"
    )


def _named(inputs: tuple[TensorSpec, ...], shapes: Mapping[str, Sequence[T]]) -> dict[str, T]:
    """Sizes, or ranges of sizes, of the named dimensions."""
    return {
        name: size
        for tensor in inputs
        for name, size in zip(tensor.shape, shapes[tensor.name], strict=True)
        if isinstance(name, str)
    }
