"""`inspect` guesses a column map that `prepare table` takes: eight shapes of files, and dialects at random."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import SMALL, served
from starlette.testclient import TestClient

from unipinrec.cli import main
from unipinrec.errors import DataError
from unipinrec.models.data.guess import inspect_source
from unipinrec.models.data.schema import Dataset, read_dataset
from unipinrec.models.data.table import read_column_map, read_mapped
from unipinrec.models.data.validate import build_dataset

ROWS = range(60)


def user(row: int) -> str:
    return f"u{row % 7:02}"


def item(row: int) -> str:
    return f"i{row * 5 % 13:02}"


def semicolons(folder: Path) -> Path:
    lines = ["Kunde;Artikel;Zeitpunkt;gekauft"]
    lines += [f'{user(n)};"Müsli; {item(n)}";{n % 27 + 1:02}.{n // 30 + 3:02}.2024 12:{n:02};{n % 2}' for n in ROWS]
    path = folder / "kaeufe.csv"
    path.write_bytes("\r".join([*lines, ""]).encode("latin-1"))
    return path


def no_header(folder: Path) -> Path:
    path = folder / "log.csv"
    path.write_text("".join(f"{n % 7 + 1},{n * 5 % 13 + 100},{n % 5 + 1},{1_600_000_000 + n}\n" for n in ROWS))
    return path


def impressions(folder: Path) -> Path:
    path = folder / "behaviors.tsv"
    lines = (
        f"{n + 1}\t{user(n)}\t11/{n % 28 + 1}/2019 {n % 12 + 1}:05:{n:02} {'AP'[n % 2]}M\tN1 N2\t"
        f"N{n}-1 N{n + 1}-0 N{n + 2}-0"
        for n in ROWS
    )
    path.write_text("\n".join(lines) + "\n")
    return path


def play_counts(folder: Path) -> Path:
    path = folder / "user_artists.dat"
    path.write_text("userID\tartistID\tweight\n" + "".join(f"{n % 7}\t{n}\t{n * n + 1}\n" for n in ROWS))
    return path


def constant(folder: Path) -> Path:
    path = folder / "clicks.csv"
    path.write_text(
        "session_user,article,ts\n" + "".join(f"{user(n)},{item(n)},{1_600_000_000_000 + n}\n" for n in ROWS)
    )
    return path


def purchases(folder: Path) -> Path:
    path = folder / "retail.csv"
    head = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
    path.write_text(
        head
        + "".join(
            f'{536365 + n // 3},{item(n)},"HEART, {item(n)}",{n % 4 - 1},{n % 28 + 1:02}/12/2010 08:{n:02},2.55,'
            f"{17850 + n % 7},UK\n"
            for n in ROWS
        )
    )
    return path


def json_lines(folder: Path) -> Path:
    path = folder / "events.jsonl"
    events = ("view", "view", "cart", "purchase")
    rows = (
        {
            "user_id": n % 7,
            "product_id": f"00{n % 13}",
            "event_type": events[n % 4],
            "time": f"2024-05-{n % 28 + 1:02}T10:00:{n:02}Z",
        }
        for n in ROWS
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(folder: Path) -> Path:
    for part in range(3):
        rows = range(part * 20, part * 20 + 20)
        frame = pl.DataFrame(
            {
                "uid": [n % 7 for n in rows],
                "item_id": [n % 13 for n in rows],
                "timestamp": [1_600_000_000 + n for n in rows],
            }
        )
        frame.write_parquet(folder / f"part-{part}.parquet")
    vectors = pl.Series([[float(n), 1.0] for n in range(13)], dtype=pl.Array(pl.Float32, 2))
    pl.DataFrame({"item_id": range(13), "embed": vectors, "brand": ["x", "y"] * 6 + ["z"]}).write_parquet(
        folder / "items.parquet"
    )
    return folder


def prepared(source: Path, edits: dict[str, str] | None = None) -> Dataset:
    """From `inspect` to a data set, with lines of the map replaced."""
    toml = inspect_source(source).toml
    for old, new in (edits or {}).items():
        assert old in toml
        toml = toml.replace(old, new)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "map.toml"
        path.write_text(toml, encoding="utf-8")
        return build_dataset(read_mapped(source, read_column_map(path)))


@pytest.mark.parametrize(
    ("make", "events", "actions", "first"),
    [
        (semicolons, 60, ("gekauft",), ("u00", "Müsli; i00", 1709294400000)),
        (no_header, 60, ("interact",), ("1", "100", 1600000000000)),
        (impressions, 180, ("click",), None),
        (play_counts, 60, ("use",), ("0", "0", None)),
        (constant, 60, ("interact",), ("u00", "i00", 1600000000000)),
        (purchases, 60, ("buy",), None),
        (json_lines, 60, ("view", "cart", "purchase"), ("0", "000", 1714557600000)),
        (parquet, 60, ("interact",), ("0", "0", 1600000000000)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_shapes_need_no_edit(
    tmp_path: Path, make: Callable[[Path], Path], events: int, actions: tuple[str, ...], first: tuple[Any, ...] | None
) -> None:
    source = make(tmp_path)
    found = inspect_source(source)
    assert found.problem is None
    assert found.counts["rows"] == events
    made = prepared(source)
    assert made.spec.actions == actions
    assert made.events.height == events
    if first is not None:
        assert made.events.select("user_id", "item_id", "timestamp_ms").row(0) == first


SHAPES = (semicolons, no_header, impressions, play_counts, constant, purchases, json_lines, parquet)


def run(*words: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_a_file_becomes_served_lists_with_no_edited_line(tmp_path: Path, shape: Callable[[Path], Path]) -> None:
    (tmp_path / "files").mkdir()
    source = shape(tmp_path / "files")
    columns, data, checkpoint, bundle = (tmp_path / name for name in ("columns.toml", "data", "checkpoint", "bundle"))
    run("prepare", "inspect", source, "--out", columns)
    run("prepare", "table", source, "--columns", columns, "--out", data)
    run("train", "--data", data, "--out", checkpoint, "--epochs", "1")
    run("export", checkpoint, bundle, "--data", data)
    run("recommend-all", bundle, data, "--out", tmp_path / "lists.parquet", "-k", "3", "--include-seen")
    users = read_dataset(data).events["user_id"].unique()
    lists = pl.read_parquet(tmp_path / "lists.parquet")
    assert lists.group_by("user").len().rows_by_key("user") == {user: [(3,)] for user in users}
    assert set(lists["source"]) == {"model"}
    user = sorted(users)[0]
    alone = json.loads(run("recommend", bundle, "--user", user, "-k", "3", "--include-seen", "--json").stdout)
    run("state", "load", data, "--state", tmp_path / "state", "--bundle", bundle)
    with served(bundle, replace(SMALL, state=str(tmp_path / "state"))) as app, TestClient(app) as client:
        answer = client.post("/v1/recommend", json={"user": user, "k": 3, "exclude_seen": False}).json()
    assert (alone["source"], answer["source"], len(alone["items"]), len(answer["items"])) == ("model", "model", 3, 3)


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a log of user, item, time and perhaps an action is written."""

    separator: str
    quote: str
    encoding: str
    ends: str
    ending: str
    header: bool
    names: tuple[str, str, str]
    time: str
    action: str
    item_first: bool
    spice: str


