"""What of ONNX Runtime's GPU backend only a GPU can show."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from answers import STORED, answer, assert_same, history

from unipinrec.runtime import Bundle, Recommender, verify_bundle
from unipinrec.runtime.device import open_engine
from unipinrec.runtime.graphs.engine import Engine, pad_histories
from unipinrec.runtime.graphs.ort_cpu import OrtTensor
from unipinrec.runtime.graphs.ort_cuda import CUDA, provider_problem
from unipinrec.runtime.machine import driver_problem
from unipinrec.runtime.trt.cuda import Cuda

PROBLEM = driver_problem() or provider_problem(onnxruntime, CUDA)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))]


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from unipinrec.export.precision.check import add_precisions

    folder = Path(shutil.copytree(STORED, tmp_path_factory.mktemp("typed") / "bundle"))
    add_precisions(folder, ["bf16", "fp16"], [])
    return folder


def test_answers_are_those_of_the_cpu(stored: Bundle, exact: Engine) -> None:
    report = verify_bundle(STORED, "cuda", strict=True)
    assert report.ok
    assert max(check.max_abs_diff or 0.0 for check in report.golden) < 1e-4
    engine = open_engine(stored, "cuda", strict=True)
    for seed in range(5):
        assert_same(answer(engine, stored, seed), answer(exact, stored, seed), atol=1e-4)
    engine.close()


def test_outputs_stay_on_the_gpu(stored: Bundle) -> None:
    engine = open_engine(stored, "cuda", strict=True)
    encoded = engine.encode(pad_histories([history(stored, 5)]))
    tensors = (*encoded.key_values, encoded.last_hidden_state)
    assert {tensor.value.device_name() for tensor in tensors if isinstance(tensor, OrtTensor)} == {"cuda"}
    engine.close()
    assert np.isfinite(encoded.last_hidden_state.numpy()).all()


@pytest.mark.parametrize(("device", "dtype"), [("cuda-bf16", "bfloat16"), ("cuda-fp16", "float16")])
def test_less_precision_agrees_and_is_read_back(typed: Path, exact: Engine, device: str, dtype: str) -> None:
    with Recommender.load(typed, device, strict=True) as recommender:
        bundle, engine = recommender.bundle, recommender.engine
        batch = pad_histories([history(bundle, 7), history(bundle, 3, 1)])
        encoded = engine.encode(batch)
        assert {tensor.dtype for tensor in encoded.key_values} == {dtype}
        expected = exact.encode(batch).key_values
        for given, right in zip(encoded.key_values, expected, strict=True):
            np.testing.assert_allclose(given.numpy()[0], right.numpy()[0], atol=0.05, rtol=0.02)
        found = answer(engine, bundle)
        assert_same(found[:2], answer(exact, bundle)[:2], atol=0.05)
    assert verify_bundle(typed, device, strict=True).ok


def test_memory_is_given_back(stored: Bundle) -> None:
    def used(rounds: int) -> int:
        for _ in range(rounds):
            engine = open_engine(stored, "cuda", strict=True)
            answer(engine, stored)
            engine.close()
            del engine
            gc.collect()
        free, total = cuda.memory_info()
        return total - free

    with Cuda.open() as cuda:
        before = used(2)
        assert used(5) - before < 16 * 2**20


def test_engine_of_another_backend_is_read_through_the_host(stored: Bundle, exact: Engine) -> None:
    engine = open_engine(stored, "cuda", strict=True)
    encoded = exact.encode(pad_histories([history(stored, 6)]))
    asked = np.array([[1, 2, 3]]), np.zeros(1, np.int64), np.array([1_760_000_000_000])
    np.testing.assert_allclose(engine.rank(encoded, *asked), exact.rank(encoded, *asked), atol=1e-4, rtol=0)
    engine.close()
