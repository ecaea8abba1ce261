"""Building and growing the nearest-neighbour index, and measuring its recall against a scan."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError, ExportError
from unipinrec.runtime.bundle.catalogue import NO_ROWS, mask_without
from unipinrec.runtime.bundle.manifest import IndexSpec
from unipinrec.runtime.retrieval.index import import_hnswlib, load_index, recall
from unipinrec.runtime.retrieval.scan import ExactIndex, best

M_CHOICES = (16, 32, 48)
EF_CONSTRUCTION = 200
EF_CHOICES = (100, 200, 400, 800, 1600)
RECALL_K = 100
RECALL_TARGET = 0.99
MAX_QUERIES = 500
ITEMS_AT_ONCE = 256  # Ctrl-C waits for one call of hnswlib: below a second, even at the largest M
QUERIES_AT_ONCE = 100
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexTask:
    """Items of an index, and its target recall.

    Attributes:
        vectors: [N, E] vectors, compared by inner product; the row becomes the label.
        queries: [R, E] queries; the first 500 measure recall.
        target: Recall@100 to reach.
        retired: Distinct rows to leave out.
        seed: Seed of the level draw; one thread and a fixed seed make the file reproducible.
    """

    vectors: NDArray[np.float32]
    queries: NDArray[np.float32]
    target: float = RECALL_TARGET
    retired: NDArray[np.int64] = field(default_factory=lambda: NO_ROWS)
    seed: int = 0


def can_index() -> bool:
    """Whether hnswlib is installed; if it is not, the log says that a new bundle will have no index."""
    try:
        import_hnswlib()
    except BackendError as error:
        log.warning("the new bundle has no index, and requests will scan all items: %s", error)
        return False
    return True


def build_index(task: IndexTask, path: Path) -> IndexSpec:
    """Write an index with the smallest M and ef that reach the target, else with those of the best recall.

    A missed target is logged as a warning. Then `scan` says that requests scan all items. A larger M is not tried if
    it cannot help: see `_crowded`.

    Raises:
        BackendError: hnswlib is missing.
        ExportError: The written file does not read back as the index that was built.
    """
    hnswlib = import_hnswlib()
    rows = np.flatnonzero(mask_without(len(task.vectors), task.retired))
    measure = _recall_meter(task)
    chosen: Any = None
    choice = (0, 0, -1.0)
    for m in M_CHOICES:
        index: Any = hnswlib.Index(space="ip", dim=task.vectors.shape[1])
        index.init_index(max_elements=len(rows), ef_construction=EF_CONSTRUCTION, M=m, random_seed=task.seed)
        index.set_num_threads(1)
        _add(index, task.vectors, rows)
        ef, reached = choose_ef(index, measure, task.target)
        if reached > choice[-1]:
            chosen, choice = index, (m, ef, reached)
        if reached >= task.target or _crowded(task.vectors[rows]) > 1.0 - task.target:
            break
    return _finish(task, chosen, choice, path)


def grow_index(
    task: IndexTask, old: os.PathLike[str], spec: IndexSpec, retired: NDArray[np.int64], path: Path
) -> IndexSpec | None:
    """Add missing rows to an index, mark newly retired rows, choose ef, and write it to `path`.

    Args:
        task: Its items and target; its vectors begin with those of the old index.
        old: The old index, whose sha256 was checked; it is not changed.
        spec: Its description.
        retired: Rows that were retired when it was written.
        path: File to write.

    Returns:
        None if it misses the target or would hold more retired than live items: build a new index then.

    Raises:
        BackendError: hnswlib is missing.
        BundleError: The old file is not the index that `spec` describes.
        ExportError: The written file does not read back as the index that was made.
    """
    index = load_index(old, spec, task.vectors, capacity=len(task.vectors))
    index.set_num_threads(1)
    known = np.array(index.get_ids_list(), np.int64)
    added = np.setdiff1d(np.arange(len(task.vectors)), np.concatenate([known, task.retired]))
    if 2 * len(np.intersect1d(known, task.retired)) > len(known) + len(added):
        return None
    _add(index, task.vectors, added)
    for row in np.setdiff1d(task.retired, retired).tolist():
        index.mark_deleted(row)
    ef, reached = choose_ef(index, _recall_meter(task), task.target)
    return None if reached < task.target else _finish(task, index, (spec.m, ef, reached), path)


def _add(index: Any, vectors: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
    """Add rows; with one thread the index does not depend on how many are added at a time."""
    for start in range(0, len(rows), ITEMS_AT_ONCE):
        part = rows[start : start + ITEMS_AT_ONCE]
        index.add_items(vectors[part], part)


def _crowded(vectors: NDArray[np.float32]) -> float:
    """Share of the vectors [N, E] that equal more others than an item has links, at any M.

    The links of such items all lead to one another, so a search that comes there never leaves.
    """
    whole = np.ascontiguousarray(vectors).view(np.dtype((np.void, vectors.strides[0])))
    counts = np.unique(whole, return_counts=True)[1]
    return float(counts[counts > 2 * M_CHOICES[-1]].sum() / len(vectors))


def choose_ef(index: Any, measure: Callable[[Any], float], target: float) -> tuple[int, float]:
    """The smallest search width that reaches the target, else the largest choice; with its recall."""
    ef, reached = EF_CHOICES[0], 0.0
    for ef in EF_CHOICES:
        index.set_ef(ef)
        reached = measure(index)
        if reached >= target:
            break
    return ef, reached


def _recall_meter(task: IndexTask) -> Callable[[Any], float]:
    """A function that measures the recall of an index; the scan runs once."""
    queries = task.queries[:MAX_QUERIES]
    live = mask_without(len(task.vectors), task.retired)
    k = min(RECALL_K, int(live.sum()))
    _, exact = ExactIndex.fastest(task.vectors).search(queries, k, live)

    def measure(index: Any) -> float:
        parts = np.split(queries, range(QUERIES_AT_ONCE, len(queries), QUERIES_AT_ONCE))
        # Not its distances: 1 - product rounds small products.
        rows = np.concatenate([index.knn_query(part, k=k)[0] for part in parts]).astype(np.int64)
        found = best(task.vectors, queries[:, None], list(rows), [k] * len(queries))
        return recall(np.stack([similarity for _, similarity in found]), exact)

    return measure


def _finish(task: IndexTask, index: Any, choice: tuple[int, int, float], path: Path) -> IndexSpec:
    m, ef, reached = choice
    _save(index, path)
    k = min(RECALL_K, len(task.vectors) - len(task.retired))
    if reached < task.target:
        log.warning(
            "the index reaches a recall@%d of %.4f, not %.4f, even with M=%d and ef=%d; requests will scan all items. "
            "A lower --recall would use the index",
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
        scan=reached < task.target,
    )


def _save(index: Any, path: Path) -> None:
    """Write and read back: hnswlib reports no write error, such as on a full disk."""
    index.save_index(str(path))
    expected = index.index_file_size()
    if path.stat().st_size != expected:
        raise ExportError(f"{path.name}: wrote {path.stat().st_size} of {expected} bytes; no space left on the disk?")
    again: Any = type(index)(space="ip", dim=index.dim)
    again.load_index(str(path))
    if again.get_current_count() != index.get_current_count():
        raise ExportError(f"{path.name}: {again.get_current_count()} of {index.get_current_count()} items read back")
