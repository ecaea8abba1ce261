"""A prepared data set as flat arrays: per user a run of events and a run of slates. No tensors, no batches yet."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from unipinrec.errors import DataError
from unipinrec.models.config import MISSING_TIMESTAMP_MS, Vocabulary
from unipinrec.models.data.item_features import ItemFeatures
from unipinrec.models.data.schema import ACTION_PREFIX, CATEGORY_PREFIX, DENSE_PREFIX, Dataset, TimeSplit

IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Events and slates of all users, grouped by user, in chronological order.

    Attributes:
        user_ids: External user id by user index.
        item_ids: External item id by catalogue row.
        features: Item features by catalogue row.
        event_start: [U + 1] where each user's events begin.
        rows, actions, surfaces, timestamps_ms: Per event: catalogue row, [M, C] u8, i64, i64 (-1 = missing).
        actions_known: [M, C] u8, 0 where the action of the event is unknown; `actions` is 0 there.
        slate_user, slate_cutoff: Per slate: its user, and the number of the user's events before it.
        slate_ids, slate_surface, slate_timestamp_ms: Per slate: id in the data set, surface, time.
        slate_start: [S + 1] where each slate's items begin.
        slate_rows, slate_actions: Per slate item: catalogue row, [K, C] u8 labels.
        split: Times of the split, or None for leave-one-out.
    """

    user_ids: list[str]
    item_ids: list[str]
    features: ItemFeatures
    event_start: IntArray
    rows: IntArray
    actions: NDArray[np.uint8]
    actions_known: NDArray[np.uint8]
    surfaces: IntArray
    timestamps_ms: IntArray
    slate_user: IntArray
    slate_cutoff: IntArray
    slate_ids: IntArray
    slate_surface: IntArray
    slate_timestamp_ms: IntArray
    slate_start: IntArray
    slate_rows: IntArray
    slate_actions: NDArray[np.uint8]
    split: TimeSplit | None

    @property
    def num_users(self) -> int:
        """Users with at least one event or slate."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Rows of the catalogue."""
        return len(self.item_ids)


def vocabulary_of(dataset: Dataset) -> Vocabulary:
    """The vocabulary of a model for this data set."""
    spec = dataset.spec
    return Vocabulary(
        num_items=dataset.items.height,
        actions=spec.actions,
        positive_actions=spec.positive_actions,
        surfaces=spec.surfaces,
        dense=spec.dense,
        categories=spec.categories,
    )


def sequences_of(dataset: Dataset) -> Sequences:
    """Turn tables into arrays; external ids become catalogue rows and user indices."""
    users = pl.concat([dataset.events["user_id"], dataset.slates["user_id"]]).unique().sort()
    events = _coded(dataset, dataset.events, users)
    slates = _coded(dataset, dataset.slates, users).sort("user", "timestamp_ms", "slate_id", maintain_order=True)
    heads = slates.group_by("slate_id", maintain_order=True).agg(pl.first("user", "surface", "timestamp_ms"), pl.len())
    counts = np.bincount(events["user"].to_numpy(), minlength=len(users))
    event_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    timestamps = events["timestamp_ms"].fill_null(MISSING_TIMESTAMP_MS).to_numpy()
    slate_user, slate_time = heads["user"].to_numpy(), heads["timestamp_ms"].to_numpy()
    return Sequences(
        user_ids=users.to_list(),
        item_ids=dataset.items["item_id"].to_list(),
        features=item_features(dataset),
        event_start=event_start,
        rows=events["row"].to_numpy(),
        actions=_actions(dataset, events),
        actions_known=_actions(dataset, events.with_columns(pl.col(f"^{ACTION_PREFIX}.*$").is_not_null())),
        surfaces=events["surface"].to_numpy(),
        timestamps_ms=timestamps,
        slate_user=slate_user,
        slate_cutoff=_cutoffs(event_start, timestamps, slate_user, slate_time),
        slate_ids=heads["slate_id"].to_numpy(),
        slate_surface=heads["surface"].to_numpy(),
        slate_timestamp_ms=slate_time,
        slate_start=np.concatenate([[0], np.cumsum(heads["len"].to_numpy())]).astype(np.int64),
        slate_rows=slates["row"].to_numpy(),
        slate_actions=_actions(dataset, slates),
        split=dataset.spec.split,
    )


def fingerprint(data: Sequences, vocabulary: Vocabulary) -> str:
    """16 hex digits that identify the ids, arrays and split of a data set, and the meaning of its codes."""
    arrays = {field.name: getattr(part, field.name) for part in (data, data.features) for field in fields(part)}
    words = [vocabulary, data.split, data.user_ids, data.item_ids]
    digest = hashlib.sha256(msgspec.json.encode(words))
    for name, array in arrays.items():
        if isinstance(array, np.ndarray):
            digest.update(f"{name} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def item_features(dataset: Dataset) -> ItemFeatures:
    """Dense features side by side in declared order, categories as codes."""
    empty = np.zeros((dataset.items.height, 0))
    dense = [
        np.asarray(dataset.items[DENSE_PREFIX + name].list.to_array(width).to_numpy(), dtype=np.float32)
        for name, width in dataset.spec.dense.items()
    ]
    codes = [
        _codes(dataset.items[CATEGORY_PREFIX + name], words, unknown=0, offset=1)
        for name, words in dataset.spec.categories.items()
    ]
    return ItemFeatures(
        dense=np.column_stack([empty.astype(np.float32), *dense]),
        categories=np.column_stack([empty.astype(np.int64), *codes]),
    )


def _coded(dataset: Dataset, table: pl.DataFrame, users: pl.Series) -> pl.DataFrame:
    coded = table.with_columns(
        user=pl.Series(_codes(table["user_id"], users.to_list())),
        row=pl.Series(_codes(table["item_id"], dataset.items["item_id"].to_list())),
        surface=pl.Series(_codes(table["surface"], dataset.spec.surfaces, unknown=0)),
    ).drop("user_id", "item_id")
    return coded.sort("user", maintain_order=True)


def _codes(values: pl.Series, words: Sequence[str], *, unknown: int = -1, offset: int = 0) -> IntArray:
    """Position of each value in `words` plus `offset`; `unknown` < 0 makes an unknown word an error."""
    numbers = range(offset, offset + len(words))
    codes = values.replace_strict(words, numbers, default=unknown, return_dtype=pl.Int64)
    if (codes < 0).any():
        missing = values.filter(codes < 0)[0]
        raise DataError(f"{values.name}={missing!r} is not in the catalogue; run `unipinrec prepare` again")
    return codes.to_numpy()


def _actions(dataset: Dataset, table: pl.DataFrame) -> NDArray[np.uint8]:
    columns = [table[ACTION_PREFIX + name].fill_null(False).cast(pl.UInt8).to_numpy() for name in dataset.spec.actions]
    return np.stack(columns, axis=1)


def _cutoffs(event_start: IntArray, times_ms: IntArray, slate_user: IntArray, slate_time: IntArray) -> IntArray:
    """Number of the user's events strictly before each slate; missing times precede all known times."""
    cutoffs = np.zeros(len(slate_user), np.int64)
    bounds = np.flatnonzero(np.diff(slate_user, prepend=-1, append=-1))
    for begin, end in pairwise(bounds):
        user = slate_user[begin]
        times = times_ms[event_start[user] : event_start[user + 1]]
        cutoffs[begin:end] = np.searchsorted(times, slate_time[begin:end], side="left")
    return cutoffs
