"""The log of recommendations: whole, bounded, and never in the way of an answer."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import polars as pl
import pytest
from answers import STORED
from live_server import deployed
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from served_process import HISTORY, Running, started
from starlette.testclient import TestClient

from unipinrec.errors import ConfigError
from unipinrec.models.data.served import SCHEMA
from unipinrec.runtime.requests import Slate, SlateItem, StageTimes
from unipinrec.runtime.server.app import make_app, make_server
from unipinrec.runtime.server.bodies import RecommendBody
from unipinrec.runtime.server.call import Call
from unipinrec.runtime.server.observe import served_log as server_served_log
from unipinrec.runtime.server.observe.served_log import COLUMNS, ServedLog, ServedLogOptions

AT = 1_760_000_000_000


def slate(*items: str, **fields: Any) -> Slate:
    """Items with scores 1, 1/2, 1/3, ..."""
    listed = tuple(
        SlateItem(
            item=item,
            title=None,
            score=1 / index,
            actions={},
            retrieval_score=0.0,
            value=fields.get("value"),
            source="retrieval",
        )
        for index, item in enumerate(items, 1)
    )
    times = StageTimes(encode=0.0, retrieve=0.0, rank=0.0, total=0.0)
    return Slate(
        source="model",
        order="value",
        items=listed,
        stages_ms=times,
        kv="miss",
        kv_reason=None,
        device="cpu",
        bundle="b" * 64,
        exact=None,
        unknown=(),
    )


def call(request_id: str, *items: str, user: str | None = "ann", now_ms: int | None = AT) -> Call:
    body = RecommendBody(sent_user=user, now_ms=now_ms, surface="home")
    made = Call(request=cast(Any, None), id=request_id, route="/v1/recommend", began=0.0, deadline=0.0)
    made.slates.append(slate(*items))
    made.requests = {request_id: body}
    return made


def rows(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(sorted(folder.glob("*.parquet")))


def eventually(reached: Callable[[], bool], seconds: float = 20.0) -> None:
    limit = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., ServedLog]]:
    logs = []

    def open_log(**options: Any) -> ServedLog:
        logs.append(ServedLog(ServedLogOptions(folder=tmp_path, **options)))
        return logs[-1]

    yield open_log
    for one in logs:
        one.close()


def test_the_rows_of_an_answer(opened: Callable[..., ServedLog], tmp_path: Path) -> None:
    log = opened()
    log.observe(call("r-1", "a", "b"))
    before = time.time_ns() // 1_000_000
    log.observe(call("r-2", "c", user=None, now_ms=None))
    log.close()
    found = rows(tmp_path)
    assert found.schema == SCHEMA == pl.Schema({name: getattr(pl, kind) for name, kind in COLUMNS.items()})
    home = ("model", "home", "b" * 64)
    assert found.rows()[:2] == [
        ("r-1", "ann", "a", 0, 1.0, None, *home, AT),
        ("r-1", "ann", "b", 1, 0.5, None, *home, AT),
    ]
    assert found.rows()[2][:-1] == ("r-2", None, "c", 0, 1.0, None, *home)
    assert before <= found["timestamp_ms"][2] <= time.time_ns() // 1_000_000
    assert not list(tmp_path.glob(".*"))


def test_a_call_that_recommended_nothing_leaves_no_file(opened: Callable[..., ServedLog], tmp_path: Path) -> None:
    log = opened()
    refused = call("r-1", "a")
    refused.slates.clear()
    refused.requests.clear()
    log.observe(refused)
    log.observe(call("r-2"))
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_client_only_ranked_is_not_logged(opened: Callable[..., ServedLog], tmp_path: Path) -> None:
    log = opened()
    ranked = call("r-1", "a")
    ranked.requests.clear()
    log.observe(ranked)
    log.observe(call("r-2", "b"))
    log.close()
    assert rows(tmp_path)["request_id"].to_list() == ["r-2"]


def test_the_value_of_an_item_is_logged_where_there_is_one(opened: Callable[..., ServedLog], tmp_path: Path) -> None:
    log, made = opened(), call("r-1", "a")
    made.slates[:] = [slate("a", value=0.25)]
    log.observe(made)
    log.close()
    assert rows(tmp_path)["value"].to_list() == [0.25]


def test_a_file_is_written_when_its_rows_are_there_and_when_its_time_has_come(
    opened: Callable[..., ServedLog], tmp_path: Path
) -> None:
    many = opened(file_rows=4)
    many.observe(call("r-1", "a", "b"))
    time.sleep(0.1)
    assert not list(tmp_path.glob("*.parquet"))
    many.observe(call("r-2", "a", "b"))
    eventually(lambda: many.rows["written"] == 4)
    soon = opened(file_s=0.05)
    soon.observe(call("r-3", "a"))
    eventually(lambda: soon.rows["written"] == 1)
    assert len(list(tmp_path.glob("*.parquet"))) == 2  # of distinct names, though the process is the same
    assert sorted(rows(tmp_path)["request_id"].unique()) == ["r-1", "r-2", "r-3"]


def test_more_answers_than_a_chunk_keep_their_order(opened: Callable[..., ServedLog], tmp_path: Path) -> None:
    log = opened()
    for number in range(900):
        log.observe(call(f"r-{number}", "a", "b", "c"))
    log.close()
    found = rows(tmp_path)
    assert found["request_id"].to_list() == [f"r-{number}" for number in range(900) for _ in "abc"]
    assert found["position"].to_list() == [0, 1, 2] * 900


def stall(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the writer stand still in its file, until what is returned is called."""
    go_on, write = threading.Event(), server_served_log._parquet

    def wait(answers: Any) -> bytes:
        assert go_on.wait(20)
        return write(answers)

    monkeypatch.setattr(server_served_log, "_parquet", wait)
    return go_on.set


