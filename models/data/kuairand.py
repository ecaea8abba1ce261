"""KuaiRand: exposures of short videos with eight kinds of feedback, split by time.

There are two layouts. In the owner's files (`log_standard_*.csv`, `video_features_basic_*.csv`, in the folder or
its `data/`) every exposure has a time. In a reduced form (`impressions*.csv`, `history*.csv`, `videos.csv` or
`video_features_basic_*.csv`) older exposures are a list per user without times, ordered by `pos`. Files may end in
`.csv.gz`. The random-exposure log is not read, and neither are the statistic features, which leak the future.

Facts about the data:
- Every row is an exposure, engaged or not: all are events, and rows with a time also form slates.
- History lists have only `long_view` and `is_like`. 99.65 % of the long views of KuaiRand-Pure are clicks, so a long
  view there counts as a click. The other 30 % of clicks and all other actions are unknown there.
- Lists precede every row with a time, so features made from them do not leak. `dense_past_item` and
  `dense_past_author` are the log count of exposures and the log-odds of long view and like, shrunk by 20 rows.
- Log rows repeat (2.6 % of KuaiRand-Pure's later log); `build_dataset` merges and counts them.
- Split times are midnights in Beijing on `time_ms`; the `date` column disagrees with it near midnight.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from unipinrec.errors import DataError
from unipinrec.models.data.files import read_table
from unipinrec.models.data.schema import TimeSplit
from unipinrec.models.data.validate import DEFAULT_GAP_MS, RawTables, slates_from_events

ACTIONS = ("click", "long_view", "like", "follow", "comment", "forward", "hate", "profile_enter")
IDS = {"user_id": "user_id", "item_id": "video_id"}
VIDEO_TYPES: dict[str, pl.DataType] = {
    **dict.fromkeys(("video_id", "author_id"), pl.Int64()),
    **dict.fromkeys(("video_type", "upload_dt", "upload_type", "tag"), pl.String()),
    **dict.fromkeys(("video_duration", "music_type"), pl.Float64()),
}
PRIOR_ROWS = 20.0
SPLIT = TimeSplit(
    valid_start_ms=1_651_248_000_000,  # 2022-04-30 00:00 in Beijing
    test_start_ms=1_651_334_400_000,  # 2022-05-01 00:00 in Beijing
)
SOURCE = (
    "KuaiRand, Gao et al., CIKM 2022, doi 10.1145/3511808.3557624, https://kuairand.com; licence "
    "CC BY-SA 4.0, which requires the attribution, the licence and a note that the data was changed"
)


def read_kuairand(folder: Path, gap_ms: int = DEFAULT_GAP_MS) -> RawTables:
    """Read a KuaiRand folder.

    Args:
        folder: Holds the files, or a folder `data` or `KuaiRand-Pure/data` with them.
        gap_ms: Pause that ends a slate, see `slates_from_events`.

    Raises:
        DataError: Files are missing or lack columns.
    """
    home = _home(folder)
    timed = pl.concat([_read_log(path) for path in _files(home, "log_standard_*", "impressions*")])
    past = [_read_history(path) for path in _files(home, "history*") if not path.name.startswith("history_users")]
    items = _read_videos(_files(home, "videos*", "video_features_basic*"))
    return RawTables(
        name="kuairand",
        source=SOURCE,
        actions=ACTIONS,
        positive_actions=("long_view",),
        events=pl.concat([*past, timed], how="diagonal"),  # columns that the lists lack are null
        items=_with_past(items, pl.concat(past)) if past else items,
        slates=slates_from_events(timed, gap_ms),
        split=SPLIT,
    )


def _home(folder: Path) -> Path:
    for home in (folder, folder / "data", folder / "KuaiRand-Pure" / "data"):
        if _files(home, "videos*", "video_features_basic*") and _files(home, "log_standard_*", "impressions*"):
            return home
    raise DataError(
        f"{folder}: no KuaiRand data; it must hold log_standard_*.csv (or impressions*.csv) and "
        "video_features_basic_*.csv (or videos.csv), plain or .gz, here or in data/"
    )


def _files(folder: Path, *names: str) -> list[Path]:
    return sorted(path for name in names for end in (".csv", ".csv.gz") for path in folder.glob(name + end))


def _read_log(path: Path) -> pl.DataFrame:
    actions = {f"action_{name}": name if name == "long_view" else f"is_{name}" for name in ACTIONS}
    frame = _read_integers(path, {**IDS, "surface": "tab", "timestamp_ms": "time_ms", **actions})
    return frame.with_columns(pl.format("tab_{}", "surface").alias("surface"))


def _read_history(path: Path) -> pl.DataFrame:
    actions = {"action_click": "long_view", "action_long_view": "long_view", "action_like": "is_like"}
    frame = _read_integers(path, {**IDS, "order": "pos", **actions})
    return frame.with_columns(pl.col("action_click").replace(0, None))


def _read_integers(path: Path, sources: dict[str, str]) -> pl.DataFrame:
    """Integer columns, each under its new name."""
    columns = set(sources.values())
    frame = read_table(path, columns, dict.fromkeys(columns, pl.Int64()))
    return frame.select(pl.col(column).alias(name) for name, column in sources.items())


def _read_videos(paths: list[Path]) -> pl.DataFrame:
    frame = pl.concat([read_table(path, VIDEO_TYPES.keys(), VIDEO_TYPES) for path in paths])
    uploaded = pl.col("upload_dt").str.to_date("%Y-%m-%d", strict=False)
    age = (uploaded.max() - uploaded).dt.total_days()
    return frame.select(
        pl.col("video_id").alias("item_id"),
        pl.lit(None, pl.String).alias("title"),
        # The duration of pictures is 0 seconds.
        ((pl.col("video_duration").fill_null(0) / 1000).log1p()).alias("dense_log_duration"),
        age.fill_null(age.median()).alias("dense_age_days"),
        pl.col("tag").str.split(",").list.first().alias("category_tag"),
        pl.col("author_id").alias("category_author"),
        pl.col("video_type").alias("category_video_type"),
        pl.col("upload_type").alias("category_upload_type"),
        pl.col("music_type").cast(pl.Int64).alias("category_music_type"),
    )


def _with_past(items: pl.DataFrame, past: pl.DataFrame) -> pl.DataFrame:
    """Add the counts and rates of the history lists for each item and its author."""
    labels = ("action_long_view", "action_like")
    counts = past.group_by("item_id").agg(pl.len().alias("shown"), *(pl.col(label).sum() for label in labels))
    totals = past.select(pl.col(labels).sum()).row(0, named=True)
    items = items.join(counts, on="item_id", how="left", maintain_order="left")
    items = items.with_columns(pl.col("shown", *labels).fill_null(0))
    for name, key in (("item", "item_id"), ("author", "category_author")):
        count = {column: pl.col(column).sum().over(key) for column in ("shown", *labels)}
        odds = []
        for label in labels:
            prior = PRIOR_ROWS * (totals[label] + 1) / (past.height + 2)
            share = (count[label] + prior) / (count["shown"] + PRIOR_ROWS)
            odds.append((share / (1 - share)).log())
        items = items.with_columns(pl.concat_list(count["shown"].log1p(), *odds).alias(f"dense_past_{name}"))
    return items.drop("shown", *labels)
