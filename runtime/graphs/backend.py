"""The seam between the engine and what runs its graphs, and the tensors that pass through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import REDUCED, Tensor

MAX_SLOTS = 2048  # of a group: beyond it the matrix products are as fast as they get, and memory only grows
MAX_ROWS = 32
Precision = Literal["fp32", "bf16", "fp16", "fp8"]
Graph = TypeVar("Graph")


class Backend(Protocol):
    """Runs the graphs of one bundle on one device; safe to call from several threads.

    Attributes:
        prefill_chunk: Events of one history that are best encoded in one run; None = all.
        rank_chunk: Candidates that are best ranked in one run; None = all.
        rank_runs: Runs of the ranker that are best made at the same time.
    """

    prefill_chunk: int | None
    rank_chunk: int | None
    rank_runs: int

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Tensor]:
        """Run a graph.

        Args:
            graph: Its name in the manifest.
            inputs: All inputs by name, from the host or from an earlier run; the latter are used where they lie.
                Numbers from the host are f32, and rounded where the graph takes another floating-point type.

        Returns:
            All outputs by name, left on the device.

        Raises:
            BackendError: An input is missing, foreign, not finite, or has the wrong type or shape; or the run failed.
        """
        ...

    def close(self) -> None:
        """Release the graphs and the memory that they take, beside tensors that are still held; later runs fail."""
        ...


def opened(graphs: Mapping[str, Graph], graph: str) -> Graph:
    """A backend's graph, of which it has none left once it is closed.

    Raises:
        BackendError: It was closed.
    """
    if graph not in graphs:
        raise BackendError(f"{graph}: the graphs were closed; load the bundle again")
    return graphs[graph]


@dataclass(frozen=True, kw_only=True)
class Device:
    """What really runs.

    Attributes:
        name: One of `runtime.device.DEVICES`, never "auto"; of a backend that was passed in its class.
        reason: Why it was chosen.
        precision: What it computes in.
        refused: What was preferred to it, each with the reason why it does not run.
        fell_back: Whether something was refused that somebody wanted, or that has a GPU.
    """

    name: str
    reason: str
    precision: Precision = "fp32"
    refused: tuple[str, ...] = ()
    fell_back: bool = False


CPU = Device(name="cpu", reason="asked for")


def host_array(given: NDArray[Any] | Tensor) -> NDArray[Any]:
    """An array as it is, a host tensor as a view."""
    return given if isinstance(given, np.ndarray) else given.numpy()


def in_type(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """An array in the type of a graph's input, contiguous; copied only where it is rounded or was not contiguous."""
    return np.ascontiguousarray(array if array.dtype.name == dtype else array.astype(REDUCED[dtype]))


def widened(array: NDArray[Any]) -> NDArray[Any]:
    """An array as the host sees it: f32 where it holds floating-point numbers of less precision."""
    return array.astype(np.float32) if array.dtype.name in REDUCED else array


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


def on_host(key_values: Sequence[Tensor]) -> tuple[HostTensor, ...]:
    """Per-layer tensors on the host, each copied there once if its device is another, however many rows are read."""
    return tuple(HostTensor(tensor.numpy()) for tensor in key_values)


def row_of(key_values: Sequence[Tensor], row: int, slots: int) -> list[NDArray[np.float32]]:
    """The first slots of one row of per-layer tensors [B, H_kv, >= slots, D]: views [H_kv, slots, D]."""
    return [tensor.numpy()[row, :, :slots] for tensor in key_values]
