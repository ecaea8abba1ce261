"""Ways to find the nearest eligible items, by the share that is eligible: the thresholds of `retrieval/retriever.py`.

    OMP_NUM_THREADS=1 python bench/retrieval_filters.py [--items 100000] [--wanted 200] [--rounds 31]

Card: `--items` unit vectors of 64 dimensions around 500 centres, one query per search, near a random item and never the
same twice. Two kinds of filter leave the same share: `random`, which knows nothing of the vectors, and `topics`, which
leaves whole neighbourhoods, as categories do. For each share, interleaved round by round, median ms of
`Retriever.retrieve`:

    index      over-fetch from hnswlib and filter; a scan makes up the number where too few are left (1 - `filled`)
    masked     scan of all items, those that are not eligible pushed out
    gathered   the eligible vectors copied together and scanned
    default    having chosen by itself; `chosen` = what, and why

Then the two constants that it chooses by: `gather_cost`, the time of a gathered row over that of a row of a scan in
passing, and `visit_cost`, that of one step of the index's search over that of such a row, from unfiltered searches.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import card, finish
from numpy.typing import NDArray

from unipinrec.runtime.retrieval.index import HnswIndex
from unipinrec.runtime.retrieval.index_build import IndexTask, build_index
from unipinrec.runtime.retrieval.retriever import Retriever, Search
from unipinrec.runtime.retrieval.scan import ExactIndex, Fp32Products

DIM, CENTRES, SPREAD = 64, 500, 0.75
SHARES = (1.0, 0.5, 0.1, 0.01, 0.001)
WIDTHS = (100, 200, 400, 800, 1600, 3200)
WARM_UP = 2
NONE = np.zeros(0, np.int64)


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


class Catalogue:
    """Items around centres, their index, and queries near random items."""

    def __init__(self, items: int, folder: Path) -> None:
        self.rng = np.random.default_rng(0)
        self.topic = self.rng.integers(0, CENTRES, items)
        noise = self.rng.normal(size=(items, DIM)) * SPREAD / np.sqrt(DIM)
        self.vectors = unit(unit(self.rng.normal(size=(CENTRES, DIM)))[self.topic] + noise)
        self.spec = build_index(IndexTask(vectors=self.vectors, queries=self.queries(200)), folder / "index.hnsw")
        self.index = HnswIndex(folder / "index.hnsw", self.spec, self.vectors)

    def queries(self, count: int) -> NDArray[np.float32]:
        near = self.vectors[self.rng.integers(0, len(self.vectors), count)]
        return unit(near + 0.5 * self.rng.normal(size=near.shape) / np.sqrt(DIM))

    def mask(self, kind: str, share: float) -> NDArray[np.bool_]:
        """A share of the items: any, or whole topics and a part of one."""
        if kind == "random":
            return self.rng.random(len(self.vectors)) < share
        index = self.rng.permutation(CENTRES)[self.topic] + self.rng.random(len(self.vectors))
        return np.asarray(index <= np.quantile(index, share))

    def ways(self) -> dict[str, tuple[Retriever, bool]]:
        """Retrievers that are bound to one way, and whether they are to scan."""
        usual = Retriever(index=self.index, scan=ExactIndex(self.vectors), item_vectors=self.vectors)
        masked, gathered = (
            ExactIndex(self.vectors, Fp32Products(self.vectors, cost)) for cost in (len(self.vectors), 0)
        )
        return {
            "index": (replace(usual, visit_cost=0), False),
            "masked": (replace(usual, scan=masked), True),
            "gathered": (replace(usual, scan=gathered), True),
            "default": (usual, False),
        }


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: float(np.median(values[WARM_UP:])) for name, values in times.items()}


def one_share(catalogue: Catalogue, kind: str, share: float, wanted: int, rounds: int) -> dict[str, Any]:
    """All ways for one filter."""
    mask, ways = catalogue.mask(kind, share), catalogue.ways()
    wanted = min(wanted, int(mask.sum()))
    times: dict[str, list[float]] = {name: [] for name in ways}
    reasons: dict[str, Counter[str]] = {name: Counter() for name in ways}
    for query in catalogue.queries(rounds + WARM_UP)[:, None]:
        for name, (retriever, exact) in ways.items():
            began = time.perf_counter()
            (found,) = retriever.retrieve([Search(queries=query, k=wanted, allowed=mask, exact=exact)])
            times[name].append((time.perf_counter() - began) * 1e3)
            reasons[name][found.exact or "index"] += 1
    return {
        "filter": kind,
        "share": share,
        "wanted": wanted,
        **{f"{name}_ms": round(value, 3) for name, value in medians(times).items()},
        "filled": round(reasons["index"]["index"] / (rounds + WARM_UP), 2),
        "chosen": reasons["default"].most_common(1)[0][0],
    }


def constants(catalogue: Catalogue, rounds: int) -> dict[str, Any]:
    """Times of unfiltered searches and of scans, and the two ratios."""
    tenth, items = catalogue.mask("random", 0.1), len(catalogue.vectors)
    scan, gathering = ExactIndex(catalogue.vectors), ExactIndex(catalogue.vectors, Fp32Products(catalogue.vectors, 0))
    times: dict[str, list[float]] = {name: [] for name in ("scan", "gather", *map(str, WIDTHS))}
    for query in catalogue.queries(rounds + WARM_UP)[:, None]:
        times["scan"].append(milliseconds(partial(scan.search, query, 100)))
        times["gather"].append(milliseconds(partial(gathering.search, query, 100, tenth)))
        for width in WIDTHS:
            times[str(width)].append(milliseconds(partial(catalogue.index.search, query, width)))
    median = medians(times)
    row_ms = median["scan"] / items
    steps = {width: max(width, catalogue.index.ef) for width in WIDTHS}
    return {
        "scan_ms": round(median["scan"], 3),
        "search_ms": {width: round(median[str(width)], 3) for width in WIDTHS},
        "gather_cost": round(median["gather"] / np.count_nonzero(tenth) / row_ms, 2),
        "visit_cost": {width: round(median[str(width)] / steps[width] / row_ms, 1) for width in WIDTHS},
    }


def main() -> None:
    """Build, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--wanted", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        catalogue = Catalogue(options.items, Path(folder))
        filters = [(kind, share) for kind in ("random", "topics") for share in SHARES]
        rows = [one_share(catalogue, kind, share, options.wanted, options.rounds) for kind, share in filters]
        measured = constants(catalogue, options.rounds)
    spec = catalogue.spec
    document: dict[str, Any] = {
        **card("retrieval_filters"),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "items": options.items,
        "dim": DIM,
        "rounds": options.rounds,
        "index": {"m": spec.m, "ef": spec.ef_search, "recall": round(spec.recall, 4)},
    }
    finish({**document, "rows": rows, "constants": measured}, "retrieval_filters")


if __name__ == "__main__":
    main()
