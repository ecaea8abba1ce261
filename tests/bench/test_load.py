"""The load on a server process: a few seconds in every run, ten of each kind with `-m slow`. No claims about time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, bundle: Path, *options: str) -> Any:
    command = [sys.executable, str(ROOT / "bench" / script), str(bundle), *options, "--no-result"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_answered_under_load_is_right_and_what_is_not_is_refused_as_declared(bundle: Path) -> None:
    short = (
        "--seconds",
        "1",
        "--peak",
        "200",
        "--shares",
        "0.5",
        "10",
        "--generator",
        "poisson",
        "--check",
        "5",
        "--users",
        "200",
    )
    result = run("server_load.py", bundle, *short, "--deadline-ms", "60")
    assert result["wrong"] == []
    assert result["compared"] > 20
    assert result["exit_code"] == 0
    half, past = result["curve"]
    assert {*half["patient"]["statuses"], *past["hasty"]["statuses"]} <= {"200", "429", "504"}
    assert all(set(one["statuses"]) == {"200"} for one in result["null"])


@pytest.mark.parametrize("processes", [1, 2])
def test_swaps_kills_and_nonsense_cost_no_right_answer(bundle: Path, processes: int) -> None:
    short = ("--minutes", "0.15", "--swap-s", "2", "--qps", "40", "--users", "60", "--check", "2", "--cache-mib", "2")
    result = run("server_soak.py", bundle, *short, "--processes", str(processes))
    assert result["failures"] == []
    assert result["compared"] > 20
    assert result["counts"]["swap"] >= 2
    assert 1 <= len(result["restarts_s"]) <= processes  # on a busy machine the time is over before the last one
    assert len(result["answers_by_bundle"]) == 2
    noticed, tried = map(int, result["noticed"].split(" of "))
    assert noticed > 0.5 * tried


@pytest.mark.slow
@pytest.mark.parametrize("script", ["server_load.py", "server_soak.py"])
def test_ten_seconds_of_each(script: str, bundle: Path) -> None:
    load = ("--seconds", "10", "--steps", "2", "--shares", "0.7", "1.5", "--generator", "poisson", "--users", "500")
    soak = ("--minutes", "1", "--swap-s", "5", "--qps", "100", "--users", "300", "--check", "3")
    result = run(script, bundle, *(load if script == "server_load.py" else soak))
    assert result["wrong" if script == "server_load.py" else "failures"] == []
