"""MovieLens 100K and 1M: ratings as events, rating sessions as slates, genres and decade as item features.

Every rating is an event with the action `rate`; ratings of 4 and 5 are also `like`, the positive action.
Users rate movies that they saw elsewhere, several in one sitting: a slate holds the movies that were rated together,
not the movies that were shown.

A copy of ML-1M without ratings and times (`interactions_chronological.csv` with `user_id, movie_id, pos`) has only the
action `rate`, no slates, and a leave-one-out split. The text files are Latin-1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from unipinrec.errors import DataError
from unipinrec.models.data.files import read_table
from unipinrec.models.data.validate import DEFAULT_GAP_MS, RawTables, slates_from_events

# fmt: off
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)
# fmt: on
RATING_COLUMNS = {"user_id": pl.Int64, "item_id": pl.Int64, "rating": pl.Float64, "seconds": pl.Int64}
LIKED = 4
SOURCE = (
    "MovieLens, Harper and Konstan, TiiS 2015, doi 10.1145/2827872, "
    "https://grouplens.org/datasets/movielens; GroupLens terms: research only, cite, no "
    "redistribution and no commercial use without permission"
)


def read_movielens(folder: Path, gap_ms: int = DEFAULT_GAP_MS) -> RawTables:
    """Read a folder of ML-100K (`u.data`, `u.item`) or ML-1M (`ratings.dat`, `movies.dat`).

    Args:
        folder: Holds the files, or a folder `ml-100k` or `ml-1m` with them.
        gap_ms: Pause that ends a slate, see `slates_from_events`.

    Raises:
        DataError: The files are missing or not in their published form.
    """
    for home in (folder, folder / "ml-100k", folder / "ml-1m"):
        if (path := home / "u.data").exists():
            return _rated("ml-100k", _read_rows(path, "\t", RATING_COLUMNS), _movies_100k(home / "u.item"), gap_ms)
        if (path := home / "ratings.dat").exists():
            return _rated("ml-1m", _read_rows(path, "::", RATING_COLUMNS), _movies_1m(home / "movies.dat"), gap_ms)
        for path in sorted(home.glob("interactions_chronological.csv*")):
            return _listed(path, _movies_1m(home / "movies.dat"))
    raise DataError(f"{folder}: no MovieLens data; it must hold u.data and u.item, or ratings.dat and movies.dat")


def _rated(name: str, ratings: pl.DataFrame, items: pl.DataFrame, gap_ms: int) -> RawTables:
    events = ratings.select(
        "user_id",
        "item_id",
        pl.lit(None, pl.String).alias("surface"),
        (pl.col("seconds") * 1000).alias("timestamp_ms"),
        pl.lit(True).alias("action_rate"),
        (pl.col("rating") >= LIKED).alias("action_like"),
    )
    return RawTables(
        name=name,
        source=SOURCE,
        actions=("rate", "like"),
        positive_actions=("like",),
        events=events,
        items=items,
        slates=slates_from_events(events, gap_ms),
    )


def _listed(path: Path, items: pl.DataFrame) -> RawTables:
    events = read_table(path, ["user_id", "movie_id", "pos"]).select(
        "user_id",
        pl.col("movie_id").alias("item_id"),
        pl.lit(None, pl.String).alias("surface"),
        pl.lit(None, pl.Int64).alias("timestamp_ms"),
        pl.col("pos").alias("order"),
        pl.lit(True).alias("action_rate"),
    )
    only = ("rate",)
    return RawTables(
        name="ml-1m", source=SOURCE, actions=only, positive_actions=only, events=events, items=items, split=None
    )


def _movies_100k(path: Path) -> pl.DataFrame:
    texts = dict.fromkeys(("item_id", "title", "released", "video_released", "url"), pl.String)
    return _movies(_read_rows(path, "|", {**texts, **dict.fromkeys(GENRES, pl.Int8)}))


def _movies_1m(path: Path) -> pl.DataFrame:
    movies = _read_rows(path, "::", dict.fromkeys(("item_id", "title", "genres"), pl.String))
    genres = pl.col("genres").fill_null("").str.split("|")
    return _movies(movies.with_columns(genres.list.contains(genre).cast(pl.Int8).alias(genre) for genre in GENRES))


def _movies(movies: pl.DataFrame) -> pl.DataFrame:
    """Items from `item_id, title` and one 0/1 column per genre."""
    decade = pl.col("title").str.extract(r"\((\d{3})\d\)")
    return movies.select(
        "item_id",
        "title",
        pl.concat_list(GENRES).alias("dense_genres"),
        pl.coalesce(pl.when(pl.col(genre) == 1).then(pl.lit(genre)) for genre in GENRES[1:]).alias("category_genre"),
        (decade + "0s").alias("category_decade"),
    )


def _read_rows(path: Path, separator: str, columns: Mapping[str, type[pl.DataType]]) -> pl.DataFrame:
    """Rows of a Latin-1 file without header or quotes; the separator may be longer than one byte."""
    try:
        text = path.read_bytes().decode("latin-1").replace(separator, "\t")
        return pl.read_csv(
            text.encode(),
            glob=False,
            separator="\t",
            has_header=False,
            quote_char=None,
            new_columns=list(columns),
            schema_overrides=list(columns.values()),
        )
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: not a MovieLens file of {len(columns)} columns {list(columns)}: {error}") from error
