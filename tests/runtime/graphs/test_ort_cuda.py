"""The GPU backend of ONNX Runtime, run on the CPU: the same code with another provider and other memory.

What it computes is held to the contract of all backends by test_session.py and test_invariants.py.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from answers import STORED, history
from fake_gpu import CudaOnCpu, OrtOnCpu
from numpy.typing import NDArray
from onnx import TensorProto, helper

from unipinrec.errors import BackendError
from unipinrec.export.precision.check import add_precisions
from unipinrec.runtime import Bundle, Recommender, verify_bundle
from unipinrec.runtime.bundle.manifest import GraphSpec, TensorSpec
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.device import open_engine
from unipinrec.runtime.graphs.engine import Engine, HostTensor, pad_histories
from unipinrec.runtime.graphs.ort_cpu import OrtTensor, load_session, session_options
from unipinrec.runtime.graphs.ort_cuda import OrtCudaBackend, misplaced, preload, provider_problem
from unipinrec.runtime.machine import driver_problem

WITHOUT_CUDA = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has a CUDA provider"
)


@pytest.fixture
def opened(stored: Bundle) -> Bundle:
    return stored


@pytest.fixture
def backend(opened: Bundle) -> Iterator[OrtOnCpu]:
    backend = OrtOnCpu(opened.graph_files(), opened.manifest.graphs)
    yield backend
    backend.close()


@pytest.fixture
def engine(backend: OrtOnCpu, opened: Bundle) -> Engine:
    return Engine(backend, opened.manifest.model, opened.item_vectors)


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
        OrtOnCpu(opened.graph_files(), opened.manifest.graphs)


def test_operators_that_would_run_on_the_cpu_are_refused(opened: Bundle) -> None:
    class Fallen(OrtOnCpu):
        """A provider that loads every graph and runs no operator of it."""

        _provider = "AzureExecutionProvider"

    if Fallen._provider not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no provider without kernels")
    with pytest.raises(BackendError, match=r"encoder\.onnx: .* would run \d+ MatMul.*1 Attention.* on the CPU"):
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
    assert found["Attention"] == 1
    assert "Shape" not in found
    assert "Unsqueeze" not in found


def test_a_file_that_is_no_graph(opened: Bundle, tmp_path: Path) -> None:
    (tmp_path / "encoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"encoder\.onnx: ONNX Runtime .* does not load it: "):
        OrtOnCpu({"encoder": GraphFile.at(tmp_path / "encoder.onnx")}, opened.manifest.graphs)


def test_what_is_missing_is_told_and_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        @staticmethod
        def preload_dlls(**_: str) -> None:
            print("Failed to load libcublas.so.13: no such file")
            print("Please follow the installation guide.")

    assert preload(Broken) == (
        "Failed to load libcublas.so.13: no such file; Please follow the installation guide.; "
        "run pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )
    assert preload(onnxruntime) is None
    assert capsys.readouterr().out == ""


def test_libraries_of_nvidia_in_another_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    class Runtime:
        @staticmethod
        def preload_dlls(directory: str | None = None) -> None:
            asked.append(directory)

    libraries = tmp_path / "nvidia" / "cu13" / "lib"
    libraries.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert preload(Runtime) is None
    assert asked == [str(libraries)]


def test_keys_and_values_reach_the_ranker_without_a_copy(
    engine: Engine, opened: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = engine.encode(pad_histories([history(opened, 5), history(opened, 2)]))
    bind = onnxruntime.IOBinding.bind_ortvalue_input
    seen: dict[str, int] = {}

    def spy(binding: Any, name: str, value: Any) -> None:
        seen[name] = value.data_ptr()
        bind(binding, name, value)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_ortvalue_input", spy)
    engine.rank(encoded, np.zeros((2, 3), np.int64), np.zeros(2, np.int64), np.zeros(2, np.int64))
    names = engine.model.kv_names("past_key_values")
    assert len(names) == 2
    assert [seen[name] for name in names] == [tensor.value.data_ptr() for tensor in encoded.key_values]  # type: ignore[attr-defined] # an OrtTensor


def test_each_tensor_is_copied_to_the_host_once(
    engine: Engine, opened: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = engine.encode(pad_histories([history(opened, count) for count in (5, 2, 4)]))
    read: list[OrtTensor] = []
    numpy = OrtTensor.numpy

    def spy(tensor: OrtTensor) -> NDArray[Any]:
        read.append(tensor)
        return numpy(tensor)

    monkeypatch.setattr(OrtTensor, "numpy", spy)
    engine.extend(past, pad_histories([history(opened, count, 1) for count in (1, 3, 2)]))
    assert len(read) == len(set(map(id, read))) == 2 * len(past.key_values)


def test_an_error_inside_the_engine_is_ours(backend: OrtOnCpu) -> None:
    inputs: dict[str, NDArray[Any]] = {
        "item_vectors": np.zeros((2, 3, 4), np.float32),
        "actions": np.zeros((2, 3, 2), np.float32),
        "surfaces": np.zeros((2, 3), np.int64),
        "timestamps_ms": np.zeros((2, 3), np.int64),
        "lengths": np.array([9, 9]),
    }
    with pytest.raises(BackendError, match="encoder: ONNX Runtime failed: "):
        backend.run("encoder", inputs)


def test_a_closed_backend_runs_nothing_and_leaves_tensors_alone(
    backend: OrtOnCpu, engine: Engine, opened: Bundle
) -> None:
    encoded = engine.encode(pad_histories([history(opened, 5)]))
    before = [tensor.numpy().copy() for tensor in encoded.key_values]
    backend.close()
    with pytest.raises(BackendError, match="encoder: the graphs were closed; load the bundle again"):
        engine.encode(pad_histories([history(opened, 5)]))
    for tensor, copy in zip(encoded.key_values, before, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), copy)


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with graphs in fp16, which ONNX Runtime's CPU computes too, and in bf16, which it does not."""
    folder = Path(shutil.copytree(STORED, tmp_path_factory.mktemp("typed") / "bundle"))
    add_precisions(folder, ["fp16", "bf16"], [])
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def half(typed: Bundle) -> Engine:
    backend = OrtOnCpu(typed.graph_files("fp16"), typed.manifest.graphs_in("fp16"))
    return Engine(backend, typed.manifest.model, typed.item_vectors)


