"""The golden requests of a bundle: real requests, and PyTorch's outputs for them at export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.runtime.bundle.bundle import GOLDEN, Bundle
from unipinrec.runtime.bundle.stored import check_golden
from unipinrec.runtime.requests import History


@dataclass(frozen=True, kw_only=True)
class Golden:
    """B requests.

    Attributes:
        histories: B histories.
        prefixes: [B] i64, number of events that the extend case encodes first.
        candidates: [B, k] i64 rows to rank, shown at `surfaces` [B] i64 and `now_ms` [B] i64.
        outputs: PyTorch's outputs, by graph and output.
    """

    histories: tuple[History, ...]
    prefixes: NDArray[np.int64]
    candidates: NDArray[np.int64]
    surfaces: NDArray[np.int64]
    now_ms: NDArray[np.int64]
    outputs: dict[str, NDArray[Any]]


def read_golden(bundle: Bundle) -> Golden:
    """Read the golden requests.

    Raises:
        BundleError: They cannot be read, or their inputs are missing or do not fit this bundle.
    """
    tensors = bundle.golden()
    check_golden(bundle.path / GOLDEN, tensors, bundle.manifest)
    columns = [tensors[f"history.{name}"] for name in ("item_rows", "actions", "surfaces", "timestamps_ms")]
    return Golden(
        histories=tuple(
            History(item_rows=rows, actions=actions, surfaces=surfaces, timestamps_ms=times).part(0, int(length))
            for rows, actions, surfaces, times, length in zip(*columns, tensors["history.lengths"], strict=True)
        ),
        prefixes=tensors["prefix_lengths"],
        candidates=tensors["candidates.rows"],
        surfaces=tensors["candidates.surfaces"],
        now_ms=tensors["candidates.timestamps_ms"],
        outputs=tensors,
    )
