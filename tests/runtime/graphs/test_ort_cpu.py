from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime import Bundle, Recommender
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.graphs.engine import Encoded, Engine, pad_histories
from unipinrec.runtime.graphs.ort_cpu import OrtBackend
from unipinrec.runtime.requests import History


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return Engine.on_cpu(Bundle.open(bundle))


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
    assert [seen[name] for name in names] == [tensor.value.data_ptr() for tensor in encoded.key_values]  # type: ignore[attr-defined] # an OrtTensor


def test_an_error_inside_the_engine_is_ours(engine: Engine) -> None:
    with pytest.raises(BackendError, match="encoder: ONNX Runtime failed: "):
        engine.backend.run("encoder", inputs() | {"lengths": np.array([9, 9])})


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "encoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"encoder\.onnx: ONNX Runtime .* does not load it: "):
        OrtBackend({"encoder": GraphFile.at(tmp_path / "encoder.onnx")})


def test_threads_and_provider(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    backend = OrtBackend(opened.graph_files(), threads=1)
    assert backend.threads == 1
    outputs = backend.run("retrieval", {"last_hidden_state": np.ones((1, 64), np.float32)})
    np.testing.assert_allclose(np.linalg.norm(outputs["queries"].numpy(), axis=-1), 1.0, atol=1e-6)


def test_a_missing_onnxruntime_names_the_extra(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install 'unipinrec\[cpu\]', or 'unipinrec\[gpu\]'.*never both"):
        Recommender.load(bundle)


def test_onnxruntime_is_told_to_stay_off_the_network(tmp_path: Path) -> None:
    code = (
        "import os\n"
        "from unipinrec.runtime.graphs.ort_cpu import import_onnxruntime\n"
        "import_onnxruntime()\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    for given, expected in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        environment = {**os.environ, "HOME": str(tmp_path), **given}
        if not given:
            environment.pop("ORT_DISABLE_TELEMETRY", None)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
