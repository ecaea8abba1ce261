"""Check a request against a bundle, turn it into arrays, and choose the window of a long history.

This module knows the items, actions and surfaces that a bundle accepts, and nothing of how a request is answered. It
rejects a request with a `RequestError` that names the value, the accepted values, and the remedy.
"""

from __future__ import annotations

import bisect
import operator
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import ConfigError, RequestError, TooFewItemsError, listed
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.catalogue import NO_ROWS, Catalogue, Eligible, as_ids
from unipinrec.runtime.bundle.manifest import Manifest, ModelSpec
from unipinrec.runtime.requests import (
    AS_SECONDS,
    UNKNOWN_SURFACE,
    YEAR_10000_MS,
    Event,
    History,
    Order,
    Pool,
    RankRequest,
    Request,
    ResolvedRequest,
    Spread,
)

MAX_WEIGHT = 1e9


def resolve_request(
    request: Request | RankRequest, manifest: Manifest, catalogue: Catalogue, slack: int | None = None
) -> ResolvedRequest:
    """Validate a request against a bundle and its items.

    Args:
        request: The request.
        manifest: The bundle's manifest.
        catalogue: The bundle's items.
        slack: See `window_start`; None = that of `default_slack`.

    Raises:
        RequestError: The request is invalid.
    """
    options, limit = request.options, manifest.model.max_history
    start = window_start(len(request.history), limit, slack or default_slack(manifest.model)) if options.truncate else 0
    history = read_history(request.history[start:], manifest, catalogue.rows, first=start)
    order = _order(options.order, manifest)
    pool = _own(request, catalogue) if isinstance(request, RankRequest) else _pool(request, history, start, catalogue)
    return ResolvedRequest(
        **vars(pool),
        user=_user(request.user),
        history=history,
        start=start,
        surface=_look_up(options.surface, _places(manifest.surfaces, UNKNOWN_SURFACE), "surface", "the request"),
        now_ms=_now(options.now_ms, history, manifest),
        order=order,
        weights=_weights(options.weights, order, manifest),
        outcomes=_outcomes(options.outcomes, manifest),
    )


def _pool(request: Request, history: History, start: int, catalogue: Catalogue) -> Pool:
    """The eligible items, of which retrieval finds some, and those that the request names."""
    options = request.options
    denied = set(catalogue.known_rows(as_ids(options.exclude, "exclude")).tolist())
    if options.exclude_seen:
        before = catalogue.known_rows(str(event.item) for event in request.history[:start])
        denied.update(history.item_rows.tolist(), before.tolist())
    # Not np.unique: it releases the interpreter's lock, and a server's event loop would then wait to get it back.
    excluded = np.array(sorted(denied), np.int64)
    allow = None if options.allow is None else as_ids(options.allow, "allow")
    allowed = catalogue.allowed(allow, options.categories, options.ranges)
    left = Eligible(allowed=allowed, excluded=excluded)
    eligible, k = left.count(catalogue.num_rows), _at_least_one("k", request.k)
    if k > eligible:
        unfiltered = (options.allow, options.categories, options.ranges) == (None, None, None)
        filtered = "" if unfiltered else " and those that allow, categories or ranges rule out"
        remedy = f"request at most {eligible}" if eligible else "loosen the filters"
        raise TooFewItemsError(
            f"k={k} items were requested, but only {eligible} of the {catalogue.num_live} items are eligible after "
            f"leaving out {len(excluded)} seen or excluded ones{filtered}; {remedy}"
        )
    own, unknown = _named("own_candidates", options.own_candidates, catalogue, skip_unknown=options.skip_unknown)
    return Pool(
        k=k,
        candidates=min(max(_at_least_one("candidates", options.candidates), k), eligible),
        own=left.keep(own) if len(own) else own,
        unknown=unknown,
        excluded=excluded,
        allowed=allowed,
        exact=options.exact,
        spread=_spread(options.max_per_category, k, left, catalogue) if options.max_per_category else None,
    )


