"""This machine as a process sees it, for people: CPU, threads, memory. Raises nothing on any Linux."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from unipinrec.runtime.cpu import CGROUP, CPUINFO, OWN_GROUP, available_threads, cpu_flags, cpu_quota, group_limits

MEMINFO = Path("/proc/meminfo")
FEATURES = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "AVX-512 BF16": {"avx512_bf16"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "AMX BF16": {"amx_bf16"},
    "AMX INT8": {"amx_int8"},
}
MEMORY_LIMITS = {"": "memory.max", "memory": "memory.limit_in_bytes"}  # of cgroups, version 2 and version 1
NO_LIMIT = 1 << 60  # version 1 says so by a number


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """The CPU.

    Attributes:
        model: Its name.
        features: What matters to the backends, and whether it is there.
        threads: How many can run at once.
        threads_reason: Why so many.
    """

    model: str
    features: dict[str, bool]
    threads: int
    threads_reason: str


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The host's memory; None where it is not known.

    Attributes:
        total_bytes: All of it.
        available_bytes: What can be had without swapping.
        limit_bytes: The most that the cgroup allows this process; None = all.
    """

    total_bytes: int | None
    available_bytes: int | None
    limit_bytes: int | None


def this_cpu(cpuinfo: Path = CPUINFO, cgroup: Path = CGROUP, own: Path = OWN_GROUP) -> Cpu:
    """The CPU that this process runs on."""
    flags, quota = cpu_flags(cpuinfo), cpu_quota(cgroup, own)
    affinity = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} CPUs by affinity"
    allowed = "no cgroup quota" if quota is None else f"a cgroup quota of {quota:g} CPUs"
    return Cpu(
        model=_model(cpuinfo),
        features={name: bool(either & flags) for name, either in FEATURES.items()},
        threads=available_threads(cgroup, own),
        threads_reason=f"{affinity}, {allowed}",
    )


def this_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP, own: Path = OWN_GROUP) -> Memory:
    """The memory that this process may use."""
    sizes = _fields(meminfo)
    total, available = (_kib(sizes.get(name)) for name in ("MemTotal", "MemAvailable"))
    return Memory(total_bytes=total, available_bytes=available, limit_bytes=_limit(cgroup, own))


def _model(cpuinfo: Path) -> str:
    return _fields(cpuinfo).get("model name") or platform.processor() or platform.machine()


def _fields(path: Path) -> dict[str, str]:
    """Lines such as "name : value"; of a name that occurs again, the first."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.partition(":") for line in reversed(lines)]
    return {name.strip(): value.strip() for name, _, value in pairs}


def _kib(text: str | None) -> int | None:
    number = (text or "").removesuffix("kB").strip()
    return int(number) * 1024 if number.isdecimal() else None


def _limit(cgroup: Path, own: Path) -> int | None:
    limits = [limit for name, file in MEMORY_LIMITS.items() for [limit, *_] in group_limits(name, (file,), cgroup, own)]
    return min((limit for limit in limits if limit < NO_LIMIT), default=None)
