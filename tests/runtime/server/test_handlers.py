from __future__ import annotations

import gc
import gzip
import json
import shutil
import sqlite3
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from answers import STORED
from live_server import SMALL, deployed, served
from starlette.testclient import TestClient

from unipinrec.runtime.bundle.quality import KvDtype
from unipinrec.runtime.ranking import sigmoid
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.requests import Event, RankOptions, RecommendOptions
from unipinrec.runtime.server.app import make_app, make_server
from unipinrec.runtime.server.bodies import Limits
from unipinrec.runtime.server.call import Call, Server
from unipinrec.runtime.server.events.sqlite import SqliteEventStore
from unipinrec.runtime.server.events.store import Append, MemoryEventStore, StoredEvent, StoreLimits
from unipinrec.runtime.server.swap import Deployments
from unipinrec.runtime.server.v2.routes import oip_routes
from unipinrec.runtime.validation import usable

AT = 1_700_000_000_000
HISTORY = [{"item": f"item-{index}", "actions": ["click"], "timestamp_ms": AT + index} for index in range(3)]
EVENTS = tuple(msgspec.convert(HISTORY, type=tuple[Event, ...]))


@pytest.fixture(scope="module")
def deployments() -> Iterator[Deployments]:
    with deployed(STORED) as opened:
        yield opened


@pytest.fixture
def server(deployments: Deployments) -> Server:
    recommender = deployments.current.recommender
    assert recommender.cache is not None
    recommender.cache.clear()
    return make_server(deployments=deployments)


@pytest.fixture
def client(server: Server) -> Iterator[TestClient]:
    with TestClient(make_app(server)) as opened:
        yield opened


@pytest.fixture
def recommender(deployments: Deployments) -> Recommender:
    return deployments.current.recommender


def post(client: TestClient, path: str, body: Any, status: int = 200) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def send(client: TestClient, user: str, *events: dict[str, Any]) -> Any:
    return post(client, "/v1/events", {"user": user, "events": list(events)})


# POST /v1/recommend.


def test_an_answer_is_that_of_the_library(client: TestClient, recommender: Recommender) -> None:
    options = {"now_ms": AT + 9, "candidates": 9, "weights": {"save": 2.0}, "exclude": ["item-7"], "surface": "home"}
    answer = post(client, "/v1/recommend", {"history": HISTORY, "k": 4, **options})
    slate = recommender.recommend(EVENTS, 4, msgspec.convert(options, type=RecommendOptions))
    expected = slate.to_json()
    assert answer["items"] == list(expected["items"])
    assert answer["items"][0]["title"] == slate.items[0].title
    assert list(answer) == [
        "items",
        "source",
        "order",
        "stages_ms",
        "kv",
        "kv_reason",
        "device",
        "bundle",
        "exact",
        "unknown",
        "events",
        "skipped_events",
    ]
    assert list(answer) == [*expected, "events", "skipped_events"]
    for name in ("source", "order", "kv", "kv_reason", "device", "bundle", "exact"):
        assert answer[name] == expected[name]
    assert (answer["events"], answer["skipped_events"]) == (3, 0)


def test_filters(client: TestClient) -> None:
    body = {"history": HISTORY, "k": 2, "allow": ["item-5", "item-6", "item-0"]}
    assert {item["item"] for item in post(client, "/v1/recommend", body)["items"]} == {"item-5", "item-6"}
    words = post(client, "/v1/recommend", {"history": HISTORY, "k": 1, "categories": {"kind": ["c"]}}, 400)
    assert words["error"]["message"] == "categories: kind has no word 'c'; it has ['a', 'b']"


def test_a_history_of_a_user_is_cached(client: TestClient) -> None:
    body = {"user": "u", "history": HISTORY[:2], "k": 1}
    more = {**body, "history": HISTORY}
    kinds = [post(client, "/v1/recommend", one)["kv"] for one in (body, body, more, more)]
    assert kinds == ["miss", "hit", "extended", "hit"]


