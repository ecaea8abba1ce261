"""Any text, JSON lines or Parquet files, described by a small TOML file of column names; docs/data.md has an example.

Ids in text files are read as text, so "007" stays "007". A gap in an action column means that the action did not
happen. Values are compared by meaning: true, 1, 1.0 and the text "1" are equal. Columns that do not fit the map are
rejected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import polars as pl

from unipinrec.errors import DataError, listed
from unipinrec.models.config import DAY_MS
from unipinrec.models.data import schema
from unipinrec.models.data.catalogue import ItemColumns, read_items
from unipinrec.models.data.files import FileForm, as_numbers, as_text, joined, paths_of, read_table
from unipinrec.models.data.validate import LONGEST_GAP_MINUTES, RawTables, slates_from_events

MOST_ACTIONS = 32
PLACE = "place in the list"
UNORDERED = "events: neither time nor order, in the file's order (kept)"
# A date, hours and minutes, seconds, their fraction, and an offset in hours and minutes.
CLOCK, OFFSET = r"([0-9]{2}:[0-9]{2})(?:(:[0-9]{2})(?:[.,]([0-9]{1,9}))?)?", r"(?: ?Z| ?([+-][0-9]{2}):?([0-9]{2})?)?"
ISO_8601 = rf"^([0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}})(?:[T ]{CLOCK}{OFFSET})?$"


class ActionRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The action happened where `column` equals one of `equals`, or is a number of at least `at_least`.

    Without both, the column holds true/false or 1/0. Without a column, every row is the action.
    """

    column: str | None
    equals: tuple[str | int | float | bool, ...] | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        if self.equals is not None and self.at_least is not None:
            raise ValueError(f"action of column {self.column!r} has both `equals` and `at_least`; give one")


