from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from answers import STORED
from safetensors.numpy import load_file, save_file

from unipinrec.errors import BundleError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.golden import read_golden
from unipinrec.runtime.bundle.integrity import fingerprint

Reseal = Callable[..., None]


def with_other(tmp_path: Path, reseal: Reseal, file: str, name: str, value: Any) -> Bundle:
    folder = Path(shutil.copytree(STORED, tmp_path / "copy"))
    tensors = load_file(folder / file)
    if value is None:
        del tensors[name]
    elif isinstance(value, np.ndarray):
        tensors[name] = value
    else:
        tensors[name].flat[-1] = value
    save_file(tensors, folder / file)
    reseal(folder)
    return Bundle.open(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("item_rows", 24, "item_rows is not from 0 to 23"),
        ("item_rows", -1, "item_rows is not from 0 to 23"),
        ("surfaces", 2, "surfaces is not from 0 to 1"),
        ("actions", 2, "actions is not from 0 to 1"),
        ("timestamps_ms", 2**62, "timestamps_ms is not from"),
        ("timestamps_ms", np.zeros(12, np.int64), r"timestamps_ms is int64 \[12\]"),
        ("actions", np.zeros((13, 3), np.uint8), r"actions is uint8 \[13, 3\]"),
        ("surfaces", np.zeros(13, np.int32), "surfaces is int32"),
        ("offsets", 12, "offsets do not divide the events among 2 users"),
        ("offsets", np.array([0, 14, 13]), "offsets do not divide"),
        ("offsets", np.array([0, 13]), r"offsets is int64 \[2\], expected int64 \[3\]"),
        ("item_rows", None, "item_rows is missing"),
    ],
)
def test_sample_users(tmp_path: Path, reseal: Reseal, name: str, value: Any, message: str) -> None:
    bundle = with_other(tmp_path, reseal, "users.safetensors", name, value)
    ways: list[Callable[[], object]] = [
        lambda: bundle.user_events("random-0"),
        lambda: bundle.sample_users(1),
        lambda: bundle.sample_histories(1),
    ]
    for way in ways:
        with pytest.raises(BundleError, match=rf"users\.safetensors: .*{message}"):
            way()


def test_users_with_one_id(tmp_path: Path, reseal: Reseal) -> None:
    folder = Path(shutil.copytree(STORED, tmp_path / "copy"))
    (folder / "user_ids.json").write_text('["a", "a"]')
    reseal(folder)
    with pytest.raises(BundleError, match=r"user_ids\.json: user ids occur twice"):
        Bundle.open(folder).sample_users(2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("history.item_rows", 24, "history.item_rows is not from 0 to 23"),
        ("history.lengths", 0, "history.lengths is not from 1 to 7"),
        ("history.lengths", 8, "history.lengths is not from 1 to 7"),
        ("history.surfaces", 5, "history.surfaces is not from 0 to 1"),
        ("history.actions", np.nan, "history.actions holds values that are not finite"),
        ("candidates.rows", -1, "candidates.rows is not from 0 to 23"),
        ("candidates.timestamps_ms", -2, "candidates.timestamps_ms is not from"),
        ("prefix_lengths", 8, "prefix_lengths is not from 0 to 7"),
        ("prefix_lengths", np.zeros(3, np.int64), r"prefix_lengths is int64 \[3\]"),
        ("history.lengths", None, "history.lengths is missing"),
        ("history.item_rows", None, "history.item_rows is missing"),
    ],
)
def test_golden_requests(tmp_path: Path, reseal: Reseal, name: str, value: Any, message: str) -> None:
    bundle = with_other(tmp_path, reseal, "golden.safetensors", name, value)
    with pytest.raises(BundleError, match=rf"golden\.safetensors: .*{message}"):
        read_golden(bundle)


@pytest.mark.parametrize("retired", [[2**70], [1, 1], [24], [-1], []])
def test_retired_rows(tmp_path: Path, reseal: Reseal, retired: list[int]) -> None:
    folder = Path(shutil.copytree(STORED, tmp_path / "copy"))
    (folder / "retired.json").write_text(json.dumps(retired))
    listed = msgspec.structs.asdict(fingerprint(folder / "retired.json"))
    reseal(folder, num_retired=max(1, len(retired)), files={"retired.json": listed})
    with pytest.raises(BundleError, match=r"retired\.json: not \d distinct rows"):
        Bundle.open(folder)


def test_an_index_that_is_searched_with_no_number(tmp_path: Path, reseal: Reseal) -> None:
    folder = Path(shutil.copytree(STORED, tmp_path / "copy"))
    reseal(folder, index={"ef_search": -1})
    with pytest.raises(BundleError, match="ef_search=-1 of the index is not from 1"):
        Bundle.open(folder)
