from __future__ import annotations

import gc
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from answers import STORED
from fake_gpu import CudaOnCpu, HostMachine, OrtOnCpu, install_engines, record_of, wrong_ranker
from fake_tensorrt import VERSIONS, make_plan
from host_cuda import HostRuntime

from unipinrec.errors import BackendError, BundleError
from unipinrec.runtime import Bundle, CacheOptions, Recommender, RecommendOptions, verify_bundle
from unipinrec.runtime.bundle.manifest import Manifest
from unipinrec.runtime.device import DEVICES, THIS_MACHINE, candidates, open_engine
from unipinrec.runtime.golden_check import require_golden
from unipinrec.runtime.machine import driver_problem
from unipinrec.runtime.trt.cuda import GpuInfo
from unipinrec.runtime.trt.record import engine_host

Reseal = Callable[..., None]
NO_DRIVER = "there is no NVIDIA driver here"
without_driver = pytest.mark.skipif(driver_problem() is None, reason="this machine has an NVIDIA driver")


@pytest.fixture
def machine(memory: HostRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostMachine]:
    """One with a GPU, TensorRT proper and an empty cache of engines; nothing may be left on it."""
    monkeypatch.setenv("UNIPINREC_CACHE", str(tmp_path / "cache"))
    yield HostMachine(memory)
    gc.collect()
    assert memory.left() == {}
    assert memory.faults == []


@pytest.fixture
def gpu(machine: HostMachine) -> GpuInfo:
    return machine.info


def served(recommender: Recommender) -> list[str]:
    """What a sample user gets."""
    with recommender:
        user = recommender.bundle.user_events(recommender.bundle._user_ids()[0])
        options = RecommendOptions(now_ms=1_760_000_000_000)
        return [item.item for item in recommender.recommend(user, 3, options).items]


@pytest.mark.parametrize("wanted", ["cpu", "openvino", "cuda"])
def test_a_device_that_was_asked_for_runs(wanted: str) -> None:
    if wanted == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
    machine = CudaOnCpu() if wanted == "cuda" else THIS_MACHINE
    with Recommender.load(STORED, wanted, strict=True, machine=machine) as recommender:
        running = recommender.device
    assert (running.name, running.reason, running.precision, running.refused) == (wanted, "requested", "fp32", ())


@pytest.mark.parametrize(
    ("wanted", "precisions", "expected"),
    [
        ("auto", (), ("tensorrt-fp32", "cuda", "cpu")),
        ("auto", ("bf16", "fp16", "fp8"), ("tensorrt-bf16", "cuda-bf16", "cuda", "cpu")),
        ("tensorrt", (), ("tensorrt-fp32", "cuda", "cpu")),
        ("tensorrt", ("bf16",), ("tensorrt-bf16", "cuda-bf16", "cuda", "cpu")),
        ("tensorrt-fp16", ("bf16", "fp16"), ("tensorrt-fp16", "cuda-fp16", "cuda", "cpu")),
        ("tensorrt-fp32", ("bf16",), ("tensorrt-fp32", "cuda", "cpu")),
        ("tensorrt-fp8", (), ("tensorrt-fp8", "cuda", "cpu")),
        ("tensorrt-fp8", ("bf16", "fp8"), ("tensorrt-fp8", "cuda-bf16", "cuda", "cpu")),
        ("cuda", ("bf16",), ("cuda", "cpu")),
        ("cuda-fp32", (), ("cuda", "cpu")),
        ("cuda-bf16", (), ("cuda-bf16", "cpu")),
        ("cpu", (), ("cpu",)),
        ("openvino", (), ("openvino",)),
        ("openvino-bf16", (), ("openvino-bf16",)),
    ],
)
def test_candidates(manifest: Manifest, wanted: str, precisions: tuple[str, ...], expected: tuple[str, ...]) -> None:
    class WithGraphs:
        """A manifest, of which only the names of the precisions are read."""

    WithGraphs.precisions = dict.fromkeys(precisions)  # type: ignore[attr-defined] # a stand-in
    assert candidates(wanted, WithGraphs) == expected  # type: ignore[arg-type] # a stand-in


@pytest.mark.parametrize(
    ("precisions", "expected"),
    [
        (("bf16", "fp16"), ("tensorrt-fp16", "cuda-fp16", "cuda", "cpu")),
        (("bf16",), ("tensorrt-fp32", "cuda", "cpu")),
    ],
)
def test_a_gpu_without_bf16(precisions: tuple[str, ...], expected: tuple[str, ...]) -> None:
    class WithGraphs:
        """A manifest, of which only the names of the precisions are read."""

    WithGraphs.precisions = dict.fromkeys(precisions)  # type: ignore[attr-defined] # a stand-in
    turing = GpuInfo(name="T4", architecture="sm_75", driver_version="13.0", memory_bytes=1 << 34)
    assert candidates("auto", WithGraphs, turing) == expected  # type: ignore[arg-type] # a stand-in


