"""The order of the acceptance, for fifteen minutes on one GPU in two calls of at most ten.

1  3 minutes   the machine, CUDA, the cost of copies and launches, PyTorch, and a probe of every backend
2  3 minutes   TensorRT-RTX, or TensorRT, on `small`: its tests, golden requests, invariants, times
3  4 minutes   ONNX Runtime on CUDA: its tests, `small`, and the paper's shape
4  2 minutes   joint attention of a training step with FlexAttention; copies of keys and values
5              what is left: TensorRT at the paper's shape, and training in bf16 (needs the archive `polars`)

The main questions are settled after phase 1: what runs at all, and whether our own CUDA code works.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from running import Runner, Step, finish

PRECISIONS = ("fp32", "bf16", "fp16")
RTX, OLD_RTX = "trtrtx", "trtrtx-1.6"
MODEL_SECONDS = 420.0
CUDA_TESTS = "tests/runtime/trt/test_gpu.py"  # without TensorRT, those of memory and copies alone
ORT_TESTS = "tests/runtime/graphs/test_ort_cuda_gpu.py"
MODEL_TESTS = "tests/models/test_gpu.py"


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A backend that the card may accept.

    Attributes:
        name: In the names of its steps.
        device: Name of the device, without a precision.
        target: Of its engines: "current", "portable", or none.
        site: Its carried packages.
        flavor: Which TensorRT.
    """

    name: str
    device: str
    target: str = ""
    site: str = ""
    flavor: str = "tensorrt_rtx"

    @property
    def sites(self) -> tuple[str, ...]:
        """Folders of its carried packages."""
        return (self.site,) if self.site else ()

    @property
    def engines(self) -> tuple[str, ...]:
        """Arguments of the steps that build engines."""
        return ("--flavor", self.flavor, "--target", self.target) if self.target else ()

    def probe(self) -> Step:
        """Whether it runs the stored bundle."""
        arguments = ("probe", "--device", self.device, *self.engines)
        return Step(name=f"probe {self.name}", arguments=arguments, seconds=45, sites=self.sites)

    def check(self, size: str, precision: str, seconds: float) -> Step:
        """Build engines where it needs them; then golden requests, invariants and times."""
        arguments = ("check", "--size", size, "--device", f"{self.device}-{precision}", *self.engines)
        return Step(name=f"{self.name} {size} {precision}", arguments=arguments, seconds=seconds, sites=self.sites)


ORT = Backend(name="ort-cuda", device="cuda", site="ortgpu")
TENSORRTS = (
    Backend(name="tensorrt", device="tensorrt", target="current", flavor="tensorrt"),
    *(
        Backend(name=f"{site} {target}", device="tensorrt", target=target, site=site)
        for site in (RTX, OLD_RTX)
        for target in ("current", "portable")
    ),
)


class Models:
    """The exported models. The larger one is exported in the background, from the first phase on."""

    def __init__(self, runner: Runner, sizes: tuple[str, ...]) -> None:
        self.sizes = sizes
        self._runner = runner
        self._later: dict[str, subprocess.Popen[str]] = {}

    def step(self, size: str) -> Step:
        """Exports a model, unless it was carried or exported before."""
        arguments = ("model", "--size", size)
        return Step(name=f"model {size}", arguments=arguments, seconds=MODEL_SECONDS, leaves=f"models/{size}")

    def begin(self) -> None:
        """Start the exports of all but the first."""
        for size in self.sizes[1:]:
            if not (self._runner.work / "models" / size).exists():
                self._later[size] = self._runner.start(self.step(size))

    def ready(self, size: str) -> bool:
        """Wait for a model within the phase's time."""
        process = self._later.pop(size, None)
        if process is not None:
            left = min(self._runner.until, self._runner.ends) - time.monotonic() - 60  # to measure something with it
            finish(process, max(1.0, left))
        return bool(self._runner.run(self.step(size))["ran"])

    def stop(self) -> None:
        """End exports that no phase waited for; the next call starts them again."""
        for size in list(self._later):
            process = self._later.pop(size)
            finish(process, max(1.0, self._runner.ends - time.monotonic()))


