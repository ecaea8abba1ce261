"""ONNX Runtime on the CPU, and what its other backend shares with this one: sessions and tensors."""

from __future__ import annotations

import ctypes
import functools
import logging
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
from unipinrec.runtime.bundle.manifest import REDUCED, Tensor, TensorSpec, check_inputs
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.graphs.backend import host_array, in_type, opened, widened
from unipinrec.runtime.machine import thread_count

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
RIGHT_SINCE = 1, 25
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class OrtTensor:
    """An `OrtValue`, on the host or on another device; see `Tensor`.

    Attributes:
        value: The `OrtValue`.
        owner: What its memory belongs to, kept as long as this is; None = itself.
    """

    value: Any
    owner: Any = None

    @property
    def dtype(self) -> str:
        """See `Tensor.dtype`."""
        return _type_name(self.value.data_type())

    def shape(self) -> list[int]:
        """See `Tensor.shape`."""
        sizes: list[int] = self.value.shape()
        return sizes

    def numpy(self) -> NDArray[Any]:
        """See `Tensor.numpy`."""
        if self.dtype != "bfloat16":
            return widened(self.value.numpy())
        host = np.empty(self.shape(), REDUCED["bfloat16"])  # ONNX Runtime makes no array of this type by itself
        bf16_value(type(self.value), host).update_inplace(self.value)
        return widened(host)


class OrtBackend:
    """The graphs of a bundle in ONNX Runtime on the CPU; see `Backend`. Tensors are `OrtValue`s, never copied.

    The chunks are those of `bench/chunks.py`: scores of 384 x 1,000 fit the cache, and its attention skips no work.
    Candidates need nothing of each other, so the ranker has one thread, and as many runs at once as there are threads:
    no thread waits for others between operators. The retrieval graph is too small for a second thread.
    """

    prefill_chunk: int | None = 384
    rank_chunk: int | None = 384

    def __init__(self, graphs: Mapping[str, GraphFile], threads: int | None = None) -> None:
        """Load graphs.

        Args:
            graphs: Each graph by name.
            threads: Threads of one run; None = what this process may use.

        Raises:
            BackendError: ONNX Runtime is missing, or does not load a graph on the CPU.
        """
        self._ort = import_onnxruntime()
        self.threads = thread_count(threads)
        self.version: str = self._ort.__version__
        log.info("ONNX Runtime %s on the CPU, %d threads", self.version, self.threads)
        self.rank_runs = self.threads
        with flush_denormals():
            self._sessions = {
                name: self._load(graph, 1 if name in ONE_THREAD else self.threads) for name, graph in graphs.items()
            }
        self._inputs = {
            name: [_spec(given) for given in session.get_inputs()] for name, session in self._sessions.items()
        }
        self._outputs = {
            name: [output.name for output in session.get_outputs()] for name, session in self._sessions.items()
        }

    def _load(self, graph: GraphFile, threads: int) -> Any:
        options = session_options(self._ort, threads)
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        return load_session(self._ort, graph, options, PROVIDER)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Tensor]:
        """See `Backend.run`."""
        session = opened(self._sessions, graph)
        check_inputs(graph, self._inputs[graph], inputs)
        try:
            values = {spec.name: ort_value(self._ort, inputs[spec.name], spec.dtype) for spec in self._inputs[graph]}
            with flush_denormals():
                outputs = session.run_with_ort_values(self._outputs[graph], values)
        except Exception as error:  # its exceptions share no base class
            raise BackendError(f"{graph}: ONNX Runtime failed: {error}") from error
        return {name: OrtTensor(value=value) for name, value in zip(self._outputs[graph], outputs, strict=True)}

    def close(self) -> None:
        """See `Backend.close`."""
        self._sessions = {}


def session_options(ort: Any, threads: int) -> Any:
    """Options that fit a process which holds several sessions: no thread of an idle one spins."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def load_session(
    ort: Any, graph: GraphFile, options: Any, provider: str, settings: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """Load a graph on one provider and on no other, from memory: files could change under it.

    Args:
        ort: The onnxruntime module.
        graph: The graph.
        options: Its `SessionOptions`.
        provider: Name of the provider.
        settings: The provider's own options.

    Raises:
        BackendError: ONNX Runtime does not load it, or would run it on another provider, which it does without a word.
    """
    try:
        given = {name: file for name, file in graph.weights.items() if Path(file).stat().st_size}
        weights = [np.memmap(os.fspath(file), np.uint8, "r") for file in given.values()]
        options.add_external_initializers_from_files_in_memory(list(given), weights, list(map(len, weights)))
        session = ort.InferenceSession(
            graph.content, options, providers=[(provider, dict(settings))], enable_fallback=0
        )
    except Exception as error:  # its exceptions share no base class
        raise BackendError(f"{graph.name}: ONNX Runtime {ort.__version__} does not load it: {error}") from error
    running = session.get_providers()[0]
    if running != provider:
        raise BackendError(f"{graph.name}: ONNX Runtime {ort.__version__} would run it on {running}, not on {provider}")
    return session


def ort_value(ort: Any, given: NDArray[Any] | Tensor, dtype: str) -> Any:
    """The `OrtValue` of an earlier run as it is, else one over an array, copied if it is rounded or not contiguous."""
    if isinstance(given, OrtTensor):
        return given.value
    values = in_type(host_array(given), dtype)
    if dtype == "bfloat16":
        return bf16_value(ort.OrtValue, values)
    return ort.OrtValue.ortvalue_from_numpy(values)


def bf16_value(ort_value: Any, array: NDArray[Any]) -> Any:
    """An `OrtValue` over a bf16 array, whose type numpy does not tell ONNX Runtime."""
    return ort_value.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), BFLOAT16)


def _spec(given: Any) -> TensorSpec:
    """A graph input as ONNX Runtime describes it; a dimension without a name or a size is any."""
    shape = tuple("?" if size is None else size for size in given.shape)
    return TensorSpec(name=given.name, dtype=_type_name(given.type), shape=shape)


def _type_name(ort_type: str) -> str:
    """Numpy's name of a type."""
    return TYPES.get(ort_type, ort_type)


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        BackendError: Neither of its wheels is installed, or one that is known to compute these graphs wrongly.
    """
    # Else it looks up its vendor's collector on the network and writes to ~/.cache; its own switch comes too late.
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
            "(before it); install version 1.25 or newer"
        )
    return onnxruntime


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Let the calling thread treat denormal numbers as zero, then put its flags back. No effect off Linux on x86-64.

    Masked attention leaves denormal probabilities that slow the next product by a third. ONNX Runtime's own option
    reaches its pool, the thread that creates the process's first session, and threads started by that one later; a
    request that comes in on any other thread computes its share without.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        yield
        return
    library = _c_library()
    environment = (ctypes.c_uint32 * 8)()
    library.fegetenv(environment)
    before = environment[MXCSR]
    environment[MXCSR] = before | FLUSH_DENORMALS
    library.fesetenv(environment)
    try:
        yield
    finally:
        environment[MXCSR] = before
        library.fesetenv(environment)
