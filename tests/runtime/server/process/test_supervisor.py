"""Processes that serve together: real ones, which are killed, swapped, and share what they know of users."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from answers import STORED
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from served_process import HISTORY, Running, started
from twin_bundle import twin

from unipinrec.cli import main
from unipinrec.runtime.server.process.lifecycle import Worker
from unipinrec.runtime.server.process.peers import Peers

COUNT, NOW_MS = 2, 1_000_000
TOGETHER = ("--processes", str(COUNT))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("together")
    with started(*TOGETHER, "--state", folder / "state", "--traces") as running:
        all_up(running)
        yield running


def samples(running: Running, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    families = text_string_to_metric_families(text)
    return {
        tuple(sorted(one.labels.items())): one.value
        for family in families
        for one in family.samples
        if one.name == name
    }


def by_process(running: Running, name: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for labels, value in samples(running, name).items():
        process = dict(labels)["process"]
        found[process] = found.get(process, 0.0) + value
    return found


def eventually(reached: Callable[[], bool], seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < limit
        time.sleep(0.05)


def all_up(running: Running) -> None:
    def up() -> bool:
        assert running.process.poll() is None, "".join(running.lines)
        with suppress(OSError, http.client.HTTPException):
            return list(samples(running, "unipinrec_process_up").values()) == [1.0] * COUNT
        return False

    eventually(up)


def children(running: Running) -> list[int]:
    pid = running.process.pid
    found = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [one for one in found if b"resource_tracker" not in Path(f"/proc/{one}/cmdline").read_bytes()]


def known_user(running: Running, name: str, events: int = 3) -> None:
    sent = [{"item": f"item-{at}", "actions": ["click"], "timestamp_ms": 1_000 + at} for at in range(events)]
    assert running.ask("POST", "/v1/events", {"user": name, "events": sent})[0] == 200


def owner(name: str, folder: Path = Path()) -> int:
    with socket.socket() as listener:
        return Peers(worker=Worker(index=0, count=COUNT, folder=folder, listener=listener)).owner(name)


def user_of(process: int, prefix: str) -> str:
    return next(name for name in (f"{prefix}-{n}" for n in range(100)) if owner(name) == process)


def test_what_is_cached_of_a_user_is_in_one_process_wherever_requests_arrive(together: Running) -> None:
    for process in range(COUNT):
        user = user_of(process, "cached")
        known_user(together, user)
        before = by_process(together, "unipinrec_slates_total")
        asked: list[tuple[str, dict[str, Any]]] = [("recommend", {"k": 3}), ("rank", {"items": ["item-5", "item-6"]})]
        answers = [
            together.ask("POST", f"/v1/{path}", {"user": user, "now_ms": NOW_MS, **body}) for path, body in asked * 8
        ]
        assert [status for status, _ in answers] == [200] * 16
        assert [answer["kv"] for _, answer in answers] == ["miss"] + ["hit"] * 15
        assert [len({json.dumps(answer["items"]) for _, answer in answers[kind::2]}) for kind in (0, 1)] == [1, 1]
        after = by_process(together, "unipinrec_slates_total")
        gained = {name: after[name] - before.get(name, 0) for name in after}
        assert gained[str(process)] == 16
        assert sum(gained.values()) == 16


def test_requests_reach_every_process_and_each_is_counted_once(together: Running) -> None:
    user = user_of(0, "counted")
    known_user(together, user)

    def arrived() -> bool:
        assert together.ask("POST", "/v1/recommend", {"user": user, "k": 1})[0] == 200
        handed = samples(together, "unipinrec_handed_over_total")
        return any(dict(labels)["process"] == "1" and dict(labels)["owner"] == "0" for labels in handed)

    eventually(arrived)
    answered = samples(together, "unipinrec_http_requests_total")
    paths = {("endpoint", "/v1/recommend"), ("endpoint", "/v1/rank")}
    recommended = [v for labels, v in answered.items() if paths.intersection(labels)]
    slates = by_process(together, "unipinrec_slates_total")
    assert sum(recommended) == sum(slates.values())


def test_an_event_that_one_process_took_is_in_the_next_answer_of_another(together: Running) -> None:
    for round_ in range(8):
        user = f"fresh-{round_}"
        for events in range(1, 4):
            known_user(together, user, events)
            sent = [{"item": f"item-{events}", "actions": ["click"], "timestamp_ms": 5_000 + events}]
            known = together.ask("POST", "/v1/events", {"user": user, "events": sent})[1]["events"]
            status, answer = together.ask("POST", "/v1/recommend", {"user": user, "k": 1})
            assert (status, answer["events"]) == (200, known)


def test_a_list_a_history_and_what_is_wrong_are_answered_where_they_arrive(together: Running) -> None:
    known_user(together, "listed")
    for _ in range(6):
        status, answers = together.ask(
            "POST", "/v1/recommend", [{"user": "listed"}, {"history": HISTORY}, {"user": "x"}]
        )
        assert status == 200
        assert [len(answer.get("items", ())) for answer in answers] == [20, 20, 0]
        assert together.ask("POST", "/v1/recommend", {"history": HISTORY, "k": 2})[0] == 200
        assert together.ask("POST", "/v1/recommend", {"user": 7.5})[0] == 400
        assert together.ask("POST", "/v1/recommend", {"user": "nobody"})[0] == 422
        assert together.ask("GET", "/health/ready")[1]["status"] == "ready"


def test_who_is_forgotten_is_forgotten_by_all(together: Running) -> None:
    for process in range(COUNT):
        user = user_of(process, "forgotten")
        for _ in range(4):
            known_user(together, user)
            assert together.ask("POST", "/v1/recommend", {"user": user, "k": 1})[1]["kv"] == "miss"
            status, said = together.ask("DELETE", f"/v1/users/{user}")
            assert (status, said) == (200, {"user": user, "events": 3, "cached": True})
            assert together.ask("GET", f"/v1/users/{user}")[0] == 404


def test_a_request_keeps_its_id_its_trace_and_its_deadline(together: Running) -> None:
    for process in range(COUNT):
        user = user_of(process, "traced")
        known_user(together, user)
        for attempt in range(4):
            connection = http.client.HTTPConnection("127.0.0.1", together.port, timeout=20)
            headers = {"X-Trace": "1", "X-Request-Id": f"id-{process}-{attempt}"}
            connection.request("POST", "/v1/recommend", json.dumps({"user": user, "k": 1}), headers)
            answer = connection.getresponse()
            answer.read()
            connection.close()
            assert answer.getheader("x-request-id") == f"id-{process}-{attempt}"
            status, trace = together.ask("GET", str(answer.getheader("x-trace")))
            assert status == 200
            names = {one["name"] for one in trace["traceEvents"]}
            assert {"queue", "encode", "retrieve", "rank"} <= names
    assert together.ask("GET", "/debug/traces/0000000000000000")[0] == 404
    lines = [line for line in together.lines if "id-0-0" in line]
    assert len(lines) == 1
    assert "[0]" in lines[0]


def test_metrics_of_all_are_one_valid_scrape(together: Running) -> None:
    assert samples(together, "unipinrec_process_up") == {(("process", "0"),): 1.0, (("process", "1"),): 1.0}
    assert set(by_process(together, "process_resident_memory_bytes")) == {"0", "1"}
    connection = http.client.HTTPConnection("127.0.0.1", together.port, timeout=20)
    connection.request("GET", "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    text = connection.getresponse().read().decode()
    connection.close()
    assert text.endswith("# EOF\n")
    lines = text.splitlines()
    types = [line for line in lines if line.startswith("# TYPE")]
    assert len(types) == len(set(types))


def test_a_process_that_is_killed_is_replaced_and_no_answer_is_wrong(tmp_path: Path) -> None:
    with started(*TOGETHER, "--state", tmp_path) as running:
        all_up(running)
        users = [f"user-{n}" for n in range(12)]
        for user in users:
            known_user(running, user)
        expected = {
            user: running.ask("POST", "/v1/recommend", {"user": user, "k": 5, "now_ms": NOW_MS})[1]["items"]
            for user in users
        }
        ended, outcomes = threading.Event(), list[str]()

        def ask() -> None:
            while not ended.is_set():
                for user in users:
                    try:
                        status, answer = running.ask("POST", "/v1/recommend", {"user": user, "k": 5, "now_ms": NOW_MS})
                    except (OSError, http.client.HTTPException) as error:
                        outcomes.append(type(error).__name__)
                    else:
                        right = status == 200 and close(answer["items"], expected[user])
                        outcomes.append("right" if right else f"{status} {answer}")

        clients = [threading.Thread(target=ask) for _ in range(3)]
        for client in clients:
            client.start()
        for victim in children(running):
            seen = len(outcomes)
            os.kill(victim, signal.SIGKILL)
            running.until("was ended by SIGKILL")
            eventually(lambda seen=seen: len(outcomes) > seen + 30)  # type: ignore[misc]  # a lambda that binds
            all_up(running)
        ended.set()
        for client in clients:
            client.join(20)
        assert len(children(running)) == COUNT
        broken = [outcome for outcome in outcomes if outcome != "right"]
        assert len(broken) <= 2 * len(clients)  # what was on its way to the victim
        assert set(broken) <= {"ConnectionResetError", "RemoteDisconnected", "BrokenPipeError"}
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0


def test_what_serves_does_not_change_with_its_folder_and_is_in_memory_once(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(STORED, tmp_path / "bundle"))
    other = twin(tmp_path / "other", seed=5)
    asked = {"history": [{"item": "item-1", "actions": ["click"]}], "k": 5, "now_ms": NOW_MS}
    with started(*TOGETHER, "--state", tmp_path / "state", bundle=folder) as running:
        all_up(running)
        before = running.ask("POST", "/v1/recommend", asked)[1]["items"]
        for path in folder.iterdir():
            with path.open("r+b") as file:
                file.write((other / path.name).read_bytes())
        for _ in range(10):
            status, answer = running.ask("POST", "/v1/recommend", asked)
            assert (status, answer["items"]) == (200, before)
        os.truncate(folder / "items.safetensors", 0)
        os.truncate(folder / "ranker.onnx", 0)
        shutil.rmtree(folder)
        assert running.ask("POST", "/v1/recommend", asked)[1]["items"] == before
        assert running.ask("GET", "/health/ready")[0] == 200
        maps = [Path(f"/proc/{pid}/maps").read_text().splitlines() for pid in children(running)]
        items = [{line.split()[4] for line in lines if "memfd:items.safetensors" in line} for lines in maps]
        assert len(items) == COUNT
        assert len(set.union(*items)) == 1
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0


def test_a_process_that_stands_still_is_replaced(tmp_path: Path) -> None:
    with started(*TOGETHER, "--state", tmp_path, "--hung-s", "2", "--deadline-ms", "500") as running:
        all_up(running)
        user, (victim, other) = user_of(0, "waiting"), children(running)
        known_user(running, user)
        os.kill(victim, signal.SIGSTOP)
        assert running.ask("POST", "/v1/recommend", {"user": user, "k": 1})[0] == 504
        running.until("process 0 has stood still for 2 s; it is killed")
        running.until("process 0 was ended by SIGKILL")
        all_up(running)
        assert other in children(running)
        assert running.ask("POST", "/v1/recommend", {"user": user, "k": 1})[0] == 200


def test_processes_are_not_blamed_for_a_time_in_which_their_parent_stood_still(tmp_path: Path) -> None:
    with started(*TOGETHER, "--state", tmp_path, "--hung-s", "2") as running:
        all_up(running)
        before = children(running)
        for pid in (running.process.pid, *before):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(4)
        os.kill(running.process.pid, signal.SIGCONT)
        time.sleep(0.5)
        for pid in before:
            os.kill(pid, signal.SIGCONT)
        time.sleep(3)
        all_up(running)
        assert children(running) == before


def close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    pairs = list(zip(found, expected, strict=True))
    return all(a["item"] == b["item"] and abs(a["score"] - b["score"]) < 1e-4 for a, b in pairs)


def test_all_swap_to_what_current_json_names_and_start_again_with_it(tmp_path: Path) -> None:
    bundles = tmp_path / "bundles"
    bundles.mkdir()
    for seed, name in enumerate(("a", "b")):
        twin(bundles / name, seed)
    current = bundles / "current.json"

    def swap(name: str) -> None:
        (tmp_path / "new.json").write_text(json.dumps({"bundle": name}))
        (tmp_path / "new.json").replace(current)

    def serving() -> list[str]:
        return [dict(labels)["bundle"] for labels in samples(running, "unipinrec_serving_info")]

    swap("a")
    options = ("--state", tmp_path / "state", "--watch", "--drain-delay-s", "0")
    with started(*TOGETHER, *options, bundle=bundles / "a") as running:
        all_up(running)
        assert serving() == ["a", "a"]
        swap("b")
        eventually(lambda: serving() == ["b", "b"])
        os.kill(children(running)[0], signal.SIGKILL)
        running.until("was ended by SIGKILL")
        all_up(running)
        assert serving() == ["b", "b"]


def test_a_bundle_that_all_refused_keeps_no_process_from_starting_again(tmp_path: Path) -> None:
    bundles = tmp_path / "bundles"
    bundles.mkdir()
    twin(bundles / "a", 0)
    shutil.copytree(bundles / "a", bundles / "broken")
    (bundles / "broken" / "items.safetensors").write_bytes(b"nothing")
    manifest = bundles / "broken" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    options = ("--state", tmp_path / "state", "--watch")
    with started(*TOGETHER, *options, bundle=bundles / "a") as running:
        all_up(running)
        (bundles / "current.json").write_text('{"bundle": "broken"}')
        eventually(lambda: sum(samples(running, "unipinrec_swaps_total").values()) >= COUNT)
        assert {dict(labels)["result"] for labels in samples(running, "unipinrec_swaps_total")} == {"refused"}
        for victim in children(running):
            os.kill(victim, signal.SIGKILL)
        eventually(lambda: len(running.found("the last active one is used")) == COUNT)
        all_up(running)
        serving = [dict(labels)["bundle"] for labels in samples(running, "unipinrec_serving_info")]
        assert serving == ["a", "a"]


def test_without_their_parent_they_end_and_leave_the_port_free(tmp_path: Path) -> None:
    with started(*TOGETHER, "--state", tmp_path) as running:
        all_up(running)
        orphans = children(running)
        running.process.kill()
        running.process.wait(20)
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans), 20)
        with socket.create_server(("127.0.0.1", running.port)):
            pass


def test_ctrl_c_ends_all_at_once(tmp_path: Path) -> None:
    with started(*TOGETHER, "--state", tmp_path, "--drain-delay-s", "60") as running:
        all_up(running)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(20) == 0
        assert "Traceback" not in "".join(running.lines)


def test_a_bundle_that_cannot_be_served_ends_the_start(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(STORED, broken)
    (broken / "items.safetensors").write_bytes(b"nothing")
    command = [sys.executable, "-m", "unipinrec", "serve", str(broken), *TOGETHER, "--state", str(tmp_path / "state")]
    done = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "items.safetensors" in done.stderr
    assert "ended with exit code 1 before it was ready" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "2 processes need a --state"),
        (("--state", "s", "--admin-token-env", "TOKEN"), "swap by --watch, not by /admin"),
    ],
)
def test_what_processes_cannot_share_is_refused(options: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(main, ["serve", str(STORED), *TOGETHER, *options])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_a_temporary_folder_that_cannot_hold_sockets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    words = ["serve", str(STORED), *TOGETHER, "--port", "0", "--state", str(tmp_path / "state")]
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert "is too long for the path of a socket; set TMPDIR to a shorter folder" in result.output
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert "several processes need a folder for their sockets" in result.output


def test_sigterm_during_the_start_is_no_fault(tmp_path: Path) -> None:
    with started(*TOGETHER, "--state", tmp_path) as running:
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0
        assert "Traceback" not in "".join(running.lines)
