"""The published files themselves, where they are at hand: counts measured once, so that a change of meaning shows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from unipinrec.models.data.kuairand import read_kuairand
from unipinrec.models.data.movielens import read_movielens
from unipinrec.models.data.sasrec import read_sasrec
from unipinrec.models.data.schema import Dataset, TimeSplit
from unipinrec.models.data.validate import build_dataset

HOME = Path(os.environ.get("UNIPINREC_DATA") or Path(__file__).parents[3].parent / "shared" / "data")


def folder(name: str) -> Path:
    if not (HOME / name).is_dir():
        pytest.skip(f"{name} is not at hand; set UNIPINREC_DATA to the folder that holds it")
    return HOME / name


def sizes(dataset: Dataset) -> dict[str, int]:
    return {
        "users": dataset.events["user_id"].n_unique(),
        "items": dataset.items.height,
        "events": dataset.events.height,
        "slates": dataset.slates["slate_id"].n_unique(),
        "slate rows": dataset.slates.height,
    }


def actions(dataset: Dataset, table: str) -> dict[str, int]:
    return {name: getattr(dataset, table)[f"action_{name}"].sum() for name in dataset.spec.actions}


def test_kuairand_demo() -> None:
    dataset = build_dataset(read_kuairand(folder("kuairand-demo")))
    assert sizes(dataset) == {"users": 1000, "items": 5712, "events": 63745, "slates": 15235, "slate rows": 18238}
    assert dataset.spec.dropped == {"slates: duplicate row": 65}
    assert len(dataset.spec.surfaces) == 15
    assert dataset.events["timestamp_ms"].null_count() == 45442
    timed = dataset.events.drop_nulls("timestamp_ms")
    assert {name: timed[f"action_{name}"].sum() for name in dataset.spec.actions} == {
        "click": 7686,
        "long_view": 5230,
        "like": 254,
        "follow": 14,
        "comment": 41,
        "forward": 7,
        "hate": 12,
        "profile_enter": 338,
    }
    assert dataset.spec.split is not None
    assert (timed["timestamp_ms"] >= dataset.spec.split.test_start_ms).sum() == 10848


@pytest.mark.slow
def test_kuairand_pure() -> None:
    dataset = build_dataset(read_kuairand(folder("kuairand-pure")))
    assert sizes(dataset) == {
        "users": 27077,
        "items": 7583,
        "events": 1039631,
        "slates": 192614,
        "slate rows": 221774,
    }
    assert dataset.spec.dropped == {"events: duplicate": 5885, "slates: duplicate row": 670}
    assert {name: len(words) for name, words in dataset.spec.categories.items()} == {
        "tag": 43,
        "author": 6510,
        "video_type": 3,
        "upload_type": 14,
        "music_type": 5,
    }


def test_movielens_100k() -> None:
    dataset = build_dataset(read_movielens(folder("ml-100k")))
    assert sizes(dataset) == {"users": 943, "items": 1682, "events": 100000, "slates": 2793, "slate rows": 100000}
    assert dataset.spec.dropped == {"events: out of order (sorted)": 48603}
    assert actions(dataset, "events") == {"rate": 100000, "like": 55375}
    assert dataset.spec.split == TimeSplit(valid_start_ms=889236939000, test_start_ms=891381545000)
    assert dataset.items.null_count().row(0, named=True) == {
        "item_id": 0,
        "title": 0,
        "dense_genres": 0,
        "category_genre": 2,
        "category_decade": 1,
    }


def test_movielens_1m_without_times() -> None:
    dataset = build_dataset(read_movielens(folder("ml-1m")))
    assert sizes(dataset) == {"users": 6040, "items": 3883, "events": 999611, "slates": 0, "slate rows": 0}
    assert dataset.items["title"].str.contains("é").sum() > 0
    assert dataset.spec.split is None


def test_sasrec_file_of_movielens_1m() -> None:
    dataset = build_dataset(read_sasrec(folder("ml-1m") / "ml-1m_sasrec.txt.gz"))
    assert sizes(dataset) == {"users": 6040, "items": 3416, "events": 999611, "slates": 0, "slate rows": 0}
    assert dataset.spec.dropped == {}


@pytest.mark.parametrize(
    ("name", "users", "items", "events"),
    [
        ("Beauty", 22363, 12101, 198502),
        ("Sports_and_Outdoors", 35598, 18357, 296337),
        ("Toys_and_Games", 19412, 11924, 167597),
    ],
)
def test_s3rec_files_have_the_counts_of_the_paper(name: str, users: int, items: int, events: int) -> None:
    dataset = build_dataset(read_sasrec(folder("amazon-s3rec") / f"{name}.txt.gz"))
    assert sizes(dataset) == {"users": users, "items": items, "events": events, "slates": 0, "slate rows": 0}
