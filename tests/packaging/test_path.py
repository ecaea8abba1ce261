"""How much of the house one request passes through: every file is one that a reader has to open."""

from __future__ import annotations

import socket
import subprocess
import sys

from answers import STORED

TRACE = """
import json, os, signal, sys, threading, time, urllib.request
from pathlib import Path
import unipinrec
from unipinrec.runtime.serve import ServeOptions, serve_bundle

home, entered, port = str(Path(unipinrec.__file__).parent), set(), int(sys.argv[2])

def note(frame, event, _):
    if event == "call" and frame.f_code.co_filename.startswith(home):
        entered.add(frame.f_code.co_filename.removeprefix(home))

def ask(user):
    body = {"user": user, "history": [{"item": "item-1", "actions": ["click"]}], "k": 3}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/recommend", json.dumps(body).encode())
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)

def visit():
    for _ in range(100):
        try:
            ask("ann")
            break
        except OSError:
            time.sleep(0.1)
    for kv in ("miss", "hit"):
        entered.clear()
        assert ask("bob")["kv"] == kv
        print(kv, *sorted(entered), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=visit, daemon=True).start()
threading.setprofile(note)
sys.setprofile(note)
serve_bundle(Path(sys.argv[1]), ServeOptions(port=port, device="cpu", cache_mib=8, recall_share=0, drain_delay_s=0))
"""
HEARTBEAT = "/runtime/server/process/lifecycle.py"  # of the process, whatever it serves


def test_one_recommendation_over_http_enters_few_files() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", TRACE, str(STORED), str(port)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    (miss, *missed), (hit, *found) = (line.split() for line in done.stdout.splitlines())
    assert (miss, hit) == ("miss", "hit")
    for entered in (missed, found):
        observers = {path for path in entered if "/observe/" in path}
        assert {path.rpartition("/")[2] for path in observers} == {"log.py", "metrics.py"}
        answering = set(entered) - observers - {HEARTBEAT}
        assert {"/runtime/recommender.py", "/runtime/server/process/http.py"} <= answering
        assert len(answering) <= 20, sorted(answering)
