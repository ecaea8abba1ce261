"""The same requests for every backend, on the small stored bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.runtime import Bundle
from unipinrec.runtime.graphs.backend import Backend
from unipinrec.runtime.graphs.engine import Engine, pad_histories
from unipinrec.runtime.requests import History
from unipinrec.runtime.retrieval.retriever import CandidateSet, Retriever, Search

STORED = Path(__file__).resolve().parents[1] / "fixtures" / "bundle_v1"
NOW_MS = 1_760_000_000_000


def engine_of(backend: Backend, bundle: Bundle) -> Engine:
    return Engine(backend, bundle.manifest.model, bundle.item_vectors)


def history(bundle: Bundle, events: int, seed: int = 0) -> History:
    rng = np.random.default_rng(seed)
    return History(
        item_rows=rng.integers(0, bundle.manifest.num_items, events),
        actions=(rng.random((events, len(bundle.manifest.actions))) < 0.4).astype(np.float32),
        surfaces=np.zeros(events, np.int64),
        timestamps_ms=NOW_MS - np.arange(events, 0, -1) * 3_600_000,
    )


def answer(engine: Engine, bundle: Bundle, seed: int = 0) -> list[NDArray[Any]]:
    """Query and logits of two histories, and the keys and values that they were made from."""
    histories = [history(bundle, 3 + seed % 5, seed), history(bundle, 2, seed + 1)]
    encoded = engine.encode(pad_histories(histories))
    candidates = np.random.default_rng(seed).integers(0, bundle.manifest.num_items, (2, 4 + seed % 3))
    outcomes = np.zeros((2, len(bundle.manifest.actions)), np.float32)
    logits = engine.rank(encoded, candidates, np.zeros(2, np.int64), np.full(2, NOW_MS))
    return [engine.retrieve(encoded, outcomes), logits, *(tensor.numpy() for tensor in encoded.key_values)]


def assert_same(found: list[NDArray[Any]], expected: list[NDArray[Any]], atol: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)


def retrieved(
    retriever: Retriever, queries: NDArray[np.float32], wanted: int, excluded: NDArray[np.int64], **options: Any
) -> CandidateSet:
    """What one search finds."""
    (found,) = retriever.retrieve([Search(queries=queries, k=wanted, excluded=excluded, **options)])
    return found


def graph_paths(bundle: Bundle, precision: str = "fp32") -> dict[str, Path]:
    """The files of a bundle's graphs in its folder."""
    return {name: bundle.path / graph.file for name, graph in bundle.manifest.graphs_in(precision).items()}
