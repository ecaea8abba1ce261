"""Ways to find the best items without a compiler, against the index (docs/decisions/0021).

    python bench/scan.py --items 100000 --dim 64 [--rounds 15] [--threads 2] [--other DIR]

Card: `--items` unit vectors around 500 centres per 100,000 items, one query near a random item and batches of 8 and 32,
top 200 and 100. Median, 10th and 90th percentile of ms, interleaved round by round; a batch is one call where the way
has such a call. `same` is the share of the best items that are those of the first way.

    fp32         `ExactIndex` on the item table itself, one thread
    int8         `ExactIndex` on a copy in int8; `int8_1` on one thread
    blas         `vectors @ queries.T` and `argpartition`, with the threads of BLAS
    ort          MatMul and TopK in ONNX Runtime, fp32
    hnsw         hnswlib with M=16, searched on one thread, with ef for a recall of 0.99
    faiss_flat, faiss_hnsw, usearch_exact, usearch_hnsw   of packages that ship wheels, from `--other` (pip --target);
                 their graphs up to 200,000 items, with M=16 and ef=200

`gather_cost` is the time of a gathered row over that of a row of a scan in passing, for both kinds of scan.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from common import card, finish, interleaved, spread
from numpy.typing import NDArray

from unipinrec.runtime.bundle.catalogue import Eligible
from unipinrec.runtime.graphs.ort_cpu import PROVIDER, import_onnxruntime, session_options
from unipinrec.runtime.retrieval.index import import_hnswlib, recall
from unipinrec.runtime.retrieval.index_build import RECALL_TARGET, choose_ef
from unipinrec.runtime.retrieval.scan import BLOCK_ROWS, ExactIndex, Fp32Products, Int8Products, best

SPREAD, BATCHES, WANTED = 0.75, (1, 8, 32), (200, 100)
Floats = NDArray[np.float32]
Way = Callable[[Floats, int], NDArray[np.int64]]


def unit(vectors: NDArray[Any]) -> Floats:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


class Catalogue:
    """Items around centres, and queries near random items."""

    def __init__(self, items: int, dim: int) -> None:
        self.rng = np.random.default_rng(0)
        centres = unit(self.rng.normal(size=(max(500, items // 200), dim)))
        self.vectors = np.empty((items, dim), np.float32)
        for start in range(0, items, BLOCK_ROWS):
            part = self.vectors[start : start + BLOCK_ROWS]
            noise = self.rng.normal(size=part.shape) * SPREAD / np.sqrt(dim)
            part[:] = unit(centres[self.rng.integers(0, len(centres), len(part))] + noise)

    def queries(self, count: int) -> Floats:
        near = self.vectors[self.rng.integers(0, len(self.vectors), count)]
        return unit(near + 0.5 * self.rng.normal(size=near.shape) / np.sqrt(near.shape[1]))


def scanned(scan: ExactIndex, queries: Floats, k: int) -> NDArray[np.int64]:
    return scan.search(queries, k)[0]


def by_blas(vectors: Floats, queries: Floats, k: int) -> NDArray[np.int64]:
    scores = np.ascontiguousarray((vectors @ queries.T).T)
    return np.argpartition(scores, len(vectors) - k, axis=1)[:, -k:]


def ort_way(vectors: Floats, threads: int) -> Way:
    from onnx import TensorProto, helper  # noqa: PLC0415 - bench of a machine that serves has none

    value, ort = helper.make_tensor_value_info, import_onnxruntime()
    nodes = [
        helper.make_node("Gemm", ["queries", "items"], ["scores"], transB=1),
        helper.make_node("TopK", ["scores", "k"], ["best", "rows"], sorted=0),
    ]
    inputs = [value("items", TensorProto.FLOAT, ["n", "e"]), value("queries", TensorProto.FLOAT, ["s", "e"])]
    outputs = [value("rows", TensorProto.INT64, ["s", "m"])]
    graph = helper.make_graph(nodes, "scan", [*inputs, value("k", TensorProto.INT64, [1])], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), session_options(ort, threads), providers=[PROVIDER])

    def search(queries: Floats, k: int) -> NDArray[np.int64]:
        found: list[NDArray[np.int64]] = session.run(None, {"items": vectors, "queries": queries, "k": np.array([k])})
        return found[0]

    return search


def rows_of(found: Any, queries: Floats) -> NDArray[np.int64]:
    return np.asarray(found.keys, np.int64).reshape(len(queries), -1)


def flat_ways(vectors: Floats, threads: int, faiss: Any, usearch: Any) -> dict[str, Way]:
    """Scans of packages that ship wheels."""

    def flat(queries: Floats, k: int) -> NDArray[np.int64]:
        return np.asarray(faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)[1])

    def exact(queries: Floats, k: int) -> NDArray[np.int64]:
        return rows_of(usearch.search(vectors, queries, k, metric="ip", exact=True, threads=threads), queries)

    return {"faiss_flat": flat, "usearch_exact": exact}


def graph_ways(vectors: Floats, threads: int, faiss: Any, usearch: Any) -> tuple[dict[str, Way], dict[str, float]]:
    """Indexes of packages that ship wheels, and the seconds that they take to build."""
    began = time.perf_counter()
    flat_graph = faiss.IndexHNSWFlat(vectors.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    flat_graph.hnsw.efConstruction, flat_graph.hnsw.efSearch = 200, 200
    flat_graph.add(vectors)
    faiss_built = time.perf_counter()
    graph = usearch.Index(ndim=vectors.shape[1], metric="ip", dtype="f32", connectivity=16, expansion_add=200)
    graph.expansion_search = 200
    graph.add(np.arange(len(vectors)), vectors, threads=threads)
    seconds = {"faiss_hnsw": faiss_built - began, "usearch_hnsw": time.perf_counter() - faiss_built}
    ways: dict[str, Way] = {
        "faiss_hnsw": lambda queries, k: np.asarray(flat_graph.search(queries, k)[1]),
        "usearch_hnsw": lambda queries, k: rows_of(graph.search(queries, k, threads=threads), queries),
    }
    return ways, {name: round(value, 1) for name, value in seconds.items()}


def hnsw_way(catalogue: Catalogue, threads: int) -> tuple[Way, dict[str, Any]]:
    """hnswlib, built on several threads."""
    vectors, index = catalogue.vectors, import_hnswlib().Index(space="ip", dim=catalogue.vectors.shape[1])
    began = time.perf_counter()
    index.init_index(len(vectors), M=16, ef_construction=200, random_seed=0)
    index.add_items(vectors, np.arange(len(vectors)), num_threads=threads)
    built, queries = time.perf_counter() - began, catalogue.queries(200)
    index.set_num_threads(1)
    _, exact = ExactIndex.fastest(vectors).search(queries, 100)

    def found(made: Any) -> float:
        return recall(1 - made.knn_query(queries, k=100)[1], exact)

    ef, reached = choose_ef(index, found, RECALL_TARGET)
    described = {"m": 16, "ef": ef, "recall": round(reached, 4), "build_s": round(built, 1)}
    return lambda queries, k: np.asarray(index.knn_query(queries, k=k)[0], np.int64), described


def same(vectors: Floats, queries: Floats, found: NDArray[np.int64], exact: NDArray[np.int64]) -> float:
    """Share of the best items, by similarity, so that any of several equal items will do."""
    k = exact.shape[1]
    pairs = [best(vectors, queries[:, None], list(rows), [k] * len(queries)) for rows in (found, exact)]
    shares = [np.mean(one[1] >= other[1][-1] - 1e-6) for one, other in zip(*pairs, strict=True)]
    return round(float(np.mean(shares)), 4)


def measured(catalogue: Catalogue, ways: dict[str, Way], batch: int, k: int, rounds: int) -> dict[str, Any]:
    queries = catalogue.queries(batch)
    exact, shares = scanned(ExactIndex(catalogue.vectors), queries, k), {}
    for name, way in ways.items():
        shares[name] = same(catalogue.vectors, queries, way(queries, k), exact)
    times = interleaved({name: partial(way, queries, k) for name, way in ways.items()}, rounds)
    return {"queries": batch, "k": k, "ms": {name: spread(t) for name, t in times.items()}, "same": shares}


def gather_cost(catalogue: Catalogue, scans: dict[str, ExactIndex], rounds: int) -> dict[str, float]:
    """From a tenth of the items gathered, and all of them in passing."""
    query, costs = catalogue.queries(1), {}
    tenth = [Eligible(allowed=catalogue.rng.random(len(catalogue.vectors)) < 0.1)]
    gathering = ExactIndex(catalogue.vectors, Fp32Products(catalogue.vectors, 0))
    for name, scan in scans.items():
        ways = {
            "gather": partial(gathering.near, query, 200, tenth),
            "scan": partial(scan.near, query, 200, [Eligible()]),
        }
        times = interleaved(ways, rounds)
        costs[name] = round(float(np.median(times["gather"]) / np.median(times["scan"])) * 10, 1)
    return costs


def main() -> None:
    """Build, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--other")
    options = parser.parse_args()
    catalogue, threads = Catalogue(options.items, options.dim), options.threads
    vectors = catalogue.vectors
    began = time.perf_counter()
    scans = {
        "fp32": ExactIndex(vectors),
        "int8": ExactIndex(vectors, Int8Products(vectors, threads)),
    }
    opened = time.perf_counter() - began
    ways: dict[str, Way] = {name: partial(scanned, scan) for name, scan in scans.items()}
    ways["int8_1"] = partial(scanned, ExactIndex(vectors, Int8Products(vectors, 1)))
    ways |= {"blas": partial(by_blas, vectors), "ort": ort_way(vectors, threads)}
    more: dict[str, Any] = {"open_s": round(opened, 2)}
    if options.other:
        sys.path.insert(0, options.other)
        faiss, usearch = importlib.import_module("faiss"), importlib.import_module("usearch.index")
        faiss.omp_set_num_threads(threads)
        ways |= flat_ways(vectors, threads, faiss, usearch)
        more["others"] = {"faiss": faiss.__version__, "usearch": importlib.import_module("usearch").__version__}
        if len(vectors) <= 200_000:
            graphs, more["build_s"] = graph_ways(vectors, threads, faiss, usearch)
            ways |= graphs
    ways["hnsw"], more["hnsw"] = hnsw_way(catalogue, threads)
    sizes = [(batch, k) for k in WANTED for batch in BATCHES]
    rows = [measured(catalogue, ways, batch, k, options.rounds) for batch, k in sizes]
    given = {"items": options.items, "dim": options.dim, "threads": threads, "rounds": options.rounds}
    costs = gather_cost(catalogue, scans, options.rounds)
    name = f"scan_{options.items}x{options.dim}"
    finish({**card("scan"), **given, **more, "gather_cost": costs, "rows": rows}, name)


if __name__ == "__main__":
    main()
