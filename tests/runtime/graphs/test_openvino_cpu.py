from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from answers import STORED
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime import Bundle, Recommender
from unipinrec.runtime.bundle.manifest import GraphSpec, TensorSpec
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.device import open_engine
from unipinrec.runtime.graphs.engine import Engine, pad_histories
from unipinrec.runtime.graphs.openvino_cpu import OpenVinoBackend
from unipinrec.runtime.requests import History

openvino = pytest.importorskip("openvino", reason="openvino is not installed")

DAY_MS = 86_400_000


def ir(path: Path) -> GraphFile:
    """A model as OpenVINO itself writes it, whose weights are named by their place alone."""
    weights = path.with_suffix(".bin")
    return GraphFile(name=path.name, content=path.read_bytes(), weights={weights.name: weights})


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return Bundle.open(bundle)


@pytest.fixture(scope="module")
def engine(opened: Bundle) -> Engine:
    return open_engine(opened, "openvino")


def history(times: NDArray[np.int64]) -> History:
    events = len(times)
    return History(
        item_rows=np.arange(events),
        actions=np.ones((events, 4), np.float32),
        surfaces=np.zeros(events, np.int64),
        timestamps_ms=times,
    )


def test_times_are_not_cut_to_32_bits(engine: Engine, opened: Bundle) -> None:
    gaps = np.array([0, 1, 999, DAY_MS, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 30 * DAY_MS, 400 * DAY_MS])
    times = np.concatenate([[-1, -1], 1_400_000_000_123 + gaps.cumsum()])
    histories = [history(times), history(times[2:] - 2**40)]
    batch = pad_histories(histories)
    past, new = (pad_histories([one.part(*part) for one in histories]) for part in ((0, 4), (4, None)))
    exact = Engine.on_cpu(opened)
    now_ms = times[-1] + np.array([2**31 + 5, 2**33])
    for given in (engine.encode(batch), engine.extend(engine.encode(past), new)):
        expected = exact.encode(batch)
        np.testing.assert_allclose(
            given.last_hidden_state.numpy(), expected.last_hidden_state.numpy(), atol=1e-5, rtol=0
        )
        asked = np.array([[1, 2, 3], [4, 5, 6]]), np.zeros(2, np.int64), now_ms
        np.testing.assert_allclose(engine.rank(given, *asked), exact.rank(expected, *asked), atol=1e-5, rtol=0)


