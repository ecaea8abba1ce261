"""Quality on held-out requests: a history, the next item, and the shown slate.

- Data with slates: one request per held-out slate, as in serving. The history is the last `max_history` events before
  the slate. The candidates are the shown items; the target is the slate's first positive item.
- Data with times but no slates: one request per held-out positive event, with all events before its time.
- Data without times is split leave-one-out: the target is the user's last event (test), or the event before it
  (validation), if that is positive.

Items of the history are excluded from retrieval, as in serving, and are no targets. With `repeats` nothing is excluded:
in shops, people buy the same item again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from unipinrec.models.batches import Indices, Mask, event_inputs, pad_rows, positive_events, slate_inputs
from unipinrec.models.data.schema import TimeSplit
from unipinrec.models.data.sequences import Sequences
from unipinrec.models.metrics import Metrics, action_metrics, retrieval_metrics, target_ranks
from unipinrec.models.model import CandidateTokens, HistoryTokens, UniPinRec

Split = Literal["valid", "test"]
NO_TARGET = -1
NO_SLATE = -1
EVALUATION_BATCH = 128
RANKED_AT_ONCE = 512
SCORES_AT_ONCE = 2**24


@dataclass(frozen=True, kw_only=True)
class Requests:
    """R held-out requests: user index, index of the first event *not* in the history, target row or -1, slate or -1.

    If `repeats`, items of the history may be targets and stay in the catalogue.
    """

    users: Indices
    ends: Indices
    targets: Indices
    slates: Indices
    repeats: bool = False

    def __len__(self) -> int:
        return len(self.users)

    def take(self, index: Indices) -> Requests:
        """The requests at these places."""
        parts = {name: getattr(self, name)[index] for name in ("users", "ends", "targets", "slates")}
        return replace(self, **parts)

    def chunks(self, size: int) -> Iterator[Requests]:
        """The requests, `size` at a time."""
        for begin in range(0, len(self), size):
            yield self.take(np.arange(begin, min(begin + size, len(self))))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one scorer.

    Attributes:
        ranks: 0-based rank of each target, over the requests with a target.
        probabilities: [rows, C] per shown item, in the order of `shown_items`.
    """

    ranks: NDArray[np.float64]
    probabilities: NDArray[np.float64]


def held_out_requests(
    data: Sequences, positive: Mask, split: Split, limit: int | None = None, *, repeats: bool = False
) -> Requests:
    """The requests of a split that have a history, at most `limit` of them (drawn evenly over the split)."""
    requests = held_out(data, positive, split, repeats=repeats)
    kept = requests.ends > data.event_start[requests.users]
    if data.split is not None and not len(data.slate_ids):
        kept &= requests.targets != NO_TARGET  # such a request has nothing to measure
    requests = requests.take(np.flatnonzero(kept))
    if limit is not None and len(requests) > limit:
        requests = requests.take(np.linspace(0, len(requests) - 1, limit).astype(np.int64))
    return requests


def held_out(data: Sequences, positive: Mask, split: Split, *, repeats: bool) -> Requests:
    """One request per held-out slate or event of a split, also for users without a history."""
    if data.split is not None and len(data.slate_ids):
        return _by_slate(data, data.split, positive, split, repeats=repeats)
    eligible = positive_events(data, positive)
    if data.split is None:
        held = 1 if split == "test" else 2
        users = np.flatnonzero(np.diff(data.event_start) >= held)
        users = users[eligible[data.event_start[users + 1] - held]]
        events = ends = data.event_start[users + 1] - held
    else:
        eligible &= _inside(data.timestamps_ms, data.split, split)
        events, owners = np.flatnonzero(eligible), event_users(data)
        users = owners[events]
        # Events of the same time are not in each other's history.
        later = (np.diff(owners, prepend=-1) != 0) | (np.diff(data.timestamps_ms, prepend=0) != 0)
        ends = np.flatnonzero(later)[np.cumsum(later)[events] - 1]
    targets = data.rows[events]
    if not repeats:
        targets = np.where(seen_before(data, users, targets, ends), NO_TARGET, targets)
    return Requests(users=users, ends=ends, targets=targets, slates=np.full(len(users), NO_SLATE), repeats=repeats)


