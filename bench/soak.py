"""Hours of random use of the cache by several threads: are the answers right, and does memory stay constant?

    python bench/soak.py BUNDLE [--minutes 60] [--threads 3] [--users 400] [--budget-mib 8] [--dtype fp32]

BUNDLE is any bundle. Threads pick users at random and come back with a few more events, the same history, an edited or
a shortened one, histories beyond the model's limit, several users at once, or have a user or everyone forgotten. The
budget is too small for all users. All are asked for the same twenty items, so that no near tie decides who is answered
about; one answer in `--check` is compared with that of a recommender without a cache: scores and similarities within
1e-4 in fp32, 0.02 otherwise. Whether that could have failed depends on the model: `one_event_changes` is how far they
move when one item of a history is another, the median of 100 users. Resident memory is read once a second; all users
have a history from the start, so that it does not grow by those.

Exits with 1 if an answer was wrong, an operation failed, the books do not add up, or memory grew by more than 1 % of
its size after the first tenth of the time; in less than ten minutes that is still the allocators' warming up.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from common import card, finish

from unipinrec.runtime import CacheOptions, Event, KvCache, Recommender, RecommendOptions, Request, Slate, SlateItem
from unipinrec.runtime.kv.encoder import HistoryEncoder

START_MS, HOUR_MS, ITEMS = 1_700_000_000_000, 3_600_000, 20
ACTIONS = ("append", "again", "edit", "truncate", "long", "batch", "invalidate", "clear")
CHANCES = (0.5, 0.2, 0.08, 0.06, 0.05, 0.08, 0.029, 0.001)


class Soak:
    """The load, and its failures."""

    def __init__(self, recommender: Recommender, options: argparse.Namespace) -> None:
        self.fresh = recommender
        model = recommender.bundle.manifest.model
        cache = KvCache(model, CacheOptions(budget_bytes=options.budget_mib << 20, dtype=options.dtype, ttl_s=30.0))
        self.cache, encoder = (
            cache,
            HistoryEncoder(recommender.engine, cache, recommender.bundle.kv_namespace, recommender.bundle.kv_item_keys),
        )
        self.cached = dataclasses.replace(recommender, encoder=encoder)
        self.tolerance = 1e-4 if options.dtype == "fp32" else 2e-2
        self.check, self.end = options.check, time.monotonic() + 60 * options.minutes
        self.users, self.counts, self.lock = options.users, Counter[str](), threading.Lock()
        self.failures: list[str] = []
        rng, longest = np.random.default_rng(0), model.max_history + model.max_history // 2
        self.histories = {user: self._events((), int(rng.integers(1, longest)), rng) for user in range(self.users)}

    def work(self, seed: int) -> None:
        """One thread's share."""
        rng = np.random.default_rng(seed)
        while time.monotonic() < self.end and not self.failures:
            action = str(rng.choice(ACTIONS, p=CHANCES))
            try:
                self._step(action, rng)
            except Exception as error:  # any failure must show in the result
                self.failures.append(f"{action}: {error!r}")
            with self.lock:
                self.counts[action] += 1

    def _step(self, action: str, rng: np.random.Generator) -> None:
        user = int(self.users * rng.random() ** 2)  # some users come more often
        if action == "invalidate":
            self.cache.invalidate(f"user-{user}")
        elif action == "clear":
            self.cache.clear()
        elif action == "batch":
            self._ask([(int(other), "append") for other in rng.integers(0, self.users, 6)], rng)
        else:
            self._ask([(user, action)], rng)

    def _ask(self, users: list[tuple[int, str]], rng: np.random.Generator) -> None:
        requests = []
        for user, action in users:
            self.histories[user] = self._next(self.histories[user], action, rng)
            requests.append(self._request(self.histories[user], f"user-{user}"))
        slates = self.cached.recommend_many(requests)
        for request, slate in zip(requests, slates, strict=True):
            with self.lock:
                self.counts[slate.kv] += 1
            if rng.random() < 1 / self.check:
                self._compare(request, slate)

    def _request(self, history: tuple[Event, ...], user: str | None) -> Request:
        ids, now_ms = self.fresh.bundle.item_ids, (history[-1].timestamp_ms or 0) + HOUR_MS
        asked = tuple(ids[index] for index in np.linspace(0, len(ids) - 1, min(ITEMS, len(ids)), dtype=int))
        options = RecommendOptions(now_ms=now_ms, candidates=len(asked), allow=asked, exclude_seen=False)
        return Request(history=history, k=len(asked), options=options, user=user)

    def _next(self, history: tuple[Event, ...], action: str, rng: np.random.Generator) -> tuple[Event, ...]:
        limit = self.fresh.bundle.manifest.model.max_history
        if action == "edit":
            return self._edited(history, rng)
        if action == "truncate" and len(history) > 1:
            return history[: int(rng.integers(1, len(history)))]
        if action == "again":
            return history
        count = limit if action == "long" and len(history) < limit else int(rng.integers(1, 6))
        if len(history) > limit + limit // 2:
            history = ()
        return (*history, *self._events(history, count, rng))

    def _edited(self, history: tuple[Event, ...], rng: np.random.Generator) -> tuple[Event, ...]:
        index, other = int(rng.integers(len(history))), str(rng.choice(self.fresh.bundle.item_ids))
        return (*history[:index], msgspec.structs.replace(history[index], item=other), *history[index + 1 :])

    def _events(self, history: tuple[Event, ...], count: int, rng: np.random.Generator) -> tuple[Event, ...]:
        names, ids = self.fresh.bundle.manifest.actions, self.fresh.bundle.item_ids
        last = (history[-1].timestamp_ms or 0) if history else START_MS
        return tuple(
            Event(
                item=ids[int(rng.integers(len(ids)))],
                actions=tuple(name for name in names if rng.random() < 0.3),
                timestamp_ms=last + (index + 1) * 60_000,
            )
            for index in range(count)
        )

    def one_event_changes(self) -> float:
        """How far the scores of a user move when one item of the history is another."""
        rng, moved = np.random.default_rng(1), []
        for history in list(self.histories.values())[:100]:
            known = history[-self.fresh.bundle.manifest.model.max_history :]
            both = [self.fresh.recommend_many([self._request(h, None)])[0] for h in (known, self._edited(known, rng))]
            moved.append(_difference(*both))
        return float(np.median(moved))

    def _compare(self, request: Request, slate: Slate) -> None:
        worst = _difference(slate, self.fresh.recommend_many([request])[0])
        with self.lock:
            self.counts["compared"] += 1
            if not worst <= self.tolerance:
                self.failures.append(f"{request.user}: {slate.kv} ({slate.kv_reason}) differs by {worst}")


