"""Guesses how a text file is written: encoding, separator, quotes, ends of lines, and whether it has a header."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from pathlib import Path

import msgspec

from unipinrec.errors import DataError
from unipinrec.models.data.files import JSON_ENDINGS, UNIT_SEPARATOR, FileForm, opened, separator_of

SAMPLE = 500  # lines
SEPARATORS = (",", ";", "\t", "|", "::", " ")
NUMBER_OR_DATE = re.compile(
    r"\s*[-+]?[\d.,:/ TZ-]*\d[\d.,:/ TZ+-]*(?:e[-+]?\d+)?(?: ?[AaPp]\.?[Mm]\.?)?\s*|true|false", re.IGNORECASE
)
NAMES = re.compile(
    r"(?:user|item|product|customer|movie|track|song|artist|video|event|action|rating|time|timestamp|date)s?"
    r"[ _.-]?(?:id|name|type|code)?",
    re.IGNORECASE,
)


def guess_form(path: Path) -> tuple[FileForm, str]:
    """The form of a file, with `header` as names `column_1`, ... if it has none, and the ends of its lines.

    Raises:
        DataError: The file is empty or not readable.
    """
    if path.suffix == ".parquet" or path.name.removesuffix(".gz").endswith(JSON_ENDINGS):
        return FileForm(), "none"
    try:
        with opened(path) as stream:
            data = stream.read()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: {error}") from error
    if not data.strip():
        raise DataError(f"{path}: empty")
    encoding = _encoding(data)
    text = data.decode(encoding).removeprefix("\ufeff")
    ends = "CR LF" if "\r\n" in text else "CR" if "\r" in text and "\n" not in text else "LF"
    text = "".join(io.StringIO(text, None).readlines()[:SAMPLE])
    tried = []
    for rank, separator in enumerate(SEPARATORS):
        for quote in ('"', "'", ""):
            share, width = _fit(rows_of(text, separator, quote))
            edge = re.escape(separator)
            used = quote and re.search(f"(?:^|{edge}){quote}[^{quote}\n]*{quote}(?:{edge}|$)", text, re.MULTILINE)
            if width > 1:
                key = (round(share, 2), bool(used), separator != " ", width, -rank, quote == '"')
                tried.append((key, separator, quote))
    if not tried:
        raise DataError(
            f"{path}: no separator of {list(SEPARATORS)} makes columns of it; give `separator` in the column map"
        )
    _, separator, quote = max(tried)
    rows = rows_of(text, separator, quote)
    header = None if _has_header(rows) else tuple(f"column_{place}" for place in range(1, len(rows[0]) + 1))
    form = FileForm(encoding=encoding, quote=quote, header=header)
    return (form if separator == separator_of(path, form) else msgspec.structs.replace(form, separator=separator)), ends


def rows_of(text: str, separator: str, quote: str) -> list[list[str]]:
    """The rows of a text whose lines end in LF."""
    if len(separator) > 1:
        text, separator = text.replace(separator, UNIT_SEPARATOR), UNIT_SEPARATOR
    lines = io.StringIO(text)
    if not quote:
        rows = csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(lines, delimiter=separator, quotechar=quote)
    try:
        return [row for row in rows if row]
    except csv.Error:
        return []


def _encoding(data: bytes) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    for encoding in ("utf-8", "cp1252"):
        try:
            data.decode(encoding)
        except UnicodeDecodeError:
            continue
        return "latin-1" if encoding == "cp1252" and not re.search(rb"[\x80-\x9f]", data) else encoding
    return "latin-1"


def _fit(rows: list[list[str]]) -> tuple[float, int]:
    """The share of rows of the commonest width, and this width."""
    if not rows:
        return 0.0, 0
    width, count = Counter(map(len, rows)).most_common(1)[0]
    return count / len(rows), width


def _has_header(rows: list[list[str]]) -> bool:
    first, rest = rows[0], rows[1:]
    if any(not cell.strip() or NUMBER_OR_DATE.fullmatch(cell) for cell in first) or len(set(first)) < len(first):
        return False
    if any(NAMES.fullmatch(cell.strip()) for cell in first):
        return True
    columns = [[row[place] for row in rest if place < len(row)] for place in range(len(first))]
    return not any(cell in column for cell, column in zip(first, columns, strict=True))
