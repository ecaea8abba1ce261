"""Tensors in a GPU's memory: how long they live, and how values get in and out of it."""

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

ALIGNMENT = 256  # what TensorRT asks of an address
SMALLEST = 1 << 16  # bytes; less is not worth growing for
TYPES = {**REDUCED, "float32": np.dtype(np.float32), "int64": np.dtype(np.int64)}


def size_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    return int(np.prod(tuple(shape), dtype=np.int64)) * TYPES[dtype].itemsize


def layout(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Aligned places of parts of `sizes` bytes in one block, and the size of the block."""
    *places, total = accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0)
    return places, total


class Block:
    """Memory of a GPU, freed once nothing refers to it any more, or by `free`.

    What is done with it on other streams than its own has to be done by then.
    """

    def __init__(self, cuda: Cuda, nbytes: int, stream: int) -> None:
        """Allocate.

        Raises:
            BackendError: There is not enough memory.
        """
        self.address = cuda.malloc(nbytes, stream)
        self._free = weakref.finalize(self, _free, cuda, self.address, stream)
        self._free.atexit = False  # the process takes its memory with it

    def free(self) -> None:
        """Free it now; may be called again."""
        self._free()


def _free(cuda: Cuda, address: int, stream: int) -> None:
    with suppressed("memory of the GPU may be lost"):
        cuda.free(address, stream)


class Staging:
    """Where a run's inputs are put together on the host, and where they lie on the GPU. For one run at a time."""

    def __init__(self, cuda: Cuda, stream: int) -> None:
        self._cuda, self._stream = cuda, stream
        self._pinned: PinnedBuffer | None = None
        self._block: Block | None = None

    def put(self, arrays: Mapping[str, NDArray[Any]], dtypes: Mapping[str, str]) -> dict[str, int]:
        """Send arrays to the GPU in one copy, and return their addresses there, by name.

        Args:
            arrays: The values; f32 is rounded where another type is wanted.
            dtypes: Type of each on the GPU.

        Raises:
            BackendError: There is not enough memory, or the copy failed.
        """
        places, total = layout(size_bytes(dtypes[name], array.shape) for name, array in arrays.items())
        if not arrays:
            return {}
        pinned, block = self._reserve(total)
        for (name, array), place in zip(arrays.items(), places, strict=True):
            np.copyto(_view(pinned, place, dtypes[name], array.shape), array, casting="unsafe")
        self._cuda.copy_in(block.address, pinned.address, total, self._stream)
        return {name: block.address + place for name, place in zip(arrays, places, strict=True)}

    def _reserve(self, nbytes: int) -> tuple[PinnedBuffer, Block]:
        if self._pinned is None or self._block is None or len(self._pinned) < nbytes:
            self.release()
            size = _grown(nbytes)
            self._block = Block(self._cuda, size, self._stream)
            self._pinned = self._cuda.host_alloc(size)
        return self._pinned, self._block

    def release(self) -> None:
        """Free everything; no copy may be under way."""
        block, pinned = self._block, self._pinned
        self._block = self._pinned = None
        if block is not None:
            block.free()
        if pinned is not None:
            with suppressed("pinned memory may be lost"):
                self._cuda.host_free(pinned)


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
            pinned = lane.reserve(nbytes)
            self.cuda.copy_out(pinned.address, address, nbytes, lane.stream)
            self.cuda.synchronize(lane.stream)
            return _view(pinned, 0, dtype, shape).astype(np.float32 if dtype in REDUCED else TYPES[dtype])
        except BaseException:
            with suppressed("after a failed copy"):
                self.cuda.synchronize(lane.stream)  # it writes to memory that the next copy uses
            raise
        finally:
            self._give_back(lane)

    def release(self) -> None:
        """Free everything; what is being read now is read to its end."""
        with self._lock:
            self._closed, lanes, self._idle = True, self._idle, []
        for lane in lanes:
            lane.release()

    def _take(self) -> _Lane:
        with self._lock:
            if self._closed:
                raise BackendError("the graphs were closed, and what they gave cannot be read any more")
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
        self._cuda, self.stream = cuda, cuda.stream()
        self._pinned: PinnedBuffer | None = None

    def reserve(self, nbytes: int) -> PinnedBuffer:
        if self._pinned is None or len(self._pinned) < nbytes:
            self._release_pinned()
            self._pinned = self._cuda.host_alloc(_grown(nbytes))
        return self._pinned

    def release(self) -> None:
        self._release_pinned()
        with suppressed("a stream may be lost"):
            self._cuda.destroy(self.stream)

    def _release_pinned(self) -> None:
        pinned, self._pinned = self._pinned, None
        if pinned is not None:
            with suppressed("pinned memory may be lost"):
                self._cuda.host_free(pinned)


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceTensor:
    """A tensor of a run, in the GPU's memory; see `Tensor`.

    Attributes:
        dtype: See `Tensor.dtype`.
        sizes: Its dimensions.
        address: Where it starts.
        block: What it lies in, together with the other tensors of its run.
        reader: Copies it to the host.
    """

    dtype: str
    sizes: tuple[int, ...]
    address: int
    block: Block
    reader: Reader

    def shape(self) -> list[int]:
        """See `Tensor.shape`."""
        return list(self.sizes)

    def numpy(self) -> NDArray[Any]:
        """See `Tensor.numpy`: a copy.

        Raises:
            BackendError: What made it is closed, or the copy failed.
        """
        return self.reader.read(self.address, self.dtype, self.sizes)

    def lies_on(self, cuda: Cuda) -> bool:
        """Whether a GPU can read it where it is."""
        return self.reader.cuda is cuda


def _view(pinned: PinnedBuffer, place: int, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Pinned memory from an aligned place on, as an array."""
    return pinned.view[place : place + size_bytes(dtype, shape)].view(TYPES[dtype]).reshape(shape)


def _grown(nbytes: int) -> int:
    """A size that the next, somewhat larger run fits as well."""
    return max(SMALLEST, 1 << (nbytes - 1).bit_length())
