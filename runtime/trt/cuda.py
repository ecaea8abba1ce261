"""NVIDIA's Python bindings of CUDA, wrapped here and nowhere else.

Device memory comes from the device's own stream-ordered pool, which is told to keep what is freed: the next run takes
it from there in a microsecond. A stream is a plain integer, as TensorRT wants it; 0 is the default stream.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.machine import CHECK_DRIVER, driver_problem

KEEP_ALL = 2**64 - 1
REMEDIES = {
    "cudaErrorNoDevice": f"{CHECK_DRIVER}, and CUDA_VISIBLE_DEVICES",
    "cudaErrorInvalidDevice": f"{CHECK_DRIVER}, and CUDA_VISIBLE_DEVICES",
    "cudaErrorInsufficientDriver": "install a newer NVIDIA driver",
    "cudaErrorMemoryAllocation": "end other processes on the GPU, send smaller batches, or compile for smaller ones",
    "cudaErrorNotSupported": "this GPU, or its virtualisation, has no memory pools; use device cuda or cpu",
}
RESTART = "a GPU that failed once keeps failing in this process: start it again, and see dmesg if it comes back"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GpuInfo:
    """A GPU.

    Attributes:
        name: As its vendor calls it.
        architecture: As "sm_90".
        driver_version: Newest CUDA that the driver knows, as "13.0".
        memory_bytes: All of its memory.
    """

    name: str
    architecture: str
    driver_version: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PinnedBuffer:
    """Host memory that the GPU copies from and to by itself. `view` is not to be used once it is freed.

    Attributes:
        address: Where it starts.
        view: Its bytes.
    """

    address: int
    view: NDArray[np.uint8]

    def __len__(self) -> int:
        """Size in bytes."""
        return len(self.view)


class Cuda:
    """One GPU; safe to call from several threads. All memory and streams that it gave out are to be given back.

    Attributes:
        device: Its number.
        info: What it is.
    """

    def __init__(self, bindings: Any, device: int = 0) -> None:
        """Use a GPU through bindings that are already there; see `open`.

        Args:
            bindings: The package `cuda.bindings`, with `runtime` and `driver`.
            device: Number of the GPU.

        Raises:
            BackendError: There is no such GPU, or it has no memory pools.
        """
        self._runtime, self.device = bindings.runtime, device
        self._lock = threading.RLock()  # memory may be freed by the garbage collector, inside of any call
        self._streams: set[int] = set()
        self._pinned: dict[int, int] = {}  # address: size
        self._closed = False
        self.info = describe(bindings, device)
        self.activate()
        self._pool = self._call(f"take memory of GPU {device}", "cudaDeviceGetDefaultMemPool", device)
        self._call(
            "keep freed memory",
            "cudaMemPoolSetAttribute",
            self._pool,
            self._runtime.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold,
            bindings.driver.cuuint64_t(KEEP_ALL),
        )

    @classmethod
    def open(cls, device: int = 0) -> Cuda:
        """Use a GPU of this machine.

        Raises:
            BackendError: There is no driver, no such GPU, or the bindings are not installed; says what to do.
        """
        return cls(import_cuda(), device)

    @property
    def name(self) -> str:
        """As its vendor calls it."""
        return self.info.name

    @property
    def architecture(self) -> str:
        """As "sm_90"."""
        return self.info.architecture

    @property
    def driver_version(self) -> str:
        """Newest CUDA that the driver knows, as "13.0"."""
        return self.info.driver_version

    def activate(self) -> None:
        """Make this the calling thread's GPU: TensorRT works on whichever that is."""
        self._call(f"use GPU {self.device}", "cudaSetDevice", self.device)

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes. What the pool keeps counts as used."""
        self.activate()
        free, total = self._call("ask for free memory", "cudaMemGetInfo")
        return int(free), int(total)

    def malloc(self, nbytes: int, stream: int) -> int:
        """Address of new memory, aligned to 256 bytes or more, for what is put on `stream` from now on.

        Raises:
            BackendError: There is not enough; says how much is free.
        """
        self._require_open()
        return int(self._call(f"allocate {nbytes:,} bytes on the GPU", "cudaMallocAsync", nbytes, stream))

    def free(self, pointer: int, stream: int) -> None:
        """Free memory once what is on `stream` now is done; on the default stream if that one is destroyed.

        Works after `close` too.
        """
        with self._lock:
            self.activate()
            self._call("free memory of the GPU", "cudaFreeAsync", pointer, stream if stream in self._streams else 0)

    def host_alloc(self, nbytes: int) -> PinnedBuffer:
        """New pinned host memory, not cleared."""
        self._require_open()
        self.activate()
        flags = self._runtime.cudaHostAllocDefault
        address = int(self._call(f"pin {nbytes:,} bytes of host memory", "cudaHostAlloc", nbytes, flags))
        with self._lock:
            self._pinned[address] = nbytes
        view = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        return PinnedBuffer(address=address, view=view)

    def host_free(self, buffer: PinnedBuffer) -> None:
        """Free pinned memory, which nothing may be copying from or to any more. Once it is freed, nothing happens."""
        with self._lock:
            if self._pinned.pop(buffer.address, None) is not None:
                self._call("free pinned memory", "cudaFreeHost", buffer.address)

    def copy_in(self, pointer: int, address: int, nbytes: int, stream: int) -> None:
        """Copy pinned host memory to the GPU. It is not to be written to until `stream` is synchronised."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(f"copy {nbytes:,} bytes to the GPU", "cudaMemcpyAsync", pointer, address, nbytes, kind, stream)

    def copy_out(self, address: int, pointer: int, nbytes: int, stream: int) -> None:
        """Copy memory of the GPU to pinned host memory. It is not to be read until `stream` is synchronised."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(f"copy {nbytes:,} bytes from the GPU", "cudaMemcpyAsync", address, pointer, nbytes, kind, stream)

    def stream(self) -> int:
        """A new stream, which waits for no other."""
        self._require_open()
        self.activate()
        flags = self._runtime.cudaStreamNonBlocking
        stream = int(self._call("make a stream", "cudaStreamCreateWithFlags", flags))
        with self._lock:
            self._streams.add(stream)
        return stream

    def synchronize(self, stream: int) -> None:
        """Wait until all that is on a stream is done.

        Raises:
            BackendError: Some of it failed.
        """
        self._call("wait for the GPU", "cudaStreamSynchronize", stream)

    def destroy(self, stream: int) -> None:
        """Destroy a stream. Once it is destroyed, nothing happens."""
        with self._lock:
            if stream in self._streams:
                self._streams.discard(stream)
                self._call("destroy a stream", "cudaStreamDestroy", stream)

    def close(self) -> None:
        """Destroy all streams, free all pinned memory, and give the pool's free memory back; may be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.activate()
            for stream in tuple(self._streams):
                self.destroy(stream)
            for address in tuple(self._pinned):
                self._pinned.pop(address)
                self._call("free pinned memory", "cudaFreeHost", address)
            self._call("give memory back", "cudaMemPoolTrimTo", self._pool, 0)

    def __enter__(self) -> Cuda:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise BackendError(f"GPU {self.device} was closed; open it again")

    def _call(self, what: str, function: str, *arguments: Any) -> Any:
        return _call(self._runtime, what, function, *arguments)


