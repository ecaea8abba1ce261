from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from unipinrec.cli.export import _print_report
from unipinrec.errors import ExportError
from unipinrec.export.checkpoint_source import source_from_checkpoint
from unipinrec.export.checks.reference import Reference, ReferenceReport, with_reference
from unipinrec.export.golden import as_events
from unipinrec.export.protocol import MISSING_TIMESTAMP_MS, ExportSource
from unipinrec.runtime import verify_bundle
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.graphs.engine import pad_histories
from unipinrec.runtime.requests import History


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> ExportSource:
    return source_from_checkpoint(checkpoint)


def items_alone(source: ExportSource, rows: Sequence[int]) -> History:
    """Events without actions, surfaces and times, since a reference is told only the items."""
    return History(
        item_rows=np.array(rows),
        actions=np.zeros((len(rows), len(source.actions)), np.float32),
        surfaces=np.zeros(len(rows), np.int64),
        timestamps_ms=np.full(len(rows), MISSING_TIMESTAMP_MS),
    )


@pytest.fixture(scope="module")
def histories(source: ExportSource) -> list[History]:
    rng = np.random.default_rng(0)
    lengths = [1, 2, 9, 16, source.model.max_history + 5]
    return [items_alone(source, rng.integers(0, len(source.item_ids), length).tolist()) for length in lengths]


@pytest.fixture(scope="module")
def reference(source: ExportSource, bundle: Path) -> Reference:
    table = torch.from_numpy(np.array(Bundle.open(bundle).item_vectors))
    outcomes = torch.from_numpy(source.positive)[None].float() if source.model.outcome_conditioned else None

    @torch.inference_mode()
    def scores(items: Sequence[str]) -> NDArray[np.float32]:
        rows = [source.item_ids.index(item) for item in items]
        _, hidden = source.servable.encode(as_events(pad_histories([items_alone(source, rows)]), table))
        return (source.servable.retrieve(hidden, outcomes)[0, 0] @ table.T).numpy()

    return scores


def test_the_answers_of_a_bundle_are_compared_fresh_and_cached(
    copy: Path,
    source: ExportSource,
    histories: list[History],
    reference: Reference,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = with_reference(copy, source, histories, reference)
    report = msgspec.convert(manifest.config["reference"], ReferenceReport)
    assert report.histories == 5
    assert list(report.served) == ["fresh", "cached fp32", "cached int8"]
    assert report.served["fresh"].max_score_diff < 1e-5
    assert report.served["cached fp32"].max_score_diff < 1e-5
    assert report.served["cached int8"].max_score_diff > 1e-5  # a cached beginning was rounded, and read
    assert report.served["fresh"].same_top_ten == report.served["cached fp32"].same_top_ten == 1.0
    assert Bundle.open(copy).manifest == manifest
    assert verify_bundle(copy, "cpu").ok
    _print_report(copy, manifest, 1.0)
    printed = " ".join(capsys.readouterr().out.split())
    assert "cached fp32: scores are within" in printed
    assert "its ten best items are served for 100.0% of 5 histories" in printed


def test_without_histories_random_ones_are_compared(copy: Path, source: ExportSource) -> None:
    lengths: list[int] = []

    def reference(items: Sequence[str]) -> NDArray[np.float32]:
        lengths.append(len(items))
        return np.zeros(len(source.item_ids), np.float32)

    with pytest.raises(ExportError, match="fresh: a score differs"):
        with_reference(copy, source, [], reference)
    assert len(lengths) == 100
    assert len(set(lengths)) > 10


def test_scores_that_differ_are_an_error(
    copy: Path, source: ExportSource, histories: list[History], reference: Reference
) -> None:
    with pytest.raises(
        ExportError, match=r"fresh: a score differs from the reference by 0\.001, .*; 100% of 5 histories"
    ):
        with_reference(copy, source, histories, lambda items: reference(items) + 1e-3)
    assert "reference" not in Bundle.open(copy).manifest.config


@pytest.mark.parametrize("scores", [np.zeros(7, np.float32), np.float32(1.0), np.full(300, np.nan, np.float32)])
def test_a_reference_that_returns_something_else_is_named(
    copy: Path, source: ExportSource, histories: list[History], scores: NDArray[np.float32]
) -> None:
    with pytest.raises(
        ExportError, match=r"the reference returned float32 \[.*\] for 1 events; it must return a finite"
    ):
        with_reference(copy, source, histories, lambda items: scores)
