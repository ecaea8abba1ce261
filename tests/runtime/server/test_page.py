from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from answers import STORED
from live_server import SMALL, served
from starlette.testclient import TestClient

from unipinrec.runtime.server.page import PAGE, page_headers


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with served(STORED) as app, TestClient(app) as client:
        yield client


def test_a_browser_may_run_what_is_in_the_page_and_nothing_else(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


def test_the_page_needs_nothing_else_and_never_makes_markup_of_data() -> None:
    text = PAGE.read_text()
    assert re.findall(r'(?:src|href)="(?:data:|([^"]*))', text) == ["", "openapi.json"]
    assert re.findall(r"(?:src|href)=[^\"]", text) == []
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []
    assert re.findall(r"\son[a-z]+=|\sstyle=|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text) == []
    assert len(text) < 40_000


def test_it_is_not_sent_again_to_who_has_it(client: TestClient) -> None:
    tag = client.get("/").headers["etag"]
    answer = client.get("/", headers={"if-none-match": tag})
    assert (answer.status_code, answer.content) == (304, b"")
    assert page_headers(PAGE.read_bytes() + b" ")["ETag"] != tag


def test_sample_users(client: TestClient) -> None:
    document = client.get("/v1/demo/users").json()
    assert document["users"] == [{"user": "random-0", "events": 7}, {"user": "random-1", "events": 6}]
    assert document["actions"] == ["click", "save"]
    assert document["positive_actions"] == ["save"]
    assert document["items"] == 24
    assert document["device"] == "cpu"


def test_a_sample_history_has_titles_and_can_be_asked_with(client: TestClient) -> None:
    document = client.get("/v1/demo/history", params={"user": "random-1"}).json()
    assert document["user"] == "random-1"
    assert len(document["events"]) == 6
    assert all(event["title"] == event["item"].replace("item-", "Item ") for event in document["events"])
    history = [{name: value for name, value in event.items() if name != "title"} for event in document["events"]]
    answer = client.post("/v1/recommend", json={"history": history, "k": 2, "now_ms": 1_800_000_000_000})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["items"]) == 2


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/demo/history?user=nobody", 404, "unknown_user"),
        ("/v1/demo/history?user=../../manifest.json", 404, "unknown_user"),
        ("/v1/demo/history", 400, "invalid_request"),
    ],
)
def test_there_are_no_other_users(client: TestClient, path: str, status: int, code: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_without_the_page_there_are_no_sample_users_either() -> None:
    with served(STORED, replace(SMALL, page=False)) as app, TestClient(app) as client:
        for path in ("/", "/v1/demo/users", "/v1/demo/history?user=random-1"):
            assert client.get(path).status_code == 404
