"""Tensors in a GPU's memory: their lifetime, and copies from and to the host."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import REDUCED
from unipinrec.runtime.trt.cuda import Cuda, PinnedBuffer, suppressed

ALIGNMENT = 256  # of every address, for TensorRT
SMALLEST = 1 << 16  # bytes; smaller buffers would grow too often
TYPES = {**REDUCED, "float32": np.dtype(np.float32), "int64": np.dtype(np.int64)}


def size_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    return int(np.prod(tuple(shape), dtype=np.int64)) * TYPES[dtype].itemsize


def layout(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Aligned offsets of parts of `sizes` bytes in one block, and the size of the block."""
    *offsets, total = accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0)
    return offsets, total


class DeviceBlock:
    """Memory of a GPU, freed with its last reference or by `free`, after all work on other streams than its own."""

    def __init__(self, cuda: Cuda, nbytes: int, stream: int) -> None:
        """Allocate.

        Raises:
            BackendError: There is not enough memory.
        """
        self.nbytes, self.address = nbytes, cuda.malloc(nbytes, stream)
        self.free = weakref.finalize(self, _free, cuda, self.address, stream)  # may be called early, and again
        self.free.atexit = False  # the process takes its memory with it


def _free(cuda: Cuda, address: int, stream: int) -> None:
    with suppressed("memory of the GPU may be lost"):
        cuda.free(address, stream)


class _Pinned:
    """Pinned memory that grows as needed."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._buffer: PinnedBuffer | None = None

    def reserve(self, nbytes: int) -> PinnedBuffer:
        if self._buffer is None or len(self._buffer.view) < nbytes:
            self.release()
            # Doubled sizes, so that a somewhat larger run fits as well.
            self._buffer = self._cuda.host_alloc(max(SMALLEST, 1 << (nbytes - 1).bit_length()))
        return self._buffer

    def release(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            with suppressed("pinned memory may be lost"):
                self._cuda.host_free(buffer)


class Staging:
    """The inputs of one run at a time: packed in host memory, then copied to the GPU."""

    def __init__(self, cuda: Cuda, stream: int) -> None:
        self._cuda, self._stream, self._pinned = cuda, stream, _Pinned(cuda)
        self._block: DeviceBlock | None = None

    def put(self, arrays: Mapping[str, NDArray[Any]], dtypes: Mapping[str, str]) -> dict[str, int]:
        """Send arrays to the GPU in one copy, and return their addresses there, by name.

        Args:
            arrays: The values; f32 is rounded to a smaller type of the GPU.
            dtypes: Type of each on the GPU.

        Raises:
            BackendError: There is not enough memory, or the copy failed.
        """
        offsets, total = layout(size_bytes(dtypes[name], array.shape) for name, array in arrays.items())
        if not arrays:
            return {}
        pinned = self._pinned.reserve(total)
        if self._block is None or self._block.nbytes < total:
            self._free_block()
            self._block = DeviceBlock(self._cuda, len(pinned.view), self._stream)
        address = self._block.address
        for (name, array), offset in zip(arrays.items(), offsets, strict=True):
            np.copyto(_view(pinned, offset, dtypes[name], array.shape), array, casting="unsafe")
        self._cuda.copy_in(address, pinned.address, total, self._stream)
        return {name: address + offset for name, offset in zip(arrays, offsets, strict=True)}

    def release(self) -> None:
        """Free everything; no copy may be under way."""
        self._free_block()
        self._pinned.release()

    def _free_block(self) -> None:
        if self._block is not None:
            self._block.free()
        self._block = None


class Reader:
    """Copies tensors to the host, for several threads at a time."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self._lock = threading.Lock()
        self._idle: list[_Lane] = []
        self._closed = False

    def read(self, address: int, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A copy of a tensor; bf16 and fp16 as f32.

        Raises:
            BackendError: The reader is closed, or the copy failed.
        """
        nbytes = size_bytes(dtype, shape)
        lane = self._take()
        try:
            pinned = lane.pinned.reserve(nbytes)
            self.cuda.copy_out(pinned.address, address, nbytes, lane.stream)
            self.cuda.synchronize(lane.stream)
            return _view(pinned, 0, dtype, shape).astype(np.float32 if dtype in REDUCED else TYPES[dtype])
        except BaseException:
            with suppressed("after a failed copy"):
                self.cuda.synchronize(lane.stream)  # the copy writes to memory that the next one uses
            raise
        finally:
            self._give_back(lane)

    def release(self) -> None:
        """Free everything; running copies are finished first."""
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
        for lane in idle:
            lane.release()

    def _take(self) -> _Lane:
        with self._lock:
            if self._closed:
                raise BackendError(
                    "the graphs were closed, and their outputs cannot be read any more; load the bundle again"
                )
            if self._idle:
                return self._idle.pop()
        return _Lane(self.cuda)

    def _give_back(self, lane: _Lane) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(lane)
                return
        lane.release()


class _Lane:
    """A stream to copy on, and pinned memory to copy to."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.stream, self.pinned = cuda, cuda.stream(), _Pinned(cuda)

    def release(self) -> None:
        self.pinned.release()
        with suppressed("a stream may be lost"):
            self._cuda.destroy(self.stream)


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceTensor:
    """A tensor of a run, in the GPU's memory; see `Tensor`.

    Attributes:
        dtype: See `Tensor.dtype`.
        shape: Its dimensions.
        address: Its first byte.
        block: The memory of all tensors of its run.
        reader: Copies it to the host.
    """

    dtype: str
    shape: tuple[int, ...]
    address: int
    block: DeviceBlock
    reader: Reader

    def numpy(self) -> NDArray[Any]:
        """See `Tensor.numpy`: a copy.

        Raises:
            BackendError: The backend is closed, or the copy failed.
        """
        return self.reader.read(self.address, self.dtype, self.shape)

    def lies_on(self, cuda: Cuda) -> bool:
        """Whether it lies in this GPU's memory."""
        return self.reader.cuda is cuda


def _view(pinned: PinnedBuffer, offset: int, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Pinned memory from an aligned offset on, as an array."""
    return pinned.view[offset : offset + size_bytes(dtype, shape)].view(TYPES[dtype]).reshape(shape)
