"""Whatever fails, and whenever: nothing half-written is ever found, and nothing stays in use."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime import CacheOptions, Event, KvCache, Recommender, RecommendOptions, Request, Slate
from unipinrec.runtime.bundle.manifest import GraphSpec, ModelSpec
from unipinrec.runtime.bundle.quality import KvDtype
from unipinrec.runtime.graphs.backend import Backend
from unipinrec.runtime.graphs.engine import Engine, KvBuffer
from unipinrec.runtime.graphs.mock import Arrays, Handler, MockBackend
from unipinrec.runtime.kv.encoder import HistoryEncoder
from unipinrec.runtime.kv.pages import KV_DTYPES, KvPages
from unipinrec.runtime.requests import SlateItem
from unipinrec.runtime.retrieval.retriever import CandidateSet, Retriever, Search

T = 1_760_000_000_000
OPTIONS = RecommendOptions(now_ms=T + 10**9, candidates=300)  # all, so that no near tie decides who is ranked
ERRORS = [BackendError("out of memory"), KeyboardInterrupt("stop"), MemoryError("no more")]
# Events that the cache has, and that are asked for; both of the user's one long history unless edited.
ASKED = {"hit": (40, 40), "extended": (30, 40), "miss": (0, 40), "edited": (30, 40)}
TOLERANCES: dict[KvDtype, float] = {"fp32": 1e-5, "fp16": 5e-4, "bf16": 5e-3, "int8": 2e-2}
errors = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


class Fuse:
    """Fails at a call whose number is given; 0 = never."""

    def __init__(self) -> None:
        self.error: BaseException = ERRORS[0]
        self.at, self.calls = 0, itertools.count(1)

    def set(self, at: int, error: BaseException) -> None:
        self.at, self.calls, self.error = at, itertools.count(1), error

    def burn(self) -> None:
        if next(self.calls) == self.at:
            raise self.error


def failing(backend: Backend, specs: Mapping[str, GraphSpec], fuse: Fuse, graphs: Sequence[str]) -> MockBackend:
    """A backend that encodes and ranks in small chunks, and fails when its fuse says so."""

    def handler(graph: str) -> Handler:
        def run(inputs: Arrays) -> Arrays:
            if graph in graphs:
                fuse.burn()
            return {name: tensor.numpy() for name, tensor in backend.run(graph, inputs).items()}

        return run

    mock = MockBackend(specs, **{graph: handler(graph) for graph in specs})
    mock.prefill_chunk, mock.rank_chunk = 16, 100
    return mock


class DirtyBuffer(KvBuffer):
    """A buffer in memory that held something else before."""

    def __init__(self, model: ModelSpec, batch: int, slots: int) -> None:
        super().__init__(model, batch, slots)
        self.values.fill(np.nan)


class FailingPages(KvPages):
    """Pages that fail in the middle of a copy."""

    def __init__(self, pages: KvPages, writes: Fuse, reads: Fuse) -> None:
        super().__init__(pages.geometry, pages.count)
        self.writes, self.reads = writes, reads

    def write(
        self,
        pages: Sequence[int],
        first: int,
        key_values: Sequence[NDArray[np.float32]],
        out: NDArray[np.float32] | None = None,
    ) -> None:
        super().write(pages, first, key_values[:1])
        self.writes.burn()
        super().write(pages, first, key_values, out)

    def read(self, pages: Sequence[int], count: int, out: NDArray[np.float32]) -> None:
        super().read(pages, count // 2, out)
        self.reads.burn()
        super().read(pages, count, out)


@dataclass(frozen=True, kw_only=True, eq=False)
class FailingRetriever(Retriever):
    """A retriever that fails when its fuse says so."""

    fuse: Fuse

    def retrieve(self, searches: Sequence[Search]) -> list[CandidateSet]:
        self.fuse.burn()
        return super().retrieve(searches)


@dataclass(frozen=True, kw_only=True)
class Rig:
    """A recommender with a cache, and everything in it that can be made to fail."""

    recommender: Recommender
    cache: KvCache
    fuses: dict[str, Fuse]

    def check(self) -> None:
        """Nothing is in use and nothing was lost."""
        self.cache.check_integrity()
        assert not self.cache._leases
        assert self.cache.statistics().pinned == 0


@pytest.fixture(scope="module")
def fresh(lively: Path) -> Recommender:
    return Recommender.load(lively)


@pytest.fixture
def rig(fresh: Recommender) -> Rig:
    return make_rig(fresh)


def make_rig(
    fresh: Recommender,
    graphs: Sequence[str] = ("encoder", "extend", "retrieval", "ranker"),
    dtype: KvDtype = "fp16",
    budget_bytes: int = 1 << 18,
) -> Rig:
    fuses = {name: Fuse() for name in ("run", "write", "read", "retrieve")}
    model = fresh.bundle.manifest.model
    cache = KvCache(model, CacheOptions(budget_bytes=budget_bytes, dtype=dtype, page_slots=4))
    cache.pages = FailingPages(cache.pages, fuses["write"], fuses["read"])
    backend = failing(fresh.engine.backend, fresh.bundle.manifest.graphs, fuses["run"], graphs)
    engine = Engine(backend, model, fresh.engine.item_vectors)
    retriever = FailingRetriever(**vars(fresh.retriever), fuse=fuses["retrieve"])
    encoder = HistoryEncoder(engine, cache, fresh.bundle.kv_namespace, fresh.bundle.kv_item_keys)
    recommender = replace(fresh, engine=engine, retriever=retriever, encoder=encoder)
    return Rig(recommender=recommender, cache=cache, fuses=fuses)


def history(recommender: Recommender, count: int, seed: int = 0) -> tuple[Event, ...]:
    ids, actions = recommender.bundle.item_ids, recommender.bundle.manifest.actions
    rng = np.random.default_rng(seed)
    return tuple(
        Event(item=ids[row], actions=(actions[action],), timestamp_ms=T + index * 10**6)
        for index, (row, action) in enumerate(zip(rng.integers(0, 300, 64), rng.integers(0, 4, 64), strict=True))
    )[:count]


def check_same(items: Sequence[SlateItem], expected: Sequence[SlateItem], tolerance: float = 5e-4) -> None:
    """Equal but for the rounding, to fp16 unless told."""
    scores = {item.item: item.score for item in items}
    for item in expected:
        assert abs(scores.get(item.item, items[-1].score) - item.score) < tolerance


def fail_everywhere(rig: Rig, fuse: Fuse, kind: str, error: BaseException, expected: Sequence[SlateItem]) -> int:
    """Fail at the first call, at the second, ... until a request needs no more of them; returns how many."""
    cached, count = ASKED[kind]
    asked = history(rig.recommender, count)
    before = asked[:cached]
    if kind == "edited":
        before = (history(rig.recommender, 1, seed=1)[0], *before[1:])
    for failures in range(100):
        rig.cache.clear()
        if before:
            ask(rig, before)
        reason = {"hit": None, "extended": "10 new events", "edited": "edited"}.get(
            kind, "new" if rig.cache.statistics().misses == {} else "invalidated"
        )
        slate = attempt(rig, asked, fuse, failures + 1, error)
        if slate is not None:
            check_same(slate.items, expected)
            return failures
        rig.check()
        if before and kind != "edited":
            assert ask(rig, before).kv == "hit"
        answers = [ask(rig, asked) for _ in range(2)]
        assert [answer.kv_reason for answer in answers] == [reason, None]
        for answer in answers:
            check_same(answer.items, expected)
        rig.check()
    raise AssertionError("it never succeeds")


def ask(rig: Rig, events: Sequence[Event]) -> Slate:
    return rig.recommender.recommend(events, 10, OPTIONS, user="u")


def attempt(rig: Rig, events: Sequence[Event], fuse: Fuse, at: int, error: BaseException) -> Slate | None:
    """The answer, or None where the call of that number was needed and failed."""
    fuse.set(at, error)
    try:
        return ask(rig, events)
    except type(error):
        return None
    finally:
        fuse.set(0, error)


@errors
@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        # Three for forty events in chunks of at most 16, one for the query, three for 263 candidates.
        ("miss", {"run": 7, "write": 1, "read": 0, "retrieve": 1}),
        ("edited", {"run": 7, "write": 1, "read": 0, "retrieve": 1}),
        ("extended", {"run": 5, "write": 1, "read": 1, "retrieve": 1}),
        ("hit", {"run": 4, "write": 0, "read": 1, "retrieve": 1}),
    ],
)
def test_a_request_may_fail_anywhere(
    fresh: Recommender, rig: Rig, kind: str, calls: dict[str, int], error: BaseException
) -> None:
    expected = fresh.recommend(history(fresh, 40), 10, OPTIONS).items
    for name, count in calls.items():
        assert fail_everywhere(rig, rig.fuses[name], kind, error, expected) == count
        rig.check()


@pytest.mark.parametrize("graph", ["encoder", "extend"])
def test_those_of_a_group_that_fails_are_answered_one_by_one(fresh: Recommender, graph: str) -> None:
    rig = make_rig(fresh, (graph,))
    recommender, histories = rig.recommender, [history(fresh, 15, seed) for seed in range(5)]
    recommender.recommend(histories[0], 10, OPTIONS, user="hit")
    recommender.recommend(histories[1][:12], 10, OPTIONS, user="extended")
    users = ["hit", "extended", "new", None, "extended"]
    requests = [Request(history=h, k=10, options=OPTIONS, user=u) for h, u in zip(histories, users, strict=True)]
    requests[4] = Request(history=histories[1][:14], k=10, options=OPTIONS, user="extended")
    rig.fuses["run"].set(1, BackendError("out of memory"))
    answers = recommender.answer([recommender.resolve(request) for request in requests])
    for request, answer in zip(requests, answers, strict=True):
        assert not isinstance(answer, Exception)
        check_same(answer.items, fresh.recommend_many([request])[0].items)
    rig.check()
    again = recommender.recommend_many(requests)
    # Two requests extend the entry of one user; which of them is kept depends on who is answered last.
    of_one_user = {"encoder": ("extended", "hit"), "extend": ("hit", "miss")}[graph]
    assert [slate.kv for slate in again] == ["hit", of_one_user[0], "hit", "miss", of_one_user[1]]
    for request, slate in zip(requests, again, strict=True):
        check_same(slate.items, fresh.recommend_many([request])[0].items)
    rig.check()


def test_those_of_a_group_that_cannot_be_written_are_answered_one_by_one(fresh: Recommender, rig: Rig) -> None:
    recommender, long, short = rig.recommender, history(fresh, 16, 1), history(fresh, 5, 2)
    requests = [Request(history=h, k=10, options=OPTIONS, user=u) for h, u in ((long, "a"), (short, "b"), (long, "c"))]
    rig.fuses["write"].set(2, MemoryError("no more"))
    answers = recommender.answer([recommender.resolve(request) for request in requests])
    assert [isinstance(answer, Exception) for answer in answers] == [False, False, False]
    rig.check()
    assert rig.cache.statistics().entries == 3
    for request in requests:
        slate = recommender.recommend_many([request])[0]
        assert slate.kv == "hit"
        check_same(slate.items, fresh.recommend_many([request])[0].items)


def test_a_refused_request_leaves_the_cache_alone(rig: Rig) -> None:
    good = Request(history=history(rig.recommender, 5), user="u")
    bad = Request(history=(Event(item="no such item", actions=()),), user="u")
    with pytest.raises(Exception, match="no such item"):
        rig.recommender.recommend_many([good, bad])
    rig.check()
    assert rig.cache.statistics().misses == {}


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_what_memory_held_before_is_nothing_to_a_history(
    fresh: Recommender, dtype: KvDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Histories of several lengths together, new, extended and found, encoded in chunks and at once."""
    for module in ("kv.encoder", "graphs.engine"):
        monkeypatch.setattr(f"unipinrec.runtime.{module}.KvBuffer", DirtyBuffer)
    rig = make_rig(fresh, dtype=dtype)
    counts = {"a": 9, "b": 12, "c": 50, "d": 11}
    histories = {user: history(fresh, count, seed=count) for user, count in counts.items()}
    for cut in (2, 0, 0):
        requests = [Request(history=h[: len(h) - cut], k=10, options=OPTIONS, user=u) for u, h in histories.items()]
        for slate, one in zip(rig.recommender.recommend_many(requests), requests, strict=True):
            check_same(slate.items, fresh.recommend_many([one])[0].items, TOLERANCES[dtype])
    statistics = rig.cache.statistics()
    assert (statistics.misses, statistics.extended, statistics.hits) == ({"new": 4}, 4, 4)


