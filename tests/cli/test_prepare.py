"""`unipinrec prepare`: the exit codes, the report and its JSON, the split and slate options, and --download."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result

from unipinrec.cli import main
from unipinrec.models.data import download as data_download
from unipinrec.models.data.schema import TimeSplit, read_dataset
from unipinrec.models.data.served import SCHEMA

T = 1_600_000_000_000  # 2020-09-13T12:26:40
U_DATA = "".join(
    f"1\t{item}\t{rating}\t{T // 1000 + time}\n" for item, rating, time in [(1, 5, 1000), (2, 3, 2000), (1, 4, 900000)]
)
U_ITEM = "".join(f"{item}|Movie {item} (1995)|||url|{'|'.join(['0', '1'] + ['0'] * 17)}\n" for item in (1, 2, 3))


def prepare(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["prepare", *map(str, arguments)])


@pytest.fixture
def movies(tmp_path: Path) -> Path:
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    (folder / "u.data").write_text(U_DATA)
    (folder / "u.item").write_text(U_ITEM)
    return folder


SPLIT = ("--valid-start", str(T + 900_000_000), "--test-start", "2020-09-23T22:26:40+00:00")


def test_json_is_one_document_with_what_was_kept_and_dropped(movies: Path, tmp_path: Path) -> None:
    result = prepare("movielens", movies, "--out", tmp_path / "out", *SPLIT, "--json")
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    assert report.pop("seconds") >= 0
    assert report.pop("source").startswith("MovieLens, Harper and Konstan")
    assert report == {
        "name": "ml-100k",
        "out": str(tmp_path / "out"),
        "rows": {
            "events": {"given": 3, "kept": 3},
            "slates": {"given": 3, "kept": 3},
            "items": {"given": 3, "kept": 3},
        },
        "users": 1,
        "slates": 2,
        "surfaces": ["unknown"],
        "first_event": "2020-09-13T12:43:20+00:00",
        "last_event": "2020-09-23T22:26:40+00:00",
        "action_rates": {"events": {"rate": 1.0, "like": 0.666667}, "slates": {"rate": 1.0, "like": 0.666667}},
        "split": {
            "training": {"slates": 1, "slate_rows": 2, "events": 2},
            "validation": {"slates": 0, "slate_rows": 0, "events": 0},
            "test": {"slates": 1, "slate_rows": 1, "events": 1},
        },
        "valid_start": "2020-09-23T22:26:40+00:00",
        "test_start": "2020-09-23T22:26:40+00:00",
        "dropped": {},
        "examples": {},
        "warnings": [],
    }


def test_the_report_for_people_names_every_count(movies: Path, tmp_path: Path) -> None:
    result = prepare("movielens", movies, "--out", tmp_path / "out", *SPLIT)
    assert result.exit_code == 0, result.output
    for text in (
        "3 read, 3 kept in 2 slates",
        "rate 100.00%, like 66.67%",
        "split: test",
        "1 slates (1 rows), 1 events",
        "MovieLens",
    ):
        assert text in result.stdout


def test_split_and_gap_reach_the_data(movies: Path, tmp_path: Path) -> None:
    times = ("--valid-start", str(T + 2_000_000), "--test-start", str(T + 900_000_000))
    prepare("movielens", movies, "--out", tmp_path / "out", *times, "--slate-gap-minutes", "10")
    dataset = read_dataset(tmp_path / "out")
    assert dataset.spec.split == TimeSplit(valid_start_ms=T + 2_000_000, test_start_ms=T + 900_000_000)
    assert dataset.slates["slate_id"].to_list() == [0, 1, 2]


def test_times_with_an_offset_are_understood(movies: Path, tmp_path: Path) -> None:
    times = ("--valid-start", "2020-09-24T06:26:40+08:00", "--test-start", "2020-09-23T22:26:40")
    assert prepare("movielens", movies, "--out", tmp_path / "out", *times).exit_code == 0
    split = TimeSplit(valid_start_ms=T + 900_000_000, test_start_ms=T + 900_000_000)
    assert read_dataset(tmp_path / "out").spec.split == split


def test_served_joins_a_log_with_a_prepared_folder(movies: Path, tmp_path: Path) -> None:
    log, at = tmp_path / "log", T + 900_002_500
    log.mkdir()
    for name, user, times in (("1", "1", (T + 999_000, at)), ("2", None, (at,)), ("3", "7", (at,))):
        for time_ms in times:
            columns = ["score", "value", "source", "surface", "bundle"]
            row = (f"r-{name}-{time_ms}", user, "2", 0, 1.0, None, "model", "unknown", "hash", time_ms)
            names = ["request_id", "user", "item", "position", *columns, "timestamp_ms"]
            frame = pl.DataFrame([row], schema=dict(zip(names, SCHEMA.dtypes(), strict=True)), orient="row")
            frame.write_parquet(log / f"served-{name}-{time_ms}.parquet")
    (movies / "u.data").write_text(U_DATA + f"1\t3\t5\t{T // 1000 + 950_000}\n")
    prepare("movielens", movies, "--out", tmp_path / "data", *SPLIT)
    words = ("served", log, tmp_path / "data", "--out", tmp_path / "out", "--within-hours", "0.001", *SPLIT)
    report = json.loads(prepare(*words, "--json").stdout)
    assert report["dropped"] == {"served: no user": 1, "served: unknown user": 1}
    assert report["slates"] == 5  # three sessions, two answers
    made = read_dataset(tmp_path / "out").slates.filter(pl.col("item_id") == "2", pl.col("position") == 0)
    assert made.select("timestamp_ms", "action_rate").rows() == [(T + 999_000, False), (at // 1000 * 1000, False)]
    assert prepare(*words).exit_code == 1  # the folder exists
    seen = prepare("served", log, tmp_path / "data", "--out", tmp_path / "day", *SPLIT)
    assert "served: unknown user, dropped" in seen.stdout
    made = read_dataset(tmp_path / "day").slates.filter(pl.col("item_id") == "2", pl.col("position") == 0)
    assert made.select("timestamp_ms", "action_rate").rows() == [(T + 999_000, True), (at // 1000 * 1000, False)]


def test_served_says_what_is_wrong(movies: Path, tmp_path: Path) -> None:
    prepare("movielens", movies, "--out", tmp_path / "data", *SPLIT)
    result = prepare("served", tmp_path / "none", tmp_path / "data", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "none has no Parquet files" in result.stderr.replace("\n", "")
    result = prepare("served", tmp_path, tmp_path / "data", "--out", tmp_path / "out", "--within-hours", "0")
    assert result.exit_code == 2
    assert "--within-hours" in result.stderr


def test_sasrec_reports_leave_one_out_and_records_the_licence(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("1 2 3 4\n2 3\n3 2 4\n")
    result = prepare("sasrec", tmp_path / "x.txt", "--out", tmp_path / "out", "--licence", "mine", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {name: part["events"] for name, part in report["split"].items()} == {
        "training": 3,
        "validation": 1,
        "test": 2,
    }
    assert (report["source"], report["valid_start"], report["first_event"]) == ("mine", None, None)
    people = prepare("sasrec", tmp_path / "x.txt", "--out", tmp_path / "out2")
    assert "2 events (leave-one-out)" in people.stdout


def test_table_reads_a_column_map(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("who,what,did\nu,a,1\nu,gone,1\nu,b,0\n,a,1\n")
    (tmp_path / "i.csv").write_text("what\na\nb\n")
    (tmp_path / "map.toml").write_text(
        'name = "shop"\npositive_actions = ["buy"]\nactions = { buy = "did" }\n'
        '[events]\nuser = "who"\nitem = "what"\n[items]\nfile = "i.csv"\nitem = "what"\n'
    )
    result = prepare("table", tmp_path / "e.csv", "--columns", tmp_path / "map.toml", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "events: unknown item, dropped" in result.stdout
    assert "1, such as ['gone']" in result.stdout
    warning = "warning: 4 events have neither a time nor an `order`: they are used in the order of the file"
    assert warning in result.stderr
    assert read_dataset(tmp_path / "out").spec.dropped == {
        "events: neither time nor order, in the file's order (kept)": 4,
        "events: no user": 1,
        "events: unknown item": 1,
    }


def test_json_has_the_warnings_and_three_examples_of_unknown_items(tmp_path: Path) -> None:
    rows = "".join(f"u,{item},1,{item}\n" for item in ("a", "x1", "x2", "x2", "x3", "x4"))
    (tmp_path / "e.csv").write_text("who,what,did,kind\n" + rows)
    (tmp_path / "i.csv").write_text("what\na\n")
    (tmp_path / "map.toml").write_text(
        'name = "shop"\npositive_actions = ["buy"]\n[actions]\nbuy = "did"\n'
        'gift = { column = "kind", equals = ["A"] }\n'
        '[events]\nuser = "who"\nitem = "what"\n[items]\nfile = "i.csv"\nitem = "what"\n'
    )
    words = ("table", tmp_path / "e.csv", "--columns", tmp_path / "map.toml", "--json", "--out")
    report = json.loads(prepare(*words, tmp_path / "out").stdout)
    assert report["examples"] == {"events: unknown item": ["x1", "x2", "x3"]}
    unordered, never = report["warnings"]
    assert unordered.startswith("6 events have neither a time nor an `order`: ")
    assert never == "the actions ['gift'] never happen: correct their definition, or remove them"
    (tmp_path / "i.csv").write_text("what\nA\n")
    result = prepare(*words, tmp_path / "none")
    assert result.exit_code == 1
    assert "items of events are ['a', 'x1', 'x2'], those of the catalogue ['A']" in result.stderr


def test_ties_and_actions_that_slates_lack_are_warned_of_and_examples_are_cut(tmp_path: Path) -> None:
    head = "who,what,did,saved,when,seq,q\n"
    days = [14, 14, 14, 15, 16, 17, 18, 19]
    rows = "".join(f"u,i{row},1,1,2020-09-{day},{row},{row}\n" for row, day in enumerate(days))
    (tmp_path / "e.csv").write_text(head + rows + f"u,{'y' * 200},1,1,2020-09-20,9,9\n")
    (tmp_path / "s.csv").write_text(head + rows.replace(",1,1,", ",1,0,"))
    (tmp_path / "i.csv").write_text("what\n" + "".join(f"i{row}\n" for row in range(8)))
    words = ("table", tmp_path / "e.csv", "--columns", tmp_path / "map.toml", "--json", "--out")
    columns = 'user = "who"\nitem = "what"\ntimestamp = "when"\ntimestamp_unit = "iso"\n'
    for order in ("", 'order = "seq"\n'):
        (tmp_path / "map.toml").write_text(
            'name = "shop"\npositive_actions = ["buy"]\nactions = { buy = "did", save = "saved" }\n'
            f'[events]\n{columns}{order}[slates]\nslate = "q"\nfile = "s.csv"\n{columns}'
            '[items]\nfile = "i.csv"\nitem = "what"\n'
        )
        result = prepare(*words, tmp_path / f"out{len(order)}")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["examples"] == {"events: unknown item": ["y" * 80]}
        *ties, never = report["warnings"]
        assert never.startswith("the actions ['save'] happen in events but never in slates: ")
        assert [said[:70] for said in ties] == (
            [] if order else ["2 of 8 events have the same time as their user's event before them: th"]
        )
        assert ("2 of 8 events have the same time" in result.stderr) == (not order)


def test_a_report_of_very_many_surfaces_is_short(tmp_path: Path) -> None:
    rows = "".join(f"u,a,1,[red]{number:05}{'x' * 500}\n" for number in range(1000))
    (tmp_path / "e.csv").write_text("who,what,did,url\n" + rows)
    (tmp_path / "map.toml").write_text(
        'name = "shop"\npositive_actions = ["buy"]\nactions = { buy = "did" }\n'
        '[events]\nuser = "who"\nitem = "what"\nsurface = "url"\n'
    )
    result = prepare("table", tmp_path / "e.csv", "--columns", tmp_path / "map.toml", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "951 more" in result.stdout.replace("\n", "")
    assert "[red]00048" in result.stdout
    assert len(result.stdout) < 20_000


def test_kuairand_needs_its_files(tmp_path: Path) -> None:
    result = prepare("kuairand", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "no KuaiRand data; it must hold" in result.stderr
    assert result.stdout == ""


def test_an_existing_folder_is_never_overwritten(movies: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = prepare("movielens", movies, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "exists; choose another --out or remove it first" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SPLIT[:2], "--valid-start and --test-start go together"),
        (("--test-start", "0001-01-01"), "'--test-start': '0001-01-01' is not between 1990 and 2100; give ISO 8601"),
        (("--valid-start", "1600000000"), "'--valid-start': '1600000000' is not between 1990 and 2100"),
        (("--valid-start", "9" * 5000), "'--valid-start': '999"),
        (("--valid-start", "noon", "--test-start", "5"), "'noon' is not ISO 8601, such as"),
        (("--slate-gap-minutes", "0"), "0.0 is not in the range x>0"),
        (("--slate-gap-minutes", "inf"), "'--slate-gap-minutes': inf is not a finite number"),
        (("--slate-gap-minutes", "nan"), "'--slate-gap-minutes': nan is not a finite number"),
        (("--slate-gap-minutes", "1e10"), "--slate-gap-minutes 10000000000.0 must be at most 1,000,000,000"),
        (("--edition", "ml-20m"), "'ml-20m' is not one of"),
    ],
)
def test_wrong_use_has_exit_code_2(movies: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = prepare("movielens", movies, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("source", ["kuairand", "movielens"])
def test_no_source_and_no_download_is_wrong_use(tmp_path: Path, source: str) -> None:
    result = prepare(source, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "give SOURCE, the folder of the data, or --download" in result.stderr


@pytest.mark.parametrize("source", ["", "kuairand", "movielens", "sasrec", "table", "simulate"])
def test_every_help_has_an_example(source: str) -> None:
    result = prepare(*source.split(), "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"unipinrec prepare {source}" in result.stdout


def bundle() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ml-100k/u.data", U_DATA)
        archive.writestr("ml-100k/u.item", U_ITEM)
    return buffer.getvalue()


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Iterator[bytes]:
    """A server that stands in for the owner's address of ML-100K."""
    body = bundle()

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    local = replace(
        data_download.ML_100K,
        url=f"http://127.0.0.1:{server.server_port}/ml-100k.zip",
        digests={"md5": hashlib.md5(body).hexdigest()},
    )
    monkeypatch.setattr(data_download, "ML_100K", local)
    yield body
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("homeless")
def test_a_download_without_a_home_needs_a_folder(tmp_path: Path) -> None:
    result = prepare("movielens", "--download", "--out", tmp_path / "out", *SPLIT)
    assert result.exit_code == 2
    assert "give SOURCE, or set XDG_CACHE_HOME" in result.stderr


