"""Quality on held-out requests: a history, the item that followed, and the slate that was shown.

One request per held-out slate, exactly as it would be served: all events before the slate (the last `max_history`
of them), candidates = the shown items, retrieval target = the slate's first positive item. Items in the history are
excluded from retrieval, as they are in serving, and so are targets that were seen before. Data that has times but no
slates gives one request per held-out positive event whose item is new to its user, with all events before its time.
Data without times is split leave-one-out: the target is the user's last event (test) or the one before (validation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from unipinrec.models.batches import pad_rows
from unipinrec.models.config import MISSING_TIMESTAMP_MS
from unipinrec.models.data_schema import TimeSplit
from unipinrec.models.metrics import Metrics, action_metrics, retrieval_metrics, target_ranks
from unipinrec.models.model import CandidateTokens, HistoryTokens, UniPinRec
from unipinrec.models.sequences import Sequences

Split = Literal["valid", "test"]
NO_TARGET = -1
NO_SLATE = -1
EVALUATION_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class Requests:
    """R held-out requests: user index, index of the first event *not* in the history, target row or -1, slate or -1."""

    users: NDArray[np.int64]
    ends: NDArray[np.int64]
    targets: NDArray[np.int64]
    slates: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.users)

    def take(self, index: NDArray[np.int64]) -> Requests:
        """Some of the requests."""
        return Requests(
            users=self.users[index],
            ends=self.ends[index],
            targets=self.targets[index],
            slates=self.slates[index],
        )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One scorer's answers.

    Attributes:
        ranks: 0-based rank of each target, over the requests that have one.
        probabilities: [rows, C] per shown item, in the order of `shown_items`.
    """

    ranks: NDArray[np.float64]
    probabilities: NDArray[np.float64]


def held_out_requests(data: Sequences, positive: NDArray[np.bool_], split: Split, limit: int | None = None) -> Requests:
    """The requests of a split, at most `limit` of them (drawn evenly over the split)."""
    if data.split is None:
        requests = _leave_one_out(data, split)
    elif len(data.slate_ids):
        requests = _by_time(data, data.split, positive, split)
    else:
        requests = _by_event(data, data.split, positive, split)
    if limit is not None and len(requests) > limit:
        requests = requests.take(np.linspace(0, len(requests) - 1, limit).astype(np.int64))
    return requests


def _leave_one_out(data: Sequences, split: Split) -> Requests:
    held = 1 if split == "test" else 2
    users = np.flatnonzero(np.diff(data.event_start) > held)
    ends = data.event_start[users + 1] - held
    targets = data.rows[ends].copy()
    for i, (user, end) in enumerate(zip(users.tolist(), ends.tolist(), strict=True)):
        if targets[i] in history_rows(data, user, end):
            targets[i] = NO_TARGET
    return Requests(users=users, ends=ends, targets=targets, slates=np.full(len(users), NO_SLATE))


def _by_time(data: Sequences, times: TimeSplit, positive: NDArray[np.bool_], split: Split) -> Requests:
    slates = np.flatnonzero(_inside(data.slate_timestamp_ms, times, split) & (data.slate_cutoff > 0))
    users = data.slate_user[slates]
    ends = data.event_start[users] + data.slate_cutoff[slates]
    wanted: NDArray[np.bool_] = np.any(data.slate_actions[:, positive] > 0, axis=1)
    targets = np.full(len(slates), NO_TARGET)
    for i, slate in enumerate(slates):
        items = slice(data.slate_start[slate], data.slate_start[slate + 1])
        hits = data.slate_rows[items][wanted[items]]
        hits = hits[~np.isin(hits, history_rows(data, users[i], ends[i]))]
        if len(hits):
            targets[i] = hits[0]
    return Requests(users=users, ends=ends, targets=targets, slates=slates)


def _by_event(data: Sequences, times: TimeSplit, positive: NDArray[np.bool_], split: Split) -> Requests:
    users = np.repeat(np.arange(data.num_users), np.diff(data.event_start))
    later = (np.diff(users, prepend=-1) != 0) | (np.diff(data.timestamps_ms, prepend=0) != 0)
    ends = np.flatnonzero(later)[np.cumsum(later) - 1]  # events of the same time are in no history of each other
    pairs = users * data.num_items + data.rows
    _, first, pair = np.unique(pairs, return_index=True, return_inverse=True)
    wanted = np.any(data.actions[:, positive] > 0, axis=1) & _inside(data.timestamps_ms, times, split)
    events = np.flatnonzero(wanted & (ends > data.event_start[users]) & (first[pair] >= ends))
    return Requests(
        users=users[events], ends=ends[events], targets=data.rows[events], slates=np.full(len(events), NO_SLATE)
    )


