"""Recall@100 of the index for a model that scores by an inner product plus a bias, in two forms.

    OMP_NUM_THREADS=1 python bench/dot_product.py [--items 40000]

Card: `--items` vectors of 64 dimensions around 500 centres, whose lengths and biases are log-normal and normal, and 500
queries near random items. `dot`: similarity "dot", the bias one more number of each vector. `unit`: the same scores
packed into unit vectors, as a model must do that knows only "cosine". For both: M, ef and recall@100 that
`build_index` reaches, whether requests then scan, and the recall of what a request gets.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import card, finish
from numpy.typing import NDArray

from unipinrec.runtime.bundle.manifest import IndexSpec
from unipinrec.runtime.retrieval.index import HnswIndex, recall
from unipinrec.runtime.retrieval.index_build import IndexTask, build_index
from unipinrec.runtime.retrieval.retriever import Retriever, Search
from unipinrec.runtime.retrieval.scan import ExactIndex

DIM, CENTRES, QUERIES, K = 64, 500, 500, 100
Floats = NDArray[np.float32]


def catalogue(items: int) -> tuple[Floats, Floats]:
    """Items [N, DIM + 1] with their bias, and queries [QUERIES, DIM + 1] with a 1."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CENTRES, DIM))
    vectors = centres[rng.integers(0, CENTRES, items)] + 0.75 * rng.normal(size=(items, DIM))
    vectors *= np.exp(rng.normal(scale=0.5, size=(items, 1))) / np.sqrt(DIM)
    queries = centres[rng.integers(0, CENTRES, QUERIES)] + 0.75 * rng.normal(size=(QUERIES, DIM))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    with_bias = np.append(vectors, rng.normal(scale=0.1, size=(items, 1)), axis=1)
    return with_bias.astype(np.float32), np.append(queries, np.ones((QUERIES, 1)), axis=1).astype(np.float32)


def packed(vectors: Floats, queries: Floats) -> tuple[Floats, Floats]:
    """Unit vectors whose inner products are in the same order: one more number fills each item up to one length."""
    squares = np.square(vectors).sum(axis=1, keepdims=True, dtype=np.float64)
    filled = np.append(vectors, np.sqrt(squares.max() - squares), axis=1) / np.sqrt(squares.max())
    unit = np.append(queries, np.zeros((len(queries), 1)), axis=1) / np.linalg.norm(queries, axis=1, keepdims=True)
    return filled.astype(np.float32), unit.astype(np.float32)


def measured(vectors: Floats, queries: Floats, folder: Path) -> dict[str, Any]:
    """The index that is built, and the recall of requests."""
    spec = build_index(IndexTask(vectors=vectors, queries=queries), folder / "index.hnsw")
    retriever = Retriever(
        index=None if spec.scan else HnswIndex(folder / "index.hnsw", spec, vectors),
        scan=ExactIndex(vectors),
        item_vectors=vectors,
        visit_cost=0,
    )
    exact = np.sort(queries @ vectors.T, axis=1)[:, -K:]
    served = [retriever.retrieve([Search(queries=query[None], k=K)])[0].similarity for query in queries]
    return {**figures(spec), "recall_of_requests": round(recall(np.stack(served), exact), 4)}


def figures(spec: IndexSpec) -> dict[str, Any]:
    return {"m": spec.m, "ef": spec.ef_search, "recall": round(spec.recall, 4), "scan": spec.scan}


def main() -> None:
    """Measure both forms."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=40_000)
    items = parser.parse_args().items
    vectors, queries = catalogue(items)
    with tempfile.TemporaryDirectory() as folder:
        dot = measured(vectors, queries, Path(folder))
        unit = measured(*packed(vectors, queries), Path(folder))
    finish({**card("dot_product"), "items": items, "dot": dot, "unit": unit}, "dot_product")


if __name__ == "__main__":
    main()
