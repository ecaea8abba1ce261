"""NVIDIA's Python bindings of CUDA, wrapped here and nowhere else.

Device memory comes from the device's stream-ordered pool, which keeps freed memory: the next run takes it from there in
a microsecond. A stream is a plain integer, as in TensorRT's API; 0 is the default stream.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
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
        name: The vendor's name.
        architecture: Such as "sm_90".
        driver_version: Newest CUDA that the driver knows, such as "13.0".
        memory_bytes: Its total memory.
    """

    name: str
    architecture: str
    driver_version: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PinnedBuffer:
    """Host memory that the GPU reads and writes directly. Do not use `view` after the memory is freed.

    Attributes:
        address: Its first byte.
        view: Its bytes.
    """

    address: int
    view: NDArray[np.uint8]


class Cuda:
    """One GPU; thread-safe. The caller gives back all memory and streams.

    Attributes:
        device: Its number.
        info: Its description.
    """

    def __init__(self, bindings: Any, device: int = 0) -> None:
        """Use a GPU through imported bindings; see `open`.

        Args:
            bindings: The package `cuda.bindings`, with `runtime` and `driver`.
            device: Number of the GPU.

        Raises:
            BackendError: There is no such GPU, or it has no memory pools.
        """
        self._runtime, self.device = bindings.runtime, device
        self._call = functools.partial(_call, bindings.runtime)
        self._lock = threading.RLock()  # the garbage collector may free memory inside of any call
        self._streams: set[int] = set()
        self._pinned: set[int] = set()  # addresses
        self._closed = False
        self.info = describe(bindings, device)
        self.activate()
        # A pool of its own: other libraries of the process set and trim the device's default one.
        properties = self._runtime.cudaMemPoolProps()
        properties.allocType = self._runtime.cudaMemAllocationType.cudaMemAllocationTypePinned
        properties.location.type = self._runtime.cudaMemLocationType.cudaMemLocationTypeDevice
        properties.location.id = device
        self._pool = self._call(f"make a memory pool on GPU {device}", "cudaMemPoolCreate", properties)
        threshold = self._runtime.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
        keep_all = bindings.driver.cuuint64_t(KEEP_ALL)
        try:
            self._call("keep freed memory", "cudaMemPoolSetAttribute", self._pool, threshold, keep_all)
        except BackendError:
            self._call("give memory back", "cudaMemPoolDestroy", self._pool)
            raise

    @classmethod
    def open(cls, device: int = 0) -> Cuda:
        """Use a GPU of this machine.

        Raises:
            BackendError: There is no driver, no such GPU, or the bindings are not installed; says what to do.
        """
        return cls(import_cuda(), device)

    def activate(self) -> None:
        """Make this the calling thread's GPU, which TensorRT works on."""
        self._call(f"use GPU {self.device}", "cudaSetDevice", self.device)

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes. The pool's memory counts as used."""
        self.activate()
        free, total = self._call("ask for free memory", "cudaMemGetInfo")
        return int(free), int(total)

    def malloc(self, nbytes: int, stream: int) -> int:
        """Address of new memory, aligned to 256 bytes or more, for later work on `stream`.

        Raises:
            BackendError: There is not enough; says how much is free.
        """
        self._require_open()
        return int(
            self._call(f"allocate {nbytes:,} bytes on the GPU", "cudaMallocFromPoolAsync", nbytes, self._pool, stream)
        )

    def free(self, pointer: int, stream: int) -> None:
        """Free memory after the present work on `stream`, or on the default stream if `stream` is destroyed.

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
            self._pinned.add(address)
        view = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        return PinnedBuffer(address=address, view=view)

    def host_free(self, buffer: PinnedBuffer) -> None:
        """Free pinned memory unless it is freed already; no copy may be under way."""
        with self._lock:
            if buffer.address in self._pinned:
                self._pinned.discard(buffer.address)
                self._call("free pinned memory", "cudaFreeHost", buffer.address)

    def copy_in(self, pointer: int, address: int, nbytes: int, stream: int) -> None:
        """Copy pinned host memory to the GPU. Do not write to it before `stream` is synchronised."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(f"copy {nbytes:,} bytes to the GPU", "cudaMemcpyAsync", pointer, address, nbytes, kind, stream)

    def copy_out(self, address: int, pointer: int, nbytes: int, stream: int) -> None:
        """Copy memory of the GPU to pinned host memory. Do not read it before `stream` is synchronised."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(f"copy {nbytes:,} bytes from the GPU", "cudaMemcpyAsync", address, pointer, nbytes, kind, stream)

    def stream(self) -> int:
        """A new stream that waits for no other."""
        self._require_open()
        self.activate()
        flags = self._runtime.cudaStreamNonBlocking
        stream = int(self._call("make a stream", "cudaStreamCreateWithFlags", flags))
        with self._lock:
            self._streams.add(stream)
        return stream

    def synchronize(self, stream: int) -> None:
        """Wait for all work on a stream.

        Raises:
            BackendError: Some of the work failed.
        """
        self._call("wait for the GPU", "cudaStreamSynchronize", stream)

    def destroy(self, stream: int) -> None:
        """Destroy a stream unless it is destroyed already."""
        with self._lock:
            if stream in self._streams:
                self._streams.discard(stream)
                self._call("destroy a stream", "cudaStreamDestroy", stream)

    def close(self) -> None:
        """Destroy all streams, free all pinned memory, and give the pool up; may be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.activate()
            for stream in tuple(self._streams):
                self.destroy(stream)
            while self._pinned:
                self._call("free pinned memory", "cudaFreeHost", self._pinned.pop())
            self._call("give memory back", "cudaMemPoolDestroy", self._pool)

    def __enter__(self) -> Cuda:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise BackendError(f"GPU {self.device} was closed; open it again")


