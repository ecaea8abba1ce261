"""How much of the house one request passes through: every file is one that a reader has to open."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType

from answers import STORED
from live_server import deployed
from starlette.testclient import TestClient

import unipinrec
from unipinrec.runtime.server.app import make_app, make_server

HOME = str(Path(unipinrec.__file__).parent)


def test_one_recommendation_passes_few_files() -> None:
    entered: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            entered.add(frame.f_code.co_filename.removeprefix(HOME))

    body = {"user": "ann", "history": [{"item": "item-1", "actions": ["click"]}], "k": 3}
    threading.setprofile(note)  # before the threads that answer are started
    sys.setprofile(note)
    try:
        with deployed(STORED) as deployments, TestClient(make_app(make_server(deployments=deployments))) as client:
            client.post("/v1/recommend", json=body)
            entered.clear()
            assert client.post("/v1/recommend", json=body | {"user": "bob"}).status_code == 200
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert "/runtime/recommender.py" in entered
    assert len(entered) <= 27, " ".join(sorted(entered))
