"""Engines built ahead of time, by TensorRT-RTX and without a GPU, travel in a bundle that is whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from answers import STORED
from engine_records import HERE, record_of

from unipinrec.errors import BackendError, BundleCorruptError, BundleError, ConfigError, ExportError
from unipinrec.runtime import Bundle
from unipinrec.runtime.bundle.sealed import SealedFile
from unipinrec.runtime.tools.compile import Compiled
from unipinrec.runtime.tools.compile_ahead import RECORDS, carried_records, compile_ahead
from unipinrec.runtime.tools.compile_plan import CompileTask, keys_of
from unipinrec.runtime.tools.engines import list_engines
from unipinrec.runtime.trt.build import BuildTask, BuiltEngine
from unipinrec.runtime.trt.library import TensorRT
from unipinrec.runtime.trt.profiles import parse_bucket
from unipinrec.runtime.trt.record import EngineHost
from unipinrec.runtime.trt.store import EngineStore

GRAPHS = ["encoder", "extend", "retrieval", "ranker"]
HOW = "built ahead of time, where they cannot run; they run when it is first loaded"
GPU = EngineHost(id=HERE.id, gpu="NVIDIA L40S", architecture="sm_89", driver="13.0")


@pytest.fixture(scope="module")
def stored() -> Bundle:
    return Bundle.open(STORED)


def task_of(bundle: Bundle, *targets: str, **changes: Any) -> CompileTask:
    buckets = (parse_bucket("batch=1:4:4", bundle.manifest.model),)
    return CompileTask(**({"precision": "fp32", "buckets": buckets, "targets": targets or None} | changes))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds take no time: the engine of a graph is a word."""
    layers = record_of().layers

    def build(trt: TensorRT, graph_file: Path, task: BuildTask) -> BuiltEngine:
        content = f"{graph_file.stem} for {task.targets}".encode()
        return BuiltEngine(plan=content, layers=layers, seconds=0.0, activation_bytes=())

    monkeypatch.setattr("unipinrec.runtime.tools.compile.build_engine", build)


@pytest.fixture(scope="module")
def made(
    stored: Bundle, trt: TensorRT, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, tuple[Compiled, ...]]:
    out = tmp_path_factory.mktemp("ahead") / "new" / "bundle"
    digest, done = compile_ahead(stored, out, [task_of(stored, "sm_89", "sm_120")], trt)
    return out, digest, done


def test_the_new_bundle_opens_and_lists_its_engines(
    made: tuple[Path, str, tuple[Compiled, ...]], stored: Bundle, trt: TensorRT
) -> None:
    out, digest, done = made
    bundle = Bundle.open(out)
    assert (bundle.hash, bundle.manifest.parent, bundle.kv_namespace) == (digest, stored.hash, stored.kv_namespace)
    keys = keys_of(stored, task_of(stored, "sm_89", "sm_120"), trt, "")
    assert [engine.graph for engine in bundle.manifest.engines] == GRAPHS
    for engine, one in zip(bundle.manifest.engines, done, strict=True):
        assert (engine.precision, engine.flavor, engine.version) == ("fp32", "tensorrt_rtx", trt.version)
        assert engine.targets == ("sm_89", "sm_120")
        assert engine.key == keys[engine.graph].digest() == one.record.key.digest()
        assert bundle.manifest.files[engine.file].sha256 == one.record.plan_sha256
        assert (out / engine.file).stat().st_size == one.record.size_bytes > 50_000
    assert carried_records(bundle) == [one.record for one in done]
    assert {(one.record.verified.passed, one.record.verified.how) for one in done} == {(False, HOW)}
    assert set(stored.manifest.files) < set(bundle.manifest.files)


def test_damage_to_an_engine_is_damage_to_the_bundle(
    made: tuple[Path, str, tuple[Compiled, ...]], tmp_path: Path
) -> None:
    copy = shutil.copytree(made[0], tmp_path / "copy")
    plan = copy / Bundle.open(copy).manifest.engines[0].file
    content = bytearray(plan.read_bytes())
    content[1000] ^= 1
    plan.write_bytes(content)
    with pytest.raises(BundleCorruptError, match=rf"{plan.name} is altered"):
        Bundle.open(copy)


