"""The seam between the engine and what runs its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray


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
