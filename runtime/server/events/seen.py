"""Items of dropped events, by hash, so that they stay out of recommendations for longer than events are kept.

Of n hashes and N items of a bundle, any is excluded by mistake with a probability of n * N / 2^64: for 10,000 hashes
and a million items 5e-10.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from unipinrec.runtime.requests import Event

HASH = np.dtype("<u8")


def remembered(seen: bytes, gone: Sequence[Event], most: int) -> bytes:
    """Hashes with the items of newly dropped events: `most` distinct ones, the newest first; 8 bytes each."""
    both = np.concatenate([_hashes(str(event.item) for event in reversed(gone)), np.frombuffer(seen, HASH)])
    first = np.unique(both, return_index=True)[1]
    return both[np.sort(first)[:most]].tobytes()


def _hashes(items: Iterable[str]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(hashlib.blake2b(item.encode(), digest_size=8).digest() for item in items), HASH)


class ItemsByHash:
    """The items of a bundle, to be found by their hashes; 16 bytes per item, and 2 s for a million."""

    def __init__(self, items: Sequence[str]) -> None:
        hashes = _hashes(items)
        self._items, self._order = items, np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def named(self, seen: bytes) -> list[str]:
        """The items with these hashes, in their order."""
        wanted = np.frombuffer(seen, HASH)
        at = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        return [self._items[row] for row in self._order[at[self._hashes[at] == wanted]].tolist()]