def test_a_list_is_answered_one_by_one(client: TestClient) -> None:
    one = {"history": HISTORY, "k": 2, "now_ms": AT + 5}
    bad = {**one, "weights": {"buy": 1.0}}
    alone = post(client, "/v1/recommend", one)
    first, second, third, last = post(client, "/v1/recommend", [one, bad, {"user": "nobody"}, one])
    for answer in (first, last):
        assert [item["item"] for item in answer["items"]] == [item["item"] for item in alone["items"]]
        assert answer["items"][0]["score"] == pytest.approx(alone["items"][0]["score"], abs=1e-6)
    assert second["error"] == {
        "code": "invalid_request",
        "message": "weights: unknown action 'buy'; this bundle knows click, save",
    }
    assert third["error"]["code"] == "cold_start"


def test_requests_of_a_list_are_computed_together(client: TestClient, deployments: Deployments) -> None:
    before = deployments.current.batcher.statistics()
    post(client, "/v1/recommend", [{"history": HISTORY, "k": 1}] * 8)
    after = deployments.current.batcher.statistics()
    assert after.requests - before.requests == 8
    assert after.batches - before.batches <= 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"history": [{"item": "new", "actions": []}]}, "item 'new' is not among the 24 items"),
        ({"history": HISTORY[::-1]}, "send the oldest first"),
        ({"history": HISTORY * 5, "truncate": False}, "this model takes at most 8"),
        ({"history": HISTORY, "k": 0}, "k=0 must be an integer of at least 1"),
        ({"history": HISTORY, "now_ms": 5}, "before the last event"),
        ("what", "/openapi.json says what it must be"),
    ],
)
def test_what_cannot_be_answered_is_told(client: TestClient, body: Any, message: str) -> None:
    error = post(client, "/v1/recommend", body, 400)["error"]
    assert error["code"] == "invalid_request"
    assert message in error["message"]


def test_that_too_few_items_are_left_has_a_code_of_its_own(client: TestClient) -> None:
    error = post(client, "/v1/recommend", {"history": HISTORY, "k": 100}, 400)["error"]
    assert error["code"] == "too_few_items"
    assert "only 21 of the 24 items are eligible" in error["message"]


def test_a_compressed_body_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/recommend", content=gzip.compress(b"{}"), headers={"content-encoding": "gzip"})
    assert answer.status_code == 400
    assert "'gzip' is not supported" in answer.json()["error"]["message"]


def test_a_user_without_events_is_a_cold_start_where_nothing_is_known_to_be_popular(client: TestClient) -> None:
    why = (
        "the history is empty, and this bundle stores no popularity; send events or a history first, or "
        "export it again with --data"
    )
    assert post(client, "/v1/recommend", {"user": "nobody"}, 422)["error"] == {
        "code": "cold_start",
        "message": f"user 'nobody': no events are known; {why}",
    }
    bodies: list[dict[str, Any]] = [{"history": []}, {"user": "nobody", "history": []}]
    for asked in bodies:
        assert post(client, "/v1/recommend", asked, 422)["error"] == {"code": "cold_start", "message": why}


def test_a_cold_start_that_the_operator_refuses(popular: Path) -> None:
    with (
        deployed(popular, cold_start="refuse") as refusing,
        TestClient(make_app(make_server(deployments=refusing))) as client,
    ):
        asked = [{"user": "nobody"}, {"history": []}, {"history": HISTORY, "k": 1, "now_ms": AT + 5}]
        unknown, empty, answered = post(client, "/v1/recommend", asked)
        why = "the history is empty, and cold starts are refused here; send events or a history first, or show popular"
        assert unknown["error"] == {
            "code": "cold_start",
            "message": f"user 'nobody': no events are known; {why} items of your own",
        }
        assert empty["error"] == {"code": "cold_start", "message": f"{why} items of your own"}
        assert answered["source"] == "model"
        assert post(client, "/v1/recommend", {"user": "nobody"}, 422) == unknown