@pytest.mark.usefixtures("owner")
def test_download_shows_the_licence_and_uses_the_cache_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = prepare("movielens", "--download", "--out", tmp_path / "out", *SPLIT, "--json")
    assert result.exit_code == 0, result.output
    assert "no redistribution and no commercial use" in result.stderr
    assert json.loads(result.stdout)["rows"]["events"] == {"given": 3, "kept": 3}
    folder = tmp_path / "cache" / "unipinrec" / "downloads" / "ml-100k"
    assert (folder / "ml-100k" / "u.data").read_text() == U_DATA
    again = prepare("movielens", "--download", "--out", tmp_path / "out2", *SPLIT)
    assert again.exit_code == 0
    assert "which is already there" in again.stderr


@pytest.mark.usefixtures("owner")
def test_download_goes_into_source_where_that_is_given(tmp_path: Path) -> None:
    result = prepare("movielens", tmp_path / "raw", "--download", "--out", tmp_path / "out", *SPLIT)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "raw" / "ml-100k" / "u.item").exists()


def test_a_download_with_another_checksum_is_refused(
    owner: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert owner
    monkeypatch.setattr(data_download, "ML_100K", replace(data_download.ML_100K, digests={"md5": "0" * 32}))
    result = prepare("movielens", tmp_path / "raw", "--download", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "published is 00000000000000000000000000000000" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_inspect_writes_a_map_that_table_takes(tmp_path: Path) -> None:
    source, columns = tmp_path / "e.csv", tmp_path / "columns.toml"
    rows = "".join(f"u{n % 3};i{n % 5};0{n % 9 + 1}/02/2024;{n % 2}\n" for n in range(40))
    source.write_text("user;item;date;clicked\n" + rows)
    result = prepare("inspect", source, "--out", columns)
    assert result.exit_code == 0, result.output
    assert "40 rows, utf-8, separator ';', quote '\"', lines end in LF, header" in result.stdout
    assert "users: 3\nitems: 5\n" in result.stdout
    assert "fits too: the days are all 12 or less" in result.stderr
    assert prepare("table", source, "--columns", columns, "--out", tmp_path / "data").exit_code == 0
    assert read_dataset(tmp_path / "data").spec.actions == ("clicked",)
    again = prepare("inspect", source, "--out", columns)
    assert again.exit_code == 2
    assert "exists" in again.stderr
    assert json.loads(prepare("inspect", source, "--json").stdout)["toml"] == columns.read_text()


def test_inspect_says_why_table_would_refuse_the_map(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user,item,clicked,time\nu,a,1,1600000000\nu,b,0,1600000000\n")
    result = prepare("inspect", tmp_path / "e.csv")
    assert result.exit_code == 0
    assert "`prepare table` refuses this map as it is: split: no row falls into validation" in result.stderr
    assert 'clicked"' in result.stdout
