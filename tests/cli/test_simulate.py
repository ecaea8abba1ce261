from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from unipinrec.cli.prepare import simulate
from unipinrec.models.data.schema import read_dataset
from unipinrec.models.simulator.oracle import read_oracle


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(simulate, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_command_writes_the_folder_and_reports_it(tmp_path: Path) -> None:
    out = tmp_path / "data"
    code, stdout, _ = run("--out", str(out), "--users", "40", "--items", "70", "--sessions", "2", "--json")
    report = json.loads(stdout)
    dataset = read_dataset(out)
    assert code == 0
    assert report["out"] == str(out)
    assert report["slate_rows"] == len(dataset.slates) == len(read_oracle(out).rows)
    assert report["events"] == len(dataset.events)
    assert (report["users"], report["items"]) == (40, 70)
    assert report["action_rates"]["click"] == round(float(dataset.slates["action_click"].to_numpy().mean()), 4)
    assert sum(report["split_rows"].values()) == report["slate_rows"]
    assert report["split_rows"]["train"] > report["split_rows"]["test"] > 0


def test_command_prints_a_table(tmp_path: Path) -> None:
    code, stdout, _ = run("--out", str(tmp_path / "data"), "--users", "40", "--items", "70")
    assert code == 0
    assert "slate rows" in stdout
    assert "click 0." in stdout


def test_command_refuses_an_existing_folder_before_it_simulates(tmp_path: Path) -> None:
    code, stdout, stderr = run("--out", str(tmp_path), "--users", "1000000000")
    assert (code, stdout) == (1, "")
    assert "exists; choose another --out" in stderr.replace("\n", " ")


def test_command_counts_impossible_settings_as_wrong_use(tmp_path: Path) -> None:
    code, _, stderr = run("--out", str(tmp_path / "data"), "--items", "5")
    assert code == 2
    assert "slate_size=10 is more than items=5" in stderr
    code, _, stderr = run("--out", str(tmp_path / "data"), "--sessions", "inf")
    assert code == 2
    assert "inf is not a finite number" in stderr
    for option in ("--users", "--items", "--days"):
        code, _, stderr = run("--out", str(tmp_path / "data"), option, "9223372036854775808")
        assert code == 2
        assert "9223372036854775808 is not in the range 1<=x<=" in stderr


def test_help_has_an_example() -> None:
    assert "unipinrec prepare simulate --out demo/data" in run("--help")[1]