def test_a_device_that_does_not_exist(tmp_path: Path) -> None:
    for call in (lambda: open_engine(Bundle.open(STORED), "tpu"), lambda: verify_bundle(tmp_path, "tpu")):
        with pytest.raises(BackendError, match=f"unknown device 'tpu'; use one of {', '.join(DEVICES)}"):
            call()


def test_what_is_no_device_at_all() -> None:
    with pytest.raises(BackendError, match=r"device=5 is neither one of auto, cpu, .* nor a backend"):
        Recommender.load(STORED, 5)  # type: ignore[arg-type]  # a mistake


@without_driver
@pytest.mark.parametrize(
    ("bf16", "others"),
    [(True, "openvino and openvino-bf16 can be requested"), (False, "openvino can be requested")],
)
def test_auto_says_what_else_there_is(bf16: bool, others: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    monkeypatch.setattr("unipinrec.runtime.device.has_bf16", lambda: bf16)
    auto = open_engine(Bundle.open(STORED), "auto").device
    assert (auto.name, auto.reason) == ("cpu", f"auto: ONNX Runtime on the CPU; {others}")


@without_driver
def test_without_openvino_auto_says_so_and_the_others_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    stored = Bundle.open(STORED)
    assert open_engine(stored, "auto").device.reason == "auto: ONNX Runtime on the CPU; openvino is not installed"
    for wanted in ("openvino", "openvino-bf16"):
        with pytest.raises(
            BackendError,
            match=r"bundle_v1 does not run on openvino(-bf16)?: (OpenVINO is not installed; run pip install 'unipin"
            r"rec\[cpu,openvino|this CPU has no)",
        ):
            open_engine(stored, wanted)


@without_driver
def test_a_machine_without_a_gpu_serves_on_the_cpu_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "unipinrec")
    device = Recommender.load(STORED, strict=True).device
    assert device.name == "cpu"
    assert [reason.partition(" (")[0] for reason in device.refused] == [
        f"tensorrt-fp32: {NO_DRIVER}",
        f"cuda: {NO_DRIVER}",
    ]
    told = [record for record in caplog.records if record.message.startswith("not used: ")]
    assert [record.message for record in told] == [f"not used: {reason}" for reason in device.refused]
    assert {record.levelname for record in told} == {"INFO"}


@without_driver
@pytest.mark.parametrize(("wanted", "refused"), [("tensorrt", 2), ("tensorrt-fp32", 2), ("cuda", 1), ("cuda-fp32", 1)])
def test_a_fallback_is_loud(wanted: str, refused: int, caplog: pytest.LogCaptureFixture) -> None:
    device = Recommender.load(STORED, wanted).device
    assert (device.name, device.reason) == ("cpu", f"instead of {wanted}, which does not run here")
    assert len(device.refused) == refused
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [*(f"not used: {reason}" for reason in device.refused), f"{wanted} was requested, cpu is used"]
    with pytest.raises(
        BackendError, match=f"does not run on {wanted} and strict allows no other device: .*{NO_DRIVER}"
    ):
        Recommender.load(STORED, wanted, strict=True)
    with pytest.raises(BackendError, match="strict allows no other device"):
        verify_bundle(STORED, wanted, strict=True)


@pytest.mark.parametrize("wanted", ["tensorrt-bf16", "tensorrt-fp16", "tensorrt-fp8", "cuda-bf16", "cuda-fp16"])
def test_a_precision_that_the_bundle_lacks(wanted: str) -> None:
    device = open_engine(Bundle.open(STORED), wanted).device
    precision = wanted.partition("-")[2]
    assert device.refused[0] == (
        f"{wanted}: the bundle has graphs in fp32, not in {precision}; export it again with --precision {precision}"
    )
    assert device.precision == "fp32"


@pytest.mark.usefixtures("machine", "homeless")
def test_without_a_home_for_engines_another_device_serves(machine: HostMachine) -> None:
    with Recommender.load(STORED, "auto", machine=machine) as recommender:
        assert recommender.device.name == "cpu"
        assert "no folder for compiled engines" in recommender.device.refused[0]


def test_engines_of_this_machine_are_chosen(machine: HostMachine, gpu: GpuInfo, memory: HostRuntime) -> None:
    stored = Bundle.open(STORED)
    expected = served(Recommender.load(STORED, "cpu"))
    install_engines(stored, gpu)
    for wanted, reason in (("auto", "auto: engines of this bundle for this GPU"), ("tensorrt", "requested")):
        recommender = Recommender.load(STORED, wanted, strict=True, machine=machine)
        running = recommender.device
        assert (running.name, running.reason, running.refused) == ("tensorrt-fp32", reason, ())
        assert memory.left() != {}
        assert served(recommender) == expected
        gc.collect()
        assert memory.left() == {}
    report = verify_bundle(STORED, "tensorrt", machine=machine)
    assert report.ok
    assert report.device is not None
    assert report.device.name == "tensorrt-fp32"


