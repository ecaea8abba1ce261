"""The compose file keeps its schema, and its HAProxy configuration works before two real servers and a real Redis."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import click
import pytest
import yaml
from served_process import HISTORY, Running, started

from unipinrec.cli import main

DEPLOY = Path(__file__).resolve().parents[2] / "docs/deploy"
CONFIG = (DEPLOY / "haproxy.cfg").read_text()
SERVICES: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
CLOSING_S = 5


@dataclass(kw_only=True)
class Site:
    """A proxy and the servers behind it."""

    port: int
    replicas: list[Running]

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=40)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            content = answer.read()
            return answer.status, json.loads(content) if content.startswith((b"{", b"[")) else content
        finally:
            connection.close()


def words() -> list[str]:
    """Options of a replica that do not name a place."""
    command = SERVICES["replica-1"]["command"]
    return [word for word in command[3:] if not word.startswith(("--host=", "--state=", "--cache-mib="))]


def keeps_schema(compose: Path) -> str:
    words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(compose)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60).stdout


def test_the_compose_file_keeps_its_schema(tmp_path: Path) -> None:
    assert "validation done" in keeps_schema(DEPLOY / "compose.yaml")
    (tmp_path / "compose.yaml").write_text((DEPLOY / "compose.yaml").read_text().replace("restart:", "restarts:"))
    assert "'restarts' was unexpected" in keeps_schema(tmp_path / "compose.yaml")


def test_the_services_fit_together() -> None:
    serve = main.commands["serve"]
    for name in ("replica-1", "replica-2"):
        replica = SERVICES[name]
        assert replica["command"][:2] == ["unipinrec", "serve"]
        found = serve.make_parser(click.Context(serve)).parse_args(replica["command"][2:])[0]
        assert f"server {name} {name}:8000\n" in CONFIG
        assert urlsplit(found["state"]).hostname in SERVICES
        ends_s = float(found["drain_delay_s"]) + float(found["drain_s"]) + CLOSING_S
        assert float(replica["stop_grace_period"].removesuffix("s")) >= ends_s
        build = replica["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
        assert set(replica["depends_on"]) <= set(SERVICES)
    mounted, _, _ = SERVICES["haproxy"]["volumes"][0].partition(":")
    assert (DEPLOY / mounted).is_file()
    assert SERVICES["haproxy"]["ports"] == ["8000:8000"]
    assert "bind :8000\n" in CONFIG


@contextmanager
def proxied(redis_url: str, folder: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        options = ("--state", redis_url, "--cache-mib", "8", "--threads", "1", *words())
        replicas = [stack.enter_context(started(*options)) for _ in range(2)]
        for replica in replicas:
            replica.ready()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        text = CONFIG.replace("bind :8000", f"bind 127.0.0.1:{port}")
        for number, replica in enumerate(replicas, 1):
            assert text.count(f"replica-{number}:8000") == 1
            text = text.replace(f"replica-{number}:8000", f"127.0.0.1:{replica.port}")
        (folder / "haproxy.cfg").write_text(text)
        haproxy = subprocess.Popen(["haproxy", "-f", folder / "haproxy.cfg"], stdout=subprocess.DEVNULL)
        try:
            site = Site(port=port, replicas=replicas)
            limit = time.monotonic() + 20
            while not up(site):
                assert haproxy.poll() is None
                assert time.monotonic() < limit
                time.sleep(0.05)
            yield site
        finally:
            haproxy.kill()
            haproxy.wait(20)


def up(site: Site) -> bool:
    try:
        return site.ask("GET", "/health/ready")[0] == 200
    except OSError:
        return False


@pytest.fixture
def site(redis_url: str, tmp_path: Path) -> Iterator[Site]:
    if shutil.which("haproxy") is None:
        pytest.skip("haproxy is not installed (Debian: apt-get install haproxy)")
    redis = re.sub(r"/0$", "/7", redis_url)
    with proxied(redis, tmp_path) as running:
        yield running


def test_only_the_api_is_public(site: Site) -> None:
    for path in ("/", "/metrics", "/admin/status", "/debug/traces", "/v2", "/%6detrics", "//metrics", "/v1/../metrics"):
        assert site.ask("GET", path)[0] == 404, path
    assert site.ask("GET", "/openapi.json")[0] == 200


def test_a_user_stays_on_one_replica(site: Site) -> None:
    for user in [*(f"user {number}" for number in range(8)), *range(100, 108)]:
        event = {"item": "item-1", "actions": ["click"], "id": "e1"}
        assert site.ask("POST", "/v1/events", {"user": user, "events": [event]})[1]["appended"] == 1
        kinds = [site.ask("POST", "/v1/recommend", {"user": user, "k": 1})[1]["kv"] for _ in range(3)]
        assert kinds == ["miss", "hit", "hit"]
        forgotten = {"user": str(user), "events": 1, "cached": True}
        assert site.ask("DELETE", f"/v1/users/{quote(str(user))}")[1] == forgotten
    seen = [len(replica.found("/v1/recommend 200")) for replica in site.replicas]
    assert sum(seen) == 48
    assert min(seen) >= 3


def load(site: Site, ends: threading.Event, counts: Counter[int | str]) -> None:
    number = 0
    while not ends.is_set():
        number += 1
        try:
            status, _ = site.ask("POST", "/v1/recommend", {"user": f"u{number % 40}", "history": HISTORY, "k": 1})
        except (OSError, http.client.HTTPException) as error:
            counts[repr(error)] += 1
        else:
            counts[status] += 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_request_fails_when_a_replica_goes(site: Site, how: signal.Signals) -> None:
    ends, counts = threading.Event(), Counter[int | str]()
    clients = [threading.Thread(target=load, args=(site, ends, counts)) for _ in range(4)]
    for client in clients:
        client.start()
    time.sleep(1)
    before = counts[200]
    site.replicas[0].process.send_signal(how)
    site.replicas[0].process.wait(60)
    time.sleep(2)
    ends.set()
    for client in clients:
        client.join(60)
    assert list(counts) == [200], counts
    assert counts[200] > before + 20


def test_events_are_not_sent_twice(site: Site) -> None:
    """An append whose answer is lost is not tried again by the proxy, for it may have been done."""
    body = {"user": "ada", "events": [{"item": "item-1", "actions": ["click"]}]}
    assert site.ask("POST", "/v1/events", body)[0] == 200
    (owner,) = (replica for replica in site.replicas if replica.found("/v1/events 200"))
    owner.process.send_signal(signal.SIGSTOP)
    answers: list[tuple[int, Any]] = []
    client = threading.Thread(target=lambda: answers.append(site.ask("POST", "/v1/events", body)))
    client.start()
    time.sleep(0.3)
    owner.process.kill()
    client.join(60)
    assert answers[0][0] == 502
    assert site.ask("POST", "/v1/events", body)[0] == 200
