from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from answers import STORED, retrieved
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.catalogue import mask_without
from unipinrec.runtime.bundle.manifest import IndexSpec
from unipinrec.runtime.retrieval.index import HnswIndex, VectorIndex, recall
from unipinrec.runtime.retrieval.retriever import Retriever, Search
from unipinrec.runtime.retrieval.scan import ExactIndex, Matches

ITEMS, DIM, RETIRED = 400, 8, np.arange(7, 400, 40)
NONE = np.array([], np.int64)


def unit(rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    vectors = rng.normal(size=(rows, DIM)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def build(path: str, retired: NDArray[np.int64]) -> Retriever:
    vectors = unit(np.random.default_rng(2), ITEMS)
    vectors[1::50] = vectors[0]  # equal items, to see the order of ties
    hnswlib = pytest.importorskip("hnswlib", reason="hnswlib is not installed")

    index = hnswlib.Index(space="ip", dim=DIM)
    index.init_index(ITEMS, M=16, ef_construction=200, random_seed=1)
    index.add_items(vectors, np.arange(ITEMS), num_threads=1)
    for row in retired:
        index.mark_deleted(row)
    index.save_index(path)
    spec = IndexSpec(
        space="ip", dim=DIM, count=ITEMS, m=16, ef_construction=200, ef_search=100, seed=1, recall=1.0, recall_k=10
    )
    return Retriever(
        index=HnswIndex(Path(path), spec, vectors, retired),
        scan=ExactIndex(vectors),
        item_vectors=vectors,
        live=mask_without(ITEMS, retired) if len(retired) else None,
        visit_cost=0,
    )


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    """Asks the index however few items there are."""
    return build(str(tmp_path_factory.mktemp("index") / "index.hnsw"), NONE)


@pytest.fixture(scope="module")
def updated(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    """The same with some items retired."""
    return build(str(tmp_path_factory.mktemp("updated") / "index.hnsw"), RETIRED)


def best(
    retriever: Retriever,
    queries: NDArray[np.float32],
    excluded: NDArray[np.int64],
    allowed: NDArray[np.bool_] | None = None,
) -> list[int]:
    """All eligible rows by falling similarity with the nearest query, ties by row."""
    eligible = np.ones(ITEMS, np.bool_) if allowed is None else allowed.copy()
    eligible[excluded] = False
    if retriever.live is not None:
        eligible &= retriever.live
    similarity = np.stack([[np.einsum("e,e", row, query) for query in queries] for row in retriever.item_vectors])
    order = np.lexsort((np.arange(ITEMS), -similarity.max(axis=1)))
    return [row for row in order.tolist() if eligible[row]]


def test_the_index_finds_what_a_scan_finds(retriever: Retriever) -> None:
    query = unit(np.random.default_rng(3), 1)
    seen = np.array(best(retriever, query, NONE)[:5])
    found = retrieved(retriever, query, 10, seen)
    scanned = retrieved(retriever, query, 10, seen, exact=True)
    assert found.exact is None
    assert scanned.exact == "requested"
    assert found.rows.tolist() == scanned.rows.tolist() == best(retriever, query, seen)[:10]
    np.testing.assert_array_equal(found.similarity, scanned.similarity)


def test_several_queries_merge_by_the_highest_similarity(retriever: Retriever) -> None:
    queries = unit(np.random.default_rng(4), 3)
    found = retrieved(retriever, queries, 12, NONE)
    assert found.exact is None
    assert found.rows.tolist() == best(retriever, queries, NONE)[:12]
    expected = (retriever.item_vectors[found.rows] @ queries.T).max(axis=1)
    np.testing.assert_allclose(found.similarity, expected, atol=1e-6)


def test_filters_that_leave_too_few_cause_a_scan(retriever: Retriever) -> None:
    query = unit(np.random.default_rng(5), 1)
    denied = np.sort(best(retriever, query, NONE)[:50])
    found = retrieved(retriever, query, 10, denied)
    assert found.exact == "0 of 10 candidates were left by the filters"
    assert found.rows.tolist() == best(retriever, query, denied)[:10]


def test_what_is_scanned_sooner_is_scanned(retriever: Retriever) -> None:
    query, costly = unit(np.random.default_rng(6), 1), replace(retriever, visit_cost=2)
    assert retrieved(costly, query, 200, NONE).exact is None
    assert retrieved(costly, query, 201, NONE).exact == "scanning 400 items is faster than searching the index for 201"


def test_filters_make_a_scan_more_likely(retriever: Retriever) -> None:
    query, costly = unit(np.random.default_rng(6), 1), replace(retriever, visit_cost=0.5)
    assert retrieved(costly, query, 400, NONE).exact is None
    seldom = mask_without(ITEMS, np.arange(60, ITEMS))
    assert retrieved(costly, query, 10, NONE, allowed=seldom).exact == (
        "scanning 60 items is faster than searching the index for 130"
    )
    half = mask_without(ITEMS, np.arange(0, ITEMS, 2))
    assert retrieved(costly, query, 10, NONE, allowed=half).exact is None


def test_a_small_catalogue_is_scanned_by_default(retriever: Retriever) -> None:
    query = unit(np.random.default_rng(6), 1)
    usual = Retriever(index=retriever.index, scan=retriever.scan, item_vectors=retriever.item_vectors)
    assert retrieved(usual, query, 10, NONE).exact == "scanning 400 items is faster than searching the index for 10"


def test_all_that_is_eligible_can_be_wanted(retriever: Retriever) -> None:
    query = unit(np.random.default_rng(7), 1)
    excluded = np.arange(0, ITEMS, 2)
    assert sorted(retrieved(retriever, query, 200, excluded).rows) == list(range(1, ITEMS, 2))


def test_a_broken_query_is_not_answered_by_a_scan(retriever: Retriever) -> None:
    with pytest.raises(BackendError, match="a query vector is not finite"):
        retrieved(retriever, np.full((1, DIM), np.nan, np.float32), 10, NONE)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), queries=st.integers(1, 3), excluded=st.sets(st.integers(0, ITEMS - 1)), data=st.data())
def test_exactly_the_wanted_number_comes_back(
    retriever: Retriever, seed: int, queries: int, excluded: set[int], data: st.DataObject
) -> None:
    wanted = data.draw(st.integers(1, ITEMS - len(excluded)))
    found = retrieved(
        retriever, unit(np.random.default_rng(seed), queries), wanted, np.array(sorted(excluded), np.int64)
    )
    assert len(set(found.rows.tolist()) - excluded) == wanted == len(found.rows)
    assert (np.diff(found.similarity) <= 0).all()


@pytest.mark.parametrize("share", [0.003, 0.05, 0.3, 0.9, 1.0])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 9999), queries=st.integers(1, 3), data=st.data())
def test_filters_leave_exactly_the_best_eligible_items(
    retriever: Retriever, updated: Retriever, share: float, seed: int, queries: int, data: st.DataObject
) -> None:
    """Exactly those by a scan, masked or gathered; by the index as many, all eligible, of the same similarity."""
    rng = np.random.default_rng(seed)
    asked = data.draw(st.sampled_from([retriever, updated]))
    allowed = rng.random(ITEMS) < share
    allowed[rng.integers(0, ITEMS)] = True
    allowed = allowed if asked.live is None else allowed & asked.live
    excluded = np.unique(rng.integers(0, ITEMS, rng.integers(0, 60)))
    query = unit(rng, queries)
    expected = best(asked, query, excluded, allowed)
    if not expected:
        return
    wanted = data.draw(st.integers(1, len(expected)))
    scanned = retrieved(asked, query, wanted, excluded, allowed=allowed, exact=True)
    assert scanned.rows.tolist() == expected[:wanted]
    found = retrieved(asked, query, wanted, excluded, allowed=allowed)
    assert len(set(found.rows.tolist())) == wanted
    assert set(found.rows.tolist()) <= set(expected)
    similarity = dict(zip(found.rows.tolist(), found.similarity.tolist(), strict=True))
    for row, value in zip(scanned.rows.tolist(), scanned.similarity.tolist(), strict=True):
        assert similarity.get(row, value) == value
    if found.exact is None:
        assert found.rows.tolist() == [row for row in expected if row in similarity]


