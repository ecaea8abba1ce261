"""Options and statistics of the cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from unipinrec.errors import ConfigError
from unipinrec.runtime.bundle.manifest import Manifest
from unipinrec.runtime.bundle.quality import KvDtype
from unipinrec.runtime.kv.pages import KV_DTYPES, PAGE_SLOTS

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Size and precision of the cache.

    Attributes:
        budget_bytes: Bytes to allocate, rounded down to whole pages.
        dtype: Precision of stored keys and values; None = as the bundle states, int8 if it states none.
        ttl_s: Drop entries that were not used for this many seconds; None = never.
        page_slots: Events per page; a user's last page is half empty on average.
        threads: Threads that copy pages; None = as many as this process may use.
    """

    budget_bytes: int = 1 << 30
    dtype: KvDtype | None = None
    ttl_s: float | None = None
    page_slots: int = PAGE_SLOTS
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("budget_bytes", "page_slots"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise ConfigError(f"{name}={value!r} must be an integer")
        if self.ttl_s is not None and not (isinstance(self.ttl_s, int | float) and self.ttl_s > 0):
            raise ConfigError(f"ttl_s={self.ttl_s!r} must be more than 0, or None")


def dtype_for(manifest: Manifest, requested: KvDtype | None) -> KvDtype:
    """The precision of a cache for a bundle; warns if the requested one is coarser than the bundle states."""
    stated = manifest.cache_dtype
    dtype = requested or stated
    if dtype in KV_DTYPES and KV_DTYPES.index(dtype) > KV_DTYPES.index(stated):
        log.warning(
            "the cache stores %s, but the bundle states %s, with which it keeps the ten best items: lists can differ "
            "from those without a cache; leave out the type of the cache",
            dtype,
            stated,
        )
    return dtype


@dataclass(frozen=True, kw_only=True)
class CacheStatistics:
    """Content of the cache, and counts since its start.

    Attributes:
        entries: Users with an entry.
        pinned: Entries in use at this moment.
        bytes_budget: Allocated bytes.
        bytes_used: Bytes of pages in use.
        bytes_high_water: Highest value of `bytes_used` so far.
        bytes_beside: Bytes outside the budget: events and last hidden states of the entries.
        hits, extended: Lookups that found all of the history, or a beginning of it.
        misses: Other lookups, by reason.
        evictions: Entries dropped to make room.
        unstored: Answers that were not kept: all pages were in use, another request was writing the same user or had
            just stored as much, or the user was invalidated meanwhile.
    """

    entries: int
    pinned: int
    bytes_budget: int
    bytes_used: int
    bytes_high_water: int
    bytes_beside: int
    hits: int
    extended: int
    misses: dict[str, int]
    evictions: int
    unstored: int
