"""How much of the house one request passes through: every file is one that a reader has to open."""

from __future__ import annotations

import subprocess
import sys

from answers import STORED

TRACE = """
import sys, threading
from pathlib import Path
from starlette.testclient import TestClient
import unipinrec
from unipinrec.runtime.serve import ServeOptions, assembled

home, entered = str(Path(unipinrec.__file__).parent), set()

def note(frame, event, _):
    if event == "call" and frame.f_code.co_filename.startswith(home):
        entered.add(frame.f_code.co_filename.removeprefix(home))

threading.setprofile(note)  # before the threads that answer are started
sys.setprofile(note)
options = ServeOptions(device="cpu", cache_mib=8, recall_share=0)
with assembled(Path(sys.argv[1]), options) as (server, app, load), TestClient(app) as client:
    server.open(load())
    body = {"user": "ann", "history": [{"item": "item-1", "actions": ["click"]}], "k": 3}
    client.post("/v1/recommend", json=body)
    for kv in ("miss", "hit"):
        entered.clear()
        answer = client.post("/v1/recommend", json=body | {"user": "bob"})
        assert (answer.status_code, answer.json()["kv"]) == (200, kv)
        print(*sorted(entered))
    sys.setprofile(None)
    server.deployments.close()
"""


def test_one_recommendation_passes_few_files() -> None:
    command = [sys.executable, "-c", TRACE, str(STORED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        observers = {path for path in line.split() if "/observe/" in path}
        answering = set(line.split()) - observers
        assert observers == {"/runtime/server/observe/metrics.py"}
        assert "/runtime/recommender.py" in answering
        assert len(answering) <= 20, line
