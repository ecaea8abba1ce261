"""What the TensorRT backend does when something fails, or is closed: over doubles of TensorRT and CUDA."""

from __future__ import annotations

import contextlib
import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from answers import answer, assert_same, engine_of, history
from fake_tensorrt import IExecutionContext, double_backend, fake_tensorrt, make_plan
from host_cuda import CLEANING, CudaError, FailOnce, HostRuntime, Injected, host_cuda
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime import Bundle
from unipinrec.runtime.graphs.engine import Engine, pad_histories
from unipinrec.runtime.trt.backend import TensorRtBackend
from unipinrec.runtime.trt.profiles import default_buckets, for_graph

GOES_ON = CLEANING | {"cudaSetDevice"}  # cleaning up goes on without what cannot be freed


def refuse(*_: Any) -> bool:
    return False


def crash(*_: Any) -> bool:
    raise RuntimeError("myelin is unhappy")


@pytest.mark.parametrize(
    ("method", "with_what", "match"),
    [
        ("set_input_shape", refuse, r"encoder: TensorRT takes no \[1, 4, 4\] for item_vectors"),
        ("infer_shapes", lambda self: ["lengths"], "encoder: TensorRT cannot tell the shapes of lengths"),
        ("get_tensor_shape", lambda self, name: (1, -1), "encoder: TensorRT cannot tell the shapes of present.0.key"),
        ("set_tensor_address", refuse, "encoder: TensorRT takes no address for"),
        ("execute_async_v3", refuse, "encoder: TensorRT does not run"),
        ("execute_async_v3", crash, "encoder: TensorRT failed: myelin is unhappy"),
        ("infer_shapes", crash, "encoder: TensorRT failed: myelin is unhappy"),
    ],
)
def test_what_tensorrt_refuses_is_an_error_and_the_next_run_is_right(
    backend: TensorRtBackend, stored: Bundle, exact: Engine, method: str, with_what: Any, match: str
) -> None:
    engine = engine_of(backend, stored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IExecutionContext, method, with_what)
        with pytest.raises(BackendError, match=match):
            engine.encode(pad_histories([history(stored, 4)]))
    assert_same(answer(engine, stored), answer(exact, stored))


