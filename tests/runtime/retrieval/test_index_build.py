from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from unipinrec.errors import ExportError
from unipinrec.runtime.retrieval import index_build
from unipinrec.runtime.retrieval.index import HnswIndex
from unipinrec.runtime.retrieval.index_build import IndexTask, build_index, grow_index

pytestmark = pytest.mark.hnswlib
ITEMS, DIM = 600, 16
NONE = np.array([], np.int64)


def unit(rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    vectors = rng.normal(size=(rows, DIM)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    return unit(np.random.default_rng(0), ITEMS)


@pytest.fixture(scope="module")
def queries() -> NDArray[np.float32]:
    return unit(np.random.default_rng(1), 30)


def found(path: Path, spec: Any, vectors: NDArray[np.float32], retired: NDArray[np.int64], k: int) -> list[int]:
    rows, _ = HnswIndex(path, spec, vectors, retired).search(vectors[5:6], k)
    return sorted(rows[0].tolist())


def test_the_cheapest_search_that_reaches_the_target_is_chosen(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    easy = build_index(IndexTask(vectors=vectors, queries=queries, target=0.9), tmp_path / "easy")
    assert (easy.m, easy.ef_search, easy.recall_target, easy.recall_k, easy.count) == (16, 100, 0.9, 100, ITEMS)
    assert easy.recall >= 0.9
    assert not easy.scan
    # Few links and narrow searches, so that a small catalogue is hard to search.
    monkeypatch.setattr(index_build, "M_CHOICES", (2, 3, 16))
    monkeypatch.setattr(index_build, "EF_CHOICES", (100, 150))
    hard = build_index(IndexTask(vectors=vectors, queries=queries, target=0.95), tmp_path / "hard")
    assert hard.m > 2
    assert hard.recall >= 0.95


def test_a_target_that_is_missed_is_warned_of(
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(index_build, "M_CHOICES", (3, 2))
    monkeypatch.setattr(index_build, "EF_CHOICES", (100, 150))
    with caplog.at_level(logging.WARNING, logger="unipinrec"):
        spec = build_index(IndexTask(vectors=vectors, queries=queries, target=1.0), tmp_path / "index")
    assert (spec.m, spec.ef_search) == (3, 150)  # the better of the two
    assert spec.recall < spec.recall_target == 1.0
    assert spec.scan
    assert f"recall@100 of {spec.recall:.4f}, not 1.0000, even with M=3 and ef=150" in caplog.text
    measured = HnswIndex(tmp_path / "index", spec, vectors).search(queries, 100)[1]
    exact = np.sort(queries @ vectors.T, axis=1)[:, -100:]
    assert spec.recall == pytest.approx(np.mean(measured >= exact[:, :1] - 1e-5))


def test_retired_items_are_left_out_of_a_new_index(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], tmp_path: Path
) -> None:
    retired = np.array([5, 6, 599])
    spec = build_index(IndexTask(vectors=vectors, queries=queries, retired=retired), tmp_path / "index")
    assert (spec.count, spec.recall) == (597, 1.0)
    kept = np.setdiff1d(np.arange(ITEMS), retired).tolist()
    assert found(tmp_path / "index", spec, vectors, retired, 597) == kept


def test_an_index_grows_and_shrinks_step_by_step(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], tmp_path: Path
) -> None:
    first = build_index(IndexTask(vectors=vectors[:400], queries=queries, retired=np.array([399])), tmp_path / "0")
    before = (tmp_path / "0").read_bytes()
    task = IndexTask(vectors=vectors[:500], queries=queries, retired=np.array([5, 399]))
    second = grow_index(task, tmp_path / "0", first, np.array([399]), tmp_path / "1")
    assert second is not None
    assert (second.count, second.m) == (499, 16)
    assert second.recall >= 0.99
    task = IndexTask(vectors=vectors, queries=queries, retired=np.array([5, 6, 399, 450]))
    third = grow_index(task, tmp_path / "1", second, np.array([5, 399]), tmp_path / "2")
    assert third is not None
    assert (third.count, third.recall_target) == (599, 0.99)
    kept = np.setdiff1d(np.arange(ITEMS), task.retired).tolist()
    assert found(tmp_path / "2", third, vectors, task.retired, 596) == kept
    assert (tmp_path / "0").read_bytes() == before


def test_an_index_that_is_mostly_retired_or_misses_the_target_is_not_grown(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = build_index(IndexTask(vectors=vectors, queries=queries), tmp_path / "old")
    task = IndexTask(vectors=vectors, queries=queries, retired=np.arange(301))
    assert grow_index(task, tmp_path / "old", spec, NONE, tmp_path / "new") is None
    task = IndexTask(vectors=vectors, queries=queries, retired=np.arange(300))
    assert grow_index(task, tmp_path / "old", spec, NONE, tmp_path / "new") is not None
    monkeypatch.setattr(index_build, "M_CHOICES", (2,))
    monkeypatch.setattr(index_build, "EF_CHOICES", (100,))
    poor = build_index(IndexTask(vectors=vectors, queries=queries, target=0.5), tmp_path / "poor")
    assert 0.5 <= poor.recall < 0.99
    task = IndexTask(vectors=vectors, queries=queries, retired=np.arange(3))
    assert grow_index(task, tmp_path / "poor", poor, NONE, tmp_path / "third") is None
    assert not (tmp_path / "third").exists()


def test_equal_items_do_not_spoil_the_recall(tmp_path: Path) -> None:
    """Items that differ in nothing have one vector; which of them is found makes no difference."""
    vectors = np.repeat(unit(np.random.default_rng(2), 6), 100, axis=0)
    queries = unit(np.random.default_rng(3), 20)
    assert build_index(IndexTask(vectors=vectors, queries=queries), tmp_path / "index").recall >= 0.99


def test_the_recall_of_small_products_is_the_true_one(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], tmp_path: Path
) -> None:
    """hnswlib keeps 1 minus a product, so that it orders products of 1e-8 at random."""
    small = 1e-4 * vectors
    spec = build_index(IndexTask(vectors=small, queries=1e-4 * queries), tmp_path / "index")
    rows, _ = HnswIndex(tmp_path / "index", spec, small).search(1e-4 * queries, 100)
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :100]
    true = np.mean([len(np.intersect1d(*pair)) for pair in zip(rows, exact, strict=True)]) / 100
    assert spec.recall == pytest.approx(true, abs=0.01)
    assert spec.scan == (spec.recall < 0.99)
    assert true < 0.9


def test_a_file_that_does_not_read_back_is_refused(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], tmp_path: Path
) -> None:
    (tmp_path / "index").symlink_to("/dev/null")
    with pytest.raises(ExportError, match=r"index: wrote 0 of \d+ bytes; no space left on the disk"):
        build_index(IndexTask(vectors=vectors, queries=queries), tmp_path / "index")


