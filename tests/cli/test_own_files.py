"""From a file of one's own to served lists: inspect, prepare, train, export, recommend and serve."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner, Result
from live_server import SMALL, served
from log_files import SHAPES
from starlette.testclient import TestClient

from unipinrec.cli import main
from unipinrec.models.data.schema import read_dataset


def run(*words: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_a_file_becomes_served_lists_with_no_edited_line(tmp_path: Path, shape: Callable[[Path], Path]) -> None:
    (tmp_path / "files").mkdir()
    source = shape(tmp_path / "files")
    columns, data, checkpoint, bundle = (tmp_path / name for name in ("columns.toml", "data", "checkpoint", "bundle"))
    run("prepare", "inspect", source, "--out", columns)
    run("prepare", "table", source, "--columns", columns, "--out", data)
    run("train", "--data", data, "--out", checkpoint, "--epochs", "1")
    run("export", checkpoint, bundle, "--data", data)
    run("recommend-all", bundle, data, "--out", tmp_path / "lists.parquet", "-k", "3", "--include-seen")
    users = read_dataset(data).events["user_id"].unique()
    lists = pl.read_parquet(tmp_path / "lists.parquet")
    assert lists.group_by("user").len().rows_by_key("user") == {user: [(3,)] for user in users}
    assert set(lists["source"]) == {"model"}
    user = sorted(users)[0]
    alone = json.loads(run("recommend", bundle, "--user", user, "-k", "3", "--include-seen", "--json").stdout)
    run("state", "load", data, "--state", tmp_path / "state", "--bundle", bundle)
    with served(bundle, replace(SMALL, state=str(tmp_path / "state"))) as app, TestClient(app) as client:
        answer = client.post("/v1/recommend", json={"user": user, "k": 3, "exclude_seen": False}).json()
    assert (alone["source"], answer["source"], len(alone["items"]), len(answer["items"])) == ("model", "model", 3, 3)
