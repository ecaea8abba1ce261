"""TensorRT engines, run through the API that TensorRT 10.16, TensorRT 11 and TensorRT-RTX share.

A plan is executable code: only plans that were verified may be given to it (`runtime/engine_store.py`). Each
optimisation profile of an engine has an execution context, a stream, staging memory and a lock of its own, so that runs
in different profiles overlap. A run ends with the GPU done: its outputs are ready for any other stream, and what went
wrong belongs to it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.cuda import Cuda, suppressed
from unipinrec.runtime.device_memory import Block, DeviceTensor, Reader, Staging, layout, size_bytes
from unipinrec.runtime.manifest import GraphSpec
from unipinrec.runtime.profiles import ProfileShapes, covering
from unipinrec.runtime.session import Tensor
from unipinrec.runtime.tensorrt_api import LogLines, TensorRT, tensorrt_logger
from unipinrec.runtime.tensorrt_io import differences, engine_profiles, uncovered
from unipinrec.runtime.tensors import check_inputs, host_array, opened

Shapes = dict[str, tuple[int, ...]]
Given = Mapping[str, NDArray[Any] | Tensor]
log = logging.getLogger(__name__)


class TensorRtBackend:
    """The graphs of a bundle as TensorRT engines on one GPU; see `Backend`.

    Outputs stay in the GPU's memory, and a later run reads them where they lie. All inputs from the host go there in
    one copy.
    """

    prefill_chunk: int | None = None
    rank_chunk: int | None = None
    rank_runs: int = 1

    def __init__(
        self,
        trt: TensorRT,
        cuda: Cuda,
        engines: Mapping[str, bytes],
        specs: Mapping[str, GraphSpec],
        precision: str,
        kernels: Mapping[str, bytes] | None = None,
    ) -> None:
        """Load engines.

        Args:
            trt: What to load them with.
            cuda: The GPU. It stays open when the backend is closed.
            engines: Verified plans, by graph.
            specs: What the manifest says of the graphs.
            precision: What the graphs compute in.
            kernels: What `compiled_kernels` gave in an earlier process on this machine.

        Raises:
            BackendError: An engine does not load, or is not one of its graph; nothing is left in memory.
        """
        self.trt, self.cuda, self.precision = trt, cuda, precision
        self._specs = specs
        self._graphs: dict[str, _Graph] = {}
        self._reader = Reader(cuda)
        lines = LogLines()
        self._release = weakref.finalize(self, _release, self._graphs, self._reader, cuda)
        try:
            cuda.activate()
            runtime = trt.module.Runtime(tensorrt_logger(trt.module, lines))
            for name, plan in engines.items():
                loader = _Loader(trt, cuda, name, lines)
                self._graphs[name] = loader.load(runtime, plan, specs[name], (kernels or {}).get(name))
        except BaseException:
            self.close()
            raise
        log.info("%s on %s, %s: %s", trt, cuda.name, precision, ", ".join(self._graphs))

    def run(self, graph: str, inputs: Given) -> dict[str, Tensor]:
        """See `Backend.run`. Runs in one profile are made one after the other."""
        spec = self._specs[graph]
        check_inputs(graph, spec.inputs, inputs)
        loaded = opened(self._graphs, graph)
        shapes = {name: tuple(_shape(given)) for name, given in inputs.items()}
        place = covering(loaded.profiles, shapes)
        if place is None:
            raise BackendError(uncovered(graph, spec, loaded.profiles, shapes))
        self.cuda.activate()
        return loaded.lanes[place].run(inputs, shapes, self._reader)

    def compiled_kernels(self) -> dict[str, bytes]:
        """What TensorRT-RTX compiled for this GPU when it loaded and ran the engines, by graph; it spares the next
        process that work. Executable code, like a plan. Empty for TensorRT proper, whose plans hold their kernels.
        """
        return {name: bytes(graph.cache.serialize()) for name, graph in self._graphs.items() if graph.cache is not None}

    def close(self) -> None:
        """Wait for running runs and release everything but the tensors that are still held; may be called again."""
        self._release()

    def __enter__(self) -> TensorRtBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Graph:
    """A loaded engine.

    Attributes:
        profiles: Shapes of each optimisation profile, as the engine tells them.
        lanes: What runs in each.
        engine: `ICudaEngine`.
        cache: `IRuntimeCache` of TensorRT-RTX.
    """

    profiles: tuple[ProfileShapes, ...]
    lanes: tuple[_Lane, ...]
    engine: Any
    cache: Any | None


def _release(graphs: dict[str, _Graph], reader: Reader, cuda: Cuda) -> None:
    """Release contexts before their engines."""
    with suppressed("memory of the GPU may be lost"):
        cuda.activate()
    while graphs:
        _, graph = graphs.popitem()
        for lane in graph.lanes:
            lane.release()
    reader.release()


class _Loader:
    """Loads the engine of one graph."""

    def __init__(self, trt: TensorRT, cuda: Cuda, graph: str, lines: LogLines) -> None:
        self._trt, self._cuda, self._graph, self._lines = trt, cuda, graph, lines

    def load(self, runtime: Any, plan: bytes, spec: GraphSpec, kernels: bytes | None) -> _Graph:
        try:
            engine = runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise self._failed("does not load the engine")
            problems = differences(self._trt.module, engine, spec)
            if problems:
                raise self._failed("loads an engine of another graph", "; ".join(problems))
            return self._with_lanes(engine, spec, kernels)
        except BackendError:
            raise
        except Exception as error:  # its exceptions share no base class
            raise self._failed("does not load the engine", str(error)) from error

    def _with_lanes(self, engine: Any, spec: GraphSpec, kernels: bytes | None) -> _Graph:
        how, cache = self._context_options(engine, kernels)
        lanes: list[_Lane] = []
        try:
            for place in range(engine.num_optimization_profiles):
                lanes.append(self._lane(engine, how, place, spec))
        except BaseException:
            for lane in lanes:
                lane.release()
            raise
        return _Graph(profiles=engine_profiles(engine, spec), lanes=tuple(lanes), engine=engine, cache=cache)

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
        config.set_runtime_cache(cache)
        return config, cache

    def _lane(self, engine: Any, how: Any, place: int, spec: GraphSpec) -> _Lane:
        stream = self._cuda.stream()
        try:
            context = engine.create_execution_context(how)
            if context is None or not context.set_optimization_profile_async(place, stream):
                free, total = self._cuda.memory_info()
                raise self._failed(f"makes no context for profile {place}, {free:,} of {total:,} bytes are free")
            self._cuda.synchronize(stream)
        except BaseException:
            with suppressed("a stream may be lost"):
                self._cuda.destroy(stream)
            raise
        return _Lane(self._graph, spec, context, self._cuda, stream, self._lines)

    def _failed(self, what: str, reason: str | None = None) -> BackendError:
        return BackendError(
            f"{self._graph}: {self._trt} {what}: {reason or self._lines.reason()}; if it was compiled for another "
            "bundle, on another machine or by another version, run unipinrec compile BUNDLE here"
        )


class _Lane:
    """One optimisation profile: an execution context with a stream and staging memory, for one run at a time."""

    def __init__(self, graph: str, spec: GraphSpec, context: Any, cuda: Cuda, stream: int, lines: LogLines) -> None:
        self._graph, self._cuda, self._stream, self._lines = graph, cuda, stream, lines
        self._inputs = {tensor.name: tensor.dtype for tensor in spec.inputs}
        self._outputs = {tensor.name: tensor.dtype for tensor in spec.outputs}
        self._context: Any | None = context
        self._staging = Staging(cuda, stream)
        self._shapes: Shapes = {}  # of the inputs as the context has them now
        self._sizes: Shapes = {}  # of the outputs that follow
        self._lock = threading.Lock()

    def run(self, inputs: Given, shapes: Shapes, reader: Reader) -> dict[str, Tensor]:
        with self._lock:
            context = self._context
            if context is None:
                raise BackendError(f"{self._graph}: the graphs were closed; load the bundle again")
            try:
                return self._execute(context, inputs, shapes, reader)
            except BaseException as error:
                self._shapes = {}
                # What is under way still reads inputs that may be freed, or overwritten, from here on.
                with suppressed(f"{self._graph}: after a failure"):
                    self._cuda.synchronize(self._stream)
                if isinstance(error, Exception) and not isinstance(error, BackendError):
                    raise BackendError(f"{self._graph}: TensorRT failed: {error}{self._reason()}") from error
                raise

    def _execute(self, context: Any, inputs: Given, shapes: Shapes, reader: Reader) -> dict[str, Tensor]:
        if shapes != self._shapes:
            self._sizes = self._set_shapes(context, shapes)
            self._shapes = shapes
        addresses = self._addresses(inputs)
        places, total = layout(size_bytes(self._outputs[name], shape) for name, shape in self._sizes.items())
        block = Block(self._cuda, total, self._stream)
        outputs = {name: block.address + place for name, place in zip(self._sizes, places, strict=True)}
        try:
            for name, address in (addresses | outputs).items():
                self._require(context.set_tensor_address(name, address), f"takes no address for {name}")
            self._require(context.execute_async_v3(self._stream), "does not run")
            self._cuda.synchronize(self._stream)
        except BaseException:
            block.free()  # now, not when whoever handles the error lets go of it
            raise
        return {
            name: DeviceTensor(
                dtype=self._outputs[name], sizes=self._sizes[name], address=address, block=block, reader=reader
            )
            for name, address in outputs.items()
        }

    def _set_shapes(self, context: Any, shapes: Shapes) -> Shapes:
        """Set the shapes of all inputs; those of the outputs."""
        for name, shape in shapes.items():
            self._require(context.set_input_shape(name, shape), f"takes no {list(shape)} for {name}")
        unknown = context.infer_shapes()
        self._require(not unknown, f"cannot tell the shapes of {', '.join(unknown)}")
        sizes = {name: tuple(context.get_tensor_shape(name)) for name in self._outputs}
        unknown = [name for name, shape in sizes.items() if any(size < 1 for size in shape)]
        self._require(not unknown, f"cannot tell the shapes of {', '.join(unknown)}")
        return sizes

    def _addresses(self, inputs: Given) -> dict[str, int]:
        """Where each input lies on the GPU; those from elsewhere are copied there."""
        there, elsewhere = {}, {}
        for name, given in inputs.items():
            if isinstance(given, DeviceTensor) and given.lies_on(self._cuda) and given.dtype == self._inputs[name]:
                there[name] = given.address
            else:
                elsewhere[name] = host_array(given)
        return there | self._staging.put(elsewhere, self._inputs)

    def _require(self, done: bool, problem: str) -> None:
        if not done:
            raise BackendError(f"{self._graph}: TensorRT {problem}{self._reason()}")

    def _reason(self) -> str:
        """What TensorRT had to say, for a message."""
        reason = f": {self._lines.reason()}" if self._lines.errors else ""
        self._lines.errors.clear()
        return reason

    def release(self) -> None:
        """Release everything, once a run that is under way is over; may be called again."""
        with self._lock:
            context, self._context = self._context, None
            del context  # it uses the stream until it is gone
            self._staging.release()
            with suppressed(f"{self._graph}: a stream may be lost"):
                self._cuda.destroy(self._stream)


def _shape(given: NDArray[Any] | Tensor) -> tuple[int, ...]:
    return given.shape if isinstance(given, np.ndarray) else tuple(given.shape())
