"""Own tables through a column map: every way to say when, what happened and what was shown."""

from __future__ import annotations

import gzip
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from unipinrec.errors import DataError
from unipinrec.models.data.files import read_table
from unipinrec.models.data.schema import Dataset, TimeSplit
from unipinrec.models.data.table import read_column_map, read_mapped
from unipinrec.models.data.validate import SplitFractions, build_dataset

EVENTS = """who,what,page,when,clicked,rating,kind,request,rank
007,a,home,1600000000,1,5,buy,r1,0
007,b,home,1600000001,0,3,view,r1,1
007,a,search,1600005000,,,view,r2,0
8,b,,1600005001,1,4,refund,,
"""
HEAD = 'name = "shop"\npositive_actions = ["click"]\n'
CLICK = '[actions]\nclick = "clicked"\n'
COLUMNS = '[events]\nuser = "who"\nitem = "what"\n'
SECONDS = 'timestamp = "when"\ntimestamp_unit = "s"\n'


def prepared(folder: Path, toml: str, events: str = EVENTS) -> Dataset:
    (folder / "events.csv").write_text(events)
    (folder / "map.toml").write_text(toml)
    return built(folder / "events.csv")


def built(source: Path) -> Dataset:
    """The data set of `source` and the map beside or in it; few rows leave nothing for validation."""
    folder = source if source.is_dir() else source.parent
    raw = read_mapped(source, read_column_map(folder / "map.toml"))
    return build_dataset(replace(raw, split=SplitFractions(valid=0.0)))


def test_the_smallest_map_keeps_ids_as_text_and_makes_the_catalogue_from_the_events(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, HEAD + CLICK + COLUMNS)
    assert dataset.events.select("user_id", "item_id", "surface", "timestamp_ms", "action_click").rows() == [
        ("007", "a", "unknown", None, True),
        ("007", "b", "unknown", None, False),
        ("007", "a", "unknown", None, False),
        ("8", "b", "unknown", None, True),
    ]
    assert dataset.items.select("item_id", "title").rows() == [("a", None), ("b", None)]
    assert (dataset.spec.name, dataset.spec.source, dataset.spec.split) == ("shop", "own data", None)


def test_actions_come_from_flags_names_and_thresholds(tmp_path: Path) -> None:
    toml = (
        'name = "shop"\npositive_actions = ["buy"]\n[actions]\nclick = "clicked"\n'
        'buy = { column = "kind", equals = ["buy", "refund"] }\n'
        'like = { column = "rating", at_least = 4 }\nmeh = { column = "rating", equals = [3] }\n'
    )
    dataset = prepared(tmp_path, toml + COLUMNS)
    assert dataset.spec.actions == ("click", "buy", "like", "meh")
    assert dataset.events.select(f"action_{name}" for name in dataset.spec.actions).rows() == [
        (True, True, True, False),
        (False, False, False, True),
        (False, False, False, False),
        (True, True, True, False),
    ]


def test_true_and_false_are_flags_and_words(tmp_path: Path) -> None:
    toml = (
        'name = "x"\npositive_actions = ["yes"]\n[actions]\nyes = "flag"\nno = { column = "flag", equals = [false] }\n'
    )
    text = "who,what,flag\nu,a,true\nu,b,false\nu,c,\n"
    dataset = prepared(tmp_path, toml + COLUMNS, text)
    assert dataset.events.select("action_yes", "action_no").rows() == [(True, False), (False, True), (False, False)]


@pytest.mark.parametrize(
    ("unit", "first", "second"),
    [
        ("s", "1600000000", "1600000000.5"),
        ("ms", "1600000000000", "1600000000500"),
        ("us", "1600000000000000", "1600000000500000"),
        ("iso", "2020-09-13T12:26:40", "2020-09-13T12:26:40.5"),
        ("iso", "2020-09-13T14:26:40+02:00", "2020-09-13T14:26:40.500+02:00"),
        ("iso", "2020-09-13 12:26:40Z", "2020-09-13 12:26:40.5Z"),
    ],
)
def test_every_unit_of_time(tmp_path: Path, unit: str, first: str, second: str) -> None:
    text = f"who,what,when,clicked\nu,a,{first},1\nu,b,{second},0\nu,c,,1\n"
    toml = HEAD + CLICK + COLUMNS + f'timestamp = "when"\ntimestamp_unit = "{unit}"\n'
    dataset = prepared(tmp_path, toml, text)
    assert dataset.events.select("item_id", "timestamp_ms").rows() == [
        ("c", None),
        ("a", 1600000000000),
        ("b", 1600000000500),
    ]


