from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest
from click.testing import CliRunner, Result
from served_process import Running, started

from unipinrec.cli import main
from unipinrec.export import warm_state
from unipinrec.export.lists.prepared import PreparedHistories
from unipinrec.models.data.schema import read_dataset, write_dataset
from unipinrec.runtime.requests import SOON_MS, Event
from unipinrec.runtime.serve import open_store
from unipinrec.runtime.server.events.store import Append, StoredEvent, StoreLimits


def run(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["state", *(str(word) for word in words)])
    assert result.exit_code == code, result.output
    return result


def loaded(*words: str | Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run("load", *words, "--json").stdout)
    return document


@pytest.fixture(scope="module")
def histories(dataset: Path) -> dict[str, tuple[Event, ...]]:
    prepared = PreparedHistories.open(dataset)
    return {user: events for part in prepared.parts(50, 10_000) for user, events in prepared.read(part)}


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "state")
    shared = str(request.getfixturevalue("redis_url"))
    import redis

    redis.Redis.from_url(shared).flushall()
    return shared


def post(server: Running, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    status, answers = server.ask("POST", "/v1/recommend", bodies)
    assert status == 200, answers
    return list(answers)


def test_a_server_answers_every_user_as_if_the_history_was_sent(
    lively: Path, dataset: Path, histories: dict[str, tuple[Event, ...]], url: str
) -> None:
    longest = max(map(len, histories.values()))
    document = loaded(dataset, "--state", url, "--bundle", lively, "--kept-events", str(longest))
    events = sum(map(len, histories.values()))
    assert (document["users"], document["events"], document["appended"]) == (len(histories), events, events)
    assert (document["left_out"], document["unknown"]) == (0, {})
    assert document["events_per_s"] > 0
    users = sorted(histories)
    first: dict[str, list[str]] = {}
    for _ in range(2):  # the second process starts where the first one was killed
        with started("--state", url, "--cache-mib", "8", bundle=lively) as server:
            server.ready()
            for begin in range(0, len(users), 50):
                some = users[begin : begin + 50]
                common = [{"k": 5, "now_ms": _soon_after(histories[user])} for user in some]
                sent = [
                    {"history": [_as_json(event) for event in histories[user]], **rest}
                    for user, rest in zip(some, common, strict=True)
                ]
                with_history = post(server, sent)
                warm = post(server, [{"user": user, **rest} for user, rest in zip(some, common, strict=True)])
                for user, answer, expected in zip(some, warm, with_history, strict=True):
                    assert answer["source"] == "model"
                    assert answer["events"] == len(histories[user])
                    names = [item["item"] for item in answer["items"]]
                    assert names == [item["item"] for item in expected["items"]] == first.setdefault(user, names)
                    assert [item["score"] for item in answer["items"]] == pytest.approx(
                        [item["score"] for item in expected["items"]], abs=1e-2
                    )  # the cache of known users rounds to int8
    assert len({tuple(names) for names in first.values()}) > len(users) / 2


def _soon_after(events: tuple[Event, ...]) -> int:
    assert events[-1].timestamp_ms is not None
    return events[-1].timestamp_ms + SOON_MS


def _as_json(event: Event) -> dict[str, Any]:
    return {"item": event.item, "actions": event.actions, "surface": event.surface, "timestamp_ms": event.timestamp_ms}


def test_to_load_twice_changes_nothing(dataset: Path, url: str) -> None:
    first = loaded(dataset, "--state", url, "--kept-events", "20")
    before = run("export", "--state", url).stdout
    again = loaded(dataset, "--state", url, "--kept-events", "20")
    assert first["appended"] == again["known"] > 0
    assert (again["appended"], again["dropped"], again["left_out"]) == (0, 0, first["left_out"])
    assert run("export", "--state", url).stdout == before


KILLED = """
import os, signal, sys
from unipinrec.cli import main
from unipinrec.export import warm_state
from unipinrec.export import warm_state
warm_state.USERS, load = 8, warm_state.load_histories
def killed(histories, store, kept, on_part):
    def part(events):
        on_part(events)
        if events > histories.starts[-1] // 2:
            os.kill(os.getpid(), signal.SIGKILL)
    return load(histories, store, kept, part)
warm_state.load_histories = killed
main(sys.argv[1:])
"""


def test_a_load_that_was_killed_goes_on(dataset: Path, url: str, tmp_path: Path) -> None:
    words = ["state", "load", str(dataset), "--state", url]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    half = run("export", "--state", url).stdout.splitlines()
    expected = loaded(dataset, "--state", tmp_path / "expected")
    document = loaded(dataset, "--state", url)
    assert document["known"] == sum(len(json.loads(line)["events"]) for line in half)
    assert document["known"] > expected["events"] / 4
    assert document["appended"] == expected["appended"] - document["known"] > 0
    assert (document["left_out"], document["dropped"]) == (0, 0)
    assert run("export", "--state", url).stdout == run("export", "--state", tmp_path / "expected").stdout


def test_progress_counts_the_events(
    dataset: Path, histories: dict[str, tuple[Event, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_state, "USERS", 40)
    events, parts = sum(map(len, histories.values())), list[int]()
    store = open_store(str(tmp_path / "state"), StoreLimits(events=1_000))
    warm_state.load_histories(PreparedHistories.open(dataset), store, 1_000, parts.append)
    store.close()
    assert (len(parts), parts) == (-(-len(histories) // 40), sorted(set(parts)))
    assert parts[-1] == events
    assert f"{events}/{events}" in run("load", dataset, "--state", tmp_path / "again").stderr


def test_the_newest_events_are_kept_and_told(
    dataset: Path, histories: dict[str, tuple[Event, ...]], tmp_path: Path
) -> None:
    state = tmp_path / "state"
    result = run("load", dataset, "--state", state, "--kept-events", "5")
    left_out = sum(max(0, len(events) - 5) for events in histories.values())
    assert left_out > 0
    assert f"{left_out} older ones left out" in result.stdout
    assert "(at most 5 events per user)" in result.stdout
    lines = [json.loads(line) for line in run("export", "--state", state).stdout.splitlines()]
    assert [line["user"] for line in lines] == sorted(histories)
    for line in lines:
        assert [event["item"] for event in line["events"]] == [event.item for event in histories[line["user"]][-5:]]


def test_events_that_went_for_newer_ones_do_not_come_back(dataset: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    loaded(dataset, "--state", state, "--kept-events", "8")
    user = PreparedHistories.open(dataset).users[0]
    store = open_store(str(state), StoreLimits(events=8))
    live = tuple(StoredEvent(item="new", actions=(), timestamp_ms=2 * 10**12 + at) for at in range(3))
    (receipt,) = store.append([Append(user=user, events=live)], 2 * 10**12).result()
    assert receipt.dropped > 0
    store.close()
    before = run("show", user, "--state", state).stdout
    again = loaded(dataset, "--state", state, "--kept-events", "8")
    assert (again["appended"], again["dropped"]) == (0, 0)
    assert run("show", user, "--state", state).stdout == before


def test_newer_data_adds_its_new_events(dataset: Path, tmp_path: Path) -> None:
    state, whole = tmp_path / "state", read_dataset(dataset)
    older = whole.events.filter(pl.int_range(pl.len()).over("user_id") < pl.len().over("user_id") - 2)
    write_dataset(replace(whole, events=older), tmp_path / "older")
    loaded(tmp_path / "older", "--state", state)
    document = loaded(dataset, "--state", state)
    assert document["appended"] == whole.events.height - older.height
    expected = tmp_path / "expected"
    loaded(dataset, "--state", expected)
    assert run("export", "--state", state).stdout == run("export", "--state", expected).stdout


def test_equal_events_are_all_kept(dataset: Path, tmp_path: Path) -> None:
    whole = read_dataset(dataset)
    event = whole.events.head(1)
    write_dataset(replace(whole, events=pl.concat([event] * 3)), tmp_path / "thrice")
    for appended in (3, 0):
        assert loaded(tmp_path / "thrice", "--state", tmp_path / "state")["appended"] == appended


def test_show_and_forget_a_user(dataset: Path, histories: dict[str, tuple[Event, ...]], url: str) -> None:
    loaded(dataset, "--state", url)
    user, other = sorted(histories)[:2]
    shown = json.loads(run("show", user, "--state", url).stdout)
    assert shown["user"] == user
    assert [{**event, "id": None} for event in shown["events"]] == [
        {**_as_json(event), "actions": list(event.actions), "id": None} for event in histories[user]
    ]
    assert f"{len(histories[user])} events of user '{user}' deleted" in run("forget", user, "--state", url).stdout
    assert f"user '{user}' has no events" in run("show", user, "--state", url, code=1).stderr
    assert json.loads(run("show", other, "--state", url).stdout)["events"]
    assert len(run("export", "--state", url).stdout.splitlines()) == len(histories) - 1


def test_what_a_bundle_does_not_know_is_told_and_kept(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    whole = read_dataset(dataset)
    foreign = whole.events.with_columns(
        item_id=pl.when(pl.int_range(pl.len()) == 0).then(pl.lit("strange")).otherwise("item_id"),
        action_like=pl.lit(True),
    )
    spec = msgspec.structs.replace(whole.spec, actions=(*whole.spec.actions, "like"))
    slates = whole.slates.with_columns(action_like=pl.lit(False))
    slates = slates.select(*(name for name in slates.columns if name != "position"), "position")
    write_dataset(replace(whole, spec=spec, events=foreign, slates=slates), tmp_path / "data")
    result = run("load", tmp_path / "data", "--state", tmp_path / "state", "--bundle", bundle)
    words = " ".join(result.stderr.split())
    assert "does not know 1 items of" in words
    assert "such as ['strange']; it skips them" in words
    assert "does not know 1 actions of" in words
    user = whole.events["user_id"][0]
    assert json.loads(run("show", user, "--state", tmp_path / "state").stdout)["events"][0]["item"] == "strange"


def test_more_users_than_the_server_keeps_are_refused(
    dataset: Path, histories: dict[str, tuple[Event, ...]], tmp_path: Path
) -> None:
    words = ("load", dataset, "--state", tmp_path / "state", "--max-users")
    refused = run(*words, str(len(histories) - 1), code=1)
    assert f"would have events of {len(histories)} users" in refused.stderr
    run(*words, str(len(histories)))


def test_a_folder_without_events_is_refused(tmp_path: Path) -> None:
    for words in (("show", "u"), ("forget", "u"), ("export",)):
        assert "holds no events.sqlite3" in run(*words, "--state", tmp_path, code=1).stderr
    assert not list(tmp_path.iterdir())


def test_users_whose_events_do_not_stand_together_are_refused(dataset: Path, tmp_path: Path) -> None:
    whole = read_dataset(dataset)
    write_dataset(replace(whole, events=pl.concat([whole.events.tail(1), whole.events])), tmp_path / "data")
    assert "do not stand together" in run("load", tmp_path / "data", "--state", tmp_path / "state", code=1).stderr
