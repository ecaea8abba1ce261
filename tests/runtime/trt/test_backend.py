"""The TensorRT backend, over doubles of TensorRT and CUDA that compute the parsed network on host memory."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_tensorrt
import msgspec
import numpy as np
import onnx
import pytest
from answers import NOW_MS, answer, assert_same, engine_of, graph_paths, history
from fake_tensorrt import KERNELS, IExecutionContext, double_backend, make_plan
from host_cuda import HostRuntime, host_cuda

from unipinrec.errors import BackendError
from unipinrec.export.precision.typed import LowType, emulated_graph, typed_graph
from unipinrec.runtime import Bundle
from unipinrec.runtime.bundle.manifest import GraphSpec, TensorSpec
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.golden_check import compare_golden
from unipinrec.runtime.graphs.engine import Encoded, Engine, KvBuffer, pad_histories, row_of
from unipinrec.runtime.trt.backend import TensorRtBackend
from unipinrec.runtime.trt.load import EnginePlan
from unipinrec.runtime.trt.profiles import ProfileShapes, default_buckets, for_graph, parse_bucket

ALL = (1, 8, 64)


def test_golden_requests_reproduce(backend: TensorRtBackend, stored: Bundle) -> None:
    checks = compare_golden(engine_of(backend, stored), stored)
    assert [check.problem for check in checks] == [None] * 8


def test_keys_and_values_are_ranked_where_they_lie(
    backend: TensorRtBackend, stored: Bundle, memory: HostRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(backend, stored)
    bound: dict[str, int] = {}
    set_address = IExecutionContext.set_tensor_address

    def spy(self: IExecutionContext, name: str, memory: int) -> bool:
        bound[name] = memory
        return set_address(self, name, memory)

    monkeypatch.setattr(IExecutionContext, "set_tensor_address", spy)
    encoded = engine.encode(pad_histories([history(stored, 5)]))
    made = {name: bound[name] for name in stored.manifest.model.kv_names("present")}
    copies = memory.calls["cudaMemcpyAsync"]
    engine.rank(encoded, np.array([[1, 2, 3]]), np.zeros(1, np.int64), np.array([NOW_MS]))
    assert memory.calls["cudaMemcpyAsync"] == copies + 2  # all arrays in, the logits out
    for present, address in made.items():
        assert bound[present.replace("present", "past_key_values")] == address
    engine.retrieve(encoded, np.zeros((1, len(stored.manifest.actions)), np.float32))
    assert memory.calls["cudaMemcpyAsync"] == copies + 3  # the queries out


def test_an_encode_copies_once_and_a_shape_that_comes_again_is_not_set_again(
    backend: TensorRtBackend, stored: Bundle, memory: HostRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_shapes: list[str] = []
    set_shape = IExecutionContext.set_input_shape

    def spy(self: IExecutionContext, name: str, shape: tuple[int, ...]) -> bool:
        set_shapes.append(name)
        return set_shape(self, name, shape)

    monkeypatch.setattr(IExecutionContext, "set_input_shape", spy)
    engine = engine_of(backend, stored)
    for events, newly_set in ((5, 5), (5, 0), (4, 5), (4, 0)):
        before = memory.calls["cudaMemcpyAsync"]
        set_shapes.clear()
        engine.encode(pad_histories([history(stored, events)]))
        assert memory.calls["cudaMemcpyAsync"] == before + 1
        assert len(set_shapes) == newly_set


def test_tensors_of_another_gpu_and_of_the_host_are_copied(stored: Bundle, exact: Engine) -> None:
    memories = HostRuntime(), HostRuntime()
    first, second = (double_backend(stored, memory) for memory in memories)
    batch = pad_histories([history(stored, 5)])
    request = (np.array([[1, 2, 3]]), np.zeros(1, np.int64), np.array([NOW_MS]))
    expected = exact.rank(exact.encode(batch), *request)
    elsewhere = engine_of(first, stored).encode(batch)
    np.testing.assert_allclose(engine_of(second, stored).rank(elsewhere, *request), expected, atol=1e-5, rtol=0)
    buffer = KvBuffer(stored.manifest.model, 1, 5 + stored.manifest.model.kv_prefix_slots)
    buffer.put(0, 0, row_of(elsewhere.key_values, 0, 5 + stored.manifest.model.kv_prefix_slots))
    np.testing.assert_allclose(engine_of(second, stored).rank(elsewhere.over(buffer), *request), expected, atol=1e-5)
    assert [memory.faults for memory in memories] == [[], []]


def test_several_threads_get_their_own_answers(stored: Bundle, memory: HostRuntime, exact: Engine) -> None:
    every = default_buckets(stored.manifest.model)[0]
    buckets = (
        msgspec.structs.replace(every, batch=ALL),
        msgspec.structs.replace(every, batch=ALL, candidates=(1, 4, 5)),
    )
    with double_backend(stored, memory, buckets) as backend:
        engine = engine_of(backend, stored)
        seeds = list(range(12)) * 4
        with ThreadPoolExecutor(6) as threads:
            answers = list(threads.map(lambda seed: answer(engine, stored, seed), seeds))
        expected = {seed: answer(exact, stored, seed) for seed in range(12)}
        for seed, found in zip(seeds, answers, strict=True):
            assert_same(found, expected[seed])
    gc.collect()
    assert (memory.left(), memory.faults) == ({}, [])


def test_the_nearest_profile_runs(stored: Bundle, memory: HostRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    every = default_buckets(stored.manifest.model)[0]
    buckets = (every, msgspec.structs.replace(every, batch=ALL), msgspec.structs.replace(every, candidates=(1, 3, 3)))
    backend = double_backend(stored, memory, buckets)
    used: list[int] = []
    execute = IExecutionContext.execute_async_v3

    def spy(self: IExecutionContext, stream_handle: int) -> bool:
        used.append(self._profile)
        return execute(self, stream_handle)

    monkeypatch.setattr(IExecutionContext, "execute_async_v3", spy)
    engine = engine_of(backend, stored)
    encoded = engine.encode(pad_histories([history(stored, 4)]))
    for count in (4, 3):
        engine.rank(encoded, np.zeros((1, count), np.int64), np.zeros(1, np.int64), np.array([NOW_MS]))
    engine.encode(pad_histories([history(stored, 4)] * 9))
    assert used == [0, 0, 2, 1]


def test_shapes_that_no_profile_covers_are_named_with_the_command_that_covers_them(
    backend: TensorRtBackend, stored: Bundle, memory: HostRuntime
) -> None:
    backend.rank_chunk = None  # else the candidates come in runs that are covered
    engine = engine_of(backend, stored)
    encoded = engine.encode(pad_histories([history(stored, 4)]))
    calls = memory.calls.copy()
    with pytest.raises(
        BackendError,
        match=r"ranker: no profile of the engine covers batch 1, past 5, candidates 2000; they cover batch 1 to 1, "
        r"past 2 to \d+, candidates 1 to 1024; or batch .*unipinrec compile BUNDLE --profile batch=1:1:1,cand",
    ) as caught:
        engine.rank(encoded, np.zeros((1, 2000), np.int64), np.zeros(1, np.int64), np.array([NOW_MS]))
    assert memory.calls == calls  # it came before any call
    model = stored.manifest.model
    bucket = parse_bucket(str(caught.value).rpartition("--profile ")[2], model)
    with double_backend(stored, HostRuntime(), (bucket,)) as wider:
        again = engine_of(wider, stored).encode(pad_histories([history(stored, 4)]))
        engine_of(wider, stored).rank(again, np.zeros((1, 2000), np.int64), np.zeros(1, np.int64), np.array([NOW_MS]))


def test_more_candidates_than_any_profile_covers_are_ranked_in_several_runs(
    stored: Bundle, memory: HostRuntime, exact: Engine
) -> None:
    every = default_buckets(stored.manifest.model)[0]
    backend = double_backend(stored, memory, (msgspec.structs.replace(every, candidates=(1, 2, 3)),))
    request = (np.array([[1, 2, 3, 4, 0, 2, 1]]), np.zeros(1, np.int64), np.array([NOW_MS]))
    batch = pad_histories([history(stored, 5)])
    engine = engine_of(backend, stored)
    np.testing.assert_allclose(
        engine.rank(engine.encode(batch), *request), exact.rank(exact.encode(batch), *request), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"surfaces": None}, r"encoder: the inputs are \["),
        ({"actions": np.zeros((1, 3), np.float32)}, r"encoder: actions is float32 \[1, 3\], expected"),
        ({"lengths": np.ones(1, np.int32)}, r"encoder: lengths is int32 \[1\], expected int64"),
        ({"item_vectors": np.full((1, 3, 8), np.nan, np.float32)}, "item_vectors holds values that are not finite"),
    ],
)
def test_inputs_are_checked_before_any_call(
    backend: TensorRtBackend, stored: Bundle, memory: HostRuntime, changes: dict[str, Any], match: str
) -> None:
    sizes = {"batch": 1, "history": 3}
    inputs = {
        spec.name: np.zeros([sizes[size] if isinstance(size, str) else size for size in spec.shape], spec.dtype)
        for spec in stored.manifest.graphs["encoder"].inputs
    }
    if "item_vectors" in changes:
        changes = {"item_vectors": np.full_like(inputs["item_vectors"], np.nan)}
    given = {name: value for name, value in (inputs | changes).items() if value is not None}
    calls = memory.calls.copy()
    with pytest.raises(BackendError, match=match):
        backend.run("encoder", given)
    assert memory.calls == calls


def changed(spec: GraphSpec, output: str, **changes: Any) -> GraphSpec:
    outputs = [msgspec.structs.replace(t, **changes) if t.name == output else t for t in spec.outputs]
    return msgspec.structs.replace(spec, outputs=tuple(outputs))


@pytest.mark.parametrize(
    ("alter", "plan", "match"),
    [
        (
            lambda spec: changed(spec, "queries", dtype="bfloat16"),
            {},
            r"queries is an output of float32 \[-1, 1, 4\], expected an output of bfloat16 \['batch', 1, 4\]",
        ),
        (
            lambda spec: changed(spec, "queries", shape=("batch", 1, 9)),
            {},
            r"queries is .* expected .*\['batch', 1, 9\]",
        ),
        (lambda spec: changed(spec, "queries", shape=("batch", 4)), {}, r"queries is .* expected .*\['batch', 4\]"),
        (lambda spec: changed(spec, "queries", name="other"), {}, "other is missing; queries is not known"),
        (
            lambda spec: msgspec.structs.replace(
                spec, inputs=(*spec.inputs, TensorSpec(name="more", dtype="float32", shape=(1,)))
            ),
            {},
            "more is missing",
        ),
        (
            lambda spec: GraphSpec(file=spec.file, inputs=spec.outputs, outputs=spec.inputs),
            {},
            r"last_hidden_state is an input of float32 .* expected an output of",
        ),
        (lambda spec: spec, {"locations": {"queries": "HOST"}}, "queries is an output of float32 on the host"),
    ],
)
def test_an_engine_of_another_graph_is_refused(
    stored: Bundle, memory: HostRuntime, alter: Callable[[GraphSpec], GraphSpec], plan: dict[str, Any], match: str
) -> None:
    spec = stored.manifest.graphs["retrieval"]
    profiles = for_graph(default_buckets(stored.manifest.model), spec, 1)
    plans = {"retrieval": make_plan(graph_paths(stored)["retrieval"], profiles, **plan)}
    with pytest.raises(
        BackendError,
        match=rf"retrieval: TensorRT 11.4.0.106 loads an engine of another graph: .*{match}.*unipinrec compile BUNDLE",
    ):
        TensorRtBackend(
            fake_tensorrt.fake_tensorrt(memory), host_cuda(memory), plans, {"retrieval": alter(spec)}, "fp32"
        )
    gc.collect()
    assert (memory.left(), memory.faults) == ({}, [])


def test_a_damaged_plan_is_refused_with_tensorrts_own_reason(stored: Bundle, memory: HostRuntime) -> None:
    with pytest.raises(
        BackendError,
        match=r"ranker: TensorRT 11.4.0.106 does not load the engine: Serialization assertion magicTagRead == "
        r"kMAGIC_TAG failed.; if it was compiled .* run unipinrec compile BUNDLE here",
    ):
        TensorRtBackend(
            fake_tensorrt.fake_tensorrt(memory),
            host_cuda(memory),
            {"ranker": b"nonsense"},
            stored.manifest.graphs,
            "fp32",
        )
    assert memory.left() == {}


def test_the_memory_of_a_run_lives_as_long_as_one_of_its_tensors(
    backend: TensorRtBackend, stored: Bundle, memory: HostRuntime
) -> None:
    engine = engine_of(backend, stored)
    batch = pad_histories([history(stored, 4)])
    engine.encode(batch)
    gc.collect()
    before = memory.left()["blocks"]
    encoded: Encoded | None = engine.encode(batch)
    assert encoded is not None
    state = encoded.last_hidden_state
    values = state.numpy()
    del encoded
    gc.collect()
    assert memory.left()["blocks"] == before + 1
    engine.encode(batch)
    np.testing.assert_array_equal(state.numpy(), values)
    del state
    gc.collect()
    assert memory.left()["blocks"] == before


def test_rtx_keeps_the_kernels_that_it_compiled(
    stored: Bundle, memory: HostRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with double_backend(stored, memory, flavor="tensorrt_rtx") as backend:
        kernels = backend.compiled_kernels()
    assert kernels == dict.fromkeys(("encoder", "extend", "retrieval", "ranker"), KERNELS)
    with double_backend(stored, memory, flavor="tensorrt_rtx", kernels=kernels) as backend:
        assert compare_golden(engine_of(backend, stored), stored)[0].problem is None
    assert "compiling" not in caplog.text
    double_backend(stored, memory, flavor="tensorrt_rtx", kernels={"ranker": b"of another GPU"}).close()
    assert re.findall(r"(\w+): the stored kernels are not of this GPU, driver and (.*); compiling", caplog.text) == [
        ("ranker", "TensorRT-RTX 1.7.1.116")
    ]
    with double_backend(stored, memory) as backend:
        assert backend.compiled_kernels() == {}


def test_an_engine_without_weights_gets_them_from_its_graph(
    stored: Bundle, memory: HostRuntime, tmp_path: Path
) -> None:
    spec, file = stored.manifest.graphs["retrieval"], graph_paths(stored)["retrieval"]
    plan = make_plan(file, profiles_of(stored, spec), stripped=True)
    trt, cuda = fake_tensorrt.fake_tensorrt(memory), host_cuda(memory)
    state = {"last_hidden_state": np.ones((1, stored.manifest.model.hidden_size), np.float32)}

    def retrieve(given: bytes | EnginePlan) -> Any:
        with TensorRtBackend(trt, cuda, {"retrieval": given}, {"retrieval": spec}, "fp32") as backend:
            return backend.run("retrieval", state)["queries"].numpy()

    assert np.linalg.norm(retrieve(EnginePlan(content=plan, weights=GraphFile.at(file)))) == pytest.approx(1.0)
    with pytest.raises(BackendError, match=r"retrieval: TensorRT does not run.*the engine has no weights"):
        retrieve(plan)
    with pytest.raises(BackendError, match=r"gone.onnx: its weights do not fit the engine: Failed to parse"):
        retrieve(EnginePlan(content=plan, weights=GraphFile(name="gone.onnx", content=b"", weights={})))
    with pytest.raises(BackendError, match=r"does not put its weights into the engine"):
        retrieve(EnginePlan(content=plan, weights=GraphFile.at(graph_paths(stored)["encoder"])))
    gc.collect()
    assert (memory.left(), memory.faults) == ({}, [])


def test_code_for_the_cpu_is_loaded_only_where_the_engine_was_built_with_it(
    stored: Bundle, memory: HostRuntime
) -> None:
    spec, file = stored.manifest.graphs["retrieval"], graph_paths(stored)["retrieval"]
    plan = make_plan(file, profiles_of(stored, spec), host_code=True)
    trt, cuda = fake_tensorrt.fake_tensorrt(memory), host_cuda(memory)
    with TensorRtBackend(
        trt, cuda, {"retrieval": EnginePlan(content=plan, host_code=True)}, {"retrieval": spec}, "fp32"
    ):
        pass
    with pytest.raises(BackendError, match="does not load the engine: The engine contains host code, which is not all"):
        TensorRtBackend(trt, cuda, {"retrieval": plan}, {"retrieval": spec}, "fp32")


def in_precision(stored: Bundle, folder: Path, precision: LowType) -> tuple[dict[str, bytes], dict[str, GraphSpec]]:
    """Engines and specs of the stored bundle's graphs in less precision; bf16 is emulated between the borders."""
    dtype, kind = {"bf16": ("bfloat16", "BF16"), "fp16": ("float16", "HALF")}[precision]
    rewrite = {"bf16": emulated_graph, "fp16": typed_graph}[precision]
    model, files = stored.manifest.model, graph_paths(stored)
    specs = {"retrieval": stored.manifest.graphs["retrieval"]}
    plans = {"retrieval": make_plan(files["retrieval"], profiles_of(stored, specs["retrieval"]))}
    for name in ("encoder", "extend", "ranker"):
        low = model.kv_names("present") + model.kv_names("past_key_values")
        specs[name] = with_type(stored.manifest.graphs[name], low, dtype)
        onnx.save(rewrite(onnx.load(files[name]), precision), folder / f"{name}.onnx")
        plans[name] = make_plan(
            folder / f"{name}.onnx", profiles_of(stored, specs[name]), types=dict.fromkeys(low, kind)
        )
    return plans, specs


