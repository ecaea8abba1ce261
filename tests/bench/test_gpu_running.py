"""The acceptance on a GPU: its time limits, what it repeats, and the figures that need no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch_model
from floors import Load, floors_ms, kv_bytes, layer_weights
from phases import ORT, PHASES, TENSORRTS
from running import Found, Runner, Step, finish
from synthetic import random_model

from unipinrec.models.config import PAPER, TINY

DOCUMENT = {"ran": True, "value": 1}


def started(code: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def prints(document: dict[str, Any]) -> str:
    return f"print('noise'); print({json.dumps(document)!r})"


class Counted(Runner):
    """A runner whose step is a given program; counts its starts."""

    program = prints(DOCUMENT)
    starts = 0

    def start(self, step: Step) -> subprocess.Popen[str]:
        self.starts += 1
        return started(self.program)


@pytest.fixture
def runner(tmp_path: Path) -> Counted:
    def save(present: Runner) -> None:
        (tmp_path / "state.json").write_text(json.dumps({"steps": present.results}))

    return Counted(work=tmp_path, code="a", ends=time.monotonic() + 60, save=save)


STEP = Step(name="one", arguments=("one",), seconds=20)


def test_what_ran_is_not_repeated(runner: Counted, tmp_path: Path) -> None:
    first = runner.run(STEP)
    assert first["ran"]
    assert first["code"] == "a"
    runner.results = {}
    runner.restore(tmp_path / "state.json")
    assert runner.run(STEP) == first
    assert runner.starts == 1
    runner.code = "b"
    runner.run(STEP)
    assert runner.starts == 2


def test_a_refusal_is_tried_again_and_a_lost_model_made_again(runner: Counted) -> None:
    runner.program = prints({"ran": False, "refused": "not today"})
    assert runner.run(STEP)["refused"] == "not today"
    runner.program = prints(DOCUMENT)
    assert runner.run(STEP)["ran"]
    model = Step(name="model", arguments=(), seconds=20, leaves="models/x")
    runner.run(model)
    runner.run(model)
    assert runner.starts == 4
    (runner.work / "models" / "x").mkdir(parents=True)
    runner.run(model)
    assert runner.starts == 4


def test_no_step_begins_after_the_end(runner: Counted) -> None:
    runner.until = time.monotonic()
    assert runner.run(STEP)["refused"] == "no time was left for it; run the command again"
    assert runner.starts == 0


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("import time; time.sleep(60)", "took longer than 1 s"),
        ("import os; os.kill(os.getpid(), 11)", "died of SIGSEGV"),
        ("raise ImportError('no such module')", "exit code 1: ImportError: no such module"),
    ],
)
def test_a_step_that_fails_says_how(code: str, refused: str) -> None:
    found: Found = finish(started(code), 1.0 if "sleep" in code else 30.0)
    assert (found["ran"], found["refused"]) == (False, refused)


def test_floors_are_those_of_the_paper_shape() -> None:
    assert 12 * layer_weights(PAPER) == 84_934_656
    assert kv_bytes(PAPER, "bf16", 992) == 36_605_952
    assert floors_ms(PAPER, "bf16", Load(events=992, candidates=656)) == {"encode": 0.1754, "rank": 0.137}
    assert floors_ms(PAPER, "fp32", Load(events=1, candidates=1))["rank"] == 0.0708  # the weights' bytes decide


def test_main_questions_fit_four_minutes() -> None:
    assert [seconds for seconds, _ in PHASES.values()][:4] == [180, 180, 240, 120]
    assert {backend.probe().name for backend in (ORT, *TENSORRTS)} == {
        *("probe ort-cuda", "probe tensorrt", "probe trtrtx current", "probe trtrtx portable"),
        *("probe trtrtx-1.6 current", "probe trtrtx-1.6 portable"),
    }


def test_the_model_is_measured_on_any_device() -> None:
    found = torch_model.measure(random_model("sink", 50, TINY), TINY, Load(events=20, candidates=5, batch=2), "cpu")
    assert found["problems"] == []
    assert found["split"] < 1e-4
    assert found["times_ms"]["bf16"]["encode"]["median"] > 0
