"""From sequences to training batches: windows of events with their slates, bucketed by length.

Every random choice is drawn from (seed, epoch, batch), so a run can resume at any step and repeat itself bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unipinrec.models.config import MISSING_TIMESTAMP_MS
from unipinrec.models.data.schema import TimeSplit
from unipinrec.models.data.sequences import Sequences

POOL_BATCHES = 50
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Window:
    """Events [begin, end) of the flat event arrays, and the slates [slate_begin, slate_end) inside the window."""

    begin: int
    end: int
    slate_begin: int
    slate_end: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The inputs of one step. Items are indices into `item_rows`, so that each item is embedded once.

    Shapes: B rows, n events, k candidates, S sampled items, C actions; i64 unless noted.
    """

    item_rows: Tensor  # (U,) catalogue rows of every item in the batch
    history_items: Tensor  # (B, n)
    history_actions: Tensor  # (B, n, C) f32
    history_known: Tensor  # (B, n, C) f32, 0 if it is unknown whether the event had the action
    history_surfaces: Tensor  # (B, n)
    history_timestamps_ms: Tensor  # (B, n)
    lengths: Tensor  # (B,)
    masked: Tensor  # (B, n) f32
    targets: Tensor  # (B, n) item of the next event if that is positive, else -1
    target_actions: Tensor  # (B, n, C) f32
    candidate_items: Tensor  # (B, k)
    candidate_actions: Tensor  # (B, k, C) f32
    candidate_known: Tensor  # (B, k, C) f32, as history_known
    candidate_surfaces: Tensor  # (B, k)
    candidate_timestamps_ms: Tensor  # (B, k)
    cutoffs: Tensor  # (B, k)
    candidate_valid: Tensor  # (B, k) bool
    candidate_logged: Tensor  # (B, k) f32, 1 for events of the history
    sampled_items: Tensor  # (S,) items of the sampled softmax, distinct, every target among them
    sampled_log_q: Tensor  # (S,) f32 log of the expected number of draws of each, repeats counted

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class TrainBatchOptions:
    """How batches are made.

    Attributes:
        batch_size: Rows per batch.
        max_history: Events per window.
        max_candidates: Slate items per row.
        mask_probability: p of Masked Action Modeling.
        num_negatives: Random items beside the in-batch targets.
        seed: Of all random choices.
        fit_validation: Whether to train on the validation part too.
        history_candidates: Events per window that are candidates too, with the events before them as history.
    """

    batch_size: int
    max_history: int
    max_candidates: int
    mask_probability: float
    num_negatives: int
    seed: int
    fit_validation: bool = False
    history_candidates: int = 0


def training_windows(data: Sequences, max_history: int, *, fit_validation: bool = False) -> list[Window]:
    """Cut each user's training events into windows of at most `max_history`, aligned to the newest event.

    With a time split, training events and slates lie before `valid_start_ms`. Without, the last two events of each user
    are held out, and so are slates that no training event follows. `fit_validation` holds out the test part alone.
    A slate belongs to the window that holds the event right before it. A user's first event is left out if it would
    make a window alone, without a slate.
    """
    trained = np.cumsum(training_events(data, fit_validation=fit_validation))
    lengths = np.diff(np.concatenate([[0], trained])[data.event_start])
    if data.split is None:
        in_training = data.slate_cutoff < lengths[data.slate_user]
    else:
        in_training = data.slate_timestamp_ms < _training_end_ms(data.split, fit_validation)
    slate_bounds = np.searchsorted(data.slate_user, np.arange(data.num_users + 1))
    windows = []
    for user in range(data.num_users):
        first, end = int(data.event_start[user]), int(data.event_start[user] + lengths[user])
        slates = np.arange(slate_bounds[user], slate_bounds[user + 1])
        slates = slates[in_training[slates]]
        while end > first:
            begin = max(first, end - max_history)
            cutoff = data.slate_cutoff[slates] + first
            inside = slates[(cutoff > begin) & (cutoff <= end)]
            span = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
            if end - begin > 1 or len(inside):
                windows.append(Window(begin=begin, end=end, slate_begin=span[0], slate_end=span[1]))
            end = begin
    return windows


def training_events(data: Sequences, *, fit_validation: bool = False) -> Mask:
    """[M] which events lie in the training part: before the split's time, or all but each user's last two (or one)."""
    if data.split is None:
        ends = np.repeat(data.event_start[1:], np.diff(data.event_start))
        return np.arange(len(data.rows)) < ends - (1 if fit_validation else 2)
    return data.timestamps_ms < _training_end_ms(data.split, fit_validation)


