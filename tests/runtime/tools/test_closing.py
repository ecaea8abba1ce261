"""Each command closes the graphs that it opens, in whatever way it runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from unipinrec.cli import main
from unipinrec.runtime.graphs.ort_cpu import OrtBackend

ITEM = {"item": "late", "dense": {"content": [0.5] * 16, "log_duration": [2.0]}, "categories": {"topic": "new"}}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[OrtBackend]:
    """All backends that are opened, kept alive so that no collector closes one."""
    backends: list[OrtBackend] = []
    init = OrtBackend.__init__

    def noted(self: OrtBackend, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        backends.append(self)

    monkeypatch.setattr(OrtBackend, "__init__", noted)
    return backends


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (("index", "BUNDLE", "--out", "FOLDER/new", "--add", "FOLDER/items.jsonl"), 3),
        (("verify", "BUNDLE"), 1),
        (("doctor", "BUNDLE"), 1),
        (("recommend", "BUNDLE", "--user", "nobody"), 1),
    ],
)
def test_every_opened_backend_is_closed(
    opened: list[OrtBackend], bundle: Path, tmp_path: Path, words: tuple[str, ...], count: int
) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps(ITEM) + "\n")
    filled = [word.replace("BUNDLE", str(bundle)).replace("FOLDER", str(tmp_path)) for word in words]
    result = CliRunner().invoke(main, filled)
    assert result.exit_code == 0, result.output
    assert len(opened) == count
    assert [len(backend._sessions) for backend in opened] == [0] * count
