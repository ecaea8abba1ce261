"""The documents say what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest
from quality_tables import DOCUMENTS, TABLE, main, mean, spread, tables, written

ONE = dict.fromkeys(("mean", "median", "min", "max"), 0.25)
THREE = {"mean": 0.25, "median": 0.2, "min": 0.125, "max": 1.0}


def test_documents_agree_with_the_results() -> None:
    found = tables()
    named = [match[1] for path in DOCUMENTS for match in TABLE.finditer(path.read_text())]
    assert set(named) == set(found)
    for path in DOCUMENTS:
        assert written(path.read_text(), found) == path.read_text(), f"run bench/quality_tables.py: {path}"


def test_a_document_that_strays_is_found_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = DOCUMENTS[0].read_text()
    stray = tmp_path / "benchmarks.md"
    stray.write_text(text.replace("| joint | .", "| joint | .9"))
    kept = stray.read_text()
    assert kept != text
    monkeypatch.setattr("quality_tables.DOCUMENTS", (stray,))
    monkeypatch.setattr("sys.argv", ["quality_tables.py", "--check"])
    with pytest.raises(SystemExit, match=r"benchmarks.md differs from bench/results/quality"):
        main()
    assert stray.read_text() == kept
    monkeypatch.setattr("sys.argv", ["quality_tables.py"])
    main()
    assert stray.read_text() == text


def test_seeds_are_shown_where_there_are_several() -> None:
    assert spread({"AUC": ONE}, "AUC") == ".2500"
    assert spread({"AUC": THREE}, "AUC") == ".2500 .1250-1.0000"
    assert spread({}, "AUC") == ""
    assert mean({"AUC": ONE, "GAUC": THREE}, "AUC", "GAUC") == ".2500 / .2500"
