"""CUDA without a GPU: the part of `cuda.bindings.runtime` that `runtime/trt/cuda.py` uses, over the host's memory.

Stricter than a GPU. What is put on a stream happens when the stream is synchronised and no sooner, so that whoever
reads too early, or writes to what has yet to be copied, gets nonsense. Every address is looked up in what is allocated,
new memory is full of ones (NaN in every floating-point type), and all streams and memory are counted. What a GPU would
answer with silence or a crash is kept in `faults`.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.runtime.trt.cuda import Cuda

DEVICE = 1  # not the one that a thread has from the start, so that forgetting to choose it shows
ALIGNMENT = 256
CLEANING = {"cudaFreeAsync", "cudaFreeHost", "cudaStreamDestroy", "cudaMemPoolDestroy"}


class CudaError(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719


class MemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class MemAllocationType(IntEnum):
    cudaMemAllocationTypePinned = 1


class MemLocationType(IntEnum):
    cudaMemLocationTypeDevice = 1


class MemPoolAttr(IntEnum):
    cudaMemPoolAttrReleaseThreshold = 4


TEXTS = {
    CudaError.cudaErrorInvalidValue: b"invalid argument",
    CudaError.cudaErrorMemoryAllocation: b"out of memory",
    CudaError.cudaErrorInvalidDevice: b"invalid device ordinal",
    CudaError.cudaErrorInvalidResourceHandle: b"invalid resource handle",
    CudaError.cudaErrorIllegalAddress: b"an illegal memory access was encountered",
    CudaError.cudaErrorLaunchFailure: b"unspecified launch failure",
}
OK = CudaError.cudaSuccess


class Injected(Exception):
    """A call that was told to fail."""


class FailOnce:
    """Lets the call behind `before` others fail."""

    def __init__(self, before: int, error: CudaError) -> None:
        self._left, self._error = before, error

    def __call__(self, name: str) -> CudaError | None:
        self._left -= 1
        return self._error if self._left == -1 else None


class HostRuntime:
    """See the module.

    Attributes:
        total: Bytes of the device.
        blocks: The device's memory by address, what is freed but not yet out of its stream included.
        pinned: Pinned host memory by address.
        streams: What is to happen, by stream.
        calls: How often each function was called.
        log: The names of the functions that were called, in order.
        faults: What went wrong without an error code.
        fail: Asked before each call whether it is to fail, by the function's name.
    """

    cudaError_t = CudaError
    cudaMemcpyKind = MemcpyKind
    cudaMemPoolAttr = MemPoolAttr
    cudaMemAllocationType = MemAllocationType
    cudaMemLocationType = MemLocationType
    cudaHostAllocDefault = 0
    cudaStreamNonBlocking = 1

    def __init__(self, total: int = 1 << 30) -> None:
        self.total = total
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self.pinned: dict[int, NDArray[np.uint8]] = {}
        self.streams: dict[int, deque[Callable[[], None]]] = {}
        self.calls: Counter[str] = Counter()
        self.log: list[str] = []
        self.faults: list[str] = []
        self.fail: Callable[[str], CudaError | None] = lambda name: None
        self._freed: set[int] = set()
        self._quarantine: deque[NDArray[np.uint8]] = deque(maxlen=128)  # an address that was freed is not soon reused
        self._thread = threading.local()
        self._lock = threading.RLock()
        self._next_stream = 0x1000
        self.pools: set[int] = set()

    # What CUDA has.

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        failed = self._enter("cudaGetDeviceProperties")
        if failed or not 0 <= device <= DEVICE:
            return (failed or CudaError.cudaErrorInvalidDevice, None)
        return OK, SimpleNamespace(name=b"Host GPU\0", major=9, minor=0, totalGlobalMem=self.total)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return self._enter("cudaDriverGetVersion") or OK, 13000

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        failed = self._enter("cudaSetDevice")
        if not failed:
            self._thread.device = device
        return (failed or OK,)

    @staticmethod
    def cudaMemPoolProps() -> SimpleNamespace:
        return SimpleNamespace(allocType=0, location=SimpleNamespace(type=0, id=0))

    def cudaMemPoolCreate(self, poolProps: SimpleNamespace) -> tuple[Any, ...]:
        self._check((poolProps.allocType, poolProps.location.type) == (1, 1), f"{poolProps} is not memory of a device")
        failed = self._enter("cudaMemPoolCreate")
        if failed:
            return failed, None
        with self._lock:
            self.pools.add(0xF000 + self.calls["cudaMemPoolCreate"])
            return OK, 0xF000 + self.calls["cudaMemPoolCreate"]

    def cudaMemPoolSetAttribute(self, memPool: int, attr: int, value: int) -> tuple[Any, ...]:
        failed = self._enter("cudaMemPoolSetAttribute")
        self._check(memPool in self.pools, f"{memPool:#x} is no pool")
        self._check((attr, value) == (4, 2**64 - 1), f"attribute {attr} of the pool is set to {value}")
        return (failed or OK,)

    def cudaMemPoolDestroy(self, memPool: int) -> tuple[Any, ...]:
        self._check(memPool in self.pools, f"{memPool:#x} is destroyed, and is no pool")
        failed = self._enter("cudaMemPoolDestroy")
        if not failed:
            self.pools.discard(memPool)
        return (failed or OK,)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        failed = self._enter("cudaMemGetInfo", on_device=True)
        with self._lock:
            return (failed, None, None) if failed else (OK, self.total - self.used(), self.total)

    def cudaMallocFromPoolAsync(self, size: int, memPool: int, stream: int) -> tuple[Any, ...]:
        hStream = stream
        self._check(memPool in self.pools, f"memory of {memPool:#x}, which is no pool")
        failed = self._enter("cudaMallocFromPoolAsync")
        if not failed and hStream not in self.streams:
            failed = CudaError.cudaErrorInvalidResourceHandle
        address = None if failed else self.take(size)
        return (failed, None) if failed else (OK if address else CudaError.cudaErrorMemoryAllocation, address)

    def cudaFreeAsync(self, devPtr: int, hStream: int) -> tuple[Any, ...]:
        failed = self._enter("cudaFreeAsync", on_device=True)
        with self._lock:
            if failed:
                return (failed,)
            if hStream and hStream not in self.streams:
                self.faults.append("memory is freed on a stream that is destroyed")
                return (CudaError.cudaErrorInvalidResourceHandle,)
            if devPtr not in self.blocks or devPtr in self._freed:
                self.faults.append(f"{devPtr:#x} is freed, but not allocated")
                return (CudaError.cudaErrorInvalidValue,)
            self._freed.add(devPtr)
            self._put(hStream, lambda: self.give_back(devPtr))
            return (OK,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        failed = self._enter("cudaHostAlloc", on_device=True)
        if failed:
            return failed, None
        with self._lock:
            address, values = self._allocate(size)
            self.pinned[address] = values
            return OK, address

    def cudaFreeHost(self, ptr: int) -> tuple[Any, ...]:
        failed = self._enter("cudaFreeHost")
        with self._lock:
            if failed:
                return (failed,)
            if ptr not in self.pinned:
                self.faults.append(f"pinned {ptr:#x} is freed, but not allocated")
                return (CudaError.cudaErrorInvalidValue,)
            self._retire(self.pinned.pop(ptr))
            return (OK,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: int, stream: int) -> tuple[Any, ...]:
        failed = self._enter("cudaMemcpyAsync")
        if failed:
            return (failed,)
        if stream not in self.streams:
            return (CudaError.cudaErrorInvalidResourceHandle,)
        inward = kind == MemcpyKind.cudaMemcpyHostToDevice

        def copy() -> None:
            to = self.view(dst, count) if inward else self._inside(self.pinned, dst, count)
            to[:] = self._inside(self.pinned, src, count) if inward else self.view(src, count)

        self._put(stream, copy)
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        failed = self._enter("cudaStreamCreateWithFlags", on_device=True)
        self._check(flags == self.cudaStreamNonBlocking, "a stream waits for the default stream")
        if failed:
            return failed, None
        with self._lock:
            self._next_stream += 1
            self.streams[self._next_stream] = deque()
            return OK, self._next_stream

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        failed = self._enter("cudaStreamSynchronize")
        if failed:
            return (failed,)
        if stream not in self.streams:
            return (CudaError.cudaErrorInvalidResourceHandle,)
        return (self._drain(stream),)

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        failed = self._enter("cudaStreamDestroy")
        if failed:
            return (failed,)
        if stream not in self.streams:
            self.faults.append(f"stream {stream:#x} is destroyed, but does not exist")
            return (CudaError.cudaErrorInvalidResourceHandle,)
        self._drain(stream)
        del self.streams[stream]
        return (OK,)

    def cudaGetErrorName(self, error: CudaError) -> tuple[Any, ...]:
        return OK, error.name.encode()

    def cudaGetErrorString(self, error: CudaError) -> tuple[Any, ...]:
        return OK, TEXTS[error]

    # What tests and the double of TensorRT need.

    def used(self) -> int:
        """Bytes that are allocated."""
        return sum(len(values) for values in self.blocks.values())

    def left(self) -> dict[str, int]:
        """What is allocated and not to be freed, by kind; empty where nothing is."""
        counts = {
            "blocks": len(self.blocks) - len(self._freed),
            "pinned": len(self.pinned),
            "streams": len(self.streams),
        }
        return {kind: count for kind, count in counts.items() if count}

    def take(self, size: int) -> int | None:
        """Allocate memory of the device; None where there is not enough."""
        with self._lock:
            if size < 1 or self.used() + size > self.total:
                return None
            address, values = self._allocate(size)
            self.blocks[address] = values
            return address

    def give_back(self, address: int) -> None:
        """Free memory of the device at once."""
        with self._lock:
            self._freed.discard(address)
            self._retire(self.blocks.pop(address))

    def view(self, address: int, count: int) -> NDArray[np.uint8]:
        """Memory of the device."""
        return self._inside(self.blocks, address, count)

    def put(self, stream: int, work: Callable[[], None]) -> None:
        """Let something happen on a stream of the thread's device."""
        self._check(getattr(self._thread, "device", 0) == DEVICE, "work is put on another device")
        if stream not in self.streams:
            raise RuntimeError("the stream does not exist")
        self._put(stream, work)

    def _enter(self, name: str, *, on_device: bool = False) -> CudaError | None:
        with self._lock:
            self.calls[name] += 1
            self.log.append(name)
        if on_device:
            self._check(getattr(self._thread, "device", 0) == DEVICE, f"{name} is called for another device")
        return self.fail(name)

    def _check(self, good: bool, fault: str) -> None:
        if not good:
            self.faults.append(fault)

    def _allocate(self, size: int) -> tuple[int, NDArray[np.uint8]]:
        raw = np.full(size + ALIGNMENT, 0xFF, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        address = int(raw.ctypes.data) + start
        return address, raw[start : start + size]

    def _retire(self, values: NDArray[np.uint8]) -> None:
        values[:] = 0xFF
        self._quarantine.append(values)

    def _inside(self, memory: dict[int, NDArray[np.uint8]], address: int, count: int) -> NDArray[np.uint8]:
        with self._lock:
            for start, values in memory.items():
                if start <= address and address + count <= start + len(values):
                    return values[address - start : address - start + count]
        raise LookupError(f"{count} bytes at {address:#x} are not allocated")

    def _put(self, stream: int, work: Callable[[], None]) -> None:
        if stream == 0:
            work()
        else:
            self.streams[stream].append(work)

    def _drain(self, stream: int) -> CudaError:
        waiting = self.streams[stream]
        while waiting:
            work = waiting.popleft()
            try:
                work()
            except LookupError as fault:
                self.faults.append(str(fault))
                return CudaError.cudaErrorIllegalAddress
            except Injected:
                return CudaError.cudaErrorLaunchFailure
        return OK


def host_cuda(runtime: HostRuntime, device: int = DEVICE) -> Cuda:
    """The real wrapper over the double."""
    driver = SimpleNamespace(cuuint64_t=int)
    return Cuda(SimpleNamespace(runtime=runtime, driver=driver), device)
