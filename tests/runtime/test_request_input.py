from __future__ import annotations

from typing import Any

import pytest

from unipinrec.errors import RequestError
from unipinrec.runtime import Event, Recommender, RecommendOptions, Request, parse_events
from unipinrec.runtime.requests import as_events, check_types


def event(item: str | int = "a", **fields: Any) -> Event:
    return Event(item=item, actions=fields.pop("actions", ("click",)), **fields)


def with_options(**options: Any) -> Request:
    return Request(history=(event(),), k=1, options=RecommendOptions(**options))


def test_events_are_parsed_with_defaults() -> None:
    first = b'{"item": "a", "actions": ["click", "save"], "surface": "home", "timestamp_ms": 5}'
    assert parse_events(b"[" + first + b', {"item": 7, "actions": []}]') == (
        Event(item="a", actions=("click", "save"), surface="home", timestamp_ms=5),
        Event(item=7, actions=(), surface="unknown", timestamp_ms=None),
    )


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[{", r"events\.json: .*truncated"),
        (b'{"item": "a", "actions": []}', r"Expected `array`, got `object`"),
        (b'[{"item": "a", "actions": [], "action": "x"}]', r"unknown field `action` - at `\$\[0\]`"),
        (b'[{"item": "a"}]', r"missing required field `actions`"),
        (b'[{"item": null, "actions": []}]', r"Expected `int \| str`, got `null` - at `\$\[0\]\.item`"),
        (b'[{"item": "a", "actions": "click"}]', r"Expected `array`, got `str` - at `\$\[0\]\.actions`"),
        (b'[{"item": "a", "actions": [], "timestamp_ms": 1.5}]', r"timestamp_ms"),
        (b'[{"item": "a", "actions": [], "timestamp_ms": NaN}]', r"malformed"),
    ],
)
def test_malformed_events_say_what_is_accepted(content: bytes, match: str) -> None:
    with pytest.raises(RequestError, match=match) as error:
        parse_events(content, "events.json")
    assert "a history is a list, oldest first, of" in str(error.value)


def test_a_byte_order_mark_is_no_event() -> None:
    assert parse_events(b'\xef\xbb\xbf[{"item": "a", "actions": ["click"]}]') == (event(),)


def test_dictionaries_are_events() -> None:
    assert as_events([{"item": "a", "actions": ["click"]}, event("b")]) == (event("a"), event("b"))


@pytest.mark.parametrize("given", [{"item": "a", "actions": [], "weight": 1}, 3, "a"])
def test_what_is_no_event_is_named_by_position(given: Any) -> None:
    with pytest.raises(RequestError, match=r"history\[1\]: "):
        as_events([event(), given])


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Request(history=(event(actions=None),), k=1), "Expected `array`, got `null` - at `.*actions`"),
        (Request(history=None, k=1), "Expected `array`, got `null` - at `.*history`"),  # type: ignore[arg-type]
        (with_options(weights={"click": "abc"}), "Expected `float`, got `str` - at `.*weights"),
        (with_options(weights=["click"]), "Expected `object"),
    ],
)
def test_what_is_of_the_wrong_type_is_named(recommender: Recommender, request_: Request, match: str) -> None:
    with pytest.raises(RequestError, match=f"the request has a value of the wrong type: {match}"):
        check_types(request_)
    with pytest.raises(RequestError):
        recommender.resolve(request_)
