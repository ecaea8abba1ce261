"""A request against a bundle: its validation into arrays, and which part of a long history is encoded.

Knows which items, actions and surfaces a bundle accepts; refuses to know how a request is answered. Every refusal is a
`RequestError` that names what was given, what is accepted, and what to do.
"""

from __future__ import annotations

import bisect
import operator
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import RequestError, TooFewItemsError
from unipinrec.runtime.bundle.catalogue import Catalogue, as_ids
from unipinrec.runtime.bundle.manifest import Manifest
from unipinrec.runtime.requests import (
    AS_SECONDS,
    UNKNOWN_SURFACE,
    YEAR_10000_MS,
    Event,
    History,
    Order,
    Request,
    ResolvedRequest,
)

MAX_WEIGHT = 1e9


def resolve_request(
    request: Request, manifest: Manifest, catalogue: Catalogue, slack: int | None = None
) -> ResolvedRequest:
    """Validate a request against a bundle and its items.

    Args:
        request: What is asked.
        manifest: Of the bundle.
        catalogue: The bundle's items.
        slack: See `window_start`; None = an eighth of the model's limit.

    Raises:
        RequestError: The request cannot be answered as given.
    """
    options, limit = request.options, manifest.model.max_history
    start = window_start(len(request.history), limit, slack or default_slack(limit)) if options.truncate else 0
    history = read_history(request.history[start:], manifest, catalogue.rows, first=start)
    denied = set(catalogue.known_rows(as_ids(options.exclude, "exclude")).tolist())
    if options.exclude_seen:
        before = catalogue.known_rows(str(event.item) for event in request.history[:start])
        denied.update(history.item_rows.tolist(), before.tolist())
    # Not np.unique: it lets another thread have the interpreter, and a server's event loop then waits to get it back.
    excluded = np.array(sorted(denied), np.int64)
    allow = None if options.allow is None else as_ids(options.allow, "allow")
    allowed = catalogue.allowed(allow, options.categories)
    eligible = catalogue.eligible(allowed, excluded)
    k, order = _at_least_one("k", request.k), _order(options.order, manifest)
    if k > eligible:
        unfiltered = options.allow is None and options.categories is None
        filtered = "" if unfiltered else " and those that allow or categories rule out"
        remedy = f"ask for at most {eligible}" if eligible else "loosen the filters"
        raise TooFewItemsError(
            f"k={k} items were asked for, but only {eligible} of the {catalogue.num_live} items are eligible after "
            f"leaving out {len(excluded)} seen or excluded ones{filtered}; {remedy}"
        )
    return ResolvedRequest(
        user=_user(request.user),
        history=history,
        start=start,
        surface=_look_up(options.surface, _surfaces(manifest), "surface", "the request"),
        now_ms=_now(options.now_ms, history, manifest),
        k=k,
        candidates=min(max(_at_least_one("candidates", options.candidates), k), eligible),
        order=order,
        weights=_weights(options.weights, order, manifest),
        outcomes=_outcomes(options.outcomes, manifest),
        excluded=excluded,
        allowed=allowed,
        exact=options.exact,
    )


def read_history(events: Sequence[Event], manifest: Manifest, rows: Mapping[str, int], *, first: int = 0) -> History:
    """Validate events and turn them into arrays.

    Args:
        events: Oldest first.
        manifest: Of the bundle.
        rows: Catalogue row of each external item id.
        first: Place of the first event in what the caller sent, for errors.

    Raises:
        RequestError: The history is too long, names an item, action or surface that the bundle does not
            know, or its times are invalid or out of order.
    """
    limit = manifest.model.max_history
    if len(events) > limit:
        raise RequestError(
            f"the history has {len(events)} events, this model takes at most {limit}; "
            "send the newest ones, or set truncate to keep them"
        )
    actions, surfaces, missing = _actions(manifest), _surfaces(manifest), manifest.missing_timestamp_ms
    bits = np.zeros((len(events), len(actions)), np.float32)
    try:
        for place, event in enumerate(events):
            for action in event.actions:
                bits[place, actions[action]] = 1.0
        item_rows = np.array([rows[str(event.item)] for event in events], np.int64)
        surface_ids = np.array([surfaces[event.surface] for event in events], np.int64)
    except KeyError:
        for place, event in enumerate(events, first):
            _check_names(event, actions, surfaces, rows, f"history[{place}]")
        raise
    return History(
        item_rows=item_rows, actions=bits, surfaces=surface_ids, timestamps_ms=_times(events, missing, first)
    )