def _inside(times_ms: NDArray[np.int64], times: TimeSplit, split: Split) -> NDArray[np.bool_]:
    after = times_ms >= times.test_start_ms
    return after if split == "test" else (times_ms >= times.valid_start_ms) & ~after


def history_rows(data: Sequences, user: int, end: int) -> NDArray[np.int64]:
    """Catalogue rows of the user's events before `end`."""
    return data.rows[data.event_start[user] : end]


def shown_items(data: Sequences, requests: Requests) -> NDArray[np.int64]:
    """Indices of all slate items of the requests, request by request."""
    spans = [np.arange(data.slate_start[s], data.slate_start[s + 1]) for s in requests.slates if s != NO_SLATE]
    return np.concatenate([np.zeros(0, np.int64), *spans])


def metrics_of(scores: Scores, data: Sequences, requests: Requests, actions: tuple[str, ...]) -> Metrics:
    """Turn one scorer's answers into metrics."""
    shown = shown_items(data, requests)
    retrieval = retrieval_metrics(scores.ranks)
    if not len(shown):
        return Metrics(retrieval=retrieval, ranking=None)
    owner = data.slate_user[np.searchsorted(data.slate_start, shown, side="right") - 1]
    ranking = {
        name: action_metrics(owner, data.slate_actions[shown, c], scores.probabilities[:, c])
        for c, name in enumerate(actions)
    }
    return Metrics(retrieval=retrieval, ranking=ranking)


def rank_catalogue(
    data: Sequences, requests: Requests, scores_of: Callable[[Requests], NDArray[np.float32]]
) -> NDArray[np.float64]:
    """Rank each target, in chunks, among the catalogue scores [requests, N] that `scores_of` gives."""
    parts = [target_ranks(scores_of(part), _seen(data, part), part.targets) for part in _with_target(requests)]
    return _joined(parts)


def popularity_scores(data: Sequences, positive: NDArray[np.bool_], requests: Requests) -> Scores:
    """The baseline that needs no model: items by positive events in training; actions by each item's smoothed rate."""
    cut = data.split.valid_start_ms if data.split else None
    trained = data.timestamps_ms < cut if cut is not None else _not_held_out(data)
    wanted = trained & (data.actions[:, positive] > 0).any(axis=1)
    popularity = np.bincount(data.rows[wanted], minlength=data.num_items).astype(np.float32)
    ranks = rank_catalogue(data, requests, lambda part: np.tile(popularity, (len(part), 1)))
    shown = shown_items(data, requests)
    return Scores(ranks=ranks, probabilities=_item_rates(data, cut)[data.slate_rows[shown]])


def _not_held_out(data: Sequences) -> NDArray[np.bool_]:
    last = np.repeat(data.event_start[1:], np.diff(data.event_start))
    return np.arange(len(data.rows)) < last - 2


def _item_rates(data: Sequences, cut: int | None, prior_rows: float = 20.0) -> NDArray[np.float64]:
    """[N, C] rate of each action per item on training slates, shrunk towards the overall rate by `prior_rows` rows."""
    sizes = np.diff(data.slate_start)
    train = np.repeat(data.slate_timestamp_ms < cut if cut is not None else np.ones(len(sizes), bool), sizes)
    rows, labels = data.slate_rows[train], data.slate_actions[train]
    overall = labels.mean(axis=0) if len(labels) else np.full(labels.shape[1], 0.5)
    shown = np.bincount(rows, minlength=data.num_items)[:, None]
    hits = np.stack([np.bincount(rows, labels[:, c], data.num_items) for c in range(labels.shape[1])], axis=1)
    rates: NDArray[np.float64] = (hits + prior_rows * overall) / (shown + prior_rows)
    return rates


