"""Bundles that take over from one another while threads ask: every answer is that of the bundle it names."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from answers import STORED
from twin_bundle import seal_again, twin

from unipinrec.errors import BackendError, BundleCorruptError, BundleError, BundleVersionError, SwapBusyError, SwapError
from unipinrec.runtime import (
    BatchOptions,
    Bundle,
    CacheOptions,
    Event,
    KvCache,
    Recommender,
    RecommendOptions,
    Request,
    Slate,
)
from unipinrec.runtime.bundle.quality import KvDtype
from unipinrec.runtime.server.deployment import Deployment, DeploymentOptions
from unipinrec.runtime.server.swap import Deployments
from unipinrec.runtime.tools.update_bundle import update_bundle

NOW_MS = 1_760_000_000_000
CACHED = DeploymentOptions(
    device="cpu",
    cache=CacheOptions(budget_bytes=1 << 20, dtype="fp32"),
    batching=BatchOptions(max_batch=8, max_wait_ms=1.0),
)


@pytest.fixture
def deployments(twins: tuple[Path, Path]) -> Iterator[Deployments]:
    """The first of them, serving."""
    opened = Deployments(Deployment.open(twins[0], CACHED))
    yield opened
    assert opened.close(timeout_s=30)


def requests(count: int, seed: int = 0) -> list[Request]:
    """Histories that grow, of a few users who come again, of no one, and of users who change their past."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        past = np.random.default_rng(index % 5)
        events = tuple(
            Event(
                item=f"item-{past.integers(24)}", actions=("click",) if past.random() < 0.5 else (), timestamp_ms=NOW_MS
            )
            for _ in range(int(rng.integers(1, 9)))
        )
        user = None if index % 4 == 0 else f"user-{index % 5}"
        options = RecommendOptions(
            now_ms=NOW_MS + 1000,
            candidates=int(rng.integers(4, 12)),
            exclude_seen=False,
            weights={"click": 1.0, "save": 1.0},
        )
        made.append(Request(history=events, k=4, options=options, user=user))
    return made


def answers(slate: Slate) -> list[tuple[str, float]]:
    return [(item.item, item.score) for item in slate.items]


def check_same(slate: Slate, alone: Slate) -> None:
    """Equal but for the last bits of sums, which depend on the batch; items of equal score may trade places."""
    given, expected = dict(answers(slate)), dict(answers(alone))
    np.testing.assert_allclose(sorted(given.values()), sorted(expected.values()), atol=1e-5)
    lowest = min(expected.values())
    for item, score in expected.items():
        assert abs(given.get(item, lowest) - score) < 1e-5


def until(true: Callable[[], bool], within_s: float = 20.0) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def ask(deployments: Deployments, request: Request) -> Slate:
    with deployments.acquire() as deployment:
        return deployment.batcher.recommend(request)


def test_the_twins_answer_differently(twins: tuple[Path, Path]) -> None:
    slates = []
    for bundle in twins:
        with Recommender.load(bundle, "cpu") as recommender:
            slates.append([recommender.recommend_many([request])[0] for request in requests(20)])
    for ours, theirs in zip(*slates, strict=True):
        assert max(abs(a.score - b.score) for a, b in zip(ours.items, theirs.items, strict=True)) > 1e-3


def test_every_answer_is_that_of_the_bundle_it_names(twins: tuple[Path, Path], deployments: Deployments) -> None:
    asked = requests(60)
    expected: dict[str, list[Slate]] = {}
    for bundle in twins:
        with Recommender.load(bundle, "cpu") as alone:
            expected[alone.bundle.hash] = [alone.recommend_many([request])[0] for request in asked]
    stop, indices = threading.Event(), itertools.count()
    served: list[tuple[int, Slate]] = []

    def reached(count: int) -> bool:
        return len(served) > count

    def client() -> None:
        while not stop.is_set():
            index = next(indices) % len(asked)
            served.append((index, ask(deployments, asked[index])))

    with ThreadPoolExecutor(6) as threads:
        clients = [threads.submit(client) for _ in range(6)]
        try:
            for bundle in (twins[1], twins[0]) * 3:
                version = deployments.swap(bundle).version
                enough = len(served) + 30
                until(partial(reached, enough))
                assert served[-1][1].bundle == version
        finally:
            stop.set()
        for one in clients:
            one.result()
    assert {slate.bundle for _, slate in served} == set(expected)
    for index, slate in served:
        check_same(slate, expected[slate.bundle][index])
    assert {slate.kv for _, slate in served} == {"hit", "extended", "miss"}
    assert "version" in {slate.kv_reason for _, slate in served}
    cache = deployments.current.recommender.cache
    assert cache is not None
    cache.check_integrity()
    until(lambda: not deployments.status().draining)
    assert cache.statistics().pinned == 0
    assert deployments.swap_counts() == {("swap", "swapped"): 6}
    assert deployments.work().requests == len(served)


