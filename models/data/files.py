"""Tables in files: text of any form, JSON lines and Parquet as data frames, and columns as text or numbers.

Knows nothing of users, items or actions. Errors name the file, the line or row, the values, and the option that helps.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from unipinrec.errors import DataError, listed
from unipinrec.models.data import schema

TEXT_ENDINGS = (".csv", ".tsv", ".txt", ".dat", ".data")
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
SEVERAL = "a column map reads several files with `files`"
UNIT_SEPARATOR = "\x1f"  # stands for a separator of several characters
HEAD_BYTES = 1 << 16


class FileForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a table lies, and how its text is written.

    `file` is a name, `files` a pattern of names such as "part-*.parquet". `separator` is a comma, or a tab in `.tsv`,
    unless given; it may have several characters. `quote` is one character, or "" for none. `header` names the columns
    of a file without a line of names.
    """

    file: str | None = None
    files: str | None = None
    separator: str | None = None
    encoding: str = "utf-8"
    quote: str = '"'
    header: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.separator is not None and (not self.separator or set(self.separator) & {"\n", "\r", self.quote}):
            raise ValueError(f"`separator` is {self.separator!r}; give what stands between columns, such as ';'")
        if len(self.quote.encode()) > 1:
            raise ValueError(f'`quote` is {self.quote!r}; give one ASCII character, or "" if values have no quotes')
        if self.header is not None and (not self.header or len(set(self.header)) < len(self.header)):
            raise ValueError("`header` names every column of a file without a header, each once and in order")
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            raise ValueError(
                f"`encoding` {self.encoding!r} is unknown; utf-8, latin-1 and cp1252 are common"
            ) from error


PLAIN = FileForm()


