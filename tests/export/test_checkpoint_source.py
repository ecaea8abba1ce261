from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from unipinrec.errors import CheckpointError
from unipinrec.export.checkpoint_source import source_from_checkpoint


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def test_the_metrics_are_those_of_the_best_epoch(copy: Path) -> None:
    epochs = '{"epoch": 1, "best": true, "metrics": {"a": 1}}, {"epoch": 2, "best": false, "metrics": {"a": 2}}'
    (copy / "metrics.json").write_text(f'{{"epochs": [{epochs}], "settings": {{}}}}')
    assert source_from_checkpoint(copy).metrics == {"split": "valid", "a": 1}
    (copy / "metrics.json").unlink()
    assert source_from_checkpoint(copy).metrics is None


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"epochs": [', r"metrics\.json: Input data was truncated; pass a folder that"),
        (b"{}", r"metrics\.json: Object missing required field `epochs`"),
        (b'{"epochs": [{"best": "\xff"}]}', r"metrics\.json: "),
    ],
)
def test_damaged_metrics_are_named(copy: Path, content: bytes, match: str) -> None:
    (copy / "metrics.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        source_from_checkpoint(copy)
