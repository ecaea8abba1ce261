"""Concurrent requests with and without batching: throughput, latency and padding.

    python bench/batching.py [--clients 16] [--seconds 5] [--threads 2] [--rounds 5]

Card: the `tiny` and the `small` size with random weights over 10,000 items, k = 128, no cache; histories as long as
those of KuaiRand-Pure (10th to 90th percentile 8 to 66, `bench/kv_pages.py`). `--clients` threads each send the next
request once they have their answer. Ways, in turn for `--seconds` each, `--rounds` times:

    alone     each thread calls `Recommender.recommend` itself
    batched   all threads go through one `Batcher`
    two       the same with two batches at a time, as in the server

`padding_waste` is the share of padding in the computed slots, by stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import card, finish, spread
from serving import with_threads
from synthetic import random_bundle, random_events, request

from unipinrec.models.config import SMALL, TINY
from unipinrec.runtime import Batcher, BatchOptions, Recommender, Request

ITEMS, CANDIDATES, REQUESTS = 10_000, 128, 400
LENGTHS = {"median": 39.0, "sigma": 0.8}


def requests_of(longest: int) -> list[Request]:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(LENGTHS["median"]), LENGTHS["sigma"], REQUESTS), 1, longest).astype(int)
    return [request(random_events(int(n), ITEMS, seed), CANDIDATES) for seed, n in enumerate(lengths)]


def load(answer: Callable[[Request], object], requests: list[Request], clients: int, seconds: float) -> list[float]:
    """Milliseconds of every request that starts within `seconds`."""
    took: list[float] = []
    end = time.perf_counter() + seconds

    def client(first: int) -> None:
        index = first
        while (began := time.perf_counter()) < end:
            answer(requests[index % len(requests)])
            took.append((time.perf_counter() - began) * 1e3)
            index += clients

    threads = [threading.Thread(target=client, args=(index,)) for index in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took


def row(name: str, recommender: Recommender, options: argparse.Namespace) -> dict[str, Any]:
    requests = requests_of(recommender.bundle.manifest.model.max_history)
    rates: dict[str, list[float]] = {"alone": [], "batched": [], "two": []}
    latencies: dict[str, list[float]] = {"alone": [], "batched": [], "two": []}
    with Batcher(recommender, BatchOptions()) as batcher, Batcher(recommender, BatchOptions(workers=2)) as two:
        ways: dict[str, Callable[[Request], object]] = {
            "alone": lambda asked: recommender.recommend_many([asked]),
            "batched": batcher.recommend,
            "two": two.recommend,
        }
        for turn in range(options.rounds + 1):
            for way, answer in ways.items():
                took = load(answer, requests, options.clients, options.seconds if turn else 1.0)
                if turn:
                    rates[way].append(len(took) / options.seconds)
                    latencies[way] += took
        books = batcher.statistics()
    ratios = [b / a for a, b in zip(rates["alone"], rates["batched"], strict=True)]
    of_two = [b / a for a, b in zip(rates["batched"], rates["two"], strict=True)]
    return {
        "model": name,
        "requests_per_second": {way: spread(values) for way, values in rates.items()},
        "batched_over_alone": spread(ratios),
        "two_over_batched": spread(of_two),
        "latency_ms": {
            way: dict(zip(("p50", "p95", "p99"), np.percentile(values, [50, 95, 99]).round(2).tolist(), strict=True))
            for way, values in latencies.items()
        },
        "mean_batch": round(books.requests / books.batches, 2),
        "batching": dataclasses.asdict(books),
        "padding_waste": {stage: round(p.waste, 4) for stage, p in recommender.padding().items()},
    }


def main() -> None:
    """Load all ways; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, size in (("tiny", TINY), ("small", SMALL)):
            path = random_bundle(Path(folder) / name, ITEMS, size)
            rows.append(row(name, with_threads(Recommender.load(path), options.threads), options))
    document = {**card("batching"), "clients": options.clients, "seconds": options.seconds, "threads": options.threads}
    finish({**document, "rounds": options.rounds, "rows": rows}, "batching")


if __name__ == "__main__":
    main()
