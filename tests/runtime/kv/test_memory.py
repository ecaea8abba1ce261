"""Memory stays where it was while users come and go; `bench/soak.py` does the same for an hour."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from unipinrec.runtime import CacheOptions, Event, Recommender, RecommendOptions, Request

BUDGET_BYTES, NOW_MS = 1 << 21, 1_760_000_000_000
WARM_UP, REQUESTS, ALLOWED_BYTES = 400, 2_000, 8 << 20


def resident_bytes() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def test_thousands_of_requests_leave_memory_as_it_was(bundle: Path) -> None:
    recommender = Recommender.load(bundle, cache=CacheOptions(budget_bytes=BUDGET_BYTES, dtype="int8"))
    rng, items = np.random.default_rng(0), recommender.bundle.item_ids
    options = RecommendOptions(now_ms=NOW_MS, candidates=30)
    warm = 0
    for turn in range(WARM_UP + REQUESTS):
        if turn == WARM_UP:
            warm = resident_bytes()
        history = tuple(Event(item=items[row], actions=()) for row in rng.integers(0, len(items), rng.integers(1, 65)))
        recommender.recommend_many([Request(history=history, k=5, options=options, user=f"user-{turn % 500}")])
    assert recommender.cache is not None
    statistics = recommender.cache.statistics()
    assert statistics.evictions > 500
    assert statistics.bytes_high_water <= statistics.bytes_budget <= BUDGET_BYTES
    assert resident_bytes() - warm < ALLOWED_BYTES