def test_records_that_are_no_records_are_named(
    made: tuple[Path, str, tuple[Compiled, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(made[0])
    monkeypatch.setattr(SealedFile, "read_bytes", lambda _: b'[{"key": 1}]')
    with pytest.raises(BundleError, match=rf"{RECORDS}: .*; compile its engines again"):
        carried_records(bundle)


@pytest.mark.usefixtures("quick")
def test_engines_are_carried_on_and_replaced(
    made: tuple[Path, str, tuple[Compiled, ...]], trt: TensorRT, tmp_path: Path
) -> None:
    first = Bundle.open(made[0])
    wide = (parse_bucket("batch=1:2:4", first.manifest.model),)
    tasks = [task_of(first, "sm_89", "sm_120", buckets=wide), task_of(first, "portable")]
    compile_ahead(first, tmp_path / "second", tasks, trt)
    second = Bundle.open(tmp_path / "second")
    assert [engine.targets for engine in second.manifest.engines] == [("sm_89", "sm_120")] * 4 + [("portable",)] * 4
    before = {engine.file for engine in first.manifest.engines}
    assert before.isdisjoint(second.manifest.files)
    assert not any((second.path / name).exists() for name in before)
    assert second.kv_namespace == first.kv_namespace
    compile_ahead(second, tmp_path / "third", [task_of(second, "sm_80")], trt)
    assert len(Bundle.open(tmp_path / "third").manifest.engines) == 12


def test_a_bundle_without_engines_carries_none(stored: Bundle) -> None:
    assert carried_records(stored) == []


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"targets": None}, ConfigError, r"^fp32: a bundle carries engines for named targets; give them$"),
        ({"targets": ("sm_90",)}, BackendError, r"has no target sm_90; it has sm_75, sm_80"),
        ({"precision": "fp16"}, ConfigError, r"holds graphs in fp32, not in fp16"),
        ({"targets": ("sm_75",)}, BackendError, r"Turing"),
    ],
)
def test_a_failure_leaves_nothing_behind(
    changes: dict[str, Any], kind: type[Exception], message: str, stored: Bundle, trt: TensorRT, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        compile_ahead(stored, tmp_path / "out", [task_of(stored, "sm_89", **changes)], trt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_an_interruption_leaves_nothing_behind(stored: Bundle, trt: TensorRT, tmp_path: Path) -> None:
    def interrupt(what: str, share: float, phase: str) -> None:
        if what.startswith("retrieval") and phase == "built":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_ahead(stored, tmp_path / "out", [task_of(stored, "sm_89")], trt, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_never_overwritten(made: tuple[Path, str, tuple[Compiled, ...]], trt: TensorRT) -> None:
    bundle = Bundle.open(made[0])
    with pytest.raises(ExportError, match=r"exists; a bundle is never overwritten"):
        compile_ahead(bundle, made[0], [task_of(bundle, "sm_89")], trt)


def test_all_engines_of_a_bundle_are_listed_with_what_is_wrong_with_them(
    made: tuple[Path, str, tuple[Compiled, ...]], trt: TensorRT, tmp_path: Path
) -> None:
    bundle, store = Bundle.open(made[0]), EngineStore(tmp_path / "engines")
    usable, foreign, broken, elsewhere = (one.record for one in made[2])
    store.put(passed(usable, machine=GPU), b"plan")
    store.put(passed(foreign, machine=msgspec.structs.replace(GPU, id="there")), b"plan")
    store.put(passed(broken, machine=GPU), b"plan")
    (store.root / broken.key.digest() / "engine.plan").unlink()
    store.put(
        passed(elsewhere, machine=GPU, key=msgspec.structs.replace(elsewhere.key, graph_sha256="0" * 64)), b"plan"
    )
    cached = [one for one in list_engines(bundle, store, GPU, {"tensorrt_rtx": trt}) if one.source == "cache"]
    problems = {one.id: one.problem for one in cached}
    assert problems.keys() == {record.key.digest() for record in (usable, foreign, broken)}
    assert problems[usable.key.digest()] is None
    assert "was built on another machine" in str(problems[foreign.key.digest()])
    assert "engine.plan is missing" in str(problems[broken.key.digest()])
    without = list_engines(bundle, store, GPU, {})
    assert {one.problem for one in without if one.id == usable.key.digest()} == {
        "TensorRT-RTX is not installed",
        "carried by the bundle; it runs with --allow-bundle-engines, after the golden requests",
    }
    assert [one.record for one in without if one.source == "bundle"] == [one.record for one in made[2]]


def passed(record: Any, **changes: Any) -> Any:
    verified = record_of().verified
    return msgspec.structs.replace(record, **({"verified": verified} | changes))
