"""What the first pages tell a newcomer to type runs, and the README's figures are those of bench/results."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import click
import pytest
from answers import STORED
from live_server import listening, served
from picture_request import picture

from unipinrec.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
NAMES = ("README.md", "CONTRIBUTING.md", "docs/getting-started.md", "docs/devices.md", "docs/benchmarks.md")
PAGES = {name: (ROOT / name).read_text() for name in (*NAMES, "SECURITY.md")}
SNIPPETS = [
    pytest.param(code, id=f"{name}-{number}")
    for name, text in PAGES.items()
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
]
BLOCKS = [
    block for text in PAGES.values() for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
]
COMMANDS = sorted({line for block in BLOCKS for line in re.findall(r"^(?:\$ )?unipinrec (.*)$", block, re.MULTILINE)})


def result(name: str) -> Any:
    return json.loads((ROOT / "bench/results" / f"{name}.json").read_bytes())


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130
    assert len(README.split()) <= 900


@pytest.mark.parametrize("code", SNIPPETS)
def test_python_of_the_documents_runs(code: str, tmp_path: Path) -> None:
    shutil.copytree(STORED, tmp_path / "demo" / "bundle")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_the_readmes_python_does_what_its_comments_say(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    shutil.copytree(STORED, tmp_path / "demo" / "bundle")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("extended 1 new event\n")


def test_curl_of_the_documents_is_answered() -> None:
    calls = [
        call for text in PAGES.values() for call in re.findall(r"^curl localhost:8000(\S+) -d '(.*)'$", text, re.M)
    ]
    assert len(calls) == 3
    with served(STORED) as app, listening(app) as port:
        for path, body in calls:
            with urlopen(Request(f"http://127.0.0.1:{port}{path}", body.encode())) as answer:
                assert answer.status == 200


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_documents_have_these_options(line: str) -> None:
    command: click.Command = main
    words = shlex.split(line, comments=True)
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    command.make_parser(click.Context(command)).parse_args(words)


def test_devices_of_the_page_are_all_there_are() -> None:
    from unipinrec.runtime.device import DEVICES

    table = PAGES["docs/devices.md"].split("## How to choose")[0]
    for device in DEVICES:
        kind, _, precision = device.partition("-")
        assert f"`{device}`" in table or (f"`{kind}" in table and f"`-{precision}`" in table), device


def test_figures_of_the_readme_are_those_of_the_results() -> None:
    row = result("serving")["rows"][0]
    two, cold, returning = (row["ms"][name]["median"] for name in ("two models", "cold", "returning"))
    over = row["two_models_over"]
    ml1m, lists = result("quality/ml1m"), result("served_demo")["rows"]["plain"]["true_value"]
    published = ml1m["published"]
    best = published["HSTU-large (RecTools' tutorial, stable sort) †"]
    for figure in (
        f"| {cold:.1f} ms | {two:.1f} ms with two models: **{over['cold']['median']:.2f} times** faster |",
        f"| {returning:.1f} ms | {two:.1f} ms with two models, which have no cache: "
        f"**{over['returning']['median']:.2f} times** faster |",
        f"| **{ml1m['summary']['HR@10']['median']:.3f}** | {published['gSASRec (same file)']['HR@10']:.3f} for gSASRec",
        f"{best['HR@10']:.3f} for HSTU-large",
        f"| **{lists['chosen blend']:.3f}** | {lists['popularity']:.3f} for the most popular items",
        f"; {lists['best']:.3f} for the best ten |",
        f"takes {row['ms']['cold kept']['median'] - cold:.0f} ms more",
    ):
        assert figure in README, figure
    assert best["HR@10"] == max(one["HR@10"] for one in published.values())


def test_anchors_of_these_pages_exist() -> None:
    for name, text in PAGES.items():
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", text):
            page = (ROOT / name).parent / target if target else ROOT / name
            headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{name}: {target}#{anchor}"


def test_the_picture_is_what_the_script_draws() -> None:
    assert (ROOT / "docs/request.svg").read_text() == picture()
