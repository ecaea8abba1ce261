"""Nearest neighbours among the item vectors: the hnswlib index, which is loaded here and nowhere else, and the scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError, BundleError
from unipinrec.runtime.bundle import INDEX, Bundle
from unipinrec.runtime.catalogue import NO_ROWS, mask_without
from unipinrec.runtime.index_file import check_index_file
from unipinrec.runtime.manifest import IndexSpec

Found = tuple[NDArray[np.int64], NDArray[np.float32]]
GATHER_COST = 4  # a row that is gathered costs as much as four that are read in passing: bench/retrieval_filters.py
TIE = 1e-5  # similarities closer than this are equal: hnswlib rounds in its own way
BEYOND = np.float32(8.0)  # more than any difference of two similarities


class VectorIndex(Protocol):
    """Finds item rows by inner product with a query."""

    ef: int
    """How many items it visits at least."""

    def search(self, queries: NDArray[np.float32], k: int) -> Found:
        """Find the k rows most similar to each of `queries` [Q, E]: rows [Q, k], similarity [Q, k], best first.

        Raises:
            BackendError: A query is not finite, or the index could not find k rows.
        """
        ...


class HnswIndex:
    """The bundle's approximate index; safe to search from several threads."""

    def __init__(
        self, path: Path, spec: IndexSpec, item_vectors: NDArray[np.float32], retired: NDArray[np.int64] = NO_ROWS
    ) -> None:
        """Load an index; `retired` rows are not in it, or marked as deleted.

        Raises:
            BundleError: It is not an index of these items.
        """
        self._index = load_index(path, spec, item_vectors, retired=retired)
        self._index.set_num_threads(1)
        # Set once: it is state of the index, shared by all threads. hnswlib itself searches with max(ef, k).
        self._index.set_ef(spec.ef_search)
        self.ef = spec.ef_search

    @classmethod
    def open(cls, bundle: Bundle) -> HnswIndex:
        """Load a bundle's index.

        Raises:
            BundleError: It is not an index of the bundle's items.
        """
        return cls(bundle.path / INDEX, bundle.manifest.index, bundle.item_vectors, bundle.catalogue.retired)

    def search(self, queries: NDArray[np.float32], k: int) -> Found:
        """See `VectorIndex.search`."""
        _check_finite(queries)
        try:
            labels, distances = self._index.knn_query(queries, k=k)
        except RuntimeError as error:
            raise BackendError(f"hnswlib found fewer than k={k} items: {error}") from error
        return labels.astype(np.int64), (1.0 - distances).astype(np.float32)


class ExactIndex:
    """Scans item vectors; what it finds depends on nothing but the query, the eligible rows and their vectors."""

    def __init__(self, item_vectors: NDArray[np.float32], gather_cost: float = GATHER_COST) -> None:
        self._vectors, self.gather_cost = item_vectors, gather_cost
        # Four times the bound of the rounding error of one inner product of unit vectors.
        self._margin = 2.0 * item_vectors.shape[1] * np.finfo(np.float32).eps

    def search(self, queries: NDArray[np.float32], k: int, eligible: NDArray[np.bool_] | None = None) -> Found:
        """See `VectorIndex.search`; of the mask `eligible` [N], at least k rows, or of all rows. Ties in row order."""
        _check_finite(queries)
        rows: NDArray[np.int64] | None = None
        table, penalty = self._vectors, np.zeros((), np.float32)
        if eligible is not None and self.gather_cost * np.count_nonzero(eligible) < len(eligible):
            rows = np.flatnonzero(eligible)
            table = self._vectors[rows]
        elif eligible is not None:
            penalty = BEYOND * (~eligible).astype(np.float32)
        found = []
        for query in queries:
            # Not `@`: the threads of BLAS spin and fight where several requests scan at once.
            scores = np.einsum("ne,e->n", table, query) - penalty
            # The product's rounding depends on where a row lies: all that may be among the k are computed afresh.
            near = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k] - self._margin)
            found.append(best(self._vectors, query[None], near if rows is None else rows[near], k))
        return np.stack([rows for rows, _ in found]), np.stack([similarity for _, similarity in found])


def best(vectors: NDArray[np.float32], queries: NDArray[np.float32], rows: NDArray[np.int64], k: int) -> Found:
    """The k best of distinct rows by the similarity with the nearest of `queries` [Q, E], ties in row order.

    The similarity of a row is the same whatever the other rows are; a matrix product's is not.
    """
    gathered = vectors[rows]
    similarity: NDArray[np.float32] = np.max([np.einsum("ne,e->n", gathered, query) for query in queries], axis=0)
    order = np.lexsort((rows, -similarity))[:k]
    return rows[order], similarity[order]


def recall(found: NDArray[np.float32], true: NDArray[np.float32]) -> float:
    """Share of the true nearest items that was found, by the similarities [R, k] of both.

    An item counts if it is as near as the k-th, so that one of several equal items is as good as another.
    """
    return float(np.mean(found >= true.min(axis=1, keepdims=True) - TIE))


def load_index(
    path: Path,
    spec: IndexSpec,
    item_vectors: NDArray[np.float32],
    *,
    retired: NDArray[np.int64] | None = None,
    capacity: int = 0,
) -> Any:
    """Load an hnswlib index.

    Args:
        path: Its file.
        spec: Its description.
        item_vectors: [N, E] f32, of which it holds rows.
        retired: All other rows must be found in it; None = not checked.
        capacity: How many items there is to be room for, if that is more than it has.

    Raises:
        BundleError: It is not an index of these items. Checked before loading: hnswlib believes the file.
    """
    import hnswlib  # noqa: PLC0415 - a bundle can be opened without it

    found = check_index_file(path, spec, item_vectors)
    if retired is not None and mask_without(len(item_vectors), np.concatenate([found, retired])).any():
        raise BundleError(f"{path}: the index does not match the items: it lacks some; export the bundle again")
    index: Any = hnswlib.Index(space=spec.space, dim=spec.dim)
    try:
        index.load_index(str(path), max_elements=capacity)
    except RuntimeError as error:
        raise BundleError(f"{path}: hnswlib does not load it: {error}; export the bundle again") from error
    return index


def _check_finite(queries: NDArray[np.float32]) -> None:
    if not np.isfinite(queries).all():
        raise BackendError("a query vector is not finite; the retrieval graph is broken, export the bundle again")
