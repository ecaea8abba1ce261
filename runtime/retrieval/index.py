"""Nearest neighbours among the item vectors: the hnswlib index, which only this module loads, and the exact scan."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError, BundleError
from unipinrec.runtime.bundle.bundle import INDEX, Bundle
from unipinrec.runtime.bundle.catalogue import NO_ROWS, Eligible, mask_without
from unipinrec.runtime.bundle.manifest import IndexSpec
from unipinrec.runtime.retrieval.index_file import check_index_file

Matches = tuple[NDArray[np.int64], NDArray[np.float32]]
GATHER_COST = 4  # gathering a row costs as much as reading four rows in order: bench/retrieval_filters.py
TIE = 1e-5  # similarities closer than this share of the largest are equal
SCORES_AT_ONCE = 1 << 22  # 16 MiB of a scan's products, or of gathered vectors, at a time


class VectorIndex(Protocol):
    """Finds item rows by inner product with a query."""

    ef: int
    """Least number of items that a search visits."""

    def search(self, queries: NDArray[np.float32], k: int) -> Matches:
        """Find the k rows most similar to each of `queries` [Q, E]: rows [Q, k], similarity [Q, k], best first.

        Raises:
            BackendError: A query is not finite, or the index finds fewer than k rows.
        """
        ...


class HnswIndex:
    """The bundle's approximate index; safe to search from several threads."""

    def __init__(
        self, path: os.PathLike[str], spec: IndexSpec, items: NDArray[np.float32], retired: NDArray[np.int64] = NO_ROWS
    ) -> None:
        """Load an index of item vectors [N, E]; `retired` rows are not in it, or marked as deleted.

        Raises:
            BundleError: It is not an index of these items.
        """
        self._index = load_index(path, spec, items, retired=retired)
        self._index.set_num_threads(1)
        # Set once: all threads share this state of the index. hnswlib itself searches with max(ef, k).
        self._index.set_ef(spec.ef_search)
        self.ef = spec.ef_search

    @classmethod
    def open(cls, bundle: Bundle) -> HnswIndex:
        """Load a bundle's index.

        Raises:
            BundleError: It is not an index of the bundle's items.
        """
        return cls(bundle.files[INDEX], bundle.manifest.index, bundle.item_vectors, bundle.catalogue.retired)

    def search(self, queries: NDArray[np.float32], k: int) -> Matches:
        """See `VectorIndex.search`."""
        check_finite(queries)
        try:
            labels, distances = self._index.knn_query(queries, k=k)
        except RuntimeError as error:
            raise BackendError(f"hnswlib found fewer than k={k} items: {error}") from error
        return labels.astype(np.int64), (1.0 - distances).astype(np.float32)