NAMES = (
    ("user_id", "item_id", "timestamp"),
    ("userId", "movieId", "timestamp"),
    ("Customer ID", "Product Code", "Order Date"),
    ("visitorid", "itemid", "time"),
    ("uid", "sku", "ts"),
    ("Kunde", "Artikel", "Datum"),
    ("reviewerID", "asin", "reviewTime"),
)
FORMS = ("%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%SZ", "%d/%m/%Y %H:%M", "%m/%d/%Y %I:%M:%S %p", "%d.%m.%Y", "%Y%m%d")
ACTIONS = {"none": "", "flag": "clicked", "event": "event_type", "rating": "rating", "count": "play_count"}
DIALECTS = st.builds(
    Dialect,
    separator=st.sampled_from([",", ";", "\t", "|", "::"]),
    quote=st.sampled_from(['"', "'", ""]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"]),
    ends=st.sampled_from(["\n", "\r\n", "\r"]),
    ending=st.sampled_from([".csv", ".txt", ".tsv", ".dat"]),
    header=st.booleans(),
    names=st.sampled_from(NAMES),
    time=st.sampled_from([*FORMS, "s", "ms", ""]),
    action=st.sampled_from(list(ACTIONS)),
    item_first=st.booleans(),
    spice=st.sampled_from(["", " é", " € Größe", " {separator} x", "'s"]),
)


def truth(dialect: Dialect) -> list[tuple[str, str, int | None, bool]]:
    """User, item, time in ms and whether the event is wanted, as written."""
    spice = dialect.spice.format(separator=dialect.separator)
    if dialect.encoding == "latin-1":
        spice = spice.replace("€", "-")
    if dialect.quote == "" or (dialect.quote == "'" and "'" in spice):
        spice = " é"
    step = 86_400_000 if dialect.time in FORMS[-2:] else 60_000 if dialect.time == FORMS[2] else 1000
    wanted: dict[str, Callable[[int], bool]] = {
        "flag": lambda n: n % 2 == 0,
        "event": lambda n: n % 4 == 3,
        "rating": lambda n: n % 5 >= 3,
    }
    start = 1_704_067_200_000
    return [
        (
            user(n),
            item(n) + spice,
            start + n * 93_784_000 // step * step if dialect.time else None,
            dialect.action not in wanted or wanted[dialect.action](n),
        )
        for n in ROWS
    ]


def written(dialect: Dialect, folder: Path) -> Path:
    """The file."""
    rows = []
    values: dict[str, Callable[[int], object]] = {
        "flag": lambda n: (n + 1) % 2,
        "event": lambda n: ["view", "view", "cart", "buy"][n % 4],
    }
    values |= {"rating": lambda n: n % 5 + 1, "count": lambda n: n * n + 1}
    for n, (who, what, time_ms, _) in enumerate(truth(dialect)):
        row = [what, who] if dialect.item_first and dialect.header else [who, what]
        if time_ms is not None:
            moment = datetime.fromtimestamp(time_ms / 1000, UTC)
            units = {"s": time_ms // 1000, "ms": time_ms}
            row.append(str(units[dialect.time]) if dialect.time in units else moment.strftime(dialect.time))
        rows.append([*row, *([str(values[dialect.action](n))] if dialect.action in values else [])])
    names = [dialect.names[1], dialect.names[0]] if dialect.item_first else list(dialect.names[:2])
    head = [
        *names,
        *([dialect.names[2]] if dialect.time else []),
        *([ACTIONS[dialect.action]] if dialect.action != "none" else []),
    ]
    lines = []
    for row in [*([head] if dialect.header else []), *rows]:
        quote = dialect.quote
        cells = [
            f"{quote}{cell}{quote}" if dialect.separator in cell or (quote and cell[:1] == "i") else cell
            for cell in row
        ]
        lines.append(dialect.separator.join(cells) + dialect.ends)
    path = folder / f"log{dialect.ending}"
    path.write_bytes("".join(lines).encode(dialect.encoding))
    return path


def outcome(dialect: Dialect) -> str:
    """`same` if the data set is what was written, `said` if an error or note says what is missing, else `wrong`."""
    with TemporaryDirectory() as folder:
        source = written(dialect, Path(folder))
        try:
            found = inspect_source(source)
            if found.problem is not None:
                return "said: " + found.problem
            made = prepared(source)
        except DataError as error:
            return f"said: {error}"
    good = made.spec.positive_actions[0]
    got = made.events.select("user_id", "item_id", "timestamp_ms", f"action_{good}").rows()
    known = 4 if dialect.header or dialect.action == "event" else 3  # nothing says what nameless numbers mean
    same = sorted((row[:known] for row in got), key=str) == sorted((row[:known] for row in truth(dialect)), key=str)
    return "same" if same else "said: " + found.notes[0] if found.notes else "wrong: " + found.toml


@settings(max_examples=15, deadline=None, derandomize=True)
@given(DIALECTS)
def test_dialects_are_read_as_written_or_the_map_says_what_is_missing(dialect: Dialect) -> None:
    assert outcome(dialect).partition(":")[0] in ("same", "said")


@pytest.mark.slow
def test_of_300_dialects_95_in_100_need_no_edit() -> None:
    counts: Counter[str] = Counter()

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(DIALECTS)
    def count(dialect: Dialect) -> None:
        counts[outcome(dialect).partition(":")[0]] += 1

    count()
    print(f"{counts['same']} of {counts.total()} dialects need no edit: {dict(counts)}")  # shown by pytest -rP
    assert counts["same"] >= 0.95 * counts.total(), counts


def test_days_and_months_that_both_fit_are_said(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_text("user,item,date\n" + "".join(f"{user(n)},{item(n)},0{n % 9 + 1}/02/2024\n" for n in ROWS))
    found = inspect_source(path)
    assert found.notes == ("%m/%d/%Y fits too: the days are all 12 or less",)
    assert 'timestamp_format = "%d/%m/%Y"  # %m/%d/%Y fits too' in found.toml


def test_two_edited_lines_correct_a_guess(tmp_path: Path) -> None:
    """Without names, the number in the third column could be anything."""
    edits = {
        '["interact"]': '["like"]',
        "interact = true  # every row": 'like = { column = "column_3", at_least = 4 }',
    }
    made = prepared(no_header(tmp_path), edits)
    assert made.events["action_like"].to_list().count(True) == 24


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("e.csv", b"", r"e.csv: empty"),
        ("e.csv", b"one\ntwo\n", r"no separator of .* makes columns of it; give `separator`"),
        ("e.csv.gz", b"no gzip", r"e.csv.gz: Not a gzipped file"),
        ("e.jsonl", b'{"user": 1}\n{"user": \n', r"e.jsonl: line 2 is no JSON object .*: b'\{\"user\": '; write"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        inspect_source(tmp_path / name)


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no file with an ending of .csv"):
        inspect_source(tmp_path)


def test_words_of_a_column_cannot_break_the_map(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    kinds = ("view", 'a"\n\r\x00[events]\n', "buy")
    rows = ({"user": user(n), "item": item(n), "event\n": kinds[n % 3]} for n in ROWS)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepared(path).spec.actions == kinds


def test_columns_that_teach_nothing_are_kept_as_metadata(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("user,item,action\n" + "".join(f"u{i % 3},i{i % 4},buy\n" for i in range(24)))
    rows = "".join(f"i{i},Name {i},{i % 2},{i}.5,https://x.example/{i},,{'d' * 5_000}\n" for i in range(4))
    (tmp_path / "items.csv").write_text(f"item,name,kind,price,url,empty,long\n{rows}")
    lines = inspect_source(tmp_path).toml.splitlines()
    assert 'metadata = ["price", "url"]  # kept for display and filters, not taught' in lines
    assert 'categories = { "kind" = "kind" }' in lines
