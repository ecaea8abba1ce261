"""Benchmark files of interactions in time order, without times: SASRec ("user item" per line) and S3-Rec
("user item item ..." per line). One reader reads both.

The only action is `interact`. There are no slates, and the split is leave-one-out, as in those papers.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import polars as pl

from unipinrec.errors import DataError
from unipinrec.models.data.validate import RawTables


def read_sasrec(path: Path, source: str = "unknown; ask the publisher of the file for its licence") -> RawTables:
    """Read a `.txt` file, plain or `.gz`.

    Args:
        path: The file. Ids may be any words without spaces.
        source: Where the data came from and under which licence.

    Raises:
        DataError: The file is missing, empty or damaged, or a line has no item.
    """
    lines = pl.Series("line", _text(path).splitlines(), dtype=pl.String).str.strip_chars()
    tokens = lines.str.replace_all(r"\s+", " ").str.split(" ")
    short = (tokens.list.len() < 2).arg_true()
    if short.len() or not lines.len():
        where = f"line {short[0] + 1} is {lines[short[0]]!r}" if short.len() else "the file is empty"
        raise DataError(f"{path}: {where}; each line must be a user and one or more items, separated by spaces")
    events = pl.DataFrame({"user_id": tokens.list.first(), "item_id": tokens.list.slice(1)}).explode("item_id")
    items = events.select(pl.col("item_id").unique()).sort(pl.col("item_id").str.len_bytes(), "item_id")
    return RawTables(
        name=path.name.removesuffix(".gz").removesuffix(".txt"),
        source=source,
        actions=("interact",),
        positive_actions=("interact",),
        events=events.with_columns(
            surface=pl.lit(None, pl.String), timestamp_ms=pl.lit(None, pl.Int64), action_interact=pl.lit(True)
        ),
        items=items.with_columns(title=pl.lit(None, pl.String)),
        split=None,
    )


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as text: {error}; give a .txt or .txt.gz file") from error
