"""The five graphs: their inputs and outputs, and how the methods of a model become ONNX files."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unipinrec.errors import ExportError
from unipinrec.export.protocol import Candidates, Events, ExportSource, KeyValues, Past
from unipinrec.runtime.bundle.manifest import ModelSpec

OPSET = 24
EVENT_INPUTS = ("item_vectors", "actions", "surfaces", "timestamps_ms", "lengths")
PAST_INPUTS = ("past_lengths", "past_timestamps_ms")
# The bounds steer the exporter alone; a graph file holds only the names.
LARGEST_SIZES = {
    **{"batch": 4096, "history": 65_536, "new": 65_536, "past": 65_536},
    **{"candidates": 1_048_576, "items": 1_048_576},
}
AXES = {name: torch.export.Dim(name, min=1, max=largest) for name, largest in LARGEST_SIZES.items()}


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One graph to export.

    Attributes:
        name: As in the manifest.
        inputs: Tensor name -> names of its dynamic axes by dimension.
        outputs: Tensor names, in order.
        compute: The computation, from named inputs to outputs in order.
    """

    name: str
    inputs: dict[str, dict[int, str]]
    outputs: tuple[str, ...]
    compute: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


def graphs_of(source: ExportSource) -> list[Graph]:
    """The graphs of a model: `ModelSpec.graphs`, and `item_embedder` if it declares content features."""
    model, servable = source.model, source.servable
    outputs = (*model.kv_names("present"), "last_hidden_state")
    retrieval_inputs = ("last_hidden_state", "outcomes") if model.outcome_conditioned else ("last_hidden_state",)
    candidate_axes = {"candidate_vectors": {0: "batch", 1: "candidates"}, "surfaces": {0: "batch"}}
    hidden_axes = {"last_hidden_state": {0: "batch"}} if model.ranker == "past+last_hidden_state" else {}
    graphs = [
        Graph(
            name="encoder",
            inputs=_event_axes("history"),
            outputs=outputs,
            compute=lambda feeds: _flat(*servable.encode(_events(feeds))),
        ),
        Graph(
            name="extend",
            inputs={**_event_axes("new"), **_past_axes(model)},
            outputs=outputs,
            compute=lambda feeds: _flat(*servable.extend(_events(feeds), _past(model, feeds))),
        ),
        Graph(
            name="retrieval",
            inputs={name: {0: "batch"} for name in retrieval_inputs},
            outputs=("queries",),
            compute=lambda feeds: (servable.retrieve(feeds["last_hidden_state"], feeds.get("outcomes")),),
        ),
        Graph(
            name="ranker",
            inputs={**_past_axes(model), **hidden_axes, **candidate_axes, "timestamps_ms": {0: "batch"}},
            outputs=("logits",),
            compute=lambda feeds: (
                source.logits(_past(model, feeds), _candidates(feeds), feeds.get("last_hidden_state", torch.empty(0))),
            ),
        ),
    ]
    needed = [graph for graph in graphs if graph.name in model.graphs]
    return [*needed, _item_embedder(source)] if source.has_content else needed


def _item_embedder(source: ExportSource) -> Graph:
    def compute(feeds: dict[str, Tensor]) -> tuple[Tensor, ...]:
        features = next(iter(feeds.values()))
        rows = torch.full_like(features[:, 0], -1, dtype=torch.int64)
        dense = feeds.get("dense", features.new_zeros((features.shape[0], 0), dtype=torch.float32))
        categories = feeds.get("categories", features.new_zeros((features.shape[0], 0), dtype=torch.int64))
        return (source.servable.embed_items(rows, dense, categories),)

    names = [name for name, declared in (("dense", source.dense), ("categories", source.categories)) if declared]
    return Graph(
        name="item_embedder",
        inputs={name: {0: "items"} for name in names},
        outputs=("item_vectors",),
        compute=compute,
    )


def _event_axes(length: str) -> dict[str, dict[int, str]]:
    return {name: {0: "batch"} if name == "lengths" else {0: "batch", 1: length} for name in EVENT_INPUTS}


def _past_axes(model: ModelSpec) -> dict[str, dict[int, str]]:
    names = model.kv_names("past_key_values")
    return {name: {0: "batch", 2: "past"} for name in names} | {name: {0: "batch"} for name in PAST_INPUTS}


def _events(feeds: dict[str, Tensor]) -> Events:
    return Events(**{name: feeds[name] for name in EVENT_INPUTS})


def _past(model: ModelSpec, feeds: dict[str, Tensor]) -> Past:
    tensors = [feeds[name] for name in model.kv_names("past_key_values")]
    pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
    return Past(key_values=pairs, lengths=feeds["past_lengths"], timestamps_ms=feeds["past_timestamps_ms"])


def _candidates(feeds: dict[str, Tensor]) -> Candidates:
    return Candidates(
        item_vectors=feeds["candidate_vectors"], surfaces=feeds["surfaces"], timestamps_ms=feeds["timestamps_ms"]
    )


def _flat(key_values: KeyValues, last_hidden_state: Tensor) -> tuple[Tensor, ...]:
    return (*(tensor for pair in key_values for tensor in pair), last_hidden_state)


class _Traced(nn.Module):
    """A module for the tracer; its forward takes the named inputs as one dictionary."""

    def __init__(self, graph: Graph, module: nn.Module) -> None:
        super().__init__()
        self.compute, self.module = graph.compute, module

    def forward(self, feeds: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return self.compute(feeds)


def write_graph(graph: Graph, module: nn.Module, example: dict[str, Tensor], path: Path) -> None:
    """Trace a graph with example inputs and write it, with its weights inside or in PATH.data.

    The sizes of the example's axes must be distinct and at least 2.

    Raises:
        ExportError: The tracer cannot express the model.
    """
    shapes: dict[str, Any] = {
        name: {axis: AXES[label] for axis, label in axes.items()} for name, axes in graph.inputs.items()
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                _Traced(graph, module),
                kwargs={"feeds": {name: example[name] for name in graph.inputs}},
                dynamo=True,
                opset_version=OPSET,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_shapes={"feeds": shapes},
                verbose=False,
            )
        except Exception as error:
            raise ExportError(
                f"{graph.name}: torch.onnx cannot express this model: {error}. Common causes: a Python branch on a "
                "tensor's value or shape, or an operator without an ONNX form"
            ) from error
    assert program is not None
    program.save(str(path), external_data=False)
