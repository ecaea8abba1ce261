from __future__ import annotations

import json
from pathlib import Path

import pytest
from answers import STORED
from click.testing import CliRunner, Result

from unipinrec.cli import main
from unipinrec.runtime import Bundle

LINE = {"dense": {"content": [0.5] * 16, "log_duration": [2.0]}, "categories": {"topic": "unheard-of"}}


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"item": name, **LINE}) + "\n" for name in ("late-1", "late-2")))
    return path


@pytest.fixture
def gone(tmp_path: Path) -> Path:
    path = tmp_path / "gone.txt"
    path.write_text("item-3\n\nitem-9\nitem-9\n")
    return path


@pytest.mark.hnswlib
def test_items_are_added_and_retired(bundle: Path, items: Path, gone: Path, tmp_path: Path) -> None:
    out = tmp_path / "new[v2]" / "[/bundle]"  # no markup
    result = run("index", bundle, "--out", out, "--add", items, "--retire", gone)
    assert result.exit_code == 0
    assert f"{out}: 300 items before, 2 added, 2 retired (1 were already), 300 now; index incremental" in result.stdout
    assert "2 of 2 added items have a topic that the model does not know" in " ".join(result.stderr.split())
    assert run("verify", out).exit_code == 0


@pytest.mark.hnswlib
def test_the_documented_json(bundle: Path, items: Path, tmp_path: Path) -> None:
    result = run("index", bundle, "--out", tmp_path / "new", "--add", items, "--recall", "0.95", "--json")
    document = json.loads(result.stdout)
    new = Bundle.open(tmp_path / "new")
    assert new.manifest.index is not None
    assert document == {
        "bundle": new.hash,
        "parent": Bundle.open(bundle).hash,
        "items_before": 300,
        "items_after": 302,
        "added": 2,
        "retired": 0,
        "already_retired": 0,
        "unknown_words": {"topic": 2},
        "way": "incremental",
        "recall": new.manifest.index.recall,
        "recall_target": 0.95,
        "ef": 100,
        "m": 16,
    }


@pytest.mark.hnswlib
def test_a_low_recall_is_warned_of(bundle: Path, gone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unipinrec.runtime.retrieval import index_build

    monkeypatch.setattr(index_build, "recall", lambda found, true: 0.5)
    result = run("index", bundle, "--out", tmp_path / "new", "--retire", gone, "--json")
    assert result.exit_code == 0
    assert "warning: the index finds 0.5000 of the nearest 100 items, not 0.99" in result.stderr
    assert "requests will scan all items; a lower --recall would use the index" in result.stderr
    assert (json.loads(result.stdout)["way"], json.loads(result.stdout)["recall"]) == ("rebuilt", 0.5)


def test_one_of_add_and_retire_is_needed(bundle: Path, tmp_path: Path) -> None:
    result = run("index", bundle, "--out", tmp_path / "new")
    assert result.exit_code == 2
    assert "give --add, --retire or both" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"item-3\nnope\n", "gone.txt line 2: item 'nope' is not among the 300 items"),
        (b"\xff", "gone.txt: 'utf-8' codec can't decode"),
    ],
)
def test_a_bad_list_is_named_by_line(bundle: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "gone.txt").write_bytes(content)
    result = run("index", bundle, "--out", tmp_path / "new", "--retire", tmp_path / "gone.txt")
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words", [("export", "checkpoint"), ("index", "bundle", "--add", __file__, "--out")])
@pytest.mark.parametrize(
    ("recall", "message"), [("1.5", "1.5 is not in the range 0.0<x<=1.0"), ("nan", "nan is not a finite number")]
)
def test_a_recall_that_cannot_be_is_wrong_use(
    tmp_path: Path, words: tuple[str, ...], recall: str, message: str
) -> None:
    result = run(*words, tmp_path / "new", "--recall", recall)
    assert result.exit_code == 2
    assert message in result.stderr


def test_help_shows_an_example() -> None:
    assert "unipinrec index bundle/ --out bundle-2/" in run("index", "--help").stdout


def test_a_bundle_without_an_index_says_so(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").write_text("item-3\n")
    words = ("index", STORED.with_name("bundle_v3"), "--retire", tmp_path / "gone.txt", "--out")
    assert "23 now; no index: requests scan all items, " in run(*words, tmp_path / "said").stdout
    document = json.loads(run(*words, tmp_path / "new", "--json").stdout)
    assert (document["way"], document["recall"], document["ef"]) == ("none", None, None)
