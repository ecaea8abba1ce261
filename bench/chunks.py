"""Sizes of the chunks that ONNX Runtime on the CPU encodes and ranks in, and whether chunks change the result.

    OMP_NUM_THREADS=1 python bench/chunks.py [--rounds 31] [--threads 1]

Card: the `small` size with random weights, one user. Encoding n events in chunks (each attends to the past and to
itself), and ranking k candidates in chunks, against one run; interleaved round by round. `over` is the time of one run
over that of chunks: above 1, chunks are faster.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from backends import ITEMS, history_of
from common import card, finish, interleaved, ratio, spread
from synthetic import NOW_MS, random_bundle

from unipinrec.runtime import Bundle
from unipinrec.runtime.graphs.engine import Engine
from unipinrec.runtime.graphs.ort_cpu import OrtBackend

HISTORIES, CANDIDATES = (384, 512, 992), (656, 1000)
PREFILL_CHUNKS, RANK_CHUNKS = (128, 192, 256, 384), (128, 192, 256, 384)
WHOLE = "one run"


class Chunked(OrtBackend):
    """One backend whose chunks can be set."""

    def with_chunks(self, prefill: int | None, rank: int | None) -> Chunked:
        other = Chunked.__new__(Chunked)
        other.__dict__ = {**self.__dict__, "prefill_chunk": prefill, "rank_chunk": rank}
        return other


def engines(bundle: Bundle, threads: int, stage: str) -> dict[str, Engine]:
    backend = Chunked(bundle.graph_files(), threads)
    sizes = PREFILL_CHUNKS if stage == "encode" else RANK_CHUNKS
    pairs = {str(size): (size, None) if stage == "encode" else (None, size) for size in sizes}
    return {
        name: Engine(backend.with_chunks(*pair), bundle.manifest.model, bundle.item_vectors)
        for name, pair in {WHOLE: (None, None), **pairs}.items()
    }


def encode_row(ways: dict[str, Engine], events: int, rounds: int) -> dict[str, Any]:
    history = history_of(events)
    whole = ways[WHOLE].prefill(history)
    largest = max(
        float(np.abs(a.numpy() - b.numpy()).max())
        for engine in ways.values()
        for a, b in zip(engine.prefill(history).key_values, whole.key_values, strict=True)
    )
    times = interleaved({name: partial(engine.prefill, history) for name, engine in ways.items()}, rounds)
    return {"stage": "encode", "n": events, "largest_difference": largest, **report(times)}


def rank_row(ways: dict[str, Engine], events: int, candidates: int, rounds: int) -> dict[str, Any]:
    rows, context = np.arange(candidates)[None] % ITEMS, (np.zeros(1, np.int64), np.array([NOW_MS]))
    past = ways[WHOLE].prefill(history_of(events))
    whole = ways[WHOLE].rank(past, rows, *context)
    largest = max(float(np.abs(engine.rank(past, rows, *context) - whole).max()) for engine in ways.values())
    times = interleaved({name: partial(engine.rank, past, rows, *context) for name, engine in ways.items()}, rounds)
    return {"stage": "rank", "n": events, "k": candidates, "largest_difference": largest, **report(times)}


def report(times: dict[str, list[float]]) -> dict[str, Any]:
    over = {name: ratio(times, WHOLE, name) for name in times if name != WHOLE}
    return {"ms": {name: spread(values) for name, values in times.items()}, "over": over}


def main() -> None:
    """Time all sizes; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.open(random_bundle(Path(folder) / "bundle", ITEMS))
        ways = {stage: engines(bundle, options.threads, stage) for stage in ("encode", "rank")}
        rows = [encode_row(ways["encode"], events, options.rounds) for events in HISTORIES]
        for events in HISTORIES:
            rows += [rank_row(ways["rank"], events, candidates, options.rounds) for candidates in CANDIDATES]
    finish({**card("chunks"), "threads": options.threads, "rounds": options.rounds, "rows": rows}, "chunks")


if __name__ == "__main__":
    main()