def _spread(limit: Mapping[str, int], k: int, left: Eligible, catalogue: Catalogue) -> Spread:
    if len(limit) > 1:
        raise RequestError(
            f"max_per_category names {listed(limit)}; name one feature, as several may leave no full list"
        )
    ((feature, each),) = limit.items()
    codes = catalogue.codes_of(feature, "max_per_category")
    spread = Spread(codes=codes, each=min(_at_least_one(f"max_per_category: {feature}", each), k), k=k)
    most = spread.most(left.rows(catalogue.num_rows))
    if k > most:
        raise TooFewItemsError(
            f"k={k} items were requested, but max_per_category={limit} leaves only {most} of the eligible ones; "
            f"request at most {most}, or raise the limit"
        )
    return spread


def _own(request: RankRequest, catalogue: Catalogue) -> Pool:
    """The items that a request names, and no others."""
    rows, unknown = _named("items", request.items, catalogue, skip_unknown=request.options.skip_unknown)
    if not len(rows):
        missing = f"; this bundle lacks or has retired {listed(unknown)}" if unknown else ""
        raise RequestError(f"items: there is nothing to rank; name at least one item of this bundle{missing}")
    return Pool(k=len(rows), candidates=0, own=rows, unknown=unknown, excluded=NO_ROWS, allowed=None, exact=False)


