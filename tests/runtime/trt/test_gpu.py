"""The CUDA wrapper and TensorRT's engines on a GPU, with whichever TensorRT is installed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from answers import answer, assert_same, engine_of, graph_paths, history

from unipinrec.errors import BackendError
from unipinrec.runtime import Bundle
from unipinrec.runtime.golden_check import compare_golden
from unipinrec.runtime.graphs.engine import Engine, pad_histories
from unipinrec.runtime.machine import driver_problem
from unipinrec.runtime.trt.backend import TensorRtBackend
from unipinrec.runtime.trt.build import BuildTask, build_engine
from unipinrec.runtime.trt.cuda import Cuda, GpuInfo, probe_gpu
from unipinrec.runtime.trt.library import TensorRT, import_tensorrt
from unipinrec.runtime.trt.memory import DeviceBlock, DeviceTensor, Reader, Staging
from unipinrec.runtime.trt.profiles import default_buckets, for_graph

pytestmark = pytest.mark.gpu
SLACK = 32 << 20  # bytes that libraries may take for themselves between two measurements


@pytest.fixture(scope="module")
def cuda() -> Iterator[Cuda]:
    problem = driver_problem()
    if problem:
        pytest.skip(problem)
    with Cuda.open() as opened:
        yield opened


@pytest.fixture(scope="module")
def trt(cuda: Cuda) -> TensorRT:
    try:
        return import_tensorrt()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def plans(trt: TensorRT, stored: Bundle) -> dict[str, bytes]:
    """Engines of the stored bundle, built here."""
    model, specs = stored.manifest.model, stored.manifest.graphs_in("fp32")
    built = {}
    for name, file in graph_paths(stored).items():
        profiles = for_graph(default_buckets(model), specs[name], model.kv_prefix_slots)
        built[name] = build_engine(trt, file, BuildTask(profiles=profiles)).plan
    return built


def opened(trt: TensorRT, cuda: Cuda, stored: Bundle, plans: dict[str, bytes]) -> TensorRtBackend:
    return TensorRtBackend(trt, cuda, plans, stored.manifest.graphs_in("fp32"), "fp32")


def test_what_goes_in_comes_out(cuda: Cuda) -> None:
    stream = cuda.stream()
    staging, reader = Staging(cuda, stream), Reader(cuda)
    values = np.random.default_rng(0).standard_normal((3, 1000), np.float32)
    for dtype, rounding in (("float32", 0.0), ("bfloat16", 2.0**-8), ("float16", 2.0**-10)):
        address = staging.put({"x": values}, {"x": dtype})["x"]
        assert address % 256 == 0
        cuda.synchronize(stream)
        block = DeviceBlock(cuda, 1, stream)
        given = DeviceTensor(dtype=dtype, shape=values.shape, address=address, block=block, reader=reader)
        np.testing.assert_allclose(given.numpy(), values, rtol=rounding, atol=1e-7)
        block.free()
    reader.release()
    staging.release()
    cuda.destroy(stream)


def test_the_gpu_is_described(cuda: Cuda) -> None:
    assert probe_gpu() == cuda.info
    assert isinstance(cuda.info, GpuInfo)
    assert cuda.info.architecture.startswith("sm_")
    free, total = cuda.memory_info()
    assert 0 < free <= total
    assert total == pytest.approx(cuda.info.memory_bytes, rel=0.1)


def test_too_little_memory_is_an_error_and_not_the_end(cuda: Cuda) -> None:
    stream = cuda.stream()
    with pytest.raises(
        BackendError, match=r"could not allocate [\d,]+ bytes on the GPU: cudaErrorMemoryAllocation \(out"
    ):
        cuda.malloc(1 << 50, stream)
    pointer = cuda.malloc(1 << 20, stream)
    cuda.destroy(stream)
    cuda.free(pointer, stream)


def test_golden_requests_reproduce(trt: TensorRT, cuda: Cuda, stored: Bundle, plans: dict[str, bytes]) -> None:
    with opened(trt, cuda, stored, plans) as backend:
        assert [check.problem for check in compare_golden(engine_of(backend, stored), stored)] == [None] * 8


def test_several_threads_get_their_own_answers(
    trt: TensorRT, cuda: Cuda, stored: Bundle, plans: dict[str, bytes], exact: Engine
) -> None:
    seeds = list(range(8)) * 8
    with opened(trt, cuda, stored, plans) as backend, ThreadPoolExecutor(8) as threads:
        engine = engine_of(backend, stored)
        answers = list(threads.map(lambda seed: answer(engine, stored, seed), seeds))
        expected = {seed: answer(exact, stored, seed) for seed in range(8)}
        for seed, found in zip(seeds, answers, strict=True):
            assert_same(found, expected[seed], atol=1e-4)


def test_nothing_is_lost_to_runs_or_to_loading(
    trt: TensorRT, cuda: Cuda, stored: Bundle, plans: dict[str, bytes]
) -> None:
    def serve(runs: int) -> None:
        with opened(trt, cuda, stored, plans) as backend:
            engine = engine_of(backend, stored)
            for seed in range(runs):
                answer(engine, stored, seed)
            with pytest.raises(BackendError, match="no profile of the engine covers"):
                engine.encode(pad_histories([history(stored, 4)] * 500))

    serve(5)
    gc.collect()
    before, _ = cuda.memory_info()
    for _ in range(3):
        serve(200)
    gc.collect()
    after, _ = cuda.memory_info()
    assert before - after < SLACK


def test_a_damaged_plan_is_refused(trt: TensorRT, cuda: Cuda, stored: Bundle, plans: dict[str, bytes]) -> None:
    with pytest.raises(BackendError, match=r"retrieval: TensorRT.* does not load the engine: "):
        opened(trt, cuda, stored, {"retrieval": b"\0" * 64})
    with pytest.raises(BackendError, match=r"ranker: TensorRT.* loads an engine of another graph: "):
        opened(trt, cuda, stored, {"ranker": plans["retrieval"]})