def _by_slate(data: Sequences, times: TimeSplit, positive: Mask, split: Split, *, repeats: bool) -> Requests:
    slates = np.flatnonzero(_inside(data.slate_timestamp_ms, times, split))
    users = data.slate_user[slates]
    requests = Requests(
        users=users,
        ends=data.event_start[users] + data.slate_cutoff[slates],
        targets=np.full(len(slates), NO_TARGET),
        slates=slates,
        repeats=repeats,
    )
    items = shown_items(data, requests)
    owners = np.repeat(np.arange(len(slates)), np.diff(data.slate_start)[slates])
    eligible = np.any(data.slate_actions[items][:, positive] > 0, axis=1)
    if not repeats:
        eligible &= ~seen_before(data, users[owners], data.slate_rows[items], requests.ends[owners])
    targeted, first = np.unique(owners[eligible], return_index=True)
    requests.targets[targeted] = data.slate_rows[items[eligible][first]]
    return requests


def event_users(data: Sequences) -> Indices:
    """[M] the user index of each event."""
    return np.repeat(np.arange(data.num_users), np.diff(data.event_start))


def seen_before(data: Sequences, users: Indices, rows: Indices, ends: Indices) -> Mask:
    """[R] whether each user has an event with that catalogue row before the event index in `ends`."""
    pairs, first = np.unique(event_users(data) * data.num_items + data.rows, return_index=True)
    pairs, first = np.append(pairs, np.iinfo(np.int64).max), np.append(first, 0)  # `own` may lie behind all pairs
    own = users * data.num_items + rows
    at = np.searchsorted(pairs, own)
    seen: Mask = (pairs[at] == own) & (first[at] < ends)
    return seen


def request_times_ms(data: Sequences, requests: Requests) -> Indices:
    """[R] i64 Unix time in ms of each request: that of its slate, else of the held-out event; -1 if unknown."""
    return _of_each(requests, data.slate_timestamp_ms, data.timestamps_ms)


def request_surfaces(data: Sequences, requests: Requests) -> Indices:
    """[R] i64 surface code of each request: that of its slate, else of the first event after the history."""
    return _of_each(requests, data.slate_surface, data.surfaces)


def _of_each(requests: Requests, of_slates: Indices, of_events: Indices) -> Indices:
    shown = requests.slates != NO_SLATE
    values = np.zeros(len(requests), np.int64)
    values[shown] = of_slates[requests.slates[shown]]
    values[~shown] = of_events[requests.ends[~shown]]
    return values


def _inside(times_ms: Indices, times: TimeSplit, split: Split) -> Mask:
    after = times_ms >= times.test_start_ms
    return after if split == "test" else (times_ms >= times.valid_start_ms) & ~after


def history_rows(data: Sequences, user: int, end: int) -> Indices:
    """Catalogue rows of the user's events before `end`."""
    return data.rows[data.event_start[user] : end]


def shown_items(data: Sequences, requests: Requests) -> Indices:
    """Indices of all slate items of the requests, request by request."""
    return np.concatenate([np.zeros(0, np.int64), *slate_spans(data, requests)])


def slate_spans(data: Sequences, requests: Requests) -> list[Indices]:
    """Per request the indices of its slate items; empty without a slate."""
    return [np.arange(*data.slate_start[s : s + 2]) if s != NO_SLATE else np.zeros(0, int) for s in requests.slates]


def slates_of(data: Sequences, items: Indices) -> Indices:
    """The slate of each slate item."""
    return np.searchsorted(data.slate_start, items, side="right") - 1


def metrics_of(scores: Scores, data: Sequences, requests: Requests, actions: tuple[str, ...]) -> Metrics:
    """Turn the scores of one scorer into metrics."""
    shown = shown_items(data, requests)
    retrieval = retrieval_metrics(scores.ranks)
    if not len(shown):
        return Metrics(retrieval=retrieval, ranking=None)
    owner = data.slate_user[slates_of(data, shown)]
    ranking = {
        name: action_metrics(owner, data.slate_actions[shown, c], scores.probabilities[:, c])
        for c, name in enumerate(actions)
    }
    return Metrics(retrieval=retrieval, ranking=ranking)


