"""From queries to candidates: ask the index for more than is wanted, drop what is excluded, make up the number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.index import ExactIndex, VectorIndex

INDEX_SHARE = 4  # beyond a quarter of the catalogue the index visits most of it, more slowly than a scan


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Distinct item rows [k] i64 and their similarity [k] f32, best first.

    `exact` says why all items were scanned; None = the index found them.
    """

    rows: NDArray[np.int64]
    similarity: NDArray[np.float32]
    exact: str | None


@dataclass(frozen=True, kw_only=True)
class Retriever:
    """Both ways to search one item table [N, E]."""

    index: VectorIndex
    scan: ExactIndex
    item_vectors: NDArray[np.float32]

    def retrieve(
        self, queries: NDArray[np.float32], wanted: int, excluded: NDArray[np.int64], *, exact: bool = False
    ) -> Candidates:
        """Find exactly `wanted` items that are not excluded.

        Args:
            queries: [Q, E]; an item's similarity is that with the query it is most similar to.
            wanted: At most the number of items that are not excluded.
            excluded: Distinct rows to leave out.
            exact: Scan all items.
        """
        fetch = wanted + min(len(excluded), wanted)
        if exact:
            return self._scan(queries, wanted, excluded, "asked for")
        if fetch * INDEX_SHARE > len(self.item_vectors):
            return self._scan(queries, wanted, excluded, f"{fetch} of {len(self.item_vectors)} items would be fetched")
        try:
            found, _ = self.index.search(queries, fetch)
        except BackendError as error:
            return self._scan(queries, wanted, excluded, str(error))
        kept = np.setdiff1d(found, excluded)
        if len(kept) < wanted:
            return self._scan(queries, wanted, excluded, f"{len(kept)} of {wanted} candidates were left by the filters")
        return self._best(queries, kept, wanted, None)

    def _scan(self, queries: NDArray[np.float32], wanted: int, excluded: NDArray[np.int64], reason: str) -> Candidates:
        found, _ = self.scan.search(queries, wanted, excluded)
        return self._best(queries, np.unique(found), wanted, reason)

    def _best(
        self, queries: NDArray[np.float32], rows: NDArray[np.int64], wanted: int, reason: str | None
    ) -> Candidates:
        """The `wanted` best of distinct rows, ties by row; similarity is computed afresh, the same on both ways."""
        similarity = (self.item_vectors[rows] @ queries.T).max(axis=1)
        order = np.lexsort((rows, -similarity))[:wanted]
        return Candidates(rows=rows[order], similarity=similarity[order], exact=reason)
