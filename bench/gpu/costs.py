"""The machine; what a GPU's memory, copies and launches cost, and whether two processes can share its memory.

Every part is measured alone: one that fails leaves its error as its result.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import queue
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import card, milliseconds, spread
from floors import kv_bytes

from unipinrec.errors import BackendError
from unipinrec.models.config import PAPER
from unipinrec.runtime.machine import driver_problem
from unipinrec.runtime.trt.cuda import Cuda

ROUNDS = 31
MIB = 1 << 20
LAUNCHES = 1000
IN_GRAPH = 100
EVENTS = 992
WAIT_S = 30.0
PACKAGES = (
    "onnxscript",
    "msgspec",
    "cuda-bindings",
    "onnxruntime-gpu",
    "tensorrt-rtx-cu13-libs",
    "safetensors",
    "triton",
)
QUERY = (
    "name,driver_version,memory.total,compute_cap,pcie.link.gen.max,pcie.link.width.max,clocks.max.sm,clocks.max.memory"
)
Found = dict[str, Any]


def machine(_: argparse.Namespace) -> dict[str, Any]:
    """GPU, driver and versions."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        gpu = f"nvidia-smi: {error}"
    found = {name: version_of(name) for name in PACKAGES}
    return {
        "ran": True,
        **card("accept"),
        "gpu": gpu,
        "driver_problem": driver_problem(),
        "torch_cuda": torch.version.cuda,
        "torch_sees_gpu": torch.cuda.is_available(),
        "packages": found,
    }


def version_of(package: str) -> str | None:
    """Its installed version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_gpu() -> None:
    """Check that PyTorch has a GPU.

    Raises:
        BackendError: It has none; says why.
    """
    if problem := driver_problem():
        raise BackendError(problem)
    if not torch.cuda.is_available():
        raise BackendError(f"torch {torch.__version__} sees no GPU (built for CUDA {torch.version.cuda})")


def parts(measurements: dict[str, Callable[[], Any]]) -> Found:
    """Measure each part. `ran` is false if none could be measured."""
    found, problems = Found(), []
    for name, measure in measurements.items():
        try:
            found[name] = measure()
        except Exception as error:  # whatever fails is the finding
            problems.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    if not found:
        return {"ran": False, "refused": "; ".join(problems)}
    return {"ran": True, **found, "problems": problems}


def costs(_: argparse.Namespace) -> Found:
    """Copies, memory from the pool, launches, CUDA graphs."""
    require_gpu()
    return parts({"copies_gb_s": copy_rates, "pool_us": pool, "launch_us": launches, "graph_us": graphs})


def copy_rates() -> Found:
    """GB/s between host and GPU, by size, kind of host memory, and direction."""
    rates = Found()
    for size in (MIB, kv_bytes(PAPER, "bf16", EVENTS), 256 * MIB):
        for kind, pinned in (("pinned", True), ("pageable", False)):
            host = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
            for direction, took in both_ways([host], [torch.zeros_like(host, device="cuda")]).items():
                rates[f"{size / MIB:.1f} MiB {kind} {direction}"] = round(size / took["median"] / 1e6, 2)
    return rates


def both_ways(host: list[torch.Tensor], device: list[torch.Tensor]) -> dict[str, dict[str, float]]:
    """Milliseconds to copy tensors to the GPU and back."""

    def copied(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
        synchronize()

    return {"to GPU": timed(lambda: copied(device, host)), "from GPU": timed(lambda: copied(host, device))}


def synchronize() -> None:
    """Wait for the GPU."""
    torch.cuda.synchronize()


def timed(work: Callable[[], object], rounds: int = ROUNDS) -> dict[str, float]:
    """Milliseconds of a call, after three to warm up."""
    for _ in range(3):
        work()
    return spread([milliseconds(work) for _ in range(rounds)])


def microseconds(work: Callable[[], object]) -> float:
    """Median of a call."""
    return round(1e3 * timed(work, 101)["median"], 2)


def pool() -> Found:
    """Memory by `cudaMallocAsync` and back, through our own wrapper."""
    with Cuda.open() as cuda:
        stream = cuda.stream()

        def pair(nbytes: int) -> None:
            cuda.free(cuda.malloc(nbytes, stream), stream)

        def waited(nbytes: int) -> None:
            pair(nbytes)
            cuda.synchronize(stream)

        found = {
            "malloc and free of 64 KiB": microseconds(lambda: pair(MIB >> 4)),
            "malloc and free of 64 MiB": microseconds(lambda: pair(64 * MIB)),
        }
        found["the same and synchronize"] = microseconds(lambda: waited(MIB))
        found["synchronize an idle stream"] = microseconds(lambda: cuda.synchronize(stream))
        return found


def launches() -> Found:
    """One small kernel: alone and waited for, and among many."""
    value = torch.zeros(1, device="cuda")

    def many() -> None:
        for _ in range(LAUNCHES):
            value.add_(1)
        synchronize()

    def one() -> None:
        value.add_(1)
        synchronize()

    per_launch = 1e3 * timed(many)["median"] / LAUNCHES
    return {
        "among many": round(per_launch, 2),
        "launched and waited for": microseconds(one),
        "synchronize": microseconds(synchronize),
    }


def graphs() -> Found:
    """A hundred small kernels, launched one by one and as a CUDA graph."""
    value = torch.zeros(1024, device="cuda")

    def body() -> None:
        for _ in range(IN_GRAPH):
            value.add_(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    value.zero_()

    def replayed() -> None:
        graph.replay()
        synchronize()

    def one_by_one() -> None:
        body()
        synchronize()

    replayed()
    if float(value[0]) != IN_GRAPH:
        raise BackendError(f"a replayed graph of {IN_GRAPH} additions gives {float(value[0])}")
    return {f"{IN_GRAPH} kernels": microseconds(one_by_one), "the same as a graph": microseconds(replayed)}


def kv_copies(_: argparse.Namespace) -> Found:
    """Keys and values of one history at the paper's shape in bf16: as one block, and layer by layer."""
    require_gpu()
    return parts({"pinned_ms": partial(kv_copy, True), "pageable_ms": partial(kv_copy, False)})


