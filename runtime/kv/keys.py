"""What a cached history is, and which requests it may serve.

A cache entry carries the very events that it was computed from. It serves a request only if those events, byte by byte,
are the first events of the request's history: no hash of a history could collide and no length could mislead. (An item
that an update of the bundle added is named by a hash of its vector, see `Bundle.kv_item_keys`.)
Then it is a *hit* (nothing is new) or is *extended* by what is new; everything else is a *miss* with its reason:

    new          the user is not known
    edited       an event that was encoded is no longer in its place
    truncated    the history is now a shorter beginning of what was encoded
    shifted      the window over a long history has moved on
    version      the entry is of another bundle, or was computed in another precision
    evicted      the entry had to make room
    expired      it was not used for longer than the time to live
    invalidated  it was dropped on request

A request without a user is not looked up (`anonymous`), nor is any where there is no cache (`no cache`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unipinrec.runtime.requests import History


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """Whose history, under which bundle, and its content.

    Attributes:
        user: External user id.
        namespace: What keys and values depend on besides the history: `Bundle.kv_namespace`, and the precision that
            they were computed in.
        events: The history, see `event_records`.
        count: Events in it.
        start: Place of the first of them in the user's whole history; not 0 where a window leaves the oldest out.
    """

    user: str
    namespace: str
    events: bytes
    count: int
    start: int


def event_records(history: History) -> bytes:
    """One record for each event: item, time, surface, actions; of equal length for all events of a bundle.

    What stands for an item is in `history.item_rows`; where bundles share a cache, `Bundle.kv_item_keys`.
    """
    columns = (history.item_rows, history.timestamps_ms, history.surfaces)
    raw = [np.ascontiguousarray(column).view(np.uint8).reshape(len(history), -1) for column in columns]
    return np.concatenate([*raw, np.packbits(history.actions != 0.0, axis=1)], axis=1).tobytes()


def mismatch(cached: CacheKey, asked: CacheKey) -> str | None:
    """Why a cached history does not serve the one asked for; None if it does, being a beginning of it."""
    if cached.namespace != asked.namespace:
        return "version"
    if cached.start != asked.start:
        return "shifted"
    if asked.events.startswith(cached.events):
        return None
    return "truncated" if cached.events.startswith(asked.events) else "edited"
