"""What every backend whose tensors lie on the host shares: the check of a run's inputs, and the joining of slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.manifest import TensorSpec
from unipinrec.runtime.session import Tensor


def check_inputs(graph: str, wanted: Sequence[TensorSpec], inputs: Mapping[str, NDArray[Any] | Tensor]) -> None:
    """Check that names, types and shapes fit a graph, and that arrays hold finite numbers.

    Raises:
        BackendError: They do not; names the graph, the input, what was given and what is expected.
    """
    names = [spec.name for spec in wanted]
    if set(inputs) != set(names):
        raise BackendError(f"{graph}: the inputs are {sorted(inputs)}, expected {sorted(names)}")
    sizes: dict[str, int] = {}
    for spec in wanted:
        given = inputs[spec.name]
        values = host_array(given)
        if values.dtype.name != spec.dtype or not values.dtype.isnative or not _fits(values.shape, spec.shape, sizes):
            raise BackendError(
                f"{graph}: {spec.name} is {values.dtype} {list(values.shape)}, expected {spec.dtype} "
                f"{list(spec.shape)} with {sizes}"
            )
        if given is values and values.dtype.kind == "f" and not np.isfinite(values).all():
            raise BackendError(f"{graph}: {spec.name} holds values that are not finite; send finite numbers")


def host_array(given: NDArray[Any] | Tensor) -> NDArray[Any]:
    """An array as it is, a host tensor as a view."""
    return given if isinstance(given, np.ndarray) else given.numpy()


def _fits(shape: Sequence[int], expected: Sequence[int | str], sizes: dict[str, int]) -> bool:
    """Whether a shape without empty dimensions fits; binds each named dimension to the first size it meets."""
    if len(shape) != len(expected) or 0 in shape:
        return False
    bound = [
        sizes.setdefault(want, size) if isinstance(want, str) and want.isidentifier() else want
        for size, want in zip(shape, expected, strict=True)
    ]
    return all(size == want or not isinstance(want, int) for size, want in zip(shape, bound, strict=True))