def test_retired_items_are_not_found_without_any_filter(updated: Retriever) -> None:
    query = updated.item_vectors[RETIRED[:1]]
    for exact in (False, True):
        found = retrieved(updated, query, ITEMS - len(RETIRED), NONE, exact=exact)
        assert not set(found.rows.tolist()) & set(RETIRED.tolist())
        assert len(set(found.rows.tolist())) == ITEMS - len(RETIRED)


def test_without_an_index_all_items_are_scanned(retriever: Retriever) -> None:
    query = unit(np.random.default_rng(9), 1)
    found = retrieved(replace(retriever, index=None, unused="the index finds too few"), query, 10, NONE)
    assert found.exact == "the index finds too few"
    assert found.rows.tolist() == best(retriever, query, NONE)[:10]


def test_a_stored_bundle_is_searched_as_its_manifest_says(caplog: pytest.LogCaptureFixture) -> None:
    opened = Retriever.open(Bundle.open(STORED.with_name("bundle_v3")))
    assert (opened.index, opened.unused) == (None, "the bundle has no index")
    assert opened.way == "each request scans 24 items in fp32: the bundle has no index"
    assert caplog.text == ""


@pytest.mark.hnswlib
def test_an_index_is_loaded() -> None:
    opened = Retriever.open(Bundle.open(STORED))
    assert opened.index is not None
    assert opened.way == "hnswlib, or a scan where that is faster"


