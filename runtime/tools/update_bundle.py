"""Adds and retires items without another export: `update_bundle` writes a new bundle beside the old one.

Rows of existing items never move and their vectors never change, so cached keys and values stay valid. A retired item
keeps its row, since histories refer to it, but is never retrieved again; added again, it gets a new row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import DataError
from unipinrec.runtime.bundle.bundle import (
    CATEGORIES,
    INDEX,
    ITEM_IDS,
    ITEM_METADATA,
    ITEM_TITLES,
    ITEM_VECTORS,
    ITEMS,
    POPULAR,
    RETIRED,
    SHARE,
    Bundle,
)
from unipinrec.runtime.bundle.catalogue import as_known
from unipinrec.runtime.bundle.derived import seal_derived
from unipinrec.runtime.bundle.integrity import seal, write_arrays, written_whole
from unipinrec.runtime.bundle.manifest import IndexSpec, Manifest
from unipinrec.runtime.bundle.metadata import ItemMetadata, extended
from unipinrec.runtime.graphs.engine import Engine, pad_histories
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.retrieval.index import HnswIndex
from unipinrec.runtime.retrieval.index_build import IndexTask, build_index, can_index, grow_index
from unipinrec.runtime.sample import chosen_cache, sample_quality
from unipinrec.runtime.tools.item_input import ItemRows, NewItem, check_items, embed_items

QUERY_USERS = 100
BATCH = 16
Way = Literal["incremental", "rebuilt", "none"]
log = logging.getLogger(__name__)


class UpdateReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an update.

    Attributes:
        bundle, parent: Hashes of the new bundle and of its parent.
        items_before, items_after: Numbers of items that can be retrieved.
        added, retired: Numbers of items.
        already_retired: Number of ids to retire that were retired before, or occur twice.
        unknown_words: Number of words of added items that the model does not know, by feature.
        index: The new index, with its measured recall; None if the new bundle has none.
        way: Whether the update extended the old index, built a new one, or none.
    """

    bundle: str
    parent: str
    items_before: int
    items_after: int
    added: int
    retired: int
    already_retired: int
    unknown_words: dict[str, int]
    index: IndexSpec | None
    way: Way


@dataclass(frozen=True, kw_only=True, eq=False)
class _Update:
    """A checked update.

    `table` [N + A, E] holds the old vectors, then those of the A items to add, and so does `metadata`; `retired` holds
    all retired rows; `indexed` says whether the new bundle gets an index.
    """

    parent: Bundle
    added: ItemRows
    table: NDArray[np.float32]
    retired: NDArray[np.int64]
    metadata: ItemMetadata | None
    indexed: bool


