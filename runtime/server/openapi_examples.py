"""Requests for the OpenAPI document, made from items and actions of the active bundle.

Tests send each of them and expect its status. None is about a sample user, who may be a real person.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from unipinrec.runtime.bundle.bundle import Bundle

TIME_MS = 1_760_000_000_000
MINUTE_MS = 60_000
EXAMPLE_USER = "example-user"
HISTORY_EVENTS, MOST_K = 3, 3


@dataclass(frozen=True, kw_only=True)
class Example:
    """A body, and the status of its answer."""

    summary: str
    value: Any
    status: int = 200


Examples = dict[str, Example]


def examples(bundle: Bundle, *, cold_start: bool) -> dict[str, Examples]:
    """Examples of bodies by `Operation.examples`; with `cold_start`, a user without events is answered."""
    live = bundle.catalogue.live
    ids = islice((item for row, item in enumerate(bundle.item_ids) if live is None or live[row]), HISTORY_EVENTS + 1)
    *items, other = ids
    return {
        "recommend": _recommend(bundle, items, other, 200 if cold_start else 422),
        "rank": _rank(bundle, items, other),
        "events": _events(bundle, items),
        "similar": _similar(bundle, items),
        "inference": _inference(bundle),
        "reload": {"absent": Example(summary="A bundle that does not exist", value={"bundle": "none"}, status=404)},
    }


def _recommend(bundle: Bundle, items: list[str], other: str, unknown_user: int) -> Examples:
    k = max(1, min(MOST_K, bundle.catalogue.num_live - len(items) - 1))
    history = [_event(bundle, item, index) for index, item in enumerate(items)]
    body = {"history": history, "k": k, "now_ms": TIME_MS + 5 * MINUTE_MS}
    weights = dict.fromkeys(bundle.manifest.actions, 1.0)
    unknown = {**body, "history": [*history, {"item": "\u2205", "actions": []}]}
    return {
        "history": Example(summary="After a history", value=body),
        "options": Example(
            summary="With options",
            value={**body, "exclude": [other], "weights": weights, "candidates": 50, "exact": True},
        ),
        "own_candidates": Example(summary="With candidates of one's own", value={**body, "own_candidates": [other]}),
        "list": Example(summary="Several at once; an error stands in the place of its request", value=[body, unknown]),
        "unknown_item": Example(summary="With an item that the bundle lacks", value=unknown, status=400),
        "unknown_user": Example(
            summary="For a user without stored events", value={"user": "new-user", "k": k}, status=unknown_user
        ),
    }


def _rank(bundle: Bundle, items: list[str], other: str) -> Examples:
    history = [_event(bundle, item, index) for index, item in enumerate(items)]
    body = {"history": history, "items": [other, *items], "now_ms": TIME_MS + 5 * MINUTE_MS}
    unknown = {**body, "items": [other, "\u2205"]}
    return {
        "items": Example(summary="Items of one's own", value=body),
        "skipped": Example(summary="An unknown item is left out", value={**unknown, "skip_unknown": True}),
        "unknown_item": Example(summary="With an item that the bundle lacks", value=unknown, status=400),
    }


def _events(bundle: Bundle, items: list[str]) -> Examples:
    event = {**_event(bundle, items[0], 0), "id": "e-1"}
    posted = {"user": EXAMPLE_USER, "events": [event]}
    late = {"user": EXAMPLE_USER, "events": [{**event, "timestamp_ms": 10**14}]}
    return {
        "one": Example(summary="New events of a user", value=posted),
        "list": Example(summary="New events of several users", value=[posted, {**posted, "user": f"{EXAMPLE_USER}-2"}]),
        "future": Example(summary="With a time in the future", value=late, status=400),
    }


def _similar(bundle: Bundle, items: list[str]) -> Examples:
    k = max(1, min(MOST_K, bundle.catalogue.num_live - 1))
    return {
        "one": Example(summary="Items like one item", value={"items": items[:1], "k": k}),
        "none": Example(summary="Without an item", value={"items": []}, status=400),
    }


def _inference(bundle: Bundle) -> Examples:
    """For the retrieval graph, which is the example of the path parameter."""
    inputs = []
    for spec in bundle.manifest.graphs["retrieval"].inputs:
        shape = [size if isinstance(size, int) else 1 for size in spec.shape]
        data = [1.0] * (shape[0] * shape[1])
        inputs.append({"name": spec.name, "shape": shape, "datatype": "FP32", "data": data})
    short = [{**inputs[0], "shape": [1, 1], "data": [1.0]}, *inputs[1:]]
    return {
        "retrieval": Example(summary="A query vector", value={"id": "1", "inputs": inputs}),
        "short": Example(summary="With a tensor of another shape", value={"inputs": short}, status=400),
    }


def _event(bundle: Bundle, item: str, index: int) -> dict[str, Any]:
    return {
        "item": item,
        "actions": [bundle.manifest.actions[index % len(bundle.manifest.actions)]],
        "surface": bundle.manifest.surfaces[-1],
        "timestamp_ms": TIME_MS + index * MINUTE_MS,
    }
