"""SASRec and S3-Rec text files."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from unipinrec.errors import DataError
from unipinrec.models.data.sasrec import read_sasrec
from unipinrec.models.data.validate import build_dataset

EXPECTED = [("1", "2"), ("1", "10"), ("1", "2"), ("2", "10")]


@pytest.mark.parametrize(
    "text",
    ["1 2\n1 10\n1 2\n2 10\n", "1 2 10 2\n2 10\n", "1\t2  10 2 \r\n2 10", "\ufeff1 2 10 2\n2 10"],
    ids=["sasrec", "s3rec", "other whitespace", "byte order mark"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_lines_are_histories_in_order_with_repeats(tmp_path: Path, text: str, packed: bool) -> None:
    path = tmp_path / ("Shop.txt" + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    dataset = build_dataset(read_sasrec(path, "made up"))
    assert dataset.events.select("user_id", "item_id").rows() == EXPECTED
    assert dataset.events["timestamp_ms"].null_count() == 4
    assert dataset.events["action_interact"].all()
    assert dataset.items["item_id"].to_list() == ["2", "10"]
    spec = dataset.spec
    assert (spec.name, spec.source, spec.actions, spec.positive_actions) == (
        "Shop",
        "made up",
        ("interact",),
        ("interact",),
    )
    assert (spec.split, dataset.slates.height, spec.dropped) == (None, 0, {})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"1 2\n3\n", r"line 2 is '3'; each line must be a user and one or more items"),
        (b"1 2\n\n1 3\n", r"line 2 is ''"),
        (b"", r"the file is empty"),
        (b"\xff\xfe", r"not readable as text"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_sasrec(tmp_path / "x.txt")


def test_a_truncated_gz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"1 2\n" * 99)[:-9])
    with pytest.raises(DataError, match=r"x.txt.gz: not readable as text: Compressed file ended"):
        read_sasrec(tmp_path / "x.txt.gz")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Is a directory.*give a .txt or .txt.gz file"):
        read_sasrec(tmp_path)
