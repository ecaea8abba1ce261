from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from unipinrec.errors import BackendError, BundleError
from unipinrec.runtime.bundle.manifest import IndexSpec
from unipinrec.runtime.retrieval.index import HnswIndex, recall
from unipinrec.runtime.retrieval.scan import ExactIndex

SPEC = IndexSpec(space="ip", dim=8, count=500, m=16, ef_construction=100, ef_search=50, seed=1, recall=1.0, recall_k=10)


def unit(rng: np.random.Generator, rows: int, dim: int = 8) -> NDArray[np.float32]:
    vectors = rng.normal(size=(rows, dim)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def write_index(path: Path, vectors: NDArray[np.float32]) -> Path:
    hnswlib = pytest.importorskip("hnswlib", reason="hnswlib is not installed")

    index: Any = hnswlib.Index(space="ip", dim=vectors.shape[1])
    index.init_index(len(vectors), M=16, ef_construction=100, random_seed=1)
    index.add_items(vectors, np.arange(len(vectors)), num_threads=1)
    index.save_index(str(path))
    return path


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    return unit(np.random.default_rng(5), 500)


@pytest.fixture(scope="module")
def path(vectors: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_index(tmp_path_factory.mktemp("index") / "index.hnsw", vectors)


def test_both_indexes_find_the_same_items_and_similarity(path: Path, vectors: NDArray[np.float32]) -> None:
    queries = unit(np.random.default_rng(6), 4)
    rows, similarity = HnswIndex(path, SPEC, vectors).search(queries, 10)
    exact_rows, exact_similarity = ExactIndex(vectors).search(queries, 10)
    expected = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    np.testing.assert_array_equal(exact_rows, expected)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(similarity, exact_similarity, atol=1e-6)


def test_more_neighbours_than_ef_are_found_in_full(path: Path, vectors: NDArray[np.float32]) -> None:
    rows, similarity = HnswIndex(path, SPEC, vectors).search(vectors[:1], 400)
    assert len(np.unique(rows)) == 400
    assert (np.diff(similarity[0]) <= 0).all()
    expected, _ = ExactIndex(vectors).search(vectors[:1], 400)
    assert len(np.intersect1d(rows, expected)) > 395


def test_recall_counts_what_is_as_near_as_the_last() -> None:
    true = np.array([[0.9, 0.5, 0.5], [0.9, 0.8, 0.7]], np.float32)
    assert recall(np.array([[0.5, 0.5, 0.5], [0.9, 0.8, 0.7]], np.float32), true) == 1.0
    assert recall(np.array([[0.9, 0.5, 0.4], [0.7, 0.6, 0.5]], np.float32), true) == 0.5
    assert recall(1e-6 * np.array([[0.9, 0.5, 0.4], [0.7, 0.6, 0.5]], np.float32), 1e-6 * true) == 0.5


def test_retired_items_are_marked_or_absent(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    retired = np.array([0, 17, 499])
    kept = np.setdiff1d(np.arange(500), retired)
    hnswlib = pytest.importorskip("hnswlib", reason="hnswlib is not installed")

    index: Any = hnswlib.Index(space="ip", dim=8)
    index.init_index(497, M=16, ef_construction=100, random_seed=1)
    index.add_items(vectors[kept], kept, num_threads=1)
    index.save_index(str(tmp_path / "index.hnsw"))
    absent = HnswIndex(tmp_path / "index.hnsw", msgspec.structs.replace(SPEC, count=497), vectors, retired)
    rows, _ = absent.search(vectors[17:18], 497)
    assert sorted(rows[0].tolist()) == kept.tolist()
    with pytest.raises(BundleError, match=r"the index does not match the items: it lacks some"):
        HnswIndex(tmp_path / "index.hnsw", msgspec.structs.replace(SPEC, count=497), vectors)


def test_a_query_that_is_not_finite_is_refused(path: Path, vectors: NDArray[np.float32]) -> None:
    query = np.full((1, 8), np.nan, np.float32)
    for index in (HnswIndex(path, SPEC, vectors), ExactIndex(vectors)):
        with pytest.raises(BackendError, match="a query vector is not finite"):
            index.search(query, 3)


def test_more_neighbours_than_items_cannot_be_found(path: Path, vectors: NDArray[np.float32]) -> None:
    with pytest.raises(BackendError, match="hnswlib found fewer than k=501 items"):
        HnswIndex(path, SPEC, vectors).search(vectors[:1], 501)


@pytest.mark.parametrize("changes", [{"dim": 16}, {"dim": 4}, {"count": 499}])
def test_an_index_of_another_shape_is_not_loaded(
    path: Path, vectors: NDArray[np.float32], changes: dict[str, int]
) -> None:
    with pytest.raises(BundleError, match=r"the index does not match the items: it has \(dim, count\) = \(8, 500\)"):
        HnswIndex(path, msgspec.structs.replace(SPEC, **changes), vectors)


def test_an_index_of_other_vectors_is_not_used(path: Path) -> None:
    with pytest.raises(BundleError, match="the index does not match the items: it has other vectors"):
        HnswIndex(path, SPEC, unit(np.random.default_rng(7), 500))


@pytest.mark.parametrize("kept", [0, 20, 200])
def test_what_is_no_index_is_not_loaded(path: Path, vectors: NDArray[np.float32], tmp_path: Path, kept: int) -> None:
    (tmp_path / "part.hnsw").write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BundleError, match=r"part\.hnsw: .*export the bundle again"):
        HnswIndex(tmp_path / "part.hnsw", SPEC, vectors)