def update_bundle(
    bundle: Path,
    out: Path,
    *,
    add: Mapping[str, NewItem],
    retire: Mapping[str, str],
    recall: float | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> UpdateReport:
    """Write a bundle with more or fewer items, whole or not at all; the old bundle stays as it is.

    Args:
        bundle: The bundle to start from.
        out: Folder to create; it must not exist.
        add: Items by their place in the input, as `parse_items` returns them.
        retire: External ids by their place in the input, as `parse_ids` returns them. Retiring comes first, so that one
            update can replace an item.
        recall: Target recall@100 of the index; None = that of the old index. Without an old index, a target builds one.
        progress: Called with the name of each stage as it begins.

    Raises:
        BundleError: The old bundle is damaged, or its model has no vectors for new items.
        DataError: An item or id is invalid.
        BackendError: The item embedder does not run.
        ExportError: The new bundle cannot be written, for example because the disk is full; nothing was left behind.
    """
    with written_whole(out) as folder:
        progress("old bundle")
        parent = Bundle.open(bundle)
        indexed = _indexed(parent, recall)
        retired, repeated = _retired_rows(parent, retire)
        gone = set(retired.tolist())
        taken = {item for item, row in parent.rows.items() if row not in gone}
        added = check_items(add, parent.manifest, taken)
        if not len(taken) + len(added.ids):
            raise DataError(f"all {parent.catalogue.num_live} items would be retired; keep at least one")
        metadata = extended(parent.catalogue.metadata, added.metadata, len(parent.item_ids))
        progress("item vectors")
        table = np.concatenate([parent.item_vectors, embed_items(added, parent)])
        update = _Update(parent=parent, added=added, table=table, retired=retired, metadata=metadata, indexed=indexed)
        progress("index")
        index, way = _write_index(update, recall, folder)
        progress("files")
        manifest = _write(update, index, folder)
        with Recommender.load(folder, "cpu") as recommender:
            sample = sample_quality(recommender) if manifest.sample else None
            cache = chosen_cache(recommender) if manifest.cache else None
        digest = seal(folder, msgspec.structs.replace(manifest, sample=sample, cache=cache))
    return UpdateReport(
        bundle=digest,
        parent=parent.hash,
        items_before=parent.catalogue.num_live,
        items_after=len(taken) + len(added.ids),
        added=len(added.ids),
        retired=len(retired) - len(parent.catalogue.retired),
        already_retired=repeated,
        unknown_words=added.unknown_words,
        index=index,
        way=way,
    )


def _retired_rows(parent: Bundle, retire: Mapping[str, str]) -> tuple[NDArray[np.int64], int]:
    """All rows that are retired after an update, sorted, and the number of ids that were retired already."""
    rows, repeated = set(parent.catalogue.retired.tolist()), 0
    for where, item in retire.items():
        row = parent.rows.get(as_known(item, parent.rows))
        if row is None:
            raise DataError(f"{where}: item {item!r} is not among the {len(parent.rows)} items of this bundle")
        repeated += row in rows
        rows.add(row)
    return np.array(sorted(rows), np.int64), repeated


def _indexed(parent: Bundle, recall: float | None) -> bool:
    """Whether the new bundle gets an index; the old one is checked."""
    old = parent.manifest.index
    indexed = (old is not None or recall is not None) and can_index()
    if indexed and old is not None:
        HnswIndex.open(parent, old)
    return indexed


def _write_index(update: _Update, recall: float | None, folder: Path) -> tuple[IndexSpec | None, Way]:
    if not update.indexed:
        return None, "none"
    parent = update.parent
    old, path = parent.manifest.index, folder / INDEX
    target = old.recall_target if old is not None and recall is None else recall
    assert target is not None
    task = IndexTask(vectors=update.table, queries=_queries(parent), target=target, retired=update.retired)
    if old is not None:
        grown = grow_index(task, parent.files[INDEX], old, parent.catalogue.retired, path)
        if grown is not None:
            return grown, "incremental"
        log.info("the extended index misses a recall of %s, or holds mostly retired items; building a new one", target)
    return build_index(task, path), "rebuilt"


def _queries(parent: Bundle) -> NDArray[np.float32]:
    """Queries [R, E] to measure recall with: from the bundle's sample users, else from its golden requests."""
    histories = parent.sample_histories(QUERY_USERS)
    if not histories:
        golden: NDArray[np.float32] = parent.golden()["retrieval.queries"]
        return golden.reshape(-1, golden.shape[-1])
    manifest, queries = parent.manifest, []
    actions = manifest.positive[None].astype(np.float32)
    with closing(Engine.on_cpu(parent)) as engine:
        for start in range(0, len(histories), BATCH):
            batch = histories[start : start + BATCH]
            encoded = engine.encode(pad_histories(batch))
            queries.append(engine.retrieve(encoded, np.repeat(actions, len(batch), axis=0)))
    return np.concatenate(queries).reshape(-1, manifest.model.item_dim)


def _write(update: _Update, index: IndexSpec | None, folder: Path) -> Manifest:
    """Write the changed files beside the index, copy the others, and seal the bundle."""
    parent, added = update.parent, update.added
    if added.ids:
        tensors: dict[str, NDArray[Any]] = {ITEM_VECTORS: update.table}
        if parent.catalogue.codes is not None:
            tensors[CATEGORIES] = np.concatenate([parent.catalogue.codes, added.codes])
        write_arrays(folder / ITEMS, tensors)
        (folder / ITEM_IDS).write_bytes(msgspec.json.encode(parent.item_ids + added.ids))
        titles = parent.titles + added.titles
        if any(titles):
            (folder / ITEM_TITLES).write_bytes(msgspec.json.encode(titles))
        if update.metadata is not None:
            (folder / ITEM_METADATA).write_bytes(msgspec.json.encode(update.metadata.columns))
        if parent.popularity is not None:
            write_arrays(folder / POPULAR, {SHARE: _with_added(parent.popularity, len(added.ids))})
    if len(update.retired):
        (folder / RETIRED).write_bytes(msgspec.json.encode(update.retired.tolist()))
    return seal_derived(
        folder,
        parent,
        dropped=(INDEX,),
        format_version=parent.manifest.model.format_version(indexed=index is not None),
        num_items=len(update.table),
        num_retired=len(update.retired),
        index=index,
    )


def _with_added(shares: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Shares [S, N + count]: an added item is as popular as the least popular one; each row still sums to 1."""
    least = shares.min(axis=1, keepdims=True)
    grown = np.concatenate([shares, np.repeat(least, count, axis=1)], axis=1, dtype=np.float64)
    summed: NDArray[np.float32] = (grown / grown.sum(axis=1, keepdims=True)).astype(np.float32)
    return summed
