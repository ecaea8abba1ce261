"""`export_bundle`: the path from a model to a bundle. A failure leaves no folder behind."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from unipinrec import __version__
from unipinrec.errors import BundleError, DataError, ExportError, NothingHeldOutError
from unipinrec.export.cases import CaseMaker
from unipinrec.export.checks.contract import check_contract
from unipinrec.export.checks.parity import check_graph, graph_spec, report_of, require_parity
from unipinrec.export.checks.reference import Reference, with_reference
from unipinrec.export.golden import as_events, golden_tensors, random_histories
from unipinrec.export.graphs import graphs_of, write_graph
from unipinrec.export.histories import Histories
from unipinrec.export.inferred import in_float32
from unipinrec.export.precision.check import add_precisions, known_precisions
from unipinrec.export.protocol import MISSING_TIMESTAMP_MS, ExportSource
from unipinrec.export.weights import SharedWeights
from unipinrec.runtime.bundle.bundle import (
    CATEGORIES,
    GOLDEN,
    INDEX,
    ITEM_IDS,
    ITEM_METADATA,
    ITEM_TITLES,
    ITEM_VECTORS,
    ITEMS,
    POPULAR,
    REQUIRED,
    SHARE,
    USER_IDS,
    USERS,
    wrong_rows,
)
from unipinrec.runtime.bundle.integrity import fingerprint, seal, write_arrays, written_whole
from unipinrec.runtime.bundle.manifest import GraphSpec, IndexSpec, Manifest, ParityReport
from unipinrec.runtime.bundle.metadata import ItemMetadata
from unipinrec.runtime.bundle.quality import Evaluation
from unipinrec.runtime.graphs.engine import pad_histories
from unipinrec.runtime.graphs.ort_cpu import import_onnxruntime
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.retrieval.index_build import RECALL_TARGET, IndexTask, build_index, can_index
from unipinrec.runtime.sample import chosen_cache, sample_quality

EMBED_CHUNK = 65_536
log = logging.getLogger(__name__)
TOOLS = ("torch", "onnx", "onnxscript", "numpy")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        users: Number of histories, from the first, that go into the bundle for `recommend --user`.
        recall: Target recall@100 of the index. If the index misses it, the manifest holds the recall that it reaches.
            None, or where hnswlib is missing: there is no index, and requests scan all items.
        accept_loss: Whether a precision may recommend other items than fp32, as fp8 often does.
        data: Prepared data, to choose the order of slates and to measure the lists of the bundle. None skips both.
        evaluated: Number of test requests to measure on; 0 skips the measurement.
        window_slack: Events by which the window over a long history moves at a time; None = an eighth of the model's
            limit.
        reference: The library's own scores, to compare the bundle's answers with; see `export.checks.reference`.
    """

    users: int = 1000
    recall: float | None = RECALL_TARGET
    accept_loss: bool = False
    data: Path | None = None
    evaluated: int = 0
    window_slack: int | None = None
    reference: Reference | None = None


DEFAULTS = ExportOptions()


def export_bundle(
    source: ExportSource,
    out: Path,
    *,
    histories: Histories | None = None,
    precisions: Sequence[str] = (),
    options: ExportOptions = DEFAULTS,
    progress: Callable[[str], None] = lambda stage: None,
) -> Manifest:
    """Write a bundle: graphs, item table, index, golden requests, manifest.

    Args:
        source: The model and its catalogue. bf16 and fp16 weights are exported as f32, with a warning.
        out: Folder to create; it must not exist.
        histories: Real histories, with the popularity of the items. They serve as golden requests, and to measure the
            index's recall and each precision's AUC. None: random golden requests, no AUC, no popularity.
        precisions: Further precisions of the graphs beside fp32: "bf16", "fp16", "fp8". fp8 needs real histories.
        options: Further options.
        progress: Called with the name of each stage as it begins.

    Returns:
        The manifest, with the parity report, the measured recall and the change by each precision.

    Raises:
        ContractError: The module's methods do not agree with each other or with `source`; see `ServableModel`.
        ParityError: A graph does not compute what PyTorch computes, or a precision recommends other items than fp32.
        ExportError: Any other failure, a full disk included.
    """
    _require_fit(source, histories, options)
    users = histories.split() if histories else []
    reduced = known_precisions(precisions, users)
    source = replace(source, module=in_float32(source.module).eval())
    with written_whole(out) as folder, _one_thread():
        progress("contract")
        check_contract(source)
        progress("item table")
        vectors = _item_table(source, folder)
        graphs, parity = _graphs(source, vectors, folder, progress)
        progress("golden requests")
        sample = histories or random_histories(source)
        write_arrays(folder / GOLDEN, golden_tensors(source, sample, vectors))
        if histories is not None:
            _write_users(histories, options.users, folder)
        progress("index")
        index = _index(source, sample, vectors, options.recall, folder)
        progress("manifest")
        manifest = _manifest(source, folder, graphs, parity, index, options)
        seal(folder, manifest)
        try:
            if reduced:
                manifest = add_precisions(folder, reduced, users, accept_loss=options.accept_loss, progress=progress)
            progress("lists of the bundle")
            manifest = _with_quality(folder, manifest, options)
            if options.reference is not None:
                progress("comparison with the library")
                manifest = with_reference(folder, source, users, options.reference)
        except BundleError as error:
            raise ExportError(f"the written bundle cannot be served: {error}") from error
    return manifest


