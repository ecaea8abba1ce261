"""TensorRT engines, run through the API that TensorRT 10.16, TensorRT 11 and TensorRT-RTX share.

A plan is executable code: load only verified plans (`runtime/trt/store.py`). Each optimisation profile of an engine has
its own execution context, stream, staging memory and lock, so that runs in different profiles overlap. A run ends when
the GPU is done: its outputs are ready for any other stream, and its errors belong to it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import GraphSpec, Tensor, check_inputs
from unipinrec.runtime.graphs.backend import Graphs
from unipinrec.runtime.trt.cuda import Cuda, suppressed
from unipinrec.runtime.trt.library import LogLines, TensorRT
from unipinrec.runtime.trt.load import EngineLoader, EnginePlan, LoadedEngine, uncovered
from unipinrec.runtime.trt.memory import Reader
from unipinrec.runtime.trt.profiles import covering
from unipinrec.runtime.trt.runner import Inputs

log = logging.getLogger(__name__)


class TensorRtBackend:
    """The graphs of a bundle as TensorRT engines on one GPU; see `Backend`.

    Outputs stay in the GPU's memory, and a later run reads them there. All inputs from the host go to the GPU in one
    copy. Several runs rank more candidates than the profiles of the ranker allow.
    """

    prefill_chunk: int | None = None
    rank_chunk: int | None = None
    rank_runs: int = 1

    def __init__(
        self,
        trt: TensorRT,
        cuda: Cuda,
        engines: Mapping[str, bytes | EnginePlan],
        specs: Mapping[str, GraphSpec],
        precision: str,
        kernels: Mapping[str, bytes] | None = None,
    ) -> None:
        """Load engines.

        Args:
            trt: The TensorRT to load them with.
            cuda: The GPU. It stays open when the backend is closed.
            engines: Verified plans, by graph; an `EnginePlan` where loading needs more than the content.
            specs: The graphs in the manifest.
            precision: Of the graphs.
            kernels: The result of `compiled_kernels` in an earlier process on this machine.

        Raises:
            BackendError: An engine does not load, or belongs to another graph; nothing is left in memory.
        """
        self.trt, self.cuda, self.precision = trt, cuda, precision
        self._specs = specs
        self._graphs = Graphs[LoadedEngine]()
        self._reader = Reader(cuda)
        lines = LogLines()
        self._release = weakref.finalize(self, _release, self._graphs, self._reader, cuda)
        try:
            cuda.activate()
            for name, plan in engines.items():
                whole = plan if isinstance(plan, EnginePlan) else EnginePlan(content=plan)
                loader = EngineLoader(trt, cuda, name, lines)
                self._graphs[name] = loader.load(whole, specs[name], (kernels or {}).get(name))
        except BaseException:
            self.close()
            raise
        if "ranker" in self._graphs:
            self.rank_chunk = max(shapes["candidate_vectors"][2][1] for shapes in self._graphs["ranker"].profiles)
        log.info("%s on %s, %s: %s", trt, cuda.info.name, precision, ", ".join(self._graphs))

    def run(self, graph: str, inputs: Inputs) -> dict[str, Tensor]:
        """See `Backend.run`. Runs in one profile wait for each other."""
        spec = self._specs[graph]
        check_inputs(graph, spec.inputs, inputs)
        loaded = self._graphs[graph]
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        index = covering(loaded.profiles, shapes)
        if index is None:
            raise BackendError(uncovered(graph, spec, loaded.profiles, shapes))
        self.cuda.activate()
        return loaded.runners[index].run(inputs, shapes, self._reader)

    def compiled_kernels(self) -> dict[str, bytes]:
        """Kernels that TensorRT-RTX compiled for this GPU, by graph; the next process need not compile them again.

        They are executable code, like a plan. Empty for TensorRT proper, whose plans hold their kernels.
        """
        return {name: bytes(graph.cache.serialize()) for name, graph in self._graphs.items() if graph.cache is not None}

    def close(self) -> None:
        """Wait for present runs and release everything but tensors in use; may be called again."""
        self._release()

    def __enter__(self) -> TensorRtBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _release(engines: dict[str, LoadedEngine], reader: Reader, cuda: Cuda) -> None:
    """Release contexts before their engines."""
    with suppressed("memory of the GPU may be lost"):
        cuda.activate()
    while engines:
        _, engine = engines.popitem()
        engine.release()
    reader.release()
