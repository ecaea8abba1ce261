"""Wall time and peak memory of preparing a data set and training one epoch on it, each in a process of its own.

python bench/prepare_memory.py SOURCE [--kind kuairand] [--config tiny]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import card, finish

UNIPINREC = [sys.executable, "-c", "from unipinrec.cli import main; main()"]


def run(*arguments: str) -> dict[str, Any]:
    """Run one subcommand with --json; seconds, peak resident memory, and its output."""
    began = time.monotonic()
    with subprocess.Popen([*UNIPINREC, *arguments, "--json"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed with exit code {process.returncode}")
    peak_mib = round(usage.ru_maxrss / 1024)
    return {"seconds": round(time.monotonic() - began, 1), "peak_mib": peak_mib, "printed": json.loads(printed)}


def main() -> None:
    """Prepare, train one epoch, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--kind", default="kuairand")
    parser.add_argument("--config", default="tiny")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, checkpoint = f"{folder}/data", f"{folder}/checkpoint"
        prepared = run("prepare", options.kind, str(options.source), "--out", data)
        train = ["train", "--data", data, "--config", options.config, "--out", checkpoint, "--epochs", "1"]
        trained = run(*train)
    rows = prepared.pop("printed")
    epoch = trained.pop("printed")["epochs"][0]
    document = {**card("prepare_memory"), "kind": options.kind, "config": options.config, "prepare": prepared}
    finish({**document, "rows": rows, "train": trained, "epoch": epoch}, "prepare_memory")


if __name__ == "__main__":
    main()
