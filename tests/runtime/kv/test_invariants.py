"""The five invariants with the cache on: a request has the answer of a fresh encode, whatever the cache holds."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unipinrec.errors import ConfigError
from unipinrec.runtime import CacheOptions, Event, KvCache, Recommender, RecommendOptions, Request, Slate
from unipinrec.runtime.bundle.quality import KvDtype
from unipinrec.runtime.graphs.engine import Engine
from unipinrec.runtime.kv.encoder import HistoryEncoder
from unipinrec.runtime.kv.pages import KV_DTYPES

TOLERANCE = (
    1e-4  # of logits; the largest difference of 2,000 histories is 1.3e-6, the smallest that one event makes 1e-3
)
# The largest difference of 2,000 int8 histories is 0.016, whether they were extended or new.
LOGITS: dict[KvDtype, float] = {"fp32": TOLERANCE, "fp16": 0.003, "bf16": 0.03, "int8": 0.03}
MAX_EVENTS, SLACK, LONGEST = 64, 4, 84
HOUR_MS, T = 3_600_000, 1_760_000_000_000
USERS, THREADS, OPERATIONS = 24, 4, 10_000
SHARES = np.array([3.0] * 6 + [1.0] * 18) / 36  # a few users are asked for by several threads at once
BUDGET_BYTES = 32 * 16 * 1024  # 32 pages of 16 slots of 1,024 bytes: half of what all users would take
REASONS = {"new", "edited", "truncated", "shifted", "version", "evicted", "expired", "invalidated"}
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**31)
cuts = st.lists(st.integers(1, MAX_EVENTS), min_size=1, max_size=4)
History = tuple[Event, ...]


@pytest.fixture(scope="module")
def fresh(lively: Path) -> Recommender:
    return Recommender.load(lively, window_slack=SLACK)


def cached(fresh: Recommender, dtype: KvDtype, budget_bytes: int = 1 << 22) -> Recommender:
    """The same recommender with a cache."""
    model = fresh.bundle.manifest.model
    return with_cache(fresh, KvCache(model, CacheOptions(budget_bytes=budget_bytes, dtype=dtype)))


def with_cache(recommender: Recommender, cache: KvCache | None, namespace: str = "one") -> Recommender:
    return replace(
        recommender, encoder=HistoryEncoder(recommender.engine, cache, namespace, recommender.bundle.kv_item_keys)
    )


class Histories:
    """Random events of a bundle; whatever is changed of one shows in the logits."""

    def __init__(self, recommender: Recommender, seed: int) -> None:
        self.rng, self.bundle = np.random.default_rng(seed), recommender.bundle

    def event(self, time_ms: int) -> Event:
        manifest, rng = self.bundle.manifest, self.rng
        return Event(
            item=self.bundle.item_ids[rng.integers(len(self.bundle.item_ids))],
            actions=tuple(action for action in manifest.actions if rng.random() < 0.4),
            surface=manifest.surfaces[rng.integers(len(manifest.surfaces))],
            timestamp_ms=time_ms,
        )

    def grown(self, history: History, count: int) -> History:
        """The history and so many further events."""
        for _ in range(count):
            last = history[-1].timestamp_ms if history else T
            assert last is not None
            history = (*history, self.event(last + int(self.rng.integers(1, 30)) * HOUR_MS))
        return history

    def edited(self, history: History, index: int) -> History:
        """The history with another item, action, surface or time at a place."""
        event, manifest = history[index], self.bundle.manifest
        before = history[index - 1].timestamp_ms if index else T - 24 * HOUR_MS
        assert event.timestamp_ms is not None
        assert before is not None
        toggled = manifest.actions[self.rng.integers(len(manifest.actions))]
        others = [surface for surface in manifest.surfaces if surface != event.surface]
        changes: list[dict[str, Any]] = [
            {"item": next(item for item in self.bundle.item_ids[self.rng.integers(200) :] if item != event.item)},
            {"actions": tuple(a for a in manifest.actions if (a in event.actions) != (a == toggled))},
            {"surface": others[self.rng.integers(len(others))]},
            {"timestamp_ms": (before + event.timestamp_ms) // 2},
        ]
        changed = msgspec.structs.replace(event, **changes[self.rng.integers(4)])
        return (*history[:index], changed, *history[index + 1 :])


def request(recommender: Recommender, history: History, user: str | None = None) -> Request:
    """Asks for the scores of the same twenty items, whoever asks."""
    last = history[-1].timestamp_ms
    assert last is not None
    options = RecommendOptions(
        now_ms=last + HOUR_MS, candidates=20, allow=recommender.bundle.item_ids[::15], exclude_seen=False
    )
    return Request(history=history, k=20, options=options, user=user)


def numbers(slate: Slate) -> NDArray[np.float64]:
    """Logits of each item in the order of their names, and its similarity with the query, which tells of retrieval."""
    items = sorted(slate.items, key=lambda item: item.item)
    probabilities = np.array([[*item.actions.values()] for item in items])
    logits: NDArray[np.float64] = np.log(probabilities) - np.log1p(-probabilities)
    return np.concatenate([logits, [[item.retrieval_score] for item in items]], axis=1)


def ask(recommender: Recommender, history: History, user: str | None = None) -> Slate:
    return recommender.recommend_many([request(recommender, history, user)])[0]


def difference(slate: Slate, expected: Slate) -> float:
    assert [sorted(item.item for item in one.items) for one in (slate, expected)] == [
        sorted(item.item for item in expected.items)
    ] * 2
    return float(np.abs(numbers(slate) - numbers(expected)).max())


def check_top(slate: Slate, expected: Slate, tolerance: float) -> None:
    """The same items but for neighbours of equal score, whose sums may differ in the last bit."""
    scores = {item.item: item.score for item in slate.items}
    for item in expected.items:
        assert abs(scores.get(item.item, slate.items[-1].score) - item.score) < tolerance


@quick
@given(length=st.integers(1, LONGEST), seed=seeds)
def test_these_checks_notice_a_change_of_any_event(fresh: Recommender, length: int, seed: int) -> None:
    histories = Histories(fresh, seed)
    history = histories.grown((), length)
    expected = ask(fresh, history)
    inside = int(histories.rng.integers(-(-max(0, length - MAX_EVENTS) // SLACK) * SLACK, length))
    for other in (histories.edited(history, inside), histories.grown(history, 1)):
        assert difference(ask(fresh, other), expected) > 5 * TOLERANCE


@quick
@given(length=st.integers(1, LONGEST), cuts=cuts, seed=seeds)
def test_the_same_request_has_the_same_answer(fresh: Recommender, length: int, cuts: list[int], seed: int) -> None:
    """New, extended in some steps, found again, and in a batch with others."""
    histories, served = Histories(fresh, seed), cached(fresh, "fp32")
    history = histories.grown((), length)
    expected = ask(fresh, history)
    new = ask(served, history, "new")
    assert (new.kv, new.kv_reason) == ("miss", "new")
    for cut in sorted({min(cut, length) for cut in cuts}):
        ask(served, history[:cut], "grown")
    grown, found = ask(served, history, "grown"), ask(served, history, "new")
    assert found.kv == "hit"
    strangers = [request(served, histories.grown((), n), None) for n in (1, length, MAX_EVENTS)]
    requests = [request(served, history, user) for user in ("new", None, "newer")]
    batched = served.recommend_many([*strangers, *requests])[3:]
    assert [slate.kv for slate in batched] == ["hit", "miss", "miss"]
    for slate in (new, grown, found, *batched):
        assert difference(slate, expected) < TOLERANCE
    assert served.cache is not None
    served.cache.check_integrity()


@quick
@given(length=st.integers(2, MAX_EVENTS), cut=st.integers(1, MAX_EVENTS), seed=seeds)
def test_the_ten_best_are_the_same(fresh: Recommender, length: int, cut: int, seed: int) -> None:
    history, served = Histories(fresh, seed).grown((), length), cached(fresh, "fp32")
    options = RecommendOptions(now_ms=T * 2)
    expected = fresh.recommend(history, 10, options)
    served.recommend(history[:cut], 10, options, user="u")
    for _ in range(2):
        check_top(served.recommend(history, 10, options, user="u"), expected, 1e-5)


@quick
@given(lengths=st.lists(st.integers(2, MAX_EVENTS), min_size=2, max_size=6), seed=seeds)
def test_extensions_of_several_users_at_once(fresh: Recommender, lengths: list[int], seed: int) -> None:
    histories, served = Histories(fresh, seed), cached(fresh, "fp32")
    all_of = [histories.grown((), length) for length in lengths]
    for user, history in enumerate(all_of):
        ask(served, history[: int(histories.rng.integers(1, len(history)))], str(user))
    slates = served.recommend_many([request(served, history, str(user)) for user, history in enumerate(all_of)])
    assert {slate.kv for slate in slates} == {"extended"}
    again = served.recommend_many([request(served, history, str(user)) for user, history in enumerate(all_of)])
    assert {slate.kv for slate in again} == {"hit"}
    for history, *answers in zip(all_of, slates, again, strict=True):
        for slate in answers:
            assert difference(slate, ask(fresh, history)) < TOLERANCE


@pytest.mark.parametrize("dtype", KV_DTYPES)
@quick
@given(length=st.integers(1, LONGEST), seed=seeds)
def test_precision_does_not_make_a_hit_differ_from_a_miss(
    fresh: Recommender, dtype: KvDtype, length: int, seed: int
) -> None:
    history, served = Histories(fresh, seed).grown((), length), cached(fresh, dtype)
    slates = [ask(served, history, user) for user in ("u", "u", None)]
    assert [slate.kv for slate in slates] == ["miss", "hit", "miss"]
    assert slates[0].items == slates[1].items == slates[2].items
    off = difference(slates[0], ask(fresh, history))
    assert off < LOGITS[dtype]
    assert off > 1e-6 or dtype in ("fp32", "fp16")


@pytest.mark.parametrize("dtype", KV_DTYPES)
@quick
@given(length=st.integers(2, LONGEST), cuts=cuts, seed=seeds)
def test_an_extended_history_is_as_precise_as_a_new_one(
    fresh: Recommender, dtype: KvDtype, length: int, cuts: list[int], seed: int
) -> None:
    history, served = Histories(fresh, seed).grown((), length), cached(fresh, dtype)
    for cut in sorted({min(cut, length) for cut in cuts}):
        ask(served, history[:cut], "u")
    extended, found = (ask(served, history, "u") for _ in range(2))
    assert extended.items == found.items
    assert difference(extended, ask(fresh, history)) < LOGITS[dtype]


@pytest.mark.parametrize("weights", ["bundle", "lively"])
def test_int8_keeps_the_ten_best(weights: str, request: pytest.FixtureRequest) -> None:
    plain = Recommender.load(request.getfixturevalue(weights))
    histories, served = Histories(plain, 0), cached(plain, "int8")
    options, overlaps = RecommendOptions(now_ms=T * 2), []
    for user in range(100):
        history = histories.grown((), int(histories.rng.integers(10, MAX_EVENTS)))
        served.recommend(history[:-5], 10, options, user=str(user))
        slates = [recommender.recommend(history, 10, options, user=str(user)) for recommender in (served, plain)]
        best = [{item.item for item in slate.items} for slate in slates]
        overlaps.append(len(best[0] & best[1]) / 10)
    assert np.mean(overlaps) >= 0.99


@pytest.mark.parametrize("slack", [0, 65])
def test_a_slack_that_cannot_be(lively: Path, slack: int) -> None:
    with pytest.raises(ConfigError, match=f"window_slack={slack} must be an integer from 1 to 64"):
        Recommender.load(lively, verify=False, window_slack=slack)


@pytest.mark.parametrize("slack", [1, 8, 64])
def test_a_long_history_is_encoded_anew_once_in_a_slack(fresh: Recommender, slack: int) -> None:
    histories, served = Histories(fresh, 0), cached(replace(fresh, window_slack=slack), "fp32")
    history, kinds = histories.grown((), MAX_EVENTS), Counter[str | None]()
    ask(served, history, "u")
    for _ in range(2 * slack):
        history = histories.grown(history, 1)
        slate = ask(served, history, "u")
        kinds[slate.kv_reason] += 1
        assert difference(slate, ask(replace(fresh, window_slack=slack), history)) < TOLERANCE
    assert kinds == Counter({"shifted": 2, "1 new event": 2 * slack - 2})


def test_a_cache_is_handed_on(bundle: Path, lively: Path) -> None:
    """To a recommender of another bundle, whose requests it must not serve with what the first one left."""
    old = Recommender.load(bundle, cache=CacheOptions(budget_bytes=1 << 22, dtype="fp32"))
    new, fresh = Recommender.load(lively, cache=old.cache), Recommender.load(lively)
    assert new.cache is old.cache
    history = Histories(fresh, 0).grown((), 9)
    slates = [ask(recommender, history, "u") for recommender in (old, old, new, new, old)]
    found = [("miss", "new"), ("hit", None), ("miss", "version"), ("hit", None), ("miss", "version")]
    assert [(slate.kv, slate.kv_reason) for slate in slates] == found
    assert slates[2].items == slates[3].items == ask(fresh, history).items
    assert slates[0].items == slates[1].items == slates[4].items != slates[2].items


def test_a_cache_of_another_shape_is_refused(bundle: Path) -> None:
    model = Recommender.load(bundle, verify=False).bundle.manifest.model
    other = KvCache(msgspec.structs.replace(model, head_dim=16), CacheOptions(budget_bytes=1 << 20))
    with pytest.raises(ConfigError, match=r"the cache was made for .*head_dim=16.*, this model needs .*head_dim=32"):
        Recommender.load(bundle, cache=other)


@dataclass
class Clock:
    """Seconds that pass when a request says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(kw_only=True)
