from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result

from unipinrec.cli import main
from unipinrec.export.lists import all_users
from unipinrec.export.lists.all_users import COLUMNS
from unipinrec.export.lists.prepared import PreparedHistories
from unipinrec.models.data.schema import read_dataset, write_dataset
from unipinrec.models.simulator.simulator import simulate
from unipinrec.models.simulator.world import SimulatorConfig
from unipinrec.runtime import Recommender, RecommendOptions
from unipinrec.runtime.requests import SOON_MS, Event


def run(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["recommend-all", *(str(word) for word in words)])
    assert result.exit_code == code, result.output
    return result


def lists(path: Path) -> dict[str, pl.DataFrame]:
    frame = pl.read_parquet(path)
    assert dict(frame.schema) == COLUMNS
    return {user: rows for (user,), rows in frame.group_by("user", maintain_order=True)}


def assert_as_recommended(
    written: dict[str, pl.DataFrame], bundle: Path, histories: dict[str, tuple[Event, ...]]
) -> None:
    """The lists of seven at home are those of one call each."""
    assert list(written) == list(histories)
    with Recommender.load(bundle, "cpu") as recommender:
        for user, events in histories.items():
            assert events[-1].timestamp_ms is not None
            options = RecommendOptions(surface="home", now_ms=events[-1].timestamp_ms + SOON_MS)
            slate, rows = recommender.recommend(events, 7, options), written[user]
            assert rows["position"].to_list() == list(range(7))
            assert rows["item"].to_list() == [item.item for item in slate.items]
            assert rows["score"].to_list() == pytest.approx([item.score for item in slate.items], abs=1e-5)
            assert rows["source"].unique().to_list() == ["model"]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_users, "PART_USERS", 70)
    monkeypatch.setattr(all_users, "BATCH", 16)


@pytest.fixture(scope="module")
def histories(dataset: Path) -> dict[str, tuple[Event, ...]]:
    prepared = PreparedHistories.open(dataset)
    return {user: events for part in prepared.parts(50, 10_000) for user, events in prepared.read(part)}


def test_the_histories_are_those_of_the_data(dataset: Path, histories: dict[str, tuple[Event, ...]]) -> None:
    table = read_dataset(dataset).events
    assert list(histories) == table["user_id"].unique(maintain_order=True).to_list()
    sent = [(user, event) for user, events in histories.items() for event in events]
    for (user, event), row in zip(sent, table.iter_rows(named=True), strict=True):
        assert (user, event.item, event.surface, event.timestamp_ms) == (
            row["user_id"],
            row["item_id"],
            row["surface"],
            row["timestamp_ms"],
        )
        assert {f"action_{name}" for name in event.actions} == {name for name in row if row[name] is True}


def test_parts_are_bounded_and_hold_every_user_once(dataset: Path, histories: dict[str, tuple[Event, ...]]) -> None:
    prepared = PreparedHistories.open(dataset)
    longest = max(map(len, histories.values()))
    for users, events in ((7, 10**9), (1000, longest), (1, 1)):
        parts = prepared.parts(users, events)
        assert [user for part in parts for user in part] == list(range(len(histories)))
        for part in parts:
            assert len(part) <= users
            assert len(part) == 1 or prepared.starts[part.stop] - prepared.starts[part.start] <= events


@pytest.mark.usefixtures("small_parts")
def test_the_lists_are_those_of_recommend(
    lively: Path, dataset: Path, histories: dict[str, tuple[Event, ...]], tmp_path: Path
) -> None:
    out = tmp_path / "lists.parquet"
    document = json.loads(run(lively, dataset, "--out", out, "-k", "7", "--surface", "home", "--json").stdout)
    assert (document["users"], document["lists"], document["resumed"]) == (len(histories), len(histories), 0)
    assert document["users_per_s"] > 0
    assert_as_recommended(lists(out), lively, histories)
    assert os.listdir(tmp_path) == ["lists.parquet"]  # noqa: PTH208


