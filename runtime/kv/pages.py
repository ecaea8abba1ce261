"""Memory for cached keys and values: pages of a fixed number of slots, allocated once, in one of four precisions.

This module stores and rounds slots in pages; it does not know which user owns a page.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError, ConfigError
from unipinrec.runtime.bundle.manifest import ModelSpec
from unipinrec.runtime.bundle.quality import KvDtype
from unipinrec.runtime.machine import thread_count, usable_bytes

KV_DTYPES: tuple[KvDtype, ...] = get_args(KvDtype)
PAGE_SLOTS = 16
PARALLEL_PAGES = 16  # copying fewer takes less time than waking another thread
INT8_MAX = 127.0
SLOW_S = 2.0
log = logging.getLogger(__name__)
T = TypeVar("T")
STORED: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16, "int8": np.int8}


@dataclass(frozen=True, kw_only=True)
class KvGeometry:
    """Shape and precision of the keys and values of one model.

    Attributes:
        tensors: Key and value tensors, two for each layer.
        heads: H_kv, heads of each.
        head_dim: D.
        dtype: Precision of storage. int8 has one fp32 scale per head vector of D values.
        page_slots: Slots of a page.
    """

    tensors: int
    heads: int
    head_dim: int
    dtype: KvDtype
    page_slots: int = PAGE_SLOTS

    def __post_init__(self) -> None:
        if self.dtype not in KV_DTYPES:
            raise ConfigError(f"kv dtype {self.dtype!r} is not one of {', '.join(KV_DTYPES)}")
        if self.page_slots < 1:
            raise ConfigError(f"page_slots={self.page_slots} must be at least 1")

    @classmethod
    def of(cls, model: ModelSpec, dtype: KvDtype, page_slots: int = PAGE_SLOTS) -> KvGeometry:
        """The geometry of a model."""
        return cls(
            tensors=2 * model.num_layers,
            heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=dtype,
            page_slots=page_slots,
        )

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot (one event) in all layers."""
        scale_bytes = 4 if self.dtype == "int8" else 0
        vector_bytes = self.head_dim * int(np.dtype(STORED[self.dtype]).itemsize) + scale_bytes
        return self.tensors * self.heads * vector_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.slot_bytes * self.page_slots

    def pages_for(self, slots: int) -> int:
        """Pages that hold this many slots."""
        return -(-slots // self.page_slots)


class KvPages:
    """Pages on the host. Threads may write and read different slots at the same time."""

    def __init__(self, geometry: KvGeometry, count: int, threads: int | None = None) -> None:
        """Allocate and touch all pages, so that a lack of memory shows now and not during a request.

        Raises:
            ConfigError: The memory does not suffice.
        """
        self.geometry, self.count = geometry, count
        size, usable, began = count * geometry.page_bytes, usable_bytes(), time.monotonic()
        if usable is not None and size > usable:
            raise ConfigError(
                f"a key/value cache of {size:,} bytes does not fit into the {usable:,} bytes of memory that this "
                "process may use (cgroup or machine); lower its budget"
            )
        log.info("allocating %s MiB for the key/value cache", f"{size >> 20:,}")
        self._parallel = thread_count(threads)
        self._threads = ThreadPoolExecutor(max(1, self._parallel - 1), "unipinrec-pages")
        shape = (count, geometry.tensors, geometry.heads, geometry.page_slots)
        try:
            self._values: NDArray[Any] = np.empty((*shape, geometry.head_dim), STORED[geometry.dtype])
            self._scales = np.empty((*shape, 1 if geometry.dtype == "int8" else 0), np.float32)
            self._values.fill(0)
            self._scales.fill(0.0)
            if (seconds := time.monotonic() - began) > SLOW_S:
                log.info("the key/value cache took %.1f s to allocate", seconds)
        except (MemoryError, ValueError) as error:  # ValueError: larger than the address space
            raise ConfigError(
                f"a key/value cache of {size:,} bytes does not fit into memory; lower its budget"
            ) from error

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._values.nbytes + self._scales.nbytes

    def write(
        self,
        pages: Sequence[int],
        first: int,
        key_values: Sequence[NDArray[np.float32]],
        out: NDArray[np.float32] | None = None,
    ) -> None:
        """Round and store consecutive slots of one history.

        Args:
            pages: The history's pages, in order.
            first: First slot of the history to write.
            key_values: Each tensor's new slots [H_kv, m, D] f32.
            out: Filled with the stored values [tensors, H_kv, m, D], as `read` returns them; may be `key_values`.

        Raises:
            BackendError: A value is out of the precision's range.
        """
        spans = self._spans(pages, first, key_values[0].shape[1])

        def store(tensor: int) -> None:
            values, scales = _rounded(key_values[tensor], self.geometry.dtype)
            for page, inside, outside in spans:
                self._values[page, tensor, :, inside] = values[:, outside]
                if scales is not None:
                    self._scales[page, tensor, :, inside] = scales[:, outside]
            if out is not None:
                out[tensor] = values if scales is None else values * scales

        self._in_parallel(store, range(len(key_values)), len(spans))

    def read(self, pages: Sequence[int], count: int, out: NDArray[np.float32]) -> None:
        """Copy the first `count` slots of a history into `out` [tensors, H_kv, at least count, D] f32."""

        def load(span: tuple[int, slice, slice]) -> None:
            page, inside, outside = span
            if self.geometry.dtype == "int8":
                np.multiply(self._values[page, :, :, inside], self._scales[page, :, :, inside], out=out[:, :, outside])
            else:
                out[:, :, outside] = self._values[page, :, :, inside]

        spans = self._spans(pages, 0, count)
        self._in_parallel(load, spans, len(spans))

    def _in_parallel(self, work: Callable[[T], None], items: Sequence[T], pages: int) -> None:
        """Process all items, on several threads if there are enough pages."""
        threads = self._parallel if pages >= PARALLEL_PAGES else 1

        def share(start: int) -> None:
            for item in items[start::threads]:
                work(item)

        others = [self._threads.submit(share, start) for start in range(1, threads)]
        try:
            share(0)
        finally:
            wait(others)  # no thread may go on after this returns or raises
        for other in others:
            other.result()

    def _spans(self, pages: Sequence[int], first: int, count: int) -> list[tuple[int, slice, slice]]:
        """(page, slots in the page, slots in the run) for slots `first` up to `first + count` of a history."""
        size, spans, done = self.geometry.page_slots, [], 0
        while done < count:
            index, start = divmod(first + done, size)
            step = min(size - start, count - done)
            spans.append((pages[index], slice(start, start + step), slice(done, done + step)))
            done += step
        return spans


def as_stored(key_values: NDArray[np.float32], dtype: KvDtype) -> NDArray[np.float32]:
    """Keys or values [..., D] as they are after storing them in a precision and reading them back.

    Raises:
        BackendError: A value is out of the precision's range.
    """
    if dtype == "fp32":
        return key_values
    values, scales = _rounded(key_values, dtype)
    exact = values.astype(np.float32)
    return exact if scales is None else np.multiply(exact, scales, out=exact)


def _rounded(values: NDArray[np.float32], dtype: KvDtype) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Values [..., D] in a precision; for int8, which is symmetric, also the scale of each vector [..., 1]."""
    if dtype == "int8":
        scales = _largest(values) / np.float32(INT8_MAX)
        steps = values / np.maximum(scales, np.finfo(np.float32).tiny)
        return np.rint(steps, out=steps).astype(np.int8), scales
    try:
        with np.errstate(over="raise"):
            return values.astype(STORED[dtype], copy=False), None
    except FloatingPointError as error:
        raise BackendError(
            f"a key or value of {np.abs(values).max():g} does not fit into {dtype}; store them as bf16 or fp32"
        ) from error


def _largest(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Largest magnitude of each vector [..., D], [..., 1]; by halves, a third of the time of numpy's own reduction."""
    sizes = np.abs(values)
    while (width := sizes.shape[-1]) > 1:
        half = -(-width // 2)
        sizes = np.maximum(sizes[..., :half], sizes[..., width - half :])
    return sizes