def test_items_that_are_all_equal_end_the_search_for_a_larger_index(tmp_path: Path) -> None:
    """Twenty thousand items, of which half are equal, took minutes: no index reaches the others past the equal ones."""
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, 20_000), unit(rng, 100)
    vectors[::2] = vectors[0]
    began = time.process_time()
    spec = build_index(IndexTask(vectors=vectors, queries=queries), tmp_path / "index")
    assert time.process_time() - began < 30
    assert (spec.m, spec.scan) == (16, True)


def test_equal_items_count_as_found_and_a_few_of_them_change_nothing(
    vectors: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = np.repeat(vectors, 2, axis=0)  # each item has an equal one, so that ids alone would miss some
    spec = build_index(IndexTask(vectors=twice, queries=vectors[:50]), tmp_path / "index")
    assert (spec.m, spec.scan) == (16, False)
    assert spec.recall > 0.995
    few = vectors.copy()
    few[:30] = few[0]  # fewer than an item has links at the largest M
    monkeypatch.setattr(index_build, "M_CHOICES", (2, 16))
    monkeypatch.setattr(index_build, "EF_CHOICES", (100,))
    assert build_index(IndexTask(vectors=few, queries=vectors[:50], target=0.98), tmp_path / "few").m == 16


def test_an_index_does_not_depend_on_how_many_items_are_added_at_a_time(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = IndexTask(vectors=vectors, queries=queries)
    for name, at_once in (("whole", ITEMS), ("parts", 7)):
        monkeypatch.setattr(index_build, "ITEMS_AT_ONCE", at_once)
        build_index(task, tmp_path / name)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