def probe_gpu(device: int = 0) -> GpuInfo | str:
    """A GPU of this machine, or why there is none. Uses none of its memory, and never raises."""
    try:
        return describe(import_cuda(), device)
    except Exception as error:  # whatever a broken installation comes up with is the answer
        return str(error)


def describe(bindings: Any, device: int) -> GpuInfo:
    """What a GPU is, without using its memory.

    Raises:
        BackendError: There is no such GPU.
    """
    runtime = bindings.runtime
    found = _call(runtime, f"look at GPU {device}", "cudaGetDeviceProperties", device)
    version = int(_call(runtime, "ask for the driver's version", "cudaDriverGetVersion"))
    return GpuInfo(
        name=found.name.decode().strip("\0"),
        architecture=f"sm_{found.major}{found.minor}",
        driver_version=f"{version // 1000}.{version % 1000 // 10}",
        memory_bytes=int(found.totalGlobalMem),
    )


def import_cuda() -> Any:
    """The package `cuda.bindings`, with `runtime` and `driver`.

    Raises:
        BackendError: The driver or the bindings are missing, or the driver does not start.
    """
    problem = driver_problem()
    if problem is not None:
        raise BackendError(problem)
    try:
        import cuda.bindings.driver  # noqa: PLC0415 - an extra; the only place that knows it
        import cuda.bindings.runtime  # noqa: PLC0415
    except ImportError as error:
        raise BackendError(f"cuda-bindings is not installed ({error}); run pip install 'unipinrec[gpu]'") from error
    return cuda.bindings


def _call(runtime: Any, what: str, function: str, *arguments: Any) -> Any:
    """What a function of the runtime returns behind its error code: nothing, a value, or several."""
    try:
        error, *values = getattr(runtime, function)(*arguments)
    except Exception as problem:  # its exceptions share no base class
        raise BackendError(f"could not {what}: {function} failed: {problem}; {RESTART}") from problem
    if error != runtime.cudaError_t.cudaSuccess:
        raise BackendError(f"could not {what}: {_explain(runtime, error)}")
    return values[0] if len(values) == 1 else tuple(values)


def _explain(runtime: Any, error: Any) -> str:
    """CUDA's own name and text of an error, how much memory is free if that was it, and what to do."""
    name, text = (runtime.cudaGetErrorName(error)[1].decode(), runtime.cudaGetErrorString(error)[1].decode())
    free = ""
    if name == "cudaErrorMemoryAllocation":
        failed, *memory = runtime.cudaMemGetInfo()
        if failed == runtime.cudaError_t.cudaSuccess:
            free = f", {memory[0]:,} of {memory[1]:,} bytes are free"
    return f"{name} ({text}){free}; {REMEDIES.get(name, RESTART)}"


@contextlib.contextmanager
def suppressed(what: str) -> Iterator[None]:
    """Log failures of a clean-up, which must not hide what went wrong before it."""
    try:
        yield
    except BackendError as error:
        log.warning("%s: %s", what, error)
