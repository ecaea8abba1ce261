"""`unipinrec compile`, as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_builder import Builder
from fake_gpu import HostMachine
from host_cuda import HostRuntime

from unipinrec.cli import main
from unipinrec.errors import BackendError
from unipinrec.runtime import Bundle
from unipinrec.runtime.machine import driver_problem
from unipinrec.runtime.trt.library import import_tensorrt
from unipinrec.runtime.trt.store import EngineStore

STORED = Path(__file__).resolve().parents[1] / "fixtures" / "bundle_v1"
PLAN = """
import sys
for name in ("tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings"):
    sys.modules[name] = None
from unipinrec.cli import main
main(["compile", sys.argv[1], "--dry-run", "--json"])
"""


def run(*arguments: object, machine: HostMachine | None = None) -> Result:
    return CliRunner().invoke(main, ["compile", *map(str, arguments)], obj=machine)


@pytest.fixture
def rtx() -> None:
    try:
        import_tensorrt("tensorrt_rtx")
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("UNIPINREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


def test_a_dry_run_shows_profiles_and_memory_without_tensorrt() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", PLAN, str(STORED)], capture_output=True, text=True, check=True, env=environment
    )
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["bundle"] == Bundle.open(STORED).hash
    assert document["uncovered"] == []
    graphs = {graph["graph"]: graph for graph in document["graphs"]}
    assert list(graphs) == ["encoder", "extend", "retrieval", "ranker"]
    alone, many = graphs["ranker"]["profiles"]
    assert alone["sizes"] == {"batch": [1, 1, 1], "past": [2, 5, 9], "candidates": [1, 200, 1024]}
    assert many["sizes"]["batch"] == [1, 16, 32]
    # One layer, one head of width 4: nine slots of a key and a value.
    assert (alone["kv_in_bytes"], alone["kv_out_bytes"]) == (9 * 2 * 4 * 4, 0)
    assert graphs["encoder"]["profiles"][1]["kv_out_bytes"] == 32 * 9 * 2 * 4 * 4


def test_a_dry_run_for_people() -> None:
    done = run(STORED, "--dry-run", "--profile", "batch=4,candidates=10")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[:2] == [
        "encoder in fp32 (encoder.onnx)",
        "  batch 4:4:4, history 1:4:8; at most 0 B of KV in, 1.1 KiB of KV out, 1.4 KiB of other tensors",
    ]
    assert "requests beyond the profiles are rejected: batch: 4 to 4 of 1 to 32" in done.stderr


def test_profiles_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "profiles.json").write_text('[{"batch": [1, 2, 3]}]')
    done = run(STORED, "--dry-run", "--profiles", tmp_path / "profiles.json", "--json")
    assert json.loads(done.stdout)["graphs"][2]["profiles"][0]["sizes"] == {"batch": [1, 2, 3]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "new"], "name their GPUs with --target"),
        (["--target", "sm_89"], "engines for other GPUs belong into a bundle: give --out"),
        (["--profile", "batch=1", "--profiles", STORED / "manifest.json"], "give --profile or --profiles, not both"),
        (["--dry-run", "--list"], "give one of --dry-run, --list"),
        (["--list", "--remove", "abc"], "give one of --list, --remove"),
        (["--profile", "slots=1", "--dry-run"], "'slots=1' is not NAME=SMALLEST:USUAL:LARGEST"),
        (["--precision", "int8"], "'int8' is not one of"),
        (["--optimization-level", "6"], "6 is not in the range"),
    ],
)
def test_wrong_use_is_said(arguments: list[object], message: str) -> None:
    done = run(STORED, *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--precision", "bf16", "--dry-run"],
            "holds graphs in fp32, not in bf16; export it again with --precision bf16",
        ),
        (["--remove", "abc"], "0 engines of "),
        (["--flavor", "tensorrt_rtx", "--target", "sm_90", "--out", "new"], "has no target sm_90; it has sm_75"),
    ],
)
@pytest.mark.usefixtures("rtx")
def test_a_failure_has_its_reason(arguments: list[object], message: str) -> None:
    done = run(STORED, *arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.usefixtures("rtx")
def test_without_a_gpu_it_says_what_can_be_done() -> None:
    if driver_problem() is None:
        pytest.skip("there is a GPU here")
    done = run(STORED)
    assert done.exit_code == 1
    assert "give --target and --out" in done.stderr
    assert "NVIDIA driver" in done.stderr


@pytest.mark.usefixtures("rtx")
def test_engines_ahead_of_time(tmp_path: Path) -> None:
    out = tmp_path / "new"
    done = run(STORED, "--target", "sm_89,sm_120", "--out", out, "--profile", "batch=1:4:4", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["bundle"] == Bundle.open(out).hash
    assert (document["flavor"], document["out"]) == ("tensorrt_rtx", str(out))
    assert document["parent"] == Bundle.open(STORED).hash
    ranker = document["engines"][3]
    assert (ranker["graph"], ranker["precision"], ranker["target"]) == ("ranker", "fp32", "sm_89,sm_120")
    assert ranker["built"] is True
    assert ranker["verified"]["passed"] is False
    assert set(ranker["attention"].values()) == {"decomposed"}
    assert set(ranker["layers"]) == {"float32"}
    listed = json.loads(run(out, "--list", "--json").stdout)["engines"]
    assert [(one["source"], one["usable"], one["graph"]) for one in listed] == [
        ("bundle", False, graph) for graph in ("encoder", "extend", "retrieval", "ranker")
    ]
    told = run(out, "--list").stdout.splitlines()
    assert len(told) == 4
    assert "ranker in fp32 for sm_89,sm_120, tensorrt_rtx" in told[3]
    assert "it runs with --allow-bundle-engines" in told[3]


def test_engines_for_this_gpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unipinrec.runtime.tools.compile.build_engine", Builder())
    run_here = partial(run, machine=HostMachine(HostRuntime()))
    done = run_here(STORED, "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["flavor"], document["version"], document["gpu"]) == ("tensorrt", "11.4.0.106", "Host GPU")
    assert document["cache"] == str(cache)
    engines = document["engines"]
    assert [(one["graph"], one["precision"], one["target"], one["built"]) for one in engines] == [
        (graph, "fp32", "sm_90", True) for graph in ("encoder", "extend", "retrieval", "ranker")
    ]
    assert {one["verified"]["passed"] for one in engines} == {True}
    assert set(EngineStore(cache).entries()) == {one["id"] for one in engines}
    listed = json.loads(run_here(STORED, "--list", "--json").stdout)["engines"]
    assert [(one["source"], one["usable"], one["problem"]) for one in listed] == [("cache", True, None)] * 4
    again = run_here(STORED)
    assert again.exit_code == 0
    assert [line.partition(",")[0] for line in again.stdout.splitlines()[:4]] == [
        f"{graph} in fp32: there already" for graph in ("encoder", "extend", "retrieval", "ranker")
    ]
    assert "8 outputs of the golden requests differ from PyTorch's by at most" in again.stdout
    assert again.stdout.splitlines()[-1].startswith(f"{cache}: 4 engines, ")
    forced = run_here(STORED, "--force", "--profile", "batch=1:4:8", "--json")
    assert [one["built"] for one in json.loads(forced.stdout)["engines"]] == [True] * 4
    assert len(EngineStore(cache).entries()) == 8


def test_an_empty_cache_is_said(cache: Path) -> None:
    assert run(STORED, "--list").stdout == f"{cache} has no engine of this bundle; run unipinrec compile\n"


def test_an_entry_that_cannot_be_trusted_is_listed_and_removed(cache: Path) -> None:
    EngineStore(cache).prepare()
    for name in ("abc1", "abd2"):
        (cache / name).mkdir(mode=0o700)
    done = run(STORED, "--list")
    assert done.stdout.splitlines()[0].startswith("abc1 cache: ?: ")
    assert "engine.json is missing; remove it, and compile again" in done.stdout
    ambiguous = run(STORED, "--remove", "ab")
    assert ambiguous.exit_code == 1
    assert "2 engines of" in ambiguous.stderr
    assert run(STORED, "--remove", "abc").stdout == "removed abc1\n"
    assert [path.name for path in cache.iterdir()] == ["abd2"]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_workspace_is_finite(value: str) -> None:
    done = run(STORED, "--dry-run", "--workspace-gib", value)
    assert done.exit_code == 2
    assert f"{value} is not a finite number" in done.stderr


def test_help_has_examples() -> None:
    done = run("--help")
    assert "unipinrec compile bundle/ --flavor tensorrt_rtx --target sm_89,sm_120 --out bundle-ahead/" in done.stdout
