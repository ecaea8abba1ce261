"""This machine as a process sees it: CPU, threads, memory and glibc, and whether there is an NVIDIA driver."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from unipinrec.errors import ConfigError

M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3
LARGE_BYTES = 4 << 20


CGROUP = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"amx_bf16", "avx512_bf16"}


DRIVER = "libcuda.so.1"
CHECK_DRIVER = "check that nvidia-smi lists the GPU, and that the container was started with access to it"


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


def driver_problem() -> str | None:
    """Why the driver cannot be used. Asked of the driver itself: TensorRT dies without one, it does not raise."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return f"there is no NVIDIA driver here ({DRIVER} is not found); {CHECK_DRIVER}"
    code = driver.cuInit(0)
    if code == 0:
        return None
    name = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(name))
    return f"the NVIDIA driver does not start: {(name.value or b'error').decode()} ({code}); {CHECK_DRIVER}"


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


def keep_memory_flat() -> None:
    """One heap for all threads, and large buffers outside it, which go back to the system as soon as they are freed.

    By default glibc has eight heaps for each core and puts larger and larger buffers into them. What lives between them
    keeps the rest from being given back: a server that swapped bundles grew by a megabyte with each.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(M_ARENA_MAX, 1)
        tune(M_MMAP_THRESHOLD, LARGE_BYTES)


def give_back_memory() -> None:
    """Let the system have what was freed between what still lives, such as after a bundle was closed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