def test_a_request_keeps_the_bundle_that_it_acquired(twins: tuple[Path, Path], deployments: Deployments) -> None:
    request, old = requests(1)[0], deployments.current.version
    with deployments.acquire() as held:
        new = deployments.swap(twins[1]).version
        status = deployments.status()
        assert (status.version, status.in_flight, status.draining) == (new, 0, {old: 1})
        assert held.batcher.recommend(request).bundle == old
        assert ask(deployments, request).bundle == new
    until(lambda: deployments.status().draining == {})
    with pytest.raises(BackendError, match="the batcher is closed"):
        held.batcher.recommend(request)


def parts(deployments: Deployments) -> list[weakref.ref[Any]]:
    """All that is large of what serves."""
    deployment, recommender = deployments.current, deployments.current.recommender
    engine, bundle = recommender.engine, recommender.bundle
    large = (deployment, deployment.batcher, engine, engine.backend, recommender.retriever.index, bundle.item_vectors)
    return [weakref.ref(part) for part in large]


def test_what_was_replaced_leaves_memory(twins: tuple[Path, Path]) -> None:
    deployments = Deployments(Deployment.open(twins[0], CACHED))
    ask(deployments, requests(2)[1])
    gc.collect()
    gc.disable()  # nothing of it may have to wait for the collector
    try:
        old = parts(deployments)
        deployments.swap(twins[1])
        until(lambda: not any(part() for part in old))
        with pytest.raises(BundleError):
            deployments.swap(STORED / "no-such-bundle")
        rolled = parts(deployments)
        deployments.rollback()
        until(lambda: not any(part() for part in rolled))
    finally:
        gc.enable()
    assert deployments.current.recommender.cache is not None
    cache = weakref.ref(deployments.current.recommender.cache)
    last = parts(deployments)
    assert deployments.close(timeout_s=20)
    del deployments
    until(lambda: not any(part() for part in (*last, cache)))


def test_the_cache_is_handed_over_and_serves_after_an_update_of_items(
    deployments: Deployments, twins: tuple[Path, Path], tmp_path: Path
) -> None:
    asked = requests(3)[1]
    first = ask(deployments, asked)
    assert (first.kv, first.kv_reason) == ("miss", "new")
    cache = deployments.current.recommender.cache
    update_bundle(twins[0], tmp_path / "updated", add={}, retire={"line 1": first.items[0].item})
    updated = deployments.swap(tmp_path / "updated")
    assert updated.recommender.cache is cache
    second = ask(deployments, asked)
    assert (second.kv, second.bundle) == ("hit", updated.version)
    assert second.items[0].item != first.items[0].item
    deployments.swap(twins[1])
    third = ask(deployments, asked)
    assert (third.kv, third.kv_reason) == ("miss", "version")


def test_a_cache_of_another_shape_is_not_handed_over(twins: tuple[Path, Path]) -> None:
    model = Bundle.open(twins[0]).manifest.model
    foreign = KvCache(msgspec.structs.replace(model, num_layers=3), CacheOptions(budget_bytes=1 << 20))
    deployment = Deployment.open(twins[0], CACHED, cache=foreign)
    cache = deployment.recommender.cache
    deployment.close()
    assert cache is not None
    assert cache is not foreign
    assert cache.geometry.dtype == "fp32"


@pytest.mark.parametrize(("requested", "types"), [(None, ("int8", "bf16", "int8")), ("int8", ("int8", "int8", "int8"))])
def test_the_cache_has_the_type_that_each_bundle_states_unless_one_is_requested(
    twins: tuple[Path, Path],
    tmp_path: Path,
    reseal: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    requested: KvDtype | None,
    types: tuple[str, str, str],
) -> None:
    finer = Path(shutil.copytree(twins[1], tmp_path / "finer"))
    measured = {"requests": 2, "overlap": 1.0, "overlap_strict": 1.0}
    reseal(finer, cache={"dtype": "bf16", "agreement": measured, "refused": {}})
    options = replace(CACHED, cache=CacheOptions(budget_bytes=1 << 20, dtype=requested))
    deployments = Deployments(Deployment.open(twins[0], options))
    caches = [deployments.current.recommender.cache]
    caches += [deployments.swap(path).recommender.cache for path in (finer, twins[0])]
    assert deployments.close(timeout_s=30)
    assert tuple(cache and cache.geometry.dtype for cache in caches) == types
    assert len(set(map(id, caches))) == (3 if requested is None else 1)
    warned = "the cache stores int8, but the bundle states bf16" in caplog.text
    assert warned == (requested is not None)


def truncate(folder: Path) -> None:
    (folder / "ranker.onnx").write_bytes((folder / "ranker.onnx").read_bytes()[:-10])


def newer(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes()) | {"format_version": 999}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    seal_again(folder)


