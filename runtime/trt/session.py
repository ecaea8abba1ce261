"""TensorRT engines, run through the API that TensorRT 10.16, TensorRT 11 and TensorRT-RTX share.

A plan is executable code: only plans that were verified may be given to it (`runtime/trt/store.py`). Each
optimisation profile of an engine has an execution context, a stream, staging memory and a lock of its own, so that runs
in different profiles overlap. A run ends with the GPU done: its outputs are ready for any other stream, and what went
wrong belongs to it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import GraphSpec, Tensor, check_inputs
from unipinrec.runtime.graphs.backend import opened
from unipinrec.runtime.trt.cuda import Cuda, suppressed
from unipinrec.runtime.trt.io import uncovered
from unipinrec.runtime.trt.lane import Given
from unipinrec.runtime.trt.library import LogLines, TensorRT
from unipinrec.runtime.trt.load import EngineLoader, LoadedEngine, Plan
from unipinrec.runtime.trt.memory import Reader
from unipinrec.runtime.trt.profiles import covering

log = logging.getLogger(__name__)


class TensorRtBackend:
    """The graphs of a bundle as TensorRT engines on one GPU; see `Backend`.

    Outputs stay in the GPU's memory, and a later run reads them where they lie. All inputs from the host go there in
    one copy. More candidates than the profiles of the ranker allow are ranked in several runs.
    """

    prefill_chunk: int | None = None
    rank_chunk: int | None = None
    rank_runs: int = 1

    def __init__(
        self,
        trt: TensorRT,
        cuda: Cuda,
        engines: Mapping[str, bytes | Plan],
        specs: Mapping[str, GraphSpec],
        precision: str,
        kernels: Mapping[str, bytes] | None = None,
    ) -> None:
        """Load engines.

        Args:
            trt: What to load them with.
            cuda: The GPU. It stays open when the backend is closed.
            engines: Verified plans, by graph; a `Plan` where it takes more than its content to load one.
            specs: What the manifest says of the graphs.
            precision: What the graphs compute in.
            kernels: What `compiled_kernels` gave in an earlier process on this machine.

        Raises:
            BackendError: An engine does not load, or is not one of its graph; nothing is left in memory.
        """
        self.trt, self.cuda, self.precision = trt, cuda, precision
        self._specs = specs
        self._graphs: dict[str, LoadedEngine] = {}
        self._reader = Reader(cuda)
        lines = LogLines()
        self._release = weakref.finalize(self, _release, self._graphs, self._reader, cuda)
        try:
            cuda.activate()
            for name, plan in engines.items():
                whole = plan if isinstance(plan, Plan) else Plan(content=plan)
                loader = EngineLoader(trt, cuda, name, lines)
                self._graphs[name] = loader.load(whole, specs[name], (kernels or {}).get(name))
        except BaseException:
            self.close()
            raise
        if "ranker" in self._graphs:
            self.rank_chunk = max(shapes["candidate_vectors"][2][1] for shapes in self._graphs["ranker"].profiles)
        log.info("%s on %s, %s: %s", trt, cuda.name, precision, ", ".join(self._graphs))

    def run(self, graph: str, inputs: Given) -> dict[str, Tensor]:
        """See `Backend.run`. Runs in one profile are made one after the other."""
        spec = self._specs[graph]
        check_inputs(graph, spec.inputs, inputs)
        loaded = opened(self._graphs, graph)
        shapes = {name: tuple(_shape(given)) for name, given in inputs.items()}
        place = covering(loaded.profiles, shapes)
        if place is None:
            raise BackendError(uncovered(graph, spec, loaded.profiles, shapes))
        self.cuda.activate()
        return loaded.lanes[place].run(inputs, shapes, self._reader)

    def compiled_kernels(self) -> dict[str, bytes]:
        """What TensorRT-RTX compiled for this GPU when it loaded and ran the engines, by graph; it spares the next
        process that work. Executable code, like a plan. Empty for TensorRT proper, whose plans hold their kernels.
        """
        return {name: bytes(graph.cache.serialize()) for name, graph in self._graphs.items() if graph.cache is not None}

    def close(self) -> None:
        """Wait for running runs and release everything but the tensors that are still held; may be called again."""
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


def _shape(given: NDArray[Any] | Tensor) -> tuple[int, ...]:
    return given.shape if isinstance(given, np.ndarray) else tuple(given.shape())
