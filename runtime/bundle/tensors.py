"""What backends share: the check of a run's inputs, and the types of numbers on their way in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import TensorSpec

# What f32 may be rounded to on its way into a graph.
REDUCED: dict[str, np.dtype[Any]] = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def check_inputs(graph: str, wanted: Sequence[TensorSpec], inputs: Mapping[str, NDArray[Any] | Tensor]) -> None:
    """Check that names, types and shapes fit a graph, and that arrays hold finite numbers. Copies nothing.

    f32 fits inputs of less precision as well; see `Backend.run`.

    Raises:
        BackendError: They do not; names the graph, the input, what was given and what is expected.
    """
    names = [spec.name for spec in wanted]
    if set(inputs) != set(names):
        raise BackendError(f"{graph}: the inputs are {sorted(inputs)}, expected {sorted(names)}")
    sizes: dict[str, int] = {}
    for spec in wanted:
        given = inputs[spec.name]
        dtype, shape = _description(given)
        if not _converts(dtype, spec.dtype) or not _fits(shape, spec.shape, sizes):
            raise BackendError(
                f"{graph}: {spec.name} is {dtype} {list(shape)}, expected {spec.dtype} {list(spec.shape)} with {sizes}"
            )
        if isinstance(given, np.ndarray) and given.dtype.kind == "f" and not np.isfinite(given).all():
            raise BackendError(f"{graph}: {spec.name} holds values that are not finite; send finite numbers")


def host_array(given: NDArray[Any] | Tensor) -> NDArray[Any]:
    """An array as it is, a host tensor as a view."""
    return given if isinstance(given, np.ndarray) else given.numpy()


def in_type(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """An array in the type of a graph's input, contiguous; copied only where it is rounded or was not contiguous."""
    return np.ascontiguousarray(array if array.dtype.name == dtype else array.astype(REDUCED[dtype]))


def widened(array: NDArray[Any]) -> NDArray[Any]:
    """An array as the host sees it: f32 where it holds floating-point numbers of less precision."""
    return array.astype(np.float32) if array.dtype.name in REDUCED else array


def _description(given: NDArray[Any] | Tensor) -> tuple[str, Sequence[int]]:
    """Type, as numpy names it, and shape."""
    if not isinstance(given, np.ndarray):
        return given.dtype, given.shape()
    return given.dtype.name if given.dtype.isnative else str(given.dtype), given.shape


def _converts(dtype: str, wanted: str) -> bool:
    return dtype == wanted or (dtype == "float32" and wanted in REDUCED)


def _fits(shape: Sequence[int], expected: Sequence[int | str], sizes: dict[str, int]) -> bool:
    """Whether a shape without empty dimensions fits; binds each named dimension to the first size it meets."""
    if len(shape) != len(expected) or 0 in shape:
        return False
    bound = [
        sizes.setdefault(want, size) if isinstance(want, str) and want.isidentifier() else want
        for size, want in zip(shape, expected, strict=True)
    ]
    return all(size == want or not isinstance(want, int) for size, want in zip(shape, bound, strict=True))


class Tensor(Protocol):
    """A tensor on a backend's device; never modified. It lives as long as it, or a view of it, is held."""

    @property
    def dtype(self) -> str:
        """Type of its elements on the device, as numpy names it ("bfloat16" included)."""
        ...

    def shape(self) -> list[int]:
        """Its dimensions."""
        ...

    def numpy(self) -> NDArray[Any]:
        """Its values on the host: a view where the device is the host, else a copy. Not to be written to.

        Floating-point numbers are f32 there, whatever they are on the device.
        """
        ...