def test_a_user_without_events_gets_popular_items(popular: Path) -> None:
    with (
        deployed(popular) as deployments,
        TestClient(make_app(server := make_server(deployments=deployments))) as client,
    ):
        gone = StoredEvent(item="gone", actions=(), timestamp_ms=AT)
        server.store.append([Append(user="v", events=(gone,))], AT).result()
        expected = [("item-23", 0.5), ("item-22", 0.25), ("item-0", 0.011363636702299118)]
        bodies: list[dict[str, Any]] = [
            {"user": "nobody"},
            {"history": []},
            {"user": "v", "history": []},
            {"user": "v"},
        ]
        for asked in bodies:
            skipped = int(asked == {"user": "v"})
            answer = post(client, "/v1/recommend", {**asked, "k": 3, "order": "retrieval", "surface": "home"})
            assert (answer["source"], answer["order"]) == ("popular", None)
            assert [(item["item"], item["score"]) for item in answer["items"]] == expected
            assert [item["retrieval_score"] for item in answer["items"]] == [None] * 3
            assert (answer["kv"], answer["kv_reason"], answer["exact"]) == ("miss", "no history", None)
            assert (answer["events"], answer["skipped_events"]) == (0, skipped)
        filtered = {"user": "nobody", "k": 2, "exclude": ["item-23"], "categories": {"kind": ["a"]}}
        several = post(client, "/v1/recommend", [filtered, {"history": HISTORY, "k": 1, "now_ms": AT + 5}, filtered])
        assert [one["source"] for one in several] == ["popular", "model", "popular"]
        assert [item["item"] for item in several[0]["items"]] == ["item-6", "item-0"]
        assert several[0]["items"] == several[2]["items"] == post(client, "/v1/recommend", filtered)["items"]
        error = post(client, "/v1/recommend", {"user": "nobody", "k": 25}, 400)["error"]
        assert (error["code"], "only 24 of the 24" in error["message"]) == ("too_few_items", True)


# POST /v1/events, and what follows from it.


def test_what_a_user_did_changes_the_next_answer(client: TestClient, recommender: Recommender) -> None:
    assert send(client, "u", *HISTORY[:2]) == {
        "user": "u",
        "appended": 2,
        "duplicates": 0,
        "out_of_order": 0,
        "dropped": 0,
        "events": 2,
        "ahead": 0,
    }
    body = {"user": "u", "k": 3, "now_ms": AT + 5}
    assert post(client, "/v1/recommend", body)["kv"] == "miss"
    send(client, "u", HISTORY[2])
    answer = post(client, "/v1/recommend", body)
    assert (answer["kv"], answer["kv_reason"], answer["events"]) == ("extended", "1 new event", 3)
    alone = recommender.recommend(EVENTS, 3, RecommendOptions(now_ms=AT + 5))
    assert [item["item"] for item in answer["items"]] == [item.item for item in alone.items]


def test_an_event_that_is_late_goes_where_it_belongs(client: TestClient) -> None:
    send(client, "u", HISTORY[0], HISTORY[2])
    post(client, "/v1/recommend", {"user": "u", "k": 1})
    assert send(client, "u", HISTORY[1])["out_of_order"] == 1
    answer = post(client, "/v1/recommend", {"user": "u", "k": 1})
    assert (answer["kv"], answer["kv_reason"]) == ("miss", "edited")
    assert [event["item"] for event in client.get("/v1/users/u").json()["events"]] == ["item-0", "item-1", "item-2"]


def test_a_client_whose_clock_is_ahead_blocks_nothing(client: TestClient) -> None:
    now_ms, hours = time.time_ns() // 1_000_000, 3_600_000
    ahead = {"item": "item-1", "actions": ["click"], "timestamp_ms": now_ms + 23 * hours}
    assert send(client, "fast", {**ahead, "timestamp_ms": now_ms - 1}, ahead)["ahead"] == 1
    receipt = send(client, "fast", {"item": "item-2", "actions": ["click"]})
    assert (receipt["ahead"], receipt["out_of_order"]) == (0, 0)
    times = [event["timestamp_ms"] for event in client.get("/v1/users/fast").json()["events"]]
    assert times[0] == now_ms - 1
    assert now_ms <= times[1] <= times[2] < now_ms + hours
    answer = post(client, "/v1/recommend", {"user": "fast", "k": 2, "now_ms": now_ms - 5_000})
    assert answer["items"] == post(client, "/v1/recommend", {"user": "fast", "k": 2, "now_ms": times[2]})["items"]
    refused = post(client, "/v1/recommend", {"user": "fast", "k": 2, "now_ms": now_ms - 25 * hours}, 400)
    assert "is before the last event" in refused["error"]["message"]


