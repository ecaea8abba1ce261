"""Nearest neighbours among the item vectors: the hnswlib index, wrapped here and nowhere else, and the exact scan."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError, BundleError
from unipinrec.runtime.manifest import IndexSpec

Found = tuple[NDArray[np.int64], NDArray[np.float32]]
HEADER = struct.Struct("<6Q")  # level-0 offset, capacity, count, bytes per element, label offset, data offset
SAMPLED_ROWS = 32


class VectorIndex(Protocol):
    """Finds item rows by inner product with a query."""

    def search(self, queries: NDArray[np.float32], k: int) -> Found:
        """Find the k rows most similar to each of `queries` [Q, E]: rows [Q, k], similarity [Q, k], best first.

        Raises:
            BackendError: A query is not finite, or the index could not find k rows.
        """
        ...


class HnswIndex:
    """The bundle's approximate index; safe to search from several threads."""

    def __init__(self, path: Path, spec: IndexSpec, item_vectors: NDArray[np.float32]) -> None:
        """Load an index whose sha256 was checked.

        Raises:
            BundleError: It is not an index of these items. Checked before loading where loading would read foreign
                memory or crash: hnswlib believes the file and the caller.
        """
        import hnswlib  # noqa: PLC0415 - the only place that knows it

        _check_header(path, spec)
        self._index: Any = hnswlib.Index(space=spec.space, dim=spec.dim)
        try:
            self._index.load_index(str(path))
        except RuntimeError as error:
            raise BundleError(f"{path}: hnswlib does not load it: {error}; export the bundle again") from error
        self._index.set_num_threads(1)
        # Set once: it is state of the index, shared by all threads. hnswlib itself searches with max(ef, k).
        self._index.set_ef(spec.ef_search)
        _check_vectors(path, self._index, item_vectors)

    def search(self, queries: NDArray[np.float32], k: int) -> Found:
        """See `VectorIndex.search`."""
        _check_finite(queries)
        try:
            labels, distances = self._index.knn_query(queries, k=k)
        except RuntimeError as error:
            raise BackendError(f"hnswlib found fewer than k={k} items: {error}") from error
        return labels.astype(np.int64), (1.0 - distances).astype(np.float32)


class ExactIndex:
    """Scans all item vectors."""

    def __init__(self, item_vectors: NDArray[np.float32]) -> None:
        self._vectors = item_vectors

    def search(self, queries: NDArray[np.float32], k: int, excluded: NDArray[np.int64] | None = None) -> Found:
        """See `VectorIndex.search`; `excluded` rows are not found, unless k exceeds what remains."""
        _check_finite(queries)
        scores = queries @ self._vectors.T  # (queries, items)
        if excluded is not None:
            scores[:, excluded] = -np.inf
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        similarity = np.take_along_axis(scores, best, axis=1)
        order = np.lexsort((best, -similarity))
        return (
            np.take_along_axis(best, order, axis=1).astype(np.int64),
            np.take_along_axis(similarity, order, axis=1),
        )


def _check_finite(queries: NDArray[np.float32]) -> None:
    if not np.isfinite(queries).all():
        raise BackendError("a query vector is not finite; the retrieval graph is broken, export the bundle again")


def _check_header(path: Path, spec: IndexSpec) -> None:
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        raise BundleError(f"{path}: {len(head)} bytes are no hnswlib index; export the bundle again")
    _, _, count, _, label_offset, data_offset = HEADER.unpack(head)
    given = ((label_offset - data_offset) // 4, count)
    if given != (spec.dim, spec.count):
        raise BundleError(
            f"{path}: the index does not match the items: it has (dim, count) = {given}, "
            f"the items need {(spec.dim, spec.count)}; export the bundle again"
        )


def _check_vectors(path: Path, index: Any, item_vectors: NDArray[np.float32]) -> None:
    """Compare a sample of the index with the item table: an index of an older table has the same shape."""
    rows = np.unique(np.linspace(0, len(item_vectors) - 1, SAMPLED_ROWS).astype(np.int64))
    try:
        stored = np.array(index.get_items(rows), np.float32)
    except RuntimeError as error:
        raise BundleError(f"{path}: the index does not match the items: {error}; export the bundle again") from error
    if not np.array_equal(stored, item_vectors[rows]):
        raise BundleError(
            f"{path}: the index does not match the items: it was built of other vectors; export the bundle again"
        )