def read_table(
    path: Path,
    columns: Collection[str] | None,
    types: Mapping[str, pl.DataType] | None = None,
    form: FileForm = PLAIN,
) -> pl.DataFrame:
    """Read these columns of the text, JSON lines or Parquet file of exactly this name.

    Args:
        path: The file; its ending names its format. With `form.separator` it is text, whatever its ending.
        columns: Names to read; None for all columns, in the order of the file, of which text files have text.
        types: Types of columns in text files that should not be guessed.
        form: How the text is written.

    Raises:
        DataError: The file is not readable, or lacks a column; the message lists those it has.
    """
    if path.suffix == ".parquet":
        frame = schema.read_parquet(path, SEVERAL)
        return frame if columns is None else _select(frame, path, columns)
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(JSON_ENDINGS):
            frame = _read_json(path, types)
            return frame if columns is None else _select(frame, path, columns)
        if form.separator is None and not name.endswith(TEXT_ENDINGS):
            endings = ", ".join((*TEXT_ENDINGS, *JSON_ENDINGS))
            raise DataError(
                f"{path}: reads {endings} (all also as .gz) and .parquet; convert it first, or give `separator`"
            )
        return _read_text(path, columns, types or {}, form)
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder; {SEVERAL}") from error
    except (OSError, EOFError, zlib.error, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: {_faulty_line(path, form) or error}") from error


def opened(path: Path) -> io.BufferedIOBase:
    """The bytes of a file, unpacked if its name ends in `.gz`."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def separator_of(path: Path, form: FileForm) -> str:
    """What stands between columns, by the form or the ending of the name."""
    return form.separator or ("\t" if ".tsv" in path.suffixes else ",")


def _read_text(
    path: Path, columns: Collection[str] | None, types: Mapping[str, pl.DataType], form: FileForm
) -> pl.DataFrame:
    source, separator = _plain(path, form)
    read = partial(pl.read_csv, source, glob=False, separator=separator, quote_char=form.quote or None)
    read = partial(read, has_header=form.header is None)
    first = read(n_rows=0 if form.header is None else 1)
    names = form.header or first.columns
    if len(names) != first.width:
        row = list(map(str, first.row(0)))
        raise DataError(f"{path}: `header` names {len(names)} columns, line 1 has {first.width}: {listed(row)}")
    several = pl.col(pl.String).str.replace_all(UNIT_SEPARATOR, separator_of(path, form), literal=True)
    whole = [several] if separator == UNIT_SEPARATOR else []  # a separator in quotes stays what it was
    if columns is None:
        frame = read(infer_schema=False).rename(dict(zip(first.columns, names, strict=True)))
        return frame.with_columns(whole)
    stored = dict(zip(names, first.columns, strict=True))
    try:
        chosen = _select(pl.DataFrame(schema=list(names)), path, columns).columns
    except DataError as error:
        raise DataError(f"{error}{_hint(path, list(names), separator)}") from error
    if twice := [name for name in chosen if f"{name}_duplicated_0" in first.columns]:
        raise DataError(
            f"{path}: has column {twice[0]!r} more than once; give `header` with other names, if it has none"
        )
    overrides = {stored[name]: dtype for name, dtype in types.items() if name in chosen}
    frame = read(columns=[stored[name] for name in chosen], schema_overrides=overrides, infer_schema_length=None)
    return frame.rename({stored[name]: name for name in chosen}).select(chosen).with_columns(whole)


def _plain(path: Path, form: FileForm) -> tuple[Path | bytes, str]:
    """The file as polars reads it: itself, or its text as UTF-8 with LF and a separator of one byte."""
    separator = separator_of(path, form)
    with opened(path) as stream:  # fails for a folder, of which polars would read all files
        head = stream.read(HEAD_BYTES)
        crooked = b"\r" in head and b"\n" not in head
        if codecs.lookup(form.encoding).name == "utf-8" and len(separator.encode()) == 1 and not crooked:
            return path.absolute(), separator
        data = head + stream.read()
    try:
        text = data.decode(form.encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {_undecodable(data, error)}") from error
    if crooked:
        text = text.replace("\r", "\n")
    if len(separator.encode()) > 1:
        text, separator = text.replace(separator, UNIT_SEPARATOR), UNIT_SEPARATOR
    return text.removeprefix("\ufeff").encode(), separator


def _read_json(path: Path, types: Mapping[str, pl.DataType] | None) -> pl.DataFrame:
    with opened(path) as stream:
        data = stream.read()
    rows = []
    for number, line in enumerate([data] if data.lstrip()[:1] == b"[" else data.splitlines(), 1):
        try:
            row = msgspec.json.decode(line or b"[]", type=list[dict[str, Any]] | dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: line {number} is no JSON object ({error}): {line[:60]!r}; write an object per line"
            ) from error
        rows += row if isinstance(row, list) else [row]
    frame = pl.from_dicts(rows, infer_schema_length=None, strict=False) if rows else pl.DataFrame()
    return frame.cast({name: dtype for name, dtype in (types or {}).items() if frame.schema.get(name) == pl.Int64})


def _faulty_line(path: Path, form: FileForm) -> str | None:
    """What is wrong with the first line that cannot be read, or None if that is unknown."""
    with suppress(OSError, EOFError, zlib.error), opened(path) as stream:
        data = stream.read()
        try:
            text = data.decode(form.encoding)
        except UnicodeDecodeError as error:
            return _undecodable(data, error)
        separator = separator_of(path, form)
        if len(separator) > 1:
            text, separator = text.replace(separator, UNIT_SEPARATOR), UNIT_SEPARATOR
        rows = csv.reader(
            io.StringIO(text, ""),
            delimiter=separator,
            quotechar=form.quote or '"',
            quoting=csv.QUOTE_MINIMAL if form.quote else csv.QUOTE_NONE,
        )
        with suppress(csv.Error):
            width = len(next(rows, []))
            for row in rows:
                if len(row) > width:
                    return (
                        f"line {rows.line_num} has {len(row)} values, line 1 has {width}; it ends in {listed(row[-3:])}"
                        "; correct `separator` or `quote` of the column map, or that line"
                    )
    return None


def _undecodable(data: bytes, error: UnicodeDecodeError) -> str:
    line = data.count(b"\n", 0, error.start) + 1
    around = data[max(0, error.start - 20) : error.end + 10]
    return f'line {line}: {around!r} is not {error.encoding}; give `encoding` in the column map, such as "latin-1"'


def _hint(path: Path, names: list[str], separator: str) -> str:
    """What helps if a column is missing."""
    others = [one for one in ("::", ";", "\t", "|", ",", " ") if one != separator and one in names[0]]
    if len(names) == 1 and others:
        return f"; give `separator = {others[0]!r}`"
    if any(name[:1].isdigit() for name in names):
        return f"; if line 1 of {path.name} holds no names, give them as `header`"
    return ""


def _select(frame: pl.DataFrame, path: Path, columns: Collection[str]) -> pl.DataFrame:
    missing = sorted(set(columns) - set(frame.columns))
    if missing:
        raise DataError(f"{path}: no column {', '.join(map(repr, missing))}; it has {listed(frame.columns)}")
    return frame.select(sorted(columns))


def paths_of(folder: Path, mapped: FileForm) -> list[Path]:
    """The files of a table in a folder, in the order of their names.

    Raises:
        DataError: The form has neither or both of `file` and `files`, or the pattern fits nothing.
    """
    if (mapped.file is None) == (mapped.files is None):
        raise DataError(f"each section of a column map needs `file`, a name in {folder}, or `files`, a pattern")
    if mapped.file is not None:
        return [folder / mapped.file]
    paths = sorted(path for path in folder.iterdir() if fnmatchcase(path.name, mapped.files or ""))
    if not paths:
        raise DataError(f"{folder}: no name in it is like {mapped.files!r}, the `files` of the column map")
    return paths


def joined(paths: list[Path], read: Callable[[Path], pl.DataFrame]) -> pl.DataFrame:
    """The rows of all files.

    Raises:
        DataError: Their columns have types that do not fit together.
    """
    try:
        return pl.concat([read(path) for path in paths], how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{paths[0]} and the other files of its pattern differ: {error}") from error


def as_text(column: pl.Series, option: str) -> pl.Series:
    """The column as text.

    Raises:
        DataError: It holds lists or other values that are no text; the message begins with the option.
    """
    with suppress(pl.exceptions.PolarsError):
        if not column.dtype.is_nested():
            return column.cast(pl.String)
    raise DataError(f"{option}: column {column.name!r} is {column.dtype}; give text or whole numbers")


def as_numbers(column: pl.Series, option: str) -> pl.Series:
    """The column, with text converted to numbers.

    Raises:
        DataError: A value is no number; the message begins with the option.
    """
    if column.dtype.is_numeric() or column.dtype == pl.Boolean:
        return column
    wrong = pl.Series(dtype=pl.Boolean)
    for dtype in (pl.Int64, pl.Float64) if column.dtype in (pl.String, pl.Null) else ():
        numbers = column.cast(dtype, strict=False)
        wrong = numbers.is_null() & column.is_not_null()
        if not wrong.any():
            return numbers
    value = listed(column.filter(wrong).head(1).to_list() if wrong.len() else column.head(1).to_list())
    row = f" (row {wrong.arg_true()[0] + 1})" if wrong.len() else ""
    hint = (
        '; times as text need timestamp_unit = "iso"'
        if option.startswith("timestamp_unit") and column.dtype == pl.String
        else ""
    )
    raise DataError(f"{option}: column {column.name!r} is {column.dtype}, {value} is no number{row}{hint}")