def test_shapes_that_were_half_set_are_set_again(
    backend: TensorRtBackend, stored: Bundle, exact: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(backend, stored)
    set_shape = IExecutionContext.set_input_shape
    batch = pad_histories([history(stored, 4), history(stored, 4, seed=1)])
    expected = exact.encode(batch).last_hidden_state.numpy()
    engine.encode(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            IExecutionContext,
            "set_input_shape",
            lambda self, name, shape: name != "lengths" and set_shape(self, name, shape),
        )
        with pytest.raises(BackendError, match=r"encoder: TensorRT takes no \[2\] for lengths"):
            engine.encode(pad_histories([history(stored, 5)] * 2))
    np.testing.assert_allclose(engine.encode(batch).last_hidden_state.numpy(), expected, atol=1e-5, rtol=0)


def test_a_failed_run_gives_its_memory_back_while_its_error_is_handled(
    backend: TensorRtBackend, stored: Bundle, memory: HostRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(backend, stored)
    batch = pad_histories([history(stored, 4)])
    engine.encode(batch)
    gc.collect()
    left = memory.left()
    monkeypatch.setattr(IExecutionContext, "execute_async_v3", refuse)
    with pytest.raises(BackendError, match="encoder: TensorRT does not run") as caught:
        engine.encode(batch)
    assert memory.left() == left
    assert caught.value.__traceback__ is not None  # which holds all that the run had


def test_a_load_that_failed_gives_everything_back_while_its_error_is_handled(
    stored: Bundle, memory: HostRuntime
) -> None:
    spec, file = stored.manifest.graphs["retrieval"], stored.graph_files()["retrieval"]
    plan = make_plan(file, for_graph(default_buckets(stored.manifest.model), spec, 1))
    specs = {"retrieval": spec, "ranker": spec}
    with pytest.raises(BackendError, match=r"ranker: TensorRT 11.4.0.106 does not load the engine") as caught:
        TensorRtBackend(
            fake_tensorrt(memory), host_cuda(memory), {"retrieval": plan, "ranker": b"nonsense"}, specs, "fp32"
        )
    assert memory.left() == {}
    assert caught.value.__traceback__ is not None


def test_tensorrts_own_words_are_in_the_message_of_the_run_that_failed(
    backend: TensorRtBackend, stored: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(backend, stored)
    batch = pad_histories([history(stored, 4)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IExecutionContext, "execute_async_v3", lambda self, stream: self._refuse("no such kernel"))
        with pytest.raises(
            BackendError, match=r"does not run: IExecutionContext: .*API Usage Error \(no such kernel\)$"
        ):
            engine.encode(batch)
    monkeypatch.setattr(IExecutionContext, "execute_async_v3", refuse)
    with pytest.raises(BackendError, match=r"does not run$"):
        engine.encode(batch)


def test_an_error_on_the_gpu_belongs_to_the_run_that_made_it(
    backend: TensorRtBackend, stored: Bundle, exact: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: IExecutionContext, tensors: Any) -> None:
        self._busy.release()
        raise Injected

    engine = engine_of(backend, stored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IExecutionContext, "_compute", broken)
        with pytest.raises(BackendError, match=r"could not wait for the GPU: cudaErrorLaunchFailure .* start it again"):
            engine.encode(pad_histories([history(stored, 4)]))
    assert_same(answer(engine, stored), answer(exact, stored))


def every_step(stored: Bundle, memory: HostRuntime) -> list[NDArray[Any]]:
    """Everything that a backend does, from loading to closing."""
    with double_backend(stored, memory) as backend:
        return answer(engine_of(backend, stored), stored)


def test_whatever_call_fails_nothing_is_left_and_the_next_run_is_right(stored: Bundle, exact: Engine) -> None:
    whole = HostRuntime()
    expected = answer(exact, stored)
    assert_same(every_step(stored, whole), expected)
    assert len(whole.log) > 80
    for before, name in enumerate(whole.log):
        memory = HostRuntime()
        memory.fail = FailOnce(before, CudaError.cudaErrorLaunchFailure)
        with contextlib.nullcontext() if name in GOES_ON else pytest.raises(BackendError, match="LaunchFailure"):
            try_every_step(stored, memory, name)
        if name not in GOES_ON:
            assert memory.left() == {}, f"{before}: {name}"
        assert_same(every_step(stored, memory), expected)
        assert memory.faults == [], f"{before}: {name}"


def try_every_step(stored: Bundle, memory: HostRuntime, name: str) -> None:
    with contextlib.suppress(BackendError) if name in GOES_ON else contextlib.nullcontext():
        every_step(stored, memory)


def test_a_run_that_fails_half_way_leaves_the_backend_whole(stored: Bundle, memory: HostRuntime, exact: Engine) -> None:
    expected = answer(exact, stored)
    with double_backend(stored, memory) as backend:
        engine = engine_of(backend, stored)
        answer(engine, stored)
        left, start = memory.left(), len(memory.log)
        answer(engine, stored)
        for before, name in enumerate(memory.log[start:]):
            memory.fail = FailOnce(before, CudaError.cudaErrorMemoryAllocation)
            if name not in GOES_ON:
                with pytest.raises(BackendError, match="cudaErrorMemoryAllocation"):
                    answer(engine, stored)
            memory.fail = lambda _: None
            assert memory.left() == left, f"{before}: {name}"
            assert_same(answer(engine, stored), expected)
    assert (memory.left(), memory.faults) == ({}, [])


def test_too_little_memory_for_a_context(stored: Bundle) -> None:
    memory = HostRuntime(total=6000)
    with pytest.raises(
        BackendError,
        match=r"encoder: TensorRT 11.4.0.106 makes no context for profile 1, 1,840 of 6,000 bytes are free: "
        r"IExecutionContext creation failed: out of memory",
    ):
        double_backend(stored, memory)
    gc.collect()
    assert (memory.left(), memory.faults) == ({}, [])


def test_too_little_memory_for_a_run_is_said_and_a_smaller_one_goes_on(stored: Bundle, exact: Engine) -> None:
    memory = HostRuntime()
    with double_backend(stored, memory) as backend:
        engine = engine_of(backend, stored)
        small = pad_histories([history(stored, 3)])
        engine.encode(small)
        memory.total = memory.used() + 4000
        with pytest.raises(
            BackendError, match=r"could not allocate [\d,]+ bytes on the GPU: .* bytes are free; end other"
        ):
            engine.encode(pad_histories([history(stored, 8)] * 8))
        found, expected = engine.encode(small), exact.encode(small)
        np.testing.assert_allclose(found.last_hidden_state.numpy(), expected.last_hidden_state.numpy(), atol=1e-5)
    del found
    gc.collect()
    assert (memory.left(), memory.faults) == ({}, [])


def test_a_closed_backend_says_so_and_keeps_nothing_but_what_is_held(stored: Bundle, memory: HostRuntime) -> None:
    backend = double_backend(stored, memory)
    engine = engine_of(backend, stored)
    batch = pad_histories([history(stored, 4)])
    held = engine.encode(batch)
    backend.close()
    backend.close()
    assert memory.left() == {"blocks": 1}
    with pytest.raises(BackendError, match="encoder: the graphs were closed; load the bundle again"):
        engine.encode(batch)
    with pytest.raises(BackendError, match="the graphs were closed, and their outputs cannot be read any more"):
        held.last_hidden_state.numpy()
    assert backend.compiled_kernels() == {}
    del held
    gc.collect()
    assert (memory.left(), memory.faults) == ({}, [])


def test_a_backend_that_is_let_go_of_closes_itself(stored: Bundle, memory: HostRuntime) -> None:
    answer(engine_of(double_backend(stored, memory), stored), stored)
    gc.collect()
    assert (memory.left(), memory.faults) == ({}, [])


def test_closing_waits_for_what_is_running(stored: Bundle, memory: HostRuntime, exact: Engine) -> None:
    expected = {seed: answer(exact, stored, seed) for seed in range(4)}
    backend = double_backend(stored, memory)
    engine = engine_of(backend, stored)
    outcomes: list[str] = []

    def serve(seed: int) -> None:
        for _ in range(200):
            try:
                assert_same(answer(engine, stored, seed), expected[seed])
            except BackendError as error:
                outcomes.append(str(error))
                return
            outcomes.append("right")

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(serve, seed) for seed in range(4)]
        while len(outcomes) < 8:
            pass
        backend.close()
        for thread in running:
            thread.result()
    assert sum("the graphs were closed" in outcome for outcome in outcomes) == 4
    assert {"right"} < set(outcomes)
    gc.collect()
    assert (memory.left(), memory.faults) == ({}, [])
