"""A backend for tests of code around a recommender: functions stand in for the graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.manifest import GraphSpec, Tensor, check_inputs, host_array
from unipinrec.runtime.graphs.backend import Graphs
from unipinrec.runtime.graphs.engine import HostTensor

Arrays = dict[str, NDArray[Any]]
Handler = Callable[[Arrays], Arrays]


class MockBackend:
    """A backend without an inference engine: functions compute the outputs, or they are zeros; see `Backend`.

    Pass it as the device: `Recommender.load(bundle, MockBackend(bundle.manifest.graphs, ranker=rank), verify=False)`.
    `recommend` raises the exceptions of the functions.
    """

    prefill_chunk: int | None = None
    rank_chunk: int | None = None
    rank_runs: int = 1

    def __init__(self, graphs: Mapping[str, GraphSpec], **handlers: Handler) -> None:
        """Mock graphs.

        Args:
            graphs: Their specs in the manifest; inputs and outputs are checked against them.
            **handlers: By graph, a function from all inputs to some or all outputs, by name.

        Raises:
            BackendError: A handler is for no graph.
        """
        if foreign := sorted(set(handlers) - set(graphs)):
            raise BackendError(f"{foreign} are no graphs; there are {sorted(graphs)}")
        self._graphs, self._handlers = Graphs(graphs), handlers

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Tensor]:
        """See `Backend.run`; an output that does not fit the manifest is a `BackendError` as well."""
        spec = self._graphs[graph]
        check_inputs(graph, spec.inputs, inputs)
        arrays = {name: host_array(value) for name, value in inputs.items()}
        sizes = {
            str(dimension): size
            for tensor in spec.inputs
            for dimension, size in zip(tensor.shape, arrays[tensor.name].shape, strict=True)
        }
        outputs = {out.name: np.zeros([_size(size, sizes) for size in out.shape], out.dtype) for out in spec.outputs}
        if graph in self._handlers:
            result = self._handlers[graph](arrays)
            if not isinstance(result, Mapping) or not set(result) <= set(outputs):
                kind = sorted(result) if isinstance(result, Mapping) else type(result).__name__
                raise BackendError(f"{graph}: the function returned {kind}, not some of the outputs {sorted(outputs)}")
            outputs |= result
        check_inputs(graph, (*spec.inputs, *spec.outputs), {**inputs, **outputs})
        return {name: HostTensor(value) for name, value in outputs.items()}

    def close(self) -> None:
        """See `Backend.close`."""
        self._graphs = Graphs()


def _size(dimension: int | str, sizes: Mapping[str, int]) -> int:
    """Size of an output's dimension: a number, the name of an input's dimension, or such a name "+ 1"."""
    name, _, more = str(dimension).partition(" + ")
    return sizes.get(name, 0) + int(more or 0) if isinstance(dimension, str) else dimension
