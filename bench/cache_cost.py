"""The cost of the cache itself: finding a user among many and its bookkeeping, without any graph.

    OMP_NUM_THREADS=1 python bench/cache_cost.py [--users 100000] [--rounds 2000]

Card: `--users` entries of 50 events each with one-page entries of a tiny model (the bookkeeping does not depend on the
size of a page). Each figure is for one request of a random user, whose history has 50 or 992 events; median with the
10th and 90th percentile, in microseconds:

    records    turn the history into records for the comparison
    hash       blake2b over those records: the cost of a fingerprint instead of a comparison
    lookup     find, compare, pin and unpin
    keep       the same, with 8 new events: take pages, evict users, publish; all pages are in use

Bytes beside the budget are Python's allocations for an entry besides its pages, measured with tracemalloc.
"""

from __future__ import annotations

import argparse
import hashlib
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from common import card, finish, spread

from unipinrec.runtime.bundle.manifest import ModelSpec
from unipinrec.runtime.kv.cache import CacheKey, KvCache
from unipinrec.runtime.kv.encoder import event_records
from unipinrec.runtime.kv.options import CacheOptions
from unipinrec.runtime.requests import History

ACTIONS, NEW, LENGTHS = 4, 8, (50, 992)
MODEL = ModelSpec(
    num_layers=1,
    num_kv_heads=1,
    head_dim=2,
    hidden_size=64,
    item_dim=64,
    max_history=1024,
    kv_prefix_slots=0,
    outcome_conditioned=False,
)
LAST = np.zeros(MODEL.hidden_size, np.float32)
ITEM_KEYS = np.arange(10**6)


def history_of(events: int) -> History:
    rng = np.random.default_rng(events)
    return History(
        item_rows=rng.integers(0, len(ITEM_KEYS), events),
        actions=(rng.random((events, ACTIONS)) < 0.3).astype(np.float32),
        surfaces=np.zeros(events, np.int64),
        timestamps_ms=np.sort(rng.integers(0, 10**12, events)),
    )


def records_of(history: History) -> bytes:
    return event_records(replace(history, item_rows=ITEM_KEYS[history.item_rows]))


def key_of(user: int, history: History, count: int) -> CacheKey:
    part = history.part(0, count)
    return CacheKey(user=f"user-{user}", namespace="bundle", events=records_of(part), count=count, start=0)


def store(cache: KvCache, key: CacheKey) -> None:
    """The work of a request in the cache, without reading and writing pages."""
    with cache.lookup(key) as lease:
        if cache.stage(lease, key.count):
            cache.publish(lease, key.count, LAST)


def fill(users: int, history: History) -> KvCache:
    page_slots = len(history)
    cache = KvCache(MODEL, CacheOptions(budget_bytes=users * page_slots * 16, dtype="fp32", page_slots=page_slots))
    for user in range(users):
        store(cache, key_of(user, history, len(history) - NEW))
    return cache


def microseconds(work: Callable[[int], object], users: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, float]:
    times = []
    for user in users.tolist():
        began = time.perf_counter()
        work(user)
        times.append((time.perf_counter() - began) * 1e6)
    return spread(times)


def row(users: int, rounds: int, events: int) -> dict[str, Any]:
    history = history_of(events)
    tracemalloc.start()
    cache = fill(users, history)
    beside = tracemalloc.get_traced_memory()[0] - cache.pages.nbytes
    tracemalloc.stop()
    chosen = np.random.default_rng(1).integers(0, users, rounds)
    strangers = np.arange(users, users + rounds)
    keys = {user: key_of(user, history, events - NEW) for user in chosen.tolist()}
    grown = {user: key_of(user, history, events) for user in strangers.tolist()}
    cache.check_integrity()
    return {
        "events": events,
        "records_us": microseconds(lambda _: records_of(history), chosen),
        "hash_us": microseconds(lambda user: hashlib.blake2b(keys[user].events).digest(), chosen),
        "lookup_us": microseconds(lambda user: cache.lookup(keys[user]).close(), chosen),
        "keep_and_evict_us": microseconds(lambda user: store(cache, grown[user]), strangers),
        "bytes_beside_per_user": round(beside / users),
        "bytes_beside_counted_per_user": round(cache.statistics().bytes_beside / users),
    }


def main() -> None:
    """Measure; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2000)
    options = parser.parse_args()
    rows = [row(options.users, options.rounds, events) for events in LENGTHS]
    finish({**card("cache_cost"), "users": options.users, "rows": rows}, "cache_cost")


if __name__ == "__main__":
    main()
