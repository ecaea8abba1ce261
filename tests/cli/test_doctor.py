from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from answers import STORED
from click.testing import CliRunner, Result
from fake_gpu import HostMachine, install_engines
from host_cuda import HostRuntime

from unipinrec.cli import main
from unipinrec.runtime import Bundle
from unipinrec.runtime.machine import driver_problem


def run(*words: str | Path, machine: HostMachine | None = None) -> Result:
    return CliRunner().invoke(main, ["doctor", *(str(word) for word in words)], obj=machine)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIPINREC_CACHE", str(tmp_path / "cache"))


@pytest.mark.skipif(driver_problem() is None, reason="this machine has an NVIDIA driver")
def test_a_machine_without_a_gpu_is_no_failure() -> None:
    result = run()
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "device tensorrt see GPU" in lines
    assert "device cpu ok" in lines
    assert any(line.startswith("GPU there is no NVIDIA driver here") for line in lines)
    assert any(line.startswith("device=auto cpu (auto") for line in lines)
    assert result.stderr == ""


@pytest.mark.usefixtures("homeless")
def test_where_there_is_no_home_the_cache_says_what_to_set() -> None:
    result = run()
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert "engine cache no folder for compiled engines: " in text
    assert "set UNIPINREC_CACHE to a folder of this user's own" in text


def test_json_is_one_document() -> None:
    result = run(STORED, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 0
    assert list(document) == [
        *("unipinrec", "python", "system", "cpu", "memory", "gpu", "onnxruntime", "tensorrt", "openvino"),
        *("hnswlib", "cache", "devices", "bundle", "engines", "engines_problem", "auto"),
    ]
    assert list(document["auto"]["device"]) == ["name", "reason", "precision", "refused", "fell_back"]
    assert list(document["devices"]) == ["tensorrt", "cuda", "cpu", "openvino", "openvino-bf16"]


def test_a_bundle_that_cannot_be_served_fails_with_the_reason(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(STORED, tmp_path / "copy"))
    (folder / "ranker.onnx").unlink()
    for words in ((folder,), (folder, "--json")):
        result = run(*words)
        assert result.exit_code == 1
        assert "cannot be served here: " in result.stderr
        assert "ranker.onnx is missing" in result.stderr
    assert json.loads(result.stdout)["auto"]["device"] is None


def test_engines_and_what_auto_chooses() -> None:
    machine = HostMachine(HostRuntime())
    told = " ".join(run(STORED, machine=machine).stdout.split())
    assert "engines none for" in told
    assert "not tensorrt-fp32: no engine of encoder in fp32 was compiled; run unipinrec compile" in told
    install_engines(Bundle.open(STORED), machine.info)
    result = run(STORED, machine=machine)
    told = " ".join(result.stdout.split())
    assert result.exit_code == 0
    assert told.count("in the cache: usable") == 4
    assert "device=auto tensorrt-fp32 (auto: engines of this bundle for this GPU)" in told
    assert "Host GPU, sm_90" in told


def test_help_shows_an_example() -> None:
    assert "unipinrec doctor bundle/ --json" in run("--help").stdout


def test_it_says_what_finds_the_candidates() -> None:
    result = run(STORED.with_name("bundle_v3"))
    told = " ".join(result.stdout.split())
    assert "retrieval each request scans 24 items in fp32: the bundle has no index" in told
    assert "retrieval" not in run().stdout


def test_a_missing_index_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    document = json.loads(run(STORED, "--json").stdout)
    assert document["hnswlib"]["version"] is None
    assert "pip install 'unipinrec[hnsw]' compiles it" in document["hnswlib"]["problem"]
    assert document["auto"]["retrieval"].startswith("each request scans 24 items in fp32: hnswlib is not installed")
