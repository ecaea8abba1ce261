from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unipinrec.errors import BackendError, ConfigError
from unipinrec.runtime.bundle.manifest import Manifest
from unipinrec.runtime.bundle.quality import KvDtype
from unipinrec.runtime.kv.pages import KV_DTYPES, KvGeometry, KvPages, as_stored

SMALL = KvGeometry(tensors=8, heads=8, head_dim=32, dtype="fp32", page_slots=32)  # four layers of 8 heads of 32
dtypes = pytest.mark.parametrize("dtype", KV_DTYPES)


def normal(rng: np.random.Generator, geometry: KvGeometry, slots: int) -> list[NDArray[np.float32]]:
    """Each tensor's [H_kv, slots, D]."""
    shape = (geometry.heads, slots, geometry.head_dim)
    return [rng.standard_normal(shape, np.float32) for _ in range(geometry.tensors)]


def make(geometry: KvGeometry, count: int, threads: int = 3) -> KvPages:
    """Pages that are copied in so many threads, whatever this machine has; 16 pages at least are needed for it."""
    pages = KvPages(geometry, count)
    pages._parallel = threads
    return pages


def read(pages: KvPages, order: list[int], slots: int) -> NDArray[np.float32]:
    geometry = pages.geometry
    out = np.full((geometry.tensors, geometry.heads, slots, geometry.head_dim), np.nan, np.float32)
    pages.read(order, slots, out)
    return out


@pytest.mark.parametrize(("dtype", "slot_bytes"), [("fp32", 8192), ("fp16", 4096), ("bf16", 4096), ("int8", 2304)])
def test_bytes(dtype: KvDtype, slot_bytes: int) -> None:
    geometry = replace(SMALL, dtype=dtype)
    assert geometry.slot_bytes == slot_bytes
    assert geometry.page_bytes == 32 * slot_bytes
    assert KvPages(geometry, 3).nbytes == 3 * 32 * slot_bytes
    assert replace(geometry, page_slots=1).page_bytes == slot_bytes


def test_pages_for() -> None:
    assert [SMALL.pages_for(slots) for slots in (0, 1, 32, 33, 64, 993)] == [0, 1, 1, 2, 2, 32]
    assert replace(SMALL, page_slots=1).pages_for(993) == 993


def test_the_geometry_of_a_model(manifest: Manifest) -> None:
    expected = KvGeometry(tensors=2, heads=1, head_dim=2, dtype="int8", page_slots=7)
    assert KvGeometry.of(manifest.model, "int8", 7) == expected
    assert KvGeometry.of(manifest.model, "int8").page_slots == 16


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dtype": "fp8"}, "kv dtype 'fp8' is not one of fp32, fp16, bf16, int8"),
        ({"page_slots": 0}, "page_slots=0 must be at least 1"),
    ],
)
def test_a_geometry_that_is_none(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        replace(SMALL, **changes)


@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from(KV_DTYPES),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 33), st.integers(1, 5)),
    runs=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_what_is_written_in_parts_is_read_as_stored(
    dtype: KvDtype, sizes: tuple[int, int, int, int], runs: list[int], threads: int, seed: int
) -> None:
    tensors, heads, head_dim, page_slots = sizes
    geometry = KvGeometry(tensors=tensors, heads=heads, head_dim=head_dim, dtype=dtype, page_slots=page_slots)
    rng, slots = np.random.default_rng(seed), sum(runs)
    needed = geometry.pages_for(slots)
    pages = make(geometry, 2 * needed, threads)
    mine, others = np.split(rng.permutation(2 * needed), 2)
    theirs = normal(rng, geometry, needed * page_slots)
    pages.write(others.tolist(), 0, theirs)
    given, done = normal(rng, geometry, slots), 0
    for count in runs:
        run = np.stack([tensor[:, done : done + count] for tensor in given])
        pages.write(mine.tolist(), done, list(run), run)
        np.testing.assert_array_equal(run, [as_stored(tensor[:, done : done + count], dtype) for tensor in given])
        done += count
    for count in (slots, runs[0]):
        expected = [as_stored(tensor[:, :count], dtype) for tensor in given]
        np.testing.assert_array_equal(read(pages, mine.tolist(), count), expected)
    np.testing.assert_array_equal(
        read(pages, others.tolist(), needed * page_slots), [as_stored(tensor, dtype) for tensor in theirs]
    )


@dtypes
def test_a_read_leaves_the_slots_behind_alone(dtype: KvDtype) -> None:
    geometry = replace(SMALL, dtype=dtype, page_slots=4)
    pages, out = KvPages(geometry, 2), np.full((8, 8, 7, 32), 7.0, np.float32)
    pages.write([1, 0], 0, [np.ones((8, 6, 32), np.float32)] * 8)
    pages.read([1, 0], 5, out)
    np.testing.assert_allclose(out[:, :, :5], 1.0, rtol=1e-6)
    assert (out[:, :, 5:] == 7.0).all()


@pytest.mark.parametrize(
    ("dtype", "given", "stored"),
    [
        ("fp32", [0.1, -3.14159], [np.float32(0.1), np.float32(-3.14159)]),
        ("fp16", [0.1, -3.14159, 65504.0], [0.0999755859375, -3.140625, 65504.0]),
        ("bf16", [0.1, -3.14159, 1e30], [0.10009765625, -3.140625, float.fromhex("0x1.94p99")]),
        ("int8", [127.0, -63.4, 0.5, 1.6, 2.5], [127.0, -63.0, 0.0, 2.0, 2.0]),
        ("int8", [0.0, 0.0, -254.0], [0.0, 0.0, -254.0]),
    ],
)
def test_literal_values(dtype: KvDtype, given: list[float], stored: list[float]) -> None:
    assert as_stored(np.array([given], np.float32), dtype).tolist() == [stored]


@pytest.mark.parametrize(("dtype", "relative"), [("fp32", 0.0), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_floats_are_rounded_to_the_nearest(dtype: KvDtype, relative: float) -> None:
    given = np.random.default_rng(0).standard_normal((50, 32), np.float32)
    error = np.abs(as_stored(given, dtype) - given)
    normal_range = np.abs(given) > 2**-14  # fp16 has fewer bits below
    assert (error <= relative * np.abs(given))[normal_range].all()
    assert error.max() >= relative / 2


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_int8_is_rounded_by_half_a_step_at_most(scale: float) -> None:
    given = np.float32(scale) * np.random.default_rng(0).standard_normal((50, 33), np.float32)
    steps = np.abs(given).max(axis=1, keepdims=True) / 127
    error = np.abs(as_stored(given, "int8") - given)
    assert (error <= steps * 0.5001).all()
    assert error.max() > steps.max() / 4


@pytest.mark.parametrize("head_dim", range(1, 41))
def test_the_largest_value_counts_wherever_it_stands(head_dim: int) -> None:
    given = np.full((head_dim, head_dim), 1.0, np.float32)
    np.fill_diagonal(given, -1270.0)
    expected = np.zeros_like(given)
    np.fill_diagonal(expected, -1270.0)
    np.testing.assert_allclose(as_stored(given, "int8"), expected, rtol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 1e-44])
def test_a_vector_of_nothing_is_nothing(value: float) -> None:
    """Below the smallest normal number there is no scale to divide by."""
    assert as_stored(np.full((2, 3), value, np.float32), "int8").tolist() == [[0.0] * 3] * 2


@pytest.mark.filterwarnings("ignore:invalid value")
@dtypes
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_number_does_not_become_one(dtype: KvDtype, wrong: float) -> None:
    """So that whoever ranks with it finds out."""
    assert not np.isfinite(as_stored(np.array([[1.0, wrong, 2.0]], np.float32), dtype)[0, 1])


@pytest.mark.parametrize("value", [65520.0, -1e5, 3e38])
def test_values_beyond_fp16_are_refused(value: float) -> None:
    geometry = replace(SMALL, tensors=1, heads=1, head_dim=3, dtype="fp16")
    given = np.array([[[1.0, value, 2.0]]], np.float32)
    match = f"a key or value of {abs(value):g} does not fit into fp16; store them as bf16 or fp32"
    with pytest.raises(BackendError, match=match.replace("+", r"\+")):
        KvPages(geometry, 1).write([0], 0, [given])
    with pytest.raises(BackendError, match="does not fit into fp16"):
        as_stored(given, "fp16")
    assert np.isfinite(as_stored(given, "bf16")).all()


@pytest.mark.parametrize("tensor", range(4))
def test_a_value_that_does_not_fit_is_refused_by_every_lane(tensor: int) -> None:
    geometry = KvGeometry(tensors=4, heads=1, head_dim=2, dtype="fp16", page_slots=1)
    given = np.ones((4, 1, 20, 2), np.float32)
    given[tensor, 0, 7] = 1e5
    with pytest.raises(BackendError, match=r"of 100000 does not fit into fp16"):
        make(geometry, 20).write(range(20), 0, list(given))


def test_no_lane_goes_on_after_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages may belong to someone else by then."""
    begun, done = [], []

    def slowly(values: NDArray[np.float32], _dtype: KvDtype) -> tuple[NDArray[np.float32], None]:
        begun.append(values)
        if values[0, 0, 0] == 0.0:
            raise BackendError("the first tensor fails")
        time.sleep(0.02)
        done.append(values)
        return values, None

    monkeypatch.setattr("unipinrec.runtime.kv.pages._rounded", slowly)
    geometry = KvGeometry(tensors=6, heads=1, head_dim=2, dtype="fp32", page_slots=1)
    given = np.repeat(np.arange(6, dtype=np.float32), 40).reshape(6, 1, 20, 2)
    with pytest.raises(BackendError, match="the first tensor fails"):
        make(geometry, 20).write(range(20), 0, list(given))
    assert len(begun) == len(done) + 1 > 3
    time.sleep(0.1)
    assert len(begun) == len(done) + 1


@dtypes
def test_threads_use_their_own_slots_at_the_same_time(dtype: KvDtype) -> None:
    """Of each thread's history the first 13 slots are read while those behind are written; a page holds both."""
    geometry = KvGeometry(tensors=4, heads=2, head_dim=48, dtype=dtype, page_slots=3)
    pages = make(geometry, 8 * 20)

    def use(thread: int) -> None:
        rng, order = np.random.default_rng(thread), list(range(thread, 8 * 20, 8))
        for _ in range(20):
            given = normal(rng, geometry, 60)
            expected = np.stack([as_stored(tensor, dtype) for tensor in given])
            pages.write(order, 0, [tensor[:, :13] for tensor in given])
            with ThreadPoolExecutor(1) as other:
                behind = other.submit(pages.write, order, 13, [tensor[:, 13:] for tensor in given])
                for _ in range(5):
                    np.testing.assert_array_equal(read(pages, order, 13), expected[:, :, :13])
                behind.result()
            np.testing.assert_array_equal(read(pages, order, 60), expected)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, range(8)))


@pytest.mark.parametrize("size_bytes", [1 << 50, 1 << 66])
def test_memory_that_cannot_be_had(size_bytes: int) -> None:
    count = size_bytes // SMALL.page_bytes
    with pytest.raises(
        ConfigError, match=rf"a key/value cache of {size_bytes:,} bytes does not fit .*; lower its budget"
    ):
        KvPages(SMALL, count)
