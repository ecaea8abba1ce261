"""Builds one engine from one graph, with TensorRT 10.16, TensorRT 11 or TensorRT-RTX.

Networks are strongly typed: the builder keeps the precisions of the graph. Attention in bf16 and fp16 must become one
kernel, or the build fails; no such kernel exists for fp32, where TensorRT may decompose attention.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unipinrec.errors import BackendError
from unipinrec.runtime.trt.layers import FP32, LayerReport, network_type, products_of, report_layers
from unipinrec.runtime.trt.library import LogLines, TensorRT, tensorrt_logger
from unipinrec.runtime.trt.network import parse_graph
from unipinrec.runtime.trt.profiles import ProfileShapes
from unipinrec.runtime.trt.record import DEFAULT_OPTIONS, PORTABLE, BuildOptions

Progress = Callable[[float, str], None]
ACTIVATIONS = re.compile(r"^Total Activation Memory: (\d+) bytes")
POLL_S = 0.1
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class BuildTask:
    """How to build an engine.

    Attributes:
        profiles: Shapes to cover.
        targets: GPU architectures to build for without a GPU, or "portable"; None = the GPU of this machine.
        options: See `BuildOptions`.
        timing_cache: File of kernel timings that a build reads and extends; for TensorRT proper alone.
        progress: Called from other threads with the finished share and the name of the phase.
    """

    profiles: tuple[ProfileShapes, ...]
    targets: tuple[str, ...] | None = None
    options: BuildOptions = DEFAULT_OPTIONS
    timing_cache: Path | None = None
    progress: Progress = lambda share, phase: None


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltEngine:
    """A new engine in memory.

    Attributes:
        plan: The engine itself: executable code.
        layers: The precision of its layers.
        seconds: Duration of the build.
        activation_bytes: Scratch memory of each profile that the builder logged.
    """

    plan: bytes
    layers: LayerReport
    seconds: float
    activation_bytes: tuple[int, ...]


def known_targets(trt: TensorRT) -> tuple[str, ...]:
    """Architectures to build for without a GPU, such as "sm_89"; none with TensorRT proper."""
    known = getattr(trt.module, "ComputeCapability", None) if trt.flavor == "tensorrt_rtx" else None
    names = [] if known is None else [name for name in known.__members__ if name.startswith("SM")]
    return tuple(f"sm_{name.removeprefix('SM')}" for name in names)


def check_task(trt: TensorRT, task: BuildTask) -> None:
    """Reject a task that this TensorRT cannot build, before any file is read.

    Raises:
        BackendError: It cannot build the task; names the option and the accepted values.
    """
    options, rtx = task.options, trt.flavor == "tensorrt_rtx"
    if task.targets is not None:
        if not rtx:
            raise BackendError(
                f"{trt} builds on the GPU that it builds for; TensorRT-RTX builds without a GPU: --flavor tensorrt_rtx"
            )
        known = known_targets(trt)
        unknown = [target for target in task.targets if target not in known]
        if unknown and task.targets != (PORTABLE,):
            raise BackendError(
                f"{trt} has no target {', '.join(unknown)}; it has {', '.join(known)}, or {PORTABLE} alone"
            )
        if options.strip_weights or options.version_compatible:
            raise BackendError(
                f"{trt} strips weights and makes version-compatible engines only on a machine with a GPU; "
                "leave the option out, or compile there without a target"
            )
    if rtx and task.timing_cache is not None:
        raise BackendError(f"{trt} has no timing cache, it compiles kernels in its first run; leave the option out")


def build_engine(trt: TensorRT, graph_file: Path, task: BuildTask) -> BuiltEngine:
    """Build a graph; Ctrl-C ends the build at its next step.

    Raises:
        BackendError: The graph cannot be built; with TensorRT's reason.
        KeyboardInterrupt: The build was interrupted.
    """
    check_task(trt, task)
    stop = threading.Event()
    build = _Build(trt, graph_file, task, stop)
    # The main thread handles signals. An exception inside TensorRT's calls to us would end the process, so that the
    # build runs in another thread.
    with ThreadPoolExecutor(1, "unipinrec-build") as pool:
        building = pool.submit(build.run)
        try:
            while not building.done():
                wait({building}, POLL_S)  # a signal to another thread does not wake this one
            return building.result()
        except (BackendError, KeyboardInterrupt):
            stop.set()
            raise
        except Exception as error:  # TensorRT's exceptions share no base class
            raise build.failed("does not build it", str(error)) from error


class _Build:
    """One build. It releases TensorRT's objects in the order of their dependencies."""

    def __init__(self, trt: TensorRT, graph_file: Path, task: BuildTask, stop: threading.Event) -> None:
        self._trt, self._module, self._file, self._task, self._stop = trt, trt.module, graph_file, task, stop
        self._lines = LogLines(keep=lambda line: "LayerType: " in line or ACTIVATIONS.match(line) is not None)

    def run(self) -> BuiltEngine:
        began, module = time.monotonic(), self._module
        logger = tensorrt_logger(module, self._lines)
        builder = module.Builder(logger)
        parsed = parse_graph(self._trt, builder, logger, self._lines, self._file)
        network = parsed.network
        _allow_decomposed_attention(module, network)
        products = products_of(module, network)
        config, monitor = self._config(builder), progress_monitor(module, self._task.progress, self._stop)
        config.progress_monitor = monitor
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise self.failed("does not build it", "it was interrupted" if self._stop.is_set() else None)
        plan = bytes(serialized)
        self._keep_timings(config)
        layers = report_layers(self._describe(plan, logger), products)
        self._task.progress(1.0, "done")
        activations = tuple(int(match[1]) for match in map(ACTIVATIONS.match, self._lines.kept) if match)
        return BuiltEngine(plan=plan, layers=layers, seconds=time.monotonic() - began, activation_bytes=activations)

    def _config(self, builder: Any) -> Any:
        module, task = self._module, self._task
        config = builder.create_builder_config()
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        config.clear_flag(module.BuilderFlag.TF32)  # fp32 stays fp32: the golden requests are compared with it
        if task.options.optimization_level is not None:
            config.builder_optimization_level = task.options.optimization_level
        if task.options.workspace_bytes is not None:
            config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, task.options.workspace_bytes)
        if task.options.strip_weights:
            config.set_flag(module.BuilderFlag.STRIP_PLAN)
        if task.options.version_compatible:
            config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
        for shapes in task.profiles:
            profile = builder.create_optimization_profile()
            for name, (smallest, usual, largest) in shapes.items():
                profile.set_shape(name, smallest, usual, largest)
            if config.add_optimization_profile(profile) < 0:
                raise self.failed(f"takes no profile {shapes}")
        self._set_targets(config)
        self._use_timings(config)
        return config

    def _set_targets(self, config: Any) -> None:
        """Without a target, TensorRT-RTX builds for every architecture from Ampere on."""
        if self._trt.flavor != "tensorrt_rtx" or self._task.targets == (PORTABLE,):
            return
        capabilities = self._module.ComputeCapability
        names = ["CURRENT"] if self._task.targets is None else [t.replace("sm_", "SM") for t in self._task.targets]
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            if not config.set_compute_capability(getattr(capabilities, name), index):
                raise self.failed(f"takes no target {name}")

    def _use_timings(self, config: Any) -> None:
        path = self._task.timing_cache
        if path is not None:
            known = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
            if not config.set_timing_cache(known, ignore_mismatch=False):
                log.warning("%s is from another GPU or another TensorRT; it starts empty", path)
                config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)

    def _keep_timings(self, config: Any) -> None:
        path = self._task.timing_cache
        if path is not None:
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            partial.write_bytes(bytes(config.get_timing_cache().serialize()))
            partial.replace(path)

    def _describe(self, plan: bytes, logger: Any) -> str:
        """The engine's layers: from the inspector if a GPU can load the engine, else from the builder's log."""
        logged = "\n".join(line for line in self._lines.kept if "LayerType: " in line)
        if self._task.targets is not None:
            return logged
        runtime = self._module.Runtime(logger)
        runtime.engine_host_code_allowed = self._task.options.version_compatible
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self.failed("does not load its own engine")
        inspector = engine.create_engine_inspector()
        layers: str = inspector.get_engine_information(self._module.LayerInformationFormat.ONELINE)
        return layers if "LayerType: " in layers else logged

    def failed(self, problem: str, reason: str | None = None) -> BackendError:
        return BackendError(f"{self._file}: {self._trt} {problem}: {reason or self._lines.reason()}")


def _allow_decomposed_attention(module: Any, network: Any) -> None:
    """Let TensorRT decompose attention in fp32 or of a single query, for which no kernel exists; no other."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == module.LayerType.ATTENTION_INPUT:
            query = layer.get_input(0)
            layer.__class__ = module.IAttentionInputLayer
            layer.attention.decomposable = network_type(query) == FP32 or tuple(query.shape)[2] == 1


@dataclass(kw_only=True)
class _Phase:
    """A phase of a build: its steps, and the share of the present step that inner phases have finished."""

    steps: int
    parent: str | None
    done: int = 0
    within: float = 0.0


def _share_of(phases: Mapping[str, _Phase], phase: _Phase) -> float:
    """The share of the outermost phase around a phase, after updating the phases between them."""
    share = min(1.0, (phase.done + phase.within) / phase.steps)
    outer = phases.get(phase.parent) if phase.parent else None
    if outer is None:
        return share
    outer.within = share
    return _share_of(phases, outer)


def progress_monitor(module: Any, progress: Progress, stop: threading.Event) -> Any:
    """A monitor for the configuration of a build; it must outlive the configuration.

    Args:
        module: TensorRT's module.
        progress: Called from TensorRT's own threads with the finished share and the name of the phase.
        stop: Once set, ends the build at its next step.
    """
    phases: dict[str, _Phase] = {}
    lock, share = threading.Lock(), 0.0

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # its base comes with the module
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """A phase begins."""
            with lock:
                phases[phase_name] = _Phase(steps=max(1, num_steps), parent=parent_phase)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """A step is done; False ends the build."""
            nonlocal share
            with lock:
                phase = phases.get(phase_name)
                if phase is not None:
                    phase.done, phase.within = phase.done + 1, 0.0
                    share = max(share, _share_of(phases, phase))
                total = share
            progress(total, phase_name)
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            """A phase is over."""
            with lock:
                phases.pop(phase_name, None)

    return Monitor()