class EventColumns(FileForm, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Columns of the events or the slates; with `slate`, events are the exposures of that slate.

    `timestamp_format` is for strptime. With `items_separator` a row has several items, as a list or as text such as
    "a b", and becomes a row for each, with its place in the list as `position`. `label_separator` splits "a-1" into
    the item and a label, which actions name as the column "label".
    """

    user: str
    item: str
    timestamp: str | None = None
    timestamp_unit: Literal["s", "ms", "us", "ns", "iso"] | None = None
    timestamp_format: str | None = None
    surface: str | None = None
    order: str | None = None
    slate: str | None = None
    position: str | None = None
    items_separator: str | None = None
    label_separator: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_separator == "" or (self.label_separator and self.items_separator is None):
            raise ValueError("`label_separator` is the text between item and label, and needs `items_separator`")
        if [self.timestamp_unit, self.timestamp_format].count(None) != 1 + (self.timestamp is None):
            raise ValueError("`timestamp` needs either `timestamp_unit` (s, ms, us, ns or iso) or `timestamp_format`")
        if "%Z" in (self.timestamp_format or "").replace("%%", ""):
            raise ValueError("`timestamp_format`: %Z would be ignored; take %z, for offsets such as +0100")


class ColumnMap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The TOML file. Slates come from `[slates]`, `events.slate`, or pauses of `slate_gap_minutes`.

    An action is a column of flags, a rule, or `true` if every row is one. Each value of the column `actions_from` is
    an action too.
    """

    name: str
    positive_actions: tuple[str, ...]
    events: EventColumns
    actions: dict[str, str | bool | ActionRule] = {}
    actions_from: str | None = None
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
        if not self.actions and self.actions_from is None:
            raise ValueError(
                "no action: give `[actions]`, such as `click = true` if every row is a click, or `actions_from`"
            )
        if wrong := [name for name, rule in self.actions.items() if rule is False]:
            raise ValueError(f"action {wrong[0]!r} is false; `true` means that every row is one, else name a column")
        slates = (self.slates, self.events.slate, self.slate_gap_minutes) != (None, None, None)
        if slates and all(self.actions.get(name) is True for name in self.positive_actions):
            raise ValueError("slates need items that were shown and left alone: a positive action with a column")


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
    paths = paths_of(folder, columns.events) if source.is_dir() else [source]
    rules = _rules(columns, paths)
    events = joined(paths, partial(_events, columns.events, rules))
    slates = _slates(folder, columns, events, rules)
    positive = [name for name in rules if name in columns.positive_actions]
    for name in positive:
        if not any(table[schema.ACTION_PREFIX + name].any() for table in (events, slates) if table.width):
            held = _held(paths[0], columns.events, [rules[name]])
            raise DataError(f"{paths[0]}: the positive action {name!r} never happens; {held}")
    if columns.slates and slates.height and not any(slates[schema.ACTION_PREFIX + name].any() for name in positive):
        path = paths_of(folder, columns.slates)[0]
        held = _held(path, columns.slates, [rules[name] for name in positive])
        raise DataError(f"{path}: no positive action of {positive} happens in any slate, but in events; {held}")
    unordered = events.select(pl.all_horizontal(pl.col("^(timestamp_ms|order)$").is_null()).sum()).item()
    return RawTables(
        name=columns.name,
        source=columns.source,
        actions=tuple(rules),
        positive_actions=columns.positive_actions,
        events=events.drop("slate_id", "position", strict=False),
        items=read_items(folder, columns.items, [events, slates]),
        slates=slates,
        dropped={UNORDERED: unordered},
    )


def _rules(columns: ColumnMap, paths: list[Path]) -> dict[str, ActionRule]:
    rules = {}
    if (source := columns.actions_from) is not None:
        values = joined(paths, lambda path: _rows(path, columns.events, {source}, {source: pl.String()}))[source]
        words = _meaning(as_text(values, "actions_from")).drop_nulls().unique(maintain_order=True)
        if (words := words.filter(words != "")).len() > MOST_ACTIONS:
            raise DataError(
                f"{paths[0]}: actions_from: column {source!r} has {words.len():,} values, at most {MOST_ACTIONS} can "
                f"be actions, such as {listed(words, 3)}; name the actions in `[actions]` with `equals` or `at_least`"
            )
        if missing := sorted(set(columns.positive_actions) - {*words, *columns.actions}):
            raise DataError(
                f"{paths[0]}: positive_actions: {missing} is no value of column {source!r}; it holds {listed(words)}"
            )
        rules = {word: ActionRule(column=source, equals=(word,)) for word in words}
    for name, rule in columns.actions.items():
        rules[name] = rule if isinstance(rule, ActionRule) else ActionRule(column=None if rule is True else str(rule))
    return rules


def _held(path: Path, mapped: EventColumns, rules: list[ActionRule]) -> str:
    table = _rows(path, mapped, {rule.column for rule in rules if rule.column})
    held = (f"column {column.name!r} holds {listed(column.unique(maintain_order=True))}" for column in table)
    return f"{', '.join(held)}; correct `actions` of the column map"


def _rows(
    path: Path, mapped: EventColumns, columns: set[str], types: Mapping[str, pl.DataType] | None = None
) -> pl.DataFrame:
    """The columns of a file; a row for each item if its rows have several."""
    if mapped.items_separator is None:
        return read_table(path, columns, types, mapped)
    made = {"label"} if mapped.label_separator else set()
    frame = read_table(path, (columns | {mapped.item}) - made, {mapped.item: pl.String(), **(types or {})}, mapped)
    item = pl.col(mapped.item)
    if frame.schema[mapped.item] == pl.String:
        if not mapped.items_separator:
            raise DataError(f"{path}: column {mapped.item!r} is text; `items_separator` must say what separates items")
        frame = frame.with_columns(item.str.strip_chars().str.split(mapped.items_separator))
    lists = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List | pl.Array)]
    if mapped.item not in lists:
        raise DataError(
            f"{path}: column {mapped.item!r} is {frame.schema[mapped.item]}, not lists; omit items_separator"
        )
    try:
        frame = frame.with_row_index(PLACE).explode(lists)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: the lists of the columns {lists} differ in length in a row: {error}") from error
    frame = frame.with_columns(pl.int_range(pl.len(), dtype=pl.Int32).over(PLACE).alias(PLACE))
    if mapped.label_separator:
        pattern = f"^(?s:(.*)){re.escape(mapped.label_separator)}(?s:(.*?))$"
        parts = frame[mapped.item].str.extract_groups(pattern).struct.unnest()
        if (wrong := frame[mapped.item].filter(frame[mapped.item].is_not_null() & parts.to_series().is_null())).len():
            raise DataError(
                f"{path}: label_separator: column {mapped.item!r} holds {listed(wrong, 3)}, without "
                f"{mapped.label_separator!r} and a label"
            )
        frame = frame.with_columns(parts.to_series(0).alias(mapped.item), parts.to_series(1).alias("label"))
    return frame


