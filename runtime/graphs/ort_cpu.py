"""ONNX Runtime on the CPU, and the sessions and tensors that both of its backends share."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import REDUCED, Tensor, TensorSpec, check_inputs, host_array, in_type, widened
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.graphs.backend import MAX_ROWS, MAX_SLOTS, Graphs
from unipinrec.runtime.machine import LIBC, thread_count

FLUSH_DENORMALS = 0x8040  # MXCSR: flush to zero, denormals are zero
MXCSR = 7  # its word in fenv_t of x86-64 Linux, glibc and musl alike
PROVIDER = "CPUExecutionProvider"
ONE_THREAD = ("retrieval", "ranker")
# Types of the graphs, as numpy names them.
TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
}
BFLOAT16 = 16  # in ONNX
CHUNK = 384
RIGHT_SINCE = 1, 25
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class OrtTensor:
    """An `OrtValue`, on the host or on another device; see `Tensor`.

    Attributes:
        value: The `OrtValue`.
        owner: Object that owns its memory, kept alive by this tensor; None = the value itself.
    """

    value: Any
    owner: Any = None

    @property
    def dtype(self) -> str:
        """See `Tensor.dtype`."""
        ort_type: str = self.value.data_type()
        return TYPES.get(ort_type, ort_type)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Tensor.shape`."""
        return tuple(self.value.shape())

    def numpy(self) -> NDArray[Any]:
        """See `Tensor.numpy`."""
        if self.dtype != "bfloat16":
            return widened(self.value.numpy())
        host = np.empty(self.shape, REDUCED["bfloat16"])  # ONNX Runtime cannot make an array of this type
        bf16_value(type(self.value), host).update_inplace(self.value)
        return widened(host)


class OrtBackend:
    """The graphs of a bundle in ONNX Runtime on the CPU; see `Backend`. Tensors are `OrtValue`s, never copied.

    `bench/chunks.py` measured the chunks: scores of 384 x 1,000 fit the CPU's cache, and attention skips no work.
    Candidates are independent, so each ranker run has one thread, and there are as many runs as threads: no thread
    waits for others between operators. The retrieval graph is too small for a second thread.
    """

    prefill_chunk: int | None = CHUNK
    rank_chunk: int | None = CHUNK

    def __init__(self, graphs: Mapping[str, GraphFile], threads: int | None = None) -> None:
        """Load graphs.

        Args:
            graphs: Each graph by name.
            threads: Threads of one run; None = all that this process may use.

        Raises:
            BackendError: ONNX Runtime is missing, or does not load a graph on the CPU.
        """
        self._ort = import_onnxruntime()
        self.threads = self.rank_runs = thread_count(threads)
        self.version: str = self._ort.__version__
        self._returning = self._ort.RunOptions()
        self._returning.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        log.info("ONNX Runtime %s on the CPU, %d threads", self.version, self.threads)
        with flush_denormals():
            self._sessions = Graphs(
                {name: self._load(graph, 1 if name in ONE_THREAD else self.threads) for name, graph in graphs.items()}
            )
        self._inputs = {name: list(map(_spec, session.get_inputs())) for name, session in self._sessions.items()}
        self._outputs = {name: [out.name for out in session.get_outputs()] for name, session in self._sessions.items()}

    def _load(self, graph: GraphFile, threads: int) -> Any:
        options = session_options(self._ort, threads)
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        options.enable_mem_pattern = False  # it keeps a plan for each new shape, and so larger blocks
        return load_session(self._ort, graph, options, PROVIDER)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Tensor]:
        """See `Backend.run`."""
        session = self._sessions[graph]
        check_inputs(graph, self._inputs[graph], inputs)
        try:
            values = {spec.name: ort_value(self._ort, inputs[spec.name], spec.dtype) for spec in self._inputs[graph]}
            options = self._returning if _is_large(inputs) else None
            with flush_denormals():
                outputs = session.run_with_ort_values(self._outputs[graph], values, options)
        except Exception as error:  # its exceptions share no base class
            raise BackendError(f"{graph}: ONNX Runtime failed: {error}") from error
        return {name: OrtTensor(value=value) for name, value in zip(self._outputs[graph], outputs, strict=True)}

    def close(self) -> None:
        """See `Backend.close`."""
        self._sessions = Graphs()