def _training_end_ms(split: TimeSplit, fit_validation: bool) -> int:
    return split.test_start_ms if fit_validation else split.valid_start_ms


def window_events(windows: Sequence[Window], count: int) -> Mask:
    """Which of `count` events lie in a window, and so are trained on."""
    inside = np.zeros(count, bool)
    for window in windows:
        inside[window.begin : window.end] = True
    return inside


def positive_events(data: Sequences, positive: Mask) -> Mask:
    """[M] which events have a positive action; `positive` is [C]."""
    events: Mask = np.any(data.actions[:, positive] > 0, axis=1)
    return events


def event_inputs(data: Sequences, events: Indices) -> dict[str, NDArray[Any]]:
    """Raw inputs and labels of events [B, n] by index; -1 stands for padding."""
    real = events >= 0
    return {
        "rows": data.rows[events],
        "actions": (data.actions[events] * real[..., None]).astype(np.float32),
        "known": (data.actions_known[events] * real[..., None]).astype(np.float32),
        "surfaces": np.where(real, data.surfaces[events], 0),
        "timestamps_ms": np.where(real, data.timestamps_ms[events], MISSING_TIMESTAMP_MS),
    }


def slate_inputs(data: Sequences, items: Indices, slates: Indices) -> dict[str, NDArray[Any]]:
    """Raw inputs and labels of slate items [B, k] of slates [B, k]; item -1 stands for padding."""
    shown = items >= 0
    return {
        "rows": data.slate_rows[items],
        "actions": (data.slate_actions[items] * shown[..., None]).astype(np.float32),
        "known": np.repeat(shown[..., None], data.actions.shape[1], axis=2).astype(np.float32),
        "surfaces": np.where(shown, data.slate_surface[slates], 0),
        "timestamps_ms": np.where(shown, data.slate_timestamp_ms[slates], MISSING_TIMESTAMP_MS),
    }


