"""The server from Python: what it raises, and that it leaves the process to its caller."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from answers import STORED

from unipinrec.errors import ConfigError
from unipinrec.runtime.serve import ServeOptions, serve_bundle

AFTER = """
import os, signal, sys, threading, time, urllib.request
from pathlib import Path
from unipinrec.errors import UnipinrecError
from unipinrec.runtime.serve import ServeOptions, serve_bundle

def end(port):
    for _ in range(200):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready").close()
            break
        except OSError:
            time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

state, port, ends = sys.argv[2], int(sys.argv[3]), sys.argv[4] == "ends"
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # of the host, and none of the server's business
if ends:
    threading.Thread(target=end, args=(port,), daemon=True).start()
try:
    options = ServeOptions(state=state, port=port, device="cpu", cache_mib=8, drain_delay_s=0)
    serve_bundle(sys.argv[1], options)
    print("served")
except UnipinrecError as error:
    print(type(error).__name__, error)
finally:
    print("the caller goes on", [thread.name for thread in threading.enumerate() if "unipinrec" in thread.name])
"""


def served(state: Path, port: int, how: str) -> list[str]:
    command = [sys.executable, "-c", AFTER, str(STORED), str(state), str(port), how]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_after_a_signal_the_caller_goes_on(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert served(tmp_path, port, "ends") == ["served", "the caller goes on []"]


def test_a_port_that_is_taken_is_an_error_of_ours_and_nothing_stays_open(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error, last = served(tmp_path, taken.getsockname()[1], "fails")
    assert error.startswith("ConfigError cannot listen on 127.0.0.1:")
    assert last == "the caller goes on []"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads=0 must be at least 1"),
        ({"max_batch": 0}, "max_batch=0 must be at least 1"),
        ({"batches": 0}, "batches=0 must be at least 1"),
        ({"kept_events": 0}, "kept_events=0 must be at least 1"),
        ({"processes": 0}, "processes=0 must be at least 1"),
        ({"processes": 2}, "2 processes need a --state"),
        ({"processes": 2, "state": "s", "admin_token_env": "T"}, "2 processes swap by --watch, not by /admin"),
        ({"state": ""}, "state='' names no folder"),
        ({"cold_start": "x"}, "cold_start='x' must be one of popular, refuse"),
        ({"bundles": Path("/nope")}, "bundles='/nope' is not a folder"),
        ({"drain_s": float("inf")}, "drain_s=inf"),
    ],
)
def test_options_that_are_not_possible(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeOptions(**options)


def test_signals_need_the_main_thread() -> None:
    errors: list[BaseException] = []

    def call() -> None:
        try:
            serve_bundle(STORED)
        except ConfigError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(30)
    assert [str(error).partition(":")[0] for error in errors] == ["serve_bundle handles signals"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
