"""The five graphs: which inputs and outputs each has, and how the model's methods become ONNX files."""

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
from unipinrec.export.protocol import Candidates, Events, ExportSource, Past

OPSET = 24
EVENT_INPUTS = ("item_vectors", "actions", "surfaces", "timestamps_ms", "lengths")
PAST_INPUTS = ("past_lengths", "past_timestamps_ms")
CANDIDATE_INPUTS = ("candidate_vectors", "surfaces", "timestamps_ms")
# Bounds only steer the exporter; the files hold the names.
AXES = {
    "batch": torch.export.Dim("batch", min=1, max=4096),
    "history": torch.export.Dim("history", min=1, max=65_536),
    "new": torch.export.Dim("new", min=1, max=65_536),
    "past": torch.export.Dim("past", min=1, max=65_536),
    "candidates": torch.export.Dim("candidates", min=1, max=1_048_576),
    "items": torch.export.Dim("items", min=1, max=1_048_576),
}


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
    """The graphs of a model; `item_embedder` only where it declares content features."""
    graphs = [_encoder(source), _extend(source), _retrieval(source), _ranker(source)]
    return [*graphs, _item_embedder(source)] if source.has_content else graphs


def _encoder(source: ExportSource) -> Graph:
    def compute(feeds: dict[str, Tensor]) -> tuple[Tensor, ...]:
        key_values, last = source.servable.encode(_events(feeds))
        return (*(t for pair in key_values for t in pair), last)

    return Graph(
        name="encoder",
        inputs=_event_axes("history"),
        outputs=(*source.model.kv_names("present"), "last_hidden_state"),
        compute=compute,
    )


def _extend(source: ExportSource) -> Graph:
    def compute(feeds: dict[str, Tensor]) -> tuple[Tensor, ...]:
        key_values, last = source.servable.extend(_events(feeds), _past(source, feeds))
        return (*(t for pair in key_values for t in pair), last)

    return Graph(
        name="extend",
        inputs={**_event_axes("new"), **_past_axes(source)},
        outputs=(*source.model.kv_names("present"), "last_hidden_state"),
        compute=compute,
    )


def _retrieval(source: ExportSource) -> Graph:
    conditioned = source.model.outcome_conditioned
    names = ("last_hidden_state", "outcomes") if conditioned else ("last_hidden_state",)
    return Graph(
        name="retrieval",
        inputs={name: {0: "batch"} for name in names},
        outputs=("queries",),
        compute=lambda feeds: (source.servable.retrieve(feeds["last_hidden_state"], feeds.get("outcomes")),),
    )


def _ranker(source: ExportSource) -> Graph:
    def compute(feeds: dict[str, Tensor]) -> tuple[Tensor, ...]:
        candidates = Candidates(
            item_vectors=feeds["candidate_vectors"], surfaces=feeds["surfaces"], timestamps_ms=feeds["timestamps_ms"]
        )
        return (source.servable.rank(_past(source, feeds), candidates),)

    axes = {name: {0: "batch"} for name in CANDIDATE_INPUTS} | {"candidate_vectors": {0: "batch", 1: "candidates"}}
    return Graph(name="ranker", inputs={**_past_axes(source), **axes}, outputs=("logits",), compute=compute)


def _item_embedder(source: ExportSource) -> Graph:
    def compute(feeds: dict[str, Tensor]) -> tuple[Tensor, ...]:
        given = next(iter(feeds.values()))
        rows = torch.full_like(given[:, 0], -1, dtype=torch.int64)
        dense = feeds.get("dense", given.new_zeros((given.shape[0], 0), dtype=torch.float32))
        categories = feeds.get("categories", given.new_zeros((given.shape[0], 0), dtype=torch.int64))
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


def _past_axes(source: ExportSource) -> dict[str, dict[int, str]]:
    names = source.model.kv_names("past_key_values")
    return {name: {0: "batch", 2: "past"} for name in names} | {name: {0: "batch"} for name in PAST_INPUTS}


def _events(feeds: dict[str, Tensor]) -> Events:
    return Events(**{name: feeds[name] for name in EVENT_INPUTS})


def _past(source: ExportSource, feeds: dict[str, Tensor]) -> Past:
    tensors = [feeds[name] for name in source.model.kv_names("past_key_values")]
    pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
    return Past(key_values=pairs, lengths=feeds["past_lengths"], timestamps_ms=feeds["past_timestamps_ms"])


class _Traced(nn.Module):
    """Gives the tracer a module whose forward takes the named inputs as one dictionary."""

    def __init__(self, graph: Graph, module: nn.Module) -> None:
        super().__init__()
        self.compute, self.module = graph.compute, module

    def forward(self, feeds: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return self.compute(feeds)


def write_graph(graph: Graph, module: nn.Module, example: dict[str, Tensor], path: Path) -> None:
    """Trace a graph with example inputs (sizes distinct and at least 2) and write it, weights inside or in PATH.data.

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
