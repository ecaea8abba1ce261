from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime import Bundle, Recommender
from unipinrec.runtime.engine import Encoded, Engine, pad_histories
from unipinrec.runtime.ort_session import OrtBackend
from unipinrec.runtime.requests import History


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return Engine.open(Bundle.open(bundle))


def history(events: int) -> History:
    return History(
        item_rows=np.arange(events),
        actions=np.ones((events, 4), np.float32),
        surfaces=np.zeros(events, np.int64),
        timestamps_ms=np.full(events, -1),
    )


def inputs(batch: int = 2, events: int = 3) -> dict[str, NDArray[Any]]:
    return {
        "item_vectors": np.zeros((batch, events, 64), np.float32),
        "actions": np.zeros((batch, events, 4), np.float32),
        "surfaces": np.zeros((batch, events), np.int64),
        "timestamps_ms": np.zeros((batch, events), np.int64),
        "lengths": np.full(batch, events),
    }


def encode(engine: Engine, events: int = 5) -> Encoded:
    return engine.encode(pad_histories([history(events), history(2)]))


def test_keys_and_values_reach_the_ranker_without_a_copy(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode(engine)
    run = onnxruntime.InferenceSession.run_with_ort_values
    seen: dict[str, int] = {}

    def spy(session: Any, names: Any, values: dict[str, Any], *rest: Any) -> Any:
        seen.update({name: value.data_ptr() for name, value in values.items()})
        return run(session, names, values, *rest)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_ort_values", spy)
    engine.rank(encoded, np.zeros((2, 3), np.int64), np.zeros(2, np.int64), np.zeros(2, np.int64))
    names = engine.model.kv_names("past_key_values")
    assert len(names) == 4
    assert [seen[name] for name in names] == [tensor.data_ptr() for tensor in encoded.key_values]  # type: ignore[attr-defined] # an OrtValue


def test_a_view_outlives_its_tensor(engine: Engine) -> None:
    def views() -> list[NDArray[Any]]:
        encoded = encode(engine, 60)
        grown = engine.extend(encoded, pad_histories([history(3), history(1)]))
        return [tensor.numpy() for tensor in (*encoded.key_values, *grown.key_values)]

    kept = views()
    copies = [view.copy() for view in kept]
    gc.collect()
    for _ in range(3):
        views()
    for view, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(view, copy)


def test_appending_fills_the_slots_behind_the_valid_ones(engine: Engine) -> None:
    def tensor(values: NDArray[np.float32]) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy(values.reshape(2, 1, -1, 1).astype(np.float32))

    past, added = tensor(np.array([[1, 2, 3], [4, 9, 9]])), tensor(np.array([[5, 9], [6, 7]]))
    joined = engine.backend.append(past, added, np.array([3, 1]), np.array([1, 2]))
    assert joined.numpy()[:, 0, :, 0].tolist() == [[1, 2, 3, 5], [4, 6, 7, 0]]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"surfaces": None}, r"encoder: the inputs are \[.*\], expected \[.*'surfaces'"),
        ({"extra": np.zeros(1)}, r"encoder: the inputs are \[.*'extra'"),
        ({"item_vectors": np.zeros((2, 3, 32), np.float32)}, r"item_vectors is tensor\(float\) \[2, 3, 32\], expected"),
        ({"actions": np.zeros((2, 3), np.float32)}, r"actions is tensor\(float\) \[2, 3\], expected"),
        ({"actions": np.zeros((2, 3, 4))}, r"actions is tensor\(double\) .*, expected tensor\(float\)"),
        ({"surfaces": np.zeros((2, 3), np.int32)}, r"surfaces is tensor\(int32\) .*, expected tensor\(int64\)"),
        ({"lengths": np.array([3, 3, 3])}, r"lengths is tensor\(int64\) \[3\], expected .*'batch': 2"),
        ({"surfaces": np.zeros((2, 4), np.int64)}, r"surfaces is tensor\(int64\) \[2, 4\], expected"),
        ({"lengths": np.zeros(0, np.int64)}, r"lengths is tensor\(int64\) \[0\], expected"),
        ({"actions": np.full((2, 3, 4), np.nan, np.float32)}, "actions holds values that are not finite"),
        ({"lengths": np.array(["3", "3"], object)}, "lengths"),
    ],
)
def test_inputs_are_checked_by_name(engine: Engine, changes: dict[str, Any], match: str) -> None:
    given = {name: value for name, value in (inputs() | changes).items() if value is not None}
    with pytest.raises(BackendError, match=match):
        engine.backend.run("encoder", given)


def test_an_error_inside_the_engine_is_ours(engine: Engine) -> None:
    with pytest.raises(BackendError, match="encoder: ONNX Runtime failed: "):
        engine.backend.run("encoder", inputs() | {"lengths": np.array([9, 9])})


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "encoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"encoder\.onnx: ONNX Runtime .* does not load it: "):
        OrtBackend({"encoder": tmp_path / "encoder.onnx"})


def test_threads_and_provider(bundle: Path) -> None:
    backend = OrtBackend(Bundle.open(bundle).graph_files(), threads=1)
    assert backend.threads == 1
    outputs = backend.run("retrieval", {"last_hidden_state": np.ones((1, 64), np.float32)})
    np.testing.assert_allclose(np.linalg.norm(outputs["queries"].numpy(), axis=-1), 1.0, atol=1e-6)


def test_a_missing_onnxruntime_names_the_extra(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install 'unipinrec\[cpu\]', or 'unipinrec\[gpu\]'.*never both"):
        Recommender.load(bundle)