class Traffic:
    """What all threads share: users' histories, the cache, two bundles that it serves, and what was wrong."""

    cache: KvCache
    clock: Clock
    served: tuple[Recommender, ...]
    fresh: tuple[Recommender, ...]
    histories: dict[str, History]
    wrong: list[str] = field(default_factory=list)
    known: dict[tuple[int, History], Slate] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)

    def answer(self, version: int, asked: Sequence[tuple[str | None, History]]) -> None:
        """Ask for all at once and compare each with a fresh answer."""
        slates = self.served[version].recommend_many([request(self.fresh[0], h, user) for user, h in asked])
        for (user, history), slate in zip(asked, slates, strict=True):
            expected = self.known.get((version, history))
            if expected is None:
                expected = self.known[version, history] = ask(self.fresh[version], history)
            if difference(slate, expected) >= TOLERANCE:
                self.wrong.append(f"user {user}: {slate.kv}, {slate.kv_reason}, {len(history)} events")

    def run(self, thread: int) -> Counter[str]:
        """One thread's share of random operations; returns how often each was done."""
        traffic, done, answers = Histories(self.fresh[0], thread), Counter[str](), 0
        while answers < OPERATIONS // THREADS:
            users = [str(user) for user in traffic.rng.choice(USERS, 3, replace=False, p=SHARES)]
            operation = str(traffic.rng.choice(list(WEIGHTS), p=list(WEIGHTS.values())))
            answers += self.operate(operation, users, traffic)
            done[operation] += 1
            if done.total() % 200 == 0:
                self.cache.check_integrity()
        return done

    def operate(self, operation: str, users: list[str], traffic: Histories) -> int:
        """Change something and ask; returns how many answers were compared."""
        user, rng, version = users[0], traffic.rng, int(traffic.rng.random() < 0.05)
        history = self.histories[user]
        if operation == "append":
            history = traffic.grown(history, int(rng.integers(1, 4)))
            history = history if len(history) <= LONGEST else traffic.grown((), int(rng.integers(1, 10)))
        elif operation == "edit":
            history = traffic.edited(history, int(rng.integers(len(history))))
        elif operation == "truncate":
            history = history[: int(rng.integers(1, len(history) + 1))]
        elif operation == "invalidate":
            self.cache.invalidate(user)
        elif operation == "clear":
            self.cache.clear()
        elif operation == "wait":
            self.clock.now += float(rng.integers(1, 4))
        self.histories[user] = history
        asked: list[tuple[str | None, History]] = [(user, history)]
        if operation == "batch":
            asked += [(other, self.histories[other]) for other in users[1:]]
            asked += [(user, traffic.grown(history, 2)), (user, history[: len(history) // 2 + 1]), (None, history)]
        self.answer(version, asked)
        return len(asked)


WEIGHTS = {
    "append": 0.35,
    "again": 0.25,
    "edit": 0.06,
    "truncate": 0.05,
    "batch": 0.15,
    "invalidate": 0.04,
    "clear": 0.002,
    "wait": 0.098,
}


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads take turns far more often than they would by themselves."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_threads")
def test_ten_thousand_answers_under_threads_are_those_of_fresh_encodes(fresh: Recommender) -> None:
    """All users are asked for by all threads, by two bundles that share the cache, which is far too small."""
    clock, model = Clock(), fresh.bundle.manifest.model
    cache = KvCache(model, CacheOptions(budget_bytes=BUDGET_BYTES, dtype="fp32", ttl_s=8.0), clock)
    other = replace(fresh, engine=Engine(fresh.engine.backend, model, -fresh.engine.item_vectors))
    histories = Histories(fresh, 99)
    traffic = Traffic(
        cache=cache,
        clock=clock,
        served=(with_cache(fresh, cache), with_cache(other, cache, "two")),
        fresh=(fresh, with_cache(other, None)),
        histories={str(user): histories.grown((), 1 + 3 * user) for user in range(USERS)},
    )
    with ThreadPoolExecutor(THREADS) as threads:
        done = sum(threads.map(traffic.run, range(THREADS)), Counter[str]())
    assert traffic.wrong == []
    cache.check_integrity()
    statistics = cache.statistics()
    assert set(done) == set(WEIGHTS)
    assert set(statistics.misses) == REASONS
    assert min(statistics.misses.values()) >= 10
    assert min(statistics.hits, statistics.extended) >= 1000
    assert min(statistics.unstored, statistics.evictions) >= 10
    assert statistics.pinned == 0
    assert statistics.bytes_used <= statistics.bytes_high_water == statistics.bytes_budget == BUDGET_BYTES
    cache.clear()
    assert (cache.statistics().bytes_used, cache.statistics().bytes_beside) == (0, 0)
