"""The seam between the engine and what runs its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Tensor(Protocol):
    """A tensor on a backend's device; never modified. It lives as long as it, or a view of it, is held."""

    def shape(self) -> list[int]:
        """Its dimensions."""
        ...

    def numpy(self) -> NDArray[Any]:
        """Its values on the host: a view where the device is the host, else a copy. Not to be written to."""
        ...


class Backend(Protocol):
    """Runs the graphs of one bundle on one device; safe to call from several threads."""

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Tensor]:
        """Run a graph.

        Args:
            graph: Its name in the manifest.
            inputs: All inputs by name, from the host or from an earlier run; the latter are used where they lie.

        Returns:
            All outputs by name, left on the device.

        Raises:
            BackendError: An input is missing, foreign, not finite, or has the wrong type or shape; or the run failed.
        """
        ...

    def append(
        self, past: Tensor, added: Tensor, past_slots: NDArray[np.int64], added_slots: NDArray[np.int64]
    ) -> Tensor:
        """Put `added` behind the valid slots of `past`, row by row.

        Args:
            past: [B, H_kv, p, D], of which `past_slots` [B] are valid.
            added: [B, H_kv, m, D], of which `added_slots` [B] are valid.
            past_slots: [B].
            added_slots: [B].

        Returns:
            [B, H_kv, max(past_slots + added_slots), D], zero beyond the valid slots.
        """
        ...
