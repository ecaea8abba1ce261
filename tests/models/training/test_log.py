from __future__ import annotations

import csv
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from unipinrec.errors import CheckpointError, ConfigError
from unipinrec.models.training.log import StepReport, TrainLog


def report(step: int) -> StepReport:
    losses = {"loss": step / 2, "retrieval": 1.0}
    return StepReport(epoch=0, step=step, losses=losses, learning_rate=0.1, gradient_norm=3.0, events=7)


def rows(folder: Path) -> list[list[str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_a_row_for_every_second_step(tmp_path: Path) -> None:
    log = TrainLog(tmp_path, every=2, steps_done=0, tensorboard=False)
    for step in range(1, 6):
        log.step(report(step))
    assert rows(tmp_path) == [
        ["epoch", "step", "learning_rate", "gradient_norm", "events", "loss", "retrieval"],
        ["0", "2", "0.1", "3.0", "7", "1.0", "1.0"],
        ["0", "4", "0.1", "3.0", "7", "2.0", "1.0"],
    ]


def test_a_run_that_goes_on_drops_rows_of_steps_it_repeats(tmp_path: Path) -> None:
    log = TrainLog(tmp_path, every=1, steps_done=0, tensorboard=False)
    for step in (1, 2, 3):
        log.step(report(step))
    with (tmp_path / "log.csv").open("a") as file:
        file.write("0,4,0.")  # the process died in the middle of a row
    resumed = TrainLog(tmp_path, every=1, steps_done=2, tensorboard=False)
    resumed.step(report(3))
    assert [row[1] for row in rows(tmp_path)] == ["step", "1", "2", "3"]


def test_a_run_that_starts_anew_has_one_header(tmp_path: Path) -> None:
    TrainLog(tmp_path, every=1, steps_done=0, tensorboard=False).step(report(1))
    TrainLog(tmp_path, every=1, steps_done=0, tensorboard=False).step(report(1))
    assert [row[1] for row in rows(tmp_path)] == ["step", "1"]


def test_a_disk_that_is_full_costs_no_row_that_is_written(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    log = TrainLog(tmp_path, every=1, steps_done=0, tensorboard=False)
    for step in range(1, 40):
        log.step(report(step))
    before = (tmp_path / "log.csv").read_bytes()
    with (
        full_disk(len(before)),
        pytest.raises(CheckpointError, match=r"could not write .*log\.csv: .*too large; make room"),
    ):
        log.step(report(40))
    with full_disk(len(before) // 2), pytest.raises(CheckpointError, match=r"could not write .*log\.csv"):
        TrainLog(tmp_path, every=1, steps_done=38, tensorboard=False)
    assert (tmp_path / "log.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_a_log_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "log.csv").mkdir()
    with pytest.raises(CheckpointError, match=r"could not read .*log\.csv"):
        TrainLog(tmp_path, every=1, steps_done=0, tensorboard=False)


def test_tensorboard_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="needs the package tensorboard"):
        TrainLog(tmp_path, every=1, steps_done=0, tensorboard=True)