def _named(
    name: str, items: Sequence[str | int], catalogue: Catalogue, *, skip_unknown: bool
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Distinct rows of the items that can be recommended, ascending, and the ids of the others."""
    live, rows, unknown = catalogue.live, [], []
    for item in dict.fromkeys(as_ids(items, name)):
        row = catalogue.rows.get(item)
        if row is None or not (live is None or live[row]):
            unknown.append(item)
        else:
            rows.append(row)
    if unknown and not skip_unknown:
        raise RequestError(
            f"{name}: this bundle lacks or has retired {listed(unknown)}; leave them out, or send skip_unknown=true"
        )
    return np.array(sorted(rows), np.int64), tuple(unknown)


def read_history(events: Sequence[Event], manifest: Manifest, rows: Mapping[str, int], *, first: int = 0) -> History:
    """Validate events and turn them into arrays.

    Args:
        events: Oldest first.
        manifest: The bundle's manifest.
        rows: Catalogue row of each external item id.
        first: Place of the first event in the request's history, for errors.

    Raises:
        RequestError: The history is too long, names an item, action or surface that the bundle does not
            know, or its times are invalid or out of order.
    """
    limit = manifest.model.max_history
    if len(events) > limit:
        raise RequestError(
            f"the history has {len(events)} events, this model takes at most {limit}; send the newest, or set truncate"
        )
    actions, surfaces = _places(manifest.actions), _places(manifest.surfaces, UNKNOWN_SURFACE)
    bits = np.zeros((len(events), len(actions)), np.float32)
    try:
        for index, event in enumerate(events):
            for action in event.actions:
                bits[index, actions[action]] = 1.0
        item_rows = np.array([rows[str(event.item)] for event in events], np.int64)
        surface_ids = np.array([surfaces[event.surface] for event in events], np.int64)
    except KeyError:
        for index, event in enumerate(events, first):
            _check_names(event, manifest, rows, f"history[{index}]")
        raise
    times = _times(events, manifest.missing_timestamp_ms, first)
    return History(item_rows=item_rows, actions=bits, surfaces=surface_ids, timestamps_ms=times)


def check_event(event: Event, manifest: Manifest, rows: Mapping[str, int], where: str) -> None:
    """Check one event by itself; errors name its place `where`.

    Raises:
        RequestError: It names an item, action or surface that the bundle does not know, or its time is invalid.
    """
    _check_names(event, manifest, rows, where)
    if event.timestamp_ms is not None:
        _milliseconds(event.timestamp_ms, f"{where}.timestamp_ms")


def usable(events: Sequence[Event], bundle: Bundle) -> tuple[Event, ...]:
    """The events that a bundle can read; an earlier bundle may have had other items, actions and surfaces."""
    rows, manifest = bundle.rows, bundle.manifest
    actions, surfaces = frozenset(manifest.actions), frozenset((UNKNOWN_SURFACE, *manifest.surfaces))
    if (
        all(event.item in rows for event in events)
        and surfaces.issuperset([event.surface for event in events])
        and actions.issuperset(chain.from_iterable([event.actions for event in events]))
    ):
        return tuple(events)
    kept = []
    for event in (event for event in events if event.item in rows):
        if event.surface in surfaces and actions.issuperset(event.actions):
            kept.append(event)
        else:
            surface = event.surface if event.surface in surfaces else UNKNOWN_SURFACE
            known = tuple(action for action in event.actions if action in actions)
            kept.append(msgspec.structs.replace(event, actions=known, surface=surface))
    return tuple(kept)


def _check_names(event: Event, manifest: Manifest, rows: Mapping[str, int], where: str) -> None:
    for action in event.actions:
        _look_up(action, _places(manifest.actions), "action", where)
    item_row(str(event.item), rows, where)
    _look_up(event.surface, _places(manifest.surfaces, UNKNOWN_SURFACE), "surface", where)


def _times(events: Sequence[Event], missing: int, first: int) -> NDArray[np.int64]:
    """Times of events [n] i64, which must not decrease; `missing` stands for an unknown time."""
    times_ms = [event.timestamp_ms for event in events]
    known = [time_ms for time_ms in times_ms if time_ms is not None]
    unknown = len(times_ms) - len(known)
    times = np.full(len(times_ms), missing, np.int64)
    if all(type(time_ms) is int and 0 <= time_ms < YEAR_10000_MS for time_ms in known):
        times[unknown:] = known
        after_1990 = known[bisect.bisect_left(known, AS_SECONDS.start) :]
        in_seconds = after_1990 and after_1990[0] in AS_SECONDS
        if None not in times_ms[unknown:] and (np.diff(times[unknown:]) >= 0).all() and not in_seconds:
            return times
    for index, time_ms in enumerate(times_ms):
        where = f"history[{first + index}]"
        times[index] = missing if time_ms is None else _milliseconds(time_ms, f"{where}.timestamp_ms")
        if index:
            _check_order(int(times[index - 1]), int(times[index]), missing, where)
    return times


def item_row(item: str, rows: Mapping[str, int], where: str) -> int:
    """Catalogue row of an external item id; errors name its place `where`.

    Raises:
        RequestError: The item is not in the catalogue.
    """
    row = rows.get(item)
    if row is None:
        raise RequestError(
            f"{where}: item {item!r} is not among the {len(rows)} items of this bundle; drop it, or export a new bundle"
        )
    return row


@lru_cache(maxsize=32)
def _places(names: tuple[str, ...], *first: str) -> Mapping[str, int]:
    """Place of each name, and 0 for `first`; cached, since every event of every request needs it."""
    return {name: index for index, name in enumerate(names)} | dict.fromkeys(first, 0)


def _look_up(name: str, known: Mapping[str, int], kind: str, where: str) -> int:
    index = known.get(name)
    if index is None:
        raise RequestError(f"{where}: unknown {kind} {name!r}; this bundle knows {', '.join(known)}")
    return index


def _milliseconds(value: Any, name: str) -> int:
    try:
        time_ms = operator.index(value)
    except TypeError as error:
        raise RequestError(f"{name}={value!r} must be an integer, Unix time in ms") from error
    if time_ms in AS_SECONDS:
        raise RequestError(f"{name}={time_ms} is in 1970, or in seconds; send Unix time in ms")
    if not 0 <= time_ms < YEAR_10000_MS:
        raise RequestError(f"{name}={time_ms} must be a Unix time in ms, from 0 to {YEAR_10000_MS - 1}")
    return time_ms


def _check_order(before: int, after: int, missing: int, where: str) -> None:
    if after == missing != before:
        raise RequestError(f"{where} has no timestamp_ms, but the event before it has; put events without a time first")
    if after < before:
        raise RequestError(f"{where} at {after} is earlier than the previous event at {before}; send the oldest first")


def _now(now_ms: int | None, history: History, manifest: Manifest) -> int:
    last = int(history.timestamps_ms[-1]) if len(history) else manifest.missing_timestamp_ms  # known if any time is
    if now_ms is None:
        # The clock here may run behind the client's clock; that must not make the request fail.
        return last if last == manifest.missing_timestamp_ms else max(last, time.time_ns() // 1_000_000)
    now = _milliseconds(now_ms, "now_ms")
    if now < last:
        raise RequestError(f"now_ms={now} is before the last event at {last}; send the time of the request")
    return now


def _user(user: str | int | None) -> str | None:
    if user is None:
        return None
    if isinstance(user, bool) or not isinstance(user, str | int | np.integer) or user == "":
        raise RequestError(f"user={user!r} must be a non-empty string, or None to keep nothing in the cache")
    return str(user)


def _at_least_one(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise RequestError(f"{name}={value!r} must be an integer of at least 1")
    return int(value)


def _order(order: Order | None, manifest: Manifest) -> Order:
    spec = manifest.order
    if order is None:
        return manifest.default_order
    if order not in get_args(Order):
        raise RequestError(f"order={order!r} is unknown; send one of {', '.join(get_args(Order))}")
    if manifest.model.ranker is None and order != "retrieval":
        raise RequestError(f"order={order!r} needs a ranker, which this bundle lacks; leave it out")
    if order in ("blend", "product") and spec is None:
        raise RequestError(f"order={order!r} needs the scale of retrieval, which this bundle lacks; export it again")
    if order == "blend" and spec is not None and not spec.retrieval_weight:
        raise RequestError("order='blend' needs a weight of retrieval, and this bundle has none; send 'value'")
    return order


def _weights(by_action: Mapping[str, float] | None, order: Order, manifest: Manifest) -> NDArray[np.float64]:
    if by_action is not None and order == "retrieval":
        raise RequestError(f"weights={by_action} have no effect with order 'retrieval'; leave them out")
    weights = np.zeros(len(manifest.actions))
    if order == "retrieval":
        return weights
    for action, weight in (dict.fromkeys(manifest.positive_actions, 1.0) if by_action is None else by_action).items():
        weights[_look_up(action, _places(manifest.actions), "action", "weights")] = weight
    if not ((np.abs(weights) <= MAX_WEIGHT).all() and weights.any()):
        raise RequestError(f"weights={by_action} must be finite numbers up to {MAX_WEIGHT:g}, one of them other than 0")
    if order == "product" and (weights < 0).any():
        raise RequestError(
            f"weights={by_action} must not be negative with order 'product'; send order 'value', or weigh other actions"
        )
    return weights


def _outcomes(outcomes: Sequence[str] | None, manifest: Manifest) -> NDArray[np.float32]:
    if outcomes is not None and not manifest.model.outcome_conditioned:
        raise RequestError(
            f"outcomes={list(outcomes)} were sent, but this model's retrieval is not conditioned on outcomes; "
            "leave them out, or train with outcome_conditioned = true"
        )
    bits = np.zeros(len(manifest.actions), np.float32)
    for action in manifest.positive_actions if outcomes is None else outcomes:
        bits[_look_up(action, _places(manifest.actions), "action", "outcomes")] = 1.0
    return bits


def window_start(count: int, limit: int, slack: int) -> int:
    """First event to encode of a history of `count` events, for a model that takes at most `limit`.

    The window moves by `slack` events at a time and holds more than `limit - slack` events. Between two moves new
    events only extend the encoded history, so a growing history is encoded anew once in `slack` events.
    """
    return -(-max(0, count - limit) // slack) * slack


def stated_slack(slack: int | None, manifest: Manifest) -> int | None:
    """The slack as given, else as the bundle states it; None = neither.

    Raises:
        ConfigError: It does not fit the model.
    """
    slack, limit = manifest.window_slack if slack is None else slack, manifest.model.max_history
    if slack is not None and not (isinstance(slack, int) and 0 < slack <= limit):
        raise ConfigError(f"window_slack={slack} must be an integer from 1 to {limit}")
    return slack


def default_slack(model: ModelSpec) -> int:
    """An eighth of the model's limit; 1 without a cache, which a window that moves rarely is for."""
    return max(1, model.max_history // 8) if model.cache == "prefix" else 1
