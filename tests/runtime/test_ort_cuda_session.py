"""The GPU backend of ONNX Runtime, run on the CPU: the same code with another provider and other memory.

What it computes is held to the contract of all backends by test_session.py and test_invariants.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from unipinrec.errors import BackendError
from unipinrec.export.precision import typed_graph
from unipinrec.runtime import Bundle
from unipinrec.runtime.cuda import driver_problem
from unipinrec.runtime.engine import Engine, pad_histories
from unipinrec.runtime.kv_buffer import HostTensor
from unipinrec.runtime.manifest import GraphSpec, TensorSpec
from unipinrec.runtime.ort_cuda_session import OrtCudaBackend, misplaced, preload, provider_problem
from unipinrec.runtime.ort_session import OrtTensor, load_session, session_options
from unipinrec.runtime.requests import History

WITHOUT_CUDA = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has a CUDA provider"
)


class OnCpu(OrtCudaBackend):
    """All of it but the GPU."""

    _provider, _memory, _settings = "CPUExecutionProvider", "cpu", {}


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return Bundle.open(bundle)


@pytest.fixture
def backend(opened: Bundle) -> Iterator[OnCpu]:
    backend = OnCpu(opened.graph_files(), opened.manifest.graphs)
    yield backend
    backend.close()


@pytest.fixture
def engine(backend: OnCpu, opened: Bundle) -> Engine:
    return Engine(backend, opened.manifest.model, opened.item_vectors)


def history(events: int, first: int = 0) -> History:
    return History(
        item_rows=np.arange(first, first + events),
        actions=np.ones((events, 4), np.float32),
        surfaces=np.zeros(events, np.int64),
        timestamps_ms=np.arange(events) * 3_000_000_000 + 1_500_000_000_000,
    )


@pytest.mark.skipif(driver_problem() is None, reason="this machine has an NVIDIA driver")
def test_without_a_driver_nothing_is_loaded(opened: Bundle) -> None:
    with pytest.raises(BackendError, match=r"there is no NVIDIA driver here .* check that nvidia-smi lists the GPU"):
        OrtCudaBackend(opened.graph_files(), opened.manifest.graphs)


@WITHOUT_CUDA
def test_without_the_provider_the_reason_and_the_remedy_are_given() -> None:
    problem = provider_problem(onnxruntime, "CUDAExecutionProvider")
    assert problem is not None
    assert re.fullmatch(
        r"ONNX Runtime .* \(onnxruntime .*\) has no CUDAExecutionProvider, only .*CPUExecutionProvider; "
        r"run pip uninstall onnxruntime onnxruntime-gpu, then pip install 'unipinrec\[gpu\]'",
        problem,
    )


def test_two_wheels_at_once_are_refused(opened: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"{name}-1.31.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.31.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        BackendError, match=r"onnxruntime 1\.31\.1 and onnxruntime-gpu 1\.31\.1 are installed and overwrite each other"
    ):
        OnCpu(opened.graph_files(), opened.manifest.graphs)


def test_operators_that_would_run_on_the_cpu_are_refused(opened: Bundle) -> None:
    class Fallen(OnCpu):
        """A provider that loads every graph and runs no operator of it."""

        _provider = "AzureExecutionProvider"

    if Fallen._provider not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no provider without kernels")
    with pytest.raises(BackendError, match=r"encoder\.onnx: .* would run \d+ MatMul.*2 Attention.* on the CPU"):
        Fallen(opened.graph_files(), opened.manifest.graphs)


@WITHOUT_CUDA
@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_a_session_that_fell_back_without_a_word_is_refused(opened: Bundle) -> None:
    options = session_options(onnxruntime, 1)
    with pytest.raises(BackendError, match="would run it on CPUExecutionProvider, not on CUDAExecutionProvider"):
        load_session(onnxruntime, opened.graph_files()["retrieval"], options, "CUDAExecutionProvider")


def test_what_is_computed_of_sizes_may_stay_on_the_cpu(opened: Bundle) -> None:
    options = session_options(onnxruntime, 1)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = load_session(onnxruntime, opened.graph_files()["ranker"], options, "CPUExecutionProvider")
    assert misplaced(session, "CPUExecutionProvider") == {}
    found = misplaced(session, "CUDAExecutionProvider")
    assert found["Attention"] == 2
    assert "Shape" not in found
    assert "Unsqueeze" not in found


def test_a_file_that_is_no_graph(opened: Bundle, tmp_path: Path) -> None:
    (tmp_path / "encoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"encoder\.onnx: ONNX Runtime .* does not load it: "):
        OnCpu({"encoder": tmp_path / "encoder.onnx"}, opened.manifest.graphs)


def test_what_is_missing_is_told_and_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        @staticmethod
        def preload_dlls() -> None:
            print("Failed to load libcublas.so.13: no such file")
            print("Please follow the installation guide.")

    assert preload(Broken) == " (Failed to load libcublas.so.13: no such file; Please follow the installation guide.)"
    assert preload(onnxruntime) == ""
    assert capsys.readouterr().out == ""


def test_keys_and_values_reach_the_ranker_without_a_copy(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = engine.encode(pad_histories([history(5), history(2)]))
    bind = onnxruntime.IOBinding.bind_ortvalue_input
    seen: dict[str, int] = {}

    def spy(binding: Any, name: str, value: Any) -> None:
        seen[name] = value.data_ptr()
        bind(binding, name, value)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_ortvalue_input", spy)
    engine.rank(encoded, np.zeros((2, 3), np.int64), np.zeros(2, np.int64), np.zeros(2, np.int64))
    names = engine.model.kv_names("past_key_values")
    assert len(names) == 4
    assert [seen[name] for name in names] == [tensor.value.data_ptr() for tensor in encoded.key_values]  # type: ignore[attr-defined] # an OrtTensor


def test_each_tensor_is_copied_to_the_host_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    past = engine.encode(pad_histories([history(5), history(2), history(9)]))
    read: list[OrtTensor] = []
    numpy = OrtTensor.numpy

    def spy(tensor: OrtTensor) -> NDArray[Any]:
        read.append(tensor)
        return numpy(tensor)

    monkeypatch.setattr(OrtTensor, "numpy", spy)
    engine.extend(past, pad_histories([history(1, 20), history(3, 20), history(2, 20)]))
    assert len(read) == len(set(map(id, read))) == 2 * len(past.key_values)


def test_an_error_inside_the_engine_is_ours(backend: OnCpu) -> None:
    inputs: dict[str, NDArray[Any]] = {
        "item_vectors": np.zeros((2, 3, 64), np.float32),
        "actions": np.zeros((2, 3, 4), np.float32),
        "surfaces": np.zeros((2, 3), np.int64),
        "timestamps_ms": np.zeros((2, 3), np.int64),
        "lengths": np.array([9, 9]),
    }
    with pytest.raises(BackendError, match="encoder: ONNX Runtime failed: "):
        backend.run("encoder", inputs)


def test_a_closed_backend_runs_nothing_and_leaves_tensors_alone(backend: OnCpu, engine: Engine) -> None:
    encoded = engine.encode(pad_histories([history(5)]))
    before = [tensor.numpy().copy() for tensor in encoded.key_values]
    backend.close()
    with pytest.raises(BackendError, match="encoder: the graphs were closed; load the bundle again"):
        engine.encode(pad_histories([history(5)]))
    for tensor, copy in zip(encoded.key_values, before, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), copy)


@pytest.fixture(scope="module")
def half(opened: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The bundle's graphs in fp16, which ONNX Runtime's CPU computes too."""
    folder, files, specs = tmp_path_factory.mktemp("fp16"), opened.graph_files(), dict(opened.manifest.graphs)
    for name in ("encoder", "extend", "ranker"):
        files[name] = folder / f"{name}.onnx"
        onnx.save(typed_graph(onnx.load(opened.graph_files()[name]), "fp16"), files[name])
        specs[name] = in_half(specs[name])
    return Engine(OnCpu(files, specs), opened.manifest.model, opened.item_vectors)


