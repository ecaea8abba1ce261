"""From queries to candidates: the index where it is faster than a scan, and always exactly as many as are wanted."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.catalogue import NO_ROWS
from unipinrec.runtime.retrieval.index import Eligible, ExactIndex, HnswIndex, VectorIndex, best, recall

# Measured by bench/retrieval_filters.py.
VISIT_COST = 50  # rows that a scan reads while the index takes one step
FILTER_RISK = 5  # a filter that goes with the vectors leaves too few in most searches, and then a scan comes on top


@dataclass(frozen=True, kw_only=True)
class CandidateSet:
    """Distinct item rows [k] i64 and their similarity [k] f32, best first, ties in row order.

    `exact` says why all eligible items were scanned; None = the index found them.
    """

    rows: NDArray[np.int64]
    similarity: NDArray[np.float32]
    exact: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Search:
    """Exactly `wanted` eligible items: allowed and not excluded.

    Attributes:
        queries: [Q, E]; an item's similarity is that with the query it is most similar to.
        wanted: From 1 to the number of eligible items.
        excluded: Distinct rows to leave out.
        allowed: Mask [N] that leaves out the retired items too (`Catalogue.allowed`); None = all others.
        exact: Scan all eligible items.
    """

    queries: NDArray[np.float32]
    wanted: int
    excluded: NDArray[np.int64] = field(default_factory=lambda: NO_ROWS)
    allowed: NDArray[np.bool_] | None = None
    exact: bool = False


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

    def retrieve(self, searches: Sequence[Search]) -> list[CandidateSet]:
        """Find what each search wants, scans in one pass over the items. Each finds what it would find alone.

        Args:
            searches: Of which all have as many queries.

        Raises:
            BackendError: A query is not finite.
        """
        eligible = [self._eligible(search) for search in searches]
        found = [self._ask_index(search, one) for search, one in zip(searches, eligible, strict=True)]
        rows = [rows for rows, _ in found]
        scans: dict[int, list[int]] = defaultdict(list)
        for index, (_, reason) in enumerate(found):
            if reason is not None:
                scans[searches[index].wanted].append(index)
        for wanted, indices in scans.items():
            queries = [searches[index].queries for index in indices]
            repeated = [eligible[index] for index, several in zip(indices, queries, strict=True) for _ in several]
            near = iter(self.scan.near(np.concatenate(queries), wanted, repeated))
            for index, several in zip(indices, queries, strict=True):
                rows[index] = reduce(np.union1d, islice(near, len(several)))
        nearest = best(
            self.item_vectors, np.stack([one.queries for one in searches]), rows, [one.wanted for one in searches]
        )
        return [
            CandidateSet(rows=kept, similarity=similarity, exact=reason)
            for (kept, similarity), (_, reason) in zip(nearest, found, strict=True)
        ]

    def _ask_index(self, search: Search, eligible: Eligible) -> tuple[NDArray[np.int64], str | None]:
        """The rows that the index finds, or why all are to be scanned."""
        fetch, reason = self._plan(search.wanted, eligible)
        if search.exact or reason is not None:
            return NO_ROWS, "asked for" if search.exact else reason
        try:
            found, _ = self.index.search(search.queries, fetch)
        except BackendError as error:
            return NO_ROWS, str(error)
        rows = eligible.keep(found)
        few = len(rows) < search.wanted
        return rows, f"{len(rows)} of {search.wanted} candidates were left by the filters" if few else None

    def _plan(self, wanted: int, eligible: Eligible) -> tuple[int, str | None]:
        """How many items to ask the index for, and why a scan is faster, if it is."""
        items, allowed, excluded = len(self.item_vectors), eligible.allowed, eligible.excluded
        count = items if allowed is None else int(np.count_nonzero(allowed))
        live = items if self.live is None else int(np.count_nonzero(self.live))
        left = eligible.count(items)
        inside = len(excluded) if allowed is None else count - left
        hoped = float(wanted + min(inside, wanted))
        if filtered := count < live:
            hoped += 3 * math.sqrt(hoped)  # how many pass the filter is a matter of luck
        fetch = math.ceil(hoped * live / count)
        searching = max(self.index.ef, fetch) * self.visit_cost * (FILTER_RISK if filtered else 1)
        gathering = self.scan.gather_cost * left
        read, cost = (left, gathering) if gathering < items else (items, items)
        if searching <= cost:
            return fetch, None
        return fetch, f"scanning {read} items is faster than searching the index for {fetch}"

    def _eligible(self, search: Search) -> Eligible:
        return Eligible(allowed=self.live if search.allowed is None else search.allowed, excluded=search.excluded)

    def sampled_recall(self, queries: NDArray[np.float32], k: int) -> float:
        """Share of the k nearest items that the index finds for queries [R, E], such as a sample of those in service.

        It costs a search and a scan for each query and changes nothing. An item as near as the k-th counts as found.

        Raises:
            BackendError: A query is not finite, or there are fewer than k items.
        """
        _, found = self.index.search(queries, k)
        _, true = self.scan.search(queries, k, self.live)
        return recall(found, true)
