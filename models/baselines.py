"""Baselines that need no model: popularity as each request could know it, and the item that followed the last one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from unipinrec.models.batches import training_events
from unipinrec.models.config import DAY_MS, MISSING_TIMESTAMP_MS
from unipinrec.models.data.sequences import Sequences
from unipinrec.models.evaluate import (
    Requests,
    event_users,
    history_rows,
    request_times_ms,
)

Scorer = Callable[[Requests], NDArray[np.float32]]


def baselines_of(
    data: Sequences, positive: NDArray[np.bool_], *, fit_validation: bool = False, repeats: bool = False
) -> dict[str, Scorer]:
    """Scorers by name; each gives f32 scores [requests, N], fit for `rank_catalogue`, higher is better.

    - "popular_all_time", "popular_week", "popular_day": positive events before the request's time, of all time, of the
      seven days or of the day before it; the shorter spans break ties by all time. A request without a time, and data
      without times, gets the popularity of the training part; such data has no week and day.
    - "next_item": how often the item was the next positive event after the last item of the history in the training
      part; ties are broken by popularity there.
    - "had_most_often", with `repeats`: how often the user had the item, ties broken by popularity.

    Args:
        data: All events, those of the held-out part included.
        positive: [C] which actions make an event positive.
        fit_validation: Whether the model, and so the baselines, may learn from the validation part.
        repeats: Whether items of the history may be targets.
    """
    training = training_popularity(data, positive, fit_validation=fit_validation)
    following = _next_item(data, positive, training, fit_validation=fit_validation)
    found: dict[str, Scorer] = {"popular_all_time": lambda requests: np.tile(training, (len(requests), 1))}
    if (data.timestamps_ms != MISSING_TIMESTAMP_MS).any():
        found = {
            "popular_all_time": _popular(data, positive, training, None),
            "popular_week": _popular(data, positive, training, 7 * DAY_MS),
            "popular_day": _popular(data, positive, training, DAY_MS),
        }
    found["next_item"] = following
    if repeats:
        found["had_most_often"] = partial(_had_most_often, data, training)
    return found


def _had_most_often(data: Sequences, training: NDArray[np.float32], requests: Requests) -> NDArray[np.float32]:
    found = np.tile(training / (training.max(initial=0.0) + 1), (len(requests), 1))
    for at, (user, end) in enumerate(zip(requests.users, requests.ends, strict=True)):
        np.add.at(found[at], history_rows(data, user, end), 1.0)
    return found


def training_popularity(
    data: Sequences, positive: NDArray[np.bool_], *, fit_validation: bool = False
) -> NDArray[np.float32]:
    """[N] positive events of each item in the training part."""
    wanted = training_events(data, fit_validation=fit_validation) & _is_positive(data, positive)
    return np.bincount(data.rows[wanted], minlength=data.num_items).astype(np.float32)


def _is_positive(data: Sequences, positive: NDArray[np.bool_]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.any(data.actions[:, positive] > 0, axis=1)
    return found


def _popular(
    data: Sequences, positive: NDArray[np.bool_], training: NDArray[np.float32], span_ms: int | None
) -> Scorer:
    """Counts of positive events in the `span_ms` before each request."""
    events = np.flatnonzero(_is_positive(data, positive))
    events = events[np.argsort(data.timestamps_ms[events], kind="stable")]
    rows, log_times = data.rows[events], data.timestamps_ms[events]
    undated = np.searchsorted(log_times, MISSING_TIMESTAMP_MS, side="right")
    count_before = partial(_counts_before, rows, data.num_items)

    def scores(requests: Requests) -> NDArray[np.float32]:
        times = request_times_ms(data, requests)
        found = count_before(np.searchsorted(log_times, times))
        if span_ms is not None:
            begins = np.maximum(np.searchsorted(log_times, times - span_ms), undated)
            # All counts before the request, scaled to less than one, decide where those of the span are level.
            ties = found / (found.max(axis=1, keepdims=True) + 1)
            found -= np.minimum(count_before(begins), found)
            found += ties
        found[times == MISSING_TIMESTAMP_MS] = training
        return found

    return scores


def _counts_before(rows: NDArray[np.int64], num_items: int, ends: NDArray[np.int64]) -> NDArray[np.float32]:
    """[R, N] how often each item stands in `rows[:end]`, for each of the R `ends`: one pass over the rows."""
    order = np.argsort(ends, kind="stable")
    steps = np.diff(ends[order], prepend=0)
    cells = np.repeat(np.arange(len(ends)) * num_items, steps) + rows[: steps.sum()]
    counts = np.bincount(cells, minlength=len(ends) * num_items).reshape(len(ends), num_items)
    np.cumsum(counts, axis=0, out=counts)
    result = np.empty(counts.shape, np.float32)
    result[order] = counts
    return result


def _next_item(
    data: Sequences, positive: NDArray[np.bool_], training: NDArray[np.float32], *, fit_validation: bool
) -> Scorer:
    """Counts of pairs (item, item of the next positive event), as runs of a sorted list, one run per first item."""
    trained = training_events(data, fit_validation=fit_validation)
    events, wanted, users = (
        np.flatnonzero(trained),
        np.flatnonzero(trained & _is_positive(data, positive)),
        event_users(data),
    )
    events = events[: np.searchsorted(events, wanted[-1])] if len(wanted) else events[:0]
    following = wanted[np.searchsorted(wanted, events, side="right")]
    same = users[events] == users[following]
    pairs, counts = np.unique(data.rows[events[same]] * data.num_items + data.rows[following[same]], return_counts=True)
    starts = np.searchsorted(pairs, np.arange(data.num_items + 1) * data.num_items)
    ties = training / (training.max(initial=0.0) + 1)

    def scores(requests: Requests) -> NDArray[np.float32]:
        found = np.tile(ties, (len(requests), 1))
        known = np.flatnonzero(requests.ends > data.event_start[requests.users])
        for at, item in zip(known, data.rows[requests.ends[known] - 1], strict=True):
            run = slice(starts[item], starts[item + 1])
            found[at, pairs[run] % data.num_items] += counts[run]
        return found

    return scores
