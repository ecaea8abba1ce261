"""One graph becomes one engine: the one place that builds with TensorRT 10.16, TensorRT 11 and TensorRT-RTX.

Networks are strongly typed: the graph says what computes in which precision, and the builder keeps to it. Attention in
bf16 and fp16 must become one kernel, or the build fails; in fp32, for which there is none, it may be taken apart.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.trt.layers import FP32, LayerReport, network_type, products_of, report_layers
from unipinrec.runtime.trt.library import LogLines, TensorRT, tensorrt_logger
from unipinrec.runtime.trt.profiles import ProfileShapes
from unipinrec.runtime.trt.record import PORTABLE, BuildOptions

Progress = Callable[[float, str], None]


ACTIVATIONS = re.compile(r"^Total Activation Memory: (\d+) bytes")
DEFAULTS = BuildOptions()
POLL_S = 0.1
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class BuildTask:
    """What to build.

    Attributes:
        profiles: Shapes to cover.
        targets: GPU architectures to build for without a GPU, or "portable"; None = the GPU of this machine.
        options: See `BuildOptions`.
        timing_cache: File of kernel timings that a build reads and adds to; TensorRT proper alone has them.
        progress: Called from other threads with the share that is done and what is being done.
    """

    profiles: tuple[ProfileShapes, ...]
    targets: tuple[str, ...] | None = None
    options: BuildOptions = DEFAULTS
    timing_cache: Path | None = None
    progress: Progress = lambda share, phase: None


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltEngine:
    """An engine that was built, in memory.

    Attributes:
        plan: The engine itself: executable code.
        layers: What it computes in.
        seconds: What the build took.
        activation_bytes: Scratch memory of each profile, as far as the builder told.
    """

    plan: bytes
    layers: LayerReport
    seconds: float
    activation_bytes: tuple[int, ...]


def known_targets(trt: TensorRT) -> tuple[str, ...]:
    """Architectures that can be built for without a GPU, as "sm_89"; none with TensorRT proper."""
    known = getattr(trt.module, "ComputeCapability", None) if trt.flavor == "tensorrt_rtx" else None
    names = [] if known is None else [name for name in known.__members__ if name.startswith("SM")]
    return tuple(f"sm_{name.removeprefix('SM')}" for name in names)


def check_task(trt: TensorRT, task: BuildTask) -> None:
    """Refuse what this TensorRT cannot build, before anything is read.

    Raises:
        BackendError: It cannot; names what was asked and what is possible.
    """
    options, rtx = task.options, trt.flavor == "tensorrt_rtx"
    if task.targets is not None:
        if not rtx:
            raise BackendError(
                f"{trt} builds on the GPU that it builds for; TensorRT-RTX builds without: --flavor tensorrt_rtx"
            )
        known = known_targets(trt)
        unknown = [target for target in task.targets if target not in known]
        if unknown and task.targets != (PORTABLE,):
            raise BackendError(
                f"{trt} has no target {', '.join(unknown)}; it has {', '.join(known)}, or {PORTABLE} alone"
            )
        if options.strip_weights or options.version_compatible:
            raise BackendError(
                f"{trt} strips weights and makes version-compatible engines on a machine with a GPU alone; "
                "leave the option out, or compile there without a target"
            )
    if rtx and task.timing_cache is not None:
        raise BackendError(f"{trt} keeps no timings of kernels, it compiles them when it first runs; no timing cache")


def build_engine(trt: TensorRT, graph_file: Path, task: BuildTask) -> BuiltEngine:
    """Build a graph; Ctrl-C ends the build at its next step.

    Raises:
        BackendError: The graph cannot be built as asked; with what TensorRT said.
        KeyboardInterrupt: The build was interrupted.
    """
    check_task(trt, task)
    stop = threading.Event()
    # Signals are handled in the main thread. In this one they would be raised inside TensorRT's calls to us, which
    # ends the process.
    with ThreadPoolExecutor(1, "unipinrec-build") as pool:
        building = pool.submit(_Build(trt, graph_file, task, stop).run)
        try:
            while not building.done():
                wait({building}, POLL_S)  # a signal that another thread gets does not wake this one
        except KeyboardInterrupt:
            stop.set()
            raise
        return building.result()


class _Build:
    """One build. Its objects of TensorRT are released in the order in which they need each other."""

    def __init__(self, trt: TensorRT, graph_file: Path, task: BuildTask, stop: threading.Event) -> None:
        self._trt, self._module, self._file, self._task, self._stop = trt, trt.module, graph_file, task, stop
        self._lines = LogLines(keep=lambda line: "LayerType: " in line or ACTIVATIONS.match(line) is not None)

    def run(self) -> BuiltEngine:
        began = time.monotonic()
        try:
            return self._build(began)
        except BackendError:
            raise
        except Exception as error:  # its exceptions share no base class
            raise self._failed("does not build it", str(error)) from error

    def _build(self, began: float) -> BuiltEngine:
        module = self._module
        logger = tensorrt_logger(module, self._lines)
        builder = module.Builder(logger)
        network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = module.OnnxParser(network, logger)  # holds the weights that the network refers to
        if not parser.parse_from_file(str(self._file)):
            found = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
            raise self._failed("does not read it", found or self._lines.reason())
        _let_fp32_attention_fall_apart(module, network)
        products = products_of(module, network)
        config, monitor = self._config(builder), progress_monitor(module, self._task.progress, self._stop)
        config.progress_monitor = monitor
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            stopped = "it was interrupted" if self._stop.is_set() else self._lines.reason()
            raise self._failed("does not build it", stopped)
        plan = bytes(serialized)
        self._keep_timings(config)
        layers = report_layers(self._describe(plan, logger), products)
        self._task.progress(1.0, "done")
        activations = tuple(int(told[1]) for told in map(ACTIVATIONS.match, self._lines.kept) if told)
        seconds = time.monotonic() - began
        return BuiltEngine(plan=plan, layers=layers, seconds=seconds, activation_bytes=activations)

    def _config(self, builder: Any) -> Any:
        module, task = self._module, self._task
        config = builder.create_builder_config()
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        flags = module.BuilderFlag
        config.clear_flag(flags.TF32)  # fp32 is what was asked for, and what the golden requests are compared with
        if task.options.optimization_level is not None:
            config.builder_optimization_level = task.options.optimization_level
        if task.options.workspace_bytes is not None:
            config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, task.options.workspace_bytes)
        if task.options.strip_weights:
            config.set_flag(flags.STRIP_PLAN)
        if task.options.version_compatible:
            config.set_flag(flags.VERSION_COMPATIBLE)
        for shapes in task.profiles:
            profile = builder.create_optimization_profile()
            for name, (smallest, usual, largest) in shapes.items():
                profile.set_shape(name, smallest, usual, largest)
            if config.add_optimization_profile(profile) < 0:
                raise self._failed(f"takes no profile {shapes}", self._lines.reason())
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
                raise self._failed(f"takes no target {name}", self._lines.reason())

    def _use_timings(self, config: Any) -> None:
        path = self._task.timing_cache
        if path is not None:
            known = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
            if not config.set_timing_cache(known, ignore_mismatch=False):
                log.warning("%s was made on another GPU or by another TensorRT; it is begun anew", path)
                config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)

    def _keep_timings(self, config: Any) -> None:
        path = self._task.timing_cache
        if path is not None:
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            partial.write_bytes(bytes(config.get_timing_cache().serialize()))
            partial.replace(path)

    def _describe(self, plan: bytes, logger: Any) -> str:
        """The engine's layers: from the inspector where there is a GPU to load it on, else from the builder's log."""
        logged = "\n".join(line for line in self._lines.kept if "LayerType: " in line)
        if self._task.targets is not None:
            return logged
        runtime = self._module.Runtime(logger)
        runtime.engine_host_code_allowed = self._task.options.version_compatible
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._failed("does not load what it built", self._lines.reason())
        inspector = engine.create_engine_inspector()
        told: str = inspector.get_engine_information(self._module.LayerInformationFormat.ONELINE)
        return told if "LayerType: " in told else logged

    def _failed(self, what: str, reason: str) -> BackendError:
        return BackendError(f"{self._file}: {self._trt} {what}: {reason}")


def _let_fp32_attention_fall_apart(module: Any, network: Any) -> None:
    """No kernel computes attention in fp32, nor, by itself, that of a single query; elsewhere one must."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == module.LayerType.ATTENTION_INPUT:
            query = layer.get_input(0)
            layer.__class__ = module.IAttentionInputLayer
            layer.attention.decomposable = network_type(query) == FP32 or tuple(query.shape)[2] == 1


