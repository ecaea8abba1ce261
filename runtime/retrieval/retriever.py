"""From queries to exactly k candidates each: by the index if it is faster than a scan, else by a scan."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.catalogue import NO_ROWS, Eligible
from unipinrec.runtime.requests import Pool, Spread
from unipinrec.runtime.retrieval.index import HnswIndex, VectorIndex
from unipinrec.runtime.retrieval.scan import SHORTEST, ExactIndex, best, check_finite

# Measured by bench/retrieval_filters.py.
VISIT_COST = 50  # rows that a scan reads while the index takes one step
FILTER_RISK = 5  # if a filter correlates with the vectors, most searches find too few items and need a scan as well
WIDER = 4  # a search that finds too few words finds so many times the items next
FOUND, NAMED = 1, 2
NO_COSINES = "the index compares by dot product, similar items by cosine"
NO_INDEX = "the bundle has no index"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CandidateSet:
    """Distinct item rows [k] i64 and their similarity [k] f32, best first, ties in row order.

    `exact` is the reason why all eligible items were scanned; None = the index found them. `sources` [k] i8 adds
    `FOUND` if retrieval found an item and `NAMED` if the request names it; None = retrieval found all, none is named.
    """

    rows: NDArray[np.int64]
    similarity: NDArray[np.float32]
    exact: str | None
    sources: NDArray[np.int8] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Search(Eligible):
    """A search for exactly k eligible items.

    Attributes:
        queries: [Q, E]; an item's similarity is that to the nearest query.
        k: From 1 to the number of eligible items; 0 = nothing is searched.
        exact: Scan all eligible items.
        spread: A limit that the eligible items suffice for; if the k nearest do not, nearest ones of other words join
            them.
        allowed: Mask [N], without the retired items (`Catalogue.allowed`); None = all items that are not retired.
        excluded: Distinct rows to leave out.
    """

    queries: NDArray[np.float32]
    k: int
    exact: bool = False
    spread: Spread | None = None

    @classmethod
    def of(cls, pool: Pool, queries: NDArray[np.float32]) -> Search:
        """The search of a request."""
        return cls(
            queries=queries,
            k=pool.candidates,
            excluded=pool.excluded,
            allowed=pool.allowed,
            exact=pool.exact,
            spread=pool.spread,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Retriever:
    """Both ways to search one item table; safe to call from several threads.

    Attributes:
        index: Finds most of the nearest items; None = every search is a scan.
        scan: Finds all of them.
        item_vectors: [N, E] f32.
        live: Mask [N] of the items that are not retired; None if no item is.
        visit_cost: Rows that a scan reads while the index takes one step; 0 = always try the index first.
        unused: Why there is no index, in words.
    """

    index: VectorIndex | None
    scan: ExactIndex
    item_vectors: NDArray[np.float32]
    live: NDArray[np.bool_] | None = None
    visit_cost: float = VISIT_COST
    unused: str = "there is no index"

    @classmethod
    def open(cls, bundle: Bundle, threads: int | None = None) -> Retriever:
        """Load the index of a bundle. If there is none to use, prepare to scan; the log says why.

        Args:
            bundle: The bundle.
            threads: Threads of a scan; None = all that this process may use.

        Raises:
            BundleError: It is not an index of the bundle's items.
        """
        vectors, live, spec = bundle.item_vectors, bundle.catalogue.live, bundle.manifest.index
        index, unused = None, NO_INDEX
        if spec is not None and spec.scan:
            unused = f"the index finds {spec.recall:.3f} of the best {spec.recall_k} items, not {spec.recall_target}"
        elif spec is not None:
            try:
                index = HnswIndex.open(bundle, spec)
            except BackendError as error:
                unused = str(error)
        if index is not None:
            return cls(index=index, scan=ExactIndex(vectors), item_vectors=vectors, live=live)
        opened = cls(
            index=None, scan=ExactIndex.fastest(vectors, threads), item_vectors=vectors, live=live, unused=unused
        )
        log.log(logging.INFO if spec is None else logging.WARNING, "%s", opened.way)
        return opened

    @property
    def way(self) -> str:
        """What finds the candidates of a request without filters, and why it is not the index."""
        if self.index is not None:
            return "hnswlib, or a scan where that is faster"
        return f"each request scans {len(self.item_vectors)} items in {self.scan.products.dtype}: {self.unused}"

    @classmethod
    def of_items(cls, bundle: Bundle) -> Retriever:
        """Scans items by cosine where queries are compared by dot product; takes the memory of the item vectors."""
        vectors = bundle.item_vectors[:, : -1 if bundle.manifest.model.item_bias else None]
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), SHORTEST)
        return cls(index=None, scan=ExactIndex(unit), item_vectors=unit, live=bundle.catalogue.live, unused=NO_COSINES)

    def retrieve(self, searches: Sequence[Search]) -> list[CandidateSet]:
        """Run searches, and all scans of one k in one pass over the items. Each result is the same as alone.

        A result has exactly k items, or more if the search has a `spread`.

        Args:
            searches: The searches; all have the same number of queries.

        Raises:
            BackendError: A query is not finite.
        """
        searches = [replace(search, allowed=self.live) if search.allowed is None else search for search in searches]
        matches = [self._search_index(search) for search in searches]
        rows = [matched for matched, _ in matches]
        scans: dict[int, list[int]] = defaultdict(list)
        for index, (_, reason) in enumerate(matches):
            if reason is not None:
                scans[searches[index].k].append(index)
        for k, indices in scans.items():
            scanned = [searches[index] for index in indices]
            per_query = [search for search in scanned for _ in search.queries]
            near = iter(self.scan.near(np.concatenate([search.queries for search in scanned]), k, per_query))
            for index, search in zip(indices, scanned, strict=True):
                rows[index] = reduce(np.union1d, islice(near, len(search.queries)))
        queries, counts = np.stack([search.queries for search in searches]), [search.k for search in searches]
        nearest = best(self.item_vectors, queries, rows, counts)
        found = [
            CandidateSet(rows=kept, similarity=similarity, exact=reason)
            for (kept, similarity), (_, reason) in zip(nearest, matches, strict=True)
        ]
        return [
            self._wider(search, each) if search.spread else each for search, each in zip(searches, found, strict=True)
        ]

    def _wider(self, search: Search, found: CandidateSet) -> CandidateSet:
        """The candidates, joined by the nearest items that fill the list if these do not suffice for the limit."""
        spread, eligible, narrow = search.spread, search.count(len(self.item_vectors)), found
        assert spread is not None
        while spread.most(found.rows) < spread.k and len(found.rows) < eligible:
            fetch = min(WIDER * len(found.rows), eligible)
            (found,) = self.retrieve([replace(search, k=fetch, spread=None)])
        if found is narrow:
            return found
        kept = np.union1d(np.arange(search.k), spread.places(found.rows))
        return replace(found, rows=found.rows[kept], similarity=found.similarity[kept])

    def join(
        self, found: Sequence[CandidateSet], queries: NDArray[np.float32], named: Sequence[NDArray[np.int64]]
    ) -> list[CandidateSet]:
        """Candidates of each of S searches and the distinct rows that its request names, in one order.

        Args:
            found: What `retrieve` found.
            queries: [S, Q, E].
            named: Rows of each search.

        Raises:
            BackendError: A query is not finite.
        """
        check_finite(queries)
        rows = [np.union1d(each.rows, own) for each, own in zip(found, named, strict=True)]
        nearest = best(self.item_vectors, queries, rows, list(map(len, rows)))
        return [
            CandidateSet(
                rows=ordered,
                similarity=similarity,
                exact=each.exact,
                sources=(FOUND * np.isin(ordered, each.rows) + NAMED * np.isin(ordered, own)).astype(np.int8),
            )
            for (ordered, similarity), each, own in zip(nearest, found, named, strict=True)
        ]

    def _search_index(self, search: Search) -> tuple[NDArray[np.int64], str | None]:
        """The rows that the index finds, and the reason to scan all items, if there is one."""
        if not search.k:
            return NO_ROWS, None
        if search.exact or self.index is None:
            return NO_ROWS, "requested" if search.exact else self.unused
        fetch, reason = self._plan(search, self.index.ef)
        if reason is not None:
            return NO_ROWS, reason
        try:
            rows = search.keep(self.index.search(search.queries, fetch)[0])
        except BackendError as error:
            return NO_ROWS, str(error)
        few = len(rows) < search.k
        return rows, f"{len(rows)} of {search.k} candidates were left by the filters" if few else None

    def _plan(self, search: Search, ef: int) -> tuple[int, str | None]:
        """Number of items to fetch from the index, and why a scan is faster, if it is."""
        items, allowed = len(self.item_vectors), search.allowed
        count = items if allowed is None else int(np.count_nonzero(allowed))
        live = items if self.live is None else int(np.count_nonzero(self.live))
        left = search.count(items)
        expected = float(search.k + min(count - left, search.k))
        if filtered := count < live:
            expected += 3 * math.sqrt(expected)  # the number that passes the filter varies
        fetch = math.ceil(expected * live / count)
        searching = max(ef, fetch) * self.visit_cost * (FILTER_RISK if filtered else 1)
        gathering = self.scan.products.gather_cost * left
        read, cost = (left, gathering) if gathering < items else (items, items)
        if searching <= cost:
            return fetch, None
        return fetch, f"scanning {read} items is faster than searching the index for {fetch}"
