"""The seam between the engine and what runs its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.tensors import Tensor

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
        name: One of `runtime.device.DEVICES`, never "auto".
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
