"""Keys change with all that they cover, and an engine that does not belong here is refused with its reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from answers import STORED
from engine_records import HERE, KEY, need_of, record_of

from unipinrec.runtime import Bundle
from unipinrec.runtime.trt import record as engine_record
from unipinrec.runtime.trt.cuda import GpuInfo
from unipinrec.runtime.trt.library import TensorRT
from unipinrec.runtime.trt.record import (
    BuildOptions,
    EngineKey,
    Verification,
    engine_host,
    graph_hash,
    needs_of,
    runs_on,
    unfit,
)

OTHER: dict[str, Any] = {
    "graph": "encoder",
    "graph_sha256": "b" * 64,
    "precision": "fp16",
    "profiles": ({"x": ((1, 2), (4, 2), (9, 2))},),
    "flavor": "tensorrt_rtx",
    "version": "11.4.0.107",
    "target": "sm_89",
}
OTHER_OPTIONS: dict[str, Any] = {
    "optimization_level": 5,
    "workspace_bytes": 2**30,
    "strip_weights": True,
    "version_compatible": True,
}


def test_every_field_of_a_key_is_varied_below() -> None:
    assert {*OTHER, "options"} == set(EngineKey.__struct_fields__)
    assert set(OTHER_OPTIONS) == set(BuildOptions.__struct_fields__)


@pytest.mark.parametrize("field", OTHER)
def test_a_key_changes_with_every_field(field: str) -> None:
    changed = msgspec.structs.replace(KEY, **{field: OTHER[field]})
    assert changed.digest() != KEY.digest()
    assert changed.digest() == msgspec.structs.replace(KEY, **{field: OTHER[field]}).digest()


@pytest.mark.parametrize("field", OTHER_OPTIONS)
def test_a_key_changes_with_every_option(field: str) -> None:
    options = msgspec.structs.replace(KEY.options, **{field: OTHER_OPTIONS[field]})
    assert msgspec.structs.replace(KEY, options=options).digest() != KEY.digest()


def test_a_key_names_the_same_entry_in_every_process() -> None:
    assert KEY.digest() == "0f6e8142fc00f7473a827b795983888647a02ece4a686a7a25ec47d6770adb6c"
    reordered = msgspec.structs.replace(KEY, profiles=({"b": ((1,), (2,), (3,)), "a": ((1,), (1,), (1,))},))
    ordered = msgspec.structs.replace(KEY, profiles=({"a": ((1,), (1,), (1,)), "b": ((1,), (2,), (3,))},))
    assert reordered.digest() == ordered.digest()


def test_an_engine_that_belongs_here_fits() -> None:
    assert unfit(record_of(), need_of(), HERE) is None
    driver = msgspec.structs.replace(HERE, driver="13.1")
    assert unfit(record_of(), need_of(), driver) is None


@pytest.mark.parametrize(
    ("needed", "machine", "reason"),
    [
        ({"graph_sha256": "b" * 64}, {}, "was built from another graph"),
        ({"graph": "encoder"}, {}, "was built from another graph"),
        ({"precision": "fp32"}, {}, "was built from another graph"),
        ({"version": "11.5.0.1"}, {}, "was built with TensorRT 11.4.0.106, here is TensorRT 11.5.0.1"),
        ({"flavor": "tensorrt_rtx"}, {}, "was built with TensorRT 11.4.0.106, here is TensorRT-RTX 11.4.0.106"),
        ({}, {"architecture": "sm_89"}, "was built for sm_90, here is sm_89"),
        ({}, {"architecture": ""}, "was built for sm_90, here is no GPU"),
        ({}, {"id": "there"}, "was built on another machine; a plan is executable code"),
        ({}, {"gpu": "NVIDIA H100"}, "was built on a NVIDIA H200, here is a NVIDIA H100"),
    ],
)
def test_an_engine_that_does_not_is_refused(needed: dict[str, Any], machine: dict[str, Any], reason: str) -> None:
    refusal = unfit(record_of(), need_of(**needed), msgspec.structs.replace(HERE, **machine))
    assert refusal is not None
    assert reason in refusal.reason
    assert refusal.remedy == "run unipinrec compile BUNDLE"


def test_an_engine_that_has_not_answered_the_golden_requests_is_refused() -> None:
    record = record_of(verified=Verification(passed=False, how="built ahead of time"))
    refusal = unfit(record, need_of(), HERE)
    assert refusal is not None
    assert refusal.reason == "the engine of ranker in bf16 has not passed the golden requests: built ahead of time"


@pytest.mark.parametrize(
    ("version", "fits"),
    [("11.4.0.106", True), ("11.4.1.1", True), ("11.10.0.1", True), ("11.3.9.9", False), ("12.0.0.1", False)],
)
def test_a_version_compatible_engine_fits_later_versions_of_its_major(version: str, fits: bool) -> None:
    key = msgspec.structs.replace(KEY, options=BuildOptions(version_compatible=True))
    assert (unfit(record_of(key), need_of(version=version), HERE) is None) is fits


@pytest.mark.parametrize(
    ("target", "architecture", "runs"),
    [
        ("sm_89,sm_120", "sm_120", True),
        ("sm_89,sm_120", "sm_12", False),
        ("sm_89,sm_120", "sm_90", False),
        ("portable", "sm_75", False),
        ("portable", "sm_80", True),
        ("portable", "sm_120", True),
        ("portable", "", False),
        ("sm_90", "", False),
    ],
)
def test_which_gpus_a_target_runs_on(target: str, architecture: str, runs: bool) -> None:
    assert runs_on(target, architecture) is runs


def test_a_machine_shows_a_hash_of_its_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    identity, empty = tmp_path / "machine-id", tmp_path / "empty"
    identity.write_text("0123456789abcdef\n")
    empty.touch()
    monkeypatch.setattr(engine_record, "MACHINE_IDS", (tmp_path / "absent", empty, identity))
    machine = engine_host(GpuInfo(name="NVIDIA H200", architecture="sm_90", driver_version="13.0", memory_bytes=1))
    assert machine.id == "da7ceff4e6143568b6d858b5719c7fa55a918d9d16f23783635f1a0afcd00402"
    assert (machine.gpu, machine.architecture, machine.driver) == ("NVIDIA H200", "sm_90", "13.0")
    identity.write_text("another")
    assert engine_host().id != machine.id
    monkeypatch.setattr(engine_record, "MACHINE_IDS", ())
    assert len(engine_host().id) == 64


def test_a_graph_is_hashed_with_the_weights_that_it_refers_to(tmp_path: Path, reseal: Callable[[Path], None]) -> None:
    folder = shutil.copytree(STORED, tmp_path / "copy")
    with (folder / "extend.onnx").open("ab") as graph:
        graph.write(b"\x0a\x08location\x12\x0bweights.bin")
    reseal(folder)
    stored = Bundle.open(folder)
    files = stored.manifest.files

    def altered(name: str) -> set[str]:
        """Graphs whose hash changes with a file."""
        changed = msgspec.structs.replace(
            stored.manifest, files=files | {name: msgspec.structs.replace(files[name], sha256="0" * 64)}
        )
        after = replace(stored, manifest=changed)
        graphs = changed.graphs_in("fp32")
        return {graph for graph in graphs if graph_hash(after, graph, "fp32") != graph_hash(stored, graph, "fp32")}

    assert altered("ranker.onnx") == {"ranker"}
    assert altered("weights.bin") == {"extend"}
    assert altered("items.safetensors") == set()
    assert len({graph_hash(stored, graph, "fp32") for graph in stored.manifest.graphs_in("fp32")}) == 4


def test_a_copied_bundle_needs_the_same_engines(tmp_path: Path) -> None:
    trt = TensorRT(module=None, flavor="tensorrt", version="11.4.0.106")
    needs = needs_of(Bundle.open(STORED), "fp32", trt)
    assert list(needs) == ["encoder", "extend", "retrieval", "ranker"]
    assert needs_of(Bundle.open(shutil.copytree(STORED, tmp_path / "copy")), "fp32", trt) == needs
    assert {(need.precision, need.flavor, need.version) for need in needs.values()} == {
        ("fp32", "tensorrt", "11.4.0.106")
    }


def test_machines_of_a_fleet_share_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = GpuInfo(name="NVIDIA H200", architecture="sm_90", driver_version="13.0", memory_bytes=1)
    hosts = []
    for container in ("one", "two"):
        (tmp_path / container).write_text(container)
        monkeypatch.setattr(engine_record, "MACHINE_IDS", (tmp_path / container,))
        monkeypatch.delenv("UNIPINREC_FLEET", raising=False)
        alone = engine_host(gpu)
        monkeypatch.setenv("UNIPINREC_FLEET", "pool-a")
        hosts.append((alone, engine_host(gpu)))
    assert hosts[0][0] != hosts[1][0]
    assert hosts[0][1] == hosts[1][1]
    other = GpuInfo(name="NVIDIA B200", architecture="sm_100", driver_version="13.0", memory_bytes=1)
    assert engine_host(other) != hosts[0][1]
    monkeypatch.setenv("UNIPINREC_FLEET", "pool-b")
    assert engine_host(gpu) != hosts[0][1]
