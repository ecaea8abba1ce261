"""Settles what only a GPU can: which backends run, whether they compute what was trained, and how fast.

`bench/gpu/accept` unpacks the carried archives and calls this. `phases.py` holds the order and the time limits,
`running.py` runs the steps, `steps.py` holds what each does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from carried import take  # noqa: E402 - the paths come first
from common import card  # noqa: E402
from phases import PHASES, Models  # noqa: E402
from running import Runner, code_hash  # noqa: E402

STATE = "accept.json"
RESULT = ROOT / "bench" / "results" / "gpu" / "accept.json"


def run_phases(runner: Runner, models: Models, wanted: list[int]) -> None:
    """Run phases in order, each within its own minutes."""
    models.begin()
    for number in wanted:
        seconds, phase = PHASES[number]
        runner.until = time.monotonic() + seconds * runner.patience
        phase(runner, models)
    models.stop()


def document(runner: Runner, carried: dict[str, str], dry_run: bool) -> dict[str, Any]:
    """All that is known so far."""
    steps = runner.results.values()
    return {
        **card("accept"),
        "dry_run": dry_run,
        "carried": carried,
        "ran": sum(step["ran"] for step in steps),
        "refused": {name: step["refused"] for name, step in runner.results.items() if not step["ran"]},
        "problems": {name: step["problems"] for name, step in runner.results.items() if step.get("problems")},
        "steps": runner.results,
    }


def write(path: Path, content: str) -> None:
    """Replace a file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(content)
    part.replace(path)


def main() -> None:
    """Run everything; print and keep the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--carried", type=Path, help="archives of payloads.py; kept, so a later call need not have them"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "accept")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for everything")
    parser.add_argument("--phase", type=int, action="append", choices=list(PHASES), help="only these; may be repeated")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies the limits of phases and steps")
    parser.add_argument("--out", type=Path, help="the document; default bench/results/gpu/accept.json")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model; for a machine without a GPU")
    options = parser.parse_args()
    work = options.work.resolve()
    ends = time.monotonic() + options.limit
    carried = take(options.carried, work)
    out = options.out or (work / "dry-run.json" if options.dry_run else RESULT)

    def save(runner: Runner) -> None:
        text = json.dumps(document(runner, carried, options.dry_run), indent=1) + "\n"
        write(work / STATE, text)
        write(out, text)

    runner = Runner(work=work, code=code_hash(), ends=ends, save=save, patience=options.patience)
    runner.restore(work / STATE if (work / STATE).exists() else out)
    models = Models(runner, ("tiny",) if options.dry_run else ("small", "paper"))
    run_phases(runner, models, options.phase or [number for number in PHASES if number <= 4])
    save(runner)
    found = document(runner, carried, options.dry_run)
    sys.stdout.write(json.dumps(found) + "\n")
    wrong = ", ".join(found["problems"])
    sys.exit(f"wrong: {wrong}" if wrong else 0)


if __name__ == "__main__":
    main()
