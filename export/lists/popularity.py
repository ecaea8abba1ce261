"""Current popularity of each item, for users without events."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import ExportError
from unipinrec.models.config import Vocabulary
from unipinrec.models.data.sequences import Sequences

RECENT_MS = 7 * 86_400_000
PRIOR_EVENTS = 100  # the prior of the next wider scale counts as much as this many events
UNIFORM_EVENTS = 1  # the same for the uniform prior, which keeps every chance above 0


def item_shares(data: Sequences, vocabulary: Vocabulary) -> NDArray[np.float32]:
    """Estimate the chance [S, N] that a positive event on a surface is of an item; row 0 is for all surfaces together.

    Counts positive events within `RECENT_MS` of the newest event, or all if no event has a time. The counts of a
    surface are shrunk towards all surfaces together, these towards all time, and those towards equal chances. All
    parts of the split count, since the bundle will serve later users.

    Raises:
        ExportError: No event is positive.
    """
    liked = data.actions[:, vocabulary.positive].any(axis=1)
    if not liked.any():
        raise ExportError(
            f"no event of the data has a positive action ({', '.join(vocabulary.positive_actions)}), so no item is "
            "popular; export without data, or declare other positive_actions"
        )
    items, surfaces = data.num_items, len(vocabulary.surfaces)
    latest = data.timestamps_ms.max()
    recent = liked & ((data.timestamps_ms > latest - RECENT_MS) if latest >= 0 else True)
    cells = np.bincount(data.surfaces[recent] * items + data.rows[recent], minlength=surfaces * items)
    counts = cells.reshape(surfaces, items)
    all_time = _shrunk(np.bincount(data.rows[liked], minlength=items), np.full(items, 1 / items), UNIFORM_EVENTS)
    together = _shrunk(counts.sum(axis=0), all_time, PRIOR_EVENTS)
    shares = _shrunk(counts, together, PRIOR_EVENTS)
    shares[0] = together
    return shares.astype(np.float32)


def _shrunk(counts: NDArray[np.int64], towards: NDArray[np.float64], events: float) -> NDArray[np.float64]:
    """Shares of counts [..., N] after adding a number of events, spread as the shares `towards` [N]."""
    shares: NDArray[np.float64] = (counts + events * towards) / (counts.sum(axis=-1, keepdims=True) + events)
    return shares