def in_half(spec: GraphSpec) -> GraphSpec:
    def tensor(given: TensorSpec) -> TensorSpec:
        low = given.name.startswith(("present.", "past_key_values."))
        return TensorSpec(name=given.name, dtype="float16" if low else given.dtype, shape=given.shape)

    return GraphSpec(file=spec.file, inputs=tuple(map(tensor, spec.inputs)), outputs=tuple(map(tensor, spec.outputs)))


def test_graphs_in_fp16_are_near_fp32(half: Engine, engine: Engine) -> None:
    histories = [history(40), history(9, 30)]
    past, new = (pad_histories([one.part(*part) for one in histories]) for part in ((0, 5), (5, None)))
    asked = np.array([[1, 2, 3], [4, 5, 6]]), np.zeros(2, np.int64), np.full(2, 1_760_000_000_000)
    exact = engine.rank(engine.encode(pad_histories(histories)), *asked)
    for encoded in (half.encode(pad_histories(histories)), half.extend(half.encode(past), new)):
        assert {tensor.numpy().dtype for tensor in encoded.key_values} == {np.dtype(np.float32)}
        assert 0 < np.abs(half.rank(encoded, *asked) - exact).max() < 1e-2
    assert {tensor.dtype for tensor in half.encode(past).key_values} == {"float16"}


