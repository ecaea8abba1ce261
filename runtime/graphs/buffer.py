"""Keys and values of a batch on the host, in one allocation with room to grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.runtime.bundle.manifest import ModelSpec
from unipinrec.runtime.bundle.tensors import Tensor


@dataclass(frozen=True, eq=False)
class HostTensor:
    """An array of ours as a `Tensor`."""

    values: NDArray[Any]

    @property
    def dtype(self) -> str:
        """See `Tensor.dtype`."""
        return self.values.dtype.name

    def shape(self) -> list[int]:
        """See `Tensor.shape`."""
        return list(self.values.shape)

    def numpy(self) -> NDArray[Any]:
        """See `Tensor.numpy`."""
        return self.values


class KvBuffer:
    """Keys and values of `batch` histories of at most `slots` slots each; zero where nothing was put.

    Attributes:
        values: [2 * layers, batch, H_kv, slots, D] f32, in layer order, the key before the value.
    """

    def __init__(self, model: ModelSpec, batch: int, slots: int) -> None:
        shape = (2 * model.num_layers, batch, model.num_kv_heads, slots, model.head_dim)
        self.values = np.empty(shape, np.float32)

    def tensors(self) -> tuple[HostTensor, ...]:
        """Each tensor [batch, H_kv, slots, D], a view."""
        return tuple(HostTensor(values) for values in self.values)

    def beginning(self, slots: int) -> tuple[HostTensor, ...]:
        """A copy of each tensor's first slots."""
        return tuple(HostTensor(np.ascontiguousarray(values[:, :, :slots])) for values in self.values)

    def row(self, row: int) -> NDArray[np.float32]:
        """One history, [2 * layers, H_kv, slots, D], a view to write to."""
        view: NDArray[np.float32] = self.values[:, row]
        return view

    def put(self, row: int, first: int, key_values: Sequence[NDArray[np.float32]]) -> None:
        """Put each tensor's slots [H_kv, m, D] into slots `first` up to `first + m` of a row."""
        for place, given in zip(self.values, key_values, strict=True):
            place[row, :, first : first + given.shape[1]] = given

    def clear_from(self, row: int, slots: int) -> None:
        """Zero all slots from `slots` on: attention skips them, but not if they hold something that is no number."""
        self.values[:, row, :, slots:] = 0.0


def on_host(key_values: Sequence[Tensor]) -> tuple[HostTensor, ...]:
    """Per-layer tensors on the host, each copied there once if its device is another, however many rows are read."""
    return tuple(HostTensor(tensor.numpy()) for tensor in key_values)


def row_of(key_values: Sequence[Tensor], row: int, slots: int) -> list[NDArray[np.float32]]:
    """The first slots of one row of per-layer tensors [B, H_kv, >= slots, D]: views [H_kv, slots, D]."""
    return [tensor.numpy()[row, :, :slots] for tensor in key_values]