def test_a_device_in_fp16_serves_what_agrees_with_fp32(typed: Bundle) -> None:
    with Recommender.load(typed.path, "cuda-fp16", strict=True, machine=CudaOnCpu()) as recommender:
        assert (recommender.device.name, recommender.device.precision) == ("cuda-fp16", "fp16")
        assert recommender.encoder.namespace == f"{typed.hash} fp16"
        slate = recommender.recommend([{"item": typed.item_ids[5], "actions": ["click"]}], 3)
    assert (slate.device, len(slate.items)) == ("cuda-fp16", 3)
    report = verify_bundle(typed.path, "cuda-fp16", machine=CudaOnCpu())
    assert report.ok
    assert report.agreement is not None
    assert 0 < report.agreement.max_logit_diff < 0.1


def test_operators_without_a_kernel_are_a_reason(typed: Bundle) -> None:
    device = open_engine(typed, "cuda-bf16", machine=CudaOnCpu()).device
    assert (device.name, device.precision) == ("cpu", "fp32")
    assert device.refused[0].startswith("cuda-bf16: encoder_bf16.onnx: ONNX Runtime ")
    assert " does not load it: " in device.refused[0]


def test_graphs_in_fp16_are_near_fp32(half: Engine, engine: Engine, opened: Bundle) -> None:
    histories = [history(opened, 8), history(opened, 6, 1)]
    past, new = (pad_histories([one.part(*part) for one in histories]) for part in ((0, 5), (5, None)))
    asked = np.array([[1, 2, 3], [4, 5, 6]]), np.zeros(2, np.int64), np.full(2, 1_760_000_000_000)
    exact = engine.rank(engine.encode(pad_histories(histories)), *asked)
    for encoded in (half.encode(pad_histories(histories)), half.extend(half.encode(past), new)):
        assert {tensor.numpy().dtype for tensor in encoded.key_values} == {np.dtype(np.float32)}
        assert 0 < np.abs(half.rank(encoded, *asked) - exact).max() < 1e-2
    assert {tensor.dtype for tensor in half.encode(past).key_values} == {"float16"}


def test_arrays_are_rounded_to_what_the_graph_takes(half: Engine, opened: Bundle) -> None:
    encoded = half.encode(pad_histories([history(opened, 6)]))
    asked = np.array([[1, 2, 3]]), np.zeros(1, np.int64), np.array([1_760_000_000_000])
    on_device = half.rank(encoded, *asked)
    moved = tuple(HostTensor(tensor.numpy() * np.float32(1 + 2**-13)) for tensor in encoded.key_values)
    from_host = half.rank(type(encoded)(**{**vars(encoded), "key_values": moved}), *asked)
    np.testing.assert_array_equal(from_host, on_device)


def bf16_backend(folder: Path) -> OrtOnCpu:
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
    return OrtOnCpu({"bf16": GraphFile.at(folder / "bf16.onnx")}, {"bf16": spec})


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_bf16_goes_in_rounded_and_comes_out_widened(tmp_path: Path, layout: str) -> None:
    backend = bf16_backend(tmp_path)
    given: NDArray[np.float32] = np.array([[1.0, 1.00390625], [-3.140625, 2.0**100], [1.005, 65536.0]], np.float32)
    rounded = np.array([[1.0, 1.0], [-3.140625, 2.0**100], [1.0078125, 65536.0]], np.float32)
    outputs = backend.run("bf16", {"given": given if layout == "contiguous" else np.repeat(given, 2, axis=0)[::2]})
    again = backend.run("bf16", {"given": outputs["same"]})
    for tensors in (outputs, again):
        assert isinstance(tensors["same"], OrtTensor)
        assert (tensors["same"].dtype, tensors["same"].shape) == ("bfloat16", (3, 2))
        assert tensors["same"].numpy().dtype == np.float32
        for name in ("same", "wide"):
            np.testing.assert_array_equal(tensors[name].numpy(), rounded)
    with pytest.raises(BackendError, match=r"given is float16 \[3, 2\], expected bfloat16"):
        backend.run("bf16", {"given": np.zeros((3, 2), np.float16)})