def check_event(event: Event, manifest: Manifest, rows: Mapping[str, int], where: str) -> None:
    """Check one event for itself; `where` names its place in what the caller sent.

    Raises:
        RequestError: It names an item, action or surface that the bundle does not know, or its time is invalid.
    """
    _check_names(event, _actions(manifest), _surfaces(manifest), rows, where)
    if event.timestamp_ms is not None:
        _milliseconds(event.timestamp_ms, f"{where}.timestamp_ms")


def _check_names(
    event: Event, actions: Mapping[str, int], surfaces: Mapping[str, int], rows: Mapping[str, int], where: str
) -> None:
    for action in event.actions:
        _look_up(action, actions, "action", where)
    item_row(str(event.item), rows, where)
    _look_up(event.surface, surfaces, "surface", where)


def _times(events: Sequence[Event], missing: int, first: int) -> NDArray[np.int64]:
    """Times of events [n] i64, in order, each at least the one before; `missing` stands for an unknown one."""
    given = [event.timestamp_ms for event in events]
    known = [time_ms for time_ms in given if time_ms is not None]
    times = np.full(len(given), missing, np.int64)
    if all(type(time_ms) is int and 0 <= time_ms < YEAR_10000_MS for time_ms in known):
        times[len(given) - len(known) :] = known
        in_order = len(known) < 2 or (np.diff(known) >= 0).all()
        if None not in given[len(given) - len(known) :] and in_order and not _any_in_seconds(known):
            return times
    for place, time_ms in enumerate(given):
        where = f"history[{first + place}]"
        times[place] = missing if time_ms is None else _milliseconds(time_ms, f"{where}.timestamp_ms")
        if place:
            _check_order(int(times[place - 1]), int(times[place]), missing, where)
    return times


def _any_in_seconds(ordered: Sequence[int]) -> bool:
    first = bisect.bisect_left(ordered, AS_SECONDS.start)
    return first < len(ordered) and ordered[first] in AS_SECONDS


def item_row(item: str, rows: Mapping[str, int], where: str) -> int:
    """Catalogue row of an external item id; `where` names its place in the request.

    Raises:
        RequestError: It is not in the catalogue.
    """
    row = rows.get(item)
    if row is None:
        raise RequestError(
            f"{where}: item {item!r} is not among the {len(rows)} items of this bundle; "
            "drop it, or export the bundle again with a catalogue that holds it"
        )
    return row


def _actions(manifest: Manifest) -> Mapping[str, int]:
    return _places(manifest.actions)


def _surfaces(manifest: Manifest) -> Mapping[str, int]:
    return _places(manifest.surfaces, UNKNOWN_SURFACE)


@lru_cache(maxsize=32)
def _places(names: tuple[str, ...], *first: str) -> Mapping[str, int]:
    """Place of each name, 0 of `first`; kept, since every event of every request is looked up there."""
    return {name: place for place, name in enumerate(names)} | dict.fromkeys(first, 0)


def _look_up(given: str, known: Mapping[str, int], kind: str, where: str) -> int:
    place = known.get(given)
    if place is None:
        raise RequestError(f"{where}: unknown {kind} {given!r}; this bundle knows {', '.join(known)}")
    return place


def _milliseconds(given: Any, name: str) -> int:
    try:
        value = operator.index(given)
    except TypeError as error:
        raise RequestError(f"{name}={given!r} must be an integer, Unix time in ms") from error
    if value in AS_SECONDS:
        raise RequestError(f"{name}={value} is in 1970, or in seconds; send Unix time in ms")
    if not 0 <= value < YEAR_10000_MS:
        raise RequestError(f"{name}={value} must be a Unix time in ms, from 0 to {YEAR_10000_MS - 1}")
    return value


