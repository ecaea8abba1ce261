"""The scripts of examples/ run against the stored bundle."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from answers import STORED

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *words: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), str(STORED), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_recommend() -> None:
    first, second, third = run("recommend.py").splitlines()
    assert first.startswith("miss (new): ['item-")
    assert second.startswith("extended (1 new event): ['item-")
    without = second.split("'")[1]
    assert third.startswith(f"hit, without {without}: ['item-")
    assert f"'{without}'" not in third


def test_embed_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert run("embed_server.py", str(port)).startswith("model ['item-")


@pytest.mark.parametrize("name", ["recommend.py", "embed_server.py"])
def test_examples_are_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 40
