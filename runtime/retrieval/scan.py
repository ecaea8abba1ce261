"""The exact scan: all items compared with queries, in blocks of rows.

Rough products pick the rows that can be among the best, by a bound on their error. The products of these rows are then
computed in fp32, row by row (`best`). So answers depend neither on the rough products nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.catalogue import NO_ROWS, Eligible
from unipinrec.runtime.graphs.ort_cpu import PROVIDER, import_onnxruntime, session_options
from unipinrec.runtime.machine import thread_count

# Gathering a row costs as much as reading this many in order: bench/retrieval_filters.py, bench/scan.py.
GATHER_COST, INT8_GATHER_COST = 4, 6
BLOCK_ROWS = 65_536
QUERIES_AT_ONCE = 32
INT8_ROWS = 16_384  # with fewer items a copy in int8 saves no time
# Larger products saturate on CPUs without VNNI, which add two of them in 16 bits: 2 * 255 * 64 < 2 ** 15.
ITEM_LEVELS, ZERO, QUERY_LEVELS = 127, 128, 64
INT32 = np.iinfo(np.int32)
EPS = float(np.finfo(np.float32).eps)
SHORTEST = 1e-15  # Vectors that are shorter have no direction: the square of fp32 numbers soon becomes 0.
# MatMulInteger and Transpose: items [n, e] u8, queries [e, s] i8, scores [s, n] i32.
GRAPH = (
    b'\x08\x08:\xb3\x01\n)\n\x05items\n\x07queries\x12\x08products"\rMatMulInteger\n,\n\x08products\x12\x06scores"\t'
    b"Transpose*\r\n\x04perm@\x01@\x00\xa0\x01\x07\x12\x04scanZ\x19\n\x05items\x12\x10\n\x0e\x08\x02\x12\n\n\x03\x12\x01n"
    b"\n\x03\x12\x01eZ\x1b\n\x07queries\x12\x10\n\x0e\x08\x03\x12\n\n\x03\x12\x01e\n\x03\x12\x01sb\x1a\n\x06scores\x12\x10"
    b"\n\x0e\x08\x06\x12\n\n\x03\x12\x01s\n\x03\x12\x01nB\x04\n\x00\x10\r"
)
Scores = NDArray[np.int32] | NDArray[np.float32]
Matches = tuple[NDArray[np.int64], NDArray[np.float32]]


class RoughProducts(Protocol):
    """Rough inner products of all items with queries."""

    dtype: str
    """Type of the vectors that are read."""
    gather_cost: float
    """Rows that are read in the time that it takes to gather one."""

    def blocks(self, queries: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any], Iterator[tuple[int, Scores]]]:
        """Scale [S] and offset [S] for `queries` [S, E], and for each block its first row and its scores [S, rows].

        A product of real numbers is at most scale * score + offset. The scores may be overwritten.
        """
        ...


class Fp32Products:
    """RoughProducts in numpy, on one thread."""

    dtype = "fp32"

    def __init__(self, vectors: NDArray[np.float32], gather_cost: float = GATHER_COST) -> None:
        self._vectors, self.gather_cost = vectors, gather_cost

    def blocks(self, queries: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any], Iterator[tuple[int, Scores]]]:
        """See `RoughProducts.blocks`. The error is far below the margin of `ExactIndex`."""
        # Not `@`: the threads of BLAS spin and compete if several requests scan at once.
        scores = (
            (start, np.einsum("se,ne->sn", queries, self._vectors[start : start + BLOCK_ROWS]))
            for start in range(0, len(self._vectors), BLOCK_ROWS)
        )
        return np.ones(len(queries)), np.zeros(len(queries)), scores


class Int8Products:
    """RoughProducts of a copy in int8, a quarter of the size, in ONNX Runtime."""

    dtype = "int8"
    gather_cost: float = INT8_GATHER_COST

    def __init__(self, vectors: NDArray[np.float32], threads: int | None = None) -> None:
        """Round item vectors [N, E].

        Args:
            vectors: The vectors. Where their lengths differ, a row is rounded in proportion to its own.
            threads: Threads of a scan; None = all that this process may use.

        Raises:
            BackendError: ONNX Runtime is missing.
        """
        ort = import_onnxruntime()
        self.threads = thread_count(threads)
        self._session = ort.InferenceSession(GRAPH, session_options(ort, self.threads), providers=[PROVIDER])
        lengths = np.maximum(np.sqrt(np.einsum("ne,ne->n", vectors, vectors)), SHORTEST)
        self._longest = float(lengths.max())
        even = self._longest < 1.01 * float(lengths.min())
        self._lengths = None if even else lengths
        largest, self._error = 0.0, 0.0
        for block in _blocks(len(vectors)):
            largest = max(largest, float(np.abs(self._unit(vectors, block)).max()))
        self._step = max(largest, SHORTEST) / ITEM_LEVELS
        self._items = np.empty(vectors.shape, np.uint8)
        for block in _blocks(len(vectors)):
            unit = self._unit(vectors, block)
            levels = np.rint(unit / self._step)
            self._items[block] = levels + ZERO
            self._error = max(self._error, float(np.linalg.norm(unit - levels * self._step, axis=1).max()))

    def _unit(self, vectors: NDArray[np.float32], block: slice) -> NDArray[np.float32]:
        unit: NDArray[np.float32] = vectors[block] / (
            np.float32(self._longest) if self._lengths is None else self._lengths[block, None]
        )
        return unit

    def blocks(self, queries: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any], Iterator[tuple[int, Scores]]]:
        """See `RoughProducts.blocks`."""
        wide = queries.astype(np.float64)
        steps = np.maximum(np.abs(wide).max(axis=1), SHORTEST**2) / QUERY_LEVELS
        levels = np.rint(wide / steps[:, None])
        lengths, lost = np.linalg.norm(wide, axis=1), np.linalg.norm(wide - levels * steps[:, None], axis=1)
        scale = self._step * steps
        # The largest error of a product with an item of length 1, in units of the scale.
        error = (self._error * lengths + (1.0 + self._error) * lost + 8 * EPS * lengths) / scale
        error += 1.0 + 2 * EPS * (ZERO + ITEM_LEVELS) * QUERY_LEVELS * queries.shape[1]  # rounding of the scores
        shift = error - ZERO * levels.sum(axis=1)
        scores = self._scores(np.ascontiguousarray(levels.T.astype(np.int8)), shift.astype(np.float32))
        if self._lengths is None:
            return self._longest * scale, self._longest * scale * shift, scores
        return scale, np.zeros(len(queries)), scores

    def _scores(self, levels: NDArray[np.int8], shift: NDArray[np.float32]) -> Iterator[tuple[int, Scores]]:
        for block in _blocks(len(self._items)):
            (scores,) = self._session.run(None, {"items": self._items[block], "queries": levels})
            if self._lengths is not None:
                scores = (scores.astype(np.float32) + shift[:, None]) * self._lengths[block]
            yield block.start, scores


class ExactIndex:
    """Scans item vectors; its result depends only on the query, the eligible rows and their vectors."""

    def __init__(self, item_vectors: NDArray[np.float32], products: RoughProducts | None = None) -> None:
        """Scan item vectors [N, E]; `products` = in fp32, without a copy of them."""
        self._vectors, self.products = item_vectors, products or Fp32Products(item_vectors)
        # Four times the bound on the rounding error of an inner product with a query of length 1.
        longest = np.sqrt(np.einsum("ne,ne->n", item_vectors, item_vectors).max(initial=0.0))
        self._margin = 2.0 * item_vectors.shape[1] * EPS * float(longest)

    @classmethod
    def fastest(cls, item_vectors: NDArray[np.float32], threads: int | None = None) -> ExactIndex:
        """Scan a copy in int8, unless the items are few or ONNX Runtime is missing; see `Int8Products`."""
        try:
            return cls(item_vectors, Int8Products(item_vectors, threads) if len(item_vectors) >= INT8_ROWS else None)
        except BackendError:
            return cls(item_vectors)

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
        for index, rows in enumerate(eligible):
            if rows.allowed is None or self.products.gather_cost * rows.count(len(self._vectors)) >= len(self._vectors):
                scans.append(index)
            else:  # so few rows that gathering them is faster than reading all
                near[index] = self._nearest(queries[index], rows.rows(len(self._vectors)), k)
        for start in range(0, len(scans), QUERIES_AT_ONCE):
            part = scans[start : start + QUERIES_AT_ONCE]
            scale, offset, blocks = self.products.blocks(queries[part])
            kept = [
                _Kept(self, queries[index], k, eligible[index], bound)
                for index, *bound in zip(part, scale.tolist(), offset.tolist(), strict=True)
            ]
            for first, scores in blocks:
                for one, row in zip(kept, scores, strict=True):
                    one.take(first, row)
            for index, one in zip(part, kept, strict=True):
                near[index] = self._nearest(queries[index], one.rows, k)
        return near

    def least(self, query: NDArray[np.float32], rows: NDArray[np.int64]) -> float:
        """A number that the smallest product of `query` [E] with `rows` reaches, however it is rounded."""
        lowest = float(np.einsum("me,e->m", self._vectors[rows], query).min())
        return lowest - self._slack(query)

    def _nearest(self, query: NDArray[np.float32], rows: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        """Those of `rows` that may be among the k best of them; the caller must compute their products again."""
        parts = (self._vectors[rows[start : start + BLOCK_ROWS]] for start in range(0, len(rows), BLOCK_ROWS))
        products = np.concatenate([np.einsum("me,e->m", part, query) for part in parts])
        last = len(rows) - k
        near: NDArray[np.int64] = rows[products >= np.partition(products, last)[last] - self._slack(query)]
        return near

    def _slack(self, query: NDArray[np.float32]) -> float:
        slack: float = self._margin * float(np.linalg.norm(query))
        return slack


class _Kept:
    """The rows that may be among the k best for one query, while a scan goes from block to block."""

    def __init__(
        self, index: ExactIndex, query: NDArray[np.float32], k: int, eligible: Eligible, bound: Sequence[float]
    ) -> None:
        self._index, self._query, self._k, self._eligible = index, query, k, eligible
        self._scale, self._offset = bound
        self._least = -np.inf  # of the k best products, so far
        self._parts: list[tuple[NDArray[np.int64], Scores]] = []
        self._count = 0

    @property
    def rows(self) -> NDArray[np.int64]:
        """The rows, ascending."""
        return np.concatenate([rows for rows, _ in self._parts])

    def take(self, first: int, scores: Scores) -> None:
        """Look at a block: its first row, and its scores, which may be overwritten."""
        allowed, excluded = self._eligible.allowed, self._eligible.excluded
        if self._least == -np.inf:
            self._begin(first, scores)
        places = np.flatnonzero(scores > self._limit(scores))
        rows = places + first
        if allowed is not None:
            places, rows = places[allowed[rows]], rows[allowed[rows]]
        if len(excluded):
            new = ~np.isin(rows, excluded)
            places, rows = places[new], rows[new]
        self._parts.append((rows, scores[places]))
        self._count += len(rows)
        if self._count > 4 * self._k:
            self._drop()

    def _begin(self, first: int, scores: Scores) -> None:
        """Find a first limit, if the block has k eligible rows."""
        allowed, excluded, lowest = self._eligible.allowed, self._eligible.excluded - first, _lowest(scores)
        if allowed is not None:
            np.copyto(scores, lowest, where=~allowed[first : first + len(scores)])
        scores[excluded[(excluded >= 0) & (excluded < len(scores))]] = lowest
        if len(scores) > self._k:
            top = np.argpartition(scores, len(scores) - self._k)[-self._k :]
            if scores[top].min() > lowest:
                self._least = self._index.least(self._query, top + first)

    def _drop(self) -> None:
        rows, scores = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        top = np.argpartition(scores, len(scores) - self._k)[-self._k :]
        self._least = max(self._least, self._index.least(self._query, rows[top]))
        kept = scores > self._limit(scores)
        self._parts, self._count = [(rows[kept], scores[kept])], int(np.count_nonzero(kept))

    def _limit(self, scores: Scores) -> Any:
        """Scores above this one may be of the k best."""
        limit = (self._least - self._offset) / self._scale
        if scores.dtype.kind == "i":
            return int(np.clip(np.floor(limit) - 1, INT32.min, INT32.max))
        return np.nextafter(np.float32(limit), np.float32(-np.inf))


def _lowest(scores: Scores) -> Any:
    """Marks rows that are not eligible."""
    return INT32.min if scores.dtype.kind == "i" else np.float32(-np.inf)


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK_ROWS) for start in range(0, rows, BLOCK_ROWS))


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


def check_finite(queries: NDArray[np.float32]) -> None:
    """Check query vectors.

    Raises:
        BackendError: One is not finite.
    """
    if not np.isfinite(queries).all():
        raise BackendError("a query vector is not finite; the retrieval graph is broken, export the bundle again")
