"""`prepare table` reads any tables and column map correctly, or raises a `DataError` of bounded length.

The first byte of an input selects its form: a raw column map or CSV file, or choices, or a seed of choices, that make a
table with a known meaning: times in any type and unit, flags in any type, ids that look like numbers, names with the
characters of patterns, links, and cut or altered files. The map may name a wrong unit or wrong words. The result must
have the known meaning; from a damaged file, it must be a data set in the documented format that can be written and read
again. Usage: see bench/fuzzing.py.
"""

from __future__ import annotations

import atexit
import contextlib
import gzip
import importlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fuzzing
import polars as pl

with contextlib.ExitStack() as stack:
    if fuzzing.CHILD in sys.argv:
        atheris = importlib.import_module("atheris")
        stack.enter_context(atheris.instrument_imports(include=["unipinrec"]))
    from unipinrec.errors import LONGEST_MESSAGE, DataError
    from unipinrec.models.data.schema import Dataset, read_dataset, write_dataset
    from unipinrec.models.data.table import read_column_map, read_mapped
    from unipinrec.models.data.validate import build_dataset

S = 1_600_000_000  # 2020-09-13T12:26:40
DAY_MS = 86_400_000
Times = Callable[[list[int]], pl.Series]


def _moments(form: str) -> Times:
    return lambda ms: pl.Series([datetime.fromtimestamp(t / 1000, UTC).strftime(form) for t in ms], dtype=pl.String)