def test_without_an_engine_the_command_is_given_and_the_next_device_serves(
    machine: HostMachine, gpu: GpuInfo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    missing = (
        "tensorrt-fp32: no engine of encoder in fp32 was compiled; "
        f"run unipinrec compile {STORED} --precision fp32 (3 more graphs have none either)"
    )
    device = open_engine(Bundle.open(STORED), "tensorrt-fp32", machine=machine).device
    assert (device.name, device.refused[0]) == ("cpu", missing)
    assert "CUDAExecutionProvider" in device.refused[1]
    with pytest.raises(BackendError, match=re.escape(missing)):
        Recommender.load(STORED, strict=True, machine=machine)
    machine.ort_cuda = OrtOnCpu
    caplog.clear()
    auto = open_engine(Bundle.open(STORED), "auto", machine=machine).device
    assert (auto.name, auto.reason, auto.refused) == ("cuda", "auto: ONNX Runtime on the GPU", (missing,))
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == [f"not used: {missing}", "auto was requested, cuda is used"]


def test_either_tensorrt_serves(memory: HostRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIPINREC_CACHE", str(tmp_path / "cache"))
    machine = HostMachine(memory, ("tensorrt", "tensorrt_rtx"))
    stored = Bundle.open(STORED)
    device = open_engine(stored, "tensorrt", machine=machine).device
    assert device.refused[0].count("no engine of encoder in fp32 was compiled") == 2
    install_engines(stored, machine.info)
    engine = open_engine(stored, "tensorrt", machine=machine)
    assert engine.device.name == "tensorrt-fp32"
    engine.close()


def test_without_tensorrt_all_of_it_is_named(memory: HostRuntime) -> None:
    machine = HostMachine(memory, ())
    device = open_engine(Bundle.open(STORED), "tensorrt", machine=machine).device
    assert device.refused[0] == "tensorrt-fp32: tensorrt is not installed; tensorrt_rtx is not installed"


def test_an_engine_of_another_machine_is_refused(machine: HostMachine, gpu: GpuInfo) -> None:
    stored = Bundle.open(STORED)
    other = engine_host(replace(gpu, name="Other GPU"))
    install_engines(stored, gpu, machine=other)
    with pytest.raises(BackendError, match=r"was built on a Other GPU, here is a .*; run unipinrec compile .*fp32"):
        open_engine(stored, "tensorrt", strict=True, machine=machine)


def test_an_altered_plan_is_refused(machine: HostMachine, gpu: GpuInfo) -> None:
    stored = Bundle.open(STORED)
    store = install_engines(stored, gpu)
    for plan in store.root.glob("*/engine.plan"):
        content = bytearray(plan.read_bytes())
        content[-1] ^= 1
        plan.chmod(0o600)
        plan.write_bytes(content)
    with pytest.raises(BackendError, match=r"engine\.plan is altered"):
        open_engine(stored, "tensorrt", strict=True, machine=machine)


@pytest.fixture
def carrying(tmp_path: Path, reseal: Reseal, gpu: GpuInfo) -> Path:
    """A bundle with engines for its fp32 graphs, built ahead of time."""
    folder = Path(shutil.copytree(STORED, tmp_path / "carrying"))
    stored, engines, files = Bundle.open(folder), [], {}
    for graph, file in stored.graph_files().items():
        record = record_of(stored, graph, engine_host())
        name = f"{graph}.engine"
        (folder / name).write_bytes(make_plan(file, record.key.profiles))
        files[name] = {"sha256": "", "size_bytes": 0}
        engines.append(
            {
                "file": name,
                "key": record.key.digest(),
                "graph": graph,
                "precision": "fp32",
                "flavor": "tensorrt",
                "version": VERSIONS["tensorrt"],
                "targets": ["sm_75", gpu.architecture],
            }
        )
    reseal(folder, engines=engines, files={**files})
    reseal(folder)
    return folder


def test_engines_that_travel_need_to_be_allowed(machine: HostMachine, carrying: Path) -> None:
    with pytest.raises(
        BackendError,
        match=r"the bundle carries an engine of encoder in fp32, but a plan is executable code: allow it with "
        r"--allow-bundle-engines .* or run unipinrec compile .*carrying --precision fp32 \(3 more",
    ):
        Recommender.load(carrying, "tensorrt", strict=True, machine=machine)
    recommender = Recommender.load(carrying, "tensorrt", strict=True, allow_bundle_engines=True, machine=machine)
    assert recommender.device.name == "tensorrt-fp32"
    assert served(recommender) == served(Recommender.load(carrying, "cpu"))


@pytest.mark.parametrize(
    "change", [{"targets": ["sm_75"]}, {"version": "10.16.1"}, {"flavor": "tensorrt_rtx"}, {"precision": "bf16"}]
)
def test_engines_that_travel_must_fit(
    machine: HostMachine, carrying: Path, reseal: Reseal, change: dict[str, Any]
) -> None:
    engines = [
        {name: getattr(engine, name) for name in engine.__struct_fields__} | change
        for engine in Bundle.open(carrying).manifest.engines
    ]
    reseal(carrying, engines=engines)
    with pytest.raises(BackendError, match="no engine of encoder in fp32 was compiled"):
        open_engine(Bundle.open(carrying), "tensorrt", strict=True, allow_bundle_engines=True, machine=machine)


def test_an_engine_that_is_swapped_after_the_check_is_not_what_runs(machine: HostMachine, carrying: Path) -> None:
    opened = Bundle.open(carrying)
    (carrying / "ranker.engine").write_bytes(b"something else")
    require_golden(open_engine(opened, "tensorrt", strict=True, allow_bundle_engines=True, machine=machine), opened)


def test_wrong_answers_on_a_gpu_are_an_error_and_no_fallback(
    machine: HostMachine, gpu: GpuInfo, memory: HostRuntime, tmp_path: Path
) -> None:
    stored = Bundle.open(STORED)
    install_engines(stored, gpu, files={"ranker": wrong_ranker(stored, tmp_path)})
    with pytest.raises(BundleError, match=r"1 golden outputs do not reproduce on tensorrt-fp32 .* use device cpu"):
        Recommender.load(STORED, machine=machine)
    gc.collect()
    assert memory.left() == {}
    report = verify_bundle(STORED, machine=machine)
    assert not report.ok
    assert report.device is not None
    assert report.device.name == "tensorrt-fp32"


def test_a_graph_that_fails_on_a_gpu_leads_to_the_next_device(
    machine: HostMachine, gpu: GpuInfo, memory: HostRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_engines(Bundle.open(STORED), gpu)

    def fail(*_: object) -> bool:
        return False

    monkeypatch.setattr("fake_tensorrt.IExecutionContext.execute_async_v3", fail)
    with pytest.raises(BackendError, match=r"strict allows no other device: tensorrt-fp32: encoder: "):
        Recommender.load(STORED, strict=True, machine=machine)
    with Recommender.load(STORED, machine=machine) as recommender:
        device = recommender.device
        assert len(recommender.recommend([{"item": "item-1", "actions": []}], 1).items) == 1
    assert (device.name, device.fell_back) == ("cpu", True)
    assert device.refused[0].startswith("tensorrt-fp32: encoder: ")
    gc.collect()
    assert memory.left() == {}


def test_a_cache_on_a_gpu_warns(machine: HostMachine, gpu: GpuInfo, caplog: pytest.LogCaptureFixture) -> None:
    install_engines(Bundle.open(STORED), gpu)
    for cache, warnings in ((None, 0), (CacheOptions(budget_bytes=1 << 20), 1)):
        caplog.clear()
        with Recommender.load(STORED, "tensorrt", machine=machine, cache=cache):
            told = [one for one in caplog.messages if "copies cached keys and values to the host" in one]
            assert len(told) == warnings


def test_a_gpu_that_onnx_runtime_has_no_kernels_for_is_named(machine: HostMachine) -> None:
    class B200(HostMachine):
        def gpu(self) -> GpuInfo:
            return GpuInfo(name="B200", architecture="sm_100", driver_version="13.0", memory_bytes=1 << 37)

    for where, named in ((machine, False), (B200(machine.memory), True)):
        (refused,) = open_engine(Bundle.open(STORED), "cuda", machine=where).device.refused
        assert ("onnxruntime-gpu 1.31 has no kernels for sm_100" in refused) == named


def test_the_gpu_of_a_number_is_used(machine: HostMachine, gpu: GpuInfo) -> None:
    install_engines(Bundle.open(STORED), gpu)
    machine.index = 5
    with pytest.raises(BackendError, match=r"could not look at GPU 5: cudaErrorInvalidDevice"):
        open_engine(Bundle.open(STORED), "tensorrt", strict=True, machine=machine)


def test_a_closed_recommender_answers_nothing() -> None:
    with Recommender.load(STORED, "cpu") as recommender:
        recommender.recommend([{"item": recommender.bundle.item_ids[0], "actions": []}], 1)
    with pytest.raises(BackendError, match="the graphs were closed; load the bundle again"):
        recommender.recommend([{"item": recommender.bundle.item_ids[0], "actions": []}], 1)
