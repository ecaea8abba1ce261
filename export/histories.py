"""Histories of users, as an export takes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import ExportError, listed
from unipinrec.export.protocol import MISSING_TIMESTAMP_MS, ExportSource
from unipinrec.runtime.requests import YEAR_10000_MS, History


@dataclass(frozen=True, kw_only=True)
class Histories:
    """Events of some users, oldest first: user u has events offsets[u] up to offsets[u + 1].

    item_rows, surfaces, timestamps_ms [M] i64; actions [M, C] u8. `popularity` [S, N] f32 is that of the same data, see
    `Bundle.popularity`; None if unknown.
    """

    user_ids: list[str]
    offsets: NDArray[np.int64]
    item_rows: NDArray[np.int64]
    actions: NDArray[np.uint8]
    surfaces: NDArray[np.int64]
    timestamps_ms: NDArray[np.int64]
    popularity: NDArray[np.float32] | None = None

    def split(self) -> list[History]:
        """One history per user, as the runtime takes it."""
        events = History(
            item_rows=self.item_rows,
            actions=self.actions.astype(np.float32),
            surfaces=self.surfaces,
            timestamps_ms=self.timestamps_ms,
        )
        return [events.part(*window) for window in itertools.pairwise(self.offsets.tolist())]

    def check(self, source: ExportSource) -> None:
        """Check that the histories fit a source.

        Raises:
            ExportError: Lists all misfits.
        """
        if problems := list(self._problems(source)):
            raise ExportError(f"histories do not fit: {'; '.join(problems)}")

    def _problems(self, source: ExportSource) -> Iterator[str]:
        events, actions, users = len(self.item_rows), len(source.actions), len(self.user_ids)
        columns: dict[str, tuple[NDArray[Any], tuple[int, ...], tuple[int, int]]] = {
            "item_rows": (self.item_rows, (events,), (0, len(source.item_ids) - 1)),
            "actions": (self.actions, (events, actions), (0, 1)),
            "surfaces": (self.surfaces, (events,), (0, len(source.surfaces) - 1)),
            "timestamps_ms": (self.timestamps_ms, (events,), (MISSING_TIMESTAMP_MS, YEAR_10000_MS - 1)),
        }
        for name, (array, shape, (least, most)) in columns.items():
            kind = "uint8" if name == "actions" else "int64"
            if array.dtype != kind or array.shape != shape:
                yield f"{name} is {array.dtype} {list(array.shape)}, must be {kind} {list(shape)}"
            elif events and not least <= array.min() <= array.max() <= most:
                yield f"{name} has values from {array.min()} to {array.max()}, must be from {least} to {most}"
        offsets = self.offsets
        if offsets.shape != (users + 1,) or offsets.dtype != "int64" or [*offsets[[0, -1]]] != [0, events]:
            yield f"offsets are {listed(offsets.tolist(), 5)}; {users} users need {users + 1} int64 from 0 to {events}"
        elif (np.diff(offsets) < 1).any():
            user = self.user_ids[int(np.argmax(np.diff(offsets) < 1))]
            yield f"user {user!r} has no events; leave such users out"
        if len(set(self.user_ids)) != users:
            yield "user_ids are not distinct"
        expected = (len(source.surfaces), len(source.item_ids))
        if self.popularity is not None and self.popularity.shape != expected:
            yield f"popularity is {list(self.popularity.shape)}, must be [surfaces, items] = {list(expected)}"
