"""The hnswlib index of the item vectors, which only this module loads."""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError, BundleError
from unipinrec.runtime.bundle.bundle import INDEX, Bundle
from unipinrec.runtime.bundle.catalogue import NO_ROWS, mask_without
from unipinrec.runtime.bundle.manifest import IndexSpec
from unipinrec.runtime.retrieval.index_file import check_index_file
from unipinrec.runtime.retrieval.scan import Matches, check_finite

TIE = 1e-5  # similarities closer than this share of the largest are equal


def import_hnswlib() -> Any:
    """Import hnswlib, an extra that is compiled on installation.

    Raises:
        BackendError: It is missing, or does not load.
    """
    try:
        import hnswlib  # noqa: PLC0415 - bundles are scanned without it
    except ImportError as error:
        problem = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load: {error}"
        raise BackendError(f"hnswlib {problem}; pip install 'unipinrec[hnsw]' compiles it") from error
    return hnswlib


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
            BackendError: hnswlib is missing.
            BundleError: It is not an index of these items.
        """
        self._index = load_index(path, spec, items, retired=retired)
        self._index.set_num_threads(1)
        # Set once: all threads share this state of the index. hnswlib itself searches with max(ef, k).
        self._index.set_ef(spec.ef_search)
        self.ef = spec.ef_search

    @classmethod
    def open(cls, bundle: Bundle, spec: IndexSpec) -> HnswIndex:
        """Load the index that a bundle's manifest describes.

        Raises:
            BackendError: hnswlib is missing.
            BundleError: It is not an index of the bundle's items.
        """
        return cls(bundle.files[INDEX], spec, bundle.item_vectors, bundle.catalogue.retired)

    def search(self, queries: NDArray[np.float32], k: int) -> Matches:
        """See `VectorIndex.search`."""
        check_finite(queries)
        try:
            labels, distances = self._index.knn_query(queries, k=k)
        except RuntimeError as error:
            raise BackendError(f"hnswlib found fewer than k={k} items: {error}") from error
        return labels.astype(np.int64), (1.0 - distances).astype(np.float32)


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
        BackendError: hnswlib is missing.
        BundleError: It is not an index of these items. Checked before loading, as hnswlib trusts the file.
    """
    hnswlib = import_hnswlib()
    rows = check_index_file(path, spec, item_vectors)
    if retired is not None and mask_without(len(item_vectors), np.concatenate([rows, retired])).any():
        raise BundleError(f"{path}: the index does not match the items: it lacks some; export the bundle again")
    index: Any = hnswlib.Index(space=spec.space, dim=spec.dim)
    try:
        index.load_index(os.fspath(path), max_elements=capacity)
    except RuntimeError as error:
        raise BundleError(f"{path}: hnswlib does not load it: {error}; export the bundle again") from error
    return index