def test_arrays_are_rounded_to_what_the_graph_takes(half: Engine) -> None:
    encoded = half.encode(pad_histories([history(6)]))
    asked = np.array([[1, 2, 3]]), np.zeros(1, np.int64), np.array([1_760_000_000_000])
    on_device = half.rank(encoded, *asked)
    moved = tuple(HostTensor(tensor.numpy() * np.float32(1 + 2**-13)) for tensor in encoded.key_values)
    from_host = half.rank(type(encoded)(**{**vars(encoded), "key_values": moved}), *asked)
    np.testing.assert_array_equal(from_host, on_device)


def bf16_backend(folder: Path) -> OnCpu:
    """A graph that hands a bf16 tensor on, and widens it: the CPU computes nothing else in bf16."""
    tensors = {
        "given": (TensorProto.BFLOAT16, "bfloat16"),
        "same": (TensorProto.BFLOAT16, "bfloat16"),
        "wide": (TensorProto.FLOAT, "float32"),
    }
    values = {name: helper.make_tensor_value_info(name, kind, ["rows", 2]) for name, (kind, _) in tensors.items()}
    nodes = [
        helper.make_node("Identity", ["given"], ["same"]),
        helper.make_node("Cast", ["given"], ["wide"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "bf16", [values["given"]], [values["same"], values["wide"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    onnx.save(model, folder / "bf16.onnx")
    specs = {name: TensorSpec(name=name, dtype=dtype, shape=("rows", 2)) for name, (_, dtype) in tensors.items()}
    spec = GraphSpec(file="bf16.onnx", inputs=(specs["given"],), outputs=(specs["same"], specs["wide"]))
    return OnCpu({"bf16": folder / "bf16.onnx"}, {"bf16": spec})


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_bf16_goes_in_rounded_and_comes_out_widened(tmp_path: Path, layout: str) -> None:
    backend = bf16_backend(tmp_path)
    given: NDArray[np.float32] = np.array([[1.0, 1.00390625], [-3.140625, 2.0**100], [1.005, 65536.0]], np.float32)
    rounded = np.array([[1.0, 1.0], [-3.140625, 2.0**100], [1.0078125, 65536.0]], np.float32)
    outputs = backend.run("bf16", {"given": given if layout == "contiguous" else np.repeat(given, 2, axis=0)[::2]})
    again = backend.run("bf16", {"given": outputs["same"]})
    for tensors in (outputs, again):
        assert isinstance(tensors["same"], OrtTensor)
        assert (tensors["same"].dtype, tensors["same"].shape()) == ("bfloat16", [3, 2])
        assert tensors["same"].numpy().dtype == np.float32
        for name in ("same", "wide"):
            np.testing.assert_array_equal(tensors[name].numpy(), rounded)
    with pytest.raises(BackendError, match=r"given is float16 \[3, 2\], expected bfloat16"):
        backend.run("bf16", {"given": np.zeros((3, 2), np.float16)})
