"""Building and growing the nearest-neighbour index, and the measurement of how much it finds of what a scan finds."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import ExportError
from unipinrec.runtime.bundle.catalogue import NO_ROWS, mask_without
from unipinrec.runtime.bundle.manifest import IndexSpec
from unipinrec.runtime.retrieval.index import ExactIndex, load_index, recall

M_CHOICES = (16, 32, 48)
EF_CONSTRUCTION = 200
EF_CHOICES = (100, 200, 400, 800, 1600)
RECALL_K = 100
RECALL_TARGET = 0.99
MAX_QUERIES = 500
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexTask:
    """What an index is to find.

    Attributes:
        vectors: [N, E] unit vectors; the row becomes the label.
        queries: [R, E] unit queries that recall is measured on, of which the first 500 are.
        target: Recall@100 to reach.
        retired: Distinct rows that are not to be found.
        seed: Of the level draw; one thread and a fixed seed make the file reproducible.
    """

    vectors: NDArray[np.float32]
    queries: NDArray[np.float32]
    target: float = RECALL_TARGET
    retired: NDArray[np.int64] = field(default_factory=lambda: NO_ROWS)
    seed: int = 0


def build_index(task: IndexTask, path: Path) -> IndexSpec:
    """Build with the smallest M and choose the smallest ef that reach the target, else the best of all; write it.

    Missing the target is logged as a warning and shows in the result: `recall` is below `recall_target`.

    Raises:
        ExportError: The file that was written does not read back as the index that was built.
    """
    rows = np.flatnonzero(mask_without(len(task.vectors), task.retired))
    measure = _recall_meter(task)
    index: Any = None
    found = (0, 0, -1.0)
    for m in M_CHOICES:
        tried: Any = hnswlib.Index(space="ip", dim=task.vectors.shape[1])
        tried.init_index(max_elements=len(rows), ef_construction=EF_CONSTRUCTION, M=m, random_seed=task.seed)
        tried.set_num_threads(1)
        tried.add_items(task.vectors[rows], rows)
        ef, reached = choose_ef(tried, measure, task.target)
        if reached > found[-1]:
            index, found = tried, (m, ef, reached)
        if reached >= task.target:
            break
    return _finish(task, index, found, path)


def grow_index(
    task: IndexTask, old: os.PathLike[str], spec: IndexSpec, retired: NDArray[np.int64], path: Path
) -> IndexSpec | None:
    """Add the rows that an index lacks, mark those that are retired since, choose ef, and write it to `path`.

    Args:
        task: What it is to find; its vectors begin with those of the old index.
        old: The index to start from, whose sha256 was checked; it stays as it is.
        spec: Its description.
        retired: Rows that were retired when it was written.
        path: File to write.

    Returns:
        None where it misses the target or most of it would be retired items: it has to be built anew.

    Raises:
        BundleError: The old file is not the index that `spec` describes.
        ExportError: The file that was written does not read back as the index that was made.
    """
    index = load_index(old, spec, task.vectors, capacity=len(task.vectors))
    index.set_num_threads(1)
    known = np.array(index.get_ids_list(), np.int64)
    added = np.setdiff1d(np.arange(len(task.vectors)), np.concatenate([known, task.retired]))
    if 2 * len(np.intersect1d(known, task.retired)) > len(known) + len(added):
        return None
    if len(added):
        index.add_items(task.vectors[added], added)
    for row in np.setdiff1d(task.retired, retired).tolist():
        index.mark_deleted(row)
    ef, reached = choose_ef(index, _recall_meter(task), task.target)
    return None if reached < task.target else _finish(task, index, (spec.m, ef, reached), path)


def choose_ef(index: Any, measure: Callable[[Any], float], target: float) -> tuple[int, float]:
    """The smallest search width that reaches the target, else the largest tried; with its recall."""
    ef, reached = EF_CHOICES[0], 0.0
    for ef in EF_CHOICES:
        index.set_ef(ef)
        reached = measure(index)
        if reached >= target:
            break
    return ef, reached


def _recall_meter(task: IndexTask) -> Callable[[Any], float]:
    """Recall of an index against a scan that is made once."""
    queries = task.queries[:MAX_QUERIES]
    live = mask_without(len(task.vectors), task.retired)
    k = min(RECALL_K, int(live.sum()))
    _, true = ExactIndex(task.vectors).search(queries, k, live)
    return lambda index: recall(1.0 - index.knn_query(queries, k=k)[1], true)


def _finish(task: IndexTask, index: Any, found: tuple[int, int, float], path: Path) -> IndexSpec:
    m, ef, reached = found
    _save(index, path)
    k = min(RECALL_K, len(task.vectors) - len(task.retired))
    if reached < task.target:
        log.warning(
            "the index reaches a recall@%d of %.4f, not %.4f, even with M=%d and ef=%d; exact search (`exact`) does",
            *(k, reached, task.target, m, ef),
        )
    return IndexSpec(
        space="ip",
        dim=task.vectors.shape[1],
        count=index.get_current_count(),
        m=m,
        ef_construction=EF_CONSTRUCTION,
        ef_search=ef,
        seed=task.seed,
        recall=reached,
        recall_k=k,
        recall_target=task.target,
    )


def _save(index: Any, path: Path) -> None:
    """hnswlib reports no write error, so a full disk shows only when the file is read back."""
    index.save_index(str(path))
    expected = index.index_file_size()
    if path.stat().st_size != expected:
        raise ExportError(
            f"{path.name}: {path.stat().st_size} of {expected} bytes were written; is there space left on the disk?"
        )
    again: Any = hnswlib.Index(space="ip", dim=index.dim)
    again.load_index(str(path))
    if again.get_current_count() != index.get_current_count():
        raise ExportError(f"{path.name}: {again.get_current_count()} of {index.get_current_count()} items read back")
