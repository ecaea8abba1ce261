"""Who may swap, and between what: by HTTP with a token, or by a file that is renamed into place."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from live_server import deployed, listening
from starlette.testclient import TestClient

from unipinrec.errors import BundleError, ConfigError
from unipinrec.runtime import Recommender, RecommendOptions
from unipinrec.runtime.server.access.access import Access
from unipinrec.runtime.server.access.tokens import Token
from unipinrec.runtime.server.admin import (
    CurrentWatcher,
    admin_routes,
    bundle_folder,
    read_current,
)
from unipinrec.runtime.server.app import make_app, make_server
from unipinrec.runtime.server.swap import Deployments

TOKEN = "0123456789abcdef0123456789abcdef"
ALLOWED = {"authorization": f"Bearer {TOKEN}"}
ACCESS = Access(admin=Token(sha256=hashlib.sha256(TOKEN.encode()).hexdigest(), scopes=frozenset({"admin"})))
NOW_MS = 1_760_000_000_000


@pytest.fixture
def deployments(twins: tuple[Path, Path]) -> Iterator[Deployments]:
    with deployed(twins[0]) as opened:
        yield opened


@pytest.fixture
def client(deployments: Deployments, twins: tuple[Path, Path]) -> Iterator[TestClient]:
    server = make_server(access=ACCESS, deployments=deployments)
    routes = admin_routes(server, twins[0].parent)
    with TestClient(make_app(server, routes), raise_server_exceptions=False) as opened:
        yield opened


@pytest.fixture
def folder(twins: tuple[Path, Path], tmp_path: Path) -> Path:
    """A folder of bundles in which a test may put `current.json`."""
    for bundle in twins:
        (tmp_path / bundle.name).symlink_to(bundle)
    return tmp_path


def put(folder: Path, content: str) -> None:
    """As deployment tools do: write beside, then rename."""
    beside = folder / f".current.{time.monotonic_ns()}"
    beside.write_text(content)
    beside.rename(folder / "current.json")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": TOKEN},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {TOKEN}0"},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": f"Bearer {TOKEN.upper()}"},
    ],
)
def test_nothing_is_done_without_the_token(
    client: TestClient, deployments: Deployments, headers: dict[str, str]
) -> None:
    before = deployments.current
    for method, path in (("POST", "/admin/reload"), ("POST", "/admin/rollback"), ("GET", "/admin/status")):
        answer = client.request(method, path, headers=headers, content=b'{"bundle": "b"}')
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "unauthorized"
        assert TOKEN not in answer.text
    assert deployments.current is before
    assert deployments.swap_counts() == {}


def test_there_is_no_way_in_unless_it_was_asked_for(deployments: Deployments) -> None:
    with TestClient(make_app(make_server(deployments=deployments))) as client:
        assert client.get("/admin/status", headers=ALLOWED).status_code == 404
        assert client.post("/admin/reload", headers=ALLOWED, content=b'{"bundle": "b"}').status_code == 404


def test_reload_and_rollback(client: TestClient, deployments: Deployments) -> None:
    first = deployments.current.version
    answer = client.post("/admin/reload", headers=ALLOWED, json={"bundle": "b", "ticket": "T-1"})
    assert answer.status_code == 200
    status = answer.json()
    assert (status["bundle"], status["previous"], status["opening"]) == ("b", first, None)
    assert status["version"] == deployments.current.version != first
    assert client.get("/health/ready").json()["bundle"] == status["version"]
    back = client.post("/admin/rollback", headers={"authorization": f"bearer {TOKEN}"})
    assert (back.status_code, back.json()["version"]) == (200, first)
    swaps = client.get("/admin/status", headers=ALLOWED).json()["swaps"]
    assert [(one["kind"], one["bundle"], one["result"]) for one in swaps] == [
        ("swap", "b", "swapped"),
        ("rollback", "a", "swapped"),
    ]


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        (b'{"bundle": "../b"}', 400, "invalid_request", "'../b' does not name a bundle"),
        (b'{"bundle": "/etc"}', 400, "invalid_request", "does not name a bundle"),
        (b'{"bundle": ".."}', 400, "invalid_request", "does not name a bundle"),
        (b'{"bundle": ""}', 400, "invalid_request", "does not name a bundle"),
        (b'{"bundle": "b\\u0000"}', 400, "invalid_request", "does not name a bundle"),
        (b'{"bundle": "b\\n"}', 400, "invalid_request", "does not name a bundle"),
        (b'{"bundle": 7}', 400, "invalid_request", "Expected `str`"),
        (b"{}", 400, "invalid_request", "missing required field `bundle`"),
        (b"b", 400, "invalid_request", "it must be"),
        (b'{"bundle": "%s"}' % (b"b" * 5000), 413, "too_large", "4096"),
        (b'{"bundle": "c"}', 404, "no_such_bundle", "there is no bundle 'c'"),
    ],
)
def test_what_is_no_bundle_is_refused(
    client: TestClient, deployments: Deployments, body: bytes, status: int, code: str, message: str
) -> None:
    before = deployments.current
    answer = client.post("/admin/reload", headers=ALLOWED, content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert message in answer.json()["error"]["message"]
    assert deployments.current is before


def test_a_refused_swap_says_why(deployments: Deployments, twins: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    server = make_server(access=ACCESS, deployments=deployments)
    routes = admin_routes(server, tmp_path)
    with TestClient(make_app(server, routes)) as client:
        answer = client.post("/admin/reload", headers=ALLOWED, json={"bundle": "empty"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bundle_refused")
        assert "the active bundle was not changed" in answer.json()["error"]["message"]
        answer = client.post("/admin/rollback", headers=ALLOWED)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_swapped")
    assert deployments.current.path == twins[0]


def test_admin_waits_for_the_first_bundle(tmp_path: Path) -> None:
    server = make_server(access=ACCESS)
    with TestClient(make_app(server, admin_routes(server, tmp_path))) as client:
        answer = client.get("/admin/status", headers=ALLOWED)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")


def test_swaps_by_http_while_clients_ask(deployments: Deployments, twins: tuple[Path, Path]) -> None:
    histories = [[f"item-{(3 * start + step) % 24}" for step in range(1 + start % 8)] for start in range(12)]
    events = [[{"item": item, "actions": ["click"], "timestamp_ms": NOW_MS} for item in items] for items in histories]
    options = RecommendOptions(now_ms=NOW_MS + 1000, exclude_seen=False)
    expected: dict[str, list[list[float]]] = {}
    for bundle in twins:
        with Recommender.load(bundle, "cpu") as alone:
            slates = [alone.recommend(one, 5, options) for one in events]
            expected[alone.bundle.hash] = [[item.score for item in slate.items] for slate in slates]
    server = make_server(access=ACCESS, deployments=deployments)
    app = make_app(server, admin_routes(server, twins[0].parent))
    stop, served = threading.Event(), []

    def ask(port: int, first: int) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            index = first
            while not stop.is_set():
                index = (index + 1) % len(events)
                body = {"history": events[index], "user": f"u{index % 3}", "k": 5, "exclude_seen": False}
                answer = client.post("/v1/recommend", json={**body, "now_ms": NOW_MS + 1000})
                assert answer.status_code == 200, answer.text
                served.append((index, answer.json()))

    with listening(app) as port, ThreadPoolExecutor(3) as threads, httpx.Client(timeout=60) as admin:
        asking = [threads.submit(ask, port, first) for first in range(3)]
        try:
            for name in ("b", "a", "b"):
                answer = admin.post(f"http://127.0.0.1:{port}/admin/reload", headers=ALLOWED, json={"bundle": name})
                assert answer.status_code == 200, answer.text
                enough, end = len(served) + 20, time.monotonic() + 20
                while len(served) < enough:
                    assert time.monotonic() < end
                    time.sleep(0.01)
        finally:
            stop.set()
        for one in asking:
            one.result()
    assert {answer["bundle"] for _, answer in served} == set(expected)
    for index, answer in served:
        scores = [item["score"] for item in answer["items"]]
        np.testing.assert_allclose(scores, expected[answer["bundle"]][index], atol=1e-5)


def test_a_renamed_file_swaps(deployments: Deployments, folder: Path) -> None:
    first, watcher = deployments.current.version, CurrentWatcher(deployments, folder, every_s=0.02)
    watcher.check()
    assert deployments.swap_counts() == {}
    put(folder, '{"bundle": "a", "by": "deploy 17"}')
    watcher.check()
    assert deployments.swap_counts() == {}, "it serves already"
    watcher.start()
    put(folder, '{"bundle": "b"}')
    end = time.monotonic() + 20
    while deployments.current.version == first:
        assert time.monotonic() < end
        time.sleep(0.01)
    watcher.stop()
    assert deployments.current.path.name == "b"
    assert deployments.swap_counts() == {("swap", "swapped"): 1}


def test_a_rollback_is_not_undone_by_the_file(deployments: Deployments, folder: Path) -> None:
    watcher = CurrentWatcher(deployments, folder)
    put(folder, '{"bundle": "b"}')
    watcher.check()
    deployments.rollback()
    watcher.check()
    assert deployments.current.path.name == "a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"bundle": "c"}', "c"),
        ('{"bundle": "../a"}', "does not name a bundle"),
        ('{"bundle"', "must be a file such as"),
        ("", "must be a file such as"),
        ('["a"]', "must be a file such as"),
    ],
)
def test_a_file_that_names_no_bundle_is_logged_once(
    deployments: Deployments, folder: Path, content: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    before, watcher = deployments.current, CurrentWatcher(deployments, folder)
    put(folder, content)
    watcher.check()
    watcher.check()
    warned = [record.getMessage() for record in caplog.records if "nothing was swapped" in record.getMessage()]
    assert len(warned) == 1
    assert message in warned[0]
    assert deployments.current is before
    assert deployments.swap_counts() == {("swap", "refused"): 1}
    assert message in str(deployments.status().swaps[0].reason)
    put(folder, '{"bundle": "b"}')
    watcher.check()
    assert deployments.current.path.name == "b"


def test_the_file_waits_for_a_swap_under_way(
    deployments: Deployments, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = CurrentWatcher(deployments, folder)
    put(folder, '{"bundle": "b"}')
    lock: Any = deployments._one_at_a_time
    with lock:
        watcher.check()
    assert deployments.swap_counts() == {("swap", "busy"): 1}
    watcher.check()
    assert deployments.current.path.name == "b"


def test_routes_without_any_token_are_closed(deployments: Deployments, tmp_path: Path) -> None:
    server = make_server(deployments=deployments)
    with TestClient(make_app(server, admin_routes(server, tmp_path))) as client:
        assert client.get("/admin/status").status_code == 401
        assert client.get("/admin/status", headers=ALLOWED).status_code == 401


def test_names(tmp_path: Path) -> None:
    assert bundle_folder(tmp_path, "2026-11-22_v1.4") == tmp_path / "2026-11-22_v1.4"
    for name in (".", "..", ".hidden", "a/b", "a\\b", "-rf", "a" * 129, "a\n", "ä"):
        with pytest.raises(BundleError, match="does not name a bundle"):
            bundle_folder(tmp_path, name)
    (tmp_path / "current.json").write_text(json.dumps({"bundle": "v7"}))
    assert read_current(tmp_path) == tmp_path / "v7"
    (tmp_path / "current.json").unlink()
    with pytest.raises(BundleError, match="must be a file such as"):
        read_current(tmp_path)
    with pytest.raises(ConfigError, match="cannot be checked every 0 s"):
        CurrentWatcher(None, tmp_path, 0)  # type: ignore[arg-type]