def test_parquet_keeps_its_own_times_lists_and_flags(tmp_path: Path) -> None:
    moment = datetime(2020, 9, 13, 12, 26, 40, tzinfo=UTC)
    times = [moment + timedelta(days=day) for day in range(3)]
    events = pl.DataFrame({"who": [1] * 3, "what": [10] * 3, "when": times, "clicked": [True] * 3})
    events.write_parquet(tmp_path / "e.parquet")
    pl.DataFrame({"id": [10, 11], "vector": [[1.0, 2.0], [3.0, 4.0]], "brand": [5, None]}).write_parquet(
        tmp_path / "i.parquet"
    )
    toml = (
        f'{HEAD}{CLICK}{COLUMNS}timestamp = "when"\ntimestamp_unit = "iso"\nfile = "e.parquet"\n'
        '[items]\nfile = "i.parquet"\nitem = "id"\ndense = { vector = "vector" }\ncategories = { brand = "brand" }\n'
    )
    (tmp_path / "map.toml").write_text(toml)
    dataset = built(tmp_path)
    assert dataset.events.select("user_id", "item_id", "timestamp_ms").rows() == [
        ("1", "10", 1600000000000),
        ("1", "10", 1600086400000),
        ("1", "10", 1600172800000),
    ]
    assert dataset.items.select("item_id", "dense_vector", "category_brand").rows() == [
        ("10", [1.0, 2.0], "5"),
        ("11", [3.0, 4.0], None),
    ]


def test_dates_are_midnights(tmp_path: Path) -> None:
    pl.DataFrame({"who": [1], "what": [10], "when": [date(2020, 9, 13)], "clicked": [1]}).write_parquet(
        tmp_path / "e.parquet"
    )
    (tmp_path / "map.toml").write_text(HEAD + CLICK + COLUMNS + SECONDS)
    raw = read_mapped(tmp_path / "e.parquet", read_column_map(tmp_path / "map.toml"))
    assert raw.events["timestamp_ms"].to_list() == [1599955200000]


def test_items_have_titles_numbers_vectors_and_words(tmp_path: Path) -> None:
    (tmp_path / "items.tsv.gz").write_bytes(
        gzip.compress(
            b"sku\tname\tprice\te0\te1\tbrand\na\tApple\t1.5\t1\t2\t07\nb\tPear\t2\t3\t4\t\nnew\t\t3\t5\t6\t8\n"
        )
    )
    toml = (
        f'{HEAD}{CLICK}{COLUMNS}[items]\nfile = "items.tsv.gz"\nitem = "sku"\ntitle = "name"\n'
        'dense = { price = "price", embedding = ["e0", "e1"] }\ncategories = { brand = "brand" }\n'
    )
    dataset = prepared(tmp_path, toml)
    assert dataset.spec.dense == {"price": 1, "embedding": 2}
    assert dataset.items.rows() == [
        ("a", "Apple", [1.5], [1.0, 2.0], "07"),
        ("b", "Pear", [2.0], [3.0, 4.0], None),
        ("new", None, [3.0], [5.0, 6.0], "8"),
    ]


def test_events_can_be_exposures_of_named_slates(tmp_path: Path) -> None:
    toml = HEAD + CLICK + COLUMNS + SECONDS + 'slate = "request"\nposition = "rank"\nsurface = "page"\n'
    dataset = prepared(tmp_path, toml)
    assert dataset.slates.select("slate_id", "item_id", "surface", "timestamp_ms", "position").rows() == [
        (0, "a", "home", 1600000000000, 0),
        (0, "b", "home", 1600000000000, 1),
        (1, "a", "search", 1600005000000, 0),
    ]
    assert dataset.events.height == 4


