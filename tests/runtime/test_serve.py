"""The server from Python: what it raises, and that it leaves the process to its caller."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from answers import NOW_MS, STORED
from live_server import SMALL, listening
from live_server import served as in_service
from starlette.testclient import TestClient

from unipinrec.errors import ConfigError
from unipinrec.runtime import CacheOptions, Event, Recommender, RecommendOptions, SlateItem
from unipinrec.runtime.bundle.quality import KvDtype
from unipinrec.runtime.requests import SOON_MS
from unipinrec.runtime.serve import ServeOptions, serve_bundle
from unipinrec.runtime.serve_options import memory_of

AFTER = """
import os, signal, sys, threading, time, urllib.request
from pathlib import Path
from unipinrec.errors import UnipinrecError
from unipinrec.runtime.serve import ServeOptions, serve_bundle
from unipinrec.runtime.serve_options import memory_of

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
        ({"window_slack": 0}, "window_slack=0 must be at least 1"),
        ({"processes": 0}, "processes=0 must be at least 1"),
        ({"processes": 2}, "2 processes need a --state"),
        ({"processes": 2, "state": "s", "admin_token_env": "T"}, "2 processes swap by --watch, not by /admin"),
        ({"state": ""}, "state='' names no folder"),
        ({"cold_start": "x"}, "cold_start='x' must be one of popular, refuse"),
        ({"bundles": Path("/nope")}, "bundles='/nope' is not a folder"),
        ({"drain_s": float("inf")}, "drain_s=inf"),
        ({"cors": ("https://shop.example/",)}, r"cors='https://shop\.example/' is no origin; write https://HOST"),
        ({"cors": ("shop.example",)}, r"cors='shop\.example' is no origin"),
        ({"rate_burst": 3}, "rate_burst=3 has no effect without rate_limit"),
        ({"tls_cert": Path("c.pem")}, "tls_cert=c.pem and tls_key=None go together"),
    ],
)
def test_options_that_are_not_possible(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeOptions(**options)


def test_pages_of_named_origins_may_ask() -> None:
    origin, body = "https://shop.example", {"history": [{"item": "item-1", "actions": ["click"]}], "k": 1}
    options = replace(SMALL, cors=(origin,))
    with in_service(STORED, options) as app, TestClient(app) as client:
        asked = {"origin": origin, "access-control-request-method": "POST"}
        preflight = client.options("/v1/recommend", headers=asked | {"access-control-request-headers": "content-type"})
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, origin)
        assert "POST" in preflight.headers["access-control-allow-methods"]
        answer = client.post("/v1/recommend", json=body, headers={"origin": origin})
        assert answer.headers["access-control-allow-origin"] == origin
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        stranger = {**asked, "origin": "https://other.example"}
        assert "access-control-allow-origin" not in client.options("/v1/recommend", headers=stranger).headers
    with in_service(STORED) as app, TestClient(app) as client:
        assert client.options("/v1/recommend", headers=asked).status_code == 405


def test_answers_are_compressed_where_operator_and_client_want_it() -> None:
    body = {"history": [{"item": "item-1", "actions": ["click"]}], "k": 10, "now_ms": NOW_MS}
    plain, wanted = {"accept-encoding": "identity"}, {"accept-encoding": "gzip"}
    with in_service(STORED, replace(SMALL, gzip=True)) as app, TestClient(app) as client:
        large = client.post("/v1/recommend", json=body, headers=wanted)
        assert (large.headers["content-encoding"], large.headers["vary"]) == ("gzip", "Accept-Encoding")
        assert int(large.headers["content-length"]) < len(large.content) / 2
        same = client.post("/v1/recommend", json=body, headers=plain)
        assert "content-encoding" not in same.headers
        assert same.json()["items"] == large.json()["items"]
        small = client.get("/health/live", headers=wanted)
        assert "content-encoding" not in small.headers
    with in_service(STORED) as app, TestClient(app) as client:
        assert "content-encoding" not in client.post("/v1/recommend", json=body, headers=wanted).headers


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


@contextmanager
def over_http(bundle: Path, options: ServeOptions = SMALL) -> Iterator[Callable[..., Any]]:
    """Ask a server of a bundle for ten items."""
    with in_service(bundle, options) as app, listening(app) as port:

        def ask(history: Sequence[Event], **body: Any) -> Any:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            content = {"history": msgspec.to_builtins(history), "k": 10, **body}
            connection.request("POST", "/v1/recommend", json.dumps(content))
            answer = json.loads(connection.getresponse().read())
            connection.close()
            return answer

        yield ask


def kept(fresh: Sequence[SlateItem], served: Any) -> float:
    """Share of the served items that are among the ten best without a cache, or tied with the last of them."""
    values = {item.item: item.score for item in fresh}
    scores = np.array([values.get(item["item"], 0.0) for item in served["items"]])
    return float((scores >= fresh[9].score - 0.01 * scores * (1 - scores)).mean())


