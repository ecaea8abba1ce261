"""MovieLens folders, written by the tests in the exact form of the files."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from unipinrec.errors import DataError
from unipinrec.models.data.movielens import GENRES, read_movielens
from unipinrec.models.data.validate import SplitFractions, build_dataset

FLAGS_COMEDY = "|".join("1" if genre in ("Animation", "Comedy") else "0" for genre in GENRES)
FLAGS_NONE = "|".join("1" if genre == "unknown" else "0" for genre in GENRES)
U_DATA = "1\t2\t3\t881250949\n1\t1\t4\t881250948\n1\t2\t5\t881250948\n2\t1\t1\t891717742\n"
U_ITEM = (
    f'1|"Toy" Story (1995)|01-Jan-1995||http://us.imdb.com/M/title-exact?Toy%20Story%20(1995)|{FLAGS_COMEDY}\n'
    f"2|Amélie|||\t|{FLAGS_NONE}\n".replace("\t", "")
)
RATINGS = "1::1193::5::978300760\n1::661::3::978302109\n"
MOVIES = (
    "661::Misérables, Les (1909)::Drama|Musical\n1193::One Flew Over the Cuckoo's Nest (1975)::Drama\n3::Odd (2000)::\n"
)


def write_100k(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "u.data").write_text(U_DATA)
    (folder / "u.item").write_text(U_ITEM, encoding="latin-1")
    return folder


@pytest.mark.parametrize("inside", ["", "ml-100k"])
def test_100k_ratings_are_events_in_time_order_with_ties_in_file_order(tmp_path: Path, inside: str) -> None:
    write_100k(tmp_path / inside)
    dataset = build_dataset(replace(read_movielens(tmp_path), split=None))
    assert dataset.spec.name == "ml-100k"
    assert (dataset.spec.actions, dataset.spec.positive_actions) == (("rate", "like"), ("like",))
    assert dataset.spec.surfaces == ("unknown",)
    assert dataset.events.select("user_id", "item_id", "timestamp_ms", "action_rate", "action_like").rows() == [
        ("1", "1", 881250948000, True, True),
        ("1", "2", 881250948000, True, True),
        ("1", "2", 881250949000, True, False),
        ("2", "1", 891717742000, True, False),
    ]
    assert dataset.slates.select("slate_id", "item_id", "position").rows() == [(0, "1", 0), (0, "2", 1), (1, "1", 0)]
    assert dataset.spec.dropped == {"events: out of order (sorted)": 1, "slates: duplicate row": 1}


def test_100k_movies_keep_accents_and_quotes_and_have_genres_and_decade(tmp_path: Path) -> None:
    items = build_dataset(replace(read_movielens(write_100k(tmp_path)), split=None)).items
    assert items.select("item_id", "title", "category_genre", "category_decade").rows() == [
        ("1", '"Toy" Story (1995)', "Animation", "1990s"),
        ("2", "Amélie", None, None),
    ]
    assert items["dense_genres"].to_list() == [
        [float(genre in ("Animation", "Comedy")) for genre in GENRES],
        [1.0] + [0.0] * 18,
    ]


def test_1m_reads_ratings_with_the_same_mapping(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text(RATINGS)
    (tmp_path / "movies.dat").write_text(MOVIES, encoding="latin-1")
    raw = read_movielens(tmp_path)
    assert raw.name == "ml-1m"
    assert raw.split == SplitFractions(valid=0.1, test=0.1)
    assert raw.slates.select("item_id", "timestamp_ms").rows() == [(1193, 978300760000), (661, 978300760000)]
    assert raw.events.select("item_id", "timestamp_ms", "action_rate", "action_like").rows() == [
        (1193, 978300760000, True, True),
        (661, 978302109000, True, False),
    ]
    assert raw.items.select("item_id", "title", "category_genre", "category_decade").rows() == [
        ("661", "Misérables, Les (1909)", "Drama", "1900s"),
        ("1193", "One Flew Over the Cuckoo's Nest (1975)", "Drama", "1970s"),
        ("3", "Odd (2000)", None, "2000s"),
    ]
    assert pl.Series(raw.items["dense_genres"][0])[GENRES.index("Musical")] == 1


@pytest.mark.parametrize("packed", [False, True])
def test_1m_without_times_is_one_action_in_list_order(tmp_path: Path, packed: bool) -> None:
    text = b"user_id,movie_id,pos\n1,661,1\n1,1193,0\n2,661,0\n"
    name = "interactions_chronological.csv"
    (tmp_path / (name + ".gz" * packed)).write_bytes(gzip.compress(text) if packed else text)
    (tmp_path / "movies.dat").write_text(MOVIES, encoding="latin-1")
    dataset = build_dataset(read_movielens(tmp_path))
    assert dataset.events.select("user_id", "item_id", "timestamp_ms", "action_rate").rows() == [
        ("1", "1193", None, True),
        ("1", "661", None, True),
        ("2", "661", None, True),
    ]
    assert (dataset.spec.split, dataset.slates.height, dataset.spec.actions) == (None, 0, ("rate",))


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no MovieLens data; it must hold u.data and u.item"):
        read_movielens(tmp_path)


def test_missing_movies_are_refused(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text(U_DATA)
    with pytest.raises(DataError, match=r"u.item: not a MovieLens file of 24 columns .*No such file"):
        read_movielens(tmp_path)


@pytest.mark.parametrize("text", ["1\t2\t3\n", "1\t2\t3\t4\t5\n", "1\t2\tgood\t881250949\n", ""])
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    write_100k(tmp_path)
    (tmp_path / "u.data").write_text(text)
    with pytest.raises(DataError, match=r"u.data: not a MovieLens file of 4 columns"):
        read_movielens(tmp_path)