def test_events_can_be_exposures_cut_at_pauses(tmp_path: Path) -> None:
    toml = "slate_gap_minutes = 30\n" + HEAD + CLICK + COLUMNS + SECONDS
    dataset = prepared(tmp_path, toml)
    assert dataset.slates.select("slate_id", "user_id", "item_id", "position").rows() == [
        (0, "007", "a", 0),
        (0, "007", "b", 1),
        (1, "007", "a", 0),
        (2, "8", "b", 0),
    ]


def test_slates_can_be_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "shown.csv").write_text(
        "q,who,what,when,clicked\nx,8,a,1600000500,0\nx,8,c,1600000500,1\ny,8,a,1600000600,1\nz,9,b,1600000700,1\n"
    )
    own = f'[slates]\nfile = "shown.csv"\nuser = "who"\nitem = "what"\nslate = "q"\n{SECONDS}'
    dataset = prepared(tmp_path, HEAD + CLICK + COLUMNS + SECONDS + own)
    assert dataset.slates.select("slate_id", "user_id", "item_id", "position", "action_click").rows() == [
        (0, "8", "a", None, False),
        (0, "8", "c", None, True),
        (1, "8", "a", None, True),
        (2, "9", "b", None, True),
    ]
    assert dataset.items["item_id"].to_list() == ["a", "b", "c"]
    assert dataset.spec.split == TimeSplit(valid_start_ms=1600000700000, test_start_ms=1600000700000)


def test_order_sorts_events_without_time(tmp_path: Path) -> None:
    text = "who,what,clicked,seq\nu,a,1,2\nu,b,0,1\n"
    dataset = prepared(tmp_path, HEAD + CLICK + COLUMNS + 'order = "seq"\n', text)
    assert dataset.events["item_id"].to_list() == ["b", "a"]


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("name = ", r"map.toml: .*; docs/data.md shows a column map"),
        (HEAD + CLICK, r"missing required field `events`"),
        ("nam = 1\n" + HEAD + CLICK + COLUMNS, r"unknown field `nam`"),
        (HEAD + CLICK + COLUMNS + 'users = "x"\n', r"unknown field `users` - at `\$.events`"),
        (HEAD + '[actions]\nclick = { column = "clicked", over = 1 }\n' + COLUMNS, r"unknown field `over`"),
        (HEAD + '[actions]\nclick = { column = "c", at_least = 1, equals = [1] }\n' + COLUMNS, r"both `equals` and"),
        (HEAD + CLICK + COLUMNS + 'timestamp = "when"\n', r"`timestamp` needs either `timestamp_unit` \(s, ms"),
        (HEAD + CLICK + COLUMNS + SECONDS + 'timestamp_format = "%Y"\n', r"`timestamp` needs either"),
        (HEAD + CLICK + COLUMNS + 'timestamp_unit = "s"\n', r"`timestamp` needs either"),
        (HEAD + CLICK + COLUMNS + 'timestamp = "when"\ntimestamp_unit = "h"\n', r"Invalid enum value 'h'"),
        ("slate_gap_minutes = 30\n" + HEAD + CLICK + COLUMNS, r"need events.timestamp"),
        *(
            (
                f"slate_gap_minutes = {gap}\n" + HEAD + CLICK + COLUMNS + SECONDS,
                r"gap_minutes=\S+ must be positive and at",
            )
            for gap in ("0", "-5", "inf", "nan", "1e300")
        ),
        ("slate_gap_minutes = 30\n" + HEAD + CLICK + COLUMNS + SECONDS + 'slate = "request"\n', r"not from several"),
        (HEAD + CLICK + COLUMNS + '[slates]\nuser = "who"\nitem = "what"\n', r"\[slates\] needs `slate` and"),
        (
            HEAD + CLICK + COLUMNS + '[items]\nitem = "what"\n',
            r"each section .* needs `file`, a name in .*, or `files`",
        ),
    ],
)
def test_a_wrong_map_is_refused(tmp_path: Path, toml: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, toml)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (HEAD + CLICK + '[events]\nuser = "usr"\nitem = "itm"\n', r"no column 'itm', 'usr'; it has \['who', 'what'"),
        (HEAD + '[actions]\nclick = "liked"\n' + COLUMNS, r"no column 'liked'; it has"),
        (
            HEAD + '[actions]\nclick = "rating"\n' + COLUMNS,
            r"'rating' is neither true/false nor 0/1, it holds \[5, 3, None, 4\]",
        ),
        (
            HEAD + '[actions]\nclick = "kind"\n' + COLUMNS,
            r"click: column 'kind' is neither true/false nor 0/1, it holds \['buy', 'view', 'refund'\]; define",
        ),
        (
            HEAD + '[actions]\nclick = { column = "kind", at_least = 1 }\n' + COLUMNS,
            r"click: at_least: column 'kind' is String, \['buy'\] is no number",
        ),
        (
            HEAD + CLICK + COLUMNS + 'timestamp = "when"\ntimestamp_unit = "iso"\n',
            r"'when' holds \['1600000000'\] and 3 more, not ISO 8601; ",
        ),
        (
            HEAD + CLICK + COLUMNS + 'timestamp = "kind"\ntimestamp_unit = "s"\n',
            r"unit='s': column 'kind' is String, \['buy'\] is no number",
        ),
        (
            HEAD + CLICK + COLUMNS + 'timestamp = "kind"\ntimestamp_unit = "iso"\n',
            r"events.csv: not what the column map says: .* column 'kind' holds \['buy'\] and 3 more, not ISO 8601",
        ),
        (HEAD + CLICK + COLUMNS + 'timestamp = "when"\ntimestamp_unit = "us"\nsurface = "nope"\n', r"no column 'nope'"),
    ],
)
def test_a_map_that_does_not_fit_the_file_is_refused(tmp_path: Path, toml: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, toml)


