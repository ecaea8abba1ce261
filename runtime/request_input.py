"""What callers hand in, from JSON bytes, dictionaries or objects, as the types of `requests`.

Knows no bundle: which items, actions and times are accepted is said in `requests`.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from unipinrec.errors import RequestError
from unipinrec.runtime.malformed import MALFORMED
from unipinrec.runtime.requests import Event, Request

EVENT_FORMAT = (
    'a history is a list, oldest first, of {"item": "id", "actions": ["name"], "surface": "name", "timestamp_ms": 0}; '
    "surface and timestamp_ms may be left out"
)

EventLike = Event | Mapping[str, Any]


def parse_events(content: bytes, source: str = "history") -> tuple[Event, ...]:
    """Read a JSON list of events; `source` names it in errors.

    Raises:
        RequestError: It is not JSON, or not a list of events; an unknown key is an error.
    """
    try:
        return msgspec.json.decode(content.removeprefix(codecs.BOM_UTF8), type=tuple[Event, ...])
    except MALFORMED as error:
        raise RequestError(f"{source}: {error}; {EVENT_FORMAT}") from error


def as_events(history: Iterable[EventLike]) -> tuple[Event, ...]:
    """Turn dictionaries with the keys of `Event` into events; events pass.

    Raises:
        RequestError: An element is neither, lacks a key, has an unknown one or a value of the wrong type.
    """
    events = []
    for position, given in enumerate(history):
        try:
            events.append(given if isinstance(given, Event) else msgspec.convert(given, type=Event))
        except msgspec.ValidationError as error:
            raise RequestError(f"history[{position}]: {error}; {EVENT_FORMAT}") from error
    return tuple(events)


def check_types(request: Request) -> None:
    """Find what in a request is of a type that its fields do not take.

    Raises:
        RequestError: Something is; names it.
    """
    try:
        msgspec.convert(msgspec.to_builtins(request), Request)
    except (TypeError, ValueError) as error:
        raise RequestError(f"the request has a value of the wrong type: {error}") from error
