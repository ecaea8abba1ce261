"""Any CSV or Parquet files, described by a small TOML file of column names. docs/data.md shows one.

Files may be `.csv`, `.tsv` (either also as `.gz`) or `.parquet`. Ids in text files are read as text, so "007"
stays "007". A gap in an action column means that the action did not happen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import polars as pl

from unipinrec.errors import DataError
from unipinrec.models.data_schema import ACTION_PREFIX, CATEGORY_PREFIX, DENSE_PREFIX
from unipinrec.models.data_validate import LONGEST_GAP_MINUTES, RawTables, slates_from_events

TEXT_ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


class ActionRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The action happened where `column` is one of `equals`, or is a number of `at_least` this much.

    With neither, the column itself says so as true/false or 1/0.
    """

    column: str
    equals: tuple[str | int | float | bool, ...] | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        if self.equals is not None and self.at_least is not None:
            raise ValueError(f"action of column {self.column!r} has both `equals` and `at_least`; give one")


class EventColumns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Columns of the events or the slates file; `slate` in events: they are exposures of that slate."""

    user: str
    item: str
    file: str | None = None
    timestamp: str | None = None
    timestamp_unit: Literal["s", "ms", "us", "iso"] | None = None
    surface: str | None = None
    order: str | None = None
    slate: str | None = None
    position: str | None = None

    def __post_init__(self) -> None:
        if (self.timestamp is None) != (self.timestamp_unit is None):
            raise ValueError("`timestamp` and `timestamp_unit` (s, ms, us or iso) go together")


class ItemColumns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Columns of the items file; a dense feature is one column (a number or a list) or several numbers."""

    file: str
    item: str
    title: str | None = None
    dense: dict[str, str | tuple[str, ...]] = {}
    categories: dict[str, str] = {}


class ColumnMap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The TOML file. Slates come from `[slates]`, `events.slate`, or pauses of `slate_gap_minutes`."""

    name: str
    actions: dict[str, str | ActionRule]
    positive_actions: tuple[str, ...]
    events: EventColumns
    slates: EventColumns | None = None
    items: ItemColumns | None = None
    slate_gap_minutes: float | None = None
    source: str = "own data"

    def __post_init__(self) -> None:
        gap = self.slate_gap_minutes
        if gap is not None and not 0 < gap <= LONGEST_GAP_MINUTES:
            raise ValueError(f"slate_gap_minutes={gap} must be positive and at most {LONGEST_GAP_MINUTES:,}")
        ways = [self.slates, self.events.slate, self.slate_gap_minutes]
        if sum(way is not None for way in ways) > 1:
            raise ValueError("slates come from one of [slates], events.slate and slate_gap_minutes, not from several")
        timeless = self.events.timestamp is None and (self.events.slate or self.slate_gap_minutes) is not None
        if timeless:
            raise ValueError("events.slate and slate_gap_minutes need events.timestamp")
        if self.slates is not None and None in (self.slates.file, self.slates.slate, self.slates.timestamp):
            raise ValueError("[slates] needs `file`, `slate` and `timestamp`")


def read_column_map(path: Path) -> ColumnMap:
    """Read the TOML file.

    Raises:
        DataError: The file is missing or not TOML, or has an unknown, missing or contradictory entry.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=ColumnMap)
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path}: {error}; docs/data.md shows a column map") from error


def read_mapped(source: Path, columns: ColumnMap) -> RawTables:
    """Read the files that a column map describes.

    Args:
        source: The events file, or the folder of `events.file`; the other files lie beside it.
        columns: The map.

    Raises:
        DataError: A file is not readable, or a mapped column does not exist or does not hold what the map
        says.
    """
    folder = source if source.is_dir() else source.parent
    if source.is_dir() and columns.events.file is None:
        raise DataError(f"{source} is a folder; name the file in events.file of the column map, or give the file")
    path = folder / columns.events.file if source.is_dir() and columns.events.file else source
    rules = {name: ActionRule(column=rule) if isinstance(rule, str) else rule for name, rule in columns.actions.items()}
    events = _events(path, columns.events, rules)
    slates = _slates(folder, columns, events, rules)
    return RawTables(
        name=columns.name,
        source=columns.source,
        actions=tuple(rules),
        positive_actions=columns.positive_actions,
        events=events.drop("slate_id", "position", strict=False),
        items=_items(folder, columns.items, [events, slates]),
        slates=slates,
    )


def read_table(path: Path, columns: Collection[str], types: Mapping[str, pl.DataType] | None = None) -> pl.DataFrame:
    """Read these columns of a CSV, TSV or Parquet file.

    Args:
        path: The file; its ending says what it is.
        columns: Names to read.
        types: Types of columns in text files that should not be guessed.

    Raises:
        DataError: The file is not readable, or lacks a column; the message lists those it has.
    """
    try:
        if path.suffix == ".parquet":
            return _select(pl.read_parquet(path), path, columns)
        if not path.name.endswith(TEXT_ENDINGS):
            raise DataError(f"{path}: reads {', '.join(TEXT_ENDINGS)} and .parquet; convert it first")
        separator = "\t" if ".tsv" in path.suffixes else ","
        header = pl.read_csv(path, separator=separator, n_rows=0)
        wanted = _select(header, path, columns).columns
        known = {name: dtype for name, dtype in (types or {}).items() if name in wanted}
        return pl.read_csv(path, separator=separator, columns=wanted, schema_overrides=known, infer_schema_length=None)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: {error}") from error


