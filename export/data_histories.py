"""Histories of real users from a prepared data set, for golden requests, the index and `recommend --user`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from unipinrec.errors import ExportError
from unipinrec.export.lists.popularity import item_shares
from unipinrec.export.protocol import ExportSource, Histories
from unipinrec.models.data.schema import read_dataset
from unipinrec.models.data.sequences import sequences_of, vocabulary_of


def histories_from_data(folder: Path, source: ExportSource, limit: int) -> Histories:
    """The newest events of up to `limit` users, those with the latest activity first, and the popularity of all items.

    Raises:
        DataError: The folder is no prepared data set.
        ExportError: The data has other items, actions or surfaces than the model, no events, or no positive event.
    """
    dataset = read_dataset(folder)
    data = sequences_of(dataset)
    vocabulary = vocabulary_of(dataset)
    same = {
        "items": data.item_ids == source.item_ids,
        "actions": vocabulary.actions == source.actions,
        "surfaces": vocabulary.surfaces == source.surfaces,
    }
    differing = " and ".join(name for name, equal in same.items() if not equal)
    if differing:
        raise ExportError(f"{folder} is not the data that the model was trained on: {differing} differ")
    counts = np.diff(data.event_start)
    if not counts.any():
        raise ExportError(f"{folder} has no events, so no histories; export without data")
    latest = np.where(counts > 0, data.timestamps_ms[np.maximum(data.event_start[1:] - 1, 0)], -1)
    users = np.argsort(-latest, kind="stable")
    users = users[counts[users] > 0][:limit]
    ends = data.event_start[users + 1]
    lengths = np.minimum(counts[users], source.model.max_history)
    spans = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    events = np.concatenate([np.zeros(0, np.int64), *spans])
    return Histories(
        user_ids=[data.user_ids[u] for u in users],
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        item_rows=data.rows[events],
        actions=data.actions[events],
        surfaces=data.surfaces[events],
        timestamps_ms=data.timestamps_ms[events],
        popularity=item_shares(data, vocabulary),
    )
