"""The graphs of a bundle as models of the Open Inference Protocol: metadata, checks of inputs, and runs.

A graph trusts its inputs: lengths and ids index memory. So every value of a client is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError, RequestError
from unipinrec.runtime.bundle.manifest import GraphSpec, Manifest, TensorSpec, check_inputs
from unipinrec.runtime.graphs.backend import MAX_ROWS
from unipinrec.runtime.graphs.engine import WORK_BYTES, work_bytes
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.requests import YEAR_10000_MS
from unipinrec.runtime.server.v2.codec import DATATYPES, ModelMetadata, TensorMetadata

PLATFORMS = {"tensorrt": "tensorrt_plan", "openvino": "openvino_onnx"}
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class GraphLimits:
    """The largest inputs of one inference.

    Attributes:
        batch: Rows.
        candidates: Items to rank, per row.
        work_bytes: Memory that the run may take, see `work_bytes`.
        body_bytes: Bytes of one HTTP body; keys and values of long histories take tens of megabytes.
        pending: HTTP requests that are read, wait or run; with `body_bytes` it bounds their memory.
    """

    batch: int = MAX_ROWS
    candidates: int = 4096
    work_bytes: int = WORK_BYTES
    body_bytes: int = 128 << 20
    pending: int = 4


def graph_metadata(name: str, recommender: Recommender, version: str) -> ModelMetadata:
    """Inputs and outputs of a graph, in the protocol's terms."""
    graph = _graph(name, recommender)
    return ModelMetadata(
        name=name,
        versions=(version,),
        platform=PLATFORMS.get(recommender.device.name.partition("-")[0], "onnxruntime_onnx"),
        inputs=tuple(map(_metadata, graph.inputs)),
        outputs=tuple(map(_metadata, graph.outputs)),
    )


def output_names(name: str, recommender: Recommender) -> tuple[str, ...]:
    """Names of a graph's outputs, in order."""
    return tuple(spec.name for spec in _graph(name, recommender).outputs)


def check_graph_inputs(name: str, recommender: Recommender, inputs: Arrays, limits: GraphLimits) -> None:
    """Check everything that a graph relies on.

    Raises:
        RequestError: An input is missing, unknown, too large, of the wrong type or shape, not finite, or an index out
            of range.
    """
    manifest, specs = recommender.bundle.manifest, _graph(name, recommender).inputs
    try:
        check_inputs(name, specs, inputs)
    except BackendError as error:
        raise RequestError(str(error)) from error
    sizes = {
        dimension: size
        for spec in specs
        for dimension, size in zip(spec.shape, inputs[spec.name].shape, strict=True)
        if isinstance(dimension, str)
    }
    _check_sizes(name, sizes, manifest, limits)
    _check_values(name, inputs, sizes, manifest)


def run_graph(name: str, recommender: Recommender, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """Run a graph over checked inputs; returns its outputs on the host, in order.

    Raises:
        BackendError: The run failed.
        RequestError: Its outputs are not finite, because inputs are enormous.
    """
    outputs = recommender.engine.backend.run(name, inputs)
    arrays = {output: outputs[output].numpy() for output in output_names(name, recommender)}
    for output, array in arrays.items():
        if not np.isfinite(array).all():
            raise RequestError(f"{name}: {output} is not finite; send inputs of ordinary size")
    return arrays


def _graph(name: str, recommender: Recommender) -> GraphSpec:
    return recommender.bundle.manifest.graphs_in(recommender.device.precision)[name]


def _metadata(spec: TensorSpec) -> TensorMetadata:
    shape = tuple(size if isinstance(size, int) else -1 for size in spec.shape)
    return TensorMetadata(name=spec.name, datatype=DATATYPES[spec.dtype], shape=shape)


def _check_sizes(name: str, sizes: Mapping[str, int], manifest: Manifest, limits: GraphLimits) -> None:
    prefix, most = manifest.model.kv_prefix_slots, manifest.model.max_history
    past, events = sizes.get("past", prefix) - prefix, sizes.get("history", sizes.get("new", 0))
    candidates = sizes.get("candidates", 0)
    bounds = (("batch", sizes["batch"], limits.batch), ("events", past + events, most))
    for unit, size, limit in (*bounds, ("candidates", candidates, limits.candidates)):
        if size > limit:
            raise RequestError(f"{name}: {size} {unit} were sent; at most {limit} are accepted")
    slots = past + events + prefix
    needed = work_bytes(manifest.model, sizes["batch"], max(events, candidates, 1), slots)
    if needed > limits.work_bytes:
        raise RequestError(
            f"{name}: {sizes['batch']} rows of {max(events, candidates)} events or candidates over {slots} slots take "
            f"up to {needed >> 10:,} KiB; at most {limits.work_bytes >> 10:,} KiB are accepted: send fewer at a time"
        )
    if past < 0 or ("past" in sizes and past == 0):
        raise RequestError(
            f"{name}: past_key_values hold {sizes['past']} slots; the keys and values of a history of n events "
            f"have n + {prefix}"
        )


def _check_values(name: str, inputs: Arrays, sizes: Mapping[str, int], manifest: Manifest) -> None:
    time = (manifest.missing_timestamp_ms, YEAR_10000_MS - 1)
    past = sizes.get("past", 0) - manifest.model.kv_prefix_slots
    bounds = {
        "lengths": (1, sizes.get("history", sizes.get("new", 0))),
        "past_lengths": (1, past),
        "surfaces": (0, len(manifest.surfaces) - 1),
        "timestamps_ms": time,
        "past_timestamps_ms": time,
    }
    for tensor, (least, most) in bounds.items():
        if tensor in inputs:
            low, high = inputs[tensor].min(), inputs[tensor].max()
            if low < least or high > most:
                raise RequestError(f"{name}: {tensor} holds {low} to {high}; its values must be from {least} to {most}")
