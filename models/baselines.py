"""Baselines that need no model: popularity at the time of each request, and the item that followed the last one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from unipinrec.models.batches import Indices, Mask, positive_events, training_events
from unipinrec.models.config import DAY_MS, MISSING_TIMESTAMP_MS
from unipinrec.models.data.sequences import Sequences
from unipinrec.models.evaluate import Requests, event_users, history_rows, request_times_ms

Counts = NDArray[np.float32]
Scorer = Callable[[Requests], Counts]


def baselines_of(
    data: Sequences, positive: Mask, *, fit_validation: bool = False, repeats: bool = False
) -> dict[str, Scorer]:
    """Scorers by name; each returns f32 scores [requests, N] for `rank_catalogue`, higher is better.

    - "popular_all_time", "popular_week", "popular_day": positive events before the request's time: all, or of the last
      seven days or day, with ties broken by all time. A request without a time gets the popularity of the training
      part, and so do all requests of data without times; such data has no week and day.
    - "next_item": how often the item was the next positive event after the last item of the history in the training
      part; ties are broken by popularity there.
    - "had_most_often", with `repeats`: how often the user had the item, ties broken by popularity.

    Args:
        data: All events, those of the held-out part included.
        positive: [C] which actions make an event positive.
        fit_validation: Whether the baselines may learn from the validation part, as the model may.
        repeats: Whether items of the history may be targets.
    """
    training = training_popularity(data, positive, fit_validation=fit_validation)
    scorers: dict[str, Scorer] = {"popular_all_time": lambda requests: np.tile(training, (len(requests), 1))}
    if (data.timestamps_ms != MISSING_TIMESTAMP_MS).any():
        spans_ms = {"popular_all_time": None, "popular_week": 7 * DAY_MS, "popular_day": DAY_MS}
        scorers = {name: _popular(data, positive, training, span_ms) for name, span_ms in spans_ms.items()}
    scorers["next_item"] = _next_item(data, positive, training, fit_validation=fit_validation)
    if repeats:
        scorers["had_most_often"] = partial(_had_most_often, data, training)
    return scorers


def _had_most_often(data: Sequences, training: Counts, requests: Requests) -> Counts:
    scores = np.tile(_ties(training), (len(requests), 1))
    for at, (user, end) in enumerate(zip(requests.users, requests.ends, strict=True)):
        np.add.at(scores[at], history_rows(data, user, end), 1.0)
    return scores


def _ties(counts: Counts) -> Counts:
    """Counts [..., N] scaled to less than 1 per row, to break ties between whole numbers."""
    ties: Counts = counts / (counts.max(axis=-1, initial=0.0, keepdims=True) + 1)
    return ties


def training_popularity(data: Sequences, positive: Mask, *, fit_validation: bool = False) -> Counts:
    """[N] positive events of each item in the training part."""
    events = training_events(data, fit_validation=fit_validation) & positive_events(data, positive)
    return np.bincount(data.rows[events], minlength=data.num_items).astype(np.float32)


def _popular(data: Sequences, positive: Mask, training: Counts, span_ms: int | None) -> Scorer:
    """Counts of positive events in the `span_ms` before each request; None counts all time."""
    events = np.flatnonzero(positive_events(data, positive))
    events = events[np.argsort(data.timestamps_ms[events], kind="stable")]
    rows, log_times = data.rows[events], data.timestamps_ms[events]
    undated = np.searchsorted(log_times, MISSING_TIMESTAMP_MS, side="right")
    count_before = partial(_counts_before, rows, data.num_items)

    def scores(requests: Requests) -> Counts:
        times = request_times_ms(data, requests)
        counts = count_before(np.searchsorted(log_times, times))
        if span_ms is not None:
            begins = np.maximum(np.searchsorted(log_times, times - span_ms), undated)
            ties = _ties(counts)
            counts -= np.minimum(count_before(begins), counts)
            counts += ties
        counts[times == MISSING_TIMESTAMP_MS] = training
        return counts

    return scores


def _counts_before(rows: Indices, num_items: int, ends: Indices) -> Counts:
    """[R, N] count of each item in `rows[:end]`, for each of the R `ends`, in one pass over the rows."""
    order = np.argsort(ends, kind="stable")
    steps = np.diff(ends[order], prepend=0)
    cells = np.repeat(np.arange(len(ends)) * num_items, steps) + rows[: steps.sum()]
    counts = np.bincount(cells, minlength=len(ends) * num_items).reshape(len(ends), num_items)
    np.cumsum(counts, axis=0, out=counts)
    result = np.empty(counts.shape, np.float32)
    result[order] = counts
    return result


def _next_item(data: Sequences, positive: Mask, training: Counts, *, fit_validation: bool) -> Scorer:
    """Counts of pairs (item, item of the next positive event), as a sorted list with one run per first item."""
    trained = training_events(data, fit_validation=fit_validation)
    liked, users = np.flatnonzero(trained & positive_events(data, positive)), event_users(data)
    events = np.flatnonzero(trained)
    events = events[: np.searchsorted(events, liked[-1])] if len(liked) else events[:0]
    following = liked[np.searchsorted(liked, events, side="right")]
    same = users[events] == users[following]
    pairs, counts = np.unique(data.rows[events[same]] * data.num_items + data.rows[following[same]], return_counts=True)
    starts = np.searchsorted(pairs, np.arange(data.num_items + 1) * data.num_items)
    ties = _ties(training)

    def score(requests: Requests) -> Counts:
        scores = np.tile(ties, (len(requests), 1))
        known = np.flatnonzero(requests.ends > data.event_start[requests.users])
        for at, item in zip(known, data.rows[requests.ends[known] - 1], strict=True):
            run = slice(starts[item], starts[item + 1])
            scores[at, pairs[run] % data.num_items] += counts[run]
        return scores

    return score
