"""Golden requests: a few histories with every intermediate and final output from PyTorch, for `verify` to replay."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unipinrec.export.cases import START_MS
from unipinrec.export.protocol import MISSING_TIMESTAMP_MS, Candidates, Events, ExportSource, Histories, Past

REQUESTS = 4
MAX_EVENTS = 64
GOLDEN_CANDIDATES = 50


def random_histories(source: ExportSource, seed: int = 0) -> Histories:
    """Histories of random items, for a model that is exported without data."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, max(3, min(MAX_EVENTS, source.model.max_history) + 1), REQUESTS)
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
    """Inputs and all outputs of a few requests; names as in the bundle's description (docs/bundle.md).

    Of random histories where none has the two events that it takes to be extended.
    """
    if not (np.diff(histories.offsets) >= 2).any():
        histories = random_histories(source)
    rows, history = _padded(source, histories)
    table = torch.from_numpy(vectors)
    lengths = history["lengths"]
    events = Events(item_vectors=table[rows], **history)
    prefix = torch.clamp(lengths // 2, min=1)
    key_values, last = source.servable.encode(events)
    new_values, new_last = _extended(source, events, prefix)
    outcomes = torch.from_numpy(source.positive)[None].float().expand(len(rows), -1)
    queries = source.servable.retrieve(last, outcomes if source.model.outcome_conditioned else None)
    count = min(GOLDEN_CANDIDATES, len(table))
    candidates = (queries[:, 0] @ table.T).topk(count).indices
    past = Past(key_values=key_values, lengths=lengths, timestamps_ms=_last_times(events))
    now = events.timestamps_ms.amax(1).clamp(min=0) + 60_000
    surfaces = events.surfaces.gather(1, (lengths - 1)[:, None])[:, 0]
    slate = Candidates(item_vectors=table[candidates], surfaces=surfaces, timestamps_ms=now)
    tensors = {
        "history.item_rows": rows,
        **{f"history.{name}": tensor for name, tensor in history.items()},
        **_named(source, "encoder", key_values),
        "encoder.last_hidden_state": last,
        "prefix_lengths": prefix,
        **_named(source, "extend", new_values),
        "extend.last_hidden_state": new_last,
        "retrieval.queries": queries,
        "candidates.rows": candidates,
        "candidates.surfaces": surfaces,
        "candidates.timestamps_ms": now,
        "ranker.logits": source.servable.rank(past, slate),
    }
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _padded(source: ExportSource, histories: Histories) -> tuple[Tensor, dict[str, Tensor]]:
    """The newest events of the first few users with at least two, right-padded."""
    longest = min(MAX_EVENTS, source.model.max_history)
    users = np.flatnonzero(np.diff(histories.offsets) >= 2)[:REQUESTS]
    spans = [
        np.arange(max(histories.offsets[u], histories.offsets[u + 1] - longest), histories.offsets[u + 1])
        for u in users
    ]
    width = max(len(span) for span in spans)
    index = np.stack([np.pad(span, (0, width - len(span)), constant_values=-1) for span in spans])
    real = index >= 0
    return torch.from_numpy(np.where(real, histories.item_rows[index], 0)), {
        "actions": torch.from_numpy((histories.actions[index] * real[..., None]).astype(np.float32)),
        "surfaces": torch.from_numpy(np.where(real, histories.surfaces[index], 0)),
        "timestamps_ms": torch.from_numpy(np.where(real, histories.timestamps_ms[index], MISSING_TIMESTAMP_MS)),
        "lengths": torch.from_numpy(real.sum(axis=1)),
    }


def _extended(source: ExportSource, events: Events, prefix: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Encode each row's first `prefix` events, then extend by the rest."""
    head = _slice(events, torch.zeros_like(prefix), prefix)
    tail = _slice(events, prefix, events.lengths - prefix)
    past, _ = source.servable.encode(head)
    added, last = source.servable.extend(tail, Past(key_values=past, lengths=prefix, timestamps_ms=_last_times(head)))
    return list(added), last


def _slice(events: Events, begin: Tensor, lengths: Tensor) -> Events:
    """Rows [begin, begin + lengths) of each history, right-padded with whatever follows or repeats."""
    index = begin[:, None] + torch.arange(int(lengths.max()))
    index = index.clamp(max=events.surfaces.shape[1] - 1)
    wide = {
        name: index[..., None].expand(-1, -1, getattr(events, name).shape[-1]) for name in ("item_vectors", "actions")
    }
    return Events(
        item_vectors=events.item_vectors.gather(1, wide["item_vectors"]),
        actions=events.actions.gather(1, wide["actions"]),
        surfaces=events.surfaces.gather(1, index),
        timestamps_ms=events.timestamps_ms.gather(1, index),
        lengths=lengths,
    )


def _last_times(events: Events) -> Tensor:
    return events.timestamps_ms.gather(1, (events.lengths - 1)[:, None])[:, 0]


def _named(source: ExportSource, graph: str, key_values: object) -> dict[str, Tensor]:
    names = source.model.kv_names(f"{graph}.present")
    assert isinstance(key_values, list | tuple)
    return dict(zip(names, (t for pair in key_values for t in pair), strict=True))