@pytest.mark.parametrize(
    ("name", "dtype", "agrees"),
    [("bundle", None, True), ("outlying", None, True), ("outlying", "int8", False)],
)
def test_the_ten_best_over_http_are_those_without_a_cache(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, name: str, dtype: KvDtype | None, agrees: bool
) -> None:
    path, shares = request.getfixturevalue(name), []
    options = ServeOptions(device="cpu", cache_mib=8, cache_dtype=dtype)
    with Recommender.load(path, "cpu") as plain, over_http(path, options) as ask:
        for user, history in enumerate(plain.bundle.sample_histories(50)):
            events, now_ms = plain.bundle.events_of(history), int(history.timestamps_ms[-1]) + SOON_MS
            fresh = plain.recommend(events, 200, RecommendOptions(now_ms=now_ms)).items
            ask(events[: len(events) // 2], now_ms=now_ms, user=str(user))
            answers = [ask(events, now_ms=now_ms, user=user) for user in (str(user), "new" + str(user))]
            assert [answer["kv"] for answer in answers] == ["extended", "miss"]
            shares += [kept(fresh, answer) for answer in answers]
    assert (np.mean(shares) >= 0.999) == agrees
    warned = [message for message in caplog.messages if message.startswith("the cache stores int8, but the bundle")]
    assert len(warned) == (not agrees)


def test_a_cache_for_an_old_bundle_stores_int8() -> None:
    cache = Recommender.load(STORED, "cpu", cache=CacheOptions(budget_bytes=1 << 20)).cache
    assert cache is not None
    assert cache.geometry.dtype == "int8"


def test_the_window_over_http_is_that_of_python_and_with_a_slack_of_1_the_newest_events(
    tmp_path: Path, reseal: Callable[..., None]
) -> None:
    """The stored model takes 8 events; by 4 at a time, the window over 11 holds the last 7."""
    stating = Path(shutil.copytree(STORED, tmp_path / "stating"))
    reseal(stating, window_slack=4)
    events = [Event(item=f"item-{index}", actions=("click",), timestamp_ms=NOW_MS + index) for index in range(11)]
    options, expected = RecommendOptions(now_ms=NOW_MS + 100, exclude_seen=False), {}
    for slack, count in ((1, 8), (4, 7)):
        with Recommender.load(STORED, "cpu", window_slack=slack) as recommender:
            whole, *parts = (recommender.recommend(events[-n:], 10, options).items for n in (11, 8, 7))
        assert [whole == part for part in parts] == [count == 8, count == 7]
        expected[slack] = json.loads(msgspec.json.encode(whole))
    served_with = ((STORED, 1, 1), (STORED, 4, 4), (STORED, None, 1), (stating, None, 4), (stating, 1, 1))
    for bundle, option, slack in served_with:
        with over_http(bundle, ServeOptions(device="cpu", cache_mib=0, window_slack=option)) as ask:
            answer = ask(events, now_ms=NOW_MS + 100, exclude_seen=False)
        assert answer["items"] == expected[slack], (bundle, option)


def test_a_stated_window_slack_beyond_the_model_is_refused(tmp_path: Path, reseal: Callable[..., None]) -> None:
    wrong = Path(shutil.copytree(STORED, tmp_path / "wrong"))
    reseal(wrong, window_slack=9)
    with pytest.raises(ConfigError, match="window_slack=9 must be an integer from 1 to 8"):
        Recommender.load(wrong, "cpu")


@pytest.mark.parametrize(
    ("usable_mib", "cache_mib", "work_mib"),
    [(None, 1024, 512), (64_000, 1024, 512), (3_000, 750, 250), (600, 150, 50)],
)
def test_memory_follows_that_of_the_process(usable_mib: int | None, cache_mib: int, work_mib: int) -> None:
    usable = None if usable_mib is None else usable_mib << 20
    assert memory_of(ServeOptions(), 3, usable) == (cache_mib << 20, work_mib << 20)


def test_more_memory_than_the_process_may_use_is_refused() -> None:
    assert memory_of(ServeOptions(cache_mib=300, work_mib=100), 3, 600 << 20) == (300 << 20, 100 << 20)
    told = "a cache of 301 MiB and 3 computations of 100 MiB take more than the 600 MiB that this process may use"
    with pytest.raises(ConfigError, match=told):
        memory_of(ServeOptions(cache_mib=301, work_mib=100), 3, 600 << 20)


def test_the_graphs_can_be_left_out() -> None:
    for v2 in (True, False):
        with in_service(STORED, replace(SMALL, v2=v2)) as app:
            assert any(str(getattr(route, "path", "")).startswith("/v2") for route in app.routes) == v2