def _select(frame: pl.DataFrame, path: Path, columns: Collection[str]) -> pl.DataFrame:
    missing = sorted(set(columns) - set(frame.columns))
    if missing:
        raise DataError(f"{path}: no column {', '.join(map(repr, missing))}; it has {frame.columns}")
    return frame.select(sorted(columns))


def _events(path: Path, mapped: EventColumns, rules: Mapping[str, ActionRule]) -> pl.DataFrame:
    names = {"user_id": mapped.user, "item_id": mapped.item, "slate_id": mapped.slate, "surface": mapped.surface}
    numbers = {"position": mapped.position, "order": mapped.order}
    given = {name: column for name, column in {**names, **numbers}.items() if column is not None}
    wanted = {*given.values(), *(rule.column for rule in rules.values()), mapped.timestamp or mapped.user}
    frame = read_table(path, wanted, {column: pl.String() for column in names.values() if column is not None})
    try:
        return frame.select(
            *(pl.col(column).alias(name) for name, column in given.items()),
            *([] if mapped.surface else [pl.lit(None, pl.String).alias("surface")]),
            _time(frame, mapped).alias("timestamp_ms"),
            *(_action(frame, rule).alias(ACTION_PREFIX + name) for name, rule in rules.items()),
        )
    except pl.exceptions.PolarsError as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not what the column map says: {reason}") from error


def _slates(folder: Path, columns: ColumnMap, events: pl.DataFrame, rules: Mapping[str, ActionRule]) -> pl.DataFrame:
    if columns.slate_gap_minutes is not None:
        return slates_from_events(events, round(columns.slate_gap_minutes * 60_000))
    if columns.slates is not None and columns.slates.file is not None:
        slates = _events(folder / columns.slates.file, columns.slates, rules)
    elif columns.events.slate is not None:
        slates = events.filter(pl.col("slate_id").is_not_null())
        slates = slates.with_columns(pl.col("timestamp_ms").min().over("slate_id"))
    else:
        return pl.DataFrame()
    place = [] if "position" in slates.columns else [pl.lit(None, pl.Int32).alias("position")]
    return slates.with_columns(place).drop("order", strict=False)


def _action(frame: pl.DataFrame, rule: ActionRule) -> pl.Expr:
    column, dtype = pl.col(rule.column), frame[rule.column].dtype
    if rule.equals is not None:
        words = [str(value).lower() if isinstance(value, bool) else value for value in rule.equals]
        if dtype.is_numeric() and all(isinstance(word, int | float) for word in words):
            return column.cast(pl.Float64).is_in([float(word) for word in words]).fill_null(False)
        return column.cast(pl.String).is_in([str(word) for word in words]).fill_null(False)
    if rule.at_least is None:
        return column.fill_null(False if dtype == pl.Boolean else 0)
    if not dtype.is_numeric():
        raise DataError(f"actions: column {rule.column!r} is {dtype}, `at_least` needs numbers")
    return (column >= rule.at_least).fill_null(False)


def _time(frame: pl.DataFrame, mapped: EventColumns) -> pl.Expr:
    if mapped.timestamp is None:
        return pl.lit(None, pl.Int64)
    column, dtype = pl.col(mapped.timestamp), frame[mapped.timestamp].dtype
    if dtype.is_temporal():
        return column.dt.epoch("ms")
    if mapped.timestamp_unit == "iso" and dtype == pl.String:
        return column.str.to_datetime(time_unit="ms", time_zone="UTC").dt.epoch("ms")
    if mapped.timestamp_unit == "iso" or not dtype.is_numeric():
        unit = mapped.timestamp_unit
        raise DataError(
            f"timestamp: column {mapped.timestamp!r} is {dtype}, which does not go with timestamp_unit={unit!r}"
        )
    scaled = {"s": column * 1000, "ms": column, "us": column / 1000}[mapped.timestamp_unit or "ms"]
    return scaled.round().cast(pl.Int64)


def _items(folder: Path, mapped: ItemColumns | None, tables: list[pl.DataFrame]) -> pl.DataFrame:
    if mapped is None:
        ids = pl.concat([frame["item_id"].cast(pl.String) for frame in tables if frame.width])
        ids = ids.drop_nulls().unique().sort()
        return pl.DataFrame({"item_id": ids, "title": pl.Series([None] * ids.len(), dtype=pl.String)})
    parts = {name: [columns] if isinstance(columns, str) else columns for name, columns in mapped.dense.items()}
    flat = {column for columns in parts.values() for column in columns}
    wanted = {mapped.item, *flat, *mapped.categories.values()} | ({mapped.title} if mapped.title else set())
    text = {name: pl.String() for name in wanted - flat}
    frame = read_table(folder / mapped.file, wanted, text)
    return frame.select(
        pl.col(mapped.item).alias("item_id"),
        (pl.col(mapped.title) if mapped.title else pl.lit(None, pl.String)).alias("title"),
        *(pl.concat_list(columns).alias(DENSE_PREFIX + name) for name, columns in parts.items()),
        *(pl.col(column).alias(CATEGORY_PREFIX + name) for name, column in mapped.categories.items()),
    )
