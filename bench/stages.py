"""Time of each stage on ONNX Runtime, and one shared encode against two: the baseline that later work must beat.

    python bench/stages.py [--rounds 31] [--threads 2] [--items 20000]

Card: the `small` size (4 layers, d = 256, 8 heads of 32) with random weights, one user per request. For each history
length n and candidate count k, in one process and interleaved round by round:

    encode     history -> keys/values, last hidden state
    retrieve   query vector, hnswlib search for k of the items, seen ones left out
    rank       k candidates attend to the n cached events
    shared     encode + retrieve + rank           one transformer serves both stages
    separate   encode + retrieve + encode + rank  what two models of the same size cost, each encoding the history

Both attention forms (`models/attention.py`) are timed. Figures are medians with the 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from common import card, finish, milliseconds, spread
from numpy.typing import NDArray
from synthetic import ACTIONS, NOW_MS, random_source

from unipinrec.export.bundle_writer import export_bundle
from unipinrec.models.config import SMALL, AttentionForm
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.graphs.engine import Encoded, Engine, HistoryBatch
from unipinrec.runtime.graphs.ort_cpu import OrtBackend
from unipinrec.runtime.retrieval.index import HnswIndex
from unipinrec.runtime.retrieval.retriever import Retriever, Search
from unipinrec.runtime.retrieval.scan import ExactIndex

HISTORIES, CANDIDATES = (256, 512, 992), (128, 656)
FORMS: tuple[AttentionForm, ...] = ("sink", "self")


class Stages:
    """The three stages of one request of n events and k candidates, ready to be timed."""

    def __init__(self, engine: Engine, retriever: Retriever, events: int, candidates: int) -> None:
        rng = np.random.default_rng(events)
        count = len(engine.item_vectors)
        self.engine, self.retriever, self.candidates = engine, retriever, candidates
        self.history = HistoryBatch(
            item_rows=rng.integers(0, count, (1, events)),
            actions=(rng.random((1, events, len(ACTIONS))) < 0.3).astype(np.float32),
            surfaces=np.zeros((1, events), np.int64),
            timestamps_ms=NOW_MS - np.sort(rng.integers(1, 10**9, (1, events)))[:, ::-1],
            lengths=np.array([events]),
        )
        self.seen = np.unique(self.history.item_rows)

    def encode(self) -> Encoded:
        return self.engine.encode(self.history)

    def retrieve(self, encoded: Encoded) -> NDArray[np.int64]:
        queries = self.engine.retrieve(encoded, np.zeros((1, len(ACTIONS)), np.float32))
        search = Search(queries=queries[0], k=self.candidates, excluded=self.seen)
        return self.retriever.retrieve([search])[0].rows

    def rank(self, encoded: Encoded, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.engine.rank(encoded, rows[None], np.zeros(1, np.int64), np.array([NOW_MS]))

    def shared(self) -> None:
        encoded = self.encode()
        self.rank(encoded, self.retrieve(encoded))

    def separate(self) -> None:
        rows = self.retrieve(self.encode())
        self.rank(self.encode(), rows)


def one_round(stages: Stages) -> dict[str, float]:
    """Every figure once, in an order that puts both sides of each ratio next to each other."""
    encoded = stages.encode()
    rows = stages.retrieve(encoded)
    return {
        "encode": milliseconds(stages.encode),
        "retrieve": milliseconds(lambda: stages.retrieve(encoded)),
        "rank": milliseconds(lambda: stages.rank(encoded, rows)),
        "shared": milliseconds(stages.shared),
        "separate": milliseconds(stages.separate),
    }


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians with spread, and the ratio separate / shared taken round by round."""
    figures = {f"{name}_ms": spread([r[name] for r in rounds]) for name in rounds[0]}
    return {**figures, "separate_over_shared": spread([r["separate"] / r["shared"] for r in rounds])}


def open_engine(form: AttentionForm, items: int, threads: int, folder: Path) -> tuple[Engine, Retriever]:
    export_bundle(random_source(form, items), folder)
    bundle = Bundle.open(folder)
    engine = Engine(OrtBackend(bundle.graph_files(), threads), bundle.manifest.model, bundle.item_vectors)
    assert bundle.manifest.index is not None
    index = HnswIndex.open(bundle, bundle.manifest.index)
    return engine, Retriever(index=index, scan=ExactIndex(bundle.item_vectors), item_vectors=bundle.item_vectors)


def main() -> None:
    """Export both forms, time them interleaved, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--items", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        opened = {form: open_engine(form, options.items, options.threads, Path(folder) / form) for form in FORMS}
        rows = []
        for events in HISTORIES:
            for candidates in CANDIDATES:
                stages = {form: Stages(*opened[form], events, candidates) for form in FORMS}
                for form in FORMS:
                    one_round(stages[form])
                rounds = [{form: one_round(stages[form]) for form in FORMS} for _ in range(options.rounds)]
                ranks = [r["self"]["rank"] / r["sink"]["rank"] for r in rounds]
                row: dict[str, Any] = {"n": events, "k": candidates, "self_over_sink_rank": spread(ranks)}
                rows.append(row | {form: summary([r[form] for r in rounds]) for form in FORMS})
    document: dict[str, Any] = {
        **card("stages"),
        "model": msgspec.to_builtins(SMALL),
        "batch": 1,
        "items": options.items,
    }
    finish({**document, "threads": options.threads, "rounds": options.rounds, "rows": rows}, "stages")


if __name__ == "__main__":
    main()
