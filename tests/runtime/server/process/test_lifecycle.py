"""Real server processes: they load, are killed, drain, and end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from served_process import HISTORY, started

from unipinrec.errors import ConfigError
from unipinrec.runtime.server.process.lifecycle import RunOptions, listen, stop_connections

HEAD = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\n"


def event(name: str, at: int) -> dict[str, Any]:
    return {"item": f"item-{at % 24}", "actions": ["click"], "timestamp_ms": at, "id": name}


def test_events_that_were_acknowledged_survive_kill_9(tmp_path: Path) -> None:
    words = ("--state", tmp_path / "state", "--kept-events", "10000")
    acknowledged: list[str] = []
    with started(*words) as running:
        running.ready()

        def write(writer: int) -> None:
            for at in range(10_000):
                name = f"{writer}.{at}"
                try:
                    running.ask("POST", "/v1/events", {"user": f"u{writer % 2}", "events": [event(name, at)]})
                except (OSError, http.client.HTTPException):
                    return
                acknowledged.append(name)

        writers = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
        for writer in writers:
            writer.start()
        while len(acknowledged) < 50:
            time.sleep(0.005)
        os.kill(running.process.pid, signal.SIGKILL)
        for writer in writers:
            writer.join(20)
    with started(*words) as again:
        again.ready()
        known = [one["id"] for user in ("u0", "u1") for one in again.ask("GET", f"/v1/users/{user}")[1]["events"]]
        assert set(acknowledged) <= set(known)
        assert len(known) == len(set(known)) <= len(acknowledged) + len(writers)
        status, answer = again.ask("POST", "/v1/recommend", {"user": "u0", "k": 1})
        assert (status, answer["kv"]) == (200, "miss")


@pytest.mark.parametrize(("drain_delay_s", "processes"), [(0, 1), (0.3, 1), (0.3, 2)])
def test_sigterm_under_load_loses_no_accepted_request(drain_delay_s: float, processes: int, tmp_path: Path) -> None:
    outcomes: list[int | str] = []
    together = ("--processes", str(processes), "--state", tmp_path)
    with started("--drain-delay-s", str(drain_delay_s), "--max-wait-ms", "20", *together) as running:
        running.ready()
        ended = threading.Event()

        def ask() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
            while not ended.is_set():
                try:
                    connection.connect()
                except ConnectionRefusedError:  # clearly not accepted
                    return
                connection.auto_open = 0
                try:
                    while connection.sock is not None:
                        connection.request("POST", "/v1/recommend", json.dumps({"history": HISTORY, "k": 1}))
                        answer = connection.getresponse()
                        answer.read()
                        outcomes.append(answer.status)
                except (OSError, http.client.HTTPException) as error:
                    outcomes.append(repr(error))
                connection.close()

        clients = [threading.Thread(target=ask) for _ in range(8)]
        for client in clients:
            client.start()
        while len(outcomes) < 50:
            time.sleep(0.01)
        before = len(outcomes)
        running.process.send_signal(signal.SIGTERM)
        exit_code = running.process.wait(20)
        ended.set()
        for client in clients:
            client.join(20)
    assert exit_code == 0, "".join(running.lines)[-8000:]
    assert len(outcomes) > before
    assert set(outcomes) == {200}
    assert "is drained and closed" in "".join(running.lines)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can stop connections before it closes a socket")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_no_connection_begins_between_the_last_accept_and_the_close(host: str) -> None:
    with listen(RunOptions(host=host, port=0)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address[:2]) as before:
            stop_connections(listener)
            with pytest.raises(TimeoutError):
                socket.create_connection(address[:2], timeout=0.5)
            accepted, _ = listener.accept()
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
            listener.close()
            with accepted:
                before.sendall(b"request")
                assert accepted.recv(7) == b"request"


class Unfiltered(socket.socket):
    """A socket under gVisor, for any user but root."""

    def setsockopt(self, *_: object) -> None:
        raise PermissionError(1, "Operation not permitted")


def test_a_kernel_that_allows_no_filter_is_named_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with Unfiltered() as listener:
        stop_connections(listener)
    assert "may be reset, for no filter is allowed: [Errno 1] Operation not permitted" in caplog.text


def test_the_first_request_of_a_connection_may_come_late_in_the_end() -> None:
    with started("--drain-delay-s", "0") as running:
        running.ready()
        late = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
        late.connect()
        running.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        late.request("POST", "/v1/recommend", json.dumps({"history": HISTORY, "k": 1}))
        assert late.getresponse().status == 200
        assert running.process.wait(20) == 0


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("loading_s", [0.1, 0.2, 0.3])
def test_sigterm_while_it_loads_ends_it_properly(processes: int, loading_s: float, tmp_path: Path) -> None:
    with started("--processes", str(processes), "--state", tmp_path) as running:
        time.sleep(loading_s + 0.6 * (processes > 1))  # these have an interpreter to start first
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) in (0, -signal.SIGTERM), "".join(running.lines)
    assert not running.found("terminate"), "".join(running.lines)


def test_a_request_that_was_accepted_is_answered_before_the_end() -> None:
    with started("--drain-delay-s", "0", "--max-wait-ms", "700") as running:
        running.ready()
        answers: list[int] = []
        body = {"history": HISTORY, "k": 1}
        asking = threading.Thread(target=lambda: answers.append(running.ask("POST", "/v1/recommend", body)[0]))
        asking.start()
        time.sleep(0.2)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0
        asking.join(20)
    assert answers == [200]


def test_what_is_late_is_cut_off_after_the_limit() -> None:
    with started("--drain-delay-s", "0", "--drain-s", "1") as running:
        running.ready()
        with socket.create_connection(("127.0.0.1", running.port)) as slow:
            slow.sendall(HEAD + b"Content-Length: 100\r\nX-Deadline-Ms: 30000\r\n\r\n{")
            time.sleep(0.2)
            began = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(20) == 0
            assert 0.8 < time.monotonic() - began < 6


@pytest.mark.parametrize("processes", [1, 2])
def test_while_it_drains_it_is_not_ready_and_ctrl_c_hastens_it(processes: int, tmp_path: Path) -> None:
    with started("--drain-delay-s", "60", "--processes", str(processes), "--state", tmp_path) as running:
        running.ready()
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        status, answer = running.ask("GET", "/health/ready")
        assert (status, answer["status"]) == (503, "draining")
        assert running.ask("POST", "/v1/recommend", {"history": HISTORY, "k": 1})[0] == 200
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(20) == 0


def test_large_or_missing_heads_end_their_connection() -> None:
    pytest.importorskip("httptools")
    with started() as running:
        running.ready()
        with socket.create_connection(("127.0.0.1", running.port), timeout=20) as client:
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n")
            for _ in range(17):
                client.sendall(b"X-More: " + b"x" * 4000 + b"\r\n")
            assert client.recv(12) == b"HTTP/1.1 400"
        with socket.create_connection(("127.0.0.1", running.port), timeout=20) as client:
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-More: " + b"x" * 30_000 + b"\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        with socket.create_connection(("127.0.0.1", running.port), timeout=20) as client:
            client.sendall(HEAD + b"Content-Length: 9000000\r\n\r\n" + b" " * 300_000)
            assert client.recv(12) == b"HTTP/1.1 413"


def test_connections_beyond_the_limit_of_open_files_are_refused_and_logged() -> None:
    with started(files=60) as running:
        running.ready()
        clients = [socket.create_connection(("127.0.0.1", running.port), timeout=20) for _ in range(100)]
        answers: Counter[bytes] = Counter()
        for client in clients:
            with client, suppress(OSError):
                client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                answers[client.recv(12)] += 1
        assert answers[b"HTTP/1.1 200"] >= 8
        assert answers[b"HTTP/1.1 503"] >= 1
        running.until("connections are open; raise the limit of open files (ulimit -n)")
        assert running.ask("GET", "/health/live")[0] == 200


def test_an_address_that_is_taken_is_told() -> None:
    with listen(RunOptions(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .*choose another --host or --port"):
            listen(RunOptions(port=port))
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid:80"):
        listen(RunOptions(host="no.such.host.invalid", port=80))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this system has no socket for both IPv4 and IPv6")
def test_all_addresses_are_those_of_both_protocols() -> None:
    with listen(RunOptions(host="::", port=0)) as listener:
        port = listener.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=5).close()
    with listen(RunOptions(host="::1", port=0)) as listener, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", listener.getsockname()[1]), timeout=5)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="drain_s=0 at least 1"):
        RunOptions(drain_s=0)


@pytest.mark.parametrize(("option", "status"), [((), 200), (("--cold-start", "refuse"), 422)])
def test_a_user_without_events_is_answered_or_refused(popular: Path, option: tuple[str, ...], status: int) -> None:
    with started(*option, bundle=popular) as server:
        server.ready()
        answered, body = server.ask("POST", "/v1/recommend", {"user": "nobody", "k": 1})
        assert answered == status
        assert (body["items"][0]["item"] if status == 200 else body["error"]["code"]) in ("item-5", "cold_start")
