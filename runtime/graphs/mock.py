"""A backend for tests of code around a recommender: its graphs are functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.runtime.bundle.manifest import GraphSpec, Tensor, check_inputs
from unipinrec.runtime.graphs.backend import HostTensor, host_array, opened

Arrays = dict[str, NDArray[Any]]
Handler = Callable[[Arrays], Arrays]


class MockBackend:
    """Graphs that answer what functions return, and zeros where there is none; see `Backend`.

    It needs no inference engine. Pass it as the device: `Recommender.load(bundle, MockBackend(bundle.manifest.graphs,
    ranker=rank), verify=False)`. What a function raises comes out of `recommend`.
    """

    prefill_chunk: int | None = None
    rank_chunk: int | None = None
    rank_runs: int = 1

    def __init__(self, graphs: Mapping[str, GraphSpec], **handlers: Handler) -> None:
        """Answer for graphs.

        Args:
            graphs: What the manifest says of them; inputs and outputs are held to it.
            **handlers: By graph, from all inputs to some or all outputs, by name.
        """
        self._graphs, self._handlers = dict(graphs), handlers

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any] | Tensor]) -> dict[str, Tensor]:
        """See `Backend.run`; an output that does not fit the manifest is a `BackendError` as well."""
        spec = opened(self._graphs, graph)
        check_inputs(graph, spec.inputs, inputs)
        arrays = {name: host_array(value) for name, value in inputs.items()}
        sizes = {
            str(dimension): size
            for one in spec.inputs
            for dimension, size in zip(one.shape, arrays[one.name].shape, strict=True)
        }
        outputs = {one.name: np.zeros([_size(each, sizes) for each in one.shape], one.dtype) for one in spec.outputs}
        if graph in self._handlers:
            outputs |= self._handlers[graph](arrays)
        check_inputs(graph, (*spec.inputs, *spec.outputs), {**inputs, **outputs})
        return {name: HostTensor(value) for name, value in outputs.items()}

    def close(self) -> None:
        """See `Backend.close`."""
        self._graphs = {}


def _size(dimension: int | str, sizes: Mapping[str, int]) -> int:
    """Of an output's dimension: a number, the name of an input's, or such a name "+ 1"."""
    name, _, more = str(dimension).partition(" + ")
    return sizes.get(name, 0) + int(more or 0) if isinstance(dimension, str) else dimension