def rank_catalogue(
    data: Sequences, requests: Requests, scores_of: Callable[[Requests], NDArray[np.float32]]
) -> NDArray[np.float64]:
    """Rank each target, in chunks, among the catalogue scores [requests, N] of `scores_of`."""
    targeted = requests.take(np.flatnonzero(requests.targets != NO_TARGET))
    chunk = min(RANKED_AT_ONCE, max(1, SCORES_AT_ONCE // data.num_items))
    parts = [target_ranks(scores_of(part), left_out(data, part), part.targets) for part in targeted.chunks(chunk)]
    return np.concatenate([np.zeros(0), *parts])


@torch.inference_mode()
def model_scores(
    model: UniPinRec, data: Sequences, requests: Requests, batch_size: int = EVALUATION_BATCH
) -> Iterator[Scores]:
    """Score requests batch by batch, in their order; `gather_scores` joins the parts."""
    model.eval()
    device = model.log_scale.device
    vectors = item_vectors(model, data)
    outcomes = torch.from_numpy(model.vocabulary.positive)[None].float().to(device)
    for part in requests.chunks(batch_size):
        history, slate, shown = _inputs(model, data, part, vectors)
        hidden, candidates = model.joint(history, torch.zeros_like(history.timestamps_ms).float(), slate)
        last = hidden[torch.arange(len(part), device=device), history.lengths - 1]
        queries = model.retrieve(last, outcomes.expand(len(part), -1) if model.config.outcome_conditioned else None)
        has = part.targets != NO_TARGET
        chosen = part.take(np.flatnonzero(has))
        scores = (queries[:, 0] @ vectors.T).float().cpu().numpy()[has]
        logits = model.action_heads(candidates).float().sigmoid().cpu().numpy()
        yield Scores(
            ranks=target_ranks(scores, left_out(data, chosen), chosen.targets),
            probabilities=logits[shown].astype(np.float64),
        )


def gather_scores(parts: list[Scores]) -> Scores:
    """Join the parts that `model_scores` yields."""
    probabilities = [p.probabilities for p in parts]
    return Scores(
        ranks=np.concatenate([np.zeros(0), *(p.ranks for p in parts)]),
        probabilities=np.concatenate(probabilities) if probabilities else np.zeros((0, 0)),
    )


@torch.inference_mode()
def item_vectors(model: UniPinRec, data: Sequences, chunk: int = 65_536) -> torch.Tensor:
    """Vectors [N, E] of the whole catalogue, on the model's device."""
    device = model.log_scale.device
    parts = []
    for rows in torch.arange(data.num_items).split(chunk):
        dense = torch.from_numpy(data.features.dense[rows.numpy()]).to(device)
        categories = torch.from_numpy(data.features.categories[rows.numpy()]).to(device)
        parts.append(model.embed_items(rows.to(device), dense, categories))
    return torch.cat(parts)


def _inputs(
    model: UniPinRec, data: Sequences, part: Requests, vectors: torch.Tensor
) -> tuple[HistoryTokens, CandidateTokens, Mask]:
    begins = np.maximum(data.event_start[part.users], part.ends - model.config.max_history)
    events = pad_rows([np.arange(b, e) for b, e in zip(begins, part.ends, strict=True)])
    real = events >= 0
    lengths, items = real.sum(axis=1), pad_rows(slate_spans(data, part))
    device = vectors.device

    def spread(values: Indices) -> Indices:
        return np.repeat(values[:, None], items.shape[1], axis=1)

    def tensors(inputs: dict[str, NDArray[Any]], *names: str) -> dict[str, torch.Tensor]:
        """Item vectors and the named inputs, on the model's device."""
        arrays = {name: torch.from_numpy(inputs[name]).to(device) for name in ("rows", *names)}
        return {"vectors": vectors[arrays.pop("rows")], **arrays}

    history = HistoryTokens(
        **tensors(event_inputs(data, events), "actions", "surfaces", "timestamps_ms"),
        lengths=torch.from_numpy(lengths).to(device),
    )
    slate = CandidateTokens(
        **tensors(slate_inputs(data, items, spread(part.slates)), "surfaces", "timestamps_ms"),
        cutoffs=torch.from_numpy(spread(lengths)).to(device),
    )
    return history, slate, items >= 0


def left_out(data: Sequences, requests: Requests) -> list[Indices]:
    """Per request the catalogue rows that are not eligible: those of its history, or none if repeats count."""
    if requests.repeats:
        return [np.zeros(0, np.int64)] * len(requests)
    return [history_rows(data, u, e) for u, e in zip(requests.users, requests.ends, strict=True)]
