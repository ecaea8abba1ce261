"""ONNX Runtime on an NVIDIA GPU.

ONNX Runtime silently falls back to the CPU if the GPU's libraries are missing, and for single operators without a GPU
kernel. This module rejects both. Every graph rightly computes sizes of tensors on the CPU. ONNX Runtime's own switch
(`session.disable_cpu_ep_fallback`) rejects those too, so `misplaced` reads each graph's placement from the session.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import GraphSpec, Tensor, check_inputs
from unipinrec.runtime.bundle.sealed import GraphFile
from unipinrec.runtime.graphs.backend import Graphs
from unipinrec.runtime.graphs.ort_cpu import OrtTensor, import_onnxruntime, load_session, ort_value, session_options
from unipinrec.runtime.machine import driver_problem

if TYPE_CHECKING:
    from importlib.metadata import Distribution

CUDA = "CUDAExecutionProvider"
WHEELS = ("onnxruntime", "onnxruntime-gpu")
INSTALL = "run pip uninstall onnxruntime onnxruntime-gpu, then pip install 'unipinrec[gpu]'"
# Operators that compute sizes of tensors. A float does not reach the CPU through these alone: its source is on the GPU.
SIZES = {
    *("Add", "Cast", "Concat", "Div", "Equal", "Expand", "Gather", "Identity", "Max", "Min", "Mod", "Mul", "Range"),
    *("ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"),
}
log = logging.getLogger(__name__)


class OrtCudaBackend:
    """The graphs of a bundle in ONNX Runtime on an NVIDIA GPU; see `Backend`. Outputs stay in its memory.

    Products are computed in the graph's own precision: NVIDIA's shorter format (TF32) is off. Each graph has its own
    memory pool, which grows by the requested size and is kept until `close`.
    """

    prefill_chunk: int | None = None
    rank_chunk: int | None = None
    rank_runs: int = 1

    _driver_problem = staticmethod(driver_problem)
    _provider: ClassVar[str] = CUDA
    _memory: ClassVar[str] = "cuda"
    _settings: ClassVar[Mapping[str, str]] = {
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
    }

    def __init__(
        self, graphs: Mapping[str, GraphFile], specs: Mapping[str, GraphSpec], threads: int = 1, gpu: int = 0
    ) -> None:
        """Load graphs.

        Args:
            graphs: Each graph by name.
            specs: Their specs in the manifest.
            threads: Threads of a run, for sizes that are computed on the CPU.
            gpu: Number of the GPU.

        Raises:
            BackendError: ONNX Runtime, its CUDA provider or the GPU is missing, or cannot run all of a graph.
        """
        self._ort = import_onnxruntime()
        self.version: str = self._ort.__version__
        problem = self._driver_problem() or provider_problem(self._ort, self._provider)
        if problem:
            raise BackendError(problem)
        self._gpu = gpu
        missing = preload(self._ort)
        self._hint = f" ({missing})" if missing else ""
        self._specs = {name: specs[name] for name in graphs}
        self._sessions = Graphs({name: self._load(graph, threads) for name, graph in graphs.items()})
        log.info("ONNX Runtime %s on %s", self.version, self._provider)

    def _load(self, graph: GraphFile, threads: int) -> Any:
        options = session_options(self._ort, threads)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            settings = {**self._settings, **({"device_id": str(self._gpu)} if self._settings else {})}
            session = load_session(self._ort, graph, options, self._provider, settings)
        except BackendError as error:
            raise BackendError(f"{error}{self._hint}") from error
        counts = misplaced(session, self._provider).most_common()
        if counts:
            operators = ", ".join(f"{count} {name}" for name, count in counts)
            raise BackendError(
                f"{graph.name}: ONNX Runtime {self.version} would run {operators} on the CPU; install a newer one "
                "(pip install --upgrade onnxruntime-gpu), or use device cpu"
            )
        return session

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Tensor]:
        """See `Backend.run`."""
        session, spec = self._sessions[graph], self._specs[graph]
        check_inputs(graph, spec.inputs, inputs)
        try:
            binding = session.io_binding()
            for tensor in spec.inputs:
                binding.bind_ortvalue_input(tensor.name, ort_value(self._ort, inputs[tensor.name], tensor.dtype))
            for tensor in spec.outputs:
                binding.bind_output(tensor.name, self._memory, self._gpu)
            session.run_with_iobinding(binding)
            outputs = binding.get_outputs()
        except Exception as error:  # its exceptions share no base class
            raise BackendError(f"{graph}: ONNX Runtime failed: {error}") from error
        return {
            tensor.name: OrtTensor(value=value, owner=session)
            for tensor, value in zip(spec.outputs, outputs, strict=True)
        }

    def close(self) -> None:
        """See `Backend.close`. Memory of outputs is freed with the last reference to them."""
        self._sessions = Graphs()


def provider_problem(ort: Any, provider: str) -> str | None:
    """Why this installation lacks a provider, and what to do; None if it has it."""
    broken = overwritten()
    if broken:
        return broken
    available = ort.get_available_providers()
    if provider in available:
        return None
    wheels = ", ".join(installed_wheels()) or "not installed by pip"
    return f"ONNX Runtime {ort.__version__} ({wheels}) has no {provider}, only {', '.join(available)}; {INSTALL}"


def installed_wheels() -> list[str]:
    """The installed wheels of ONNX Runtime, with their versions."""
    return [f"{wheel.name} {wheel.version}" for wheel in _wheels()]


def overwritten() -> str | None:
    """Why two wheels in one folder do not work, and what to do; None if there are not two."""
    folders = [str(wheel.locate_file("")) for wheel in _wheels()]
    both = len(set(folders)) < len(folders)
    return f"{' and '.join(installed_wheels())} are installed and overwrite each other; {INSTALL}" if both else None


def _wheels() -> list[Distribution]:
    from importlib.metadata import PackageNotFoundError, distribution  # noqa: PLC0415 - it loads email and zipfile

    wheels = []
    for name in WHEELS:
        with contextlib.suppress(PackageNotFoundError):
            wheels.append(distribution(name))
    return wheels


def preload(ort: Any) -> str | None:
    """Load CUDA's libraries from pip's folders; returns the missing libraries and what to do."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):  # it prints, and a command may be printing JSON
            # By itself it looks beside its own package, not in another folder of installed packages.
            folder = nvidia_libraries()
            ort.preload_dlls(**({} if folder is None else {"directory": str(folder)}))
    except Exception as error:  # an older version, or a broken installation: loading the session fails too
        output.write(str(error))
    lines = [line.strip() for line in output.getvalue().splitlines() if line.strip()]
    return f"{'; '.join(lines)}; run pip install 'onnxruntime-gpu[cuda,cudnn]'" if lines else None


def nvidia_libraries() -> Path | None:
    """Folder of the libraries of NVIDIA's wheels for CUDA 13, wherever they are installed."""
    spec = find_spec("nvidia")
    roots = [] if spec is None else spec.submodule_search_locations or []
    return next((folder for root in roots if (folder := Path(root, "cu13", "lib")).is_dir()), None)


def misplaced(session: Any, provider: str) -> Counter[str]:
    """Operators that a session does not run on its provider, except those that compute sizes of tensors.

    Args:
        session: Loaded with `session.record_ep_graph_assignment_info`.
        provider: The expected provider.
    """
    parts = session.get_provider_graph_assignment_info()
    elsewhere = [node for part in parts if part.ep_name != provider for node in part.get_nodes()]
    return Counter(node.op_type for node in elsewhere if node.op_type not in SIZES)
