"""`manifest.json`: the description of a bundle, enough to check it, serve it, or run it with any ONNX client.

The manifest lists every other file with its sha256. `manifest.sha256` holds the manifest's own, which identifies the
bundle. Graph and tensor names follow the Hugging Face convention for key/value caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle.quality import DEFAULT_KV_DTYPE, CacheSpec, Evaluation, KvDtype, SampleQuality
from unipinrec.runtime.requests import Order

FORMAT_VERSION = 3
GRAPHS = ("encoder", "extend", "retrieval", "ranker", "item_embedder")
Similarity = Literal["cosine", "dot"]
Caching = Literal["prefix", "none"]
RankerInput = Literal["past", "past+last_hidden_state"]
# Types that a graph's f32 inputs may be rounded to.
REDUCED: dict[str, np.dtype[Any]] = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One graph input or output; a dimension is a size, or the name of a dynamic dimension."""

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


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Properties of the model that a server needs. The last four are new in format 2.

    Attributes:
        num_layers: Layers, each with one key and one value tensor; 0 if nothing but `last_hidden_state` is kept of a
            history.
        num_kv_heads: Key/value heads.
        head_dim: Width of a head.
        hidden_size: Width of `last_hidden_state`.
        item_dim: E, width of item vectors and queries.
        max_history: Longest history in events.
        kv_prefix_slots: Slots before the first event in the key/value tensors of a history.
        outcome_conditioned: Whether the retrieval graph has an `outcomes` input.
        similarity: Of an item and a query: "cosine", both are of unit length, or "dot", their plain inner product.
        item_bias: Whether the last number of an item vector is a bias, which similar items do not compare.
        cache: "prefix", the keys and values of an event depend on no later event, or "none"; then there is no graph
            `extend`, and each request encodes its whole history.
        ranker: What the graph `ranker` reads of a history; None, there is no such graph, and slates are in the order
            of retrieval.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    item_dim: int
    max_history: int
    kv_prefix_slots: int
    outcome_conditioned: bool
    similarity: Similarity = "cosine"
    item_bias: bool = False
    cache: Caching = "prefix"
    ranker: RankerInput | None = "past"

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs that requests need."""
        extend, ranker = ["extend"] * (self.cache == "prefix"), ["ranker"] * (self.ranker is not None)
        return ("encoder", *extend, "retrieval", *ranker)

    def format_version(self, *, indexed: bool) -> int:
        """The lowest version of the format that can describe the model, with an index or without."""
        if not indexed:
            return 3
        new = (self.similarity, self.item_bias, self.cache, self.ranker)
        return 1 if new == ("cosine", False, "prefix", "past") else 2

    def kv_names(self, prefix: str) -> list[str]:
        """Names of the key/value tensors in layer order; `prefix` is "present" or "past_key_values"."""
        return [f"{prefix}.{layer}.{part}" for layer in range(self.num_layers) for part in ("key", "value")]


class IndexSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The hnswlib index: parameters to load it, and its recall.

    `count` is the number of items in the file, including deleted ones. `recall` is the share of the exact top
    `recall_k` that the index finds at `ef_search`, measured when it was built; `recall_target` was its target. With
    `scan` it missed the target, and requests scan all items.
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
    scan: bool = False


class ParityCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One comparison of an exported graph with PyTorch; `problem` is None if it passed."""

    graph: str
    check: str
    case: str
    max_abs_diff: float | None
    problem: str | None


class ParityReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All comparisons of the export, and the largest difference in any value."""

    tolerance: float
    max_abs_diff: float
    checks: tuple[ParityCheck, ...]


class Agreement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far answers in a lower precision agree with fp32; means over requests, except for the minimum and maximum.

    Attributes:
        requests: Compared requests.
        ranked_overlap: Share of the best ten by score that are among the best ten of fp32, ties included.
        ranked_overlap_strict: The same without ties.
        retrieved_overlap: The same share of the ten items most similar to the query.
        retrieved_overlap_strict: The same without ties.
        min_query_cosine: Lowest cosine of a query with its fp32 query.
        max_logit_diff: Largest difference of a logit, beyond the difference that rounding explains.
        problem: The value that is out of bounds; None if all are within them.
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
    """Graphs in a precision other than fp32; all other graphs run in fp32.

    Attributes:
        graphs: The graphs by name. Their keys and values have this precision, all other inputs and outputs are f32.
        agreement: Agreement with fp32; its `problem` is not None only if the export accepted the loss.
        auc_change: AUC of each action minus that of fp32, on held-out events; empty if the bundle was exported
            without data.
    """

    graphs: dict[str, GraphSpec]
    agreement: Agreement
    auc_change: dict[str, float]


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A TensorRT engine that was built ahead of time and is stored in the bundle.

    Attributes:
        file: Its file.
        key: Hash of its graph, weights, options and target.
        graph: Name of the graph.
        precision: Precision of the graph.
        flavor: "tensorrt" or "tensorrt_rtx".
        version: Version of the library that built it.
        targets: GPU architectures that it runs on, such as "sm_89".
    """

    file: str
    key: str
    graph: str
    precision: str
    flavor: str
    version: str
    targets: tuple[str, ...]


class OrderSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Default order of a slate (docs/ranking.md).

    Attributes:
        by: "value", "blend", "product" or "retrieval"; with "retrieval" the ranker does not run.
        retrieval_scale: A similarity times this is the logit of retrieval's softmax in training.
        reason: Why the export chose this order, in words.
        retrieval_weight: Weight of that logit in the blend.
    """

    by: Order
    retrieval_scale: float
    reason: str
    retrieval_weight: float = 0.0


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Content of `manifest.json`. Fields with their default are left out: older versions do not know them.

    Attributes:
        format_version: Format of the bundle; a reader rejects a newer one.
        created: UTC time, ISO 8601.
        model: Properties of the model that a server needs.
        config: The exporter's full description of the model, for information.
        actions: Action names in the order of every action vector.
        positive_actions: Actions that the value weighs by default.
        surfaces: Surface names; the index is the id, 0 = unknown.
        dense: Width of each dense item feature, in the order of the item embedder's `dense` input.
        categories: Words of each categorical item feature; code = index + 1, 0 = unknown.
        num_items: Rows of the item table, including retired items.
        missing_timestamp_ms: Stands for an unknown time in `timestamps_ms`.
        precision: Type of the weights of `graphs`.
        graphs: The graphs by name; without `item_embedder` if the model declares no content features.
        files: Every other file of the bundle.
        index: The nearest-neighbour index; None, there is none, and requests scan all items (new in format 3).
        parity: Comparison of the graphs with PyTorch.
        metrics: Offline metrics of the checkpoint, if it has any.
        data_fingerprint: sha256 of the catalogue's ids and features, and of the data's declarations.
        tools: Versions of the tools that wrote the bundle.
        num_retired: Rows that are never retrieved.
        parent: Hash of the bundle that this one updates.
        kv_namespace: Cached keys and values depend on it: hash of the exported bundle at the root of all updates. None
            in that bundle itself.
        kv_rows: Rows of that bundle; only these hold the same items in all of its updates. None in that bundle itself.
        precisions: More graphs, by precision: bf16, fp16, fp8.
        engines: TensorRT engines built ahead of time.
        order: Default order of a slate; None in bundles of earlier versions, which are ordered by value.
        evaluation: Quality of the lists at export; None if the bundle was exported without data.
        sample: Quality of the sample users' lists; None if the bundle has no sample users.
        cache: Type of cached keys and values; None if histories are not cached, and in bundles of earlier versions.
        window_slack: Events by which the window over a long history moves at a time; None = an eighth of the model's
            limit.
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
    index: IndexSpec | None
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
    cache: CacheSpec | None = None
    window_slack: int | None = None

    @property
    def positive(self) -> NDArray[np.bool_]:
        """Which of the actions are positive, [C]."""
        return np.array([name in self.positive_actions for name in self.actions])

    @property
    def default_order(self) -> Order:
        """Order of a slate if the request names none."""
        if self.model.ranker is None:
            return "retrieval"
        return "value" if self.order is None else self.order.by

    @property
    def cache_dtype(self) -> KvDtype:
        """Type of cached keys and values unless another is requested."""
        return DEFAULT_KV_DTYPE if self.cache is None else self.cache.dtype

    def graphs_in(self, precision: str) -> dict[str, GraphSpec]:
        """The graphs that a request needs, by name, in a precision of this bundle."""
        graphs = {name: self.graphs[name] for name in self.model.graphs}
        return graphs if precision == self.precision else {**graphs, **self.precisions[precision].graphs}


def check_inputs(graph: str, specs: Sequence[TensorSpec], inputs: Mapping[str, NDArray[Any] | Tensor]) -> None:
    """Check that names, types and shapes fit a graph, and that arrays hold finite numbers. Copies nothing.

    f32 fits inputs of less precision as well; see `Backend.run`.

    Raises:
        BackendError: They do not; names the graph, the input, its type and shape, and the expected ones.
    """
    names = [spec.name for spec in specs]
    if set(inputs) != set(names):
        raise BackendError(f"{graph}: the inputs are {sorted(inputs)}, expected {sorted(names)}")
    sizes: dict[str, int] = {}
    for spec in specs:
        value = inputs[spec.name]
        dtype = str(value.dtype)
        rounds = dtype == "float32" and spec.dtype in REDUCED
        if not (dtype == spec.dtype or rounds) or not _fits(value.shape, spec.shape, sizes):
            expected = f"{spec.dtype} {list(spec.shape)} with {sizes}"
            raise BackendError(f"{graph}: {spec.name} is {dtype} {list(value.shape)}, expected {expected}")
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
            raise BackendError(f"{graph}: {spec.name} holds values that are not finite; send finite numbers")


def _fits(shape: Sequence[int], expected: Sequence[int | str], sizes: dict[str, int]) -> bool:
    """Whether a shape without empty dimensions fits; binds each named dimension to its first size."""
    if len(shape) != len(expected) or 0 in shape:
        return False
    bound = [
        sizes.setdefault(name, size) if isinstance(name, str) and name.isidentifier() else name
        for size, name in zip(shape, expected, strict=True)
    ]
    return all(size == limit or not isinstance(limit, int) for size, limit in zip(shape, bound, strict=True))


class Tensor(Protocol):
    """A tensor on a backend's device; never modified. It lives while a reference to it, or to a view of it, exists."""

    @property
    def dtype(self) -> str:
        """Type of its elements on the device, as numpy names it ("bfloat16" included)."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        ...

    def numpy(self) -> NDArray[Any]:
        """Its values on the host: a view if the device is the host, else a copy. Do not write to them.

        Floating-point numbers are f32 on the host.
        """
        ...


def host_array(value: NDArray[Any] | Tensor) -> NDArray[Any]:
    """An array unchanged, a host tensor as a view."""
    return value if isinstance(value, np.ndarray) else value.numpy()


def in_type(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """A contiguous array in the type of a graph's input; copied only if it is rounded or not contiguous."""
    return np.ascontiguousarray(array if array.dtype.name == dtype else array.astype(REDUCED[dtype]))


def widened(array: NDArray[Any]) -> NDArray[Any]:
    """The array as f32 if it holds floating-point numbers of less precision, else unchanged."""
    return array.astype(np.float32) if array.dtype.name in REDUCED else array