def test_an_event_may_be_sent_twice(client: TestClient) -> None:
    event = {**HISTORY[0], "id": "e"}
    assert [send(client, "u", event)["appended"] for _ in range(2)] == [1, 0]
    assert send(client, "v", event)["appended"] == 1  # ids are those of one user


def test_an_item_given_as_a_number_is_its_string(client: TestClient) -> None:
    error = post(client, "/v1/events", {"user": "u", "events": [{"item": 7, "actions": []}]}, 400)
    assert error["error"]["message"].startswith("events[0]: item '7' is not among the 24 items")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"item": "new", "actions": []}, "events[1]: item 'new' is not among"),
        ({"item": "item-1", "actions": ["buy"]}, "events[1]: unknown action 'buy'"),
        ({"item": "item-1", "actions": [], "surface": "tv"}, "events[1]: unknown surface 'tv'"),
        ({"item": "item-1", "actions": [], "timestamp_ms": -1}, "events[1].timestamp_ms=-1 must be a Unix time"),
    ],
)
def test_an_event_that_makes_no_sense_keeps_back_all(client: TestClient, wrong: Any, message: str) -> None:
    error = post(client, "/v1/events", {"user": "u", "events": [HISTORY[0], wrong]}, 400)["error"]
    assert message in error["message"]
    assert client.get("/v1/users/u").status_code == 404


def test_of_a_list_each_user_is_for_itself(client: TestClient) -> None:
    wrong = {"user": "v", "events": [{"item": "new", "actions": []}]}
    right = {"user": "u", "events": HISTORY[:1]}
    first, second, third = post(client, "/v1/events", [right, wrong, {**right, "events": HISTORY[1:]}])
    assert (first["events"], second["error"]["code"], third["events"]) == (1, "invalid_request", 3)
    assert post(client, "/v1/events", [wrong])[0]["error"]["code"] == "invalid_request"


def test_events_that_a_later_bundle_does_not_know_are_skipped(server: Server, client: TestClient) -> None:
    known = StoredEvent(item="item-1", actions=("click", "gone"), surface="gone", timestamp_ms=AT)
    gone = StoredEvent(item="gone", actions=(), timestamp_ms=AT)

    server.store.append([Append(user="u", events=(known, gone)), Append(user="v", events=(gone,))], AT).result()
    answer = post(client, "/v1/recommend", {"user": "u", "k": 24, "exclude_seen": False})
    assert (answer["events"], answer["skipped_events"]) == (1, 1)
    error = post(client, "/v1/recommend", {"user": "v"}, 422)["error"]
    assert (error["code"], "has none of the 1 items" in error["message"]) == ("cold_start", True)


def test_items_of_dropped_events_are_not_recommended_again(deployments: Deployments) -> None:
    """The stored bundle has 24 items; an eighth of eight events is dropped at a time."""
    server = make_server(store=MemoryEventStore(StoreLimits(events=8)))
    server.open(deployments)
    with TestClient(make_app(server)) as client:

        def events(first: int, last: int) -> list[dict[str, Any]]:
            return [{"item": f"item-{at}", "actions": ["click"], "timestamp_ms": AT + at} for at in range(first, last)]

        send(client, "u", *events(0, 16))
        answer = post(client, "/v1/recommend", {"user": "u", "k": 8, "now_ms": AT + 99})
        assert answer["events"] == 7
        assert {item["item"] for item in answer["items"]} == {f"item-{at}" for at in range(16, 24)}
        again = post(client, "/v1/recommend", {"user": "u", "k": 24, "now_ms": AT + 99, "exclude_seen": False})
        assert len(again["items"]) == 24
        ranked = post(client, "/v1/rank", {"user": "u", "items": ["item-0"], "now_ms": AT + 99})
        assert [item["item"] for item in ranked["items"]] == ["item-0"]
        send(client, "u", *events(16, 24))  # the oldest of more than half of the items may come again
        answer = post(client, "/v1/recommend", {"user": "u", "k": 5, "now_ms": AT + 99})
        assert {item["item"] for item in answer["items"]} <= {f"item-{at}" for at in range(6)}
        client.delete("/v1/users/u")
        send(client, "u", *events(20, 21))
        assert len(post(client, "/v1/recommend", {"user": "u", "k": 23, "now_ms": AT + 99})["items"]) == 23