# Forms of times in a file: the unit or form for the map, the precision in ms, and the column.
STORED: dict[str, tuple[str, int, Times]] = {
    "UInt32 s": ("s", 1000, lambda ms: pl.Series([t // 1000 for t in ms], dtype=pl.UInt32)),
    "Int64 s": ("s", 1000, lambda ms: pl.Series([t // 1000 for t in ms], dtype=pl.Int64)),
    "Float64 s": ("s", 1, lambda ms: pl.Series([t / 1000 for t in ms], dtype=pl.Float64)),
    "Float32 s": ("s", 1, lambda ms: pl.Series([t / 1000 for t in ms], dtype=pl.Float32)),
    "Decimal s": ("s", 1, lambda ms: pl.Series([t / 1000 for t in ms]).cast(pl.Decimal(20, 3))),
    "text s": ("s", 1, lambda ms: pl.Series([str(t / 1000) for t in ms], dtype=pl.String)),
    "Int64 ms": ("ms", 1, lambda ms: pl.Series(ms, dtype=pl.Int64)),
    "UInt64 us": ("us", 1, lambda ms: pl.Series([t * 1000 for t in ms], dtype=pl.UInt64)),
    "Int64 ns": ("ns", 1, lambda ms: pl.Series([t * 10**6 for t in ms], dtype=pl.Int64)),
    "Datetime": ("iso", 1, lambda ms: pl.Series(ms, dtype=pl.Datetime("ms", "UTC"))),
    "Date": ("iso", DAY_MS, lambda ms: pl.Series([t // DAY_MS for t in ms], dtype=pl.Int32).cast(pl.Date)),
    "iso": ("iso", 1, _moments("%Y-%m-%dT%H:%M:%S.%f+00:00")),
    "iso day": ("iso", DAY_MS, _moments("%Y-%m-%d")),
    "slashes": ("%d/%m/%Y", DAY_MS, _moments("%d/%m/%Y")),
    "digits": ("%Y%m%d", DAY_MS, lambda ms: _moments("%Y%m%d")(ms).cast(pl.Int64)),
}
SAID = ("right", "s", "ms", "us", "ns", "iso", "%d/%m/%Y", "%Y%m%d")
FLAGS: tuple[tuple[Any, Any], ...] = (
    *((True, False), (1, 0), (1.0, 0.0), ("1", "0"), ("true", "False"), ("1.0", "0.0"), ("buy", "view")),
    *((2, 1), (2.0, 1.0), ("2", "10"), (float("nan"), 1.0), ("BUY", "buy ")),
)
WORDS: dict[str, Any] = {
    **{"true": True, "false": False, "1": 1, "2": 2, "2.0": 2.0, '"1"': "1", '"2"': "2", '"true"': "true"},
    **{'"buy"': "buy", '"BUY"': "BUY"},
}
RULES = ("flag", "at_least", *WORDS)
IDS = (
    *("u", "007", "7", "7.0", "1e3", " x ", "é", "NaN", "null", "true", "a,b", 'q"q', "line\nbreak", "-0", "0x1F"),
    *("2020-09-13", "\t", "#", "i" * 300, "9007199254740993", "'"),
)
NAMES = ("e", "e[1]", "e*", "e?", "{a,b}", "e%20", "~", "ü", "a=1", "[!e]", "**")
ENDINGS = (".csv", ".parquet", ".tsv", ".csv.gz")
DAMAGE = ("none", "link", "link to a folder", "link to itself", "cut", "altered", "CR", "CR LF", "UTF-16", "renamed")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A table, its meaning, and its column map.

    `rows` are user, item, time in ms, and whether the first of `flags` is set; items are distinct.
    """

    rows: list[tuple[str, str, int, bool]]
    stored: str = "Int64 s"
    said: str = "right"
    flags: tuple[Any, Any] = (1, 0)
    rule: str = "flag"
    name: str = "e"
    ending: str = ".csv"
    gap: bool = False
    damage: str = "none"
    index: int = 0

    def times_ms(self) -> list[int]:
        """The times, in the precision of the file."""
        step = STORED[self.stored][1]
        return [time_ms // step * step for _, _, time_ms, _ in self.rows]

    def values(self) -> list[Any]:
        """The column of the action."""
        gaps = [self.gap and index > 0 for index in range(len(self.rows))]
        return [None if gap else self.flags[not had] for gap, (*_, had) in zip(gaps, self.rows, strict=True)]

    def meant(self) -> list[tuple[str, str, int, bool]]:
        """The events."""
        columns = zip(self.rows, self.times_ms(), self.values(), strict=True)
        return sorted(
            (user, item, time_ms, _happened(self.rule, value)) for (user, item, *_), time_ms, value in columns
        )

    def usual(self) -> bool:
        """Whether file and map are plain, so that they must be accepted."""
        read = self.said == "right" and self.stored != "Float32 s" and self.damage in ("none", "link", "CR LF")
        flag = (
            self.flags[0] in (1, "1", "1.0", "true") and self.rule in ("flag", "1") and any(e[3] for e in self.meant())
        )
        return read and flag

    def table(self) -> pl.DataFrame:
        """The columns of the file."""
        columns = {"user": [row[0] for row in self.rows], "item": [row[1] for row in self.rows], "did": self.values()}
        return pl.DataFrame(columns).with_columns(STORED[self.stored][2](self.times_ms()).alias("when"))

    def toml(self) -> str:
        """The column map."""
        unit = STORED[self.stored][0] if self.said == "right" else self.said
        rules = {"flag": '"did"', "at_least": '{ column = "did", at_least = 1 }'}
        rule = rules.get(self.rule, f'{{ column = "did", equals = [{self.rule}] }}')
        return (
            f'name = "x"\npositive_actions = ["buy"]\n[actions]\nbuy = {rule}\n[events]\nuser = "user"\nitem = "item"\n'
            f'timestamp = "when"\ntimestamp_{"format" if "%" in unit else "unit"} = "{unit}"\n'
        )


def check(case: Case, folder: Path) -> None:
    """Fails if a case is neither read correctly nor rejected correctly."""
    path = folder / (case.name + case.ending)
    if set("[*?{") & set(case.name):  # the name as a pattern
        for decoy in ("e1", "ee", "a"):
            _write(case.table().with_columns(item=pl.lit("decoy")), folder / (decoy + case.ending))
    _write(case.table(), path)
    path = _damaged(path, case)
    made = prepared(path, case.toml(), folder)
    if made is None:
        assert not case.usual()
        return
    rows = made.events.select("user_id", "item_id", "timestamp_ms", "action_buy").rows()
    if case.damage == "cut" and ".gz" not in case.ending:  # the row that was cut may be another, or two of one item
        assert case.stored == "Float32 s" or len(set(rows) - set(case.meant())) <= 1
    elif case.damage != "altered" and not (case.stored == "Float32 s" and case.ending != ".parquet"):
        assert sorted(rows) == case.meant()


def prepared(path: Path, toml: str, folder: Path) -> Dataset | None:
    """The data set, written and read again; None if it was rejected correctly."""
    columns = folder / "map.toml"
    columns.write_text(toml, errors="surrogateescape")
    try:
        raw = replace(read_mapped(path, read_column_map(columns)), split=None)
        made = build_dataset(raw)
    except DataError as error:
        text = str(error)
        assert 10 < len(text) <= LONGEST_MESSAGE, text
        return None
    write_dataset(made, folder / "data")
    assert read_dataset(folder / "data").events.equals(made.events)
    return made


def _meaning(value: Any) -> Any:
    """One thing for true, 1, 1.0 and their texts."""
    text = str(value).lower() if str(value).lower() in ("true", "false") else str(value)
    with contextlib.suppress(ValueError):
        return float({"true": "1", "false": "0"}.get(text, text))
    return text


def _happened(rule: str, value: Any) -> bool:
    meaning = _meaning(value)
    if value is None or str(meaning) == "nan":  # a gap
        return False
    if rule == "at_least":
        return isinstance(meaning, float) and meaning >= 1
    return bool(meaning == _meaning(True if rule == "flag" else WORDS[rule]))


def _write(table: pl.DataFrame, path: Path) -> None:
    if path.suffix == ".parquet":
        table.write_parquet(path)
    else:
        text = table.write_csv(separator="\t" if ".tsv" in path.suffixes else ",").encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def _damaged(path: Path, case: Case) -> Path:
    data, link, at = path.read_bytes(), path.with_name(f"link{case.ending}"), case.index
    if case.damage.startswith("link"):
        target = {"link": path, "link to a folder": path.parent, "link to itself": link}[case.damage]
        link.symlink_to(target)
        return link
    if case.damage == "renamed":
        other = path.with_name("other" + (".csv" if case.ending == ".parquet" else ".parquet"))
        return path.rename(other)
    text = case.ending in (".csv", ".tsv") and "\n" not in "".join(row[0] + row[1] for row in case.rows)
    lines: dict[str, Callable[[], bytes]] = {
        "CR": lambda: data.replace(b"\n", b"\r"),
        "CR LF": lambda: data.replace(b"\n", b"\r\n"),
        "UTF-16": lambda: data.decode().encode("utf-16"),
    }
    if case.damage == "cut":
        data = data[: at % max(1, len(data))]
    elif (
        case.damage == "altered" and case.ending != ".parquet"
    ):  # polars aborts on some altered pages (docs/threats.md)
        index = at % len(data)
        data = data[:index] + bytes([data[index] ^ (1 + at // 7 % 255)]) + data[index + 1 :]
    elif case.damage in lines and text:
        data = lines[case.damage]()
    path.write_bytes(data)
    return path


SCRATCH = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
GOOD = Case(rows=[("u", "a", S * 1000, True), ("u", "b", S * 1000 + 1000, False)])
TOML_WORDS = (
    *("name", "positive_actions", "[actions]", "[events]", "[slates]", "[items]", "user", "item", "file", "files"),
    *("timestamp", "timestamp_unit", "timestamp_format", "surface", "order", "slate", "position", "slate_gap_minutes"),
    *(
        "column",
        "equals",
        "at_least",
        "title",
        "dense",
        "categories",
        "did",
        "when",
        "e.csv",
        "*.csv",
        "ns",
        "iso",
        "inf",
    ),
    *("%Y-%m-%d", "1600000000", "true", "nan", "\\r", "\\r\\n", ",,", '""', "\\ufeff", "1e400", "-0.0", "../"),
)


def target(data: bytes) -> None:
    """One input."""
    if not data:
        return
    kind, body = data[0] % 4, data[1:]
    folder = Path(tempfile.mkdtemp(dir=SCRATCH))
    try:
        if kind == 0:
            _write(GOOD.table(), folder / "e.csv")
            prepared(folder, body.decode(errors="surrogateescape"), folder)
        elif kind == 1:
            (folder / "e.csv").write_bytes(body)
            prepared(folder / "e.csv", GOOD.toml(), folder)
        else:
            check(_case(body if kind == 2 else random.Random(body).randbytes(64)), folder)
    finally:
        shutil.rmtree(folder)


def _case(data: bytes) -> Case:
    choose = fuzzing.Choices(data)
    stored, said, flags = choose.one_of(*STORED), choose.one_of("right", "right", *SAID), choose.one_of(*FLAGS)
    rule, name, ending = choose.one_of("flag", *RULES), choose.one_of(*NAMES), choose.one_of(*ENDINGS)
    gap, damage = bool(choose.number(2)), choose.one_of("none", "none", *DAMAGE)
    index = choose.number(256) * 256 + choose.number(256)
    rows: dict[str, tuple[str, str, int, bool]] = {}
    for _ in range(1 + choose.number(5)):
        item, time_ms = choose.one_of(*IDS), S * 1000 + choose.number(256) * 86_399_997
        rows[item] = (choose.one_of(*IDS), item, time_ms, bool(choose.number(2)))
    return Case(
        rows=list(rows.values()),
        stored=stored,
        said=said,
        flags=flags,
        rule=rule,
        name=name,
        ending=ending,
        gap=gap,
        damage=damage,
        index=index,
    )


def _seeds() -> list[bytes]:
    items = '[items]\nfile = "e.csv"\nitem = "item"\ndense = { a = "did" }\ncategories = { b = "user" }\n'
    maps = [GOOD.toml(), GOOD.toml() + 'file = "e.csv"\n' + items, GOOD.toml() + 'files = "*.csv"\norder = "when"\n']
    shown = 'file = "e.csv"\n[slates]\nfiles = "e*"\nuser = "user"\nitem = "item"\nslate = "did"\ntimestamp = "when"\n'
    maps += [f"{GOOD.toml()}{shown}timestamp_unit = {json.dumps('s')}\n", "slate_gap_minutes = 30\n" + maps[1]]
    tables = [GOOD.table(), Case(rows=GOOD.rows, stored="iso", flags=("buy", "view")).table()]
    made = [bytes([2, *(row * 7 % 256 for row in range(start, start + 30))]) for start in range(24)]
    return [*(b"\0" + text.encode() for text in maps), *(b"\1" + table.write_csv().encode() for table in tables), *made]


if __name__ == "__main__":
    fuzzing.main(__file__, target, _seeds(), TOML_WORDS, longest=2048)
