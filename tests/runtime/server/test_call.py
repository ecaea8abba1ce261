"""Faults of ours, put anywhere on the way of a request: its answer says so, the log says why, and the next is right."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from answers import STORED
from live_server import deployed
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from unipinrec.runtime.server.app import make_app, make_server
from unipinrec.runtime.server.swap import Deployments

ROOM = str(Path(make_app.__code__.co_filename).parents[1])
SPARED = {"__call__", "__init__", "refusal_of", "as_json", "of", "_drop_frames", "id_of", "call", "documented"}
SPARED |= {"_gone", "count", "one_done", "_resolve"}  # these only wait; a fault in them ends with the deadline
SPARED |= {"leave", "_free"}  # what releases
HISTORY = [{"item": "item-1", "actions": ["click"], "timestamp_ms": 10**12, "id": "1"}]
REQUESTS: dict[str, tuple[str, str, Any]] = {
    "recommend": ("POST", "/v1/recommend", {"user": "u", "history": HISTORY, "k": 2}),
    "stored": ("POST", "/v1/recommend", {"user": "u", "k": 2}),
    "rank": ("POST", "/v1/rank", {"history": HISTORY, "items": ["item-2", 3], "skip_unknown": True}),
    "similar": ("POST", "/v1/items/similar", {"items": ["item-2"], "k": 2}),
    "events": ("POST", "/v1/events", {"user": "u", "events": HISTORY}),
    "user": ("GET", "/v1/users/u", None),
    "forget": ("DELETE", "/v1/users/u", None),
}


class Faulty:
    """An application in which, while `armed`, the next function of ours that a request calls raises an error."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.armed, self.hit = app, False, ""
        self.fault: type[Exception] = TypeError
        self.done: set[CodeType] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sys.setprofile(self._profile if self.armed else None)
        try:
            await self.app(scope, receive, send)
        finally:
            sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or self.hit or code in self.done:
            return
        if code.co_filename.startswith(ROOM) and code.co_name not in SPARED:
            self.done.add(code)
            self.hit = code.co_qualname if hasattr(code, "co_qualname") else code.co_name
            raise self.fault("a fault of ours")


@pytest.fixture(scope="module")
def deployments() -> Iterator[Deployments]:
    with deployed(STORED) as opened:
        yield opened


@pytest.mark.parametrize("name", REQUESTS)
def test_a_fault_of_ours_is_told_as_ours(name: str, deployments: Deployments, caplog: pytest.LogCaptureFixture) -> None:
    method, path, body = REQUESTS[name]
    server = make_server(deployments=deployments)
    faulty = Faulty(make_app(server))
    caplog.set_level(logging.ERROR)
    places = []
    with TestClient(faulty, raise_server_exceptions=False) as client:
        client.post("/v1/events", json={"user": "u", "events": HISTORY})
        for fault in (TypeError, ValueError, KeyError):
            faulty.fault, faulty.done = fault, set()
            while True:
                client.post("/v1/events", json={"user": "u", "events": HISTORY})
                caplog.clear()
                faulty.hit, faulty.armed = "", True
                answer = client.request(method, path, json=body, headers={"x-request-id": "mine"})
                faulty.armed = False
                if not faulty.hit:
                    break
                places.append(faulty.hit)
                assert answer.headers.get("x-request-id") == "mine", faulty.hit
                if answer.status_code != 200:  # some faults come after the answer
                    assert answer.status_code == 500, (faulty.hit, fault, answer.text)
                    assert answer.json()["error"]["code"] == "internal"
                assert "a fault of ours" in caplog.text, (faulty.hit, answer.text)
            assert answer.status_code == 200, answer.text
            forgotten = client.delete("/v1/users/u")  # waits for all requests of the user
            assert forgotten.status_code == 200, forgotten.text
    assert len(set(places)) > 5
    assert server.admission.pending == server.writes.pending == 0
