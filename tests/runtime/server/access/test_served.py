"""Real servers with tokens, limits and certificates, which change while clients send requests."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from served_process import HISTORY, Running, started

BODY = json.dumps({"history": HISTORY, "k": 3})
TOGETHER = ("--processes", "2")


def entry(name: str, *scopes: str) -> str:
    listed = ", ".join(f'"{scope}"' for scope in scopes)
    return f'[{name}]\nsha256 = "{hashlib.sha256(secret(name).encode()).hexdigest()}"\nscopes = [{listed}]\n'


def secret(name: str) -> str:
    return f"the-secret-of-{name}"


def put(file: Path, content: str) -> None:
    beside = file.with_suffix(".new")
    beside.write_text(content)
    beside.chmod(0o600)
    beside.rename(file)


def until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.05)


@contextmanager
def asking(running: Running, headers: Callable[[], dict[str, str]]) -> Iterator[Counter[int]]:
    """Clients of three kinds: new connections, a connection that stays, and users, who are handed over."""
    stop, statuses = threading.Event(), Counter[int]()
    errors: list[Exception] = []

    def ask(kind: int) -> None:
        connection, number = running.connect(), 0
        try:
            while not stop.is_set():
                number += 1
                body = BODY if kind else json.dumps({**json.loads(BODY), "user": f"u{number % 8}"})
                connection.request("POST", "/v1/recommend", body, headers())
                answer = connection.getresponse()
                answer.read()
                statuses[answer.status] += 1
                if kind == 1:
                    connection.close()
                    connection = running.connect()
                time.sleep(0.005)
        except Exception as error:
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=ask, args=(kind,)) for kind in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert errors == []


def up(running: Running, token: str) -> str:
    """A scrape that both processes have answered."""
    until(lambda: running.scrape(token=token).count("unipinrec_process_up{process=") == 2)
    until(lambda: running.scrape(token=token).count("unipinrec_ready{") == 2)
    return running.scrape(token=token)


def test_tokens_rotate_while_clients_ask(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    operator = entry("ops", "metrics")
    put(file, entry("old", "recommend") + operator)
    used = "old"
    with started(*TOGETHER, "--tokens", file, "--state", tmp_path / "state") as running:
        running.ready()
        up(running, secret("ops"))
        with asking(running, lambda: {"authorization": f"Bearer {secret(used)}"}) as statuses:
            until(lambda: statuses[200] > 20)
            put(file, entry("old", "recommend") + entry("new", "recommend") + operator)
            until(lambda: len(running.found("changed, and is in use")) == 2)
            used = "new"
            put(file, entry("new", "recommend") + operator)
            until(lambda: len(running.found("changed, and is in use")) == 4)
            put(file, "[new]\nsha256 = ")
            until(lambda: len(running.found("the former content stays in use")) == 2)
            before = statuses[200]
            until(lambda: statuses[200] > before + 20)
        assert set(statuses) == {200}, "no request was lost"
        for _ in range(20):
            assert running.ask("GET", "/v2", token=secret("old"))[0] == 401
            assert running.ask("GET", "/v2", token=secret("new"))[0] == 200
        scrape = running.scrape(token=secret("ops"))
        for process in "01":
            assert f'unipinrec_access_stale{{file="tokens",process="{process}"}} 1.0' in scrape
            for result, count in (("loaded", 2), ("failed", 1)):
                labels = f'file="tokens",process="{process}",result="{result}"'
                assert f"unipinrec_access_reloads_total{{{labels}}} {count}.0" in scrape
        lines = "".join(running.lines)
        assert "token=new" in lines
        assert "the-secret-of" not in lines


def test_a_client_that_floods_is_refused_and_others_are_not(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    put(file, entry("flood", "recommend", "events") + entry("shop", "recommend") + entry("ops", "metrics"))
    with started("--tokens", file, "--rate-limit", "5", "--rate-burst", "10") as running:
        running.ready()
        began, answers = time.monotonic(), []
        connection = running.connect()
        for number in range(120):
            connection.request("POST", "/v1/recommend", BODY, {"authorization": f"Bearer {secret('flood')}"})
            answer = connection.getresponse()
            content = json.loads(answer.read())
            answers.append((answer.status, answer.headers["retry-after"], content.get("error", {}).get("code")))
            if number % 40 == 0:
                assert running.ask("POST", "/v1/recommend", json.loads(BODY), token=secret("shop"))[0] == 200
        seconds = time.monotonic() - began
        connection.close()
        counted = Counter(answers)
        assert 10 <= counted[200, None, None] <= 11 + 5 * seconds
        assert counted[429, "1", "rate_limited"] == 120 - counted[200, None, None] > 0
        listed = [json.loads(BODY)] * 20
        until(lambda: running.ask("POST", "/v1/recommend", listed, token=secret("flood"))[0] == 200)
        connection = running.connect()
        connection.request("POST", "/v1/recommend", BODY, {"authorization": f"Bearer {secret('flood')}"})
        answer = connection.getresponse()
        assert (answer.status, answer.headers["retry-after"]) in [(429, "3"), (429, "4")], "the list counts as 20"
        connection.close()
        assert 'reason="rate_limited"' in running.scrape(token=secret("ops"))


def test_addresses_are_limited_where_there_are_no_tokens(tmp_path: Path) -> None:
    with started("--rate-limit", "0.01") as running:
        running.ready()
        assert running.ask("GET", "/v2")[0] == 200
        status, body = running.ask("GET", "/v2")
        assert (status, body) == (429, {"error": body["error"]})
        assert "may send 0.01 requests a second, 1 at once" in body["error"]
        running.ready()
        running.scrape()
    with started(*TOGETHER, "--state", tmp_path, "--rate-limit", "100") as running:
        running.until("each of 2 processes counts for --rate-limit by itself")


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate that a client can trust, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed (Debian: apt-get install openssl)")
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-keyout", str(key), "-out", str(cert), "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(words, check=True, capture_output=True)
    return cert, key


def common_name(running: Running) -> str:
    with socket.create_connection(("127.0.0.1", running.port), 20) as plain:
        assert running.tls is not None
        with running.tls.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            shown = connection.getpeercert()
    assert shown is not None
    (((_, name),),) = cast(Any, shown["subject"])
    return str(name)


def trusting(*certificates: Path) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for one in certificates:
        context.load_verify_locations(one)
    return context


def test_certificates_are_renewed_while_clients_ask(tmp_path: Path) -> None:
    pairs = {name: certificate(tmp_path, name) for name in ("first", "second", "third")}
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def use(of_cert: str, of_key: str) -> None:
        put(key, pairs[of_key][1].read_text())
        put(cert, pairs[of_cert][0].read_text())

    use("first", "first")
    tls = trusting(*(one for one, _ in pairs.values()))
    options = (*TOGETHER, "--tls-cert", cert, "--tls-key", key, "--state", tmp_path / "state")
    with started(*options, tls=tls) as running:
        assert running.found("listening on https://127.0.0.1:")
        running.ready()
        up(running, "")
        with asking(running, dict) as statuses:
            until(lambda: statuses[200] > 20)
            assert common_name(running) == "first"
            use("second", "second")
            until(lambda: len(running.found("changed, and is in use")) == 2)
            assert {common_name(running) for _ in range(12)} == {"second"}
            use("third", "second")
            until(lambda: len(running.found("are no certificate and its key")) == 2)
            assert {common_name(running) for _ in range(12)} == {"second"}
            assert running.scrape().count('unipinrec_access_stale{file="certificate"') == 2
            use("third", "third")
            until(lambda: len(running.found("changed, and is in use")) == 4)
            assert {common_name(running) for _ in range(12)} == {"third"}
        assert set(statuses) == {200}, "no request was lost"
        plain = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
        plain.request("GET", "/health/live")
        with pytest.raises((http.client.HTTPException, OSError)):
            plain.getresponse()
        plain.close()


@pytest.mark.parametrize("several", [(), TOGETHER])
def test_with_tls_the_end_loses_no_request_and_waits_for_no_idle_client(
    tmp_path: Path, several: tuple[str, ...]
) -> None:
    cert, key = certificate(tmp_path, "only")
    options: tuple[str | Path, ...] = (*several, "--tls-cert", cert, "--tls-key", key, "--state", tmp_path / "state")
    with started(*options, "--drain-delay-s", "0.2", tls=trusting(cert)) as running:
        running.ready()
        idle, silent = running.connect(), socket.create_connection(("127.0.0.1", running.port))
        idle.request("GET", "/health/live")
        assert idle.getresponse().read()
        answered, lost = [0], []

        def ask() -> None:
            while True:
                connection = running.connect()
                try:
                    connection.connect()
                except OSError:
                    return  # refused: it has not begun
                try:
                    connection.request("POST", "/v1/recommend", BODY)
                    assert connection.getresponse().status == 200
                    answered[0] += 1
                except Exception as error:
                    lost.append(error)
                finally:
                    connection.close()

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: answered[0] > 20)
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0
        seconds = time.monotonic() - began
        for thread in threads:
            thread.join(30)
        idle.close()
        silent.close()
    assert lost == []
    assert seconds < 12


def test_a_server_for_other_machines_warns_of_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    put(file, entry("shop", "recommend"))
    with started("--tokens", file) as running:
        running.ready()
        assert not running.found("other machines")
    with started("--host", "0.0.0.0") as running:
        running.ready()
        assert len(running.found("0.0.0.0 can be reached from other machines, and without --tokens")) == 1
        assert len(running.found("0.0.0.0 can be reached from other machines, and without --tls-cert")) == 1
    with started("--host", "0.0.0.0", "--tokens", file, *TOGETHER, "--state", tmp_path / "state") as running:
        running.ready()
        assert len(running.found("other machines")) == len(running.found("without --tls-cert")) == 1