def _is_large(inputs: Mapping[str, NDArray[Any] | Tensor]) -> bool:
    """Whether a run is larger than those of recommendations, whose memory the next one uses again."""
    shapes = [tensor.shape for tensor in inputs.values()]
    rows, tokens = max((shape[:2] for shape in shapes if len(shape) == 3), key=math.prod, default=(0, 0))
    slots = max((shape[2] for shape in shapes if len(shape) == 4), default=tokens)
    return rows * tokens > MAX_ROWS * CHUNK or rows * tokens * slots > MAX_SLOTS * CHUNK


def session_options(ort: Any, threads: int) -> Any:
    """Options for a process with several sessions: the threads of an idle session do not spin."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def load_session(
    ort: Any, graph: GraphFile, options: Any, provider: str, settings: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """Load a graph on one provider only, from memory: files could change while they are read.

    Args:
        ort: The onnxruntime module.
        graph: The graph.
        options: Its `SessionOptions`.
        provider: Name of the provider.
        settings: The provider's own options.

    Raises:
        BackendError: ONNX Runtime does not load it, or would silently run it on another provider.
    """
    try:
        files = {name: file for name, file in graph.weights.items() if Path(file).stat().st_size}
        weights = [np.memmap(os.fspath(file), np.uint8, "r") for file in files.values()]
        options.add_external_initializers_from_files_in_memory(list(files), weights, list(map(len, weights)))
        session = ort.InferenceSession(graph.content, options, [(provider, dict(settings))], enable_fallback=0)
    except Exception as error:  # its exceptions share no base class
        raise BackendError(f"{graph.name}: ONNX Runtime {ort.__version__} does not load it: {error}") from error
    running = session.get_providers()[0]
    if running != provider:
        raise BackendError(f"{graph.name}: ONNX Runtime {ort.__version__} would run it on {running}, not on {provider}")
    return session


def ort_value(ort: Any, tensor: NDArray[Any] | Tensor, dtype: str) -> Any:
    """The `OrtValue` of an earlier run unchanged, or a new one over an array, see `in_type`."""
    if isinstance(tensor, OrtTensor):
        return tensor.value
    values = in_type(host_array(tensor), dtype)
    if dtype == "bfloat16":
        return bf16_value(ort.OrtValue, values)
    return ort.OrtValue.ortvalue_from_numpy(values)


def bf16_value(ort_value: Any, array: NDArray[Any]) -> Any:
    """An `OrtValue` over a bf16 array; ONNX Runtime does not recognise numpy's type."""
    return ort_value.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), BFLOAT16)


def _spec(tensor: Any) -> TensorSpec:
    """Spec of a graph input of ONNX Runtime; a dimension without a name or a size may have any size."""
    shape = tuple("?" if size is None else size for size in tensor.shape)
    return TensorSpec(name=tensor.name, dtype=TYPES.get(tensor.type, tensor.type), shape=shape)


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        BackendError: Neither of its wheels is installed, or a version that computes these graphs wrongly.
    """
    # Else it contacts its vendor's collector on the network and writes to ~/.cache; its own switch comes too late.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime  # noqa: PLC0415 - an extra; the only place that knows it
    except ImportError as error:
        raise BackendError(
            "ONNX Runtime is not installed; run pip install 'unipinrec[cpu]', or 'unipinrec[gpu]' on a machine with an "
            "NVIDIA GPU, but never both: the two overwrite each other"
        ) from error
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < RIGHT_SINCE:
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} computes these graphs wrongly (1.24) or does not know their opset "
            "(older versions); install version 1.25 or newer"
        )
    return onnxruntime


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Treat denormal numbers as zero in the calling thread, then restore its flags. Only on Linux on x86-64.

    Masked attention leaves denormal probabilities, which slow the next product by a third. ONNX Runtime's own option
    covers its thread pool, the thread that creates the process's first session, and later threads of that thread. It
    does not cover other threads that call `run`.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        yield
        return
    environment = (ctypes.c_uint32 * 8)()
    LIBC.fegetenv(environment)
    before = environment[MXCSR]
    environment[MXCSR] = before | FLUSH_DENORMALS
    LIBC.fesetenv(environment)
    try:
        yield
    finally:
        environment[MXCSR] = before
        LIBC.fesetenv(environment)