def test_what_is_usable(recommender: Recommender) -> None:
    known = StoredEvent(item="item-1", actions=("gone", "save"), surface="gone", timestamp_ms=1, id="x")
    (event,) = usable([known, StoredEvent(item="gone", actions=())], recommender.bundle)
    assert (event.item, event.actions, event.surface, event.timestamp_ms) == ("item-1", ("save",), "unknown", 1)


def test_a_store_that_fails_is_told_without_its_insides(deployments: Deployments, tmp_path: Path) -> None:
    store = SqliteEventStore(tmp_path, StoreLimits(events=10))
    with sqlite3.connect(tmp_path / "events.sqlite3") as other:
        other.execute("DROP TABLE users")
    other.close()
    with TestClient(make_app(make_server(deployments=deployments, store=store))) as client:
        for error in (
            post(client, "/v1/recommend", {"user": "u"}, 503),
            post(client, "/v1/events", {"user": "u", "events": HISTORY}, 503),
        ):
            assert error["error"] == {
                "code": "store_unavailable",
                "message": "the events of users cannot be reached; send the request again, or with a history",
            }
        assert post(client, "/v1/recommend", {"user": "u", "history": HISTORY, "k": 1})["events"] == 3
    store.close()


# /v1/users.


def test_what_is_known_of_a_user(client: TestClient) -> None:
    send(client, "a/b c", {**HISTORY[0], "id": "e"})
    assert client.get("/v1/users/a%2Fb%20c").json() == {
        "user": "a/b c",
        "events": [{"item": "item-0", "actions": ["click"], "surface": "unknown", "timestamp_ms": AT, "id": "e"}],
    }
    missing = client.get("/v1/users/nobody")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_user")


@pytest.mark.parametrize("letter", ["x", "é"])
def test_the_longest_user_id_can_be_sent_read_and_forgotten(client: TestClient, letter: str) -> None:
    longest = letter * Limits().id_characters
    assert send(client, longest, HISTORY[0])["events"] == 1
    assert post(client, "/v1/recommend", {"user": longest, "k": 1})["events"] == 1
    assert client.get(f"/v1/users/{longest}").json()["user"] == longest
    assert client.delete(f"/v1/users/{longest}").json() == {"user": longest, "events": 1, "cached": True}
    longer = longest + letter
    for answer in (
        client.post("/v1/events", json={"user": longer, "events": HISTORY}),
        client.post("/v1/recommend", json={"user": longer}),
        client.get(f"/v1/users/{longer}"),
        client.delete(f"/v1/users/{longer}"),
    ):
        assert (answer.status_code, "user has 257 characters; send from 1 to 256" in answer.text) == (400, True)


def test_a_user_is_forgotten(client: TestClient, recommender: Recommender) -> None:
    send(client, "u", *HISTORY)
    post(client, "/v1/recommend", {"user": "u", "k": 1})
    assert recommender.cache is not None
    assert recommender.cache.statistics().entries == 1
    assert client.delete("/v1/users/u").json() == {"user": "u", "events": 3, "cached": True}
    assert recommender.cache.statistics().entries == 0
    assert client.delete("/v1/users/u").json() == {"user": "u", "events": 0, "cached": False}
    assert post(client, "/v1/recommend", {"user": "u"}, 422)["error"]["code"] == "cold_start"


# POST /v1/items/similar.


