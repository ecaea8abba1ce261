"""The CUDA wrapper, over host memory; `gpu` tests do the same on a GPU."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host_cuda import (
    DEVICE,
    CudaError,
    HostRuntime,
    MemAllocationType,
    MemcpyKind,
    MemLocationType,
    MemPoolAttr,
    host_cuda,
)

from unipinrec.errors import BackendError
from unipinrec.runtime import machine
from unipinrec.runtime.trt import cuda as wrapper
from unipinrec.runtime.trt.cuda import Cuda, GpuInfo, probe_gpu

ENUMS: dict[str, type[IntEnum]] = {
    "cudaError_t": CudaError,
    "cudaMemcpyKind": MemcpyKind,
    "cudaMemAllocationType": MemAllocationType,
    "cudaMemLocationType": MemLocationType,
    "cudaMemPoolAttr": MemPoolAttr,
}


@pytest.fixture
def runtime() -> HostRuntime:
    return HostRuntime(total=1 << 20)


def fail_on(runtime: HostRuntime, function: str, error: CudaError = CudaError.cudaErrorLaunchFailure) -> None:
    runtime.fail = lambda name: error if name == function else None


def test_what_is_copied_in_comes_out(runtime: HostRuntime) -> None:
    cuda = host_cuda(runtime)
    stream = cuda.stream()
    there, here = cuda.host_alloc(1000), cuda.host_alloc(1000)
    there.view[:] = np.arange(1000) % 251
    pointer = cuda.malloc(1000, stream)
    assert pointer % 256 == 0
    cuda.copy_in(pointer, there.address, 1000, stream)
    cuda.copy_out(here.address, pointer, 1000, stream)
    cuda.synchronize(stream)
    np.testing.assert_array_equal(here.view, there.view)
    assert len(here.view) == 1000
    cuda.free(pointer, stream)
    cuda.host_free(there)
    cuda.host_free(there)
    cuda.close()
    assert (runtime.left(), runtime.faults) == ({}, [])


def test_it_says_what_it_is(runtime: HostRuntime) -> None:
    cuda = host_cuda(runtime)
    assert (cuda.info.name, cuda.info.architecture, cuda.info.driver_version) == ("Host GPU", "sm_90", "13.0")
    assert cuda.info.memory_bytes == 1 << 20
    pointer = cuda.malloc(1 << 10, cuda.stream())
    assert cuda.memory_info() == ((1 << 20) - (1 << 10), 1 << 20)
    cuda.free(pointer, 0)
    assert cuda.memory_info() == (1 << 20, 1 << 20)


@pytest.mark.parametrize(
    ("function", "use", "match"),
    [
        (
            "cudaMallocFromPoolAsync",
            lambda cuda: cuda.malloc(5000, cuda.stream()),
            "could not allocate 5,000 bytes on the GPU",
        ),
        ("cudaHostAlloc", lambda cuda: cuda.host_alloc(5000), "could not pin 5,000 bytes of host memory"),
        ("cudaStreamCreateWithFlags", lambda cuda: cuda.stream(), "could not make a stream"),
        ("cudaStreamSynchronize", lambda cuda: cuda.synchronize(cuda.stream()), "could not wait for the GPU"),
        ("cudaMemcpyAsync", lambda cuda: cuda.copy_in(0, 0, 9, cuda.stream()), "could not copy 9 bytes to the GPU"),
        ("cudaMemcpyAsync", lambda cuda: cuda.copy_out(0, 0, 9, cuda.stream()), "could not copy 9 bytes from the GPU"),
        ("cudaSetDevice", lambda cuda: cuda.activate(), "could not use GPU 1"),
        ("cudaMemGetInfo", lambda cuda: cuda.memory_info(), "could not ask for free memory"),
    ],
)
def test_an_error_has_cudas_name_its_text_and_a_remedy(
    runtime: HostRuntime, function: str, use: Callable[[Cuda], object], match: str
) -> None:
    cuda = host_cuda(runtime)
    fail_on(runtime, function)
    with pytest.raises(
        BackendError, match=rf"{match}: cudaErrorLaunchFailure \(unspecified launch failure\); a GPU tha"
    ):
        use(cuda)


@pytest.mark.parametrize("function", ["cudaGetDeviceProperties", "cudaSetDevice", "cudaMemPoolCreate"])
def test_a_gpu_that_is_not_there(runtime: HostRuntime, function: str) -> None:
    fail_on(runtime, function, CudaError.cudaErrorInvalidDevice)
    with pytest.raises(
        BackendError, match=r"GPU 1: cudaErrorInvalidDevice \(invalid device ordinal\); check that nvid"
    ):
        host_cuda(runtime)


def test_too_little_memory_is_said_in_bytes(runtime: HostRuntime) -> None:
    cuda = host_cuda(runtime)
    cuda.malloc(1_000_000, cuda.stream())
    with pytest.raises(
        BackendError,
        match=r"could not allocate 100,000 bytes on the GPU: cudaErrorMemoryAllocation \(out of memory\), 48,576 of "
        r"1,048,576 bytes are free; end other processes",
    ):
        cuda.malloc(100_000, cuda.stream())


def test_memory_outlives_its_stream_and_the_gpu_being_closed(runtime: HostRuntime) -> None:
    cuda = host_cuda(runtime)
    first, second = cuda.stream(), cuda.stream()
    early, late = cuda.malloc(10, first), cuda.malloc(10, second)
    cuda.destroy(first)
    cuda.destroy(first)
    cuda.free(early, first)
    assert runtime.left() == {"blocks": 1, "streams": 1}
    cuda.host_alloc(10)
    cuda.close()
    cuda.close()
    assert runtime.left() == {"blocks": 1}
    cuda.free(late, second)
    assert (runtime.left(), runtime.faults) == ({}, [])
    assert runtime.calls["cudaMemPoolDestroy"] == 1
    assert runtime.pools == set()
    for use in (lambda: cuda.malloc(1, 0), lambda: cuda.host_alloc(1), cuda.stream):
        with pytest.raises(BackendError, match="GPU 1 was closed; open it again"):
            use()


def test_any_thread_may_use_it(runtime: HostRuntime) -> None:
    cuda = host_cuda(runtime)

    def use() -> int:
        cuda.host_free(cuda.host_alloc(10))
        return cuda.malloc(10, cuda.stream())

    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        second.submit(cuda.free, first.submit(use).result(), 0).result()
    cuda.close()
    assert (runtime.left(), runtime.faults) == ({}, [])


def test_it_closes_itself_behind_a_block(runtime: HostRuntime) -> None:
    with host_cuda(runtime) as cuda:
        cuda.stream()
    assert runtime.left() == {}


def test_a_function_that_the_bindings_do_not_have(runtime: HostRuntime) -> None:
    cuda = host_cuda(runtime)
    runtime.cudaStreamCreateWithFlags = None  # type: ignore[method-assign, assignment]
    with pytest.raises(BackendError, match="could not make a stream: cudaStreamCreateWithFlags failed: 'NoneType'"):
        cuda.stream()


def test_without_a_driver_the_message_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DRIVER", "libnothing.so.7")
    reason = r"there is no NVIDIA driver here \(libnothing.so.7 is not found\); check that nvidia-smi lists the GPU"
    with pytest.raises(BackendError, match=reason):
        Cuda.open()
    found = probe_gpu()
    assert isinstance(found, str)
    assert re.match(reason, found)


def test_a_driver_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "driver.c").write_text(
        "int cuInit(unsigned flags) { return 100; }\n"
        'int cuGetErrorName(int code, const char **name) { *name = "CUDA_ERROR_NO_DEVICE"; return 0; }\n'
    )
    library = tmp_path / "libdriver.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "driver.c")], check=True)
    monkeypatch.setattr(machine, "DRIVER", str(library))
    assert probe_gpu() == (
        "the NVIDIA driver does not start: CUDA_ERROR_NO_DEVICE (100); check that nvidia-smi lists the GPU, and that "
        "the container was started with access to it"
    )


def test_bindings_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "driver_problem", lambda: None)
    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        BackendError, match=r"cuda-bindings is not installed \(.*\); run pip install 'unipinrec\[gpu\]'"
    ):
        Cuda.open()


def test_a_probe_answers_with_what_is_there(runtime: HostRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "import_cuda", lambda: SimpleNamespace(runtime=runtime))
    found = GpuInfo(name="Host GPU", architecture="sm_90", driver_version="13.0", memory_bytes=1 << 20)
    assert probe_gpu(DEVICE) == found
    assert runtime.calls["cudaSetDevice"] == 0  # which would take some of its memory
    monkeypatch.setattr(wrapper, "import_cuda", lambda: 1 / 0)
    assert probe_gpu() == "division by zero"


def real_runtime() -> Any:
    return pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")


def parameters(docstring: str, function: str) -> list[str]:
    """Names in the first line, as in "cudaMemcpyAsync(dst, src, size_t count, kind: cudaMemcpyKind, stream)"."""
    found = re.match(rf"\s*{function}\((.*)\)", docstring)
    assert found, docstring
    return [part.split(":")[0].split()[-1] for part in found[1].split(",") if part.strip()]


def test_the_double_has_the_functions_of_the_real_bindings() -> None:
    real = real_runtime()
    functions = [name for name in vars(HostRuntime) if name.startswith("cuda") and callable(getattr(HostRuntime, name))]
    functions = [name for name in functions if not isinstance(getattr(HostRuntime, name), type)]
    functions.remove("cudaMemPoolProps")  # a class of theirs
    properties = real.cudaMemPoolProps()
    assert {"allocType", "location"} <= set(dir(properties))
    assert {"type", "id"} <= set(dir(properties.location))
    assert len(functions) == 17
    for name in functions:
        ours = [*inspect.signature(getattr(HostRuntime, name)).parameters][1:]
        theirs = parameters(getattr(real, name).__doc__, name)
        assert [n.lower() for n in ours] == [n.lower() for n in theirs], name


def test_the_double_has_the_constants_of_the_real_bindings() -> None:
    real = real_runtime()
    for name, ours in ENUMS.items():
        theirs = getattr(real, name)
        assert {m.name: int(getattr(theirs, m.name)) for m in ours} == {m.name: m.value for m in ours}
    assert real.cudaHostAllocDefault == HostRuntime.cudaHostAllocDefault
    assert real.cudaStreamNonBlocking == HostRuntime.cudaStreamNonBlocking


def test_the_wrapper_calls_nothing_that_the_double_does_not_have() -> None:
    called = set(re.findall(r"\bcuda[A-Z]\w+", inspect.getsource(Cuda) + inspect.getsource(wrapper.describe)))
    known = set(dir(HostRuntime)) | {member.name for ours in ENUMS.values() for member in ours}
    assert called <= known


def test_the_real_bindings_say_why_they_do_not_work_here() -> None:
    real_runtime()
    if machine.driver_problem() is None:
        pytest.skip("there is a driver")
    import cuda.bindings

    with pytest.raises(BackendError, match=r"could not look at GPU 0: cudaError\w+ \(.+\); (install a newer|check)"):
        Cuda(cuda.bindings)
    assert int(cuda.bindings.driver.cuuint64_t(wrapper.KEEP_ALL)) == 2**64 - 1
