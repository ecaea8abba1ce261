from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unipinrec.errors import ConfigError, RequestError
from unipinrec.runtime.requests import Event
from unipinrec.runtime.server.bodies import (
    ApiError,
    Limits,
    SentEvent,
    decode_events,
    decode_rank,
    decode_recommend,
    decode_similar,
    whole_seconds,
)

LIMITS = Limits(batch=2, history=2, events=3, candidates=250, k=25, items=2, id_characters=5)
NOW = 1_700_000_000_000
EVENT = {"item": "a", "actions": ["click"]}


def recommend(body: Any) -> Any:
    return decode_recommend(json.dumps(body).encode(), LIMITS)


def test_a_request_has_the_defaults_of_the_library() -> None:
    asked = recommend({"user": "u"})
    request = asked.request((Event(item="a", actions=()),))
    assert (request.user, request.k, request.options.candidates, request.options.exclude_seen) == ("u", 20, 200, True)


def test_every_option_is_taken() -> None:
    options = {
        "surface": "home",
        "now_ms": 5,
        "candidates": 7,
        "weights": {"click": 1.0},
        "outcomes": ["click"],
        "exclude_seen": False,
        "exclude": ["b"],
        "allow": ["c"],
        "categories": {"kind": ["a"]},
        "exact": True,
        "truncate": False,
    }
    asked = recommend({"history": [EVENT], "k": 3, **options})
    assert asked.history == (SentEvent(item="a", actions=("click",)),)
    assert (asked.surface, asked.now_ms, asked.candidates, asked.exact) == ("home", 5, 7, True)
    assert (asked.weights, asked.exclude, asked.allow, asked.truncate) == ({"click": 1.0}, ("b",), ("c",), False)


def test_a_list_is_several_requests() -> None:
    assert [one.user for one in recommend([{"user": "u"}, {"user": "v"}])] == ["u", "v"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "neither user nor history is given"),
        ([], "empty list"),
        ([{"user": "u"}, {}], r"\[1\]: neither user"),
        ([{"user": "u"}] * 3, r"the list: 3 requests is more than this server allows \(2\)"),
        ({"user": ""}, "user has 0 characters; send from 1 to 5"),
        ({"user": "longer"}, "user has 6 characters"),
        ({"history": [EVENT] * 3}, r"history: 3 events is more than this server allows \(2\)"),
        ({"user": "u", "k": 26}, r"k: 26 is more than this server allows \(25\)"),
        ({"user": "u", "candidates": 251}, "candidates: 251 is more"),
        ({"user": "u", "own_candidates": ["a"] * 251}, r"own_candidates: 251 items is more .* \(250\)"),
        ({"user": "u", "topk": 1}, "unknown field `topk`"),
        ({"user": "u", "k": "3"}, r"Expected `int`, got `str` - at `\$.k`"),
        ({"user": 3.5}, r"at `\$.user`"),
        ("text", "the body: Expected"),
        (None, "/openapi.json says what it must be"),
    ],
)
def test_what_is_no_request_is_told(body: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        recommend(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"items": ["a"]}, "neither user nor history is given"),
        ({"user": "u"}, "missing required field `items`"),
        ([{"user": "u", "items": []}, {"user": "u", "items": ["a"] * 251}], r"\[1\]: items: 251 items is more"),
        ({"user": "longer", "items": ["a"]}, "user has 6 characters"),
        ({"history": [EVENT] * 3, "items": ["a"]}, "history: 3 events is more"),
        ({"user": "u", "items": ["a"], "exclude": ["b"]}, "unknown field `exclude`"),
        ({"user": "u", "items": "a"}, r"Expected `array`, got `str` - at `\$.items`"),
    ],
)
def test_what_cannot_be_ranked_is_told(body: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        decode_rank(json.dumps(body).encode(), LIMITS)


def test_what_the_server_lists_of_a_user_can_be_sent_as_a_history() -> None:
    listed = [{**EVENT, "surface": "home", "timestamp_ms": 5, "id": "x"}]
    assert recommend({"history": listed}).history[0].item == "a"


@given(st.binary(max_size=200) | st.text(alphabet='[]{}",:0eE-."user\\\\ud8', max_size=60).map(str.encode))
def test_no_bytes_do_more_than_be_refused(body: bytes) -> None:
    for decode in (
        decode_recommend,
        decode_rank,
        decode_similar,
        lambda body, limits: decode_events(body, limits, NOW),
    ):
        with suppress(RequestError):
            decode(body, LIMITS)


@pytest.mark.parametrize("deep", [b"[" * 100_000, b'{"user":' * 100_000, b'{"categories":{"a":[' + b"[" * 100_000])
def test_deep_nesting_is_refused(deep: bytes) -> None:
    with pytest.raises(RequestError, match="the body: "):
        decode_recommend(deep, LIMITS)


def test_events() -> None:
    posted = decode_events(json.dumps({"user": "u", "events": [{**EVENT, "id": "x"}]}).encode(), LIMITS, NOW)
    assert not isinstance(posted, tuple)
    assert [(event.item, event.id, event.timestamp_ms) for event in posted.events] == [("a", "x", None)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"user": "u", "events": []}, "events is empty"),
        ({"user": "u", "events": [EVENT] * 4}, r"the body: 4 events is more than this server allows \(3\)"),
        ([{"user": "u", "events": [EVENT] * 2}] * 2, "the body: 4 events"),
        ({"user": "", "events": [EVENT]}, "user has 0 characters"),
        ({"user": "u", "events": [{**EVENT, "id": "longer"}]}, r"events\[0\].id has 6 characters"),
        (
            [{"user": "u", "events": [{**EVENT, "timestamp_ms": NOW + 86_400_001}]}],
            r"\[0\]: events\[0\].*in the future",
        ),
        ({"user": "u", "events": [EVENT, {**EVENT, "timestamp_ms": NOW // 1000}]}, r"events\[1\].*in seconds; send"),
        ({"user": "u", "events": [{"item": "a"}]}, "missing required field `actions`"),
    ],
)
def test_what_are_no_events_is_told(body: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        decode_events(json.dumps(body).encode(), LIMITS, NOW)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"items": []}, "items is empty"),
        ({"items": ["a", "b", "c"]}, r"items: 3 is more than this server allows \(2\)"),
        ({"items": ["a"], "k": 26}, "k: 26"),
        ([{"items": ["a"]}], "Expected `object`, got `array`"),
    ],
)
def test_what_is_no_question_for_similar_items_is_told(body: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        decode_similar(json.dumps(body).encode(), LIMITS)


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="k=0 must be at least 1"):
        Limits(k=0)


def test_a_message_does_not_send_back_all_that_was_sent() -> None:
    assert len(ApiError(400, "invalid_request", "x" * 10_000).detail.message) == 500


def test_retry_after_is_at_least_a_second() -> None:
    assert [whole_seconds(seconds) for seconds in (0.0, 0.2, 1.0, 1.2)] == ["1", "1", "1", "2"]
