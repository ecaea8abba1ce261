"""`unipinrec push`, and commands that take `hf://`, as processes that find the Hub by their environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from answers import STORED
from hub_server import Hub, hub_server

REPO = "shop/feed"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    if find_spec("huggingface_hub") is None:
        pytest.skip("huggingface_hub is not installed (pip install 'unipinrec[hub]')")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with hub_server() as (hub, endpoint):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        hub.token = "hf_secret"
        hub.commit(REPO, {".gitattributes": b""})
        yield hub


def run(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unipinrec", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **variables}
    )


def test_a_pushed_bundle_is_recommended_from_and_verified(hub: Hub) -> None:
    done = run("push", STORED, f"hf://{REPO}", "--license", "mit", "--with-users")
    assert done.returncode == 0, done.stderr
    commit = hub.refs[REPO]["main"]
    assert f'Recommender.load("hf://{REPO}@{commit}")' in done.stdout
    words = ("--user", "random-0", "-k", "3", "--device", "cpu", "--json", "--now", "1760000000000")
    local, far = run("recommend", STORED, *words), run("recommend", f"hf://{REPO}", *words)
    assert far.returncode == 0, far.stderr
    assert f"hf://{REPO} is commit {commit}, in " in far.stderr
    assert json.loads(far.stdout)["items"] == json.loads(local.stdout)["items"]
    asked = len(hub.asked)
    pinned = run("verify", f"hf://{REPO}@{commit}", "--json", HF_HUB_OFFLINE="1")
    assert json.loads(pinned.stdout)["ok"]
    assert len(hub.asked) == asked


@pytest.mark.parametrize(
    "words",
    [
        ("verify",),
        ("doctor",),
        ("recommend",),
        ("serve",),
        ("compile",),
        ("plan", "--bundle"),
        ("index", "--out", "x"),
        ("evaluate", "--data", "x"),
        ("recommend-all",),
        ("state", "load", "--bundle"),
        ("push",),
    ],
    ids=lambda words: words[0],
)
def test_every_command_that_takes_a_bundle_looks_at_the_hub(words: tuple[str, ...]) -> None:
    from click.testing import CliRunner

    from unipinrec.cli import main

    done = CliRunner().invoke(main, [*words, "hf://shop"])
    assert done.exit_code == 1
    assert "'hf://shop' is not hf://org/name or hf://org/name@revision" in done.stderr
