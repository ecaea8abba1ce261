"""The interface between the engine and the libraries that run its graphs, and the tensors that pass through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import Tensor

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


class Graphs(dict[str, Graph]):
    """The graphs of a backend, by name; empty once it is closed, and then a `BackendError` says so."""

    def __missing__(self, graph: str) -> Graph:
        raise BackendError(f"{graph}: the graphs were closed; load the bundle again")


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