def _check_order(before: int, after: int, missing: int, where: str) -> None:
    if after == missing != before:
        raise RequestError(
            f"{where} has no timestamp_ms, but the event before it has one; "
            "events without a time may only come before all others"
        )
    if after < before:
        raise RequestError(
            f"{where} at {after} is earlier than the event before it at {before}; send events oldest first"
        )


def _now(now_ms: int | None, history: History, manifest: Manifest) -> int:
    last = int(history.timestamps_ms[-1]) if len(history) else manifest.missing_timestamp_ms  # known if any is
    if now_ms is None:
        # A clock that runs behind the one that stamped the last event must not make the request fail.
        return last if last == manifest.missing_timestamp_ms else max(last, time.time_ns() // 1_000_000)
    now = _milliseconds(now_ms, "now_ms")
    if now < last:
        raise RequestError(f"now_ms={now} is before the last event at {last}; send the time of the request")
    return now


def _user(given: str | None) -> str | None:
    if given is not None and not (isinstance(given, str) and given):
        raise RequestError(f"user={given!r} must be a text that is not empty, or None for an answer that is not kept")
    return given


def _at_least_one(name: str, given: int) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise RequestError(f"{name}={given!r} must be an integer of at least 1")
    return given


def _order(given: Order | None, manifest: Manifest) -> Order:
    spec = manifest.order
    if given is None:
        return "value" if spec is None else spec.by
    if given not in get_args(Order):
        raise RequestError(f"order={given!r} is unknown; send one of {', '.join(get_args(Order))}")
    if given in ("blend", "product") and spec is None:
        raise RequestError(
            f"order={given!r} needs the scale of retrieval's logits, which this bundle lacks; export it again"
        )
    if given == "blend" and spec is not None and not spec.retrieval_weight:
        raise RequestError("order='blend' needs a weight of retrieval, and this bundle has none; send 'value'")
    return given


def _weights(given: Mapping[str, float] | None, order: Order, manifest: Manifest) -> NDArray[np.float64]:
    if given is not None and order == "retrieval":
        raise RequestError(f"weights={given} change nothing where order is 'retrieval'; leave them out")
    weights = np.zeros(len(manifest.actions))
    for action, weight in (dict.fromkeys(manifest.positive_actions, 1.0) if given is None else given).items():
        weights[_look_up(action, _actions(manifest), "action", "weights")] = weight
    if not ((np.abs(weights) <= MAX_WEIGHT).all() and weights.any()):
        raise RequestError(f"weights={given} must be finite numbers up to {MAX_WEIGHT:g}, one of them other than 0")
    if order == "product" and (weights < 0).any():
        raise RequestError(
            f"weights={given} must not be negative where order is 'product', which takes the value's logarithm; "
            "send order 'value', or weigh other actions"
        )
    return weights


def _outcomes(given: Sequence[str] | None, manifest: Manifest) -> NDArray[np.float32]:
    if given is not None and not manifest.model.outcome_conditioned:
        raise RequestError(
            f"outcomes={list(given)} were asked for, but this model's retrieval is not conditioned on outcomes; "
            "leave them out, or train with outcome_conditioned = true"
        )
    bits = np.zeros(len(manifest.actions), np.float32)
    for action in manifest.positive_actions if given is None else given:
        bits[_look_up(action, _actions(manifest), "action", "outcomes")] = 1.0
    return bits


def window_start(count: int, limit: int, slack: int) -> int:
    """Place of the first event that is encoded of a history of `count` events where the model takes `limit`.

    The window moves on by `slack` events at a time, so that between two moves new events only extend what is encoded:
    a history that grows is encoded anew once in `slack` events. It holds more than `limit - slack` events.
    """
    return -(-max(0, count - limit) // slack) * slack


def default_slack(limit: int) -> int:
    """An eighth of the model's limit."""
    return max(1, limit // 8)