def refit_engine(trt: TensorRT, engine: Any, graph: GraphFile, lines: LogLines, logger: Any) -> None:
    """Put the weights back into an engine that was built without them (`BuildOptions.strip_weights`).

    Raises:
        BackendError: They do not fit it.
    """
    module = trt.module
    refitter = module.Refitter(engine, logger)
    with graph.in_folder() as file:
        fits = module.OnnxParserRefitter(refitter, logger).refit_from_file(str(file))
    if not fits:
        raise BackendError(f"{graph.name}: its weights do not fit the engine: {lines.reason()}; compile it again")
    if not refitter.refit_cuda_engine():
        raise BackendError(f"{graph.name}: {trt} does not put its weights into the engine: {lines.reason()}")


@dataclass(kw_only=True)
class _Phase:
    """A phase of a build: steps done of all of them, and the share of its present step that phases within it did."""

    steps: int
    parent: str | None
    done: int = 0
    within: float = 0.0


@dataclass(kw_only=True)
class _Phases:
    """The phases that are under way, by name, and how far the whole is."""

    running: dict[str, _Phase] = field(default_factory=dict)
    share: float = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self.running[name] = _Phase(steps=max(1, steps), parent=parent or None)

    def step(self, name: str) -> float:
        phase = self.running.get(name)
        if phase is not None:
            phase.done, phase.within = phase.done + 1, 0.0
            self._climb(phase)
        return self.share

    def finish(self, name: str) -> None:
        self.running.pop(name, None)

    def _climb(self, phase: _Phase) -> None:
        share = min(1.0, (phase.done + phase.within) / phase.steps)
        above = self.running.get(phase.parent) if phase.parent else None
        if above is None:
            self.share = max(self.share, share)
        else:
            above.within = share
            self._climb(above)


def progress_monitor(module: Any, progress: Progress, stop: threading.Event) -> Any:
    """A monitor for a build's configuration, which must not outlive it.

    Args:
        module: TensorRT's module.
        progress: Called from TensorRT's own threads with the share that is done and what is being done.
        stop: Ends the build at its next step once it is set.
    """
    phases, lock = _Phases(), threading.Lock()

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # its base comes with the module
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """A phase begins."""
            with lock:
                phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """A step is done; False ends the build."""
            with lock:
                share = phases.step(phase_name)
            progress(share, phase_name)
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            """A phase is over."""
            with lock:
                phases.finish(phase_name)

    return Monitor()