def test_similar_items(client: TestClient, recommender: Recommender) -> None:
    answer = post(client, "/v1/items/similar", {"items": ["item-3"], "k": 4})
    vectors, ids = recommender.bundle.item_vectors, recommender.bundle.item_ids
    cosines = vectors @ vectors[ids.index("item-3")]
    expected = sorted((ids[row] for row in range(24) if ids[row] != "item-3"), key=lambda one: -cosines[ids.index(one)])
    assert [item["item"] for item in answer["items"]] == expected[:4]
    assert answer["items"][0]["similarity"] == pytest.approx(float(sorted(cosines)[-2]), abs=1e-6)
    assert answer["items"][0]["title"] == recommender.bundle.titles[ids.index(expected[0])]
    assert answer["bundle"] == recommender.bundle.hash


def test_similar_to_any_of_several_under_filters(client: TestClient) -> None:
    body = {
        "items": ["item-3", "item-4"],
        "k": 2,
        "allow": ["item-3", "item-5", "item-6", "item-7"],
        "exclude": ["item-7"],
    }
    answer = post(client, "/v1/items/similar", {**body, "exact": True})
    assert {item["item"] for item in answer["items"]} == {"item-5", "item-6"}
    assert answer["exact"] == "requested"
    assert post(client, "/v1/items/similar", {**body, "k": 3}, 400)["error"]["message"] == (
        "k=3 is more than the 2 items that the filters leave"
    )
    assert "items[0]: item 'new'" in post(client, "/v1/items/similar", {"items": ["new"]}, 400)["error"]["message"]


# Health.


def test_health(client: TestClient, server: Server, deployments: Deployments) -> None:
    assert client.get("/health/live").json() == {"status": "live"}
    ready = client.get("/health/ready")
    assert ready.status_code == 200
    assert ready.json() == {
        "status": "ready",
        "device": "cpu",
        "device_reason": "requested",
        "refused": [],
        "bundle": deployments.current.version,
    }
    server.phase = "draining"
    assert client.get("/health/ready").status_code == 503
    still = client.post("/v1/recommend", json={"history": HISTORY, "k": 1})
    assert (still.status_code, still.headers["connection"]) == (200, "close")


def test_nothing_is_answered_before_the_bundle_is_there() -> None:
    with TestClient(make_app(make_server())) as client:
        assert client.get("/health/live").status_code == 200
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "loading")
        for path, body in (
            ("/v1/recommend", {"history": HISTORY}),
            ("/v1/events", {"user": "u", "events": HISTORY}),
            ("/v1/items/similar", {"items": ["item-1"]}),
        ):
            answer = client.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
            assert answer.headers["retry-after"] == "1"


def test_what_is_closed_is_shutting_down(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(STORED, tmp_path / "copy"))
    with deployed(copy) as opened:
        server = make_server(deployments=opened)
    with TestClient(make_app(server)) as client:
        error = post(client, "/v1/recommend", {"history": HISTORY}, 503)["error"]
    assert error["code"] == "shutting_down"


