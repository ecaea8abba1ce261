"""Runs the steps of the acceptance, each in a process with a time limit, and keeps what they found.

A step that dies, hangs or is refused costs no other step. The state file is written after each step. A step that ran is
not repeated with the same code; a refusal or a timeout is tried again by the next run.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
COMMON_SITES = ("wheels", "small")
LOG_LINES = 12
TOO_LATE = "no time was left for it; run the command again"
Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process.

    Attributes:
        name: Key of its result.
        arguments: Of `steps.py`.
        seconds: Its time limit.
        sites: Folders of carried packages for it, in order.
        leaves: Its file or folder within the work folder, without which its result does not count.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    sites: tuple[str, ...] = ()
    leaves: str = ""


@dataclass(kw_only=True)
class Runner:
    """Runs steps.

    Attributes:
        work: Where carried packages, models and engines lie.
        code: A hash of it; results of other code do not count.
        ends: Deadline of all steps, by `time.monotonic`.
        save: Called after each step.
        patience: Multiplies the limits of the steps.
        results: Result of each step, by name.
        until: Deadline of the present phase.
    """

    work: Path
    code: str
    ends: float
    save: Callable[[Runner], None]
    patience: float = 1.0
    results: dict[str, Found] = field(default_factory=dict)
    until: float = float("inf")

    def restore(self, state: Path) -> None:
        """Take the results of an earlier run."""
        if state.exists():
            self.results = json.loads(state.read_text())["steps"]

    def run(self, step: Step) -> Found:
        """The result of a step, of an earlier run if it ran there."""
        kept = self.results.get(step.name)
        if kept and kept["ran"] and kept["code"] == self.code and (self.work / step.leaves).exists():
            return kept
        left = min(step.seconds * self.patience, min(self.ends, self.until) - time.monotonic())
        if left < 1:
            found: Found = {"ran": False, "refused": TOO_LATE}
        else:
            began = time.monotonic()
            found = finish(self.start(step), left)
            found["seconds"] = round(time.monotonic() - began, 1)
        self.results[step.name] = {**found, "code": self.code}
        self.save(self)
        return self.results[step.name]

    def start(self, step: Step) -> subprocess.Popen[str]:
        """Start a step and return at once."""
        sites = [str(self.work / "sites" / site) for site in (*step.sites, *COMMON_SITES)]
        paths = [str(ROOT / "src"), str(ROOT / "bench"), *sites]
        return subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / "gpu" / "steps.py"), "--work", str(self.work), *step.arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[str], seconds: float) -> Found:
    """Wait for a step and read its result; it is killed, with all that it started, when the time is over."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate()
        return {"ran": False, "refused": f"took longer than {seconds:.0f} s", "log": tail(err)}
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return {"ran": False, "refused": f"died of {name}", "log": tail(err)}
    try:
        found: Found = json.loads(out.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        last = (tail(err) or ["no output"])[-1]
        return {"ran": False, "refused": f"exit code {process.returncode}: {last}", "log": tail(err)}
    return found if found["ran"] else {**found, "log": tail(err)}


def code_hash() -> str:
    """A hash of our code: a copy of the tree need not have git."""
    digest = hashlib.sha256()
    for folder in ("src", "runtime", "models", "export", "bench", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def tail(text: str) -> list[str]:
    """The end of a log."""
    return text.splitlines()[-LOG_LINES:]