@pytest.mark.slow
def test_the_lists_of_1000_users_are_those_of_recommend(lively: Path, tmp_path: Path) -> None:
    data, _ = simulate(SimulatorConfig(users=1_000, items=300, categories=6, seed=12))
    write_dataset(data, tmp_path / "data")
    histories = dict(PreparedHistories.open(tmp_path / "data").read(range(1_000)))
    assert len(histories) == 1_000
    run(lively, tmp_path / "data", "--out", tmp_path / "lists.parquet", "-k", "7", "--surface", "home")
    assert_as_recommended(lists(tmp_path / "lists.parquet"), lively, histories)


def test_filters_and_time_are_those_of_recommend(lively: Path, dataset: Path, tmp_path: Path) -> None:
    user, events = next(PreparedHistories.open(dataset).read(range(1)))
    (tmp_path / "allow.txt").write_text("\n".join(json.loads((lively / "item_ids.json").read_bytes())[:150]))
    words = ["-k", "5", "--allow", str(tmp_path / "allow.txt"), "--order", "value", "--now", str(2 * 10**12)]
    run(lively, dataset, "--out", tmp_path / "lists.parquet", *words)
    (tmp_path / "history.json").write_text(
        json.dumps(
            [
                {"item": one.item, "actions": one.actions, "surface": one.surface, "timestamp_ms": one.timestamp_ms}
                for one in events
            ]
        )
    )
    words = ["recommend", str(lively), "--history", str(tmp_path / "history.json"), *words, "--json"]
    alone: dict[str, Any] = json.loads(CliRunner().invoke(main, words).stdout)
    assert lists(tmp_path / "lists.parquet")[user]["item"].to_list() == [item["item"] for item in alone["items"]]


KILLED = """
import os, signal, sys
from unipinrec.cli import main
from unipinrec.export.lists import all_users
all_users.PART_USERS, all_users.BATCH = 70, 16
written = all_users._write
def write(path, frame):
    written(path, frame)
    if path.name == "000001.parquet":
        os.kill(os.getpid(), signal.SIGKILL)
all_users._write = write
main(sys.argv[1:])
"""


@pytest.mark.usefixtures("small_parts")
def test_a_run_that_was_killed_goes_on(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    out, whole, parts = tmp_path / "lists.parquet", tmp_path / "whole.parquet", tmp_path / "lists.parquet.parts"
    words = (bundle, dataset, "-k", "3")
    command = [sys.executable, "-c", KILLED, "recommend-all", *map(str, words), "--out", str(out)]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in parts.iterdir()) == ["000000.parquet", "000001.parquet", "plan.json"]
    (parts / ".000002.parquet.partial").write_bytes(b"half a file")
    refused = run(bundle, dataset, "-k", "4", "--out", out, code=1)
    assert "lists that were begun with other k; give the same" in " ".join(refused.stderr.split())
    document = json.loads(run(*words, "--out", out, "--json").stdout)
    assert document["resumed"] == 140
    assert not parts.exists()
    run(*words, "--out", whole)
    assert pl.read_parquet(out).equals(pl.read_parquet(whole))
    assert "exists; choose another --out" in run(*words, "--out", out, code=1).stderr


def test_two_runs_of_one_file_are_refused(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    import fcntl

    parts = tmp_path / "lists.parquet.parts"
    parts.mkdir()
    with (parts / "plan.json").open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused = run(bundle, dataset, "--out", tmp_path / "lists.parquet", code=1)
    assert "another process writes these lists" in refused.stderr


def test_users_with_too_few_items_left_are_told(
    bundle: Path, dataset: Path, histories: dict[str, tuple[Event, ...]], tmp_path: Path
) -> None:
    seen = sorted(len({event.item for event in events}) for events in histories.values())
    k = 300 - seen[len(seen) // 2]
    result = run(bundle, dataset, "--out", tmp_path / "lists.parquet", "-k", str(k))
    few = sum(count > 300 - k for count in seen)
    assert few > 0
    assert f"{few} of {len(seen)} users have no list; the first one" in " ".join(result.stderr.split())
    assert f"k={k} items were requested" in " ".join(result.stderr.split())
    written = lists(tmp_path / "lists.parquet")
    assert len(written) == len(seen) - few
    assert {rows.height for rows in written.values()} == {k}


def test_an_option_that_no_request_may_have_fails(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    result = run(bundle, dataset, "--out", tmp_path / "lists.parquet", "--surface", "moon", code=1)
    assert "unknown surface 'moon'" in result.stderr
    assert not (tmp_path / "lists.parquet").exists()