def profiles_of(stored: Bundle, spec: GraphSpec) -> tuple[ProfileShapes, ...]:
    model = stored.manifest.model
    return for_graph(default_buckets(model), spec, model.kv_prefix_slots)


def with_type(spec: GraphSpec, names: list[str], dtype: str) -> GraphSpec:
    inputs, outputs = (
        tuple(msgspec.structs.replace(t, dtype=dtype if t.name in names else t.dtype) for t in tensors)
        for tensors in (spec.inputs, spec.outputs)
    )
    return GraphSpec(file=spec.file, inputs=inputs, outputs=outputs)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_keys_and_values_in_less_precision(
    stored: Bundle, memory: HostRuntime, exact: Engine, tmp_path: Path, precision: LowType, dtype: str
) -> None:
    plans, specs = in_precision(stored, tmp_path, precision)
    trt = fake_tensorrt.fake_tensorrt(memory)
    with TensorRtBackend(trt, host_cuda(memory), plans, specs, precision) as backend:
        engine = engine_of(backend, stored)
        encoded = engine.encode(pad_histories([history(stored, 6)]))
        assert {tensor.dtype for tensor in encoded.key_values} == {dtype}
        assert encoded.last_hidden_state.dtype == "float32"
        values = encoded.key_values[0].numpy()
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, values.astype(specs["ranker"].inputs[0].dtype).astype(np.float32))
        assert_same(answer(engine, stored), answer(exact, stored), atol=0.05)
        grown = engine.extend(encoded, pad_histories([history(stored, 1)]))  # over keys and values that come as f32
        assert grown.lengths.tolist() == [7]
        request = (np.array([[1, 2, 3]]), np.zeros(1, np.int64), np.array([NOW_MS]))
        there = engine.rank(encoded, *request)
        buffer = KvBuffer(stored.manifest.model, 1, 6 + stored.manifest.model.kv_prefix_slots)
        buffer.put(0, 0, row_of(encoded.key_values, 0, 6 + stored.manifest.model.kv_prefix_slots))
        np.testing.assert_array_equal(engine.rank(encoded.over(buffer), *request), there)
        with double_backend(stored, memory, cuda=backend.cuda) as full:  # whose keys and values have another type
            unrounded = engine_of(full, stored).encode(pad_histories([history(stored, 6)]))
            np.testing.assert_allclose(engine.rank(unrounded, *request), there, atol=0.05, rtol=0)
    del encoded, grown, unrounded
    gc.collect()
    assert (memory.left(), memory.faults) == ({}, [])


def test_contexts_are_quiet_and_their_kernels_stay(
    stored: Bundle, memory: HostRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    create = fake_tensorrt.ICudaEngine.create_execution_context

    def spy(self: fake_tensorrt.ICudaEngine, strategy: Any) -> Any:
        made.append(create(self, strategy))
        return made[-1]

    monkeypatch.setattr(fake_tensorrt.ICudaEngine, "create_execution_context", spy)
    double_backend(stored, memory, flavor="tensorrt_rtx").close()
    strategy = fake_tensorrt.DynamicShapesKernelSpecializationStrategy
    assert made
    for context in made:
        assert context.nvtx_verbosity == fake_tensorrt.ProfilingVerbosity.NONE
        assert isinstance(context._how, fake_tensorrt.RtxRuntimeConfig)
        assert context._how.dynamic_shapes_kernel_specialization_strategy == strategy.NONE
        assert context._how.cuda_graph_strategy == fake_tensorrt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    made.clear()
