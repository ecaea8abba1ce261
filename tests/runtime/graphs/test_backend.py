"""What every backend keeps of the contract in `runtime/graphs/backend.py`."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime import Bundle
from unipinrec.runtime.device import Machine, open_engine
from unipinrec.runtime.graphs.engine import Encoded, Engine, pad_histories
from unipinrec.runtime.requests import History

NOW_MS = np.array([1_760_000_000_000])


@pytest.fixture(scope="module")
def engine(bundle: Path, device: str, machine: Machine) -> Engine:
    return open_engine(Bundle.open(bundle), device, machine=machine)


def history(events: int, first: int = 0) -> History:
    return History(
        item_rows=np.arange(first, first + events),
        actions=np.ones((events, 4), np.float32),
        surfaces=np.zeros(events, np.int64),
        timestamps_ms=np.arange(events) * 3_000_000_000 + 1_500_000_000_000,
    )


def inputs(batch: int = 2, events: int = 3) -> dict[str, NDArray[Any]]:
    return {
        "item_vectors": np.full((batch, events, 64), 0.125, np.float32),
        "actions": np.zeros((batch, events, 4), np.float32),
        "surfaces": np.zeros((batch, events), np.int64),
        "timestamps_ms": np.zeros((batch, events), np.int64),
        "lengths": np.full(batch, events),
    }


def arrays(encoded: Encoded) -> list[NDArray[Any]]:
    return [tensor.numpy() for tensor in (*encoded.key_values, encoded.last_hidden_state)]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"surfaces": None}, r"encoder: the inputs are \[.*\], expected \[.*'surfaces'"),
        ({"extra": np.zeros(1)}, r"encoder: the inputs are \[.*'extra'"),
        (
            {"item_vectors": np.zeros((2, 3, 32), np.float32)},
            r"item_vectors is float32 \[2, 3, 32\], expected float32 \['batch', 'history', 64\]",
        ),
        ({"actions": np.zeros((2, 3), np.float32)}, r"actions is float32 \[2, 3\], expected"),
        ({"actions": np.zeros((2, 3, 4))}, r"actions is float64 .*, expected float32"),
        ({"actions": np.zeros((2, 3, 4), ">f4")}, r"actions is >f4 .*, expected float32"),
        ({"surfaces": np.zeros((2, 3), np.int32)}, r"surfaces is int32 .*, expected int64"),
        ({"lengths": np.array([3, 3, 3])}, r"lengths is int64 \[3\], expected .*'batch': 2"),
        ({"surfaces": np.zeros((2, 4), np.int64)}, r"surfaces is int64 \[2, 4\], expected"),
        ({"lengths": np.zeros(0, np.int64)}, r"lengths is int64 \[0\], expected"),
        (inputs(2, 0), r"item_vectors is float32 \[2, 0, 64\], expected"),
        ({"actions": np.full((2, 3, 4), np.nan, np.float32)}, "actions holds values that are not finite"),
        ({"lengths": np.array(["3", "3"], object)}, r"lengths is object \[2\], expected int64 \['batch'\]"),
    ],
)
def test_inputs_are_checked_by_name(engine: Engine, changes: dict[str, Any], match: str) -> None:
    given = {name: value for name, value in (inputs() | changes).items() if value is not None}
    with pytest.raises(BackendError, match=match):
        engine.backend.run("encoder", given)


def test_arrays_of_any_layout_are_read(engine: Engine) -> None:
    expected = engine.backend.run("encoder", inputs())["last_hidden_state"].numpy()
    strided = {name: np.repeat(values, 2, axis=0)[::2] for name, values in inputs().items()}
    read_only = inputs()
    for values in read_only.values():
        values.flags.writeable = False
    for given in (strided, read_only):
        np.testing.assert_array_equal(engine.backend.run("encoder", given)["last_hidden_state"].numpy(), expected)


def test_the_next_run_leaves_outputs_alone(engine: Engine) -> None:
    encoded = engine.encode(pad_histories([history(60), history(2)]))
    kept = [array.copy() for array in arrays(encoded)]
    for first, events in ((7, 60), (9, 60), (11, 64), (13, 1)):
        engine.encode(pad_histories([history(events, first), history(2, first)]))
    for array, copy in zip(arrays(encoded), kept, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_a_view_outlives_its_tensor(engine: Engine) -> None:
    def views() -> list[NDArray[Any]]:
        encoded = engine.encode(pad_histories([history(60), history(2)]))
        return arrays(encoded) + arrays(engine.extend(encoded, pad_histories([history(3), history(1)])))

    kept = views()
    copies = [view.copy() for view in kept]
    gc.collect()
    for _ in range(3):
        views()
    for view, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(view, copy)


def test_threads_do_not_disturb_each_other(engine: Engine) -> None:
    def answers(events: int) -> list[NDArray[Any]]:
        encoded = engine.encode(pad_histories([history(events)]))
        longer = engine.extend(encoded, pad_histories([history(2, 100)]))
        logits = engine.rank(longer, np.arange(events)[None], np.zeros(1, np.int64), NOW_MS)
        return [*arrays(longer), engine.retrieve(longer, np.zeros((1, 4), np.float32)), logits]

    lengths = [1, 5, 17, 33, 62, 40, 2, 62]
    alone = [[array.copy() for array in answers(events)] for events in lengths]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answers, lengths * 8))
    for given, expected in zip(together, alone * 8, strict=True):
        for array, copy in zip(given, expected, strict=True):
            np.testing.assert_array_equal(array, copy)


def test_every_dimension_may_be_one(engine: Engine) -> None:
    two = history(2)
    longer = engine.extend(engine.encode(pad_histories([two.part(0, 1)])), pad_histories([two.part(1)]))
    for given in (longer, engine.encode(pad_histories([two]))):
        logits = engine.rank(given, np.array([[7]]), np.zeros(1, np.int64), NOW_MS)
        several = engine.rank(given, np.array([[3, 7, 5]]), np.zeros(1, np.int64), NOW_MS)
        assert logits.shape == (1, 1, 4)
        np.testing.assert_allclose(logits[0, 0], several[0, 1], atol=1e-5, rtol=0)
    np.testing.assert_allclose(arrays(longer)[-1], arrays(engine.encode(pad_histories([two])))[-1], atol=1e-5, rtol=0)