def test_a_full_queue_drops_counts_and_says_so_once(
    opened: Callable[..., ServedLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "unipinrec")
    go_on = stall(monkeypatch)
    log = opened(file_rows=2, queue_rows=4)
    began = time.perf_counter()
    for number in range(100):
        log.observe(call(f"r-{number}", "a", "b"))
    assert time.perf_counter() - began < 1  # while the writer stands still
    go_on()
    log.close()
    assert log.rows == {"written": 4, "queue_full": 196, "write_failed": 0}
    assert rows(tmp_path)["request_id"].unique(maintain_order=True).to_list() == ["r-0", "r-1"]
    assert [one.message for one in caplog.records] == [
        "log of recommendations: 196 rows were lost as the queue was full, 0 as they were not written"
    ]
    text = _scraped(log)
    assert 'unipinrec_served_log_rows_total{result="queue_full"} 196.0' in text
    assert 'unipinrec_served_log_rows_total{result="written"} 4.0' in text


def _scraped(log: ServedLog) -> str:
    registry = CollectorRegistry()
    registry.register(log)
    return generate_latest(registry).decode()


def test_the_oldest_files_make_room(
    opened: Callable[..., ServedLog], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "unipinrec")
    (tmp_path / "mine.parquet").write_bytes(bytes(1 << 20))  # not of this log: neither counted nor removed
    probe = opened(file_rows=1)
    probe.observe(call("r-0", "a"))
    eventually(lambda: probe.rows["written"] == 1)
    size = next(tmp_path.glob("served-*")).stat().st_size
    log = opened(file_rows=1, total_bytes=3 * size + size // 2)
    for number in range(1, 8):
        log.observe(call(f"r-{number}", "a"))
        eventually(lambda number=number: log.rows["written"] == number)  # type: ignore[misc]
    log.close()
    left = sorted(tmp_path.glob("served-*"))
    assert pl.read_parquet(left)["request_id"].to_list() == ["r-5", "r-6", "r-7"]
    assert log.files_removed == 5
    assert (tmp_path / "mine.parquet").exists()
    assert "unipinrec_served_log_files_removed_total 5.0" in _scraped(log)
    assert any("removed the oldest, served-" in one.message for one in caplog.records)


def test_files_that_cannot_be_removed_are_told(
    opened: Callable[..., ServedLog], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "served-0.parquet").mkdir()  # which no user can remove as a file
    log = opened(total_bytes=1)
    log.observe(call("r-1", "a"))
    log.close()
    assert log.rows == {"written": 1, "queue_full": 0, "write_failed": 0}
    assert "served-0.parquet cannot be removed: " in caplog.text


def test_a_file_that_alone_is_more_than_the_bound_is_kept(opened: Callable[..., ServedLog], tmp_path: Path) -> None:
    log = opened(total_bytes=1)
    log.observe(call("r-1", "a"))
    log.close()
    assert rows(tmp_path)["request_id"].to_list() == ["r-1"]


def test_a_folder_that_is_lost_is_told_and_serving_and_logging_go_on(
    opened: Callable[..., ServedLog], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "unipinrec")
    folder = tmp_path / "lost"
    log = ServedLog(ServedLogOptions(folder=folder, file_rows=1))
    folder.rmdir()
    log.observe(call("r-1", "a"))
    eventually(lambda: log.rows["write_failed"] == 1)
    log.observe(call("r-2", "a"))
    eventually(lambda: log.rows["write_failed"] == 2)
    folder.mkdir()
    log.observe(call("r-3", "a"))
    log.close()
    assert rows(folder)["request_id"].to_list() == ["r-3"]
    soon, last = (one.message for one in caplog.records)  # the second loss came within the same minute
    assert "0 rows were lost as the queue was full, 1 as they were not written (FileNotFoundError" in soon
    assert "2 as they were not written" in last


def test_a_full_disk_leaves_no_half_file(
    opened: Callable[..., ServedLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(file_rows=1)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    log.observe(call("r-1", "a"))
    eventually(lambda: log.rows["write_failed"] == 1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/log cannot be written: .*give a folder that this user may write"):
        ServedLog(ServedLogOptions(folder=tmp_path / "file" / "log"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file_rows": 0}, "file_rows=0 must be from 1 to queue_rows=200000"),
        ({"file_rows": 9, "queue_rows": 8}, "file_rows=9 must be from 1 to queue_rows=8"),
        ({"total_bytes": 0}, "total_bytes=0 must be more than 0"),
        ({"file_s": -1.0}, "file_s=-1.0 must be more than 0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ServedLogOptions(folder=tmp_path, **options)


def test_what_killed_processes_began_is_removed_when_it_is_old(
    opened: Callable[..., ServedLog], tmp_path: Path
) -> None:
    old, new = tmp_path / ".served-1.parquet.partial", tmp_path / ".served-2.parquet.partial"
    for path in (old, new):
        path.touch()
    os.utime(old, (1, 1))
    opened()
    assert [path.name for path in tmp_path.iterdir()] == [new.name]


KILLED = """
import sys, time, threading, os
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_served_log import call
from unipinrec.runtime.server.observe.served_log import ServedLog, ServedLogOptions
log = ServedLog(ServedLogOptions(folder=Path(sys.argv[1]), file_rows=200))
print("begins", flush=True)
for number in range(10**9):
    log.observe(call(f"r-{number}", "a", "b"))
    time.sleep(1e-5)
"""


def test_a_process_that_is_killed_leaves_whole_files_alone(tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for delay_s in (0.2, 0.33):
        with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay_s)
            process.kill()
    found = rows(tmp_path)  # every file can be read
    assert found.height > 200
    assert (found.group_by("request_id").len()["len"] % 2 == 0).all()


# With a server.


def test_a_list_has_an_id_for_each_element_and_errors_have_no_rows(twins: tuple[Path, Path], tmp_path: Path) -> None:
    log = ServedLog(ServedLogOptions(folder=tmp_path))
    with deployed(twins[0]) as deployments:
        server = make_server(deployments=deployments, observers=[log.observe])
        with TestClient(make_app(server)) as client:
            good = {"history": [{"item": "item-7", "actions": ["click"]}], "k": 2, "user": "ann"}
            sent = [good, {"user": "nobody"}, {**good, "user": "bob", "surface": "home", "k": 1}]
            answers = client.post("/v1/recommend", json=sent, headers={"x-request-id": "r-1"}).json()
            client.post("/v1/recommend", json=good, headers={"x-request-id": "r-2"})
            assert client.post("/v1/recommend", json={**good, "k": 0}).status_code == 400
    log.close()
    assert rows(tmp_path).select("request_id", "user", "surface", "position", "item").rows() == [
        ("r-1/0", "ann", "unknown", 0, answers[0]["items"][0]["item"]),
        ("r-1/0", "ann", "unknown", 1, answers[0]["items"][1]["item"]),
        ("r-1/2", "bob", "home", 0, answers[2]["items"][0]["item"]),
        ("r-2", "ann", "unknown", 0, answers[0]["items"][0]["item"]),
        ("r-2", "ann", "unknown", 1, answers[0]["items"][1]["item"]),
    ]
    assert rows(tmp_path)["score"].to_list()[0] == answers[0]["items"][0]["score"]
    assert set(rows(tmp_path)["bundle"]) == {answers[0]["bundle"]}


def _end(running: Running) -> None:
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(30) == 0, "".join(running.lines)


def _metric(running: Running, name: str) -> list[float]:
    """Its values in all processes; none while nobody answers."""
    assert running.process.poll() is None, "".join(running.lines)
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{running.port}/metrics", timeout=20) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return [one.value for family in families for one in family.samples if one.name == name]
    return []


def test_a_server_writes_the_rest_as_it_ends_and_counts(tmp_path: Path) -> None:
    with started("--log-served", tmp_path / "served") as running:
        running.ready()
        status, answer = running.ask("POST", "/v1/recommend", {"user": "ann", "history": HISTORY, "k": 3})
        assert status == 200
        assert running.found("users' ids included")
        _end(running)
    found = rows(tmp_path / "served")
    assert found["item"].to_list() == [item["item"] for item in answer["items"]]
    assert found["user"].to_list() == ["ann"] * 3


def test_processes_share_a_folder_and_each_answer_is_logged_once(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    with started("--processes", "2", "--state", tmp_path / "state", "--log-served", folder) as running:
        eventually(lambda: _metric(running, "unipinrec_process_up") == [1.0, 1.0], 120)
        users = [f"user-{number}" for number in range(20)]
        for user in users:
            assert running.ask("POST", "/v1/recommend", {"user": user, "history": HISTORY, "k": 2})[0] == 200
        assert _metric(running, "unipinrec_served_log_files_removed_total") == [0.0, 0.0]
        _end(running)
    found = rows(folder)
    assert sorted(found["user"]) == sorted(users * 2)
    assert found["request_id"].n_unique() == 20
    names = [path.name for path in folder.iterdir()]
    assert len(names) == 2, names  # a user has one process, which alone logs them
    assert len({name.split("-")[2] for name in names}) == 2  # the id of the process


def test_without_polars_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'polars':\n"
        "            raise ModuleNotFoundError('no polars', name='polars')\n"
        "sys.meta_path.insert(0, Block())\n"
        "from unipinrec.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    words = [sys.executable, "-c", code, "serve", str(STORED), "--port", "0", "--log-served", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert json.loads(done.stderr.splitlines()[-1])["message"] == (
        "--log-served writes Parquet with polars, which is not installed; run pip install 'unipinrec[log]', or leave "
        "--log-served out"
    )
