"""How the threads of ranking are shared and end; what is computed is in test_session.py and test_invariants.py."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import NOW_MS, STORED, history
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime import Bundle
from unipinrec.runtime.bundle.manifest import Tensor
from unipinrec.runtime.graphs.engine import Engine, pad_histories
from unipinrec.runtime.graphs.ort_cpu import OrtBackend


class Counting(OrtBackend):
    """Remembers how many candidates each run of the ranker had."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.ranked: list[int] = []

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Tensor]:
        if graph == "ranker":
            vectors = inputs["candidate_vectors"]
            assert isinstance(vectors, np.ndarray)
            self.ranked.append(vectors.shape[1])
        return super().run(graph, inputs)


def test_batches_that_are_computed_at_the_same_time_share_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unipinrec.runtime.graphs.engine.THREAD_WORK", 1)
    bundle = Bundle.open(STORED)
    backend = Counting(bundle.graph_files(), threads=4)
    engine = Engine(backend, bundle.manifest.model, bundle.item_vectors)
    encoded = engine.encode(pad_histories([history(bundle, 3)]))

    def runs() -> list[int]:
        backend.ranked.clear()
        engine.rank(encoded, np.arange(8)[None], np.zeros(1, np.int64), np.array([NOW_MS]))
        return sorted(backend.ranked)

    with engine.under_way():
        assert runs() == [2, 2, 2, 2]
        with engine.under_way():
            assert runs() == [4, 4]
        assert runs() == [2, 2, 2, 2]
    engine.close()


def test_closing_ends_a_ranking_with_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unipinrec.runtime.graphs.engine.THREAD_WORK", 1)
    bundle = Bundle.open(STORED)
    engine = Engine(OrtBackend(bundle.graph_files(), threads=3), bundle.manifest.model, bundle.item_vectors)
    encoded = engine.encode(pad_histories([history(bundle, 3)]))
    hold = threading.Event()
    for _ in range(2):  # all threads are busy: what is asked of them waits
        engine._threads.submit(hold.wait, 20)
    single = engine._logits

    def close_then_rank(*given: Any) -> Any:
        engine.close()
        monkeypatch.setattr(engine.backend, "close", lambda: None)
        return np.zeros((1, 3, 2), np.float32)

    assert single is not None
    monkeypatch.setattr(engine, "_logits", close_then_rank)
    for _ in range(2):  # closed between the stages of a request, and before them
        with pytest.raises(BackendError, match="the graphs were closed while they ran; load the bundle again"):
            engine.rank(encoded, np.arange(8)[None], np.zeros(1, np.int64), np.array([NOW_MS]))
    hold.set()


def test_a_fork_does_not_wait_for_threads_that_it_does_not_have(bundle: Path) -> None:
    script = """
import os, sys
from unipinrec.runtime import Batcher, Recommender, Request
from unipinrec.runtime.requests import as_events
loaded = Recommender.load(sys.argv[1], "cpu", threads=2)
history = [{"item": loaded.bundle.item_ids[0], "actions": []}]
loaded.recommend(history, 3)
batcher = Batcher(loaded)
child = os.fork()
if not child:
    request = Request(history=as_events(history), k=3)
    asks = lambda: loaded.recommend(history), lambda: loaded.score(history, ["x"]), lambda: batcher.submit(request)
    for ask in asks:
        try:
            ask()
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(bundle)], capture_output=True, text=True, timeout=60, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("BackendError the bundle was loaded by process ") for line in lines)
    assert all(line.endswith("load the bundle after the fork, in each process") for line in lines)
