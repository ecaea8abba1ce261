from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from unipinrec.errors import DataError
from unipinrec.models.data.schema import Dataset, read_dataset, write_dataset
from unipinrec.models.simulator.simulator import simulate
from unipinrec.models.simulator.world import SimulatorConfig

FULL_DISK = """
import resource, sys
from unipinrec.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
main(["prepare", "simulate", "--users", "50", "--items", "100", "--out", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def made() -> Dataset:
    return simulate(SimulatorConfig(users=20, items=50, categories=2))[0]


def test_a_data_set_comes_back_as_it_was(made: Dataset, tmp_path: Path) -> None:
    write_dataset(made, tmp_path / "data")
    read = read_dataset(tmp_path / "data")
    assert read.spec == made.spec
    for name in ("events", "slates", "items"):
        assert getattr(read, name).equals(getattr(made, name))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_existing_folder_is_never_overwritten(made: Dataset, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="exists; choose another --out or remove it first"):
        write_dataset(made, tmp_path / "data")


def test_what_else_is_written_belongs_to_the_whole(made: Dataset, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "more").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(DataError, match=r"could not write .*data: no space left on device; nothing was left behind"):
        write_dataset(made, tmp_path / "data", also=fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [500, 20_000])
def test_a_full_disk_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """500 bytes stop the first table, 20 kB one of the oracle's."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "data"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "could not write" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_does_not_stand_in_the_way_of_the_next(tmp_path: Path, made: Dataset) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from unipinrec.models.data.schema import write_dataset\n"
        "from unipinrec.models.simulator.simulator import SimulatorConfig, simulate\n"
        "dataset = simulate(SimulatorConfig(users=20, items=50, categories=2))[0]\n"
        "write_dataset(dataset, Path(sys.argv[1]), also=lambda folder: (print('now', flush=True), time.sleep(60)))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "data")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "data").exists()
    write_dataset(made, tmp_path / "data")
    assert read_dataset(tmp_path / "data").spec == made.spec


def test_what_is_no_data_set_is_named(made: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a prepared data set .* make one with `unipinrec prepare`"):
        read_dataset(tmp_path)
    write_dataset(made, tmp_path / "data")
    events = tmp_path / "data/events.parquet"
    whole = events.read_bytes()
    events.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"events\.parquet: not readable as Parquet"):
        read_dataset(tmp_path / "data")
    pl.read_parquet(whole).with_columns(more=1).write_parquet(events)
    with pytest.raises(DataError, match=r"events\.parquet: columns are .*'more'"):
        read_dataset(tmp_path / "data")
    declaration = tmp_path / "data/dataset.json"
    declaration.write_text(json.dumps({**json.loads(declaration.read_bytes()), "format_version": 2}))
    with pytest.raises(DataError, match="format_version is 2, this version reads 1"):
        read_dataset(tmp_path / "data")


def test_events_out_of_order_are_refused(made: Dataset, tmp_path: Path) -> None:
    known = made.events.drop_nulls("timestamp_ms")
    by_time = known.sort("timestamp_ms")
    write_dataset(replace(made, events=by_time), tmp_path / "users take turns")
    assert read_dataset(tmp_path / "users take turns").events.equals(by_time)
    write_dataset(replace(made, events=known.reverse()), tmp_path / "newest first")
    rule = r"a user's events must be in order of time, unknown times first; wrong rows: \d+, first {'user_id'"
    with pytest.raises(DataError, match=r"events\.parquet: " + rule):
        read_dataset(tmp_path / "newest first")
    unknown = known.head(1).with_columns(timestamp_ms=pl.lit(None, pl.Int64))
    write_dataset(replace(made, events=pl.concat([unknown, known])), tmp_path / "unknown first")
    read_dataset(tmp_path / "unknown first")
    write_dataset(replace(made, events=pl.concat([known, unknown])), tmp_path / "unknown last")
    with pytest.raises(DataError, match=rule):
        read_dataset(tmp_path / "unknown last")


def test_an_item_twice_is_refused(made: Dataset, tmp_path: Path) -> None:
    write_dataset(replace(made, items=pl.concat([made.items, made.items.head(1)])), tmp_path / "data")
    with pytest.raises(
        DataError,
        match=r"items\.parquet: each item_id must stand in one row; wrong rows: 1, first",
    ):
        read_dataset(tmp_path / "data")


@pytest.mark.parametrize(
    ("value", "shown"),
    [([math.nan], r"\[nan\]"), ([-math.inf], r"\[-inf\]"), (None, "None"), ([None], r"\[None\]"), ([], r"\[\]")],
)
def test_dense_features_that_are_not_numbers_are_refused(
    made: Dataset, tmp_path: Path, value: list[float | None] | None, shown: str
) -> None:
    name = "dense_log_duration"
    values = made.items[name].to_list()
    values[3] = value
    items = made.items.with_columns(pl.Series(name, values, dtype=pl.List(pl.Float32)))
    write_dataset(replace(made, items=items), tmp_path / "data")
    item = made.items["item_id"][3]
    rule = f"{name} of each item must be finite numbers, 1 of them"
    with pytest.raises(DataError, match=f"{rule}; wrong rows: 1, first {{'item_id': '{item}', '{name}': {shown}}}"):
        read_dataset(tmp_path / "data")
