"""Runs every acceptance step in a process of its own, keeps the results, and prints one JSON document.

A step that dies, hangs or is refused costs no other step. `bench/gpu/accept` calls this; `steps.py` holds the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from common import card  # noqa: E402 - the paths come first

SIZES = ("small", "paper")
PRECISIONS = ("fp32", "bf16", "fp16")
STEP_SECONDS = 240
RTX, OLD_RTX = "trtrtx", "trtrtx-1.6"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process.

    Attributes:
        name: Key of its result.
        arguments: Of `steps.py`.
        sites: Folders of carried packages for it, in order.
    """

    name: str
    arguments: tuple[str, ...]
    sites: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Runner:
    """Runs steps within a time limit.

    Attributes:
        work: Where results, models and engines lie.
        ends: Deadline of all steps, by `time.monotonic`.
        results: Result of each step, by name.
    """

    work: Path
    ends: float
    results: dict[str, Any] = field(default_factory=dict)

    def run(self, step: Step) -> dict[str, Any]:
        """The result of a step, now or from an earlier run at the same commit."""
        path = self.work / "steps" / f"{step.name}.json"
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text())
            if kept["commit"] == COMMIT:
                self.results[step.name] = kept
                return kept
        left = min(STEP_SECONDS, self.ends - time.monotonic())
        if left < 1:
            self.results[step.name] = {"ran": False, "refused": "the time limit was reached before it"}
            return dict(self.results[step.name])
        found = {**self._process(step, left), "commit": COMMIT}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1))
        self.results[step.name] = found
        return found

    def start(self, step: Step) -> subprocess.Popen[str]:
        """Start a step in the background; a later `run` of a step that depends on it reads its result."""
        return self._popen(step)

    def _process(self, step: Step, seconds: float) -> dict[str, Any]:
        began = time.monotonic()
        process = self._popen(step)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            return {"ran": False, "refused": f"took longer than {seconds:.0f} s", "log": tail(err)}
        took = {"seconds": round(time.monotonic() - began, 1)}
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            return {"ran": False, "refused": f"died of {name}", "log": tail(err), **took}
        try:
            document = json.loads(out.splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            return {"ran": False, "refused": f"exit code {process.returncode}", "log": tail(err), **took}
        return {**document, **took, **({} if document["ran"] else {"log": tail(err)})}

    def _popen(self, step: Step) -> subprocess.Popen[str]:
        sites = [str(self.work / "sites" / site) for site in ("wheels", "small", *step.sites)]
        paths = [str(ROOT / "src"), str(ROOT / "bench"), *sites]
        return subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / "gpu" / "steps.py"), "--work", str(self.work), *step.arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def finish_by(process: subprocess.Popen[str], ends: float) -> None:
    """Wait for a process, no longer than until `ends`; then it is killed."""
    try:
        process.communicate(timeout=max(1.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def tail(text: str, lines: int = 12) -> list[str]:
    """The end of a log."""
    return text.splitlines()[-lines:]


def backends(work: Path, runner: Runner) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """Every GPU backend that the card accepts: name, device, target of its engines, carried packages."""
    if runner.run(Step(name="probe ort-cuda", arguments=("probe-ort",), sites=("ortgpu",)))["ran"]:
        yield "ort-cuda", "cuda", "", ("ortgpu",)
    if runner.run(Step(name="probe tensorrt", arguments=("probe", "--flavor", "tensorrt", "--target", "current")))[
        "ran"
    ]:
        yield "tensorrt", "tensorrt", "current", ()
    for site in (RTX, OLD_RTX) if (work / "sites" / OLD_RTX).exists() else (RTX,):
        accepted = False
        for target in ("current", "portable"):
            step = Step(
                name=f"probe {site} {target}",
                arguments=("probe", "--flavor", "tensorrt_rtx", "--target", target),
                sites=(site,),
            )
            if runner.run(step)["ran"]:
                accepted = True
                yield f"{site}-{target}", "tensorrt", target, (site,)
        if accepted:
            return


def check(size: str, precision: str, backend: tuple[str, str, str, tuple[str, ...]]) -> Step:
    """Build engines if the backend needs them, then check invariants, golden requests and times."""
    name, device, target, sites = backend
    flavor = "tensorrt" if name == "tensorrt" else "tensorrt_rtx"
    engines = ("--flavor", flavor, "--target", target) if target else ()
    arguments = ("check", "--size", size, "--device", f"{device}-{precision}", *engines)
    return Step(name=f"{name} {size} {precision}", arguments=arguments, sites=sites)


def accept(runner: Runner, work: Path, sizes: Sequence[str]) -> None:
    """All steps: the models, then each backend in each precision on each model."""
    runner.run(Step(name="machine", arguments=("machine",)))
    later = {size: runner.start(Step(name=f"model {size}", arguments=("model", "--size", size))) for size in sizes[1:]}
    runner.run(Step(name=f"model {sizes[0]}", arguments=("model", "--size", sizes[0])))
    runner.run(Step(name=f"cpu {sizes[0]}", arguments=("check", "--size", sizes[0], "--device", "cpu")))
    accepted = list(backends(work, runner))
    for size in sizes:
        if size in later:
            finish_by(later[size], runner.ends)
            runner.run(Step(name=f"model {size}", arguments=("model", "--size", size)))
        for backend in accepted:
            for precision in PRECISIONS:
                runner.run(check(size, precision, backend))


def main() -> None:
    """Run everything; print and keep the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "accept")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for everything")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model; for a machine without a GPU")
    options = parser.parse_args()
    work = options.work.resolve()
    runner = Runner(work=work, ends=time.monotonic() + options.limit)
    accept(runner, work, ("tiny",) if options.dry_run else SIZES)
    document = {**card("accept"), "dry_run": options.dry_run, "steps": runner.results}
    path = work / "accept.json" if options.dry_run else ROOT / "bench" / "results" / "gpu" / "accept.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(json.dumps(document) + "\n")
    wrong = [name for name, found in runner.results.items() if found.get("problems")]
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else 0)


COMMIT = card("accept")["commit"]

if __name__ == "__main__":
    main()