class Batches:
    """All training batches of a data set, epoch by epoch."""

    def __init__(self, data: Sequences, positive: Mask, options: TrainBatchOptions) -> None:
        """Prepare windows; `positive` [C] marks the actions that make an event a retrieval target."""
        self.data, self.options = data, options
        self.windows = training_windows(data, options.max_history, fit_validation=options.fit_validation)
        self.lengths = np.array([window.end - window.begin for window in self.windows])
        self.is_positive = positive_events(data, positive)
        self.last_event = np.repeat(data.event_start[1:] - 1, np.diff(data.event_start))
        self.trainable = window_events(self.windows, len(data.rows))
        counts = np.bincount(data.rows[self.is_positive & self.trainable], minlength=data.num_items)
        self.target_probability = counts / max(counts.sum(), 1)

    def __len__(self) -> int:
        """Batches per epoch."""
        return math.ceil(len(self.windows) / self.options.batch_size)

    def epoch(self, epoch: int, indices: Sequence[int]) -> Iterator[Batch]:
        """The batches with these indices of one epoch, in this order."""
        plan = self._plan(epoch)
        for index in indices:
            rng = np.random.default_rng([self.options.seed, epoch, index])
            yield self._collate([self.windows[i] for i in plan[index]], rng)

    def collate(self, indices: Sequence[int]) -> Batch:
        """One batch of these windows, with the random choices of a run's first batch."""
        return self._collate([self.windows[i] for i in indices], np.random.default_rng([self.options.seed, 0, 0]))

    def padding(self) -> float:
        """Share of padding among the event slots of the first epoch's batches."""
        slots = sum(int(self.lengths[part].max()) * len(part) for part in self._plan(0))
        return 1.0 - float(self.lengths.sum()) / slots

    def _plan(self, epoch: int) -> list[Indices]:
        """Shuffle, sort by length within pools of batches so that padding stays small, shuffle the batches."""
        rng = np.random.default_rng([self.options.seed, epoch])
        order = rng.permutation(len(self.windows))
        size = self.options.batch_size
        batches = []
        for pool in np.split(order, np.arange(size * POOL_BATCHES, len(order), size * POOL_BATCHES)):
            by_length = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += np.split(by_length, np.arange(size, len(pool), size))
        return [batches[i] for i in rng.permutation(len(batches))]

    def _collate(self, windows: list[Window], rng: np.random.Generator) -> Batch:
        data = self.data
        events = pad_rows([np.arange(w.begin, w.end) for w in windows])
        real = events >= 0
        following = np.minimum(events + 1, len(data.rows) - 1)
        has_target = real & (events < self.last_event[events]) & self.is_positive[following] & self.trainable[following]
        history, candidates = event_inputs(data, events), self._candidates(windows, rng)
        rows, candidate_rows = history.pop("rows"), candidates.pop("rows")
        targets = np.where(has_target, data.rows[following], -1)
        sampled, log_q = self._sample(targets[has_target], rng)
        item_rows, inverse = np.unique(
            np.concatenate([rows.ravel(), candidate_rows.ravel(), sampled]), return_inverse=True
        )
        items, candidate_items, sampled_items = np.split(inverse, [rows.size, rows.size + candidate_rows.size])
        arrays = {
            "item_rows": item_rows,
            "history_items": items.reshape(rows.shape),
            **{f"history_{name}": array for name, array in history.items()},
            "lengths": real.sum(axis=1),
            "masked": (real & (rng.random(events.shape) < self.options.mask_probability)).astype(np.float32),
            "targets": np.where(has_target, np.searchsorted(item_rows, targets), -1),
            "target_actions": (data.actions[following] * has_target[..., None]).astype(np.float32),
            "cutoffs": candidates.pop("cutoffs"),
            "candidate_items": candidate_items.reshape(candidate_rows.shape),
            **{f"candidate_{name}": array for name, array in candidates.items()},
            "sampled_items": sampled_items,
            "sampled_log_q": log_q,
        }
        return Batch(**{name: torch.from_numpy(array) for name, array in arrays.items()})

    def _candidates(self, windows: list[Window], rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Raw inputs and labels of the candidates from slates, then of those from the history."""
        data, (items, slates) = self.data, self._slate_items(windows, rng)
        begin = np.array([w.begin for w in windows])[:, None]
        shown, slate_begin = items >= 0, data.event_start[data.slate_user[slates]]
        from_slates = slate_inputs(data, items, slates) | {
            "cutoffs": np.where(shown, data.slate_cutoff[slates] + slate_begin - begin, 0),
            "valid": shown,
            "logged": np.zeros(shown.shape, np.float32),
        }
        drawn = self.options.history_candidates
        if not drawn:
            return from_slates
        events = pad_rows([w.begin + rng.permutation(w.end - w.begin)[:drawn] for w in windows])
        real = events >= 0
        from_history = event_inputs(data, events) | {
            "cutoffs": np.where(real, events - begin, 0),
            "valid": real,
            "logged": real.astype(np.float32),
        }
        return {name: np.concatenate([array, from_history[name]], axis=1) for name, array in from_slates.items()}

    def _slate_items(self, windows: list[Window], rng: np.random.Generator) -> tuple[Indices, Indices]:
        """Indices of slate items and of their slates, (B, k), -1 for padding: whole slates, drawn up to the limit.

        A slate beyond the limit is drawn alone, with as many of its items as the limit allows.
        """
        starts, limit, items, owners = self.data.slate_start, self.options.max_candidates, [], []
        for window in windows:
            slates = rng.permutation(np.arange(window.slate_begin, window.slate_end))
            sizes = np.diff(starts)[slates]
            if (sizes > limit).any():
                # It is drawn only if it comes first, so that it never takes room from other slates.
                slates = slates[:1] if sizes[0] > limit else slates[sizes <= limit]
                sizes = np.minimum(np.diff(starts)[slates], limit)
            fits = np.cumsum(sizes) <= limit
            slates, sizes = slates[fits], sizes[fits]
            spans = [np.arange(*starts[slate : slate + 2]) for slate in slates]
            parts = [span if len(span) <= limit else rng.permutation(span)[:limit] for span in spans]
            items.append(np.concatenate([np.zeros(0, np.int64), *parts]))
            owners.append(np.repeat(slates, sizes))
        return pad_rows(items), pad_rows(owners)

    def _sample(self, targets: Indices, rng: np.random.Generator) -> tuple[Indices, NDArray[np.float32]]:
        """In-batch and random items of the sampled softmax, and the log of each one's expected count (paper Eq. 1)."""
        count = self.data.num_items
        if self.options.num_negatives >= count:
            return np.arange(count), np.zeros(count, np.float32)
        uniform = rng.integers(0, count, self.options.num_negatives)
        sampled = np.unique(np.concatenate([targets, uniform]))
        expected = len(targets) * self.target_probability[sampled] + self.options.num_negatives / count
        return sampled, np.log(expected).astype(np.float32)


def pad_rows(rows: list[Indices]) -> Indices:
    """Stack runs of indices into one array, padded with -1 to the longest."""
    width = max((len(row) for row in rows), default=0)
    padded = np.full((len(rows), width), -1, np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded
