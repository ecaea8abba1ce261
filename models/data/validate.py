"""Turns raw tables into a clean data set, and counts the dropped rows by reason.

The adapters (`kuairand`, `movielens`, ...) read files; this module reads none. It rejects missing or unknown columns,
wrong types and contradictions inside a slate, and repairs the rest.

Rules:
- Events that repeat in (user, item, timestamp) become one event with the union of their actions. Without a timestamp
  only the optional column `order` identifies a repeat: an unordered history may hold an item twice.
- A model scores a slate at the time when it began, so rows with a later time than the slate's first are dropped.
- An item that stands twice in a slate becomes one candidate with the union of its actions, at its first position.
- Events are ordered by user, then time (unknown first), then `order`, then row number in the raw table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import polars as pl

from unipinrec.errors import LONGEST_VALUE, DataError, listed
from unipinrec.models.data import schema

DEFAULT_GAP_MS = 30 * 60 * 1000
LONGEST_GAP_MINUTES = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class SplitFractions:
    """Split by time with about these shares of the rows in validation and test."""

    valid: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        if not (self.valid >= 0 and self.test > 0 and self.valid + self.test < 1):
            raise DataError(f"split: valid={self.valid}, test={self.test}; both are shares that sum to less than 1")


@dataclass(frozen=True, kw_only=True)
class RawTables:
    """The output of an adapter.

    Attributes:
        name: Name of the data set.
        source: Origin and licence, as text.
        actions: Names of all actions; each table has a column `action_{name}` (Boolean or 0/1). In events, null
            means unknown: the model reads it as "no", and it has no loss.
        positive_actions: The subset that makes an event a retrieval target.
        events: `user_id, item_id, surface, timestamp_ms, action_*` and optionally `order` (Int64), the place
            of the event in its user's history. `surface`, `timestamp_ms` and `order` may be null.
        items: `item_id, title`, and any number of `dense_*` (number or vector), `category_*` and `metadata_*` (numbers
            or text).
        slates: The columns of events and `slate_id, position`; a table without rows means no slates.
        dropped: Number of rows that the adapter has dropped, by reason.
        split: Explicit times; fractions, which become None where nothing has a timestamp; None =
        leave-one-out.
    """

    name: str
    source: str
    actions: tuple[str, ...]
    positive_actions: tuple[str, ...]
    events: pl.DataFrame
    items: pl.DataFrame
    slates: pl.DataFrame = field(default_factory=pl.DataFrame)
    split: schema.TimeSplit | SplitFractions | None = SplitFractions()
    dropped: Mapping[str, int] = field(default_factory=dict)


def build_dataset(raw: RawTables) -> schema.Dataset:
    """Validate and clean raw tables.

    Returns:
        A data set in the format of `schema`; `spec.dropped` counts the dropped, merged and moved rows by reason.

    Raises:
        DataError: A column is missing, foreign or of a wrong type, a value is impossible, or no event is left.
    """
    dropped: Counter[str] = Counter(raw.dropped)
    items, dense, categories = _clean_items(raw.items, dropped)
    events = _clean_events(raw, items, dropped)
    slates = _clean_slates(raw, items, dropped)
    if not events.height:
        raise DataError(
            f"{raw.name}: no event is left of {raw.events.height}; dropped: {dict(dropped)}; items of events are "
            f"{listed(raw.events['item_id'].head(3))}, those of the catalogue {listed(items['item_id'].head(3))}"
        )
    strangers = slates.join(events, on="user_id", how="anti")["slate_id"]
    dropped["slates: user without events (kept)"] = strangers.n_unique()
    surfaces = pl.concat([events["surface"], slates["surface"]]).unique().sort()
    spec = schema.DatasetSpec(
        format_version=schema.FORMAT_VERSION,
        name=raw.name,
        actions=raw.actions,
        positive_actions=raw.positive_actions,
        surfaces=(schema.UNKNOWN_SURFACE, *surfaces.filter(surfaces != schema.UNKNOWN_SURFACE)),
        dense=dense,
        categories=categories,
        split=_resolve_split(raw.split, slates if slates.height else events),
        dropped={reason: count for reason, count in sorted(dropped.items()) if count},
        source=raw.source,
        metadata=_metadata(items),
    )
    never = [
        name
        for name in spec.positive_actions
        if not any(t[schema.ACTION_PREFIX + name].any() for t in (events, slates))
    ]
    if never:
        raise DataError(
            f"{raw.name}: the positive actions {never} never happen in the {events.height} events and "
            f"{slates.height} slate rows that are left; declare only actions that happen"
        )
    if slates.height and not any(slates[schema.ACTION_PREFIX + name].any() for name in spec.positive_actions):
        raise DataError(
            f"{raw.name}: no positive action of {list(spec.positive_actions)} happens in any of the "
            f"{slates.height} slate rows that are left, but in events; correct the actions of the slates, or give none"
        )
    return schema.Dataset(spec=spec, events=events, slates=slates, items=items)


def split_by_time(times: pl.Series, fractions: SplitFractions) -> schema.TimeSplit:
    """Times that cut rows with these timestamps (Int64, nulls ignored) into about these shares.

    Raises:
        DataError: There is no timestamp, or validation would be empty although it has a share.
    """
    known = times.drop_nulls().sort()
    if not known.len():
        raise DataError("split: no row has a timestamp; use a leave-one-out split")
    held_out = [fractions.valid + fractions.test, fractions.test]
    # Rounding keeps 10 * (1 - 0.3 - 0.2) at 5; one less would be the next lower time.
    starts = [known[int(round(known.len() * (1 - share), 6))] for share in held_out]
    if fractions.valid and starts[0] == starts[1]:
        raise DataError(
            f"split: no row falls into validation: it would begin at {date_text(starts[0])}, as the test does "
            f"({(known == starts[0]).sum()} of {known.len()} rows have that time); give the times yourself "
            "(--valid-start and --test-start, the same for no validation)"
        )
    return schema.TimeSplit(valid_start_ms=starts[0], test_start_ms=starts[1])


def slates_from_events(events: pl.DataFrame, gap_ms: int = DEFAULT_GAP_MS) -> pl.DataFrame:
    """Group exposures into impression slates, for data whose events are all exposures.

    A slate is a run of one user's events on one surface with gaps shorter than `gap_ms`; its time is that of
    its first event, so none of its own events is in its history. Repeats in (user, item, timestamp) count
    once; events without a timestamp or user belong to no slate.

    Args:
        events: `user_id, item_id, surface, timestamp_ms` and the `action_*` columns, in any order.
        gap_ms: Pause that ends a slate, in milliseconds.

    Returns:
        The columns of `slates.parquet`, one row per event.
    """
    if gap_ms <= 0:
        raise DataError(f"slate gap is {gap_ms} ms; it must be positive")
    group = ["user_id", "surface"]
    frame = events.filter(pl.col("timestamp_ms").is_not_null() & pl.col("user_id").is_not_null())
    frame = frame.select(*group, "item_id", "timestamp_ms", pl.col(f"^{schema.ACTION_PREFIX}.*$"))
    frame = _merge_repeats(frame, ["user_id", "item_id", "timestamp_ms"])
    frame = frame.sort([*group, "timestamp_ms"], maintain_order=True)
    other = pl.any_horizontal(pl.col(column).ne_missing(pl.col(column).shift()) for column in group)
    frame = frame.with_columns(slate_id=(other | (pl.col("timestamp_ms").diff() >= gap_ms)).fill_null(True).cum_sum())
    return frame.with_columns(
        pl.col("slate_id").cast(pl.Int64),
        pl.col("timestamp_ms").first().over("slate_id"),
        position=pl.int_range(pl.len(), dtype=pl.Int32).over("slate_id"),
    )


def _clean_events(raw: RawTables, items: pl.DataFrame, dropped: Counter[str]) -> pl.DataFrame:
    columns = schema.event_columns(raw.actions)
    frame = raw.events if "order" in raw.events.columns else raw.events.with_columns(order=pl.lit(None, pl.Int64))
    frame = _typed(frame, "events", {**columns, "order": pl.Int64()}, nullable=True)
    users = frame["user_id"].drop_nulls().n_unique()
    frame = _drop_foreign(frame, "events", items, dropped)
    order, unknown = pl.col("order"), pl.col("timestamp_ms").is_null()
    # Without a time, events with the same `order` are repeats; without both, no events are.
    single = pl.when(unknown & order.is_null()).then(pl.col("row"))
    frame = frame.with_columns(place=pl.when(unknown).then(order), single=single)
    unique = _merge_repeats(frame, ["user_id", "item_id", "timestamp_ms", "place", "single"])
    dropped["events: duplicate"] = frame.height - unique.height
    time = pl.col("timestamp_ms").fill_null(-1)
    earlier = time < time.shift().over("user_id")
    tied = (time == time.shift().over("user_id")) & (order < order.shift().over("user_id"))
    moved = unique.select((earlier.fill_null(False) | tied.fill_null(False)).sum()).item()
    dropped["events: out of order (sorted)"] = moved
    dropped["users: no events"] = users - unique["user_id"].n_unique()
    return unique.sort(["user_id", "timestamp_ms", "order", "row"], nulls_last=False).select(list(columns))


def _clean_slates(raw: RawTables, items: pl.DataFrame, dropped: Counter[str]) -> pl.DataFrame:
    columns = schema.slate_columns(raw.actions)
    if not raw.slates.height:
        return pl.DataFrame(schema=columns)
    frame = _typed(raw.slates, "slates", {**columns, "slate_id": pl.String()})
    frame = _drop_foreign(frame, "slates", items, dropped)
    time = pl.col("timestamp_ms")
    unfit = {
        "slates: no slate id": pl.col("slate_id").is_null(),
        "slates: no time": time.is_null(),
        "slates: time in the future of its slate": time > time.min().over("slate_id"),
    }
    frame = drop_rows(frame, unfit, dropped)
    _refuse_contradictions(frame)
    unique = _merge_repeats(frame, ["slate_id", "item_id"])
    dropped["slates: duplicate row"] = frame.height - unique.height
    unique = unique.with_columns(first=pl.col("row").min().over("slate_id"))
    unique = unique.sort(["timestamp_ms", "first", "position", "row"], nulls_last=True)
    return unique.with_columns(pl.col("slate_id").rle_id().cast(pl.Int64)).select(list(columns))


def _refuse_contradictions(slates: pl.DataFrame) -> None:
    for row in slates.filter(pl.col("position") < 0).head(1).iter_rows(named=True):
        raise DataError(f"slates: position {row['position']} in slate {row['slate_id']}; positions count from 0")
    heads = slates.group_by("slate_id", maintain_order=True).agg("user_id", "surface")
    for column in ("user_id", "surface"):
        bad = heads.filter(pl.col(column).list.n_unique() > 1)
        if bad.height:
            values = listed(bad[column][0].unique(maintain_order=True))
            raise DataError(
                f"slates: {column} of slate {bad['slate_id'][0]} is {values}; a slate has one user, one time and one "
                f"surface ({bad.height} such slates)"
            )


def _clean_items(
    raw: pl.DataFrame, dropped: Counter[str]
) -> tuple[pl.DataFrame, dict[str, int], dict[str, tuple[str, ...]]]:
    dense = [name for name in raw.columns if name.startswith(schema.DENSE_PREFIX)]
    categories = [name for name in raw.columns if name.startswith(schema.CATEGORY_PREFIX)]
    features = {**dict.fromkeys(dense, pl.List(pl.Float32)), **dict.fromkeys(categories, pl.String())}
    features |= {
        name: pl.Float64() if raw.schema[name].is_numeric() else pl.String()
        for name in raw.columns
        if name.startswith(schema.METADATA_PREFIX)
    }
    frame = _typed(raw, "items", {"item_id": pl.String(), "title": pl.String(), **features})
    frame = drop_rows(frame, {"items: no id": pl.col("item_id").is_null()}, dropped)
    unique = frame.unique("item_id", keep="first", maintain_order=True).drop("row")
    dropped["items: duplicate"] = frame.height - unique.height
    widths = {name.removeprefix(schema.DENSE_PREFIX): _dense_width(unique, name) for name in dense}
    words = {
        name.removeprefix(schema.CATEGORY_PREFIX): tuple(unique[name].drop_nulls().unique().sort())
        for name in categories
    }
    return unique, widths, words


def _metadata(items: pl.DataFrame) -> dict[str, Literal["number", "text"]]:
    kinds: dict[str, Literal["number", "text"]] = {}
    for name in (column for column in items.columns if column.startswith(schema.METADATA_PREFIX)):
        numbers = items.schema[name] == pl.Float64
        kinds[name.removeprefix(schema.METADATA_PREFIX)] = "number" if numbers else "text"
        if numbers:
            _refuse_features(items.filter(~pl.col(name).is_finite()), name, "every number must be finite")
            continue
        long = items.filter(pl.col(name).str.len_chars() > schema.LONGEST_METADATA)
        _refuse_features(long, name, f"a text has at most {schema.LONGEST_METADATA:,} characters")
    return kinds


def _dense_width(items: pl.DataFrame, column: str) -> int:
    _refuse_features(items.filter(~schema.is_finite(column)), column, "every number must be finite")
    width = int(items[column].list.len().max() or 0)  # type: ignore[arg-type]  # a length is an integer
    uneven = items.filter(pl.col(column).list.len() != max(width, 1))
    _refuse_features(uneven, column, f"every item needs {max(width, 1)} numbers, as the longest has")
    return width


def _refuse_features(bad: pl.DataFrame, column: str, rule: str) -> None:
    if bad.height:
        item, value = bad.select("item_id", column).row(0)
        shown = value if isinstance(value, float) else str(value)[:LONGEST_VALUE]
        raise DataError(f"items: {column} of item {item!r} is {shown}; {rule} ({bad.height} such items)")


def _drop_foreign(frame: pl.DataFrame, table: str, items: pl.DataFrame, dropped: Counter[str]) -> pl.DataFrame:
    unfit = {
        f"{table}: no user": pl.col("user_id").is_null(),
        f"{table}: no item": pl.col("item_id").is_null(),
        f"{table}: unknown item": ~pl.col("item_id").is_in(items["item_id"].implode()),
    }
    frame = drop_rows(frame, unfit, dropped)
    schema.require_times(frame["timestamp_ms"], f"{table}: timestamp_ms")
    return frame.with_columns(pl.col("surface").fill_null(schema.UNKNOWN_SURFACE))


def drop_rows(frame: pl.DataFrame, unfit: Mapping[str, pl.Expr], dropped: Counter[str]) -> pl.DataFrame:
    """Drop unfit rows, reason by reason, and count them in `dropped`."""
    for reason, mask in unfit.items():
        before = frame.height
        frame = frame.filter(~mask)
        dropped[reason] += before - frame.height
    return frame


def _merge_repeats(frame: pl.DataFrame, keys: list[str]) -> pl.DataFrame:
    """Keep the first row of each key, with the union of the actions of all."""
    actions = pl.selectors.starts_with(schema.ACTION_PREFIX)
    return frame.group_by(keys, maintain_order=True).agg(actions.max(), (~actions).first()).select(frame.columns)


def _typed(
    frame: pl.DataFrame, table: str, columns: Mapping[str, pl.DataType], *, nullable: bool = False
) -> pl.DataFrame:
    """The declared columns in their declared types, and `row`, the row number in the raw table.

    Boolean columns may have nulls if `nullable`.
    """
    missing = [name for name in columns if name not in frame.columns]
    foreign = [name for name in frame.columns if name not in columns]
    if missing or foreign:
        raise DataError(f"{table}: missing columns {missing}, unknown columns {foreign}; expected {list(columns)}")
    typed = [_cast(frame[name], table, dtype, nullable=nullable) for name, dtype in columns.items()]
    return pl.DataFrame(typed).with_row_index("row")


def _cast(series: pl.Series, table: str, dtype: pl.DataType, *, nullable: bool) -> pl.Series:
    source = series.dtype
    refusal = f"{table}: column {series.name} of type {source} is not usable as {dtype}"
    fractional = source.is_float() or source.is_decimal()
    if dtype == pl.String and (fractional or source.is_nested() or source.is_temporal()):
        raise DataError(f"{refusal}; give text or whole numbers")
    if dtype.is_integer() and (source.is_temporal() or (fractional and (series != series.round()).any())):
        raise DataError(f"{refusal}; give whole numbers")
    binary = source == pl.Boolean or (source.is_numeric() and bool(((series == 0) | (series == 1)).all()))
    if dtype == pl.Boolean and ((series.has_nulls() and not nullable) or not binary):
        values = listed(series.unique(maintain_order=True).head(5))
        raise DataError(f"{refusal}; give true/false or 0/1{'' if nullable else ' without gaps'}, got {values}")
    try:
        if dtype == pl.List(pl.Float32) and source.is_numeric():
            return series.cast(pl.Float32).reshape((-1, 1)).arr.to_list()
        cast = series.cast(dtype)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{refusal}: {error}") from error
    return cast.replace("", None) if dtype == pl.String else cast


def _resolve_split(split: schema.TimeSplit | SplitFractions | None, rows: pl.DataFrame) -> schema.TimeSplit | None:
    times = rows["timestamp_ms"].drop_nulls()
    if split is None or (isinstance(split, SplitFractions) and not times.len()):
        return None
    resolved = split_by_time(times, split) if isinstance(split, SplitFractions) else split
    valid, test = resolved.valid_start_ms, resolved.test_start_ms
    schema.require_times(pl.Series([valid, test]), "split: a start")
    parts = {"training": times < valid, "test": times >= test, "validation": (times >= valid) & (times < test)}
    for part, mask in parts.items():
        if not mask.any() and (part != "validation" or valid < test):
            span = f"{date_text(times.min())} to {date_text(times.max())}" if times.len() else "no known time"
            raise DataError(
                f"split: no row falls into {part} with valid_start={date_text(valid)} and "
                f"test_start={date_text(test)}; the data covers {span}; choose times inside it (--valid-start and "
                "--test-start)"
            )
    return resolved


def date_text(time_ms: object) -> str | None:
    """A Unix time in ms as ISO 8601; None for any other value."""
    if not isinstance(time_ms, int):
        return None
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds")
