"""From sequences to training batches: windows of events with the slates they precede, bucketed by length.

Every random choice is drawn from (seed, epoch, batch), so a run can resume anywhere and repeat itself bit for bit.
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
from unipinrec.models.data.sequences import Sequences

POOL_BATCHES = 50


@dataclass(frozen=True, kw_only=True)
class Window:
    """Events [begin, end) of the flat event arrays, and the slates [slate_begin, slate_end) that fall inside it."""

    begin: int
    end: int
    slate_begin: int
    slate_end: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's inputs. Items are named by their index in `item_rows`, so that each is embedded once.

    Shapes: B rows, n events, k candidates, S sampled items, C actions; i64 unless noted.
    """

    item_rows: Tensor  # (U,) catalogue rows of every item in the batch
    history_items: Tensor  # (B, n)
    history_actions: Tensor  # (B, n, C) f32
    history_known: Tensor  # (B, n, C) f32, 0 where it is unknown whether the event had the action
    history_surfaces: Tensor  # (B, n)
    history_timestamps_ms: Tensor  # (B, n)
    lengths: Tensor  # (B,)
    masked: Tensor  # (B, n) f32
    targets: Tensor  # (B, n) item of the next event, where it is positive; -1 elsewhere
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
    sampled_log_q: Tensor  # (S,) f32 log of how often each is expected to be drawn, repeats counted

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(**{name: getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class TrainBatchOptions:
    """How batches are made: rows per batch, window length, candidates per row, MAM's p, random negatives, the seed.

    With `fit_validation` the validation part is trained on as well. `history_candidates` events of each window are
    candidates too, each behind the slates' and with the events before it as its history.
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

    With a time split, training events and slates lie before `valid_start_ms`; without, the last two events of each
    user are held out, and so are slates that no training event follows. `fit_validation` holds out the test part alone.
    A slate belongs to the window that holds the event right before it. A user's first event is left out where it would
    make a window alone, without a slate.
    """
    event_end = data.event_start[:-1] + _counts_by_user(data, training_events(data, fit_validation=fit_validation))
    cut = 0
    if data.split is not None:
        cut = data.split.test_start_ms if fit_validation else data.split.valid_start_ms
    slate_bounds = np.searchsorted(data.slate_user, np.arange(data.num_users + 1))
    windows = []
    for user in range(data.num_users):
        first, end = int(data.event_start[user]), int(event_end[user])
        slates = np.arange(slate_bounds[user], slate_bounds[user + 1])
        if data.split is not None:
            slates = slates[data.slate_timestamp_ms[slates] < cut]
        else:
            slates = slates[data.slate_cutoff[slates] < end - first]
        while end > first:
            begin = max(first, end - max_history)
            cutoff = data.slate_cutoff[slates] + first
            inside = slates[(cutoff > begin) & (cutoff <= end)]
            span = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
            if end - begin > 1 or len(inside):
                windows.append(Window(begin=begin, end=end, slate_begin=span[0], slate_end=span[1]))
            end = begin
    return windows


def training_events(data: Sequences, *, fit_validation: bool = False) -> NDArray[np.bool_]:
    """[M] which events lie in the training part: before the split's time, or all but each user's last two (or one)."""
    if data.split is None:
        ends = np.repeat(data.event_start[1:], np.diff(data.event_start))
        return np.arange(len(data.rows)) < ends - (1 if fit_validation else 2)
    return data.timestamps_ms < (data.split.test_start_ms if fit_validation else data.split.valid_start_ms)


def window_events(windows: Sequence[Window], count: int) -> NDArray[np.bool_]:
    """Which of `count` events lie in a window, and so are trained on."""
    inside = np.zeros(count, bool)
    for window in windows:
        inside[window.begin : window.end] = True
    return inside


def _counts_by_user(data: Sequences, flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    total = np.concatenate([[0], np.cumsum(flags)])
    counts: NDArray[np.int64] = total[data.event_start[1:]] - total[data.event_start[:-1]]
    return counts


class Batches:
    """All training batches of a data set, epoch by epoch."""

    def __init__(self, data: Sequences, positive: NDArray[np.bool_], options: TrainBatchOptions) -> None:
        """Prepare windows; `positive` [C] says which actions make an event a retrieval target."""
        self.data, self.options = data, options
        self.windows = training_windows(data, options.max_history, fit_validation=options.fit_validation)
        self.is_positive: NDArray[np.bool_] = np.any(data.actions[:, positive] > 0, axis=1)
        self.last_event = np.repeat(data.event_start[1:] - 1, np.diff(data.event_start))
        self.trainable = window_events(self.windows, len(data.rows))
        counts = np.bincount(data.rows[self.is_positive & self.trainable], minlength=data.num_items)
        self.target_probability = counts / max(counts.sum(), 1)

    def __len__(self) -> int:
        """Batches per epoch."""
        return math.ceil(len(self.windows) / self.options.batch_size)

    def epoch(self, epoch: int, indices: Sequence[int]) -> Iterator[Batch]:
        """These batches of one epoch, in this order."""
        plan = self._plan(epoch)
        for index in indices:
            rng = np.random.default_rng([self.options.seed, epoch, index])
            yield self._collate([self.windows[i] for i in plan[index]], rng)

    def collate(self, indices: Sequence[int]) -> Batch:
        """One batch of these windows, drawn as the first batch of a run would be."""
        return self._collate([self.windows[i] for i in indices], np.random.default_rng([self.options.seed, 0, 0]))

    def padding(self) -> float:
        """Share of the event slots of the first epoch's batches that are padding."""
        lengths = np.array([w.end - w.begin for w in self.windows])
        padded = sum(int(lengths[part].max()) * len(part) for part in self._plan(0))
        return 1.0 - float(lengths.sum()) / padded

    def _plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """Shuffle, sort by length within pools of batches so that padding stays small, shuffle the batches."""
        rng = np.random.default_rng([self.options.seed, epoch])
        order = rng.permutation(len(self.windows))
        size = self.options.batch_size
        lengths = np.array([w.end - w.begin for w in self.windows])
        batches = []
        for pool in np.split(order, np.arange(size * POOL_BATCHES, len(order), size * POOL_BATCHES)):
            by_length = pool[np.argsort(lengths[pool], kind="stable")]
            batches += np.split(by_length, np.arange(size, len(pool), size))
        return [batches[i] for i in rng.permutation(len(batches))]

    def _collate(self, windows: list[Window], rng: np.random.Generator) -> Batch:
        data = self.data
        events = pad_rows([np.arange(w.begin, w.end) for w in windows])
        real = events >= 0
        following = np.minimum(events + 1, len(data.rows) - 1)
        has_target = real & (events < self.last_event[events]) & self.is_positive[following] & self.trainable[following]
        candidates = self._candidates(windows, rng)
        targets = np.where(has_target, data.rows[following], -1)
        sampled, log_q = self._sample(targets[has_target], rng)
        item_rows, inverse = np.unique(
            np.concatenate([data.rows[events].ravel(), candidates["rows"].ravel(), sampled]),
            return_inverse=True,
        )
        shape = candidates["rows"].shape
        history_items, candidate_items, sampled_items = np.split(
            inverse, [events.size, events.size + shape[0] * shape[1]]
        )
        arrays = {
            "item_rows": item_rows,
            "history_items": history_items.reshape(events.shape),
            "history_actions": (data.actions[events] * real[..., None]).astype(np.float32),
            "history_known": (data.actions_known[events] * real[..., None]).astype(np.float32),
            "history_surfaces": np.where(real, data.surfaces[events], 0),
            "history_timestamps_ms": np.where(real, data.timestamps_ms[events], MISSING_TIMESTAMP_MS),
            "lengths": real.sum(axis=1),
            "masked": (real & (rng.random(events.shape) < self.options.mask_probability)).astype(np.float32),
            "targets": np.where(has_target, np.searchsorted(item_rows, targets), -1),
            "target_actions": (data.actions[following] * has_target[..., None]).astype(np.float32),
            "candidate_items": candidate_items.reshape(shape),
            "candidate_actions": candidates["actions"].astype(np.float32),
            "candidate_known": candidates["known"].astype(np.float32),
            "candidate_surfaces": candidates["surfaces"],
            "candidate_timestamps_ms": candidates["timestamps_ms"],
            "cutoffs": candidates["cutoffs"],
            "candidate_valid": candidates["valid"],
            "candidate_logged": candidates["logged"].astype(np.float32),
            "sampled_items": sampled_items,
            "sampled_log_q": log_q,
        }
        return Batch(**{name: torch.from_numpy(array) for name, array in arrays.items()})

    def _candidates(self, windows: list[Window], rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Raw inputs and labels of the slates' candidates and, behind them, of the history's."""
        data, (items, slates) = self.data, self._slate_items(windows, rng)
        begin = np.array([w.begin for w in windows])[:, None]
        shown, slate_begin = items >= 0, data.event_start[data.slate_user[slates]]
        found: dict[str, NDArray[Any]] = {
            "rows": data.slate_rows[items],
            "actions": data.slate_actions[items] * shown[..., None],
            "known": np.repeat(shown[..., None], data.actions.shape[1], axis=2),
            "surfaces": np.where(shown, data.slate_surface[slates], 0),
            "timestamps_ms": np.where(shown, data.slate_timestamp_ms[slates], MISSING_TIMESTAMP_MS),
            "cutoffs": np.where(shown, data.slate_cutoff[slates] + slate_begin - begin, 0),
            "valid": shown,
            "logged": np.zeros_like(shown),
        }
        if not self.options.history_candidates:
            return found
        events = self._drawn_events(windows, rng)
        real = events >= 0
        drawn: dict[str, NDArray[Any]] = {
            "rows": data.rows[events],
            "actions": data.actions[events] * real[..., None],
            "known": data.actions_known[events] * real[..., None],
            "surfaces": np.where(real, data.surfaces[events], 0),
            "timestamps_ms": np.where(real, data.timestamps_ms[events], MISSING_TIMESTAMP_MS),
            "cutoffs": np.where(real, events - begin, 0),
            "valid": real,
            "logged": real,
        }
        return {name: np.concatenate([found[name], drawn[name]], axis=1) for name in found}

    def _drawn_events(self, windows: list[Window], rng: np.random.Generator) -> NDArray[np.int64]:
        """Indices of events drawn from each window without repeats, (B, k), -1 where padded."""
        wanted = self.options.history_candidates
        lengths = [w.end - w.begin for w in windows]
        return pad_rows(
            [w.begin + rng.permutation(n)[:wanted].astype(np.int64) for w, n in zip(windows, lengths, strict=True)]
        )

    def _slate_items(
        self, windows: list[Window], rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices of slate items and of their slates, (B, k), -1 where padded: whole slates, drawn up to the limit.

        A slate beyond the limit is drawn alone, with as many of its items as the limit allows.
        """
        starts, limit, items, owners = self.data.slate_start, self.options.max_candidates, [], []
        for window in windows:
            slates = rng.permutation(np.arange(window.slate_begin, window.slate_end))
            sizes = np.diff(starts)[slates]
            if (sizes > limit).any():
                # Only where it comes first, so that it takes no room from the others where it does not.
                slates = slates[:1] if sizes[0] > limit else slates[sizes <= limit]
                sizes = np.minimum(np.diff(starts)[slates], limit)
            fits = np.cumsum(sizes) <= limit
            slates, sizes = slates[fits], sizes[fits]
            spans = [_span(starts, slate) for slate in slates]
            parts = [span if len(span) <= limit else rng.permutation(span)[:limit] for span in spans]
            items.append(np.concatenate([np.zeros(0, np.int64), *parts]))
            owners.append(np.repeat(slates, sizes))
        return pad_rows(items), pad_rows(owners)

    def _sample(
        self, targets: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """In-batch and random items of the sampled softmax, and the log of each one's expected count (paper Eq. 1)."""
        count = self.data.num_items
        if self.options.num_negatives >= count:
            return np.arange(count), np.zeros(count, np.float32)
        uniform = rng.integers(0, count, self.options.num_negatives)
        sampled = np.unique(np.concatenate([targets, uniform]))
        expected = len(targets) * self.target_probability[sampled] + self.options.num_negatives / count
        return sampled, np.log(expected).astype(np.float32)


def _span(starts: NDArray[np.int64], index: int) -> NDArray[np.int64]:
    return np.arange(starts[index], starts[index + 1])


def pad_rows(rows: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Stack runs of indices into one array, -1 where a row is shorter than the longest."""
    width = max((len(row) for row in rows), default=0)
    padded = np.full((len(rows), width), -1, np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded
