from __future__ import annotations

import sys
from pathlib import Path

import pytest

from unipinrec.errors import BackendError
from unipinrec.runtime import Recommender
from unipinrec.runtime.device import resolve_device


def test_a_device_that_was_asked_for_runs(bundle: Path, device: str) -> None:
    running = Recommender.load(bundle, device).device
    assert (running.name, running.reason, running.precision) == (device, "asked for", "fp32")


@pytest.mark.parametrize(
    ("bf16", "others"),
    [(True, "openvino and openvino-bf16 can be asked for"), (False, "openvino can be asked for")],
)
def test_auto_says_what_else_there_is(bf16: bool, others: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    monkeypatch.setattr("unipinrec.runtime.device.has_bf16", lambda: bf16)
    auto = resolve_device("auto")
    assert (auto.name, auto.reason) == ("cpu", f"auto: ONNX Runtime on the CPU; {others}")


def test_without_openvino_auto_says_so_and_the_others_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert resolve_device("auto").reason == "auto: ONNX Runtime on the CPU; openvino is not installed"
    for wanted in ("openvino", "openvino-bf16"):
        with pytest.raises(BackendError, match=r"OpenVINO is not installed; run pip install 'unipinrec\[cpu,openvino"):
            resolve_device(wanted)


@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        ("cuda", "device 'cuda' is not available in this version; use one of auto, cpu, openvino, openvino-bf16"),
        ("tensorrt", "device 'tensorrt' is not available in this version"),
        ("tpu", "unknown device 'tpu'; use one of auto, cpu, openvino, openvino-bf16"),
    ],
)
def test_a_device_that_cannot_run(wanted: str, match: str) -> None:
    with pytest.raises(BackendError, match=match):
        resolve_device(wanted)
