from __future__ import annotations

import math
import os
import platform
import threading
from pathlib import Path

import numpy as np
import pytest
from file_tree import write_tree

from unipinrec.runtime.graphs.ort_cpu import flush_denormals
from unipinrec.runtime.machine import available_threads, cpu_quota, has_bf16


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "20000 100000\n"}, 0.2),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({}, math.inf),
    ],
)
def test_threads_are_those_that_can_run(tmp_path: Path, files: dict[str, str], quota: float) -> None:
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    cores = len(os.sched_getaffinity(0))
    expected = cores if quota == math.inf else min(cores, math.ceil(quota))
    assert available_threads(tmp_path) == expected


V1_CPU = "12:memory:/x\n4:cpu,cpuacct:/batch/own\n1:name=systemd:/init\n0::/elsewhere\n"


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/system.slice/a.service\n", {"system.slice/a.service/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/system.slice/a.service\n", {"system.slice/cpu.max": "50000 100000\n"}, 0.5),
        (
            "0::/a/b\n",
            {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n", "cpu.max": "400000 100000\n"},
            3.0,
        ),
        ("0::/a/b\n", {"c/cpu.max": "100000 100000\n"}, None),
        ("0::/docker/not-seen-here\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/../other\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("no group at all\n", {"cpu.max": "200000 100000\n"}, 2.0),
        (
            V1_CPU,
            {"cpu/batch/own/cpu.cfs_quota_us": "250000\n", "cpu/batch/own/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        (V1_CPU, {"cpu/x/cpu.cfs_quota_us": "250000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, None),
        (V1_CPU, {"cpu/batch/own/cpu.cfs_quota_us": "-1\n", "cpu/batch/own/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_the_quota_is_that_of_the_own_group_and_those_around_it(
    tmp_path: Path, own: str, files: dict[str, str], quota: float | None
) -> None:
    (tmp_path / "own").write_text(own)
    write_tree(tmp_path / "cgroup", files)
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "own") == quota


def half_of_the_smallest_normal() -> float:
    return float((np.full(8, np.finfo(np.float32).tiny) * np.full(8, 0.5, np.float32))[0])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flag is set on x86-64 only")
def test_denormals_are_zero_inside_and_as_before_outside() -> None:
    results: list[float] = []

    def in_a_thread() -> None:
        results.append(half_of_the_smallest_normal())
        with flush_denormals():
            results.append(half_of_the_smallest_normal())
        results.append(half_of_the_smallest_normal())

    in_a_thread()
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    denormal = 2.0**-127
    assert results == [denormal, 0.0, denormal] * 2


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flag is set on x86-64 only")
def test_the_flag_is_put_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="inside"), flush_denormals():
        raise ValueError("inside")
    assert half_of_the_smallest_normal() == 2.0**-127


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx512_bf16 sse", True), ("amx_bf16", True), ("fpu avx512f avx512_vnni", False), ("not_amx_bf16_", False)],
)
def test_bf16_instructions_are_found_by_their_flags(tmp_path: Path, flags: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nbugs\t\t: amx_bf16\nflags\t\t: {flags}\n")
    assert has_bf16(tmp_path / "cpuinfo") is expected
    assert not has_bf16(tmp_path / "missing")