def kv_copy(pinned: bool) -> Found:
    """Milliseconds to the GPU and back."""
    size, tensors = kv_bytes(PAPER, "bf16", EVENTS), 2 * PAPER.num_layers
    block = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
    on_gpu = torch.zeros_like(block, device="cuda")
    found: Found = {"bytes": size, "one block": both_ways([block], [on_gpu])}
    found[f"{tensors} tensors"] = both_ways(list(block.chunk(tensors)), list(on_gpu.chunk(tensors)))
    return found


def ipc(_: argparse.Namespace) -> Found:
    """Memory of the GPU that two processes share: what one writes the other reads, without a copy."""
    require_gpu()
    context = torch.multiprocessing.get_context("spawn")
    given, answers = context.Queue(), context.Queue()
    child = context.Process(target=add_one, args=(given, answers), daemon=True)
    child.start()
    values = torch.arange(MIB, device="cuda", dtype=torch.float32)
    expected = float(values.double().sum())
    try:
        given.put(values)
        answer: Found = answers.get(timeout=WAIT_S)
    except (queue.Empty, RuntimeError) as error:
        raise BackendError(f"the other process did not answer: {type(error).__name__} {error}") from error
    finally:
        child.join(1)
    if "refused" in answer:
        raise BackendError(answer["refused"])
    changed = float(values.double().sum())
    problems = [] if answer["sum"] == expected else [f"the sum is {expected}, the other process read {answer['sum']}"]
    problems += [] if changed == expected + MIB else ["what the other process wrote is not here"]
    return {"ran": True, **answer, "problems": problems}


def add_one(given: Any, answers: Any) -> None:
    """In the other process: read shared memory, and write to it."""
    try:
        torch.zeros(1, device="cuda")
        synchronize()
        began = time.perf_counter()
        values = given.get(timeout=WAIT_S)
        opened_ms = (time.perf_counter() - began) * 1e3
        total = float(values.double().sum())
        values += 1
        synchronize()
        answers.put({"sum": total, "received_ms": round(opened_ms, 2)})
        time.sleep(1)  # the queue's own thread has to send it
    except Exception as error:  # the parent reports it
        answers.put({"refused": f"{type(error).__name__}: {error}"})