def test_a_folder_needs_the_name_of_the_events_file(tmp_path: Path) -> None:
    (tmp_path / "map.toml").write_text(HEAD + CLICK + COLUMNS)
    with pytest.raises(DataError, match=r"each section of a column map needs `file`"):
        read_mapped(tmp_path, read_column_map(tmp_path / "map.toml"))


def test_a_missing_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.toml.*docs/data.md shows a column map"):
        read_column_map(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "x.xlsx",
            b"",
            r"x.xlsx: reads .csv, .tsv, .*, .json \(all also as .gz\) and .parquet; convert it",
        ),
        ("x.csv", b"", r"x.csv: empty"),
        ("x.parquet", b"PAR?", r"x.parquet: "),
        ("y.csv", None, r"x.csv: .*No such file"),
    ],
)
def test_an_unreadable_file_is_refused(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / (name if data is not None else "x.csv"), ["a"])


def test_the_example_of_the_documentation_works(tmp_path: Path) -> None:
    document = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    (tmp_path / "map.toml").write_text(document.split("```toml\n")[1].split("```")[0])
    pl.DataFrame(
        {
            "customer": ["u", "u", "u"],
            "sku": ["a", "b", "a"],
            "seen_at": ["2026-05-01T00:00", "2026-05-02T00:00", "2026-05-03T00:00"],
            "page": ["home", "home", "search"],
            "clicked": [True, None, False],
            "kind": ["buy", "gift", "view"],
            "stars": [4, None, 3],
        }
    ).write_parquet(tmp_path / "events.parquet")
    (tmp_path / "items.csv").write_text("sku,name,price,e0,e1,brand,url\na,Apple,1,2,3,x,a.html\nb,Pear,1,2,3,,\n")
    dataset = built(tmp_path)
    assert dataset.spec.source == "own logs of May, internal"
    assert dataset.events.select("timestamp_ms", "surface", "action_click", "action_buy", "action_like").rows() == [
        (1777593600000, "home", True, True, True),
        (1777680000000, "home", False, True, False),
        (1777766400000, "search", False, False, False),
    ]
    assert dataset.slates["slate_id"].to_list() == [0, 1, 2]
