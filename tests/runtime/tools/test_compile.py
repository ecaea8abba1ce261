"""Nothing is installed that was not built as asked and did not answer the golden requests.

TensorRT and the GPU are doubles that compute in ONNX Runtime; `test_tensorrt_build.py` builds for real.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from answers import STORED, graph_paths
from fake_builder import REPORT, Builder
from fake_tensorrt import KERNELS, fake_tensorrt
from host_cuda import HostRuntime, host_cuda
from onnx import numpy_helper

from unipinrec.errors import BackendError, ConfigError
from unipinrec.export.precision.typed import emulated_graph
from unipinrec.runtime import Bundle
from unipinrec.runtime.bundle.integrity import fingerprint, seal
from unipinrec.runtime.bundle.manifest import Agreement, GraphSpec, PrecisionSpec
from unipinrec.runtime.tools.compile import Compiled, compile_bundle
from unipinrec.runtime.tools.compile_plan import CompileTask
from unipinrec.runtime.trt.library import Flavor
from unipinrec.runtime.trt.profiles import default_buckets, parse_bucket
from unipinrec.runtime.trt.record import BuildOptions
from unipinrec.runtime.trt.store import EngineStore

GRAPHS = ["encoder", "extend", "retrieval", "ranker"]


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    builder = Builder()
    monkeypatch.setattr("unipinrec.runtime.tools.compile.build_engine", builder)
    return builder


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


@pytest.fixture(scope="module")
def opened() -> Bundle:
    return Bundle.open(STORED)


def task_of(bundle: Bundle, **changes: Any) -> CompileTask:
    return CompileTask(**({"precision": "fp32", "buckets": default_buckets(bundle.manifest.model)} | changes))


def compiled(bundle: Bundle, store: EngineStore, flavor: Flavor = "tensorrt", **changes: Any) -> tuple[Compiled, ...]:
    memory = HostRuntime()
    with host_cuda(memory) as cuda:
        done = compile_bundle(bundle, task_of(bundle, **changes), fake_tensorrt(memory, flavor), cuda, store)
    assert (memory.left(), memory.faults) == ({}, [])
    return done


def test_engines_are_installed_once_the_golden_requests_passed(
    opened: Bundle, store: EngineStore, builder: Builder
) -> None:
    done = compiled(opened, store)
    assert [one.record.key.graph for one in done] == builder.graphs == GRAPHS
    assert all(one.built for one in done)
    assert store.entries() == {one.record.key.digest(): one.record for one in done}
    ranker = done[3].record
    assert (ranker.key.precision, ranker.key.flavor, ranker.key.version) == ("fp32", "tensorrt", "11.4.0.106")
    assert (ranker.key.target, ranker.machine.gpu, ranker.machine.architecture) == ("sm_90", "Host GPU", "sm_90")
    assert (ranker.seconds, ranker.activation_bytes) == (0.25, (1, 2))
    assert ranker.verified.passed
    assert ranker.verified.how.startswith("8 outputs of the golden requests differ from PyTorch's by at most ")
    assert store.kernels(ranker) is None


def test_what_is_there_is_kept(opened: Bundle, store: EngineStore, builder: Builder) -> None:
    first = compiled(opened, store)
    builder.graphs.clear()
    again = compiled(opened, store)
    assert builder.graphs == []
    assert [one.record for one in again] == [one.record for one in first]
    assert not any(one.built for one in again)
    assert all(one.built for one in compiled(opened, store, force=True))
    assert builder.graphs == GRAPHS


def test_only_what_is_missing_or_damaged_is_built(opened: Bundle, store: EngineStore, builder: Builder) -> None:
    first = {one.record.key.graph: one.record for one in compiled(opened, store)}
    (store.root / first["extend"].key.digest() / "engine.plan").write_bytes(b"x" * first["extend"].size_bytes)
    store.remove(first["ranker"].key.digest())
    builder.graphs.clear()
    assert [one.built for one in compiled(opened, store)] == [False, True, False, True]
    assert builder.graphs == ["extend", "ranker"]


@pytest.mark.parametrize(
    "changes",
    [
        {"buckets": (parse_bucket("batch=1:2:4", Bundle.open(STORED).manifest.model),)},
        {"options": BuildOptions(optimization_level=5)},
        {"flavor": "tensorrt_rtx"},
    ],
)
def test_other_settings_are_other_engines(
    changes: dict[str, Any], opened: Bundle, store: EngineStore, builder: Builder
) -> None:
    compiled(opened, store)
    assert all(one.built for one in compiled(opened, store, **changes))
    assert len(store.entries()) == 8


def test_kernels_of_tensorrt_rtx_are_kept(opened: Bundle, store: EngineStore, builder: Builder) -> None:
    done = compiled(opened, store, flavor="tensorrt_rtx")
    assert [store.kernels(one.record) for one in done] == [KERNELS] * 4


@pytest.mark.parametrize(
    "options", [BuildOptions(strip_weights=True), BuildOptions(version_compatible=True, strip_weights=True)]
)
def test_engines_are_tried_as_they_will_be_loaded(
    options: BuildOptions, opened: Bundle, store: EngineStore, builder: Builder
) -> None:
    done = compiled(opened, store, options=options)
    assert all(one.record.key.options == options for one in done)


def altered(graph: Path, out: Path, factor: float) -> Path:
    """A graph whose weights are larger."""
    model = onnx.load(graph)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == "float32":
            tensor.CopyFrom(numpy_helper.from_array(values * np.float32(factor), tensor.name))
    onnx.save(model, out)
    return out


def test_an_engine_that_answers_wrongly_is_not_installed(
    opened: Bundle, store: EngineStore, builder: Builder, tmp_path: Path
) -> None:
    builder.instead["ranker"] = altered(graph_paths(opened)["ranker"], tmp_path / "ranker.onnx", 1.01)
    with pytest.raises(
        BackendError,
        match=r"TensorRT 11.4.0.106 on Host GPU in fp32 were not installed: ranker.logits differs by up to",
    ):
        compiled(opened, store)
    assert store.entries() == {}


def test_an_engine_in_another_precision_is_not_installed(opened: Bundle, store: EngineStore, builder: Builder) -> None:
    builder.reports["extend"] = msgspec.structs.replace(REPORT, fallen={"node_linear_3": "float16"})
    with pytest.raises(BackendError, match=r"1 layers do not compute in fp32: node_linear_3 \(float16\)"):
        compiled(opened, store)
    assert store.entries() == {}


@pytest.mark.parametrize("error", [BackendError("no tactic"), KeyboardInterrupt("stop")])
def test_a_failed_or_interrupted_compilation_leaves_nothing(
    error: BaseException, opened: Bundle, store: EngineStore, builder: Builder
) -> None:
    builder.failing["ranker"] = error
    with pytest.raises(type(error), match=str(error)):
        compiled(opened, store)
    assert builder.graphs == GRAPHS
    assert list(store.root.iterdir()) == []


def test_profiles_must_cover_the_golden_requests(opened: Bundle, store: EngineStore, builder: Builder) -> None:
    alone = (parse_bucket("batch=1", opened.manifest.model),)
    with pytest.raises(
        ConfigError, match=r"encoder: the profiles do not cover the golden requests, which need batch=4"
    ):
        compiled(opened, store, buckets=alone)
    few = (parse_bucket("candidates=1", opened.manifest.model),)
    with pytest.raises(ConfigError, match=r"ranker: the profiles do not cover .*candidates="):
        compiled(opened, store, buckets=few)
    assert builder.graphs == []


def test_a_precision_that_the_bundle_lacks_is_refused(opened: Bundle, store: EngineStore, builder: Builder) -> None:
    with pytest.raises(ConfigError, match=r"holds graphs in fp32, not in bf16; export it again with --precision bf16"):
        compiled(opened, store, precision="bf16")


def test_a_cache_that_others_can_reach_is_refused_before_anything_is_built(
    opened: Bundle, store: EngineStore, builder: Builder
) -> None:
    store.root.mkdir(mode=0o755)
    with pytest.raises(BackendError, match=r"engines can be reached by others: its mode is 755"):
        compiled(opened, store)
    assert builder.graphs == []


def test_progress_names_every_engine_and_the_golden_requests(
    opened: Bundle, store: EngineStore, builder: Builder
) -> None:
    told: list[tuple[str, float, str]] = []
    memory = HostRuntime()
    with host_cuda(memory) as cuda:
        compile_bundle(opened, task_of(opened), fake_tensorrt(memory), cuda, store, lambda *step: told.append(step))
    assert told[:3] == [
        ("encoder in fp32", 0.5, "half-way"),
        ("encoder in fp32", 1.0, "built"),
        ("extend in fp32", 0.5, "half-way"),
    ]
    assert told[-2:] == [("golden requests in fp32", 0.0, "running"), ("golden requests in fp32", 1.0, "passed")]


def in_bf16(folder: Path, **lost: Any) -> Bundle:
    """The stored bundle with graphs in bf16, which the doubles emulate in fp32 between low inputs and outputs.

    `lost` is what its manifest says of them, as far as they do not agree with fp32.
    """
    stored = Bundle.open(shutil.copytree(STORED, folder))
    low = {*stored.manifest.model.kv_names("present"), *stored.manifest.model.kv_names("past_key_values")}
    graphs = {}
    for name in ("encoder", "extend", "ranker"):
        spec, file = stored.manifest.graphs[name], f"{name}_bf16.onnx"
        onnx.save(emulated_graph(onnx.load(graph_paths(stored)[name]), "bf16"), folder / file)
        tensors = [
            tuple(msgspec.structs.replace(t, dtype="bfloat16") if t.name in low else t for t in side)
            for side in (spec.inputs, spec.outputs)
        ]
        graphs[name] = GraphSpec(file=file, inputs=tensors[0], outputs=tensors[1])
    (folder / "weights_bf16.bin").write_bytes(b"their weights are inside")
    agreement = Agreement(
        requests=1,
        ranked_overlap=1.0,
        ranked_overlap_strict=1.0,
        retrieved_overlap=1.0,
        retrieved_overlap_strict=1.0,
        min_query_cosine=1.0,
        max_logit_diff=0.0,
        problem=None,
    )
    agreement = msgspec.structs.replace(agreement, **lost)
    manifest = msgspec.structs.replace(
        stored.manifest,
        precisions={"bf16": PrecisionSpec(graphs=graphs, agreement=agreement, auc_change={})},
        files=stored.manifest.files | {path.name: fingerprint(path) for path in folder.glob("*_bf16*")},
    )
    seal(folder, manifest)
    return Bundle.open(folder)


def test_engines_that_round_must_recommend_what_fp32_recommends(
    store: EngineStore, builder: Builder, tmp_path: Path
) -> None:
    bundle = in_bf16(tmp_path / "bundle")
    model = bundle.manifest.model
    builder.types = dict.fromkeys(model.kv_names("present") + model.kv_names("past_key_values"), "BF16")
    done = compiled(bundle, store, precision="bf16")
    assert [one.record.key.precision for one in done] == ["bf16"] * 4
    assert "the best ten overlap with fp32 by 1.0000 ranked and 1.0000 retrieved" in done[0].record.verified.how
    builder.instead["ranker"] = bundle.path / "encoder.onnx"
    with pytest.raises(BackendError, match=r"ranker: TensorRT .* loads an engine of another graph"):
        compiled(bundle, store, precision="bf16", force=True)
    assert [record.verified.passed for record in map(store.find, (one.record.key for one in done))] == [True] * 4  # type: ignore[union-attr]


def test_a_loss_that_was_accepted_at_export_is_accepted_here(
    store: EngineStore, builder: Builder, tmp_path: Path
) -> None:
    for name, lost in (
        ("exact", {}),
        ("lossy", {"problem": "accepted", "max_logit_diff": 10.0, "ranked_overlap": 0.0}),
    ):
        bundle = in_bf16(tmp_path / name, **lost)
        model = bundle.manifest.model
        builder.types = dict.fromkeys(model.kv_names("present") + model.kv_names("past_key_values"), "BF16")
        builder.instead["ranker"] = altered(graph_paths(bundle, "bf16")["ranker"], tmp_path / f"{name}.onnx", 1.5)
        if lost:
            assert all(one.record.verified.passed for one in compiled(bundle, store, precision="bf16"))
        else:
            with pytest.raises(
                BackendError, match=r"in bf16 were not installed: a logit is off by .*, at most 0.1 is allowed"
            ):
                compiled(bundle, store, precision="bf16")
