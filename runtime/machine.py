"""The machine as this process sees it: CPU, threads, memory, glibc, and the NVIDIA driver."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from unipinrec.errors import ConfigError

LIBC = ctypes.CDLL(None)
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
NO_LIMIT = 1 << 60  # version 1 writes a number above this


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """The CPU.

    Attributes:
        model: Its name.
        features: Whether it has each feature that matters to the backends.
        threads: Number of threads that can run at once.
        threads_reason: Why this number.
    """

    model: str
    features: dict[str, bool]
    threads: int
    threads_reason: str


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The host's memory; None = unknown.

    Attributes:
        total_bytes: Total memory.
        available_bytes: Memory available without swapping.
        limit_bytes: Limit of this process's cgroup; None = no limit.
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
        model=_fields(cpuinfo).get("model name") or platform.processor() or platform.machine(),
        features={name: bool(either & flags) for name, either in FEATURES.items()},
        threads=available_threads(cgroup, own),
        threads_reason=f"{affinity}, {allowed}",
    )


def this_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP, own: Path = OWN_GROUP) -> Memory:
    """The memory that this process may use."""
    kib = {name: value.removesuffix("kB").strip() for name, value in _fields(meminfo).items()}
    sizes = {name: int(size) * 1024 for name, size in kib.items() if size.isdecimal()}
    limits = [limit for name, file in MEMORY_LIMITS.items() for [limit, *_] in group_limits(name, (file,), cgroup, own)]
    limit = min((limit for limit in limits if limit < NO_LIMIT), default=None)
    return Memory(total_bytes=sizes.get("MemTotal"), available_bytes=sizes.get("MemAvailable"), limit_bytes=limit)


def usable_bytes(memory: Memory | None = None) -> int | None:
    """Memory that this process may fill: its cgroup's limit, or all of the machine; None = unknown."""
    memory = memory or this_memory()
    return min((size for size in (memory.limit_bytes, memory.total_bytes) if size is not None), default=None)


def _lines(path: Path) -> list[str]:
    """Lines of a file of the system; none if it cannot be read."""
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _fields(path: Path) -> dict[str, str]:
    """Values of lines such as "name : value"; the first value of a name that occurs again."""
    pairs = [line.partition(":") for line in reversed(_lines(path))]
    return {name.strip(): value.strip() for name, _, value in pairs}


def driver_problem() -> str | None:
    """Why the NVIDIA driver cannot be used; None if it can. Without a driver TensorRT ends the process."""
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
    """Number of threads that can run at once: the smaller of the affinity mask and the cgroup's CPU quota."""
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota(cgroup, own)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def thread_count(threads: int | None) -> int:
    """Number of threads to use; None = as many as can run at once.

    Raises:
        ConfigError: `threads` is less than 1.
    """
    if threads is None:
        return available_threads()
    if not isinstance(threads, int) or threads < 1:
        raise ConfigError(f"threads={threads} must be an integer of at least 1, or None for as many as can run at once")
    return threads


def cpu_quota(cgroup: Path = CGROUP, own: Path = OWN_GROUP) -> float | None:
    """Number of CPUs that this process's cgroup and its ancestors allow; None = all."""
    limits = group_limits("", ("cpu.max",), cgroup, own)
    limits += group_limits("cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us"), cgroup, own)
    return min((limit[0] / limit[1] for limit in limits if len(limit) == 2), default=None)  # quota and period


def group_limits(controller: str, files: tuple[str, ...], cgroup: Path, own: Path) -> list[list[int]]:
    """Numbers in files of this process's cgroup and its ancestors; cgroups without the files or numbers are left out.

    Args:
        controller: Controller of version 1; empty = version 2.
        files: Names of the files, whose numbers are joined.
        cgroup: Folder where the hierarchies are mounted.
        own: File that lists this process's groups. In a container it may name groups that are not visible there.
    """
    group, limits = _own_group(controller, own), []
    for ancestor in (group, *group.parents):
        try:
            words = [word for name in files for word in (cgroup / controller / ancestor / name).read_text().split()]
        except OSError:
            continue
        if words and all(word.isdecimal() for word in words):  # neither "max" nor "-1"
            limits.append([int(word) for word in words])
    return limits


def _own_group(controller: str, own: Path) -> Path:
    """This process's group, from the root of its hierarchy; the root if the group is unknown."""
    fields = [line.partition(":")[2].partition(":") for line in _lines(own)]  # of "number:controllers:path"
    groups = [Path(path.lstrip("/")) for controllers, _, path in fields if controller in controllers.split(",")]
    return next((group for group in groups if ".." not in group.parts), Path())


def has_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the CPU has instructions for bf16 products."""
    return bool(BF16_FLAGS & cpu_flags(cpuinfo))


def cpu_flags(cpuinfo: Path = CPUINFO) -> set[str]:
    """The CPU's flags in Linux on x86-64; empty if they are unknown."""
    return {flag for line in _lines(cpuinfo) if line.startswith("flags") for flag in line.split()}


def keep_memory_flat() -> None:
    """Use one heap for all threads, and keep large buffers outside it, so that freed buffers go back to the system.

    By default glibc has eight heaps per core and puts ever larger buffers into them. Live blocks between freed ones
    keep memory from going back: a server grew by a megabyte with each new bundle.
    """
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(M_ARENA_MAX, 1)
        LIBC.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def give_back_memory() -> None:
    """Return freed memory between live blocks to the system, such as after closing a bundle."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)
