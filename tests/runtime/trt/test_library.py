"""Which TensorRT is found, and what its logger keeps."""

from __future__ import annotations

import gc
import logging
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fake_tensorrt import ILogger, Severity

from unipinrec.errors import BackendError
from unipinrec.runtime.trt.library import Flavor, LogLines, import_tensorrt, tensorrt_logger

NAMES = ("tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings")


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TensorRT is installed."""
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)


def install(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(__version__=version))


@pytest.mark.parametrize(
    ("name", "version", "flavor"),
    [
        ("tensorrt", "10.16.1.11", "tensorrt"),
        ("tensorrt_bindings", "11.4.0.106", "tensorrt"),
        ("tensorrt_rtx", "1.5.0.114", "tensorrt_rtx"),
        ("tensorrt_rtx_bindings", "1.7.1.116", "tensorrt_rtx"),
    ],
)
@pytest.mark.usefixtures("nothing")
def test_every_flavor_is_found(name: str, version: str, flavor: Flavor, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, name, version)
    for asked in (None, flavor):
        found = import_tensorrt(asked)
        assert (found.flavor, found.version, found.module.__version__) == (flavor, version, version)


@pytest.mark.usefixtures("nothing")
def test_tensorrt_proper_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", "11.4.0.106")
    install(monkeypatch, "tensorrt_rtx", "1.7.1.116")
    assert str(import_tensorrt()) == "TensorRT 11.4.0.106"
    assert str(import_tensorrt("tensorrt_rtx")) == "TensorRT-RTX 1.7.1.116"


@pytest.mark.usefixtures("nothing")
def test_what_is_missing_is_named_with_its_remedy() -> None:
    with pytest.raises(
        BackendError,
        match=r"^TensorRT is not installed; run pip install 'unipinrec\[gpu\]'; "
        r"TensorRT-RTX is not installed; run pip install 'unipinrec\[rtx\]'$",
    ):
        import_tensorrt()


@pytest.mark.parametrize(
    ("flavor", "version"),
    [
        ("tensorrt", "10.15.9.1"),
        ("tensorrt", "12.0.0"),
        ("tensorrt", "8.6.1.6"),
        ("tensorrt_rtx", "1.4.0.76"),
        ("tensorrt_rtx", "2.0"),
    ],
)
@pytest.mark.usefixtures("nothing")
def test_versions_that_this_was_not_written_for_are_refused(
    flavor: Flavor, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, flavor, version)
    bounds = {"tensorrt": "at least 10.16 and less than 12", "tensorrt_rtx": "at least 1.5 and less than 2"}[flavor]
    with pytest.raises(BackendError, match=re.escape(f" {version} is installed; {bounds} is needed: run pip install")):
        import_tensorrt(flavor)


@pytest.mark.usefixtures("nothing")
def test_a_wheel_without_its_libraries_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        if name == "tensorrt":
            raise OSError("libnvinfer.so.11: cannot open shared object file")
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("unipinrec.runtime.trt.library.importlib.import_module", broken)
    with pytest.raises(BackendError, match=r"does not load \(libnvinfer.so.11: cannot open"):
        import_tensorrt("tensorrt")


@pytest.mark.usefixtures("nothing")
def test_something_else_of_that_name_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(BackendError, match=r"TensorRT is not installed: tensorrt is something else \(a folder\)"):
        import_tensorrt("tensorrt")


def module() -> Any:
    return SimpleNamespace(ILogger=ILogger)


def test_a_logger_keeps_errors_and_what_is_wanted() -> None:
    lines = LogLines(keep=lambda line: "Layers" in line)
    logger = tensorrt_logger(module(), lines)
    for index in range(30):
        logger.log(Severity.ERROR, f"error {index}")
    logger.log(Severity.INTERNAL_ERROR, "last")
    logger.log(Severity.VERBOSE, "Layers: 3")
    logger.log(Severity.INFO, "nothing of interest")
    assert lines.errors == [f"error {index}" for index in range(20)]
    assert lines.kept == ["Layers: 3"]
    assert LogLines(errors=["a", "a", "b"]).reason() == "a; b"
    assert LogLines().reason() == "it gave no reason"


def test_all_of_a_module_share_one_logger() -> None:
    first, second, tensorrt = LogLines(), LogLines(), module()
    logger = tensorrt_logger(tensorrt, first)
    assert tensorrt_logger(tensorrt, second) is logger
    logger.log(Severity.ERROR, "to both")
    assert (first.errors, second.errors) == (["to both"], ["to both"])
    del second
    gc.collect()
    logger.log(Severity.ERROR, "to one")
    assert first.errors == ["to both", "to one"]
    assert tensorrt_logger(module(), LogLines()) is not logger


def test_warnings_are_passed_on_and_errors_left_to_who_raises_them(caplog: pytest.LogCaptureFixture) -> None:
    lines = LogLines()
    logger = tensorrt_logger(module(), lines)
    with caplog.at_level(logging.INFO):
        logger.log(Severity.WARNING, "Using an engine plan file across different models of devices")
        logger.log(Severity.WARNING, "Make sure input lengths has Int64 binding.")
        logger.log(Severity.ERROR, "raised")
        del lines
        gc.collect()
        logger.log(Severity.ERROR, "nobody listens")
    assert [(record.levelname, record.message[:9]) for record in caplog.records] == [
        ("WARNING", "Using an "),
        ("WARNING", "nobody li"),
    ]
