"""The acceptance on a GPU, as far as a machine without one goes: every step runs, and says why it was refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_dry_run_says_of_every_backend_whether_it_ran(tmp_path: Path) -> None:
    command = [
        str(ROOT / "bench" / "gpu" / "accept"),
        "--dry-run",
        "--limit",
        "1000",
        "--patience",
        "4",
        "--work",
        str(tmp_path),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path})
    found = json.loads(done.stdout.splitlines()[-1])
    steps = found["steps"]
    assert found == json.loads((tmp_path / "dry-run.json").read_text()) | {"date": found["date"]}
    assert steps["machine"]["ran"]
    assert steps["model tiny"]["emulated"].keys() == {"bf16", "fp16"}
    assert steps["cpu tiny"]["problems"] == []
    assert steps["cpu tiny"]["split"]["logits"] < 1e-4
    probes = {name: step for name, step in steps.items() if name.startswith("probe ")}
    assert {"probe ort-cuda", "probe tensorrt", "probe trtrtx current", "probe trtrtx portable"} <= probes.keys()
    assert all(step["ran"] or step["refused"] for step in steps.values())
    again = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path})
    repeated = json.loads(again.stdout.splitlines()[-1])["steps"]
    assert {name: step for name, step in repeated.items() if step["ran"]} == {
        name: step for name, step in steps.items() if step["ran"]
    }
