"""Keys and values stored in less precision: memory, latency, and answers on real histories.

    python bench/kv_precision.py BUNDLE [--users 1000] [--rounds 31]

BUNDLE must carry sample users (`unipinrec export --data`). For each precision, against the fp32 cache:

    overlap       share of the ten best items of fp32 that are among the ten best, for all sample users; each is asked
                  for with a beginning of the history first, so that what is compared was extended from the cache
    logit change  of the candidates of those requests, largest and 99th percentile
    AUC           of each action over the last events of each user, predicted from the events before them
    read, write   milliseconds to read 992 cached events of the `small` size into a batch, and to store them
    users / GiB   of 992 events of the `small` size, and of the bundle's own users and size
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import card, finish
from numpy.typing import NDArray

from unipinrec.export.lists.held_out import LAST_EVENTS, auc_by_action
from unipinrec.models.config import SMALL
from unipinrec.runtime import Event, Recommender, RecommendOptions, Request
from unipinrec.runtime.bundle.bundle import USER_IDS, Bundle
from unipinrec.runtime.bundle.quality import KvDtype
from unipinrec.runtime.kv.options import CacheOptions
from unipinrec.runtime.kv.pages import KV_DTYPES, KvGeometry, KvPages
from unipinrec.runtime.requests import History, ResolvedRequest
from unipinrec.runtime.retrieval.retriever import Search

CANDIDATES, TOP = 200, 10
SLOTS, GIB = 993, 1 << 30
Answer = tuple[NDArray[np.int64], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One user: the events, as a caller sends them and as the graphs take them."""

    user: str
    events: tuple[Event, ...]
    history: History


def samples(bundle: Bundle, users: int) -> list[Sample]:
    """Sample users with events to hold out."""
    names = json.loads((bundle.path / USER_IDS).read_text())[:users]
    found = zip(names, bundle.sample_histories(users), strict=True)
    return [
        Sample(user=user, events=bundle.user_events(user), history=history)
        for user, history in found
        if len(history) > LAST_EVENTS
    ]


def request(sample: Sample, cut: int, now_ms: int | None) -> Request:
    options = RecommendOptions(now_ms=now_ms, candidates=CANDIDATES)
    return Request(history=sample.events[:cut], k=TOP, options=options, user=sample.user)


def rank(recommender: Recommender, asked: ResolvedRequest, rows: NDArray[np.int64] | None) -> Answer:
    """Logits [k, C] of given rows, or of those that retrieval finds, through the cache; they are returned as well."""
    with recommender.encoder.look_up([asked]) as found, recommender.encoder.encoding(found) as encoded:
        if rows is None:
            query = recommender.engine.retrieve(encoded, asked.outcomes[None])[0]
            search = Search(queries=query, k=asked.candidates, excluded=asked.excluded)
            rows = recommender.retriever.retrieve([search])[0].rows
        now = np.array([asked.surface]), np.array([asked.now_ms])
        logits = recommender.engine.rank(encoded, rows[None], *now)[0]
    return rows, logits


def top(recommender: Recommender, sample: Sample) -> tuple[str, ...]:
    """The ten best, after the cache was given a beginning of the history."""
    now_ms = sample.events[-1].timestamp_ms
    recommender.recommend_many([request(sample, len(sample.events) - LAST_EVENTS + 1, now_ms)])
    slate = recommender.recommend_many([request(sample, len(sample.events), now_ms)])[0]
    assert slate.kv == "extended", slate.kv_reason
    return tuple(item.item for item in slate.items)


def last_events(recommender: Recommender, sample: Sample) -> NDArray[np.float32]:
    """Logits [last events, C] of each of the last events, from those before it; all but the first are extensions."""
    count, logits = len(sample.events), []
    for cut in range(count - LAST_EVENTS, count):
        asked = recommender.resolve(request(sample, cut, sample.events[cut].timestamp_ms))
        row = recommender.bundle.rows[str(sample.events[cut].item)]
        logits.append(rank(recommender, asked, np.array([row]))[1][0])
    return np.stack(logits)


def quality(path: Path, users: int) -> dict[str, dict[str, Any]]:
    """Every precision against fp32 on the bundle's sample users."""
    plain = Recommender.load(path)
    chosen = samples(plain.bundle, users)
    asked = [plain.resolve(request(s, len(s.events), s.events[-1].timestamp_ms)) for s in chosen]
    expected = [rank(plain, one, None) for one in asked]
    results: dict[str, dict[str, Any]] = {}
    best: list[set[str]] = []
    for dtype in KV_DTYPES:
        cached = Recommender.load(path, cache=CacheOptions(budget_bytes=GIB // 4, dtype=dtype))
        scored = [last_events(cached, sample) for sample in chosen]
        assert cached.cache is not None
        cached.cache.clear()
        tops = [set(top(cached, sample)) for sample in chosen]
        best = best or tops
        changes = [np.abs(rank(cached, a, rows)[1] - logits) for a, (rows, logits) in zip(asked, expected, strict=True)]
        results[dtype] = {
            "top10_overlap": float(np.mean([len(a & b) / TOP for a, b in zip(tops, best, strict=True)])),
            "users_with_another_top10": sum(a != b for a, b in zip(tops, best, strict=True)),
            "largest_logit_change": float(max(change.max() for change in changes)),
            "p99_logit_change": float(np.percentile(np.concatenate([change.ravel() for change in changes]), 99)),
            "auc": auc_by_action(plain.bundle.manifest.actions, [sample.history for sample in chosen], scored),
            "users": len(chosen),
            "users_per_gib": round(len(chosen) * GIB / cached.cache.statistics().bytes_used),
        }
    return results


def latency(rounds: int) -> dict[KvDtype, dict[str, float]]:
    """Reading and storing one history of the `small` size, all precisions in turn."""
    tensors, heads, dim = 2 * SMALL.num_layers, SMALL.num_kv_heads, SMALL.head_dim
    history = list(np.random.default_rng(0).standard_normal((tensors, heads, SLOTS, dim), np.float32))
    ways: dict[KvDtype, KvPages] = {}
    for dtype in KV_DTYPES:
        geometry = KvGeometry(tensors=tensors, heads=heads, head_dim=dim, dtype=dtype)
        ways[dtype] = KvPages(geometry, geometry.pages_for(SLOTS))
    times: dict[KvDtype, tuple[list[float], list[float]]] = {dtype: ([], []) for dtype in ways}
    out = np.empty((tensors, heads, SLOTS, dim), np.float32)
    for _ in range(rounds + 1):
        for dtype, pages in ways.items():
            order = list(range(pages.count))
            began = time.perf_counter()
            pages.write(order, 0, history)
            written = time.perf_counter()
            pages.read(order, SLOTS, out)
            times[dtype][0].append((written - began) * 1e3)
            times[dtype][1].append((time.perf_counter() - written) * 1e3)
    return {
        dtype: {
            "write_ms": round(float(np.median(writes[1:])), 3),
            "read_ms": round(float(np.median(reads[1:])), 3),
            "users_per_gib": GIB // ways[dtype].nbytes,
        }
        for dtype, (writes, reads) in times.items()
    }


def main() -> None:
    """Measure quality on the bundle and latency on the small size; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    small, real = latency(options.rounds), quality(options.bundle, options.users)
    finish({**card("kv_precision"), "small_992_events": small, "bundle": real}, "kv_precision")


if __name__ == "__main__":
    main()