def _difference(slate: Slate, expected: Slate) -> float:
    """Of the scores and similarities of the same items."""
    found = {item.item: item for item in slate.items}
    pairs = [(found[item.item], item) for item in expected.items]
    return max(abs(a - b) for one, two in pairs for a, b in zip(_scores(one), _scores(two), strict=True))


def _scores(item: SlateItem) -> tuple[float, float]:
    assert item.retrieval_score is not None  # every request here has a history
    return item.score, item.retrieval_score


def resident_mib() -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) / 1024


def run(soak: Soak, threads: int) -> list[float]:
    """Let the threads work; resident MiB once a second, and the books checked each time."""
    workers = [threading.Thread(target=soak.work, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    samples = []
    while any(worker.is_alive() for worker in workers):
        samples.append(resident_mib())
        soak.cache.check_integrity()
        time.sleep(1.0)
    for worker in workers:
        worker.join()
    soak.cache.check_integrity()
    return samples


def memory(samples: list[float]) -> dict[str, Any]:
    """Growth after the first tenth, as a straight line through all samples."""
    warm = np.array(samples[len(samples) // 10 :])
    slope = float(np.polyfit(np.arange(len(warm)), warm, 1)[0]) if len(warm) > 1 else 0.0
    return {
        "start_mib": round(samples[0], 1),
        "warm_mib": round(float(warm[0]), 1),
        "largest_mib": round(max(samples), 1),
        "end_mib": round(samples[-1], 1),
        "growth_after_warm_up_mib": round(slope * len(warm), 2),
        "growth_share": round(slope * len(warm) / float(warm.mean()), 5),
    }


def main() -> None:
    """Soak; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--users", type=int, default=400)
    parser.add_argument("--budget-mib", type=int, default=8)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--check", type=int, default=20)
    options = parser.parse_args()
    soak = Soak(Recommender.load(options.bundle), options)
    changes = soak.one_event_changes()
    grown = memory(run(soak, options.threads))
    books = soak.cache.statistics()
    document = {
        **card("soak"),
        "minutes": options.minutes,
        "threads": options.threads,
        "users": options.users,
        "dtype": options.dtype,
        "operations": {name: soak.counts[name] for name in ACTIONS},
        "answers": {name: soak.counts[name] for name in ("hit", "extended", "miss")},
        "compared": soak.counts["compared"],
        "one_event_changes": changes,
        "failures": soak.failures,
        "memory": grown,
        "cache": dataclasses.asdict(books),
    }
    finish(document, "soak")
    within = books.bytes_high_water <= books.bytes_budget and books.pinned == 0
    sys.exit(0 if within and not soak.failures and grown["growth_share"] < 0.01 else 1)


if __name__ == "__main__":
    main()
