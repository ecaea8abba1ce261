"""The fuzzers run, and find nothing in seconds; ten minutes each are `bench/fuzz_*.py --seconds 600`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FUZZERS = ("fuzz_requests", "fuzz_bundle", "fuzz_tables")


@pytest.mark.parametrize(
    ("fuzzer", "seconds"),
    [
        *((fuzzer, 6) for fuzzer in FUZZERS),
        *(pytest.param(fuzzer, 30, marks=pytest.mark.slow) for fuzzer in FUZZERS),
    ],
)
def test_nothing_is_found(fuzzer: str, seconds: int, tmp_path: Path) -> None:
    if find_spec("atheris") is None:
        pytest.skip("atheris is not installed: it has wheels for Linux on x86-64")
    command = [sys.executable, str(ROOT / "bench" / f"{fuzzer}.py"), "--seconds", str(seconds), "--no-result"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["found"] == []
    assert result["runs"] > 10 * seconds
    assert result["covered"] > 100


@pytest.mark.parametrize("fuzzer", FUZZERS)
def test_what_was_found_can_be_run_again(fuzzer: str, tmp_path: Path) -> None:
    """Without atheris: on each file once."""
    inputs = {
        "a": b"\x00\x00not json",
        "b": b'\x02\x82["\x82"]',
        "c": bytes(range(64)),
        "d": b"\x09\x01" + bytes(range(40)),
    }
    for name, content in inputs.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, str(ROOT / "bench" / f"{fuzzer}.py"), *inputs]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "nothing found" in line] == [
        f"{name}: nothing found" for name in inputs
    ]
