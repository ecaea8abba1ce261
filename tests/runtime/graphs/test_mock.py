"""The double that users test their own code with."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from answers import STORED, history
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime import Bundle, MockBackend, Recommender
from unipinrec.runtime.graphs.engine import Engine, pad_histories
from unipinrec.runtime.graphs.mock import Arrays

EVENTS = [{"item": "item-1", "actions": ["click"]}]


def last_item_first(inputs: Arrays) -> Arrays:
    """Queries for the last event's item, as the hidden state of `newest` says."""
    hidden: NDArray[np.float32] = inputs["last_hidden_state"][:, None, :4]
    return {"queries": hidden}


def newest(inputs: Arrays) -> Arrays:
    rows = np.arange(len(inputs["lengths"])), inputs["lengths"] - 1
    hidden = np.zeros((len(rows[0]), 8), np.float32)
    hidden[:, :4] = inputs["item_vectors"][rows]
    return {"last_hidden_state": hidden}


def test_functions_stand_for_graphs(stored: Bundle) -> None:
    seen: list[tuple[int, ...]] = []

    def rank(inputs: Arrays) -> Arrays:
        seen.append(inputs["candidate_vectors"].shape)
        batch, count, _ = seen[-1]
        return {"logits": np.linspace(0, 1, batch * count * 2, dtype=np.float32).reshape(batch, count, 2)}

    backend = MockBackend(stored.manifest.graphs, encoder=newest, retrieval=last_item_first, ranker=rank)
    with Recommender.load(STORED, backend, verify=False) as recommender:
        slate = recommender.recommend(EVENTS, 5)
        assert (recommender.device.name, recommender.device.reason) == ("MockBackend", "passed in")
    assert seen == [(1, 23, 4)]
    assert len(slate.items) == 5
    assert slate.device == "MockBackend"


def test_without_functions_shapes_are_those_of_the_graphs(stored: Bundle, exact: Engine) -> None:
    mock = Engine(MockBackend(stored.manifest.graphs), stored.manifest.model, stored.item_vectors)
    past, new = (pad_histories([history(stored, 8).part(*part)]) for part in ((0, 5), (5, None)))
    for engine in (mock, exact):
        encoded = engine.extend(engine.encode(past), new)
        assert [tensor.numpy().shape for tensor in encoded.key_values] == [(1, 1, 9, 4)] * 2
        assert engine.retrieve(encoded, np.zeros((1, 2), np.float32)).shape == (1, 1, 4)


def test_what_a_function_raises_comes_out(stored: Bundle) -> None:
    def broken(_: Arrays) -> Arrays:
        raise BackendError("out of memory")

    recommender = Recommender.load(STORED, MockBackend(stored.manifest.graphs, encoder=broken), verify=False)
    with pytest.raises(BackendError, match=r"^out of memory$"):
        recommender.recommend(EVENTS, 5)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (
            {"logits": np.zeros((1, 3), np.float32)},
            r"ranker: logits is float32 \[1, 3\], expected float32",
        ),
        ({"logits": np.zeros((1, 23, 2))}, "ranker: logits is float64"),
        ({"scores": np.zeros((1, 23, 2), np.float32)}, r"ranker: the function returned \['scores'\], not some of the"),
        ([1.0], "ranker: the function returned list, not some of the outputs"),
        (None, "ranker: the function returned NoneType, not some of"),
    ],
)
def test_outputs_are_held_to_the_manifest(stored: Bundle, outputs: Arrays, message: str) -> None:
    backend = MockBackend(stored.manifest.graphs, ranker=lambda _: outputs)
    with Recommender.load(STORED, backend, verify=False) as recommender, pytest.raises(BackendError, match=message):
        recommender.recommend(EVENTS, 5)


def test_a_function_for_no_graph_is_refused(stored: Bundle) -> None:
    with pytest.raises(BackendError, match=r"\['rank'\] are no graphs; there are \["):
        MockBackend(stored.manifest.graphs, rank=lambda _: {})


def test_it_does_not_pass_for_the_model(stored: Bundle) -> None:
    with pytest.raises(Exception, match="golden outputs do not reproduce on MockBackend"):
        Recommender.load(STORED, MockBackend(stored.manifest.graphs))


def test_no_inference_engine_is_needed() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from unipinrec.runtime import Bundle, MockBackend, Recommender\n"
        f"bundle = Bundle.open({str(STORED)!r})\n"
        "recommender = Recommender.load(bundle, MockBackend(bundle.manifest.graphs), verify=False)\n"
        f"print(len(recommender.recommend({EVENTS!r}, 3).items))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"