def _require_fit(source: ExportSource, histories: Histories | None, options: ExportOptions) -> None:
    if histories is not None:
        histories.check(source)
    slack, limit = options.window_slack, source.model.max_history
    if slack is not None and not 1 <= slack <= limit:
        raise ExportError(f"window_slack={slack} must be from 1 to {limit}, the model's longest history")


def _with_quality(folder: Path, manifest: Manifest, options: ExportOptions) -> Manifest:
    """Open the written bundle, choose the order of slates, measure the lists, and seal the results."""
    with Recommender.load(folder, "cpu") as opened:
        recommender, evaluation = (
            _evaluated(opened, options.data, options.evaluated) if options.data else (opened, None)
        )
        sample, cache = sample_quality(recommender), chosen_cache(recommender)
    manifest = msgspec.structs.replace(
        manifest,
        order=recommender.bundle.manifest.order,
        sample=sample if sample.users else None,
        cache=cache,
        evaluation=evaluation,
    )
    seal(folder, manifest)
    return manifest


def _evaluated(opened: Recommender, data: Path, limit: int) -> tuple[Recommender, Evaluation | None]:
    """The recommender with the order that suits the data best, and the quality of its lists."""
    # Both need polars; an export without data does not.
    from unipinrec.export.lists.blend import chosen_blend, with_order  # noqa: PLC0415
    from unipinrec.export.lists.evaluation import evaluate  # noqa: PLC0415

    order = chosen_blend(opened, data)
    recommender = opened if order is None else with_order(opened, order)
    if limit:
        try:
            return recommender, evaluate(recommender, data, limit=limit)
        except NothingHeldOutError as error:  # a bundle needs no test part
            log.warning("the lists of the bundle were not measured: %s", error)
    return recommender, None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: the last bits of PyTorch's sums depend on the number of threads, a bundle must not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _item_table(source: ExportSource, folder: Path) -> NDArray[np.float32]:
    """Embed the catalogue once, for histories, index and ranker alike."""

    def embedded(rows: torch.Tensor) -> NDArray[Any]:
        dense = torch.from_numpy(source.item_dense[rows.numpy()])
        categories = torch.from_numpy(source.item_categories[rows.numpy()])
        return source.servable.embed_items(rows, dense, categories).numpy()

    chunks = torch.arange(len(source.item_ids)).split(EMBED_CHUNK)
    parts = [embedded(rows) for rows in chunks]
    vectors = np.concatenate(parts).astype(np.float32)
    rows = wrong_rows(vectors, source.model.similarity)
    if len(rows):
        required = REQUIRED[source.model.similarity]
        remedy = "" if source.model.similarity == "dot" else ', normalise them, or export with similarity="dot"'
        raise ExportError(
            f"{len(rows)} item vectors are not {required}, first {source.item_ids[rows[0]]!r}; train again{remedy}"
        )
    tensors: dict[str, NDArray[Any]] = {ITEM_VECTORS: vectors}
    if source.categories:
        tensors[CATEGORIES] = source.item_categories.astype(np.int32)
    write_arrays(folder / ITEMS, tensors)
    (folder / ITEM_IDS).write_bytes(msgspec.json.encode(source.item_ids))
    if any(source.titles):
        (folder / ITEM_TITLES).write_bytes(msgspec.json.encode(source.titles))
    if source.metadata:
        try:
            metadata = ItemMetadata.of(source.metadata, len(source.item_ids))
        except DataError as error:
            raise ExportError(str(error)) from error
        (folder / ITEM_METADATA).write_bytes(msgspec.json.encode(metadata.columns))
    return vectors


