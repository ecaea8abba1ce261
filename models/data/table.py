"""Any CSV or Parquet files, described by a small TOML file of column names; docs/data.md has an example.

Files may be `.csv`, `.tsv` (either also as `.gz`) or `.parquet`. Ids in text files are read as text, so "007"
stays "007". A gap in an action column means that the action did not happen. Values are compared by meaning: true, 1,
1.0 and the text "1" are equal. Columns that do not fit the map are rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import polars as pl

from unipinrec.errors import DataError, listed
from unipinrec.models.config import DAY_MS
from unipinrec.models.data import schema
from unipinrec.models.data.validate import LONGEST_GAP_MINUTES, RawTables, slates_from_events

TEXT_ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
UNORDERED = "events: neither time nor order, in the file's order (kept)"
SEVERAL = "a column map reads several files with `files`"
# A date, hours and minutes, seconds, their fraction, and an offset in hours and minutes.
CLOCK, OFFSET = r"([0-9]{2}:[0-9]{2})(?:(:[0-9]{2})(?:[.,]([0-9]{1,9}))?)?", r"(?: ?Z| ?([+-][0-9]{2}):?([0-9]{2})?)?"
ISO_8601 = rf"^([0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}})(?:[T ]{CLOCK}{OFFSET})?$"


class ActionRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The action happened where `column` equals one of `equals`, or is a number of at least `at_least`.

    Without both, the column holds true/false or 1/0.
    """

    column: str
    equals: tuple[str | int | float | bool, ...] | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        if self.equals is not None and self.at_least is not None:
            raise ValueError(f"action of column {self.column!r} has both `equals` and `at_least`; give one")


