"""Golden requests: a few histories with all outputs that PyTorch gives for them; `verify` replays them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unipinrec.export.cases import START_MS, at_last, named_key_values
from unipinrec.export.protocol import (
    MISSING_TIMESTAMP_MS,
    Candidates,
    Events,
    ExportSource,
    Histories,
    KeyValues,
    Past,
)
from unipinrec.runtime.graphs.engine import HistoryBatch, pad_histories

REQUESTS = 4
GOLDEN_EVENTS = 64
GOLDEN_CANDIDATES = 50


def random_histories(source: ExportSource, seed: int = 0) -> Histories:
    """Histories of random items, for a model that is exported without data."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, max(3, min(GOLDEN_EVENTS, source.model.max_history) + 1), REQUESTS)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    return Histories(
        user_ids=[f"random-{i}" for i in range(REQUESTS)],
        offsets=offsets,
        item_rows=rng.integers(0, len(source.item_ids), total),
        actions=(rng.random((total, len(source.actions))) < 0.3).astype(np.uint8),
        surfaces=rng.integers(0, len(source.surfaces), total),
        timestamps_ms=START_MS + np.cumsum(rng.integers(0, 10_000_000, total)),
    )


@torch.inference_mode()
def golden_tensors(
    source: ExportSource, histories: Histories, vectors: NDArray[np.float32]
) -> dict[str, NDArray[np.generic]]:
    """Inputs and all outputs of a few requests, named as in docs/bundle.md.

    Uses random histories if no history has the two events that an extension needs.
    """
    if not (np.diff(histories.offsets) >= 2).any():
        histories = random_histories(source)
    batch, table, servable = _padded(source, histories), torch.from_numpy(vectors), source.servable
    events = as_events(batch, table)
    lengths = events.lengths
    prefix = torch.clamp(lengths // 2, min=1)
    key_values, last = servable.encode(events)
    outcomes = torch.from_numpy(source.positive)[None].float().expand(len(lengths), -1)
    queries = servable.retrieve(last, outcomes if source.model.outcome_conditioned else None)
    candidates = (queries[:, 0] @ table.T).topk(min(GOLDEN_CANDIDATES, len(table))).indices
    past = Past(key_values=key_values, lengths=lengths, timestamps_ms=at_last(events.timestamps_ms, lengths))
    now = events.timestamps_ms.amax(1).clamp(min=0) + 60_000
    surfaces = at_last(events.surfaces, lengths)
    slate = Candidates(item_vectors=table[candidates], surfaces=surfaces, timestamps_ms=now)
    tensors = {
        **named_key_values(source, "encoder.present", key_values),
        "encoder.last_hidden_state": last,
        "prefix_lengths": prefix,
        "retrieval.queries": queries,
        "candidates.rows": candidates,
        "candidates.surfaces": surfaces,
        "candidates.timestamps_ms": now,
    }
    if "extend" in source.model.graphs:
        new_values, tensors["extend.last_hidden_state"] = _extended(source, events, prefix)
        tensors |= named_key_values(source, "extend.present", new_values)
    if "ranker" in source.model.graphs:
        tensors["ranker.logits"] = source.logits(past, slate, last)
    inputs = {f"history.{name}": array for name, array in vars(batch).items()}
    return {**inputs, **{name: tensor.numpy() for name, tensor in tensors.items()}}


def _padded(source: ExportSource, histories: Histories) -> HistoryBatch:
    """The newest events of the first few users with at least two, right-padded; missing times in the padding."""
    longest = min(GOLDEN_EVENTS, source.model.max_history)
    chosen = [history for history in histories.split() if len(history) >= 2][:REQUESTS]
    batch = pad_histories([history.part(-longest) for history in chosen])
    real = np.arange(len(batch)) < batch.lengths[:, None]
    return replace(batch, timestamps_ms=np.where(real, batch.timestamps_ms, MISSING_TIMESTAMP_MS))


def as_events(batch: HistoryBatch, table: Tensor) -> Events:
    """A batch of histories as a model reads it; `table` [N, E] holds the item vectors."""
    tensors = {name: torch.from_numpy(array) for name, array in vars(batch).items()}
    return Events(item_vectors=table[tensors.pop("item_rows")], **tensors)


def _extended(source: ExportSource, events: Events, prefix: Tensor) -> tuple[KeyValues, Tensor]:
    """Encode each row's first `prefix` events, then extend by the rest."""
    head = _slice(events, torch.zeros_like(prefix), prefix)
    tail = _slice(events, prefix, events.lengths - prefix)
    past, _ = source.servable.encode(head)
    last = at_last(head.timestamps_ms, prefix)
    return source.servable.extend(tail, Past(key_values=past, lengths=prefix, timestamps_ms=last))


def _slice(events: Events, begin: Tensor, lengths: Tensor) -> Events:
    """Rows [begin, begin + lengths) of each history, right-padded with the events that follow or with the last one."""
    rows, columns = torch.arange(len(lengths))[:, None], begin[:, None] + torch.arange(int(lengths.max()))
    columns = columns.clamp(max=events.surfaces.shape[1] - 1)
    parts = {name: tensor[rows, columns] for name, tensor in vars(events).items() if name != "lengths"}
    return Events(**parts, lengths=lengths)