def test_keys_and_values_reach_the_ranker_without_a_copy(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = engine.encode(pad_histories([history(np.full(5, -1))]))
    set_tensor = openvino.InferRequest.set_tensor
    seen: set[int] = set()

    def spy(request: Any, port: Any, tensor: Any) -> None:
        seen.add(tensor.data.ctypes.data)
        set_tensor(request, port, tensor)

    monkeypatch.setattr(openvino.InferRequest, "set_tensor", spy)
    engine.rank(encoded, np.zeros((1, 3), np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64))
    pointers = {tensor.numpy().ctypes.data for tensor in encoded.key_values}
    assert len(pointers) == 4
    assert pointers <= seen


def test_attention_is_fused(engine: Engine) -> None:
    assert isinstance(engine.backend, OpenVinoBackend)
    for name in ("encoder", "extend", "ranker"):
        graph = engine.backend._graphs[name].compiled.get_runtime_model()
        kinds = [node.get_rt_info()["layerType"].astype(str) for node in graph.get_ops()]
        assert "RMS" in kinds
        assert "Softmax" not in kinds, f"{name} runs attention as separate products"


def without_names(specs: Mapping[str, GraphSpec]) -> dict[str, GraphSpec]:
    """Specs that allow any size, so that wrong shapes reach OpenVINO."""

    def anything(spec: GraphSpec) -> GraphSpec:
        inputs = tuple(msgspec.structs.replace(given, shape=("?",) * len(given.shape)) for given in spec.inputs)
        return msgspec.structs.replace(spec, inputs=inputs)

    return {name: anything(spec) for name, spec in specs.items()}


def test_an_error_inside_openvino_is_ours(opened: Bundle) -> None:
    graph = {"retrieval": opened.graph_files()["retrieval"]}
    backend = OpenVinoBackend(graph, without_names(opened.manifest.graphs), threads=1)
    assert backend.threads == 1
    outputs = backend.run("retrieval", {"last_hidden_state": np.ones((1, 64), np.float32)})
    np.testing.assert_allclose(np.linalg.norm(outputs["queries"].numpy(), axis=-1), 1.0, atol=1e-6)
    with pytest.raises(BackendError, match="retrieval: OpenVINO failed: "):
        backend.run("retrieval", {"last_hidden_state": np.ones((1, 65), np.float32)})


def test_a_file_that_is_no_graph(opened: Bundle, tmp_path: Path) -> None:
    (tmp_path / "encoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"encoder\.onnx: OpenVINO .* does not load it: "):
        OpenVinoBackend({"encoder": GraphFile.at(tmp_path / "encoder.onnx")}, opened.manifest.graphs)


def test_a_cpu_without_bf16_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unipinrec.runtime.graphs.openvino_cpu.has_bf16", lambda: False)
    with pytest.raises(BackendError, match=r"no bf16 instructions .* use device openvino or cpu"):
        Recommender.load(bundle, "openvino-bf16")


def test_bf16_rounds_inside_and_hands_out_floats(opened: Bundle, engine: Engine, bf16_device: str) -> None:
    rounded = open_engine(opened, bf16_device)
    batch = pad_histories([history(np.arange(20) * DAY_MS)])
    given, expected = (one.encode(batch).key_values[-1].numpy() for one in (rounded, engine))
    assert given.dtype == np.float32
    assert 1e-4 < np.abs(given - expected).max() < 0.1


def test_nothing_is_reported_or_written(bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from unipinrec.runtime import Recommender\n"
        "Recommender.load(sys.argv[1], 'openvino')\n"
        "assert sys.modules.get('openvino_telemetry') is None\n"
    )
    environment = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*")) == []


def on_times(path: Path, make: Callable[[Any, Any], Any], times: list[list[int]]) -> list[Any]:
    """What `make` computes in float32 from `times` [batch, n], in a graph whose other input is not read."""
    ops = openvino.opset13
    inputs = [ops.parameter([-1, -1], np.int64, name=name) for name in ("surfaces", "timestamps_ms")]
    for node in inputs:
        node.output(0).set_names({node.get_friendly_name()})
    result = make(ops, inputs[1])
    result.output(0).set_names({"result"})
    openvino.save_model(openvino.Model([result], inputs), path / "made.xml", compress_to_fp16=False)
    specs = tuple(TensorSpec(name=name, dtype="int64", shape=("batch", "n")) for name in ("surfaces", "timestamps_ms"))
    result_spec = TensorSpec(name="result", dtype="float32", shape=("batch", "n"))
    spec = GraphSpec(file="made.xml", inputs=specs, outputs=(result_spec,))
    backend = OpenVinoBackend({"made": ir(path / "made.xml")}, {"made": spec}, threads=1)
    given = np.array(times)
    outputs = backend.run("made", {"surfaces": np.zeros_like(given), "timestamps_ms": given})
    values: list[Any] = outputs["result"].numpy().tolist()
    return values


def test_a_time_that_is_chosen_by_a_condition_on_times_is_exact_too(tmp_path: Path) -> None:
    def hours(ops: Any, times: Any) -> Any:
        known = ops.greater_equal(times, np.int64(0))
        hour = ops.floor_mod(ops.select(known, times, np.int64(7)), np.int64(DAY_MS))
        return ops.multiply(ops.convert(hour, "f32"), ops.convert(known, "f32"))

    assert on_times(tmp_path, hours, [[1_760_000_012_344, -1, 5]]) == [[32_012_344.0, 0.0, 5.0]]


def test_times_that_are_divided_by_way_of_truth_values_are_exact(tmp_path: Path) -> None:
    """PyTorch's `//` becomes this: from the quotient, cut off towards zero, it subtracts whether it must be lower."""

    def seconds(ops: Any, times: Any) -> Any:
        thousand = np.int64(1000)
        remains = ops.not_equal(ops.floor_mod(times, thousand), np.int64(0))
        below = ops.convert(ops.logical_and(ops.less(times, np.int64(0)), remains), "i64")
        quotient = ops.subtract(ops.divide(times, thousand, auto_broadcast="numpy"), below)
        return ops.convert(ops.floor_mod(quotient, np.int64(100_000)), "f32")

    assert on_times(tmp_path, seconds, [[1_760_000_012_344, 999, -1, -2_001]]) == [[12.0, 0.0, 99_999.0, 99_997.0]]


def test_a_value_of_times_that_both_a_cosine_and_the_rest_read_is_exact(tmp_path: Path) -> None:
    def angle(ops: Any, times: Any) -> Any:
        since = ops.subtract(times, np.int64(2**40))
        days = ops.multiply(ops.convert(since, "f32"), np.float32(2.0**-26))
        return ops.add(days, ops.cos(ops.multiply(days, np.float32(0.0))))

    assert on_times(tmp_path, angle, [[2**41, 2**40 + 2**27]]) == [[2.0**14 + 1, 3.0]]


def test_a_value_of_several_names_has_that_of_the_graph(tmp_path: Path) -> None:
    """OpenVINO removes a part that changes nothing; the output then has the name of the value before it as well."""

    def in_halves(ops: Any, times: Any) -> Any:
        whole = ops.relu(ops.convert(ops.floor_mod(times, np.int64(7)), "f32"))
        whole.output(0).set_names({"a"})
        return ops.concat(ops.split(whole, np.int64(1), 2).outputs(), 1)

    assert on_times(tmp_path, in_halves, [[15, 16, 17, 18]]) == [[1.0, 2.0, 3.0, 4.0]]


def test_angles_are_not_rounded_to_bf16(tmp_path: Path, bf16_device: str) -> None:
    ops = openvino.opset13
    lengths = ops.parameter([-1, -1], np.int64, name="lengths")
    lengths.output(0).set_names({"lengths"})
    angles = ops.multiply(ops.convert(lengths, "f32"), ops.constant(np.array([1.0, 0.7], np.float32)))
    mixed = ops.matmul(ops.concat([ops.cos(angles), ops.sin(angles)], -1), np.eye(4, dtype=np.float32), False, False)
    mixed.output(0).set_names({"waves"})
    openvino.save_model(openvino.Model([mixed], [lengths]), tmp_path / "waves.xml", compress_to_fp16=False)
    spec = GraphSpec(
        file="waves.xml",
        inputs=(TensorSpec(name="lengths", dtype="int64", shape=("batch", 2)),),
        outputs=(TensorSpec(name="waves", dtype="float32", shape=("batch", 4)),),
    )
    backend = OpenVinoBackend({"waves": ir(tmp_path / "waves.xml")}, {"waves": spec}, threads=1, precision="bf16")
    given = np.array([[501, 997], [3, 1009]])
    exact = given * np.array([1.0, np.float32(0.7)])
    waves = backend.run("waves", {"lengths": given})["waves"].numpy()
    np.testing.assert_allclose(waves, np.concatenate([np.cos(exact), np.sin(exact)], -1), atol=2**-8, rtol=0)


SIGNALLED = """
import gc, signal, sys
from unipinrec.runtime import Recommender
first, second = (Recommender.load(sys.argv[1], "openvino") for _ in range(2))
first.close()
del first
gc.collect()
second.close()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
signal.raise_signal(signal.SIGUSR1)
"""


def test_a_signal_after_two_bundles_were_closed_does_not_end_the_process() -> None:
    command = [sys.executable, "-c", SIGNALLED, str(STORED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n")


@pytest.mark.slow
def test_changing_shapes_leave_memory_nearly_as_it_was(opened: Bundle) -> None:
    """With OpenVINO's own 5,000 kernels it grows by more than 60 MiB here; `bench/memory.py` has the figures."""
    code = """
import json, sys
from pathlib import Path
from memory import kernels
from unipinrec.runtime import Bundle
from unipinrec.runtime.graphs.openvino_cpu import KEPT_KERNELS
from unipinrec.runtime.machine import keep_memory_flat
keep_memory_flat()
print(json.dumps(kernels(Bundle.open(Path(sys.argv[1])), KEPT_KERNELS, 1500)["grown_mib"]))
"""
    bench = str(Path(__file__).resolve().parents[3] / "bench")
    paths = os.pathsep.join([bench, os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-c", code, str(opened.path)]
    run = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONPATH": paths}, check=True)
    grown = json.loads(run.stdout.splitlines()[-1])
    assert grown[-1] - grown[1] < 40
