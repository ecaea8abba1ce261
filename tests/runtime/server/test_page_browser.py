"""The page in a real browser: skipped where Node.js, npm, Chromium or the download of playwright-core are not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from answers import STORED
from live_server import listening, served

from unipinrec.runtime import Bundle
from unipinrec.runtime.bundle.derived import seal_derived

VISIT = Path(__file__).with_name("visit.mjs")
PLAYWRIGHT = "playwright-core@1.65.1"
EVIL = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>\' & \u202e'
EVIL_USER = '"><b>user</b>&amp;/../?#%00'


def chromium() -> str:
    """The browser; skips where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no chromium is installed")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, hostile: Path) -> dict[str, Any]:
    """What a visitor sees, step by step; see visit.mjs."""
    browser = chromium()
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node.js or npm is not installed")
    scratch = tmp_path_factory.mktemp("browser")
    (scratch / "package.json").write_text('{"private": true}')
    install = ["npm", "install", "--prefer-offline", "--no-audit", "--no-fund", "--silent", PLAYWRIGHT]
    done = subprocess.run(install, cwd=scratch, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        pytest.skip(f"{PLAYWRIGHT} cannot be installed: {done.stderr[-300:]}")
    screenshots = os.environ.get("UNIPINREC_SCREENSHOTS", "")
    with served(hostile) as app, listening(app) as port:
        command = ["node", str(VISIT), f"http://127.0.0.1:{port}/", str(scratch), browser, screenshots]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, reseal: Callable[..., None]) -> Path:
    """The stored bundle with titles, metadata and a user id that try to be markup, and pictures of another server."""
    folder = shutil.copytree(STORED, tmp_path_factory.mktemp("hostile") / "bundle")
    (folder / "item_titles.json").write_text(json.dumps([f"{EVIL} {index}" for index in range(23)] + [None]))
    (folder / "user_ids.json").write_text(json.dumps(["random-0", EVIL_USER]))
    reseal(folder)
    known = {
        "brand": [EVIL] * 24,
        "page": ["javascript:alert(1)"] * 24,
        "image": ["https://elsewhere.invalid/x.png"] * 24,
    }
    selling = folder.with_name("selling")
    selling.mkdir()
    (selling / "item_metadata.json").write_text(json.dumps({"price": [5] * 24, **known}))
    seal_derived(selling, Bundle.open(folder))
    return selling


def test_nothing_goes_wrong_and_nothing_is_asked_elsewhere(seen: dict[str, Any]) -> None:
    expected = "Failed to load resource: the server responded with a status of 429 (Too Many Requests)"
    assert [error for error in seen["errors"] if error != expected] == []
    assert seen["elsewhere"] == []


def test_what_is_in_the_data_is_text(seen: dict[str, Any]) -> None:
    assert all(step["foreign"] == 0 for step in seen["steps"].values())
    start = seen["steps"]["start"]
    assert any(title.startswith(EVIL) for title in start["history"] + start["ranked"])
    assert start["users"] == ["random-0 · 7 events", f"{EVIL_USER} · 6 events"]


def test_metadata_is_text_and_only_web_addresses_are_links(seen: dict[str, Any]) -> None:
    start = seen["steps"]["start"]
    assert set(start["out"]) == {"https://elsewhere.invalid/x.png"}
    assert len(start["out"]) == len(start["ranked"])
    assert all(f"price 5 · brand {EVIL}" in facts for facts in start["facts"])


def test_the_first_answer(seen: dict[str, Any]) -> None:
    start = seen["steps"]["start"]
    assert (start["kv"], start["why"]) == (
        "miss",
        "The whole history was encoded (new): this history was not seen before.",
    )
    assert len(start["history"]) == 7
    assert sorted(start["retrieved"]) == sorted(start["ranked"])
    assert start["scores"] == sorted(start["scores"], reverse=True)
    assert start["similarities"] == sorted(start["similarities"], reverse=True)
    assert len(start["chances"]) == 2
    assert [stage.split()[0] for stage in start["stages"]] == ["encode", "retrieve", "rank", "together", "in"]
    assert start["pills"][:2] == ["device cpu", "items 24"]
    assert start["links"] == len(start["ranked"])


def test_a_click_appends_an_event_and_extends_the_cache(seen: dict[str, Any]) -> None:
    start, click = seen["steps"]["start"], seen["steps"]["click"]
    assert click["history"] == [start["ranked"][1], *start["history"]]
    assert start["ranked"][1] not in click["ranked"]
    assert (click["kv"], click["why"]) == ("extended", "Cached keys and values were extended by 1 new event.")
    assert click["scores"] != start["scores"]


def test_the_same_question_hits_the_cache_and_an_undone_event_is_gone(seen: dict[str, Any]) -> None:
    again, undo = seen["steps"]["again"], seen["steps"]["undo"]
    assert (again["kv"], again["ranked"]) == ("hit", seen["steps"]["click"]["ranked"])
    assert (undo["kv"], undo["history"]) == ("miss", seen["steps"]["start"]["history"])
    assert "truncated" in undo["why"]
    assert undo["ranked"] == seen["steps"]["start"]["ranked"]


def test_actions_and_weights_are_chosen(seen: dict[str, Any]) -> None:
    assert seen["steps"]["keyboard"]["history"][0] == seen["steps"]["undo"]["retrieved"][0]
    assert seen["tags"] == ["click", "save"]
    assert seen["steps"]["weights"]["kv"] == "hit"
    assert seen["steps"]["weights"]["scores"][0] > seen["steps"]["keyboard"]["scores"][0]
    assert seen["steps"]["reset"]["history"] == seen["steps"]["start"]["history"]


def test_another_user(seen: dict[str, Any]) -> None:
    other = seen["steps"]["other"]
    assert (other["kv"], len(other["history"])) == ("miss", 6)


def test_a_refusal_is_shown_as_text(seen: dict[str, Any]) -> None:
    assert seen["steps"]["refused"]["problem"] == "<b>busy</b>"
    assert seen["steps"]["refused"]["ranked"] == seen["steps"]["other"]["ranked"]


def test_it_is_readable_on_a_phone_in_the_dark(seen: dict[str, Any]) -> None:
    phone = seen["steps"]["phone"]
    assert phone["kv"] == "extended"
    assert max(step["wider"] for step in seen["steps"].values()) <= 0
    assert (phone["paper"], seen["steps"]["start"]["paper"]) == ("rgb(19, 20, 24)", "rgb(246, 246, 243)")
    assert seen["visible"] == [["History"], ["Retrieved"], ["Re-ranked"]]
