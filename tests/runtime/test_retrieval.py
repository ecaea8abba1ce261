from __future__ import annotations

import hnswlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.index import ExactIndex, HnswIndex
from unipinrec.runtime.manifest import IndexSpec
from unipinrec.runtime.retrieval import Retriever

ITEMS, DIM = 400, 8
NONE = np.array([], np.int64)


def unit(rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    vectors = rng.normal(size=(rows, DIM)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    vectors = unit(np.random.default_rng(2), ITEMS)
    path = tmp_path_factory.mktemp("index") / "index.hnsw"
    index = hnswlib.Index(space="ip", dim=DIM)
    index.init_index(ITEMS, M=16, ef_construction=200, random_seed=1)
    index.add_items(vectors, np.arange(ITEMS), num_threads=1)
    index.save_index(str(path))
    spec = IndexSpec(
        space="ip", dim=DIM, count=ITEMS, m=16, ef_construction=200, ef_search=100, seed=1, recall=1.0, recall_k=10
    )
    return Retriever(index=HnswIndex(path, spec, vectors), scan=ExactIndex(vectors), item_vectors=vectors)


def best(retriever: Retriever, queries: NDArray[np.float32], excluded: NDArray[np.int64]) -> list[int]:
    """All rows by falling similarity with the nearest query, excluded ones left out."""
    similarity = (retriever.item_vectors @ queries.T).max(axis=1)
    return [row for row in np.argsort(-similarity).tolist() if row not in set(excluded.tolist())]


def test_the_index_finds_what_a_scan_finds(retriever: Retriever) -> None:
    query = unit(np.random.default_rng(3), 1)
    seen = np.array(best(retriever, query, NONE)[:5])
    found = retriever.retrieve(query, 10, seen)
    scanned = retriever.retrieve(query, 10, seen, exact=True)
    assert found.exact is None
    assert scanned.exact == "asked for"
    assert found.rows.tolist() == scanned.rows.tolist() == best(retriever, query, seen)[:10]
    np.testing.assert_array_equal(found.similarity, scanned.similarity)


def test_several_queries_merge_by_the_highest_similarity(retriever: Retriever) -> None:
    queries = unit(np.random.default_rng(4), 3)
    found = retriever.retrieve(queries, 12, NONE)
    assert found.exact is None
    assert found.rows.tolist() == best(retriever, queries, NONE)[:12]
    expected = (retriever.item_vectors[found.rows] @ queries.T).max(axis=1)
    np.testing.assert_array_equal(found.similarity, expected)


def test_filters_that_leave_too_few_cause_a_scan(retriever: Retriever) -> None:
    query = unit(np.random.default_rng(5), 1)
    denied = np.sort(best(retriever, query, NONE)[:50])
    found = retriever.retrieve(query, 10, denied)
    assert found.exact == "0 of 10 candidates were left by the filters"
    assert found.rows.tolist() == best(retriever, query, denied)[:10]


def test_a_large_share_of_the_catalogue_is_scanned(retriever: Retriever) -> None:
    query = unit(np.random.default_rng(6), 1)
    assert retriever.retrieve(query, 100, NONE).exact is None
    assert retriever.retrieve(query, 101, NONE).exact == "101 of 400 items would be fetched"


def test_all_that_is_eligible_can_be_wanted(retriever: Retriever) -> None:
    query = unit(np.random.default_rng(7), 1)
    excluded = np.arange(0, ITEMS, 2)
    assert sorted(retriever.retrieve(query, 200, excluded).rows) == list(range(1, ITEMS, 2))


def test_a_broken_query_is_not_answered_by_a_scan(retriever: Retriever) -> None:
    with pytest.raises(BackendError, match="a query vector is not finite"):
        retriever.retrieve(np.full((1, DIM), np.nan, np.float32), 10, NONE)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), queries=st.integers(1, 3), excluded=st.sets(st.integers(0, ITEMS - 1)), data=st.data())
def test_exactly_the_wanted_number_comes_back(
    retriever: Retriever, seed: int, queries: int, excluded: set[int], data: st.DataObject
) -> None:
    wanted = data.draw(st.integers(1, ITEMS - len(excluded)))
    found = retriever.retrieve(unit(np.random.default_rng(seed), queries), wanted, np.array(sorted(excluded), np.int64))
    assert len(set(found.rows.tolist()) - excluded) == wanted == len(found.rows)
    assert (np.diff(found.similarity) <= 0).all()