def _graphs(
    source: ExportSource, vectors: NDArray[np.float32], folder: Path, progress: Callable[[str], None]
) -> tuple[dict[str, GraphSpec], ParityReport]:
    """Write all graphs, then check them all, so that one report shows every failure."""
    weights, maker = SharedWeights(folder), CaseMaker(source, vectors)
    graphs = graphs_of(source)
    with torch.inference_mode():
        examples = {graph.name: maker.example(graph.name) for graph in graphs}
    for graph in graphs:
        progress(f"graph {graph.name}")
        file = f"{graph.name}.onnx"
        write_graph(graph, source.module, {n: t.clone() for n, t in examples[graph.name].items()}, folder / file)
        weights.take(file)
    checks = []
    with torch.inference_mode():
        for graph in graphs:
            progress(f"parity {graph.name}")
            checks += check_graph(graph, folder / f"{graph.name}.onnx", maker.cases(graph.name))
    report = report_of(checks)
    require_parity(report)
    return {graph.name: graph_spec(folder / f"{graph.name}.onnx") for graph in graphs}, report


@torch.inference_mode()
def _queries(source: ExportSource, histories: Histories, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Queries to measure recall with: one per history, from its newest events."""
    table = torch.from_numpy(vectors)
    outcomes = torch.from_numpy(source.positive)[None].float() if source.model.outcome_conditioned else None
    queries = []
    for history in histories.split():
        events = as_events(pad_histories([history.part(-source.model.max_history)]), table)
        queries.append(source.servable.retrieve(source.servable.encode(events)[1], outcomes)[0])
    return torch.cat(queries).numpy()


def _index(
    source: ExportSource, histories: Histories, vectors: NDArray[np.float32], recall: float | None, folder: Path
) -> IndexSpec | None:
    if recall is None or not can_index():
        return None
    task = IndexTask(vectors=vectors, queries=_queries(source, histories, vectors), target=recall)
    return build_index(task, folder / INDEX)


def _write_users(histories: Histories, users: int, folder: Path) -> None:
    """Write the popularity of items, and the first users, if any."""
    if histories.popularity is not None:
        write_arrays(folder / POPULAR, {SHARE: histories.popularity})
    if not users:
        return
    user_ids = histories.user_ids[:users]
    events = slice(0, int(histories.offsets[len(user_ids)]))
    (folder / USER_IDS).write_bytes(msgspec.json.encode(user_ids))
    columns = ("item_rows", "actions", "surfaces", "timestamps_ms")
    arrays = {name: getattr(histories, name)[events] for name in columns}
    write_arrays(folder / USERS, {"offsets": histories.offsets[: len(user_ids) + 1], **arrays})


def _manifest(
    source: ExportSource,
    folder: Path,
    graphs: dict[str, GraphSpec],
    parity: ParityReport,
    index: IndexSpec | None,
    options: ExportOptions,
) -> Manifest:
    tools = TOOLS if index is None else (*TOOLS, "hnswlib")
    versions = {name: importlib.metadata.version(name) for name in tools}
    return Manifest(
        format_version=source.model.format_version(indexed=index is not None),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=source.model,
        config=source.config,
        actions=source.actions,
        positive_actions=source.positive_actions,
        surfaces=source.surfaces,
        dense=source.dense,
        categories=source.categories,
        num_items=len(source.item_ids),
        missing_timestamp_ms=MISSING_TIMESTAMP_MS,
        precision="fp32",
        graphs=graphs,
        files={path.name: fingerprint(path) for path in sorted(folder.iterdir())},
        index=index,
        parity=parity,
        metrics=source.metrics,
        data_fingerprint=_data_fingerprint(source),
        # onnxruntime comes in wheels of several names, so its module is read.
        tools={"unipinrec": __version__, **versions, "onnxruntime": import_onnxruntime().__version__},
        order=source.order,
        window_slack=options.window_slack,
    )


def _data_fingerprint(source: ExportSource) -> str:
    words = [source.actions, source.positive_actions, source.surfaces, source.dense, source.categories]
    digest = hashlib.sha256(msgspec.json.encode([source.item_ids, *words]))
    digest.update(source.item_dense.tobytes())
    digest.update(source.item_categories.tobytes())
    return digest.hexdigest()
