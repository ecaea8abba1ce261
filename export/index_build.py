"""The nearest-neighbour index over the item table, and the proof that it finds what an exact search finds."""

from __future__ import annotations

from pathlib import Path

import hnswlib
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import ExportError
from unipinrec.runtime.manifest import IndexSpec

M = 16
EF_CONSTRUCTION = 200
EF_CHOICES = (100, 200, 400, 800, 1600)
RECALL_K = 100
RECALL_TARGET = 0.99
MAX_QUERIES = 500


def build_index(vectors: NDArray[np.float32], queries: NDArray[np.float32], path: Path, seed: int = 0) -> IndexSpec:
    """Build, choose `ef_search` for a recall@100 of 0.99, write and read back.

    Args:
        vectors: [N, E] unit vectors; the row becomes the label.
        queries: [R, E] unit queries that recall is measured on.
        path: File to write.
        seed: Of the level draw; one thread and a fixed seed make the file reproducible.

    Raises:
        ExportError: The file that was written does not read back as the index that was built.
    """
    count, dim = vectors.shape
    index = hnswlib.Index(space="ip", dim=dim)
    index.init_index(max_elements=count, ef_construction=EF_CONSTRUCTION, M=M, random_seed=seed)
    index.set_num_threads(1)
    index.add_items(vectors, np.arange(count))
    k = min(RECALL_K, count)
    queries = queries[:MAX_QUERIES]
    exact = np.argpartition(-(queries @ vectors.T), k - 1, axis=1)[:, :k]
    ef, recall = _choose_ef(index, queries, exact)
    _save(index, vectors, path)
    return IndexSpec(
        space="ip",
        dim=dim,
        count=count,
        m=M,
        ef_construction=EF_CONSTRUCTION,
        ef_search=ef,
        seed=seed,
        recall=recall,
        recall_k=k,
    )


def _choose_ef(index: hnswlib.Index, queries: NDArray[np.float32], exact: NDArray[np.int64]) -> tuple[int, float]:
    """The smallest search width that reaches the target, else the largest tried; with its recall."""
    k = exact.shape[1]
    ef, recall = EF_CHOICES[0], 0.0
    for ef in EF_CHOICES:
        index.set_ef(max(ef, k))
        found, _ = index.knn_query(queries, k=k)
        hits = [len(np.intersect1d(a, b)) for a, b in zip(found, exact, strict=True)]
        recall = float(np.sum(hits) / exact.size)
        if recall >= RECALL_TARGET:
            break
    return ef, recall


def _save(index: hnswlib.Index, vectors: NDArray[np.float32], path: Path) -> None:
    """hnswlib reports no write error, so a full disk shows only when the file is read back."""
    index.save_index(str(path))
    expected = index.index_file_size()
    if path.stat().st_size != expected:
        raise ExportError(
            f"{path.name}: {path.stat().st_size} of {expected} bytes were written; is there space left on the disk?"
        )
    again = hnswlib.Index(space="ip", dim=vectors.shape[1])
    again.load_index(str(path))
    if again.get_current_count() != len(vectors):
        raise ExportError(f"{path.name}: {again.get_current_count()} of {len(vectors)} items read back")