def other_golden(folder: Path) -> None:
    (folder / "golden.safetensors").write_bytes((STORED / "golden.safetensors").read_bytes())
    seal_again(folder)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (truncate, BundleCorruptError, "ranker.onnx is truncated or altered"),
        (newer, BundleVersionError, "999"),
        (other_golden, BundleError, "golden outputs do not reproduce"),
    ],
)
def test_a_bad_bundle_is_refused_and_the_old_one_serves_on(
    deployments: Deployments,
    tmp_path: Path,
    damage: Callable[[Path], None],
    error: type[BundleError],
    message: str,
) -> None:
    before = deployments.current
    bad = twin(tmp_path / "bad", seed=3)
    damage(bad)
    with pytest.raises(error, match=message):
        deployments.swap(bad)
    assert deployments.current is before
    assert ask(deployments, requests(1)[0]).bundle == before.version
    status = deployments.status()
    assert (status.opening, status.previous, status.draining) == (None, None, {})
    assert (status.swaps[-1].result, status.swaps[-1].bundle, status.swaps[-1].version) == ("refused", "bad", None)
    assert message in (status.swaps[-1].reason or "")
    assert deployments.swap_counts() == {("swap", "refused"): 1}


def test_what_nobody_foresaw_leaves_the_old_one_too(
    deployments: Deployments, twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("unipinrec.runtime.server.deployment.warm_up", fail)
        with pytest.raises(MemoryError, match="no room"):
            deployments.swap(twins[1])
    assert deployments.swap_counts() == {("swap", "failed"): 1}
    assert deployments.swap(twins[1]).version == ask(deployments, requests(1)[0]).bundle


def test_a_swap_to_what_serves_changes_nothing(deployments: Deployments, twins: tuple[Path, Path]) -> None:
    first, second = deployments.current.version, deployments.swap(twins[1])
    assert deployments.swap(twins[1]) is second
    assert deployments.status().previous == first
    assert deployments.rollback().version == first


def test_a_swap_to_what_serves_that_was_written_over_is_refused(tmp_path: Path) -> None:
    folder = twin(tmp_path / "bundle", seed=4)
    opened = Deployments(Deployment.open(folder, CACHED))
    before = ask(opened, requests(1)[0])
    content = (folder / "items.safetensors").read_bytes()
    (folder / "items.safetensors").write_bytes(content[::-1])
    with pytest.raises(BundleCorruptError, match=r"items\.safetensors is altered"):
        opened.swap(folder)
    assert opened.status().swaps[-1].result == "refused"
    assert ask(opened, requests(1)[0]).items == before.items
    (folder / "items.safetensors").write_bytes(content)
    assert opened.swap(folder) is opened.current
    assert opened.close(timeout_s=30)


def test_one_swap_at_a_time(
    deployments: Deployments, twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on, really = threading.Event(), threading.Event(), Deployment.open

    def slow(*given: object, **named: object) -> Deployment:
        entered.set()
        assert go_on.wait(20)
        return really(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Deployment, "open", slow)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(deployments.swap, twins[1])
        assert entered.wait(20)
        assert deployments.status().opening == "b"
        with pytest.raises(SwapBusyError, match="b is being opened; wait for it"):
            deployments.swap(twins[0])
        go_on.set()
        assert first.result(20) is deployments.current
    assert deployments.swap_counts() == {("swap", "busy"): 1, ("swap", "swapped"): 1}


def test_rollback_brings_back_what_served(twins: tuple[Path, Path], deployments: Deployments) -> None:
    first = deployments.current.version
    with pytest.raises(SwapError, match="no bundle was replaced since the start"):
        deployments.rollback()
    second = deployments.swap(twins[1]).version
    assert deployments.status().previous == first
    assert deployments.rollback().version == first
    assert ask(deployments, requests(1)[0]).bundle == first
    assert deployments.rollback().version == second
    assert deployments.swap_counts() == {("swap", "swapped"): 1, ("rollback", "swapped"): 2}


def test_rollback_refuses_another_bundle_in_the_same_place(twins: tuple[Path, Path], tmp_path: Path) -> None:
    index = twin(tmp_path / "place", seed=4)
    deployments = Deployments(Deployment.open(index, CACHED))
    second = deployments.swap(twins[1]).version
    index.rename(tmp_path / "moved")
    twin(index, seed=5)
    with pytest.raises(SwapError, match="place is no longer the bundle that was replaced"):
        deployments.rollback()
    assert deployments.current.version == second
    assert deployments.close(timeout_s=20)


def test_close_waits_for_requests_and_refuses_new_ones(twins: tuple[Path, Path]) -> None:
    deployments = Deployments(Deployment.open(twins[0], CACHED))
    with deployments.acquire() as held:
        assert not deployments.close(timeout_s=0.05)
        assert held.batcher.recommend(requests(1)[0]).items
        with pytest.raises(BackendError, match="shutting down"), deployments.acquire():
            pass
        with pytest.raises(SwapError, match="shutting down"):
            deployments.swap(twins[1])
    assert deployments.close(timeout_s=20)
    assert deployments.close(timeout_s=20)
