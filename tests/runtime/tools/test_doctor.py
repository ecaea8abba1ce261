from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import onnxruntime
import pytest
from answers import STORED
from fake_gpu import HostMachine, install_engines, wrong_ranker
from host_cuda import HostRuntime

from unipinrec.runtime import Bundle
from unipinrec.runtime.machine import driver_problem
from unipinrec.runtime.tools.doctor import _driver_version, examine
from unipinrec.runtime.trt.cuda import GpuInfo
from unipinrec.runtime.trt.record import engine_host

NO_DRIVER = "there is no NVIDIA driver here"
without_driver = pytest.mark.skipif(driver_problem() is None, reason="this machine has an NVIDIA driver")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNIPINREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


@pytest.fixture
def machine(memory: HostRuntime) -> HostMachine:
    return HostMachine(memory)


@pytest.fixture
def gpu(machine: HostMachine) -> GpuInfo:
    return machine.info


@without_driver
def test_a_machine_without_a_gpu(cache: Path) -> None:
    found = examine()
    assert (found.gpu.info, found.bundle, found.engines, found.engines_problem) == (None, None, (), None)
    assert found.gpu.problem is not None
    assert found.gpu.problem.startswith(NO_DRIVER)
    assert found.devices["tensorrt"] == found.devices["cuda"] == found.gpu.problem
    assert found.devices["cpu"] is None
    assert found.auto.device is not None
    assert (found.auto.device.name, found.auto.problem) == ("cpu", None)
    assert found.auto.device.refused == tuple(f"{name}: {found.gpu.problem}" for name in ("tensorrt", "cuda"))
    assert (found.cache.path, found.cache.mode, found.cache.entries, found.cache.size_bytes) == (str(cache), None, 0, 0)
    assert not cache.exists()
    assert found.onnxruntime.version == onnxruntime.__version__
    assert "CPUExecutionProvider" in found.onnxruntime.providers
    assert [library.name for library in found.tensorrt] == ["TensorRT", "TensorRT-RTX"]


def test_the_document_can_be_read_back() -> None:
    found = examine(STORED)
    assert msgspec.json.decode(msgspec.json.encode(found), type=type(found)) == found


@without_driver
def test_without_optional_packages_there_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "openvino", "tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    found = examine(STORED)
    assert (found.onnxruntime.version, found.onnxruntime.providers) == (None, ())
    assert found.devices["cpu"] == found.onnxruntime.problem
    assert "pip install 'unipinrec[cpu]'" in str(found.devices["cpu"])
    assert found.openvino.problem == "OpenVINO is not installed; run pip install 'unipinrec[cpu,openvino]'"
    assert [library.version for library in found.tensorrt] == [None, None]
    assert found.auto.device is None
    assert "ONNX Runtime is not installed" in str(found.auto.problem)


def test_whatever_a_broken_package_raises_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> object:
        raise RuntimeError

    monkeypatch.setattr("unipinrec.runtime.tools.doctor.import_openvino", broken)
    found = examine()
    assert (found.openvino.version, found.openvino.problem) == (None, "RuntimeError")


def test_two_wheels_of_onnxruntime_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"{name}-1.31.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.31.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = examine().onnxruntime
    assert found.wheels == ("onnxruntime 1.31.1", "onnxruntime-gpu 1.31.1")
    assert found.problem is not None
    assert "are installed and overwrite each other; run pip uninstall onnxruntime onnxruntime-gpu" in found.problem


def test_a_bundle_is_loaded_as_a_server_loads_it() -> None:
    found = examine(STORED)
    assert found.bundle == str(STORED)
    assert found.auto.device is not None
    assert found.auto.problem is None
    nothing = examine(STORED.parent)
    assert nothing.auto.device is None
    assert str(nothing.auto.problem).startswith(f"{STORED.parent} is not a bundle")
    assert nothing.engines_problem == nothing.auto.problem


def test_engines_are_listed_with_their_state(
    machine: HostMachine, gpu: GpuInfo, memory: HostRuntime, cache: Path
) -> None:
    missing = examine(STORED, machine)
    assert missing.gpu.info == gpu
    assert (missing.devices["tensorrt"], missing.engines) == (None, ())
    assert missing.auto.device is not None
    assert missing.auto.device.name == "cpu"
    assert "no engine of encoder in fp32 was compiled; run unipinrec compile" in missing.auto.device.refused[0]

    install_engines(Bundle.open(STORED), gpu)
    found = examine(STORED, machine)
    assert found.auto.device is not None
    assert (found.auto.device.name, found.auto.device.refused) == ("tensorrt-fp32", ())
    assert sorted(str(engine.graph) for engine in found.engines) == ["encoder", "extend", "ranker", "retrieval"]
    one = found.engines[0]
    assert (one.source, one.precision, one.library, one.target, one.problem) == (
        "cache",
        "fp32",
        "TensorRT 11.4.0.106",
        gpu.architecture,
        None,
    )
    sizes = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    assert (found.cache.mode, found.cache.entries, found.cache.size_bytes) == ("700", 4, sizes)
    gc.collect()
    assert memory.left() == {}


def test_an_engine_that_is_not_used_says_why(machine: HostMachine, gpu: GpuInfo) -> None:
    install_engines(Bundle.open(STORED), gpu, engine_host(replace(gpu, name="Other GPU")))
    found = examine(STORED, machine)
    assert len(found.engines) == 4
    assert all("was built on a Other GPU" in str(engine.problem) for engine in found.engines)


def test_a_cache_that_others_can_reach_is_told(machine: HostMachine, gpu: GpuInfo, cache: Path) -> None:
    install_engines(Bundle.open(STORED), gpu)
    cache.chmod(0o755)
    found = examine(STORED, machine)
    assert (found.cache.mode, found.cache.entries) == ("755", 0)
    assert "755" in str(found.cache.problem)


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_has_no_cache(machine: HostMachine) -> None:
    found = examine(STORED, machine)
    assert (found.cache.path, found.cache.mode, found.cache.entries, found.cache.size_bytes) == (None, None, 0, 0)
    assert "set UNIPINREC_CACHE" in str(found.cache.problem)
    assert (found.engines, found.engines_problem) == ((), found.cache.problem)
    assert found.auto.device is not None
    assert (found.auto.device.name, found.auto.problem) == ("cpu", None)


def test_a_gpu_with_wrong_answers_leaves_the_cpu(machine: HostMachine, gpu: GpuInfo, tmp_path: Path) -> None:
    stored = Bundle.open(STORED)
    install_engines(stored, gpu, files={"ranker": wrong_ranker(stored, tmp_path)})
    found = examine(STORED, machine)
    assert found.auto.device is not None
    assert (found.auto.device.name, found.auto.device.reason) == ("cpu", "requested")
    assert "golden outputs do not reproduce on tensorrt-fp32" in str(found.auto.problem)


def test_the_expected_device_without_a_bundle(machine: HostMachine) -> None:
    expected = examine(machine=machine).auto.device
    assert expected is not None
    assert (expected.name, expected.reason) == ("tensorrt", "auto, once its engines are compiled; cuda until then")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025\nGCC version:  gcc 13.3\n",
            "580.65.06",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build\n", "575.57.08"),
        ("NVRM\n", None),
        (None, None),
    ],
)
def test_the_version_of_the_driver(tmp_path: Path, content: str | None, expected: str | None) -> None:
    if content is not None:
        (tmp_path / "version").write_text(content)
    assert _driver_version(tmp_path / "version") == expected
