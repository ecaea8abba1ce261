"""The interface between the engine and the libraries that run its graphs, and the tensors that pass through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import REDUCED, Tensor

MAX_SLOTS = 2048  # of a group: more slots only take more memory, matrix products get no faster
MAX_ROWS = 32
Precision = Literal["fp32", "bf16", "fp16", "fp8"]
Graph = TypeVar("Graph")


class Backend(Protocol):
    """Runs the graphs of one bundle on one device; safe to call from several threads.

    Attributes:
        prefill_chunk: Most events of one history to encode in one run; None = all.
        rank_chunk: Most candidates to rank in one run; None = all.
        rank_runs: Number of ranker runs to make at the same time.
    """

    prefill_chunk: int | None
    rank_chunk: int | None
    rank_runs: int

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Tensor]:
        """Run a graph.

        Args:
            graph: Its name in the manifest.
            inputs: All inputs by name, from the host or from an earlier run; device tensors are not copied.
                Numbers from the host are f32, and rounded if the graph takes another floating-point type.

        Returns:
            All outputs by name, left on the device.

        Raises:
            BackendError: An input is missing, unknown, not finite, or has the wrong type or shape; or the run failed.
        """
        ...

    def close(self) -> None:
        """Release the graphs and their memory, except tensors that are still referenced; later runs fail."""
        ...


def opened(graphs: Mapping[str, Graph], graph: str) -> Graph:
    """A graph of a backend that is not closed.

    Raises:
        BackendError: The backend was closed.
    """
    if graph not in graphs:
        raise BackendError(f"{graph}: the graphs were closed; load the bundle again")
    return graphs[graph]


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device that computes.

    Attributes:
        name: One of `runtime.device.DEVICES`, never "auto"; for a backend of the caller's own, its class name.
        reason: Why it was chosen.
        precision: Precision that it computes in.
        refused: The devices tried before it, each with the reason why it does not run.
        fell_back: Whether a refused device was requested by name, or the machine has an NVIDIA driver.
    """

    name: str
    reason: str
    precision: Precision = "fp32"
    refused: tuple[str, ...] = ()
    fell_back: bool = False


CPU = Device(name="cpu", reason="requested")


def host_array(value: NDArray[Any] | Tensor) -> NDArray[Any]:
    """An array unchanged, a host tensor as a view."""
    return value if isinstance(value, np.ndarray) else value.numpy()


def in_type(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """A contiguous array in the type of a graph's input; copied only if it is rounded or not contiguous."""
    return np.ascontiguousarray(array if array.dtype.name == dtype else array.astype(REDUCED[dtype]))


def widened(array: NDArray[Any]) -> NDArray[Any]:
    """The array as f32 if it holds floating-point numbers of less precision, else unchanged."""
    return array.astype(np.float32) if array.dtype.name in REDUCED else array


@dataclass(frozen=True, eq=False)
class HostTensor:
    """A numpy array as a `Tensor`."""

    values: NDArray[Any]

    @property
    def dtype(self) -> str:
        """See `Tensor.dtype`."""
        return self.values.dtype.name

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Tensor.shape`."""
        return self.values.shape

    def numpy(self) -> NDArray[Any]:
        """See `Tensor.numpy`."""
        return self.values


def on_host(key_values: Sequence[Tensor]) -> tuple[HostTensor, ...]:
    """Per-layer tensors on the host; each is copied there once at most, however many rows are read."""
    return tuple(HostTensor(tensor.numpy()) for tensor in key_values)


def row_of(key_values: Sequence[Tensor], row: int, slots: int) -> list[NDArray[np.float32]]:
    """The first slots of one row of per-layer tensors [B, H_kv, >= slots, D]: views [H_kv, slots, D]."""
    return [tensor.numpy()[row, :, :slots] for tensor in key_values]