@torch.inference_mode()
def model_scores(
    model: UniPinRec, data: Sequences, requests: Requests, batch_size: int = EVALUATION_BATCH
) -> Iterator[Scores]:
    """Score requests batch by batch, in their order; `gather_scores` joins the parts."""
    model.eval()
    device = model.log_scale.device
    vectors = item_vectors(model, data)
    wanted = _wanted_outcomes(model, device)
    for begin in range(0, len(requests), batch_size):
        part = requests.take(np.arange(begin, min(begin + batch_size, len(requests))))
        history, slate, shown = _inputs(model, data, part, vectors)
        hidden, candidates = model.joint(history, torch.zeros_like(history.timestamps_ms).float(), slate)
        last = hidden[torch.arange(len(part), device=device), history.lengths - 1]
        queries = model.retrieve(last, wanted.expand(len(part), -1) if model.config.outcome_conditioned else None)
        has = part.targets != NO_TARGET
        chosen = part.take(np.flatnonzero(has))
        scores = (queries[:, 0] @ vectors.T).float().cpu().numpy()[has]
        logits = model.action_heads(candidates).float().sigmoid().cpu().numpy()
        yield Scores(
            ranks=target_ranks(scores, _seen(data, chosen), chosen.targets),
            probabilities=logits[shown].astype(np.float64),
        )


def gather_scores(parts: list[Scores]) -> Scores:
    """Join what `model_scores` yields."""
    probabilities = [p.probabilities for p in parts]
    return Scores(
        ranks=_joined([p.ranks for p in parts]),
        probabilities=np.concatenate(probabilities) if probabilities else np.zeros((0, 0)),
    )


@torch.inference_mode()
def item_vectors(model: UniPinRec, data: Sequences, chunk: int = 65_536) -> torch.Tensor:
    """Vectors [N, E] of the whole catalogue, on the model's device."""
    device = model.log_scale.device
    parts = []
    for begin in range(0, data.num_items, chunk):
        rows = torch.arange(begin, min(begin + chunk, data.num_items))
        dense = torch.from_numpy(data.features.dense[rows.numpy()]).to(device)
        categories = torch.from_numpy(data.features.categories[rows.numpy()]).to(device)
        parts.append(model.embed_items(rows.to(device), dense, categories))
    return torch.cat(parts)


def _wanted_outcomes(model: UniPinRec, device: torch.device) -> torch.Tensor:
    vocabulary = model.vocabulary
    return torch.tensor([[float(a in vocabulary.positive_actions) for a in vocabulary.actions]], device=device)


def _inputs(
    model: UniPinRec, data: Sequences, part: Requests, vectors: torch.Tensor
) -> tuple[HistoryTokens, CandidateTokens, NDArray[np.bool_]]:
    begins = np.maximum(data.event_start[part.users], part.ends - model.config.max_history)
    events = pad_rows([np.arange(b, e) for b, e in zip(begins, part.ends, strict=True)])
    real = events >= 0
    spans = [
        np.arange(data.slate_start[s], data.slate_start[s + 1]) if s >= 0 else np.zeros(0, int) for s in part.slates
    ]
    items = pad_rows(spans)
    shown = items >= 0
    at = part.slates[:, None]
    times = np.where(shown, data.slate_timestamp_ms[at], MISSING_TIMESTAMP_MS) if items.size else items
    surfaces = np.where(shown, data.slate_surface[at], 0) if items.size else items
    device = vectors.device

    def tensor(array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    history = HistoryTokens(
        vectors=vectors[tensor(data.rows[events])],
        actions=tensor((data.actions[events] * real[..., None]).astype(np.float32)),
        surfaces=tensor(np.where(real, data.surfaces[events], 0)),
        timestamps_ms=tensor(np.where(real, data.timestamps_ms[events], MISSING_TIMESTAMP_MS)),
        lengths=tensor(real.sum(axis=1)),
    )
    slate = CandidateTokens(
        vectors=vectors[tensor(data.slate_rows[items] if items.size else items)],
        surfaces=tensor(surfaces),
        timestamps_ms=tensor(times),
        cutoffs=tensor(np.repeat(real.sum(axis=1)[:, None], items.shape[1], axis=1)),
    )
    return history, slate, shown


def _with_target(requests: Requests, chunk: int = 512) -> list[Requests]:
    index = np.flatnonzero(requests.targets != NO_TARGET)
    return [requests.take(part) for part in np.split(index, np.arange(chunk, len(index), chunk)) if len(part)]


def _seen(data: Sequences, requests: Requests) -> list[NDArray[np.int64]]:
    return [history_rows(data, u, e) for u, e in zip(requests.users, requests.ends, strict=True)]


def _joined(parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate([np.zeros(0), *parts])
