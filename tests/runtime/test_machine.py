from __future__ import annotations

import os
from pathlib import Path

import pytest
from file_tree import write_tree

from unipinrec.runtime.machine import Cpu, Memory, this_cpu, this_memory, usable_bytes

CPUINFO = """processor\t: 0
model name\t: A CPU @ 2.00GHz
flags\t\t: fpu avx2 avx512f avx_vnni

processor\t: 1
model name\t: Another
flags\t\t: fpu avx2
"""
CORES = len(os.sched_getaffinity(0))


def test_the_cpu_and_what_it_can_do(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    found = this_cpu(tmp_path / "cpuinfo", tmp_path)
    assert found == Cpu(
        model="A CPU @ 2.00GHz",
        features={
            "AVX2": True,
            "AVX-512": True,
            "AVX-512 BF16": False,
            "VNNI": True,
            "AMX BF16": False,
            "AMX INT8": False,
        },
        threads=1,
        threads_reason=f"{CORES} of {os.cpu_count()} CPUs by affinity, a cgroup quota of 0.5 CPUs",
    )


def test_a_cpu_that_does_not_tell(tmp_path: Path) -> None:
    found = this_cpu(tmp_path / "missing", tmp_path)
    assert found.model != ""
    assert not any(found.features.values())
    assert found.threads == CORES
    assert found.threads_reason.endswith("no cgroup quota")


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"memory.max": "1073741824\n"}, 2**30),
        ({"memory.max": "max\n"}, None),
        ({"memory/memory.limit_in_bytes": "2147483648\n"}, 2**31),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ({}, None),
    ],
)
def test_memory_and_its_limit(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       2048 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n")
    (tmp_path / "memory").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    found = this_memory(tmp_path / "meminfo", tmp_path)
    assert found == Memory(total_bytes=2048 * 1024, available_bytes=1024 * 1024, limit_bytes=limit)


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "4096\n", "a/memory.max": "max\n", "memory.max": "8192\n"}),
        ("0::/a/b\n", {"a/b/memory.max": "8192\n", "a/memory.max": "4096\n"}),
        ("7:cpu:/x\n4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "4096\n"}),
    ],
)
def test_the_limit_is_that_of_the_own_group_and_those_around_it(
    tmp_path: Path, own: str, files: dict[str, str]
) -> None:
    (tmp_path / "own").write_text(own)
    write_tree(tmp_path / "cgroup", files)
    assert this_memory(tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "own").limit_bytes == 4096


def test_memory_that_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: much\n")
    assert this_memory(tmp_path / "meminfo", tmp_path) == Memory(
        total_bytes=None, available_bytes=None, limit_bytes=None
    )


def test_the_limit_of_the_group_bounds_the_memory_to_fill(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 2097152 kB\n")
    machine = this_memory(tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "own")
    write_tree(tmp_path / "cgroup", {"memory.max": f"{600 << 20}\n"})
    group = this_memory(tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "own")
    assert (usable_bytes(machine), usable_bytes(group)) == (2 << 30, 600 << 20)
    assert usable_bytes(Memory(total_bytes=None, available_bytes=None, limit_bytes=None)) is None
