"""`unipinrec export --source`: a model of one's own, by the name of a function. A checkpoint: test_train.py."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from unipinrec.cli import main
from unipinrec.runtime import Recommender

MODEL = """
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from unipinrec.export.histories import Histories
from unipinrec.export.protocol import ExportSource
import names_beside_it

print("made")

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(20, 8)
        self.value = nn.Linear(8, 8)

    def encode(self, events):
        last = events.item_vectors.gather(1, (events.lengths - 1)[:, None, None].expand(-1, 1, 8))[:, 0]
        return [(events.item_vectors[:, None], self.value(events.item_vectors)[:, None])], last

    def extend(self, events, past):
        return self.encode(events)

    def retrieve(self, last, outcomes):
        return last[:, None]

    def rank(self, past, candidates):
        (key, value), = past.key_values
        empty = torch.arange(key.shape[2]) >= past.lengths[:, None]
        scores = (candidates.item_vectors @ key[:, 0].transpose(1, 2)).masked_fill(empty[:, None], -1e9)
        return (candidates.item_vectors * (scores.softmax(-1) @ value[:, 0])).sum(-1, keepdim=True)

    def embed_items(self, rows, dense, categories):
        return F.normalize(self.items(rows), dim=-1)

def alone():
    return ExportSource.simple(Own(), names_beside_it.IDS, max_history=10)

def both():
    rows = np.arange(12)
    return alone(), Histories(user_ids=["ada", "bo", "cy"], offsets=np.array([0, 4, 8, 12]), item_rows=rows,
        actions=np.ones((12, 1), np.uint8), surfaces=rows * 0, timestamps_ms=rows * 1000)

def arguments(path): pass
def empty(): pass
def three(): return alone(), None, None
def wrong(): return nn.Linear(2, 2).encode
def stops(): raise SystemExit("usage: own.py")
def refused(): return ExportSource.simple(Own(), [None], max_history=10)
LIMIT = 3
"""


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, words)])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a package of one's own, which is the current directory, but not on Python's path."""
    known = set(sys.modules)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "own.py").write_text(MODEL)
    (tmp_path / "shop" / "broken.py").write_text("import no_such_library\n")
    (tmp_path / "names_beside_it.py").write_text("IDS = range(20)\n")
    yield tmp_path
    for name in [name for name in set(sys.modules) - known if name.startswith(("shop", "names_beside_it"))]:
        del sys.modules[name]


@pytest.mark.hnswlib
def test_a_model_of_ones_own_becomes_a_bundle(here: Path) -> None:
    words = ("--source", "shop.own:both", "--users", "2", "--recall", "0.9", "--precision", "bf16", "--json")
    result = run(*words, "bundle")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["bundle"] == "bundle"
    assert list(document["precisions"]) == ["bf16"]
    assert document["index"]["recall_target"] == 0.9
    assert result.stderr.startswith("made\n")
    assert json.loads((here / "bundle/user_ids.json").read_bytes()) == ["ada", "bo"]
    with Recommender.load(here / "bundle", "cpu") as recommender:
        slate = recommender.recommend([{"item": "3", "actions": ["click"]}], k=19)
    assert {item.item for item in slate.items} == {str(row) for row in range(20)} - {"3"}


@pytest.mark.parametrize("missing", [True, False])
def test_a_bundle_needs_no_index(here: Path, monkeypatch: pytest.MonkeyPatch, missing: bool) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, "hnswlib", None)
    result = run("--source", "shop.own:both", "--users", "2", *(() if missing else ("--no-index",)), "bundle")
    assert result.exit_code == 0, result.stderr
    assert "20 items" in result.stdout
    assert "no index: requests scan all items" in result.stdout
    manifest = json.loads((here / "bundle/manifest.json").read_bytes())
    assert (manifest["format_version"], manifest["index"], "hnswlib" in manifest["tools"]) == (3, None, False)
    assert not (here / "bundle/index.hnsw").exists()


def test_a_target_of_no_index_is_wrong_use() -> None:
    result = run("checkpoint", "bundle", "--no-index", "--recall", "0.9")
    assert result.exit_code == 2
    assert "--recall is the target of an index, and --no-index builds none; pass one of them" in result.stderr


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("shop.own", "--source shop.own is not of the form package.module:function"),
        ("shop/own.py:both", "--source shop/own.py:both is not of the form package.module:function"),
        (
            "shop.owm:both",
            "--source: there is no module shop.owm in {here} or on Python's path; run the command in the f",
        ),
        ("shap.own:both", "--source: there is no module shap in {here} or on"),
        (
            "shop.broken:both",
            "shop.broken:both raised ModuleNotFoundError: No module named 'no_such_library' ({here}/sho",
        ),
        (
            "shop.own:bath",
            "--source: {here}/shop/own.py has no function bath; it defines ['Own', 'alone', 'both', 'argum",
        ),
        ("shop.own:LIMIT", "own.py has no function LIMIT; it defines ['Own', 'alone'"),
        (
            "shop.own:arguments",
            "shop.own:arguments raised TypeError: arguments() missing 1 required positional argument:",
        ),
        (
            "shop.own:wrong",
            "shop.own:wrong raised AttributeError: 'Linear' object has no attribute 'encode' ({here}/shop",
        ),
        ("shop.own:stops", "shop.own:stops raised SystemExit: usage: own.py ({here}/shop/own.py:"),
        ("shop.own:empty", "shop.own:empty returned NoneType; return an ExportSource, or (ExportSource, Histories)"),
        ("shop.own:three", "shop.own:three returned ExportSource, NoneType, NoneType; return an ExportSource, or"),
        ("shop.own:refused", "error: item_ids: row 0 is [None], a NoneType; pass text or integers"),
    ],
)
def test_a_wrong_source_is_explained(here: Path, source: str, words: str) -> None:
    result = run("--source", source, "bundle")
    assert result.exit_code == 1
    assert words.format(here=here) in result.stderr
    assert len(result.stderr.splitlines()) <= 2  # the module's own line, and the error
    assert not (here / "bundle").exists()


def test_prepared_data_of_another_catalogue_is_refused(here: Path, dataset: Path) -> None:
    other = run("--source", "shop.own:alone", "bundle", "--data", dataset)
    assert other.exit_code == 1
    assert "is not the data that the model was trained on: items and actions and surfaces differ" in other.stderr
    twice = run("--source", "shop.own:both", "bundle", "--data", dataset)
    assert twice.exit_code == 1
    assert "shop.own:both returned histories, and --data has others; leave one of them out" in twice.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoint"], "1 argument; pass CHECKPOINT and BUNDLE"),
        (
            ["--source", "a:b", "checkpoint", "bundle"],
            "2 arguments; pass BUNDLE alone, since --source replaces CHECKPOINT",
        ),
        ([], "Missing argument '[CHECKPOINT] BUNDLE'"),
        (["--source", "a:b", "bundle", "--evaluate", "9"], "--evaluate measures on prepared data; pass --data too"),
    ],
)
def test_arguments_that_do_not_fit_each_other(words: list[str], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert re.sub(r"\s+", " ", result.stderr).count(message) == 1
