"""Nearest neighbours among the item vectors: the hnswlib index, which is loaded here and nowhere else, and the scan."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError, BundleError
from unipinrec.runtime.bundle.bundle import INDEX, Bundle
from unipinrec.runtime.bundle.catalogue import NO_ROWS, mask_without
from unipinrec.runtime.bundle.manifest import IndexSpec
from unipinrec.runtime.retrieval.index_file import check_index_file

Found = tuple[NDArray[np.int64], NDArray[np.float32]]
GATHER_COST = 4  # a row that is gathered costs as much as four that are read in passing: bench/retrieval_filters.py
TIE = 1e-5  # similarities closer than this are equal: hnswlib rounds in its own way
BEYOND = np.float32(8.0)  # more than any difference of two similarities
SCORES_AT_ONCE = 1 << 22  # 16 MiB of a scan's products at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Eligible:
    """What a search may find: the mask `allowed` [N], None = all rows, without the distinct rows `excluded`."""

    allowed: NDArray[np.bool_] | None = None
    excluded: NDArray[np.int64] = field(default_factory=lambda: NO_ROWS)

    def count(self, items: int) -> int:
        """How many of so many items that are."""
        if self.allowed is None:
            return items - len(self.excluded)
        return int(np.count_nonzero(self.allowed) - np.count_nonzero(self.allowed[self.excluded]))

    def mask(self) -> NDArray[np.bool_]:
        """As one mask, of a search that has one."""
        assert self.allowed is not None
        if not len(self.excluded):
            return self.allowed
        mask = self.allowed.copy()
        mask[self.excluded] = False
        return mask

    def keep(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of distinct rows that may be found, ascending."""
        rows = np.setdiff1d(rows, self.excluded)
        return rows if self.allowed is None else rows[self.allowed[rows]]

    def lower(self, scores: NDArray[np.float32]) -> None:
        """Put the scores [N] of all other rows below those of any that may be found."""
        if self.allowed is not None:
            scores -= BEYOND * ~self.allowed
        scores[self.excluded] -= BEYOND


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
        self,
        path: os.PathLike[str],
        spec: IndexSpec,
        item_vectors: NDArray[np.float32],
        retired: NDArray[np.int64] = NO_ROWS,
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
        return cls(bundle.files[INDEX], bundle.manifest.index, bundle.item_vectors, bundle.catalogue.retired)

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
        near = self.near(queries, k, [Eligible(allowed=eligible)] * len(queries))
        found = best(self._vectors, queries[:, None], near, [k] * len(queries))
        return np.stack([rows for rows, _ in found]), np.stack([similarity for _, similarity in found])

    def near(self, queries: NDArray[np.float32], k: int, eligible: Sequence[Eligible]) -> list[NDArray[np.int64]]:
        """For each of `queries` [S, E] the eligible rows, ascending, that its k best are among; few are not of them.

        Raises:
            BackendError: A query is not finite.
        """
        _check_finite(queries)
        found: list[NDArray[np.int64]] = []
        at_once = max(1, SCORES_AT_ONCE // len(self._vectors))
        for start in range(0, len(queries), at_once):
            found += self._near(queries[start : start + at_once], k, eligible[start : start + at_once])
        return found

    def _near(self, queries: NDArray[np.float32], k: int, eligible: Sequence[Eligible]) -> list[NDArray[np.int64]]:
        gathered = [self._gathered(one) for one in eligible]
        scanned = [index for index, rows in enumerate(gathered) if rows is None]
        found: dict[int, NDArray[np.int64]] = {}
        if scanned:
            # Not `@`: the threads of BLAS spin and fight where several requests scan at once.
            scores = np.einsum("se,ne->sn", queries[scanned], self._vectors)
            for row, index in zip(scores, scanned, strict=True):
                eligible[index].lower(row)
            found.update(zip(scanned, self._best(scores, k), strict=True))
        for index, rows in enumerate(gathered):
            if rows is not None:
                scores = np.einsum("e,ne->n", queries[index], self._vectors[rows])
                found[index] = rows[self._best(scores[None], k)[0]]
        return [found[index] for index in range(len(queries))]

    def _gathered(self, eligible: Eligible) -> NDArray[np.int64] | None:
        """The eligible rows, where they are so few that gathering them is faster than reading past the others."""
        if eligible.allowed is None or self.gather_cost * eligible.count(len(self._vectors)) >= len(self._vectors):
            return None
        return np.flatnonzero(eligible.mask())

    def _best(self, scores: NDArray[np.float32], k: int) -> list[NDArray[np.int64]]:
        """Where each row of `scores` [S, N] may have its k largest.

        The product's rounding depends on where a row lies: all that may be among the k are to be computed afresh.
        """
        last = scores.shape[1] - k
        limits = np.partition(scores, last, axis=1)[:, last] - self._margin
        owners, rows = np.nonzero(scores >= limits[:, None])
        return np.split(rows, np.searchsorted(owners, np.arange(1, len(scores))))


def best(
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    rows: Sequence[NDArray[np.int64]],
    wanted: Sequence[int],
) -> list[Found]:
    """For each of S searches the `wanted` best of its distinct rows, ties in row order.

    Args:
        vectors: [N, E], the items.
        queries: [S, Q, E]; the similarity of a row is that with the nearest of a search's Q. It is the same whatever
            the other rows and searches are; a matrix product's is not.
        rows: Of each search.
        wanted: How many of each search, at most.
    """
    sizes = [len(one) for one in rows]
    owners, flat = np.repeat(np.arange(len(rows)), sizes), np.concatenate(rows)
    gathered = vectors[flat]
    similarity = np.einsum("me,me->m", gathered, queries[owners, 0])
    for other in range(1, queries.shape[1]):
        np.maximum(similarity, np.einsum("me,me->m", gathered, queries[owners, other]), out=similarity)
    order = np.lexsort((flat, -similarity, owners))
    flat, similarity, starts = flat[order], similarity[order], np.cumsum([0, *sizes])
    return [
        (flat[start : start + k], similarity[start : start + k])
        for start, k in zip(starts, np.minimum(wanted, sizes), strict=False)
    ]


def recall(found: NDArray[np.float32], true: NDArray[np.float32]) -> float:
    """Share of the true nearest items that was found, by the similarities [R, k] of both.

    An item counts if it is as near as the k-th, so that one of several equal items is as good as another.
    """
    return float(np.mean(found >= true.min(axis=1, keepdims=True) - TIE))


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
        index.load_index(os.fspath(path), max_elements=capacity)
    except RuntimeError as error:
        raise BundleError(f"{path}: hnswlib does not load it: {error}; export the bundle again") from error
    return index


def _check_finite(queries: NDArray[np.float32]) -> None:
    if not np.isfinite(queries).all():
        raise BackendError("a query vector is not finite; the retrieval graph is broken, export the bundle again")
