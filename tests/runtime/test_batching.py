"""Concurrent requests on a real bundle: batched answers are those of single requests, and no one waits too long."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unipinrec.errors import BackendError, ConfigError, RequestError
from unipinrec.runtime import Batcher, BatchOptions, CacheOptions, Recommender, RecommendOptions, Request, Slate
from unipinrec.runtime.requests import Event, ResolvedRequest

NOW_MS = 1_760_000_000_000


@pytest.fixture(scope="module")
def recommender(bundle: Path) -> Recommender:
    return Recommender.load(bundle, cache=CacheOptions(budget_bytes=1 << 22, dtype="fp32"))


def random_requests(recommender: Recommender, count: int, seed: int = 0) -> list[Request]:
    rng, items = np.random.default_rng(seed), recommender.bundle.item_ids
    requests = []
    for index in range(count):
        rows = rng.integers(0, len(items), rng.integers(1, 65))
        events = tuple(Event(item=items[row], actions=("click",), timestamp_ms=NOW_MS) for row in rows)
        user = None if index % 3 == 0 else f"user-{index % 7}"
        options = RecommendOptions(now_ms=NOW_MS + 1000, candidates=int(rng.integers(10, 60)))
        requests.append(Request(history=events, k=10, options=options, user=user))
    return requests


def check_same(slate: Slate, alone: Slate) -> None:
    """The same items but for neighbours of equal score, whose sums may differ in the last bit."""
    scores = {item.item: item.score for item in slate.items}
    np.testing.assert_allclose(sorted(scores.values()), sorted(item.score for item in alone.items), atol=1e-5)
    for item in alone.items:
        assert abs(scores.get(item.item, slate.items[-1].score) - item.score) < 1e-5


@pytest.mark.parametrize("workers", [1, 3])
def test_every_thread_gets_the_answer_of_its_own_request(bundle: Path, recommender: Recommender, workers: int) -> None:
    requests = random_requests(recommender, 120)
    alone = Recommender.load(bundle)
    expected = [alone.recommend_many([request])[0] for request in requests]
    options = BatchOptions(max_batch=16, max_wait_ms=5.0, workers=workers)
    with Batcher(recommender, options) as batcher, ThreadPoolExecutor(24) as threads:
        slates = list(threads.map(batcher.recommend, requests))
        statistics = batcher.statistics()
    for slate, single in zip(slates, expected, strict=True):
        check_same(slate, single)
    assert statistics.requests == 120
    assert statistics.batches < 120
    assert 1 < statistics.largest <= 16
    padding = recommender.padding()
    assert 0.0 <= padding["encode"].waste < 1 / 3
    assert recommender.cache is not None
    recommender.cache.check_integrity()
    assert recommender.cache.statistics().pinned == 0


def test_a_lone_request_waits_no_longer_than_the_deadline(recommender: Recommender) -> None:
    request = random_requests(recommender, 1)[0]
    with Batcher(recommender, BatchOptions(max_wait_ms=50.0)) as batcher:
        began = time.perf_counter()
        batcher.recommend(request)
        took_ms = (time.perf_counter() - began) * 1e3
        assert 50.0 <= batcher.statistics().longest_wait_ms < 80.0
    assert took_ms >= 50.0
    with Batcher(recommender, BatchOptions(max_wait_ms=0.0)) as batcher:
        batcher.recommend(request)
        assert batcher.statistics().longest_wait_ms < 25.0


def test_a_full_batch_does_not_wait(recommender: Recommender) -> None:
    requests = random_requests(recommender, 4)
    with Batcher(recommender, BatchOptions(max_batch=4, max_wait_ms=60_000.0)) as batcher:
        answers = [batcher.submit(request) for request in requests]
        assert [len(answer.result(timeout=30).items) for answer in answers] == [10] * 4
        assert batcher.statistics().largest == 4


def test_a_bad_request_is_refused_to_its_own_caller(recommender: Recommender) -> None:
    good = random_requests(recommender, 1)[0]
    bad = Request(history=(Event(item="no such item", actions=()),))
    with Batcher(recommender, BatchOptions(max_batch=2, max_wait_ms=20.0)) as batcher:
        answer = batcher.submit(good)
        with pytest.raises(RequestError, match="no such item"):
            batcher.submit(bad)
        assert len(answer.result(timeout=30).items) == 10


def test_closing_answers_what_is_queued_and_refuses_the_rest(recommender: Recommender) -> None:
    batcher = Batcher(recommender, BatchOptions(max_wait_ms=60_000.0))
    answers = [batcher.submit(request) for request in random_requests(recommender, 5)]
    batcher.close()
    batcher.close()
    assert all(len(answer.result(timeout=0).items) == 10 for answer in answers)
    with pytest.raises(BackendError, match="closed"):
        batcher.submit(random_requests(recommender, 1)[0])


def test_a_cancelled_request_is_not_computed(recommender: Recommender) -> None:
    batcher = Batcher(recommender, BatchOptions(max_wait_ms=60_000.0))
    first, second = (batcher.submit(request) for request in random_requests(recommender, 2))
    before = recommender.padding()["rank"].useful
    assert first.cancel()
    batcher.close()
    assert first.cancelled()
    assert len(second.result(timeout=0).items) == 10
    ranked = recommender.padding()["rank"].useful - before
    assert ranked == random_requests(recommender, 2)[1].options.candidates


@settings(max_examples=40, deadline=None)
@given(cancelled=st.lists(st.booleans(), min_size=1, max_size=12), max_batch=st.integers(1, 4))
def test_cancelled_requests_take_no_place_in_a_batch(
    recommender: Recommender, cancelled: list[bool], max_batch: int
) -> None:
    """While one batch computes, requests arrive and some are cancelled; the others fill batches in their order."""
    batches: list[list[int]] = []
    begun, go_on = threading.Event(), threading.Event()

    def answer(_: Recommender, requests: Sequence[ResolvedRequest]) -> list[Slate | Exception]:
        batches.append([request.k for request in requests])
        begun.set()
        assert go_on.wait(20)
        return [RequestError("not computed")] * len(requests)

    with (
        patch.object(Recommender, "answer", answer),
        Batcher(recommender, BatchOptions(max_batch=max_batch, max_wait_ms=0.0)) as batcher,
    ):
        request = random_requests(recommender, 1)[0]
        batcher.submit(request)
        assert begun.wait(20)
        counts = range(1, len(cancelled) + 1)
        answers = [batcher.submit(msgspec.structs.replace(request, k=k)) for k in counts]
        assert all(one.cancel() for one, is_cancelled in zip(answers, cancelled, strict=True) if is_cancelled)
        go_on.set()
    left = [k for k, is_cancelled in enumerate(cancelled, 1) if not is_cancelled]
    assert batches[1:] == [left[start : start + max_batch] for start in range(0, len(left), max_batch)]
    assert batcher.statistics().requests == 1 + len(left)


def test_a_failure_reaches_those_who_wait_and_no_one_else(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: Recommender, _asked: Sequence[ResolvedRequest]) -> list[Slate | Exception]:
        raise BackendError("the device is gone")

    request = random_requests(recommender, 1)[0]
    with Batcher(recommender, BatchOptions(max_wait_ms=0.0)) as batcher:
        with monkeypatch.context() as patched:
            patched.setattr(Recommender, "answer", fail)
            with pytest.raises(BackendError, match="the device is gone"):
                batcher.recommend(request)
        assert len(batcher.recommend(request).items) == 10


def test_nobody_waits_for_a_worker_that_is_gone(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(Batcher, "_count", fail)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    batcher = Batcher(recommender, BatchOptions(max_wait_ms=0.0))
    answer = batcher.submit(random_requests(recommender, 1)[0])
    with pytest.raises(BackendError, match=r"the batcher failed: MemoryError\('no more'\); make a new one"):
        answer.result(timeout=20)
    with pytest.raises(BackendError, match="the batcher is closed"):
        batcher.submit(random_requests(recommender, 1)[0])
    batcher.close()


def test_one_that_is_left_open_does_not_abort_the_interpreter(bundle: Path) -> None:
    code = f"""
from unipinrec.runtime import Batcher, BatchOptions, Recommender, Request
from unipinrec.runtime.requests import Event
recommender = Recommender.load({str(bundle)!r}, "cpu")
batcher = Batcher(recommender, BatchOptions(workers=6, max_batch=4))
items = recommender.bundle.item_ids
answers = [batcher.submit(Request(history=(Event(item=items[at % 20], actions=()),), k=3)) for at in range(3000)]
answers[0].result()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_threads_end_with_the_batcher(recommender: Recommender) -> None:
    def workers() -> int:
        return sum(thread.name.startswith("unipinrec-batch") for thread in threading.enumerate())

    with Batcher(recommender, BatchOptions(workers=4)) as batcher:
        future: Future[Slate] = batcher.submit(random_requests(recommender, 1)[0])
        assert workers() == 4
    assert future.done()
    assert workers() == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch": 0},
        {"max_batch": 2.5},
        {"workers": 0},
        {"max_wait_ms": -1.0},
        {"max_wait_ms": float("nan")},
        {"max_wait_ms": float("inf")},
        {"max_wait_ms": 60_001},
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        BatchOptions(**wrong)  # type: ignore[arg-type]