def test_where_hnswlib_is_missing_a_bundle_with_an_index_is_scanned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    opened = Retriever.open(Bundle.open(STORED))
    (warning,) = caplog.messages
    assert warning == (
        "each request scans 24 items in fp32: hnswlib is not installed; pip install 'unipinrec[hnsw]' compiles it"
    )
    (found,) = opened.retrieve([Search(queries=opened.item_vectors[5:6], k=3)])
    assert found.rows[0] == 5
    assert found.exact == opened.unused
    assert opened.way == warning


def test_recall_is_sampled(retriever: Retriever, updated: Retriever) -> None:
    queries = unit(np.random.default_rng(8), 20)
    assert sampled_recall(retriever, queries) == 1.0
    assert sampled_recall(updated, queries) == 1.0
    assert retriever.index is not None
    worse = replace(retriever, index=Behind(retriever.index))
    assert sampled_recall(worse, queries) == pytest.approx(0.9)


def test_an_item_of_almost_no_length_is_like_no_other(bundle: Path) -> None:
    """Weight decay makes such vectors of items that training does not show; the square of 1e-25 is 0 in fp32."""
    opened = Bundle.open(bundle)
    vectors = np.array(opened.item_vectors)
    vectors[3] *= np.float32(1e-25)
    by_item = Retriever.of_items(replace(opened, item_vectors=vectors))
    (result,) = by_item.retrieve([Search(queries=by_item.item_vectors[5:6], k=len(vectors))])
    assert result.rows[0] == 5
    assert dict(zip(result.rows.tolist(), result.similarity.tolist(), strict=True))[3] == pytest.approx(0.0, abs=1e-6)


def sampled_recall(retriever: Retriever, queries: NDArray[np.float32], k: int = 10) -> float:
    assert retriever.index is not None
    _, similarity = retriever.index.search(queries, k)
    _, exact = retriever.scan.search(queries, k, retriever.live)
    return recall(similarity, exact)


class Behind:
    """An index that misses the nearest item."""

    def __init__(self, index: VectorIndex) -> None:
        self.index, self.ef = index, index.ef

    def search(self, queries: NDArray[np.float32], k: int) -> Matches:
        rows, similarity = self.index.search(queries, k + 1)
        return rows[:, 1:], similarity[:, 1:]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    searches=st.integers(1, 6),
    queries=st.integers(1, 3),
    visit_cost=st.sampled_from([0, 1, 50]),
)
def test_searches_find_together_what_they_find_alone(
    updated: Retriever, seed: int, searches: int, queries: int, visit_cost: float
) -> None:
    rng = np.random.default_rng(seed)
    assert updated.live is not None
    asked = [
        Search(
            queries=unit(rng, queries),
            k=int(rng.choice([1, 30, 100])),
            excluded=np.flatnonzero((rng.random(ITEMS) < 0.1) & updated.live),
            allowed=updated.live & (rng.random(ITEMS) < 0.9) if rng.random() < 0.5 else None,
            exact=bool(rng.random() < 0.3),
        )
        for _ in range(searches)
    ]
    asking = replace(updated, visit_cost=visit_cost)
    for search, together in zip(asked, asking.retrieve(asked), strict=True):
        (alone,) = asking.retrieve([search])
        np.testing.assert_array_equal(together.rows, alone.rows)
        np.testing.assert_array_equal(together.similarity, alone.similarity)
        assert together.exact == alone.exact
        assert len(together.rows) == search.k


def test_a_scan_that_does_not_fit_at_once_finds_the_same(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [Search(queries=unit(np.random.default_rng(seed), 2), k=20, exact=True) for seed in range(5)]
    expected = retriever.retrieve(asked)
    monkeypatch.setattr("unipinrec.runtime.retrieval.scan.QUERIES_AT_ONCE", 3)
    monkeypatch.setattr("unipinrec.runtime.retrieval.scan.BLOCK_ROWS", 30)
    for found, known in zip(retriever.retrieve(asked), expected, strict=True):
        np.testing.assert_array_equal(found.rows, known.rows)
        np.testing.assert_array_equal(found.similarity, known.similarity)