class ExactIndex:
    """Scans item vectors; its result depends only on the query, the eligible rows and their vectors."""

    def __init__(self, item_vectors: NDArray[np.float32], gather_cost: float = GATHER_COST) -> None:
        self._vectors, self.gather_cost = item_vectors, gather_cost
        # Four times the bound on the rounding error of an inner product with a query of length 1.
        longest = np.sqrt(np.einsum("ne,ne->n", item_vectors, item_vectors).max(initial=0.0))
        self._margin = 2.0 * item_vectors.shape[1] * np.finfo(np.float32).eps * longest

    def search(self, queries: NDArray[np.float32], k: int, eligible: NDArray[np.bool_] | None = None) -> Matches:
        """See `VectorIndex.search`; only rows of the mask `eligible` [N], which has at least k. Ties in row order."""
        near = self.near(queries, k, [Eligible(allowed=eligible)] * len(queries))
        matches = best(self._vectors, queries[:, None], near, [k] * len(queries))
        return np.stack([rows for rows, _ in matches]), np.stack([similarity for _, similarity in matches])

    def near(self, queries: NDArray[np.float32], k: int, eligible: Sequence[Eligible]) -> list[NDArray[np.int64]]:
        """For each of `queries` [S, E], eligible rows that include its k best and few others, ascending.

        Raises:
            BackendError: A query is not finite.
        """
        check_finite(queries)
        near: list[NDArray[np.int64]] = [NO_ROWS] * len(queries)
        scans = []
        for index, (query, rows) in enumerate(zip(queries, eligible, strict=True)):
            if rows.allowed is None or self.gather_cost * rows.count(len(self._vectors)) >= len(self._vectors):
                scans.append(index)
            else:  # so few rows that gathering them is faster than reading all
                gathered = rows.rows(len(self._vectors))
                parts = np.array_split(gathered, 1 + self._vectors.shape[1] * len(gathered) // SCORES_AT_ONCE)
                scores = np.concatenate([np.einsum("e,ne->n", query, self._vectors[part]) for part in parts])
                near[index] = gathered[self._best(scores[None], k, queries[index : index + 1])[0]]
        at_once = max(1, SCORES_AT_ONCE // len(self._vectors))
        for start in range(0, len(scans), at_once):
            part = scans[start : start + at_once]
            # Not `@`: the threads of BLAS spin and compete if several requests scan at once.
            scores = np.einsum("se,ne->sn", queries[part], self._vectors)
            for row, index in zip(scores, part, strict=True):
                _lower(row, eligible[index])
            for index, rows_near in zip(part, self._best(scores, k, queries[part]), strict=True):
                near[index] = rows_near
        return near

    def _best(self, scores: NDArray[np.float32], k: int, queries: NDArray[np.float32]) -> list[NDArray[np.int64]]:
        """Places in each row of `scores` [S, N] of `queries` [S, E] that may be among its k largest.

        The product's rounding depends on the place of a row, so the caller must compute these scores again.
        """
        last = scores.shape[1] - k
        limits = np.partition(scores, last, axis=1)[:, last] - self._margin * np.linalg.norm(queries, axis=1)
        owners, rows = np.nonzero(scores >= limits[:, None])
        return np.split(rows, np.searchsorted(owners, np.arange(1, len(scores))))


def _lower(scores: NDArray[np.float32], eligible: Eligible) -> None:
    """Put the scores [N] of all other rows below those of the eligible rows."""
    if eligible.allowed is not None:
        np.copyto(scores, -np.inf, where=~eligible.allowed)
    scores[eligible.excluded] = -np.inf


def best(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], rows: Sequence[NDArray[np.int64]], counts: Sequence[int]
) -> list[Matches]:
    """For each of S searches the best of its distinct rows, ties in row order.

    Args:
        vectors: [N, E], the items.
        queries: [S, Q, E]; a row's similarity is that to the nearest of a search's Q queries. Unlike that of a matrix
            product, it does not depend on other rows and searches.
        rows: Rows of each search.
        counts: Most rows to return for each search.
    """
    sizes = list(map(len, rows))
    owners, flat = np.repeat(np.arange(len(rows)), sizes), np.concatenate(rows)
    gathered = vectors[flat]
    similarity = np.einsum("me,me->m", gathered, queries[owners, 0])
    for other in range(1, queries.shape[1]):
        np.maximum(similarity, np.einsum("me,me->m", gathered, queries[owners, other]), out=similarity)
    order = np.lexsort((flat, -similarity, owners))
    flat, similarity, starts = flat[order], similarity[order], np.cumsum([0, *sizes])
    return [
        (flat[start : start + k], similarity[start : start + k])
        for start, k in zip(starts, np.minimum(counts, sizes), strict=False)
    ]


def recall(similarity: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """Share of the exact nearest items that a search found, from the similarities [R, k] of both.

    An item counts if it is as near as the exact k-th, so any of several equal items will do.
    """
    tie = TIE * np.abs(exact).max(axis=1, keepdims=True)
    return float(np.mean(similarity >= exact.min(axis=1, keepdims=True) - tie))


def load_index(
    path: os.PathLike[str],
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
        item_vectors: [N, E] f32; the index holds rows of it.
        retired: The index must hold all other rows; None = not checked.
        capacity: Number of items to make room for, if that is more than the index has.

    Raises:
        BundleError: It is not an index of these items. Checked before loading, as hnswlib trusts the file.
    """
    import hnswlib  # noqa: PLC0415 - a bundle can be opened without it

    rows = check_index_file(path, spec, item_vectors)
    if retired is not None and mask_without(len(item_vectors), np.concatenate([rows, retired])).any():
        raise BundleError(f"{path}: the index does not match the items: it lacks some; export the bundle again")
    index: Any = hnswlib.Index(space=spec.space, dim=spec.dim)
    try:
        index.load_index(os.fspath(path), max_elements=capacity)
    except RuntimeError as error:
        raise BundleError(f"{path}: hnswlib does not load it: {error}; export the bundle again") from error
    return index


def check_finite(queries: NDArray[np.float32]) -> None:
    """Check query vectors.

    Raises:
        BackendError: One is not finite.
    """
    if not np.isfinite(queries).all():
        raise BackendError("a query vector is not finite; the retrieval graph is broken, export the bundle again")
