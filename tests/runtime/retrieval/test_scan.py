"""The exact scan: in fp32 and of a copy in int8, masked and gathered, it finds the same."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.catalogue import Eligible
from unipinrec.runtime.retrieval import scan as scan_module
from unipinrec.runtime.retrieval.index import recall
from unipinrec.runtime.retrieval.index_build import RECALL_TARGET, choose_ef
from unipinrec.runtime.retrieval.scan import GRAPH, INT8_ROWS, ExactIndex, Fp32Products, Int8Products, best


def unit(rng: np.random.Generator, rows: int, dim: int = 8) -> NDArray[np.float32]:
    vectors = rng.normal(size=(rows, dim)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    return unit(np.random.default_rng(5), 500)


def test_the_scan_leaves_out_excluded_rows_and_orders_ties_by_row() -> None:
    table = np.array([[1, 0], [0, 1], [1, 0], [0.6, 0.8]], np.float32)
    rows, similarity = ExactIndex(table).search(np.array([[1, 0]], np.float32), 3)
    assert rows.tolist() == [[0, 2, 3]]
    np.testing.assert_allclose(similarity, [[1, 1, 0.6]])
    rows, _ = ExactIndex(table).search(np.array([[1, 0]], np.float32), 2, np.array([False, True, True, False]))
    assert rows.tolist() == [[2, 1]]


@pytest.mark.parametrize("share", [1.0, 0.9, 0.2, 0.02])
def test_a_scan_finds_the_same_by_mask_and_by_gathering(vectors: NDArray[np.float32], share: float) -> None:
    rng = np.random.default_rng(11)
    table = np.concatenate([vectors, vectors[::-1]])  # every item twice, at places that the product rounds differently
    eligible = rng.random(len(table)) < share
    eligible[:3] = True
    queries = unit(rng, 30)
    rows, similarity = ExactIndex(table).search(queries, 3, eligible)
    for query, found, values in zip(queries, rows, similarity, strict=True):
        alone = np.array([np.einsum("e,e", row, query) for row in table])
        alone[~eligible] = -np.inf
        expected = np.lexsort((np.arange(len(table)), -alone))[:3]
        assert found.tolist() == expected.tolist()
        np.testing.assert_array_equal(values, alone[expected])


def scan(table: NDArray[np.float32], gather_cost: float) -> ExactIndex:
    return ExactIndex(table, Fp32Products(table, gather_cost))


def test_no_near_tie_is_lost_to_the_rounding_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, einsum, reversed_at = np.random.default_rng(2), np.einsum, []
    table = np.repeat(unit(rng, 1, 64), 400, axis=0) + rng.normal(scale=1e-8, size=(400, 64)).astype(np.float32)
    queries, eligible = unit(rng, 20, 64), np.arange(400) % 2 == 0

    def summed_backwards(how: str, left: Any, right: Any) -> Any:
        if how == "me,me->m":
            return einsum(how, left, right)
        reversed_at.append(how)
        return einsum(how, left[..., ::-1].copy(), right[..., ::-1].copy())

    expected = ExactIndex(table).search(queries, 3, eligible)
    similarity = np.array([[np.einsum("e,e", row, query) for row in table] for query in queries])
    similarity[:, ~eligible] = -np.inf
    np.testing.assert_array_equal(expected[0], np.argsort(-similarity, axis=1, kind="stable")[:, :3])
    monkeypatch.setattr(np, "einsum", summed_backwards)
    for cost in (4.0, 0.0):  # by mask, by gathering
        for again, found in zip(scan(table, cost).search(queries, 3, eligible), expected, strict=True):
            np.testing.assert_array_equal(again, found)
    assert set(reversed_at) == {"se,ne->sn", "me,e->m", "ne,ne->n"}


def test_no_near_tie_of_long_vectors_is_lost() -> None:
    """The margin grows with the lengths of items and query, and no inner product is too low to be pushed out."""
    rng = np.random.default_rng(2)
    table = 1e4 * (np.repeat(unit(rng, 1, 64), 400, axis=0) + rng.normal(scale=1e-7, size=(400, 64))).astype(np.float32)
    queries, eligible = -300 * unit(rng, 20, 64), np.arange(400) % 2 == 0
    similarity = np.array([[np.einsum("e,e", row, query) for row in table] for query in queries])
    similarity[:, ~eligible] = -np.inf
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :3]
    for cost in (4.0, 0.0):
        np.testing.assert_array_equal(scan(table, cost).search(queries, 3, eligible)[0], expected)


def test_scans_of_concurrent_threads_do_not_fight() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((10_000, 64)).astype(np.float32)
    scan, query = ExactIndex(vectors), vectors[:1]

    def scans(count: int) -> None:
        for _ in range(count):
            scan.search(query, 100)

    def seconds(threads: int, count: int) -> float:
        workers = [threading.Thread(target=scans, args=(count,)) for _ in range(threads)]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - began

    scans(50)
    # With the threads of BLAS it was thirty times as long.
    assert min(seconds(16, 50) for _ in range(3)) < 5 * min(seconds(1, 800) for _ in range(3))


def catalogue(kind: str, rng: np.random.Generator, items: int = 3_000) -> NDArray[np.float32]:
    """Vectors of one length, of lengths that differ a thousandfold, almost equal ones, and with empty ones."""
    vectors = unit(rng, items, 24)
    if kind == "long":
        vectors *= rng.lognormal(0, 1.5, (items, 1)).astype(np.float32)
    if kind == "near":
        vectors = np.asarray(vectors[:1] + rng.normal(scale=1e-3, size=vectors.shape), np.float32)
    if kind == "empty":
        vectors[::3] = 0
    vectors[1::100] = vectors[0]
    return vectors


@pytest.mark.parametrize("kind", ["unit", "long", "near", "empty"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), searches=st.integers(1, 5), k=st.sampled_from([1, 20, 150]))
def test_scans_find_exactly_the_best_eligible_items(kind: str, seed: int, searches: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = catalogue(kind, rng)
    queries = np.float32(rng.lognormal(0, 3)) * unit(rng, searches, 24)
    masks = [None, rng.random(len(vectors)) < 0.5, rng.random(len(vectors)) < 0.1]
    eligible = [
        Eligible(allowed=masks[rng.integers(3)], excluded=rng.permutation(np.argsort(-(vectors @ query))[:30:2]))
        for query in queries
    ]
    with pytest.MonkeyPatch.context() as small:
        small.setattr(scan_module, "BLOCK_ROWS", int(rng.choice([170, 700, 3_000])))
        small.setattr(scan_module, "QUERIES_AT_ONCE", int(rng.choice([1, 2, 32])))
        scans = ExactIndex(vectors, Int8Products(vectors, threads=2)), ExactIndex(vectors)
        near = [scan.near(queries, k, eligible) for scan in scans]
    every = [each.keep(np.arange(len(vectors))) for each in eligible]
    in_int8, in_fp32, expected = (best(vectors, queries[:, None], rows, [k] * searches) for rows in (*near, every))
    for found in (in_int8, in_fp32):
        for (rows, similarity), (known, exact) in zip(found, expected, strict=True):
            np.testing.assert_array_equal(rows, known)
            np.testing.assert_array_equal(similarity, exact)


@pytest.mark.parametrize("kind", ["unit", "long", "near", "empty"])
def test_no_product_is_above_its_bound(kind: str) -> None:
    rng = np.random.default_rng(4)
    vectors = catalogue(kind, rng)
    queries = np.concatenate([unit(rng, 20, 24), 1e-6 * unit(rng, 5, 24), np.zeros((1, 24), np.float32), vectors[:5]])
    true = queries.astype(np.float64) @ vectors.astype(np.float64).T
    scale, offset, blocks = Int8Products(vectors, threads=1).blocks(queries)
    scores = np.concatenate([block for _, block in blocks], axis=1)
    bounds = scale[:, None] * scores + offset[:, None]
    assert (bounds >= true).all()
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(vectors, axis=1).max()
    assert (bounds - true <= 0.08 * lengths + 1e-25).all()  # else it would leave too many rows


def test_the_graph_is_what_the_comment_says() -> None:
    value = helper.make_tensor_value_info
    product = helper.make_node("MatMulInteger", ["items", "queries"], ["products"])
    turned = helper.make_node("Transpose", ["products"], ["scores"], perm=[1, 0])
    inputs = [value("items", TensorProto.UINT8, ["n", "e"]), value("queries", TensorProto.INT8, ["e", "s"])]
    outputs = [value("scores", TensorProto.INT32, ["s", "n"])]
    graph = helper.make_graph([product, turned], "scan", inputs, outputs)
    assert onnx.load_from_string(GRAPH) == helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )


def test_the_largest_levels_do_not_overflow() -> None:
    """CPUs without VNNI add two products in 16 bits, and would cut larger ones off."""
    assert 2 * (scan_module.ZERO + scan_module.ITEM_LEVELS) * scan_module.QUERY_LEVELS < 1 << 15
    vectors = np.full((40, 64), 0.125, np.float32)
    scale, offset, blocks = Int8Products(vectors, threads=1).blocks(vectors[:1])
    scores = np.concatenate([block for _, block in blocks], axis=1)
    np.testing.assert_allclose(scale[0] * scores + offset[0], 1.0, atol=1e-3)


def test_only_a_large_catalogue_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(np.random.default_rng(0), INT8_ROWS, 4)
    opened = ExactIndex.fastest(vectors, threads=2)
    assert (opened.products.dtype, ExactIndex.fastest(vectors[1:]).products.dtype) == ("int8", "fp32")
    assert isinstance(opened.products, Int8Products)
    assert opened.products.threads == 2

    def missing() -> Any:
        raise BackendError("there is none")

    monkeypatch.setattr(scan_module, "import_onnxruntime", missing)
    assert ExactIndex.fastest(vectors).products.dtype == "fp32"


@pytest.mark.slow
@pytest.mark.hnswlib
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("items", [100_000, 1_000_000])
def test_the_index_finds_what_the_scan_finds(items: int) -> None:
    """Within the target of the index; `bench/scan.py` measures their times."""
    import hnswlib

    rng = np.random.default_rng(0)
    centres = unit(rng, items // 200, 64)
    vectors = np.empty((items, 64), np.float32)
    for start in range(0, items, 50_000):
        noise = rng.normal(scale=0.75 / 8, size=(50_000, 64))
        near = centres[rng.integers(0, len(centres), 50_000)] + noise
        vectors[start : start + 50_000] = near / np.linalg.norm(near, axis=1, keepdims=True)
    queries = np.asarray(vectors[:100] + rng.normal(scale=0.5 / 8, size=(100, 64)), np.float32)
    scan = ExactIndex.fastest(vectors)
    assert scan.products.dtype == "int8"
    rows, similarity = scan.search(queries, 100)
    in_fp32 = ExactIndex(vectors).search(queries[:5], 100)
    np.testing.assert_array_equal(rows[:5], in_fp32[0])
    np.testing.assert_array_equal(similarity[:5], in_fp32[1])
    index = hnswlib.Index(space="ip", dim=64)
    index.init_index(items, M=16, ef_construction=200, random_seed=0)
    index.add_items(vectors, np.arange(items))

    def measure(made: Any) -> float:
        found = best(vectors, queries[:, None], list(made.knn_query(queries, k=100)[0].astype(np.int64)), [100] * 100)
        return recall(np.stack([values for _, values in found]), similarity)

    _, reached = choose_ef(index, measure, RECALL_TARGET)
    assert reached >= RECALL_TARGET
