"""Tensors in a GPU's memory, over host memory."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from host_cuda import CudaError, HostRuntime, host_cuda
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.trt.cuda import Cuda
from unipinrec.runtime.trt.memory import DeviceBlock, DeviceTensor, Reader, Staging, layout, size_bytes


@pytest.fixture
def runtime() -> HostRuntime:
    return HostRuntime(total=1 << 22)


@pytest.fixture
def cuda(runtime: HostRuntime) -> Cuda:
    return host_cuda(runtime)


def test_parts_of_a_block_are_aligned() -> None:
    assert layout([1, 256, 257, 0, 8]) == ([0, 256, 512, 1024, 1024], 1280)
    assert layout([]) == ([], 0)
    assert size_bytes("bfloat16", (2, 3, 5)) == 60
    assert size_bytes("int64", ()) == 8


def test_a_block_is_freed_once(runtime: HostRuntime, cuda: Cuda) -> None:
    kept, dropped = DeviceBlock(cuda, 100, cuda.stream()), DeviceBlock(cuda, 100, cuda.stream())
    assert kept.address != dropped.address
    del dropped
    gc.collect()
    kept.free()
    kept.free()
    del kept
    gc.collect()
    assert runtime.calls["cudaFreeAsync"] == 2
    cuda.close()
    assert (runtime.left(), runtime.faults) == ({}, [])


def test_a_free_that_fails_is_said_and_hides_nothing(
    runtime: HostRuntime, cuda: Cuda, caplog: pytest.LogCaptureFixture
) -> None:
    block = DeviceBlock(cuda, 100, cuda.stream())
    runtime.fail = lambda name: CudaError.cudaErrorIllegalAddress if name == "cudaFreeAsync" else None
    block.free()
    assert "memory of the GPU may be lost: could not free memory of the GPU: cudaErrorIllegalAddress" in caplog.text


def test_all_inputs_go_in_one_copy_and_are_rounded_on_the_way(runtime: HostRuntime, cuda: Cuda) -> None:
    stream = cuda.stream()
    staging = Staging(cuda, stream)
    values = np.array([[1.00390625, 1.0], [3.14159, -2.5e-5]], np.float32)
    arrays: dict[str, NDArray[Any]] = {"exact": values, "bf16": values, "fp16": values[:, ::-1], "rows": np.arange(5)}
    dtypes = {"exact": "float32", "bf16": "bfloat16", "fp16": "float16", "rows": "int64"}
    indices = staging.put(arrays, dtypes)
    cuda.synchronize(stream)
    assert runtime.calls["cudaMemcpyAsync"] == 1
    assert all(address % 256 == 0 for address in indices.values())
    reader = Reader(cuda)
    block = DeviceBlock(cuda, 1, stream)
    tensors = {
        name: DeviceTensor(dtype=dtypes[name], shape=array.shape, address=indices[name], block=block, reader=reader)
        for name, array in arrays.items()
    }
    np.testing.assert_array_equal(tensors["exact"].numpy(), values)
    rounded = tensors["bf16"].numpy()
    assert (rounded.dtype.name, tensors["bf16"].dtype, tensors["bf16"].shape) == ("float32", "bfloat16", (2, 2))
    np.testing.assert_array_equal(rounded, np.array([[1.0, 1.0], [3.140625, -2.5033951e-05]], np.float32))
    np.testing.assert_array_equal(rounded, values.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(tensors["fp16"].numpy(), values[:, ::-1].astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(tensors["rows"].numpy(), np.arange(5))
    assert tensors["rows"].numpy().dtype == np.int64


def test_staging_grows_when_it_has_to_and_only_then(runtime: HostRuntime, cuda: Cuda) -> None:
    stream = cuda.stream()
    staging = Staging(cuda, stream)
    small, large = {"x": np.ones(10, np.float32)}, {"x": np.full(40_000, 2.0, np.float32)}
    assert staging.put({}, {}) == {}
    for arrays in (small, small, large, small, large):
        staging.put(arrays, {"x": "float32"})
        cuda.synchronize(stream)
    assert (runtime.calls["cudaHostAlloc"], runtime.calls["cudaMallocFromPoolAsync"]) == (2, 2)
    assert runtime.left() == {"blocks": 1, "pinned": 1, "streams": 1}
    staging.release()
    staging.release()
    cuda.close()
    assert (runtime.left(), runtime.faults) == ({}, [])


@pytest.mark.parametrize("function", ["cudaMallocFromPoolAsync", "cudaHostAlloc"])
def test_staging_that_could_not_grow_works_again_later(runtime: HostRuntime, cuda: Cuda, function: str) -> None:
    stream = cuda.stream()
    staging = Staging(cuda, stream)
    staging.put({"x": np.zeros(10, np.float32)}, {"x": "float32"})
    cuda.synchronize(stream)
    runtime.fail = lambda name: CudaError.cudaErrorMemoryAllocation if name == function else None
    with pytest.raises(BackendError, match="cudaErrorMemoryAllocation"):
        staging.put({"x": np.zeros(100_000, np.float32)}, {"x": "float32"})
    runtime.fail = lambda name: None
    staging.put({"x": np.zeros(100_000, np.float32)}, {"x": "float32"})
    cuda.synchronize(stream)
    assert runtime.left() == {"blocks": 1, "pinned": 1, "streams": 1}
    assert runtime.faults == []


def tensor(cuda: Cuda, reader: Reader, values: NDArray[np.float32]) -> DeviceTensor:
    stream = cuda.stream()
    block = DeviceBlock(cuda, values.nbytes, stream)
    pinned = cuda.host_alloc(values.nbytes)
    pinned.view[:] = values.view(np.uint8)
    cuda.copy_in(block.address, pinned.address, values.nbytes, stream)
    cuda.synchronize(stream)
    return DeviceTensor(dtype="float32", shape=values.shape, address=block.address, block=block, reader=reader)


def test_several_threads_read_at_the_same_time(runtime: HostRuntime, cuda: Cuda) -> None:
    reader = Reader(cuda)
    given = [np.full(1000 + n, n, np.float32) for n in range(24)]
    tensors = [tensor(cuda, reader, values) for values in given]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda t: t.numpy(), tensors * 5))
    for values, expected in zip(found, given * 5, strict=True):
        np.testing.assert_array_equal(values, expected)
    assert runtime.faults == []


@pytest.mark.parametrize(
    "function", ["cudaStreamCreateWithFlags", "cudaHostAlloc", "cudaMemcpyAsync", "cudaStreamSync"]
)
def test_a_copy_that_fails_leaves_nothing_behind(runtime: HostRuntime, cuda: Cuda, function: str) -> None:
    reader = Reader(cuda)
    given = tensor(cuda, reader, np.arange(7, dtype=np.float32))
    failures = [CudaError.cudaErrorLaunchFailure]
    runtime.fail = lambda name: failures.pop() if failures and name.startswith(function) else None
    with pytest.raises(BackendError, match="cudaErrorLaunchFailure"):
        given.numpy()
    np.testing.assert_array_equal(given.numpy(), np.arange(7))
    reader.release()
    del given
    gc.collect()
    cuda.close()
    assert (runtime.left(), runtime.faults) == ({}, [])


def test_a_tensor_cannot_be_read_once_the_reader_is_closed(runtime: HostRuntime, cuda: Cuda) -> None:
    reader = Reader(cuda)
    given = tensor(cuda, reader, np.zeros(7, np.float32))
    reader.release()
    with pytest.raises(BackendError, match="the graphs were closed, and their outputs cannot be read any more"):
        given.numpy()
    assert given.shape == (7,)
    assert given.lies_on(cuda)
    assert not given.lies_on(host_cuda(runtime))
