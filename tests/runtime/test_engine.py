"""How the threads of ranking are shared; what the engine computes is in test_session.py and test_invariants.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from answers import NOW_MS, STORED, history
from numpy.typing import NDArray

from unipinrec.runtime import Bundle
from unipinrec.runtime.engine import Engine, pad_histories
from unipinrec.runtime.ort_session import OrtBackend
from unipinrec.runtime.session import Tensor


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
    monkeypatch.setattr("unipinrec.runtime.engine.LANE_WORK", 1)
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