def test_an_unforeseen_error_is_internal(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(SqliteEventStore):
        def __init__(self) -> None:
            pass

        def histories(self, users: Any) -> Any:
            raise RuntimeError("/secret/path")

    server.store = Broken()
    with TestClient(make_app(server)) as client:
        answer = client.post("/v1/recommend", json={"user": "u"}, headers={"x-request-id": "mine-1"})
    assert answer.status_code == 500
    assert json.loads(answer.content)["error"] == {
        "code": "internal",
        "message": "the server failed to answer; its log has more about request mine-1",
    }
    assert "/secret/path" in caplog.text


@pytest.mark.parametrize("path", ["recommend", "rank"])
@pytest.mark.parametrize("fault", [TypeError, ValueError, AttributeError])
def test_a_fault_of_ours_is_not_the_request_s(
    path: str,
    fault: type[Exception],
    client: TestClient,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> None:
        raise fault("ours")

    monkeypatch.setattr("unipinrec.runtime.recommender.resolve_request", broken)
    body = {"user": "u", "history": HISTORY} | ({"items": ["item-1"]} if path == "rank" else {"k": 3})
    assert post(client, f"/v1/{path}", body, 500)["error"]["code"] == "internal"
    assert f"{fault.__name__}: ours" in caplog.text


def test_a_fault_of_ours_costs_the_others_of_a_list_nothing(
    client: TestClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = Recommender.resolve

    def broken(recommender: Recommender, request: Any) -> Any:
        if request.k == 7:
            raise OverflowError("ours")
        return resolve(recommender, request)

    monkeypatch.setattr(Recommender, "resolve", broken)
    good, bad = post(client, "/v1/recommend", [{"history": HISTORY, "k": 2}, {"history": HISTORY, "k": 7}])
    assert (len(good["items"]), bad["error"]["code"]) == (2, "internal")
    assert "OverflowError: ours" in caplog.text


def test_ids_may_be_integers_everywhere(client: TestClient) -> None:
    events = [{"item": "item-3", "actions": ["click"], "id": "1"}]
    assert post(client, "/v1/events", {"user": 123, "events": events})["user"] == "123"
    assert client.get("/v1/users/123").json()["events"][0]["item"] == "item-3"
    by_string, by_number = (post(client, "/v1/recommend", {"user": user, "k": 3}) for user in ("123", 123))
    assert (by_number["items"], by_number["kv"]) == (by_string["items"], "hit")
    similar = {"items": ["item-3"], "k": 2, "exclude": [5], "allow": ["item-4", "item-5", 6]}
    assert {item["item"] for item in post(client, "/v1/items/similar", similar)["items"]} == {"item-4", "item-5"}


def test_what_was_refused_is_kept_by_nothing(twins: tuple[Path, Path]) -> None:
    """No request, with its body, and no bundle that was replaced since, has to wait for the collector."""
    calls: list[weakref.ref[Call]] = []
    wrong = {"item": "no such item", "actions": []}
    with deployed(twins[0]) as deployments:
        server = make_server(deployments=deployments, observers=[lambda call: calls.append(weakref.ref(call))])
        with TestClient(make_app(server, oip_routes(server, version="1"))) as client:
            gc.collect()
            gc.disable()
            try:
                post(client, "/v1/recommend", {"user": "nobody"}, 422)
                post(client, "/v1/recommend", {"history": [wrong]}, 400)
                post(client, "/v1/recommend", {"k": "many"}, 400)
                post(client, "/v1/recommend", [{"user": "nobody"}, {"history": [wrong]}])
                post(client, "/v1/events", {"user": "ann", "events": [wrong]}, 400)
                post(client, "/v1/items/similar", {"items": ["no such item"]}, 400)
                post(client, "/v2/models/encoder/infer", {"inputs": []}, 400)
                post(client, "/v2/models/nothing/infer", {"inputs": []}, 404)
                assert len(calls) == 8
                old = weakref.ref(deployments.current.recommender.bundle)
                deployments.swap(twins[1])
                limit = time.monotonic() + 20
                while old() is not None or any(call() is not None for call in calls):
                    assert time.monotonic() < limit, [call() for call in calls]
                    time.sleep(0.01)
            finally:
                gc.enable()


def test_a_request_chooses_its_order(client: TestClient) -> None:
    body = {"history": HISTORY, "k": 6, "now_ms": AT + 9}
    default, retrieval = (post(client, "/v1/recommend", {**body, **more}) for more in ({}, {"order": "retrieval"}))
    assert (default["order"], retrieval["order"]) == ("value", "retrieval")
    assert all(item["value"] == item["score"] for item in default["items"])
    assert all((item["value"], item["actions"]) == (None, {}) for item in retrieval["items"])
    assert [item["score"] for item in retrieval["items"]] == [item["retrieval_score"] for item in retrieval["items"]]
    refused = client.post("/v1/recommend", json={**body, "order": "best"})
    assert refused.status_code == 400
    assert "order" in refused.json()["error"]["message"]


# POST /v1/rank, and own candidates.


def test_items_are_ranked_as_by_the_library(client: TestClient, recommender: Recommender) -> None:
    body = {"history": HISTORY, "items": ["item-9", "item-2", "item-17"], "now_ms": AT + 9, "weights": {"save": 2.0}}
    answer = post(client, "/v1/rank", body)
    options = RankOptions(now_ms=AT + 9, weights={"save": 2.0})
    expected = recommender.rank(EVENTS, ("item-9", "item-2", "item-17"), options).to_json()
    assert answer["items"] == list(expected["items"])
    assert (list(answer), answer["events"]) == ([*expected, "events", "skipped_events"], 3)
    assert {item["source"] for item in answer["items"]} == {"request"}


@pytest.mark.parametrize(("dtype", "rounding"), [("fp32", 0.0), ("int8", 1e-3)])
def test_a_ranked_item_has_the_logits_of_score_and_the_score_of_a_recommendation(
    dtype: KvDtype, rounding: float
) -> None:
    chosen = [f"item-{row}" for row in (0, 2, 9, 17, 22)]
    body = {"history": HISTORY, "now_ms": AT + 9, "order": "value"}
    with served(STORED, replace(SMALL, cache_dtype=dtype)) as app, TestClient(app) as client:
        ranked = {item["item"]: item for item in post(client, "/v1/rank", {**body, "items": chosen})["items"]}
        everything = {**body, "k": 24, "exclude_seen": False}
        whole = {item["item"]: item for item in post(client, "/v1/recommend", everything)["items"]}
    with Recommender.load(STORED, "cpu") as alone:
        expected = sigmoid(alone.score(EVENTS, chosen, RankOptions(now_ms=AT + 9)))
    actions = np.array([list(ranked[name]["actions"].values()) for name in chosen])
    np.testing.assert_allclose(actions, expected, atol=rounding, rtol=0)
    assert np.ptp(actions, axis=0).min() > 1e-3
    for name in ("score", "value", "retrieval_score"):
        scores = [whole[item][name] for item in chosen]
        assert [ranked[item][name] for item in chosen] == pytest.approx(scores, abs=1e-6)


def test_items_are_ranked_after_stored_events_and_with_the_cache(client: TestClient) -> None:
    send(client, "u", *HISTORY)
    asked = {"user": "u", "items": ["item-9", "item-0"], "now_ms": AT + 9}
    kinds = [post(client, "/v1/rank", asked)["kv"] for _ in range(2)]
    assert kinds == ["miss", "hit"]
    assert post(client, "/v1/recommend", {"user": "u", "k": 1})["kv"] == "hit"
    stored, sent = post(client, "/v1/rank", asked), post(client, "/v1/rank", {**asked, "user": "v", "history": HISTORY})
    assert [item["item"] for item in stored["items"]] == [item["item"] for item in sent["items"]]


def test_a_list_is_ranked_one_by_one(client: TestClient, deployments: Deployments) -> None:
    before = deployments.current.batcher.statistics()
    good = {"history": HISTORY, "items": ["item-9", "new"], "skip_unknown": True}
    bad, unknown = {**good, "skip_unknown": False}, {**good, "history": None, "user": "nobody"}
    first, second, third = post(client, "/v1/rank", [good, bad, unknown])
    assert ([item["item"] for item in first["items"]], first["unknown"]) == (["item-9"], ["new"])
    assert second["error"]["code"] == "invalid_request"
    assert "lacks or has retired ['new']; leave them out" in second["error"]["message"]
    assert third["error"]["code"] == "cold_start"
    assert deployments.current.batcher.statistics().requests - before.requests == 1


def test_own_candidates_are_marked(client: TestClient) -> None:
    body = {"history": HISTORY, "k": 4, "candidates": 3, "order": "retrieval", "exclude_seen": False, "now_ms": AT + 9}
    near = [item["item"] for item in post(client, "/v1/recommend", {**body, "k": 24})["items"]]
    answer = post(client, "/v1/recommend", {**body, "own_candidates": [near[1], near[-1]]})
    sources = {item["item"]: item["source"] for item in answer["items"]}
    assert sources == {near[0]: "retrieval", near[1]: "both", near[2]: "retrieval", near[3]: "retrieval"}
    wide = {"history": HISTORY, "k": 5, "candidates": 5, "exclude_seen": False, "now_ms": AT + 9}
    ranked = post(client, "/v1/rank", {"history": HISTORY, "items": near, "order": "value", "now_ms": AT + 9})["items"]
    joined = post(client, "/v1/recommend", {**wide, "own_candidates": [ranked[0]["item"]]})["items"]
    assert joined[0]["item"] == ranked[0]["item"]
    assert joined[0]["source"] in ("request", "both")