def _events(mapped: EventColumns, rules: Mapping[str, ActionRule], path: Path) -> pl.DataFrame:
    names = {"user_id": mapped.user, "item_id": mapped.item, "slate_id": mapped.slate, "surface": mapped.surface}
    numbers = {"position": mapped.position, "order": mapped.order}
    sources = {name: column for name, column in {**names, **numbers}.items() if column is not None}
    columns = {
        *sources.values(),
        *(rule.column for rule in rules.values() if rule.column),
        mapped.timestamp or mapped.user,
    }
    frame = _rows(path, mapped, columns, {column: pl.String() for column in names.values() if column is not None})
    if PLACE in frame.columns:
        sources.setdefault("position", PLACE)
    unknown = pl.repeat(None, frame.height, dtype=pl.Int64, eager=True)
    try:
        for name in names.keys() & sources.keys():
            as_text(frame[sources[name]], name.removesuffix("_id"))  # fails if it is no id
        return pl.DataFrame(
            {
                "surface": unknown.cast(pl.String),
                **{n: as_numbers(frame[column], n) if n in numbers else frame[column] for n, column in sources.items()},
                "timestamp_ms": _time(frame[mapped.timestamp], mapped) if mapped.timestamp else unknown,
                **{schema.ACTION_PREFIX + name: _action(frame, rule, name) for name, rule in rules.items()},
            }
        )
    except (DataError, pl.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not what the column map says: {reason}") from error


def _slates(folder: Path, columns: ColumnMap, events: pl.DataFrame, rules: Mapping[str, ActionRule]) -> pl.DataFrame:
    if columns.slate_gap_minutes is not None:
        return slates_from_events(events, round(columns.slate_gap_minutes * 60_000))
    if columns.slates is not None:
        slates = joined(paths_of(folder, columns.slates), partial(_events, columns.slates, rules))
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


def _action(frame: pl.DataFrame, rule: ActionRule, name: str) -> pl.Series:
    if rule.column is None:
        return pl.repeat(True, frame.height, eager=True)
    column = frame[rule.column]
    if rule.at_least is not None:
        numbers = as_numbers(column, f"actions: {name}: at_least").cast(pl.Float64).fill_nan(None)
        return (numbers >= rule.at_least).fill_null(False)
    values = _meaning(as_text(column, f"actions: {name}"))
    words = [_meaning(pl.Series([word])).item() for word in rule.equals or ()]
    if rule.equals is None and not values.drop_nulls().is_in(["1", "0", "", "NaN"]).all():
        raise DataError(
            f"actions: {name}: column {column.name!r} is neither true/false nor 0/1, it holds "
            f"{listed(column.unique(maintain_order=True))}; define the action with `equals` or `at_least`"
        )
    return values.is_in(["1"] if rule.equals is None else words).fill_null(False)


def _meaning(values: pl.Series) -> pl.Series:
    """As text that is the same for true, 1 and 1.0, of any type."""
    text = values.cast(pl.String).str.replace("(?i)^true$", "1").str.replace("(?i)^false$", "0")
    return text.str.replace(r"^(-?[0-9]+)\.0+$", "$1")


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
    times = as_numbers(column, f"timestamp_unit={unit!r}").cast(pl.Float64)
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
    text = original = as_text(column, "timestamp")
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