class EventColumns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Columns of the events or the slates; with `slate`, events are the exposures of that slate.

    `file` is a name, `files` a pattern of names such as "part-*.parquet"; `timestamp_format` is for strptime.
    """

    user: str
    item: str
    file: str | None = None
    files: str | None = None
    timestamp: str | None = None
    timestamp_unit: Literal["s", "ms", "us", "ns", "iso"] | None = None
    timestamp_format: str | None = None
    surface: str | None = None
    order: str | None = None
    slate: str | None = None
    position: str | None = None

    def __post_init__(self) -> None:
        if [self.timestamp_unit, self.timestamp_format].count(None) != 1 + (self.timestamp is None):
            raise ValueError("`timestamp` needs either `timestamp_unit` (s, ms, us, ns or iso) or `timestamp_format`")
        if "%Z" in (self.timestamp_format or "").replace("%%", ""):
            raise ValueError("`timestamp_format`: %Z would be ignored; take %z, for offsets such as +0100")


class ItemColumns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Columns of the items file; a dense feature is one column (a number or a list) or several numbers."""

    item: str
    file: str | None = None
    files: str | None = None
    title: str | None = None
    dense: dict[str, str | tuple[str, ...]] = {}
    categories: dict[str, str] = {}

    def __post_init__(self) -> None:
        if empty := [name for name, columns in self.dense.items() if not columns]:
            raise ValueError(f"`dense`: {empty[0]!r} names no column; give one or several, or omit it")
        if wrong := [name for name in self.categories if "=" in name]:
            raise ValueError(f'`categories`: {wrong[0]!r} has a "=", so that no filter can name it; rename it')


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
        if [self.slates, self.events.slate, self.slate_gap_minutes].count(None) < 2:
            raise ValueError("slates come from one of [slates], events.slate and slate_gap_minutes, not from several")
        if self.events.timestamp is None and (self.events.slate or self.slate_gap_minutes) is not None:
            raise ValueError("events.slate and slate_gap_minutes need events.timestamp")
        if self.slates is not None and None in (self.slates.slate, self.slates.timestamp):
            raise ValueError("[slates] needs `slate` and `timestamp`")


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
        source: The events file, or the folder of the files; the others lie beside it.
        columns: The map.

    Raises:
        DataError: A file is not readable, a mapped column is missing or does not fit the map, or a positive action
            never happens.
    """
    folder = source if source.is_dir() else source.parent
    if source.is_file() and (columns.events.files or columns.events.file not in (None, source.name)):
        name = columns.events.files or columns.events.file
        raise DataError(f"{source} is a file, but [events] of the column map names {name!r}; give the folder as SOURCE")
    paths = _paths(folder, columns.events) if source.is_dir() else [source]
    rules = {name: ActionRule(column=rule) if isinstance(rule, str) else rule for name, rule in columns.actions.items()}
    events = _joined(paths, partial(_events, columns.events, rules))
    slates = _slates(folder, columns, events, rules)
    positive = [name for name in rules if name in columns.positive_actions]
    for name in positive:
        if not any(table[schema.ACTION_PREFIX + name].any() for table in (events, slates) if table.width):
            held = _held(paths[0], [rules[name]])
            raise DataError(f"{paths[0]}: the positive action {name!r} never happens; {held}")
    if columns.slates and slates.height and not any(slates[schema.ACTION_PREFIX + name].any() for name in positive):
        path = _paths(folder, columns.slates)[0]
        held = _held(path, [rules[name] for name in positive])
        raise DataError(f"{path}: no positive action of {positive} happens in any slate, but in events; {held}")
    unordered = events.select(pl.all_horizontal(pl.col("^(timestamp_ms|order)$").is_null()).sum()).item()
    return RawTables(
        name=columns.name,
        source=columns.source,
        actions=tuple(rules),
        positive_actions=columns.positive_actions,
        events=events.drop("slate_id", "position", strict=False),
        items=_items(folder, columns.items, [events, slates]),
        slates=slates,
        dropped={UNORDERED: unordered},
    )


def _held(path: Path, rules: list[ActionRule]) -> str:
    table = read_table(path, {rule.column for rule in rules})
    held = (f"column {column.name!r} holds {listed(column.unique(maintain_order=True))}" for column in table)
    return f"{', '.join(held)}; correct `actions` of the column map"


def read_table(path: Path, columns: Collection[str], types: Mapping[str, pl.DataType] | None = None) -> pl.DataFrame:
    """Read these columns of the CSV, TSV or Parquet file of exactly this name.

    Args:
        path: The file; its ending names its format.
        columns: Names to read.
        types: Types of columns in text files that should not be guessed.

    Raises:
        DataError: The file is not readable, or lacks a column; the message lists those it has.
    """
    if path.suffix == ".parquet":
        return _select(schema.read_parquet(path, SEVERAL), path, columns)
    if not path.name.endswith(TEXT_ENDINGS):
        raise DataError(f"{path}: reads {', '.join(TEXT_ENDINGS)} and .parquet; convert it first")
    read = partial(pl.read_csv, path.absolute(), glob=False, separator="\t" if ".tsv" in path.suffixes else ",")
    try:
        path.open("rb").close()  # fails for a folder, of which polars would read all files
        header = read(n_rows=0)
        if any("\r" in name for name in header.columns):
            raise DataError(f"{path}: its lines end in CR; write it with LF or CR LF at the end of lines")
        names = _select(header, path, columns).columns
        if twice := [name for name in names if f"{name}_duplicated_0" in header.columns]:
            raise DataError(f"{path}: has column {twice[0]!r} more than once")
        return read(columns=names, schema_overrides=types, infer_schema_length=None)
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder; {SEVERAL}") from error
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: {error}") from error


def _select(frame: pl.DataFrame, path: Path, columns: Collection[str]) -> pl.DataFrame:
    missing = sorted(set(columns) - set(frame.columns))
    if missing:
        raise DataError(f"{path}: no column {', '.join(map(repr, missing))}; it has {listed(frame.columns)}")
    return frame.select(sorted(columns))


def _paths(folder: Path, mapped: EventColumns | ItemColumns) -> list[Path]:
    if (mapped.file is None) == (mapped.files is None):
        raise DataError(f"each section of a column map needs `file`, a name in {folder}, or `files`, a pattern")
    if mapped.file is not None:
        return [folder / mapped.file]
    paths = sorted(path for path in folder.iterdir() if fnmatchcase(path.name, mapped.files or ""))
    if not paths:
        raise DataError(f"{folder}: no name in it is like {mapped.files!r}, the `files` of the column map")
    return paths


def _joined(paths: list[Path], read: Callable[[Path], pl.DataFrame]) -> pl.DataFrame:
    try:
        return pl.concat([read(path) for path in paths], how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{paths[0]} and the other files of its pattern differ: {error}") from error


def _events(mapped: EventColumns, rules: Mapping[str, ActionRule], path: Path) -> pl.DataFrame:
    names = {"user_id": mapped.user, "item_id": mapped.item, "slate_id": mapped.slate, "surface": mapped.surface}
    numbers = {"position": mapped.position, "order": mapped.order}
    sources = {name: column for name, column in {**names, **numbers}.items() if column is not None}
    columns = {*sources.values(), *(rule.column for rule in rules.values()), mapped.timestamp or mapped.user}
    frame = read_table(path, columns, {column: pl.String() for column in names.values() if column is not None})
    unknown = pl.repeat(None, frame.height, dtype=pl.Int64, eager=True)
    try:
        for name in names.keys() & sources.keys():
            _text(frame[sources[name]], name.removesuffix("_id"))  # fails if it is no id
        return pl.DataFrame(
            {
                "surface": unknown.cast(pl.String),
                **{n: _numbers(frame[column], n) if n in numbers else frame[column] for n, column in sources.items()},
                "timestamp_ms": _time(frame[mapped.timestamp], mapped) if mapped.timestamp else unknown,
                **{
                    schema.ACTION_PREFIX + name: _action(frame[rule.column], rule, name) for name, rule in rules.items()
                },
            }
        )
    except (DataError, pl.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not what the column map says: {reason}") from error


def _slates(folder: Path, columns: ColumnMap, events: pl.DataFrame, rules: Mapping[str, ActionRule]) -> pl.DataFrame:
    if columns.slate_gap_minutes is not None:
        return slates_from_events(events, round(columns.slate_gap_minutes * 60_000))
    if columns.slates is not None:
        slates = _joined(_paths(folder, columns.slates), partial(_events, columns.slates, rules))
    elif columns.events.slate is not None:
        slates = events.filter(pl.col("slate_id").is_not_null())
        time = pl.col("timestamp_ms")
        spans = slates.group_by("slate_id", maintain_order=True).agg(time.max() - time.min())
        if (long := spans.filter(time > DAY_MS)).height:
            name, span = long.row(0)
            raise DataError(
                f"slate {name!r} of events.slate spans {span / 3_600_000:.1f} hours, more than 24 ({long.height} such "
                "slates): several slates share its id; make ids unique, such as by adding the user and the day"
            )
        slates = slates.with_columns(time.min().over("slate_id"))
    else:
        return pl.DataFrame()
    position = [] if "position" in slates.columns else [pl.lit(None, pl.Int32).alias("position")]
    return slates.with_columns(position).drop("order", strict=False)


def _action(column: pl.Series, rule: ActionRule, name: str) -> pl.Series:
    if rule.at_least is not None:
        numbers = _numbers(column, f"actions: {name}: at_least").cast(pl.Float64).fill_nan(None)
        return (numbers >= rule.at_least).fill_null(False)
    values = _meaning(_text(column, f"actions: {name}"))
    words = [_meaning(pl.Series([word])).item() for word in rule.equals or ()]
    if rule.equals is None and not values.drop_nulls().is_in(["1", "0", "", "NaN"]).all():
        raise DataError(
            f"actions: {name}: column {column.name!r} is neither true/false nor 0/1, it holds "
            f"{listed(column.unique(maintain_order=True))}; define the action with `equals` or `at_least`"
        )
    return values.is_in(["1"] if rule.equals is None else words).fill_null(False)


def _text(column: pl.Series, option: str) -> pl.Series:
    with suppress(pl.exceptions.PolarsError):
        if not column.dtype.is_nested():
            return column.cast(pl.String)
    raise DataError(f"{option}: column {column.name!r} is {column.dtype}; give text or whole numbers")


def _meaning(values: pl.Series) -> pl.Series:
    """As text that is the same for true, 1 and 1.0, of any type."""
    text = values.cast(pl.String).str.replace("(?i)^true$", "1").str.replace("(?i)^false$", "0")
    return text.str.replace(r"^(-?[0-9]+)\.0+$", "$1")


def _numbers(column: pl.Series, option: str) -> pl.Series:
    """The column, with text converted to numbers."""
    if column.dtype.is_numeric() or column.dtype == pl.Boolean:
        return column
    wrong = column
    for dtype in (pl.Int64, pl.Float64) if column.dtype in (pl.String, pl.Null) else ():
        numbers = column.cast(dtype, strict=False)
        wrong = column.filter(numbers.is_null() & column.is_not_null())
        if not wrong.len():
            return numbers
    value = listed(wrong.head(1).to_list())
    hint = (
        '; times as text need timestamp_unit = "iso"'
        if option.startswith("timestamp_unit") and column.dtype == pl.String
        else ""
    )
    raise DataError(f"{option}: column {column.name!r} is {column.dtype}, {value} is no number{hint}")


def _time(column: pl.Series, mapped: EventColumns) -> pl.Series:
    """Unix time, to the nearest ms."""
    original, unit = column, mapped.timestamp_unit or "iso"
    if unit == "iso" and not column.dtype.is_temporal():
        column = _parsed(column, mapped.timestamp_format)
    if column.dtype == pl.Date:
        column = column.cast(pl.Datetime("ms"))
    dated = isinstance(column.dtype, pl.Datetime)
    if isinstance(column.dtype, pl.Datetime):
        unit, column = column.dtype.time_unit, column.to_physical()
    if column.dtype.is_float() and column.dtype != pl.Float64:
        raise DataError(f"timestamp: column {column.name!r} is {column.dtype}, too coarse for times; write Float64")
    times = _numbers(column, f"timestamp_unit={unit!r}").cast(pl.Float64)
    times_ms = times * schema.UNITS_MS[unit]
    wrong = ~times_ms.is_between(schema.EARLIEST_MS, schema.LATEST_MS)
    if dated and wrong.any():
        year = f"a time of about the year {1970 + times_ms.filter(wrong)[0] / 31_557_600_000:.0f}"
        value = year if original.dtype.is_temporal() else listed(original.filter(wrong).to_list(), 1)
        raise DataError(
            f"timestamp: column {original.name!r} holds {value}, not between 1990 and 2100; leave unknown times empty"
        )
    schema.require_times(times, f"timestamp: column {original.name!r}", unit)
    return times_ms.round().cast(pl.Int64)


def _parsed(column: pl.Series, form: str | None) -> pl.Series:
    text = original = _text(column, "timestamp")
    if form is None:
        date, clock, second, fraction, hours, minutes = original.str.extract_groups(ISO_8601).struct.unnest()
        text = date + "T" + clock.fill_null("00:00") + second.fill_null(":00") + "." + fraction.fill_null("0")
        text += hours.fill_null("+00") + minutes.fill_null("00")
    times = text.str.to_datetime(form or "%Y-%m-%dT%H:%M:%S%.f%z", time_unit="us", strict=False)
    if wrong := original.filter(times.is_null() & original.is_not_null()).to_list():
        raise DataError(
            f"timestamp: column {column.name!r} holds {listed(wrong, 1)}, not {form or 'ISO 8601'}; correct "
            'timestamp_unit, or give the format as timestamp_format, such as "%d/%m/%Y %H:%M"'
        )
    return times


def _items(folder: Path, mapped: ItemColumns | None, tables: list[pl.DataFrame]) -> pl.DataFrame:
    if mapped is None:
        ids = pl.concat([frame["item_id"].cast(pl.String) for frame in tables if frame.width])
        ids = ids.drop_nulls().unique().sort()
        return pl.DataFrame({"item_id": ids, "title": pl.Series([None] * ids.len(), dtype=pl.String)})
    dense = {schema.DENSE_PREFIX + name: [of] if isinstance(of, str) else of for name, of in mapped.dense.items()}
    flat = {column for columns in dense.values() for column in columns}
    columns = {mapped.item, *flat, *mapped.categories.values()} | ({mapped.title} if mapped.title else set())
    text = {name: pl.String() for name in columns - flat}
    frame = _joined(_paths(folder, mapped), partial(read_table, columns=columns, types=text))
    return frame.select(
        pl.col(mapped.item).alias("item_id"),
        (pl.col(mapped.title) if mapped.title else pl.lit(None, pl.String)).alias("title"),
        *(pl.concat_list(_vector(frame[column]) for column in of).alias(name) for name, of in dense.items()),
        *(pl.col(column).alias(schema.CATEGORY_PREFIX + name) for name, column in mapped.categories.items()),
    )


def _vector(column: pl.Series) -> pl.Series:
    if isinstance(column.dtype, pl.Array):
        return column.arr.to_list()
    return column if isinstance(column.dtype, pl.List) else _numbers(column, "dense")
