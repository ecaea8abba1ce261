"""The input format: a folder of typed Parquet tables and a `dataset.json` that declares them.

    dataset.json     DatasetSpec: action names, surfaces, item features, split times, counts of dropped rows
    events.parquet   the history stream; per user in chronological order
    slates.parquet   shown items, engaged or not, with labels; one row per item (may be empty)
    items.parquet    the catalogue; the row number is the internal item id everywhere downstream

| table  | column                 | type          | null | meaning                                                    |
|--------|------------------------|---------------|------|------------------------------------------------------------|
| events | user_id, item_id       | String        | no   | external ids                                               |
| events | surface                | String        | no   | where it happened; one of `surfaces`                       |
| events | timestamp_ms           | Int64         | yes  | Unix time in ms, UTC; null = unknown, before all known     |
| events | action_{name}          | Boolean       | yes  | one column per declared action; null = unknown             |
| slates | slate_id               | Int64         | no   | groups the rows of one impression slate                    |
| slates | the columns of events  | as above      | no   | timestamp_ms: when the slate was shown                     |
| slates | action_{name}          | Boolean       | no   | the labels                                                 |
| slates | position               | Int32         | yes  | rank at which the item was shown, 0 = first                |
| items  | item_id                | String        | no   | unique                                                     |
| items  | title                  | String        | yes  | to display                                                 |
| items  | dense_{name}           | List(Float32) | no   | a finite vector of the declared width                      |
| items  | category_{name}        | String        | yes  | null or a word outside the vocabulary = unknown            |
| items  | metadata_{name}        | Float64 or    | yes  | to display and to filter by; the model does not see it     |
|        |                        | String        |      |                                                            |

Events and slates may refer only to items of the catalogue. All rows of a slate have one user, surface and timestamp,
and an item at most once. A slate's history is every event of its user with a null timestamp or a timestamp before the
slate's. This module knows the format, and no source of data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from unipinrec.errors import DataError, decoding, listed

FORMAT_VERSION = 1
EARLIEST_MS, LATEST_MS = 631_152_000_000, 4_102_444_800_000  # 1990 and 2100: other times are in another unit
UNITS_MS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
UNKNOWN_SURFACE = "unknown"
PREPARE_AGAIN = "run `unipinrec prepare` again"
ACTION_PREFIX = "action_"
DENSE_PREFIX = "dense_"
CATEGORY_PREFIX = "category_"
METADATA_PREFIX = "metadata_"
MOST_METADATA, LONGEST_METADATA = 64, 4_096  # columns, and characters of a value
METADATA_TYPES = {"number": pl.Float64(), "text": pl.String()}


class TimeSplit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Train before `valid_start_ms`, validate up to `test_start_ms`, test from there on (Unix ms, UTC)."""

    valid_start_ms: int
    test_start_ms: int

    def __post_init__(self) -> None:
        if self.valid_start_ms > self.test_start_ms:
            raise DataError(
                f"split: valid_start_ms={self.valid_start_ms} is after test_start_ms={self.test_start_ms}; "
                "validation must begin before the test does"
            )


class DatasetSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The content of `dataset.json`.

    Attributes:
        actions: Names of all actions, in the order of every action vector (C names).
        positive_actions: The subset that makes an event a retrieval target.
        surfaces: Names of all surfaces; the index is the id in the model, index 0 is `unknown`.
        dense: Width of each dense item feature.
        categories: Vocabulary of each categorical item feature; code = index + 1, code 0 = unknown.
        split: Times of the split; None for data without usable times, which is split leave-one-out
            (last event = test, the one before = validation).
        dropped: Number of rows or users dropped, by reason.
        source: Origin and licence of the data, as text.
        metadata: Type of each column of the items that is kept and not taught.
    """

    format_version: int
    name: str
    actions: tuple[str, ...]
    positive_actions: tuple[str, ...]
    surfaces: tuple[str, ...]
    dense: dict[str, int]
    categories: dict[str, tuple[str, ...]]
    split: TimeSplit | None
    dropped: dict[str, int]
    source: str
    metadata: dict[str, Literal["number", "text"]] = {}

    @property
    def positive(self) -> NDArray[np.bool_]:
        """Which of the actions are positive, [C]."""
        return np.array([name in self.positive_actions for name in self.actions])

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise DataError(
                f"dataset.json: format_version is {self.format_version}, this version reads {FORMAT_VERSION}; "
                + PREPARE_AGAIN
            )
        if not self.actions or len(set(self.actions)) != len(self.actions):
            raise DataError(f"actions must be a non-empty list of distinct names, got {list(self.actions)}")
        foreign = set(self.positive_actions) - set(self.actions)
        if foreign or not self.positive_actions:
            raise DataError(
                f"positive_actions {list(self.positive_actions)} must be a non-empty part of "
                f"actions {list(self.actions)}"
            )
        if not self.surfaces or self.surfaces[0] != UNKNOWN_SURFACE or len(set(self.surfaces)) != len(self.surfaces):
            raise DataError(f"surfaces must be distinct and begin with {UNKNOWN_SURFACE!r}, got {list(self.surfaces)}")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set in memory: the declaration and its three tables, with the columns of the module docstring."""

    spec: DatasetSpec
    events: pl.DataFrame
    slates: pl.DataFrame
    items: pl.DataFrame


def event_columns(actions: tuple[str, ...]) -> dict[str, pl.DataType]:
    """Columns and types of `events.parquet` for these action names."""
    return {
        "user_id": pl.String(),
        "item_id": pl.String(),
        "surface": pl.String(),
        "timestamp_ms": pl.Int64(),
        **{ACTION_PREFIX + name: pl.Boolean() for name in actions},
    }


def slate_columns(actions: tuple[str, ...]) -> dict[str, pl.DataType]:
    """Columns and types of `slates.parquet` for these action names."""
    return {"slate_id": pl.Int64(), **event_columns(actions), "position": pl.Int32()}


def item_columns(spec: DatasetSpec) -> dict[str, pl.DataType]:
    """Columns and types of `items.parquet` for the declared features."""
    return {
        "item_id": pl.String(),
        "title": pl.String(),
        **{DENSE_PREFIX + name: pl.List(pl.Float32) for name in spec.dense},
        **{CATEGORY_PREFIX + name: pl.String() for name in spec.categories},
        **{METADATA_PREFIX + name: METADATA_TYPES[kind] for name, kind in spec.metadata.items()},
    }


def require_new(folder: Path) -> None:
    """Check that a folder to write does not exist.

    Raises:
        DataError: It exists.
    """
    if folder.exists():
        raise DataError(f"{folder} exists; choose another --out or remove it first")


def write_dataset(dataset: Dataset, folder: Path, also: Callable[[Path], None] = lambda folder: None) -> None:
    """Write a validated data set as a folder, which appears only when it is complete.

    Args:
        dataset: The data set.
        folder: The folder to write; it must not exist.
        also: Writes further files into the unfinished folder, before that gets its final name.

    Raises:
        DataError: The folder exists, or it could not be written (disk full, no permission).
    """
    require_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.partial-", dir=folder.parent) as unfinished:
            partial = Path(unfinished) / folder.name
            partial.mkdir()
            for name in ("events", "slates", "items"):
                getattr(dataset, name).write_parquet(partial / f"{name}.parquet")
            (partial / "dataset.json").write_bytes(msgspec.json.format(msgspec.json.encode(dataset.spec)))
            also(partial)
            partial.rename(folder)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"could not write {folder}: {error}; nothing was left behind") from error


