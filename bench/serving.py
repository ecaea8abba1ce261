"""One shared encode against two models, cold and returning users, end to end: the figures of merit.

    python bench/serving.py [--rounds 31] [--threads 2] [--items 100000] [--bundle FOLDER]

Card: the `small` size (4 layers, d = 256, 8 heads of 32) with random weights, one user of 992 events per request,
k = 128 and 656 candidates from hnswlib over 100,000 items, ONNX Runtime. All ways run in one process, interleaved round
by round, through `Recommender.recommend_many`, checks and assembly of the answer included:

    two models   the history is encoded once for retrieval and once more for ranking, as two models of this size would;
                 the same engine, threads, graphs and code otherwise
    cold         one encode serves both, nothing is cached or kept
    cold kept    the same, and the keys and values go into the cache
    returning    984 of the events are in the cache, 8 are new
    again        all 992 are

Limits computed from the stage times e (encode), r (rank), t (retrieve) and o (all else) of the same run:
(2e + t + r + o) / (e + t + r + o) for a cold user, and (2e + t + r + o) / (t + r + o) for a returning one if extending
took no time at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import card, finish, interleaved, ratio, spread
from numpy.typing import NDArray
from synthetic import random_bundle, random_events, request

from unipinrec.runtime import CacheOptions, KvCache, Recommender, Slate
from unipinrec.runtime.graphs.engine import Encoded, Engine, HistoryBatch
from unipinrec.runtime.graphs.ort_cpu import OrtBackend
from unipinrec.runtime.kv.encoder import HistoryEncoder

EVENTS, NEW, CANDIDATES = 992, 8, (128, 656)


class TwoModels(Engine):
    """Encodes a history once more before it ranks, as a ranking model of its own would."""

    def prefill(self, batch: HistoryBatch) -> Encoded:
        self.batch = batch
        return super().prefill(batch)

    def rank(
        self,
        encoded: Encoded,
        candidates: NDArray[np.int64],
        surfaces: NDArray[np.int64],
        now_ms: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        return super().rank(super().prefill(self.batch), candidates, surfaces, now_ms)


def with_threads(recommender: Recommender, threads: int) -> Recommender:
    """The same recommender on ONNX Runtime with so many threads."""
    bundle, model = recommender.bundle, recommender.bundle.manifest.model
    engine = Engine(OrtBackend(bundle.graph_files(), threads), model, bundle.item_vectors)
    return with_engine(recommender, engine, recommender.cache)


def as_two_models(recommender: Recommender) -> Recommender:
    engine = recommender.engine
    return with_engine(recommender, TwoModels(engine.backend, engine.model, engine.item_vectors), None)


def with_engine(recommender: Recommender, engine: Engine, cache: KvCache | None) -> Recommender:
    encoder = HistoryEncoder(engine, cache, recommender.bundle.kv_namespace, recommender.bundle.kv_item_keys)
    return dataclasses.replace(recommender, engine=engine, encoder=encoder)


def row(plain: Recommender, cached: Recommender, candidates: int, rounds: int) -> dict[str, Any]:
    """All ways at one number of candidates."""
    events = random_events(EVENTS, len(plain.bundle.item_ids), seed=candidates)
    baseline, cache = as_two_models(plain), cached.cache
    assert cache is not None
    stages: dict[str, list[Slate]] = {}

    def ask(name: str, recommender: Recommender, count: int, kind: str, user: str | None = None) -> None:
        slate = recommender.recommend_many([request(events[:count], candidates, user)])[0]
        assert slate.kv == kind, (name, slate.kv, slate.kv_reason)
        stages.setdefault(name, []).append(slate)

    def returning() -> None:
        ask("returning", cached, EVENTS, "extended", "returning")

    def forget() -> None:
        cache.invalidate("returning")
        cache.invalidate("cold")
        cached.recommend_many([request(events[: EVENTS - NEW], candidates, "returning")])

    ways = {
        "two models": lambda: ask("two models", baseline, EVENTS, "miss"),
        "cold": lambda: ask("cold", plain, EVENTS, "miss"),
        "forget": forget,
        "cold kept": lambda: ask("cold kept", cached, EVENTS, "miss", "cold"),
        "returning": returning,
        "again": lambda: ask("again", cached, EVENTS, "hit", "returning"),
    }
    times = interleaved(ways, rounds)
    del times["forget"]
    return {
        "k": candidates,
        "ms": {name: spread(values) for name, values in times.items()},
        "stages_ms": {name: _stages(slates[1:]) for name, slates in stages.items()},
        "two_models_over": {name: ratio(times, "two models", name) for name in times if name != "two models"},
        "returning_share_of_two_models": ratio(times, "returning", "two models"),
        "limits": _limits(stages["cold"][1:], times["cold"]),
    }


def _stages(slates: list[Slate]) -> dict[str, float]:
    return {
        name: round(float(np.median([getattr(slate.stages_ms, name) for slate in slates])), 3)
        for name in ("encode", "retrieve", "rank")
    }


def _limits(slates: list[Slate], totals: list[float]) -> dict[str, float]:
    stages = _stages(slates)
    rest = float(np.median(totals)) - stages["encode"]
    return {
        "cold": round((2 * stages["encode"] + rest) / (stages["encode"] + rest), 3),
        "returning": round((2 * stages["encode"] + rest) / rest, 3),
    }


def main() -> None:
    """Time all ways; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--bundle", type=Path, help="reuse, or write, the synthetic bundle here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = random_bundle(options.bundle or Path(folder) / "bundle", options.items)
        plain = with_threads(Recommender.load(path), options.threads)
        cached = with_threads(Recommender.load(path, cache=CacheOptions(budget_bytes=1 << 27)), options.threads)
        rows = [row(plain, cached, candidates, options.rounds) for candidates in CANDIDATES]
        index = plain.bundle.manifest.index
    document = {**card("serving"), "events": EVENTS, "new_events": NEW, "items": options.items, "batch": 1}
    assert index is not None
    found = {"ef_search": index.ef_search, "recall_at_100": index.recall}
    finish({**document, "index": found, "threads": options.threads, "rounds": options.rounds, "rows": rows}, "serving")


if __name__ == "__main__":
    main()