def probe_gpu(device: int = 0) -> GpuInfo | str:
    """A GPU of this machine, or why it cannot be used. Uses none of its memory, and never raises."""
    try:
        return describe(import_cuda(), device)
    except Exception as error:  # a broken installation may raise anything
        return str(error)


def describe(bindings: Any, device: int) -> GpuInfo:
    """Describe a GPU without using its memory.

    Raises:
        BackendError: There is no such GPU.
    """
    runtime = bindings.runtime
    properties = _call(runtime, f"look at GPU {device}", "cudaGetDeviceProperties", device)
    version = int(_call(runtime, "ask for the driver's version", "cudaDriverGetVersion"))
    return GpuInfo(
        name=properties.name.decode().strip("\0"),
        architecture=f"sm_{properties.major}{properties.minor}",
        driver_version=f"{version // 1000}.{version % 1000 // 10}",
        memory_bytes=int(properties.totalGlobalMem),
    )


def import_cuda() -> Any:
    """The package `cuda.bindings`, with `runtime` and `driver`.

    Raises:
        BackendError: The driver or the bindings are missing, or the driver does not start.
    """
    if problem := driver_problem():
        raise BackendError(problem)
    try:
        import cuda.bindings.driver  # noqa: PLC0415 - an extra, imported here alone
        import cuda.bindings.runtime  # noqa: PLC0415
    except ImportError as error:
        raise BackendError(f"cuda-bindings is not installed ({error}); run pip install 'unipinrec[gpu]'") from error
    return cuda.bindings


def _call(runtime: Any, task: str, function: str, *arguments: Any) -> Any:
    """Call a function of the runtime and check its error code; returns its value or values.

    Raises:
        BackendError: It failed; names the task.
    """
    try:
        error, *values = getattr(runtime, function)(*arguments)
    except Exception as problem:  # its exceptions share no base class
        raise BackendError(f"could not {task}: {function} failed: {problem}; {RESTART}") from problem
    if error != runtime.cudaError_t.cudaSuccess:
        raise BackendError(f"could not {task}: {_explain(runtime, error)}")
    return values[0] if len(values) == 1 else tuple(values)


def _explain(runtime: Any, error: Any) -> str:
    """CUDA's name and text of an error, the free memory if that ran out, and what to do."""
    name, text = runtime.cudaGetErrorName(error)[1].decode(), runtime.cudaGetErrorString(error)[1].decode()
    free = ""
    if name == "cudaErrorMemoryAllocation":
        failed, *memory = runtime.cudaMemGetInfo()
        if failed == runtime.cudaError_t.cudaSuccess:
            free = f", {memory[0]:,} of {memory[1]:,} bytes are free"
    return f"{name} ({text}){free}; {REMEDIES.get(name, RESTART)}"


@contextlib.contextmanager
def suppressed(consequence: str) -> Iterator[None]:
    """Log failures of a clean-up, which must not hide the error before it."""
    try:
        yield
    except BackendError as error:
        log.warning("%s: %s", consequence, error)