def read_dataset(folder: Path) -> Dataset:
    """Read a prepared data set; check columns and types, the order of the events, and the items' ids and features.

    Raises:
        DataError: The folder is no prepared data set, or a table is not in the format of the module docstring.
    """
    declaration, spec = folder / "dataset.json", read_spec(folder)
    tables = {}
    for name, columns in {
        "events": event_columns(spec.actions),
        "slates": slate_columns(spec.actions),
        "items": item_columns(spec),
    }.items():
        path = folder / f"{name}.parquet"
        tables[name] = read_parquet(path, PREPARE_AGAIN)
        if dict(tables[name].schema) != columns:
            raise DataError(f"{path}: columns are {listed(tables[name].schema.items())}, expected {columns}")
        if "timestamp_ms" in columns:
            require_times(tables[name]["timestamp_ms"], f"{path}: timestamp_ms")
    if spec.split is not None:
        for name, start_ms in msgspec.structs.asdict(spec.split).items():
            require_times(pl.Series([float(start_ms)]), f"{declaration}: {name}")
    time = pl.col("timestamp_ms").fill_null(-1)
    early = tables["events"].filter(time < time.shift().over("user_id")).select("user_id", "timestamp_ms")
    _refuse(folder / "events.parquet", early, "a user's events must be in order of time, unknown times first")
    _require_items(folder / "items.parquet", tables["items"], spec)
    return Dataset(spec=spec, **tables)


def read_spec(folder: Path) -> DatasetSpec:
    """Read the declaration of a prepared data set.

    Raises:
        DataError: The folder is no prepared data set.
    """
    declaration = folder / "dataset.json"
    try:
        content = declaration.read_bytes()
    except OSError as error:
        raise DataError(f"{folder} is not a prepared data set ({error}); make one with `unipinrec prepare`") from error
    with decoding(DataError, declaration, PREPARE_AGAIN):
        return msgspec.json.decode(content, type=DatasetSpec)


def read_parquet(path: Path, remedy: str) -> pl.DataFrame:
    """Read the file of exactly this name, whatever characters are in it.

    Raises:
        DataError: It is not readable; the message ends with the remedy.
    """
    try:
        path.open("rb").close()  # fails for a folder, of which polars would read all files
        return pl.read_parquet(path.absolute(), glob=False)
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"{path}: not readable as Parquet: {error}; {remedy}") from error


def require_times(times: pl.Series, what: str, unit: str = "ms") -> None:
    """Reject numbers that are no Unix time of 1990 to 2100 in this unit: other years come from a wrong unit.

    Raises:
        DataError: There is such a number; the message names the unit that fits. Nulls are unknown times.
    """
    wrong = times.filter(~(times * UNITS_MS[unit]).is_between(EARLIEST_MS, LATEST_MS))
    if wrong.len():
        fits = [name for name, scale in UNITS_MS.items() if EARLIEST_MS <= wrong[0] * scale <= LATEST_MS]
        looks = f", but looks like Unix time in {fits[0]}" if fits else ""
        raise DataError(
            f"{what} is {wrong[0]:.16g}: as Unix time in {unit} it is not between 1990 and 2100{looks} "
            f"({wrong.len()} such values); correct the unit, leave unknown times empty, and give counters as `order`"
        )


def _require_items(path: Path, items: pl.DataFrame, spec: DatasetSpec) -> None:
    again = items.filter(~pl.col("item_id").is_first_distinct()).select("item_id")
    _refuse(path, again, "each item_id must stand in one row")
    for name, width in spec.dense.items():
        column = pl.col(DENSE_PREFIX + name)
        bad = items.filter(~is_finite(DENSE_PREFIX + name) | (column.list.len() != width))
        rule = f"{DENSE_PREFIX}{name} of each item must be finite numbers, {width} of them"
        _refuse(path, bad.select("item_id", column.list.head(5)), rule)


def is_finite(column: str) -> pl.Expr:
    """Whether a vector is there, and all of its numbers are finite."""
    return pl.col(column).list.eval(pl.element().is_finite().fill_null(False)).list.all().fill_null(False)


def _refuse(path: Path, bad: pl.DataFrame, rule: str) -> None:
    if bad.height:
        first = bad.row(0, named=True)
        raise DataError(f"{path}: {rule}; wrong rows: {bad.height}, first {first}; {PREPARE_AGAIN}")