def tests(name: str, file: str, seconds: float, *sites: str) -> Step:
    """The tests of a file that are marked `gpu`."""
    return Step(name=f"tests {name}", arguments=("tests", "--file", file), seconds=seconds, sites=sites)


def first(runner: Runner, models: Models) -> None:
    """The machine, CUDA, PyTorch; what runs at all."""
    small = models.sizes[0]
    runner.run(Step(name="machine", arguments=("machine",), seconds=30))
    runner.run(tests("cuda", CUDA_TESTS, 60))
    for backend in (ORT, *TENSORRTS):
        if backend.site != OLD_RTX or needs_older(runner):
            runner.run(backend.probe())
    runner.run(Step(name="validity", arguments=("validity",), seconds=40, sites=(RTX,)))
    runner.run(Step(name="costs", arguments=("costs",), seconds=45))
    runner.run(Step(name="ipc", arguments=("ipc",), seconds=45))
    models.ready(small)
    runner.run(Step(name=f"torch {small}", arguments=("torch", "--size", small), seconds=60))
    runner.run(tests("model", MODEL_TESTS, 60))
    runner.run(Step(name=f"cpu {small}", arguments=("check", "--size", small, "--device", "cpu"), seconds=120))


def needs_older(runner: Runner) -> bool:
    """Whether an older TensorRT-RTX was carried, and the newer one does not run."""
    newer = [backend for backend in TENSORRTS if backend.site == RTX]
    return (runner.work / "sites" / OLD_RTX).exists() and not any(accepted(runner, newer))


def accepted(runner: Runner, backends: list[Backend]) -> Iterator[Backend]:
    """The backends whose probe ran."""
    for backend in backends:
        if runner.results.get(backend.probe().name, {}).get("ran"):
            yield backend


def second(runner: Runner, models: Models) -> None:
    """TensorRT on the small model."""
    small, running = models.sizes[0], list(accepted(runner, list(TENSORRTS)))
    sites = running[0].sites if running else (RTX,)
    runner.run(tests("tensorrt", CUDA_TESTS, 90, *sites))
    if not models.ready(small):
        return
    for precision in PRECISIONS:
        for backend in running:
            runner.run(backend.check(small, precision, 60))


def third(runner: Runner, models: Models) -> None:
    """ONNX Runtime on CUDA."""
    runner.run(tests("ort-cuda", ORT_TESTS, 90, "ortgpu"))
    if not any(accepted(runner, [ORT])):
        return
    for size in models.sizes:
        if models.ready(size):
            for precision in ("bf16", "fp32", "fp16"):
                runner.run(ORT.check(size, precision, 75))


def fourth(runner: Runner, models: Models) -> None:
    """Attention of training, and copies of keys and values."""
    runner.run(Step(name="kv copies", arguments=("kv-copies",), seconds=40))
    runner.run(Step(name="joint attention", arguments=("joint-attention",), seconds=100))
    for size in models.sizes[1:]:
        runner.run(Step(name=f"torch {size}", arguments=("torch", "--size", size), seconds=60))


def fifth(runner: Runner, models: Models) -> None:
    """What is left."""
    for size in models.sizes[1:]:
        if models.ready(size):
            for backend in accepted(runner, list(TENSORRTS)):
                for precision in ("bf16", "fp32"):
                    runner.run(backend.check(size, precision, 150))
    runner.run(tests("training", MODEL_TESTS, 150, "polars"))


PHASES: dict[int, tuple[float, Callable[[Runner, Models], None]]] = {
    1: (180, first),
    2: (180, second),
    3: (240, third),
    4: (120, fourth),
    5: (600, fifth),
}
