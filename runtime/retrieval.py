"""From queries to candidates: the index where it is faster than a scan, and always exactly as many as are wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle import Bundle
from unipinrec.runtime.index import ExactIndex, HnswIndex, VectorIndex, best, recall

# Measured by bench/retrieval_filters.py.
VISIT_COST = 50  # rows that a scan reads while the index takes one step
FILTER_RISK = 5  # a filter that goes with the vectors leaves too few in most searches, and then a scan comes on top


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Distinct item rows [k] i64 and their similarity [k] f32, best first, ties in row order.

    `exact` says why all eligible items were scanned; None = the index found them.
    """

    rows: NDArray[np.int64]
    similarity: NDArray[np.float32]
    exact: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Retriever:
    """Both ways to search one item table; safe to call from several threads.

    Attributes:
        index: Finds most of the nearest items.
        scan: Finds all of them.
        item_vectors: [N, E] f32 of unit length.
        live: Mask [N] of the items that are not retired; None where none is.
        visit_cost: How many rows a scan reads while the index takes one step; 0 = always ask the index.
    """

    index: VectorIndex
    scan: ExactIndex
    item_vectors: NDArray[np.float32]
    live: NDArray[np.bool_] | None = None
    visit_cost: float = VISIT_COST

    @classmethod
    def open(cls, bundle: Bundle) -> Retriever:
        """Load the index of a bundle.

        Raises:
            BundleError: It is not an index of the bundle's items.
        """
        vectors = bundle.item_vectors
        index = HnswIndex.open(bundle)
        return cls(index=index, scan=ExactIndex(vectors), item_vectors=vectors, live=bundle.catalogue.live)

    def retrieve(
        self,
        queries: NDArray[np.float32],
        wanted: int,
        excluded: NDArray[np.int64],
        *,
        allowed: NDArray[np.bool_] | None = None,
        exact: bool = False,
    ) -> Candidates:
        """Find exactly `wanted` eligible items: allowed and not excluded.

        Args:
            queries: [Q, E]; an item's similarity is that with the query it is most similar to.
            wanted: From 1 to the number of eligible items.
            excluded: Distinct rows to leave out.
            allowed: Mask [N] that leaves out the retired items too (`Catalogue.allowed`); None = all others.
            exact: Scan all eligible items.

        Raises:
            BackendError: A query is not finite.
        """
        allowed = self.live if allowed is None else allowed
        fetch, reason = self._plan(wanted, excluded, allowed)
        reason = "asked for" if exact else reason
        if reason is None:
            try:
                rows, _ = self.index.search(queries, fetch)
                rows = np.setdiff1d(rows, excluded)
                rows = rows if allowed is None else rows[allowed[rows]]
                reason = None if len(rows) >= wanted else f"{len(rows)} of {wanted} candidates were left by the filters"
            except BackendError as error:
                reason = str(error)
        if reason is not None:
            rows, _ = self.scan.search(queries, wanted, self._eligible(excluded, allowed))
            rows = np.unique(rows)
        rows, similarity = best(self.item_vectors, queries, rows, wanted)
        return Candidates(rows=rows, similarity=similarity, exact=reason)

    def _plan(
        self, wanted: int, excluded: NDArray[np.int64], allowed: NDArray[np.bool_] | None
    ) -> tuple[int, str | None]:
        """How many items to ask the index for, and why a scan is faster, if it is."""
        items = len(self.item_vectors)
        count = items if allowed is None else int(np.count_nonzero(allowed))
        live = items if self.live is None else int(np.count_nonzero(self.live))
        inside = len(excluded) if allowed is None else int(np.count_nonzero(allowed[excluded]))
        hoped = float(wanted + min(inside, wanted))
        if filtered := count < live:
            hoped += 3 * math.sqrt(hoped)  # how many pass the filter is a matter of luck
        fetch = math.ceil(hoped * live / count)
        searching = max(self.index.ef, fetch) * self.visit_cost * (FILTER_RISK if filtered else 1)
        eligible = count - inside
        gathering = self.scan.gather_cost * eligible
        read, cost = (eligible, gathering) if gathering < items else (items, items)
        if searching <= cost:
            return fetch, None
        return fetch, f"scanning {read} items is faster than searching the index for {fetch}"

    def _eligible(self, excluded: NDArray[np.int64], allowed: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        if not len(excluded):
            return allowed
        mask = np.ones(len(self.item_vectors), np.bool_) if allowed is None else allowed.copy()
        mask[excluded] = False
        return mask

    def sampled_recall(self, queries: NDArray[np.float32], k: int) -> float:
        """Share of the k nearest items that the index finds for queries [R, E], such as a sample of those in service.

        It costs a search and a scan for each query and changes nothing. An item as near as the k-th counts as found.

        Raises:
            BackendError: A query is not finite, or there are fewer than k items.
        """
        _, found = self.index.search(queries, k)
        _, true = self.scan.search(queries, k, self.live)
        return recall(found, true)
