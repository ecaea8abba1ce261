"""Real arrivals replayed: one model with a cache for 30 % of the users against two models, on the same requests.

    python bench/replay.py DATA [--users 400] [--candidates 128] [--share 0.3]

DATA is prepared KuaiRand (`unipinrec prepare kuairand`). A request begins where a user comes back after 30 minutes or
more; its history is all earlier events of the user, at the times of the log, so that histories and returns are real.
The model is of the `small` size with random weights over the real catalogue. The first half of the requests warms
the cache, the second is timed, each request on both sides, in turn. The cache may hold `--share` of the pages that all
users need in the end.

`two models` encodes every history twice (see `bench/serving.py`). Throughput is requests over time of each side; the
limit is the throughput if every request were a hit that takes no time to read.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import card, finish, spread
from serving import as_two_models, with_threads
from synthetic import ACTIONS, random_bundle

from unipinrec.models.data.schema import read_dataset
from unipinrec.models.data.sequences import Sequences, sequences_of
from unipinrec.runtime import CacheOptions, Event, Recommender, RecommendOptions, Request, Slate
from unipinrec.runtime.bundle.quality import DEFAULT_KV_DTYPE
from unipinrec.runtime.kv.pages import KvGeometry

PAUSE_MS = 30 * 60_000


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """User `user` asks at `now_ms`, having done the first `count` of their events."""

    now_ms: int
    user: int
    count: int


def arrivals_of(data: Sequences, users: list[int]) -> list[Arrival]:
    """Returns after a pause, in order of time."""
    found = []
    for user in users:
        times = data.timestamps_ms[data.event_start[user] : data.event_start[user + 1]]
        for count in np.flatnonzero(np.diff(times) >= PAUSE_MS) + 1:
            if times[count - 1] >= 0:
                found.append(Arrival(now_ms=int(times[count]), user=user, count=int(count)))
    return sorted(found, key=lambda arrival: arrival.now_ms)


def events_of(data: Sequences, user: int) -> tuple[Event, ...]:
    span = slice(data.event_start[user], data.event_start[user + 1])
    return tuple(
        Event(
            item=str(row),
            actions=tuple(name for name, bit in zip(ACTIONS, bits, strict=False) if bit),
            timestamp_ms=None if time_ms < 0 else int(time_ms),
        )
        for row, bits, time_ms in zip(
            data.rows[span].tolist(), data.actions[span], data.timestamps_ms[span].tolist(), strict=True
        )
    )


def sides(path: Path, threads: int, budget_bytes: int) -> tuple[Recommender, Recommender]:
    cached = with_threads(Recommender.load(path, cache=CacheOptions(budget_bytes=budget_bytes)), threads)
    return as_two_models(with_threads(Recommender.load(path), threads)), cached


def answered(side: Recommender, request: Request) -> tuple[float, Slate]:
    """Milliseconds and slate of one request."""
    began = time.perf_counter()
    slate = side.recommend_many([request])[0]
    return (time.perf_counter() - began) * 1e3, slate


def replay(
    baseline: Recommender, cached: Recommender, requests: list[Request]
) -> tuple[list[tuple[float, float]], list[Slate]]:
    """Milliseconds of each request of the second half, two models and cache, and the cache's slates."""
    warm, times, slates = len(requests) // 2, [], []
    for request in requests[:warm]:
        cached.recommend_many([request])
    for index, request in enumerate(requests[warm:]):
        order = (cached, baseline) if index % 2 else (baseline, cached)
        answers = {id(side): answered(side, request) for side in order}
        times.append((answers[id(baseline)][0], answers[id(cached)][0]))
        slates.append(answers[id(cached)][1])
    return times, slates


def summary(times: list[tuple[float, float]], slates: list[Slate]) -> dict[str, Any]:
    two, one = np.array(times).T
    kinds: dict[str, list[int]] = defaultdict(list)
    for index, slate in enumerate(slates):
        kinds[slate.kv if slate.kv != "miss" else f"miss: {slate.kv_reason}"].append(index)
    encode = [slate.stages_ms.encode for slate in slates]
    return {
        "throughput_ratio": round(float(two.sum() / one.sum()), 3),
        "requests_per_second": {
            "two models": round(1e3 / float(two.mean()), 1),
            "cache": round(1e3 / float(one.mean()), 1),
        },
        "limit": round(float(two.sum() / (one.sum() - sum(encode))), 3),
        "hit_rate": round(sum(slate.kv != "miss" for slate in slates) / len(slates), 4),
        "by_kind": {
            kind: {
                "share": round(len(indices) / len(slates), 4),
                "ms": spread(one[indices].tolist()),
                "two_models_ms": spread(two[indices].tolist()),
            }
            for kind, indices in sorted(kinds.items())
        },
    }


def main() -> None:
    """Replay; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--users", type=int, default=400)
    parser.add_argument("--candidates", type=int, default=128)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    data = sequences_of(read_dataset(options.data))
    everyone = np.random.default_rng(0).permutation(len(data.user_ids)).tolist()
    users = [user for user in everyone if data.event_start[user + 1] > data.event_start[user]][: options.users]
    arrivals, events = arrivals_of(data, users), {user: events_of(data, user) for user in users}
    requests = [
        Request(
            history=events[arrival.user][: arrival.count],
            options=RecommendOptions(now_ms=arrival.now_ms, candidates=options.candidates),
            user=str(arrival.user),
        )
        for arrival in arrivals
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = random_bundle(Path(folder) / "bundle", len(data.item_ids))
        model = Recommender.load(path).bundle.manifest.model
        geometry = KvGeometry.of(model, DEFAULT_KV_DTYPE)
        last = {arrival.user: arrival.count for arrival in arrivals}
        slots = [min(count, model.max_history) + model.kv_prefix_slots for count in last.values()]
        needed = sum(geometry.pages_for(count) for count in slots)
        baseline, cached = sides(path, options.threads, int(needed * options.share) * geometry.page_bytes)
        result = summary(*replay(baseline, cached, requests))
        assert cached.cache is not None
        cached.cache.check_integrity()
        books = cached.cache.statistics()
    lengths = [len(request.history) for request in requests]
    document = {
        **card("replay"),
        "users": len(users),
        "requests": len(requests),
        "candidates": options.candidates,
        "history": {"mean": round(float(np.mean(lengths)), 1), **spread(lengths)},
        "budget_share_of_pages": options.share,
        "dtype": geometry.dtype,
        "bytes": {"budget": books.bytes_budget, "high_water": books.bytes_high_water, "beside": books.bytes_beside},
        "evictions": books.evictions,
        "threads": options.threads,
    }
    finish({**document, **result}, "replay")


if __name__ == "__main__":
    main()
