"""The items of a column map: the rows of an items file, with features and metadata, or what the events name."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import polars as pl

from unipinrec.errors import DataError, listed
from unipinrec.models.data import schema
from unipinrec.models.data.files import FileForm, as_numbers, as_text, joined, paths_of, read_table

log = logging.getLogger(__name__)
# Numbers that survive as f64: no zeros in front, as in the code 007, and no more digits than it holds.
NUMBER = r"^-?(0|[1-9]\d{0,14})(\.\d{1,15})?$"
# Numbers in one text: with spaces, semicolons or bars between them; in brackets also with commas.
VECTOR = r"^\s*(?:[\[(][^\[\]()]*[\])]|[^\[\](),]+)\s*$"


class TagRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Several words per item: a column of lists, or of text with a separator.

    They become a dense feature with a flag for each of the `most` commonest words, and a category: the first word.
    """

    column: str
    separator: str = "|"
    most: int = 32

    def __post_init__(self) -> None:
        if not self.separator or self.most < 1:
            raise ValueError(f"tags of column {self.column!r}: `separator` must not be empty, `most` at least 1")


class ItemColumns(FileForm, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Columns of the items file; a dense feature is one column (a number, a list, or text of them) or several numbers.

    `missing = "mean"` puts the mean where a dense feature has a gap, and adds its flag as the feature NAME_missing.
    `union` adds the items that only events and slates name. `metadata` lists columns, or names them anew: they are kept
    for display and filters, and not taught to the model.
    """

    item: str
    title: str | None = None
    dense: dict[str, str | tuple[str, ...]] = msgspec.field(default_factory=dict)
    categories: dict[str, str] = msgspec.field(default_factory=dict)
    tags: dict[str, TagRule] = msgspec.field(default_factory=dict)
    metadata: dict[str, str] | tuple[str, ...] = ()
    missing: Literal["mean"] | None = None
    union: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if empty := [name for name, columns in self.dense.items() if not columns]:
            raise ValueError(f"`dense`: {empty[0]!r} names no column; give one or several, or omit it")
        if wrong := [name for name in (*self.categories, *self.tags) if "=" in name]:
            raise ValueError(f'`categories`: {wrong[0]!r} has a "=", so that no filter can name it; rename it')
        if wrong := [name for name in self.kept if "=" in name or not name]:
            raise ValueError(
                f'`metadata`: {wrong[0]!r} is empty or has a "=", so that no filter can name it; rename it'
            )
        if len(self.kept) > schema.MOST_METADATA:
            raise ValueError(f"`metadata` has {len(self.kept)} columns; keep at most {schema.MOST_METADATA}")
        if twice := self.tags.keys() & (self.dense.keys() | self.categories.keys()):
            raise ValueError(f"`tags`: {min(twice)!r} is in `dense` or `categories` too; rename it")
        if self.union and self.dense and self.missing is None:
            raise ValueError('`union` adds items without numbers; say what they get with `missing = "mean"`')

    @property
    def kept(self) -> dict[str, str]:
        """The column of each name of metadata."""
        return self.metadata if isinstance(self.metadata, dict) else {name: name for name in self.metadata}


def read_items(folder: Path, mapped: ItemColumns | None, tables: list[pl.DataFrame]) -> pl.DataFrame:
    """The catalogue: `item_id`, `title`, and the mapped `dense_*`, `category_*` and `metadata_*`.

    Args:
        folder: The folder of the items file.
        mapped: Its columns; None makes the catalogue from the tables.
        tables: Events and slates with `item_id`, or without columns.

    Raises:
        DataError: The file does not fit the map.
    """
    ids = pl.concat([frame["item_id"].cast(pl.String) for frame in tables if frame.width])
    named = pl.DataFrame({"item_id": ids.drop_nulls().unique().sort()})
    if mapped is None:
        return named.with_columns(title=pl.lit(None, pl.String))
    dense = {name: [of] if isinstance(of, str) else of for name, of in mapped.dense.items()}
    flat = {column for columns in dense.values() for column in columns}
    tags = {rule.column for rule in mapped.tags.values()}
    columns = {mapped.item, *flat, *tags, *mapped.categories.values(), *mapped.kept.values()}
    columns |= {mapped.title} if mapped.title else set()
    text = {name: pl.String() for name in columns - flat}
    frame = joined(paths_of(folder, mapped), partial(read_table, columns=columns, types=text, form=mapped))
    frame = frame.with_columns(as_text(frame[mapped.item], "item").alias(mapped.item))
    if mapped.union:
        more = named.rename({"item_id": mapped.item}).join(frame, on=mapped.item, how="anti")
        frame = pl.concat([frame, more], how="diagonal")
    vectors = [
        one
        for name, of in dense.items()
        for one in _filled(name, pl.select(pl.concat_list(map(_vector, frame.select(of)))).to_series(), mapped)
    ]
    return frame.select(
        pl.col(mapped.item).alias("item_id"),
        (pl.col(mapped.title) if mapped.title else pl.lit(None, pl.String)).alias("title"),
        *vectors,
        *(pl.col(column).alias(schema.CATEGORY_PREFIX + name) for name, column in mapped.categories.items()),
        *(one for name, rule in mapped.tags.items() for one in _tags(name, frame[rule.column], rule)),
        *(_metadata(frame[column]).alias(schema.METADATA_PREFIX + name) for name, column in mapped.kept.items()),
    )


def _metadata(column: pl.Series) -> pl.Series:
    """The column as numbers if each of its values is one, else as text."""
    if column.dtype.is_float():
        return column.cast(pl.Float64).fill_nan(None)
    text = as_text(column, "metadata").str.strip_chars().replace("", None)
    known = text.drop_nulls()
    if known.len() and known.str.contains(NUMBER).all():
        return text.cast(pl.Float64)
    wrong = known.filter(~known.str.contains(NUMBER))
    if 2 * known.str.contains(r"^-?(0|[1-9]\d*)([.,]\d+)?$").sum() > known.len():
        log.warning(
            "metadata: column %r stays text, and no filter on numbers can use it: %s is no decimal number with a point "
            "(%d of %d)",
            column.name,
            listed(wrong, 1),
            wrong.len(),
            known.len(),
        )
    return text


def _vector(column: pl.Series) -> pl.Series:
    if isinstance(column.dtype, pl.Array):
        return column.arr.to_list()
    if isinstance(column.dtype, pl.List):
        return column
    if column.dtype == pl.String and column.str.contains(r"[\d.][\s;|,]+[-+\d.]|^\s*[\[(]").any():
        text = column.str.replace_all(r"^\s*[\[(]?\s*|\s*[\])]?\s*$", "").str.replace_all(r"[\s;|,]+", " ")
        numbers = pl.select(text.str.split(" ").list.eval(pl.element().cast(pl.Float64, strict=False))).to_series()
        unfit = ~column.str.contains(VECTOR) | numbers.list.eval(pl.element().is_null()).list.any()
        if (wrong := column.filter(unfit.fill_null(False))).len():
            raise DataError(
                f"dense: column {column.name!r} is text, {listed(wrong, 3)} is no number and no list of numbers, such "
                f"as [0.5, 1] or 0.5 1 (row {unfit.arg_true()[0] + 1}); decimals need a point"
            )
        return numbers.alias(column.name)
    return as_numbers(column, "dense")


def _filled(name: str, vectors: pl.Series, mapped: ItemColumns) -> list[pl.Series]:
    """The vectors without gaps, and the feature that says where gaps were."""
    own = schema.DENSE_PREFIX + name
    gap = pl.select(
        vectors.is_null()
        | vectors.list.eval(pl.element().is_null() | pl.element().cast(pl.Float64).is_nan()).list.any()
    ).to_series()
    if not gap.any():
        return [vectors.alias(own)]
    if mapped.missing is None:
        raise DataError(
            f"dense: {name!r} has gaps in {gap.sum():,} items, the first in row {gap.arg_true()[0] + 1}; "
            '`missing = "mean"` fills them and adds a flag'
        )
    known = vectors.filter(~gap)
    if not known.len() or known.list.len().n_unique() > 1:
        raise DataError(f"dense: {name!r} has {known.len():,} items without a gap, of one length or several; no mean")
    means = known.cast(pl.List(pl.Float64)).list.to_array(known.list.len()[0]).to_numpy().mean(axis=0)
    mean = pl.lit(pl.Series([means.tolist()], dtype=pl.List(pl.Float64))).first()
    filled = pl.select(pl.when(gap).then(mean).otherwise(vectors.cast(pl.List(pl.Float64)))).to_series().alias(own)
    return [filled, gap.cast(pl.Float64).alias(f"{own}_missing")]


def _tags(name: str, column: pl.Series, rule: TagRule) -> list[pl.Series]:
    words = (
        column.cast(pl.List(pl.String))
        if column.dtype.is_nested()
        else column.cast(pl.String).str.split(rule.separator)
    )
    words = pl.select(words.list.eval(pl.element().str.strip_chars().replace("", None).drop_nulls())).to_series()
    counts = words.explode().drop_nulls().value_counts(sort=False).sort("count", column.name, descending=[True, False])
    common = sorted(counts[column.name].head(rule.most))
    if not common:
        raise DataError(f"tags: column {column.name!r} is empty; omit it")
    flags = [pl.select(words.list.contains(word).fill_null(False).cast(pl.Float32)).to_series() for word in common]
    dense = pl.select(pl.concat_list(flags)).to_series().alias(schema.DENSE_PREFIX + name)
    return [dense, words.list.first().alias(schema.CATEGORY_PREFIX + name)]