@pytest.mark.parametrize(("dtype", "slot_bytes"), [("fp32", 1024), ("fp16", 512), ("bf16", 512), ("int8", 288)])
@pytest.mark.parametrize("before", [0, 9])
def test_an_answer_that_finds_no_room_is_the_same(
    fresh: Recommender, dtype: KvDtype, slot_bytes: int, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three pages of four slots hold nine events, but not forty."""
    monkeypatch.setattr("unipinrec.runtime.kv.encoder.KvBuffer", DirtyBuffer)
    slates = []
    for budget_bytes in (12 * slot_bytes, 1 << 18):
        rig = make_rig(fresh, dtype=dtype, budget_bytes=budget_bytes)
        if before:
            ask(rig, history(fresh, before))
        slates.append(ask(rig, history(fresh, 40)))
        assert rig.cache.statistics().unstored == (budget_bytes < 1 << 18)
        assert rig.cache.statistics().entries == (1 if before or budget_bytes == 1 << 18 else 0)
        rig.check()
    assert [slate.kv for slate in slates] == ["extended" if before else "miss"] * 2
    assert slates[0].items == slates[1].items


def test_an_entry_holds_nothing_but_its_own_state(rig: Rig) -> None:
    """Not that of the batch in which it was encoded."""
    events = history(rig.recommender, 9)
    rig.recommender.recommend_many([Request(history=events, options=OPTIONS, user=user) for user in "ab"])
    state = rig.cache._entries["a"].last_hidden_state
    assert (state.shape, state.base) == ((64,), None)


def test_keys_and_values_that_do_not_fit_fail_alike_with_and_without_a_user(fresh: Recommender) -> None:
    """fp16 ends at 65,504; a model whose keys go beyond needs another precision, and says so at its first request."""
    rig = make_rig(fresh)

    def loud(inputs: Arrays) -> Arrays:
        outputs = fresh.engine.backend.run("encoder", inputs).items()
        return {name: tensor.numpy() * np.float32(1e7 if "present" in name else 1) for name, tensor in outputs}

    rig.recommender.engine.backend = MockBackend(fresh.bundle.manifest.graphs, encoder=loud)
    for user in (None, "u", "u"):
        with pytest.raises(BackendError, match="does not fit into fp16; store them as bf16 or fp32"):
            rig.recommender.recommend(history(fresh, 5), 10, OPTIONS, user=user)
        rig.check()
    assert rig.cache.statistics().bytes_used == 0


def test_who_is_not_looked_up(fresh: Recommender, rig: Rig) -> None:
    events = history(fresh, 5)
    assert fresh.recommend(events, 10, OPTIONS, user="u").kv_reason == "no cache"
    slates = [rig.recommender.recommend(events, 10, OPTIONS) for _ in range(2)]
    assert [(slate.kv, slate.kv_reason) for slate in slates] == [("miss", "anonymous")] * 2
    assert slates[0].items == slates[1].items
    assert rig.cache.statistics().misses == {}


def test_the_reason_of_an_extension_says_how_much_is_new(rig: Rig) -> None:
    slates = [ask(rig, history(rig.recommender, count)) for count in (3, 10, 11)]
    assert [(slate.kv, slate.kv_reason) for slate in slates] == [
        ("miss", "new"),
        ("extended", "7 new events"),
        ("extended", "1 new event"),
    ]
