"""What this process may use of the CPU, and the one CPU flag that matters to attention."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unipinrec.errors import ConfigError

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
FLUSH_DENORMALS = 0x8040  # MXCSR: flush to zero, denormals are zero
MXCSR = 7  # its word in fenv_t of x86-64 Linux, glibc and musl alike


def available_threads(cgroup: Path = CGROUP, own: Path = OWN_GROUP) -> int:
    """How many threads can run at once: the affinity mask, or the cgroup's CPU quota where that is less."""
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota(cgroup, own)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def thread_count(wanted: int | None) -> int:
    """How many threads to use: as many as wanted; None = as many as can run at once.

    Raises:
        ConfigError: Fewer than one are wanted.
    """
    if wanted is None:
        return available_threads()
    if not isinstance(wanted, int) or wanted < 1:
        raise ConfigError(f"threads={wanted} must be an integer of at least 1, or None for as many as can run at once")
    return wanted


def cpu_quota(cgroup: Path = CGROUP, own: Path = OWN_GROUP) -> float | None:
    """How many CPUs this process's cgroup and those around it allow; None = all."""
    limits = group_limits("", ("cpu.max",), cgroup, own)
    limits += group_limits("cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us"), cgroup, own)
    return min((limit[0] / limit[1] for limit in limits if len(limit) == 2), default=None)  # quota and period


def group_limits(controller: str, files: tuple[str, ...], cgroup: Path, own: Path) -> list[list[int]]:
    """What files say in this process's cgroup and in those around it, where they are there and say numbers alone.

    Args:
        controller: Of version 1; empty = version 2.
        files: Names of the files, which are read together.
        cgroup: Where the hierarchies are mounted.
        own: Which group of each this process is in. Inside a container it may name one that is not seen there.
    """
    group, limits = _own_group(controller, own), []
    for place in (group, *group.parents):
        try:
            words = [word for name in files for word in (cgroup / controller / place / name).read_text().split()]
        except OSError:
            continue
        if words and all(word.isdecimal() for word in words):  # neither "max" nor "-1"
            limits.append([int(word) for word in words])
    return limits


def _own_group(controller: str, own: Path) -> Path:
    """This process's group, from the root of its hierarchy; the root where it is not known."""
    try:
        lines = own.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return Path()
    fields = [line.partition(":")[2].partition(":") for line in lines]  # of "number:controllers:path"
    groups = [Path(path.lstrip("/")) for controllers, _, path in fields if controller in controllers.split(",")]
    return next((group for group in groups if ".." not in group.parts), Path())


def has_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the CPU multiplies bf16 numbers by instructions of its own."""
    return bool(BF16_FLAGS & cpu_flags(cpuinfo))


def cpu_flags(cpuinfo: Path = CPUINFO) -> set[str]:
    """What the CPU can do, as Linux on x86-64 names it; empty where that is not known."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Let the calling thread treat denormal numbers as zero, then put its flags back. No effect off Linux on x86-64.

    Masked attention leaves denormal probabilities that slow the next product by a third. ONNX Runtime's own option
    reaches its pool, the thread that creates the process's first session, and threads started by that one later; a
    request that comes in on any other thread computes its share without.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        yield
        return
    library = _c_library()
    environment = (ctypes.c_uint32 * 8)()
    library.fegetenv(environment)
    before = environment[MXCSR]
    environment[MXCSR] = before | FLUSH_DENORMALS
    library.fesetenv(environment)
    try:
        yield
    finally:
        environment[MXCSR] = before
        library.fesetenv(environment)
