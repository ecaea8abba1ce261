"""How cost grows: events doubled, candidates doubled, items times ten, new events doubled.

    python bench/growth.py [--rounds 31] [--threads 2]

Card: the `small` size with random weights, one user per request, ONNX Runtime, int8 cache, hnswlib. Each row has the
median of its stages; `exponent` is that of the last doubling (or tenfold): 1 is linear, 2 quadratic. Only the
encoder's attention may grow faster than linearly: it is n x n.

`long history`: a user beyond the model's limit of 992 events comes back with one new event at a time, until the window
has moved twice (by 124 events). `moved` are the requests that were encoded anew, and what one such request costs spread
over all of them.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import card, finish, interleaved
from serving import with_threads
from synthetic import random_bundle, random_events, request

from unipinrec.runtime import CacheOptions, Recommender, Request, Slate
from unipinrec.runtime.validation import default_slack

EVENTS = (31, 62, 124, 248, 496, 992)
CANDIDATES = (64, 128, 256, 512, 1024)
NEW = (1, 2, 4, 8, 16, 32, 64, 128)
ITEMS = (1_000, 10_000, 100_000)
STAGES = ("encode", "retrieve", "rank", "total")


def curve(
    recommender: Recommender, points: dict[int, Request], rounds: int, before: dict[int, Request] | None = None
) -> dict[int, dict[str, float]]:
    """Median stage times of each request; the request `before` comes first each time, with an empty cache."""
    slates: dict[int, list[Slate]] = {point: [] for point in points}

    def ask(point: int) -> None:
        if before is not None and recommender.cache is not None:
            recommender.cache.clear()
            recommender.recommend_many([before[point]])
        slates[point] += recommender.recommend_many([points[point]])

    interleaved({str(point): partial(ask, point) for point in points}, rounds)
    return {
        point: {
            stage: round(float(np.median([getattr(slate.stages_ms, stage) for slate in found[1:]])), 3)
            for stage in STAGES
        }
        for point, found in slates.items()
    }


def exponents(curve: dict[int, dict[str, float]]) -> dict[str, float]:
    """log(cost ratio) / log(size ratio) of the last two points."""
    (small, low), (large, high) = list(curve.items())[-2:]
    return {stage: round(math.log(high[stage] / low[stage]) / math.log(large / small), 2) for stage in STAGES}


def with_exponents(points: dict[int, dict[str, float]]) -> dict[str, Any]:
    return {"ms": points, "exponent": exponents(points)}


def long_history(recommender: Recommender) -> dict[str, float]:
    """Requests of a user beyond the limit, each with one new event."""
    model = recommender.bundle.manifest.model
    limit, slack = model.max_history, default_slack(model)
    events, cache = random_events(limit + 2 * slack + 1, len(recommender.bundle.item_ids), 1), recommender.cache
    assert cache is not None
    cache.clear()
    recommender.recommend_many([request(events[: limit + 1], 128, "long")])
    slates = [
        recommender.recommend_many([request(events[:count], 128, "long")])[0]
        for count in range(limit + 2, len(events) + 1)
    ]
    moved = [slate.stages_ms.encode for slate in slates if slate.kv_reason == "shifted"]
    extended = [slate.stages_ms.encode for slate in slates if slate.kv == "extended"]
    assert len(moved) + len(extended) == len(slates)
    return {
        "limit": limit,
        "slack": slack,
        "requests": len(slates),
        "moved": len(moved),
        "moved_encode_ms": round(float(np.median(moved)), 3),
        "extended_encode_ms": round(float(np.median(extended)), 3),
        "moved_encode_ms_per_request": round(sum(moved) / len(slates), 3),
    }


def main() -> None:
    """Draw all curves; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rounds = options.rounds
    with tempfile.TemporaryDirectory() as folder:
        opened = {
            items: with_threads(
                Recommender.load(
                    random_bundle(Path(folder) / str(items), items), cache=CacheOptions(budget_bytes=1 << 26)
                ),
                options.threads,
            )
            for items in ITEMS
        }
        middle, events = opened[ITEMS[1]], random_events(992, ITEMS[1], 0)
        short = random_events(248, ITEMS[0], 0)
        curves = {
            "events": curve(middle, {n: request(events[:n], 128) for n in EVENTS}, rounds),
            "candidates": curve(middle, {k: request(events, k) for k in CANDIDATES}, rounds),
            "new events": curve(
                middle,
                {m: request(events, 128, "user") for m in NEW},
                rounds,
                {m: request(events[:-m], 128, "user") for m in NEW},
            ),
            "items": {
                items: curve(recommender, {items: request(short, 128)}, rounds)[items]
                for items, recommender in opened.items()
            },
        }
        moving = long_history(middle)
    document = {**card("growth"), "threads": options.threads, "rounds": rounds, "long history": moving}
    finish({**document, "curves": {name: with_exponents(points) for name, points in curves.items()}}, "growth")


if __name__ == "__main__":
    main()
