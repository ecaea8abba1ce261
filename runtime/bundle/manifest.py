"""`manifest.json`: what a bundle holds, so that it can be checked, served, or driven by any ONNX client.

The manifest lists every other file with its sha256; `manifest.sha256` holds the manifest's own, which is also the
bundle's identity. Graph and tensor names follow the Hugging Face convention for key/value caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.quality import Evaluation, SampleQuality
from unipinrec.runtime.requests import Order

FORMAT_VERSION = 1
GRAPHS = ("encoder", "extend", "retrieval", "ranker", "item_embedder")
REQUIRED_GRAPHS = GRAPHS[:4]
# What f32 may be rounded to on its way into a graph.
REDUCED: dict[str, np.dtype[Any]] = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One graph input or output; a dimension is a size, or a name where it is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class GraphSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ONNX graph of the bundle."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class FileSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fingerprint of one file."""

    sha256: str
    size_bytes: int


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a server must know of the model.

    Attributes:
        num_layers: Layers, each with one key and one value tensor.
        num_kv_heads: Key/value heads.
        head_dim: Width of a head.
        hidden_size: Width of `last_hidden_state`.
        item_dim: E, width of item vectors and queries.
        max_history: Longest history in events.
        kv_prefix_slots: Slots before the first event in the key/value tensors of a history.
        outcome_conditioned: Whether the retrieval graph has an `outcomes` input.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    item_dim: int
    max_history: int
    kv_prefix_slots: int
    outcome_conditioned: bool

    def kv_names(self, prefix: str) -> list[str]:
        """Names of the key/value tensors in layer order; `prefix` is "present" or "past_key_values"."""
        return [f"{prefix}.{layer}.{part}" for layer in range(self.num_layers) for part in ("key", "value")]


class IndexSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The hnswlib index: what must be known to load it, and how well it finds.

    `count` is how many items are in the file, those marked as deleted included. `recall` is the share of the exact top
    `recall_k` that the index finds at `ef_search`, measured when it was built; `recall_target` is what was aimed at.
    """

    space: str
    dim: int
    count: int
    m: int
    ef_construction: int
    ef_search: int
    seed: int
    recall: float
    recall_k: int
    recall_target: float = 0.99


class ParityCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One comparison of an exported graph with PyTorch; `problem` is None where it passed."""

    graph: str
    check: str
    case: str
    max_abs_diff: float | None
    problem: str | None


class ParityReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All comparisons made at export, and the largest difference in any value."""

    tolerance: float
    max_abs_diff: float
    checks: tuple[ParityCheck, ...]


class Agreement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far answers in less precision agree with fp32; means over requests, except for the two extremes.

    Attributes:
        requests: How many were compared.
        ranked_overlap: Share of the best ten by score that fp32 has among its best ten, ties included.
        ranked_overlap_strict: The same without ties.
        retrieved_overlap: Share of the ten items most similar to the query, likewise.
        retrieved_overlap_strict: The same without ties.
        min_query_cosine: Of the query that turned furthest.
        max_logit_diff: By how much the logit that is furthest off differs, what rounding explains left aside.
        problem: What is out of bounds; None where nothing is.
    """

    requests: int
    ranked_overlap: float
    ranked_overlap_strict: float
    retrieved_overlap: float
    retrieved_overlap_strict: float
    min_query_cosine: float
    max_logit_diff: float
    problem: str | None


class PrecisionSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Graphs in another precision than fp32; graphs that are not among them run in fp32.

    Attributes:
        graphs: The graphs by name. Their keys and values have this precision, all other inputs and outputs are f32.
        agreement: How they recommend what fp32 recommends; its `problem` is not None only where the loss was accepted.
        auc_change: AUC of each action less that of fp32, on held-out events; empty where the bundle was exported
            without data.
    """

    graphs: dict[str, GraphSpec]
    agreement: Agreement
    auc_change: dict[str, float]


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A TensorRT engine that was built ahead of time and travels in the bundle.

    Attributes:
        file: Its file.
        key: What it was built from and for, as one hash.
        graph: Name of the graph.
        precision: Of the graph.
        flavor: "tensorrt" or "tensorrt_rtx".
        version: Of the library that built it.
        targets: GPU architectures that it runs on, as "sm_89".
    """

    file: str
    key: str
    graph: str
    precision: str
    flavor: str
    version: str
    targets: tuple[str, ...]


class OrderSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What orders a slate where a request does not say (docs/ranking.md).

    Attributes:
        by: "value", "blend", "product" or "retrieval"; with the last the ranker does not run.
        retrieval_scale: A similarity times this is the logit of retrieval's softmax, as it was trained.
        reason: Why this order, for people.
        retrieval_weight: How much of that logit the blend takes.
    """

    by: Order
    retrieval_scale: float
    reason: str
    retrieval_weight: float = 0.0


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What `manifest.json` holds; a field that has its default is left out, as older versions know no such field.

    Attributes:
        format_version: Format of the bundle; a reader refuses a newer one.
        created: UTC time, ISO 8601.
        model: What a server must know of the model.
        config: The exporter's full description of the model, for people.
        actions: Action names in the order of every action vector.
        positive_actions: Those that the final score weighs by default.
        surfaces: Surface names; the index is the id, 0 = unknown.
        dense: Width of each dense item feature, in the order of the `dense` input of the item embedder.
        categories: Words of each categorical item feature; code = index + 1, 0 = unknown.
        num_items: Rows of the item table, retired ones included.
        missing_timestamp_ms: What stands for an unknown time in `timestamps_ms`.
        precision: Type of the weights of `graphs`.
        graphs: The graphs by name; `item_embedder` is absent where the model declares no content features.
        files: Every other file of the bundle.
        index: The nearest-neighbour index.
        parity: Proof that the graphs compute what PyTorch computes.
        metrics: Offline metrics of the checkpoint, if it has any.
        data_fingerprint: sha256 of the catalogue's ids and features, and of what the data declares.
        tools: Versions of what wrote the bundle.
        num_retired: Rows that are never retrieved.
        parent: Hash of the bundle that this one is an update of.
        kv_namespace: What cached keys and values depend on: the hash of the exported bundle at the root of all updates.
            None in that bundle itself.
        kv_rows: Rows of that bundle, which stand for the same items in all of its updates; later ones do not. None
            in that bundle itself.
        precisions: Further graphs, by precision: bf16, fp16, fp8.
        engines: TensorRT engines built ahead of time.
        order: What orders a slate; None in bundles of earlier versions, which are ordered by value.
        evaluation: How good the served lists were at export; None where the bundle was exported without data.
        sample: How good those of the sample users are; None where the bundle carries none.
    """

    format_version: int
    created: str
    model: ModelSpec
    config: dict[str, Any]
    actions: tuple[str, ...]
    positive_actions: tuple[str, ...]
    surfaces: tuple[str, ...]
    dense: dict[str, int]
    categories: dict[str, tuple[str, ...]]
    num_items: int
    missing_timestamp_ms: int
    precision: str
    graphs: dict[str, GraphSpec]
    files: dict[str, FileSpec]
    index: IndexSpec
    parity: ParityReport
    metrics: dict[str, Any] | None
    data_fingerprint: str
    tools: dict[str, str]
    num_retired: int = 0
    parent: str | None = None
    kv_namespace: str | None = None
    kv_rows: int | None = None
    precisions: dict[str, PrecisionSpec] = {}
    engines: tuple[EngineSpec, ...] = ()
    order: OrderSpec | None = None
    evaluation: Evaluation | None = None
    sample: SampleQuality | None = None

    def graphs_in(self, precision: str) -> dict[str, GraphSpec]:
        """The graphs that answering a request takes, by name, in a precision that the bundle holds."""
        graphs = {name: self.graphs[name] for name in REQUIRED_GRAPHS}
        return graphs if precision == self.precision else {**graphs, **self.precisions[precision].graphs}


def check_inputs(graph: str, wanted: Sequence[TensorSpec], inputs: Mapping[str, NDArray[Any] | Tensor]) -> None:
    """Check that names, types and shapes fit a graph, and that arrays hold finite numbers. Copies nothing.

    f32 fits inputs of less precision as well; see `Backend.run`.

    Raises:
        BackendError: They do not; names the graph, the input, what was given and what is expected.
    """
    names = [spec.name for spec in wanted]
    if set(inputs) != set(names):
        raise BackendError(f"{graph}: the inputs are {sorted(inputs)}, expected {sorted(names)}")
    sizes: dict[str, int] = {}
    for spec in wanted:
        given = inputs[spec.name]
        dtype, shape = _description(given)
        if not _converts(dtype, spec.dtype) or not _fits(shape, spec.shape, sizes):
            raise BackendError(
                f"{graph}: {spec.name} is {dtype} {list(shape)}, expected {spec.dtype} {list(spec.shape)} with {sizes}"
            )
        if isinstance(given, np.ndarray) and given.dtype.kind == "f" and not np.isfinite(given).all():
            raise BackendError(f"{graph}: {spec.name} holds values that are not finite; send finite numbers")


def _description(given: NDArray[Any] | Tensor) -> tuple[str, Sequence[int]]:
    """Type, as numpy names it, and shape."""
    if not isinstance(given, np.ndarray):
        return given.dtype, given.shape()
    return given.dtype.name if given.dtype.isnative else str(given.dtype), given.shape


def _converts(dtype: str, wanted: str) -> bool:
    return dtype == wanted or (dtype == "float32" and wanted in REDUCED)


def _fits(shape: Sequence[int], expected: Sequence[int | str], sizes: dict[str, int]) -> bool:
    """Whether a shape without empty dimensions fits; binds each named dimension to the first size it meets."""
    if len(shape) != len(expected) or 0 in shape:
        return False
    bound = [
        sizes.setdefault(want, size) if isinstance(want, str) and want.isidentifier() else want
        for size, want in zip(shape, expected, strict=True)
    ]
    return all(size == want or not isinstance(want, int) for size, want in zip(shape, bound, strict=True))


class Tensor(Protocol):
    """A tensor on a backend's device; never modified. It lives as long as it, or a view of it, is held."""

    @property
    def dtype(self) -> str:
        """Type of its elements on the device, as numpy names it ("bfloat16" included)."""
        ...

    def shape(self) -> list[int]:
        """Its dimensions."""
        ...

    def numpy(self) -> NDArray[Any]:
        """Its values on the host: a view where the device is the host, else a copy. Not to be written to.

        Floating-point numbers are f32 there, whatever they are on the device.
        """
        ...
