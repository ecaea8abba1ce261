"""Tables that say one thing and hold another: the data set is what they mean, or they are refused in a few words."""

from __future__ import annotations

import ast
import itertools
import tempfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest
from fuzz_tables import DAMAGE, ENDINGS, FLAGS, IDS, NAMES, RULES, SAID, STORED, Case, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unipinrec.errors import LONGEST_MESSAGE, DataError, UnipinrecError, listed
from unipinrec.models.data.schema import Dataset, TimeSplit, read_dataset, write_dataset
from unipinrec.models.data.table import UNORDERED, read_column_map, read_mapped
from unipinrec.models.data.validate import RawTables, build_dataset

ROOT = Path(__file__).parents[3]
S = 1_600_000_000  # 2020-09-13T12:26:40
HEAD = 'name = "shop"\npositive_actions = ["buy"]\n'
COLUMNS = '[events]\nuser = "user"\nitem = "item"\n'
SECONDS = 'timestamp = "when"\ntimestamp_unit = "s"\n'


def prepared(path: Path, table: pl.DataFrame | str, toml: str) -> Dataset:
    """The data set of one events file, `table`, written to `path`."""
    if isinstance(table, str):
        path.write_text(table)
    elif path.suffix == ".parquet":
        table.write_parquet(path)
    else:
        table.write_csv(path)
    return mapped(path, toml)


def mapped(source: Path, toml: str) -> Dataset:
    columns = (source if source.is_dir() else source.parent) / "map.toml"
    columns.write_text(toml)
    return build_dataset(replace(read_mapped(source, read_column_map(columns)), split=None))


def frame(**columns: Any) -> pl.DataFrame:
    """A table of user u, items i0, i1, ..., and these columns."""
    height = len(next(iter(columns.values())))
    return pl.DataFrame({"user": ["u"] * height, "item": [f"i{row}" for row in range(height)], **columns})


def times(path: Path, values: Any, unit: str, how: str = "unit") -> list[int]:
    action = '[actions]\nbuy = { column = "user", equals = ["u"] }\n'
    toml = HEAD + action + COLUMNS + f'timestamp = "when"\ntimestamp_{how} = "{unit}"\n'
    made = prepared(path, frame(when=values), toml)
    return made.events.sort("item_id")["timestamp_ms"].to_list()


@pytest.mark.parametrize("dtype", [pl.UInt32, pl.Int32, pl.Int64, pl.UInt64, pl.Float64, pl.Decimal(20, 3), pl.String])
def test_case_5a_seconds_of_any_type_do_not_wrap(tmp_path: Path, dtype: pl.DataType) -> None:
    given = pl.Series([S, S + 1, None, S + 100_000]).cast(dtype)
    assert times(tmp_path / "e.parquet", given, "s") == [S * 1000, S * 1000 + 1000, None, (S + 100_000) * 1000]


@pytest.mark.parametrize(
    ("given", "unit", "wanted"),
    [
        ([S, S + 1], "ms", "s"),
        ([S * 1000, S * 1000 + 1], "s", "ms"),
        ([S * 1000, S * 1000 + 1], "us", "ms"),
        ([S, S + 1], "us", "s"),
        ([S * 1_000_000, S * 1_000_000 + 1], "ns", "us"),
        ([874_724_710, 893_286_638], "ms", "s"),  # MovieLens 100K: 1997 and 1998
    ],
)
def test_case_5b_a_wrong_unit_is_refused_with_the_right_one(
    tmp_path: Path, given: list[int], unit: str, wanted: str
) -> None:
    with pytest.raises(DataError, match=rf"as Unix time in {unit} it is not .* looks like Unix time in {wanted} \(2"):
        times(tmp_path / "e.parquet", given, unit)
    assert min(times(tmp_path / "f.parquet", given, wanted)) > 852_076_800_000  # 1997


@pytest.mark.parametrize(
    ("given", "unit"),
    [
        ([0, S], "s"),
        ([18_518, 18_519], "s"),
        ([2**60, S], "s"),
        ([float("nan"), float(S)], "s"),
        ([float("inf"), float(S)], "s"),
        ([20_200_913, 20_200_914], "s"),
        ([202_009_131_226, 202_009_131_227], "ms"),
        ([timedelta(1), timedelta(2)], "s"),
        ([True, False], "s"),
        (pl.Series([S, S + 1], dtype=pl.Float32), "s"),
        ([datetime(1970, 1, 19, 12), datetime(1970, 1, 19, 13)], "iso"),
        (pl.Series([2**62, 2**62], dtype=pl.Datetime("ms")), "iso"),
        (pl.Series([2**30, 2**30], dtype=pl.Date), "iso"),
        ([S, S + 1], "iso"),
    ],
)
def test_case_5b_what_is_no_time_of_1990_to_2100_is_refused(tmp_path: Path, given: Any, unit: str) -> None:
    with pytest.raises(DataError, match=r"not between 1990 and 2100|too coarse|not ISO 8601|is no number"):
        times(tmp_path / "e.parquet", given, unit)


def test_case_5b_every_command_that_reads_a_prepared_folder_refuses_seconds(tmp_path: Path) -> None:
    table = frame(when=[S, S + 1, S + 2], flag=[1, 0, 1])
    made = prepared(tmp_path / "e.parquet", table, HEAD + '[actions]\nbuy = "flag"\n' + COLUMNS + SECONDS)
    for name in ("events", "slates"):
        rows = made.events.with_columns(pl.lit(0, pl.Int64).alias("slate_id"), pl.lit(None, pl.Int32).alias("position"))
        rows = rows.select(made.slates.columns if name == "slates" else made.events.columns)
        rows = rows.with_columns(pl.col("timestamp_ms") // 1000)
        write_dataset(replace(made, events=rows) if name == "events" else replace(made, slates=rows), tmp_path / name)
        with pytest.raises(DataError, match=rf"{name}.parquet: timestamp_ms is {S}: .* looks like Unix time in s"):
            read_dataset(tmp_path / name)


def test_case_5b_slates_and_the_times_of_the_split_have_the_same_rule(tmp_path: Path) -> None:
    toml = HEAD + '[actions]\nbuy = "flag"\n' + COLUMNS + SECONDS
    (tmp_path / "shown.csv").write_text(f"q,user,item,when,flag\nx,u,i0,{S * 1000},0\n")
    own = f'[slates]\nfile = "shown.csv"\nuser = "user"\nitem = "item"\nslate = "q"\n{SECONDS}'
    table = frame(when=[S, S + 1, S + 2], flag=[1, 0, 1])
    with pytest.raises(DataError, match=r"shown.csv: .* looks like Unix time in ms"):
        prepared(tmp_path / "e.parquet", table, toml + own)
    (tmp_path / "map.toml").write_text(toml)
    raw = read_mapped(tmp_path / "e.parquet", read_column_map(tmp_path / "map.toml"))
    with pytest.raises(DataError, match=rf"split: a start is {S + 1}: .* looks like Unix time in s"):
        build_dataset(replace(raw, split=TimeSplit(valid_start_ms=S + 1, test_start_ms=S + 1)))


@pytest.mark.parametrize(
    ("text", "since_s"),
    [
        ("2020-09-13", -44_800),
        ("2020-09-13T12:26", -40),
        ("2020-09-13 12:26:40", 0),
        ("2020-09-13T12:26:40Z", 0),
        ("2020-09-13T12:26:40.0006", 0.001),
        ("2020-09-13T12:26:40,25Z", 0.25),
        ("2020-09-13T14:26:40.123456789+02:00", 0.123),
        ("2020-09-13T06:56:40-0530", 0),
        ("2020-09-13T14:26:40+02", 0),
    ],
)
def test_case_5c_iso_is_iso_8601(tmp_path: Path, text: str, since_s: float) -> None:
    mixed = [text, "2020-09-13T12:26:40", "2020-09-14", None]
    wanted = [round((S + since_s) * 1000), S * 1000, (S + 41_600) * 1000, None]
    assert times(tmp_path / "e.csv", mixed, "iso") == wanted


@pytest.mark.parametrize(
    "text",
    [
        "03/02/2015",
        "03.02.2015",
        "2015/02/03",
        "2015-02-30",
        "2015-2-3",
        "2015-02-03T24:30",
        "2015-02-03T10:00.5",
        "15",
    ],
)
def test_case_5c_other_forms_are_not_guessed(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=rf"column 'when' holds \['{text}'\], not ISO 8601; correct timestamp_unit, or"):
        times(tmp_path / "e.parquet", ["2015-02-03T10:00:00", text], "iso")


@pytest.mark.parametrize(
    ("form", "text", "wanted"),
    [
        ("%d/%m/%Y", "03/02/2015", datetime(2015, 2, 3, tzinfo=UTC)),
        ("%m/%d/%Y", "03/02/2015", datetime(2015, 3, 2, tzinfo=UTC)),
        ("%m/%d/%Y %I:%M %p", "03/02/2015 10:05 PM", datetime(2015, 3, 2, 22, 5, tzinfo=UTC)),
        ("%d/%b/%Y:%H:%M:%S %z", "03/Feb/2015:10:00:00 +0100", datetime(2015, 2, 3, 9, tzinfo=UTC)),
        ("%Y%m%d", 20150203, datetime(2015, 2, 3, tzinfo=UTC)),
    ],
)
def test_case_5c_another_form_is_said_in_the_map(tmp_path: Path, form: str, text: Any, wanted: datetime) -> None:
    assert times(tmp_path / "e.csv", [text, text], form, "format") == [round(wanted.timestamp() * 1000)] * 2
    with pytest.raises(DataError, match=r"column 'when' holds \['noon'\], not %"):
        times(tmp_path / "e.csv", [str(text), "noon"], form, "format")


def test_case_5_times_between_milliseconds_are_rounded(tmp_path: Path) -> None:
    assert times(tmp_path / "a.parquet", [S + 0.0006, S + 0.9996], "s") == [S * 1000 + 1, S * 1000 + 1000]
    assert times(tmp_path / "b.parquet", [S * 10**6 + 600, S * 10**6 + 400], "us") == [S * 1000 + 1, S * 1000]
    stamps = pl.Series([S * 10**6 + 600, S * 10**6 + 400], dtype=pl.Datetime("us", "Asia/Tokyo"))
    assert times(tmp_path / "c.parquet", stamps, "iso") == [S * 1000 + 1, S * 1000]
    nanoseconds = pl.Series([S * 10**9 + 600_000, S * 10**9 + 400_000], dtype=pl.Datetime("ns"))
    assert times(tmp_path / "d.parquet", nanoseconds, "iso") == [S * 1000 + 1, S * 1000]


def bought(path: Path, values: Any, rule: str = '"did"') -> list[bool]:
    toml = HEAD + f"[actions]\nbuy = {rule}\n" + COLUMNS + SECONDS
    table = frame(did=values).with_columns(pl.Series("when", range(S, S + len(values))))
    return prepared(path, table, toml).events["action_buy"].to_list()


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize(
    "values",
    [
        [1.0, 0.0, None, 1.0],
        [1.0, 0.0, float("nan"), 1.0],
        [1, 0, None, 1],
        [True, False, None, True],
        ["1", "0", None, "1.0"],
        ["True", "False", None, "TRUE"],
        pl.Series(["true", "false", "", "true"], dtype=pl.Categorical),
        pl.Series([1, 0, 0, 1], dtype=pl.UInt8),
    ],
)
def test_case_6_flags_of_any_type_mean_the_same(tmp_path: Path, values: Any, ending: str) -> None:
    assert bought(tmp_path / f"e.{ending}", values) == [True, False, False, True]


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize(
    ("values", "equals"),
    [
        ([True, False, None], "[1]"),
        ([True, False, None], '["true"]'),
        ([1, 0, None], "[true]"),
        ([1.0, 2.0, None], '["1"]'),
        ([1.0, 2.0, None], "[1]"),
        (["1", "2", None], "[1.0]"),
        (["BUY", "view", None], '["gift", "BUY"]'),
        (["True", "False", None], "[true]"),
        ([2**53 + 1, 2**53, None], f"[{2**53 + 1}]"),
    ],
)
def test_case_6_words_are_compared_by_meaning(tmp_path: Path, values: Any, equals: str, ending: str) -> None:
    assert bought(tmp_path / f"e.{ending}", values, f'{{ column = "did", equals = {equals} }}') == [True, False, False]


@pytest.mark.parametrize("values", [[5.0, 3.0, float("nan")], ["5", "3", None], ["4.5", "-1", "nan"], [5, 3, None]])
def test_case_6_thresholds_take_numbers_of_any_type_and_nan_is_a_gap(tmp_path: Path, values: Any) -> None:
    rule = '{ column = "did", at_least = 4 }'
    assert bought(tmp_path / "e.parquet", values, rule) == [True, False, False]


@pytest.mark.parametrize(
    ("values", "rule", "listed_values"),
    [
        (["buy", "view"], '{ column = "did", equals = ["BUY"] }', r"\['buy', 'view'\]"),
        ([1, 2], '{ column = "did", equals = ["buy"] }', r"\[1, 2\]"),
        ([True, False], '{ column = "did", equals = [2] }', r"\[True, False\]"),
        ([1, 2], '{ column = "did", at_least = 3 }', r"\[1, 2\]"),
        ([1, 2], '{ column = "did", at_least = nan }', r"\[1, 2\]"),
        ([0, 0], '"did"', r"\[0\]"),
        ([f"kind {row}" for row in range(1000)], '{ column = "did", equals = [] }', r"\['kind 0', .*\] and 980 more"),
        (["x" * 10**6, "y"], '{ column = "did", equals = ["z"] }', r"\['x{79}\.\.\., 'y'\]"),
    ],
)
def test_case_6_a_positive_action_that_never_happens_is_refused_with_the_values(
    tmp_path: Path, values: Any, rule: str, listed_values: str
) -> None:
    with pytest.raises(DataError, match=rf"action 'buy' never happens; column 'did' holds {listed_values}; correct"):
        bought(tmp_path / "e.parquet", values, rule)


def test_case_6_every_reader_refuses_a_positive_action_that_never_happens() -> None:
    columns = {"user_id": ["u"], "item_id": ["a"], "surface": ["home"], "timestamp_ms": [S * 1000]}
    events = pl.DataFrame({**columns, "action_buy": [False], "action_view": [1.0]})
    items = pl.DataFrame({"item_id": ["a"], "title": ["A"]})
    raw = RawTables(
        name="x",
        source="",
        actions=("buy", "view"),
        positive_actions=("buy", "view"),
        events=events,
        items=items,
        split=None,
    )
    with pytest.raises(DataError, match=r"positive actions \['buy'\] never happen in the 1 events"):
        build_dataset(raw)
    slates = events.with_columns(slate_id=1, position=0, action_buy=True)
    assert build_dataset(replace(raw, slates=slates)).events["action_view"].to_list() == [True]


GOOD = frame(did=[1, 0], when=[S, S + 1])
FLAG = HEAD + '[actions]\nbuy = "did"\n'


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize("name", ["e[1]", "e*", "e?", "{a,b}", "~"])
def test_case_7_a_path_is_the_file_of_that_name(tmp_path: Path, name: str, ending: str) -> None:
    folder = tmp_path / "run[1]"
    folder.mkdir()
    (tmp_path / "run1").mkdir()
    for other in (folder / f"e1.{ending}", tmp_path / "run1" / f"{name}.{ending}", folder / f"a.{ending}"):
        prepared(other, GOOD.with_columns(item=pl.lit("other")), FLAG + COLUMNS + SECONDS)
    with pytest.raises(DataError, match=r"No such file"):
        mapped(folder / f"{name}.{ending}", FLAG + COLUMNS + SECONDS)
    made = prepared(folder / f"{name}.{ending}", GOOD, FLAG + COLUMNS + SECONDS)
    assert made.items["item_id"].to_list() == ["i0", "i1"]


def test_case_7_a_relative_path_is_not_the_home_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for folder, item in (("~", "here"), ("home", "there")):
        (tmp_path / folder).mkdir()
        prepared(tmp_path / folder / "e.csv", GOOD.with_columns(item=pl.lit(item)), FLAG + COLUMNS + SECONDS)
    assert mapped(Path("~/e.csv"), FLAG + COLUMNS + SECONDS).items["item_id"].to_list() == ["here"]


def test_case_7_a_prepared_folder_is_the_one_of_that_name(tmp_path: Path) -> None:
    toml = FLAG + COLUMNS + SECONDS
    for name, item in (("run[1]", "here"), ("run1", "there")):
        made = prepared(tmp_path / "e.parquet", GOOD.with_columns(item=pl.lit(item)), toml)
        write_dataset(made, tmp_path / name / "data")
    assert read_dataset(tmp_path / "run[1]" / "data").items["item_id"].to_list() == ["here"]


def test_case_7_several_files_are_a_pattern_of_the_map(tmp_path: Path) -> None:
    for row, values in enumerate(([True], [1.0], ["0"], [None])):
        part = frame(did=values, when=[S + row]).with_columns(item=pl.lit(f"i{row}"))
        part.write_parquet(tmp_path / f"part-{row}.parquet")
    GOOD.write_parquet(tmp_path / "other.parquet")
    made = mapped(tmp_path, FLAG + COLUMNS + SECONDS + 'files = "part-*.parquet"\n')
    assert made.events["action_buy"].to_list() == [True, True, False, False]
    assert made.items["item_id"].to_list() == ["i0", "i1", "i2", "i3"]
    with pytest.raises(DataError, match=r"no name in it is like 'gone-\*', the `files` of the column map"):
        mapped(tmp_path, FLAG + COLUMNS + SECONDS + 'files = "gone-*"\n')
    with pytest.raises(DataError, match=r"each section of a column map needs `file`, a name in"):
        mapped(tmp_path, FLAG + COLUMNS + SECONDS + 'files = "part-*"\nfile = "other.parquet"\n')


def test_case_7_a_folder_is_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "e.parquet"
    folder.mkdir()
    GOOD.write_parquet(folder / "part-0.parquet")
    (tmp_path / "map.toml").write_text(FLAG + COLUMNS + SECONDS + 'file = "e.parquet"\n')
    with pytest.raises(DataError, match=r"e.parquet: not readable as Parquet: .*; a column map reads several files"):
        read_mapped(tmp_path, read_column_map(tmp_path / "map.toml"))


def test_case_7_no_reader_of_polars_takes_a_pattern() -> None:
    """A call of a reader, or a `partial` of it, says glob=False."""
    found = 0
    for path in (
        file for room in ("models", "runtime", "export", "src", "bench") for file in (ROOT / room).rglob("*.py")
    ):
        tree = ast.parse(path.read_text())
        safe = {
            id(node)
            for call in ast.walk(tree)
            if isinstance(call, ast.Call)
            and any(word.arg == "glob" and getattr(word.value, "value", 1) is False for word in call.keywords)
            for node in (call.func, *call.args)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in GLOBBING
                and getattr(node.value, "id", "") in {"pl", "polars"}
            ):
                assert id(node) in safe, f"{path}:{node.lineno}: {node.attr} without glob=False reads other files"
                found += 1
    assert found >= 3


GLOBBING = {name for name in dir(pl) if name.startswith(("read_", "scan_"))}


def test_case_8_messages_are_bounded_at_the_root_and_at_the_source() -> None:
    whole = "a" * LONGEST_MESSAGE
    assert str(UnipinrecError(whole)) == whole
    long = str(DataError("begin " + "x" * 10**7 + " end"))
    assert len(long) <= LONGEST_MESSAGE
    assert long.startswith("begin x")
    assert " characters ...] x" in long
    assert long.endswith("x end")
    assert listed(range(3)) == "[0, 1, 2]"
    assert listed(["y" * 1000, *range(1_000_000)], 2) == f"['{'y' * 79}..., 0] and 999,999 more"


def test_case_8_lines_that_end_in_cr_are_lines(tmp_path: Path) -> None:
    text = "user,item,did,when\r" + "".join(f"u,i,1,{S + second}\r" for second in range(20_000))
    assert prepared(tmp_path / "e.csv", text, FLAG + COLUMNS + SECONDS).events.height == 20_000


def test_case_8_a_table_of_very_many_columns_is_not_listed_whole(tmp_path: Path) -> None:
    wide = pl.DataFrame({f"column {number}": [1] for number in range(10_000)})
    with pytest.raises(DataError, match=r"no column 'did', 'item', 'user', 'when'; it has .* and 9,980 more") as caught:
        prepared(tmp_path / "e.parquet", wide, FLAG + COLUMNS + SECONDS)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS + SECONDS, COLUMNS + 'order = "seq"\n'])
def test_case_9_rows_without_time_and_order_are_counted(tmp_path: Path, columns: str) -> None:
    given = frame(did=[1, 0, 1], when=[S, None, S + 1], seq=[1, 2, 3])
    dropped = prepared(tmp_path / "e.parquet", given, FLAG + columns).spec.dropped
    assert dropped.get(UNORDERED, 0) == {COLUMNS: 3, COLUMNS + SECONDS: 1}.get(columns, 0)


ITEM = '[items]\nfile = "i.parquet"\nitem = "item"\ndense = { size = "size", more = ["a", "b"] }\n'


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (pl.Series([[1.0, 2.0], [3.0, 4.0]], dtype=pl.Array(pl.Float64, 2)), [[1.0, 2.0], [3.0, 4.0]]),
        (["1.5", "2"], [[1.5], [2.0]]),
        ([True, False], [[1.0], [0.0]]),
    ],
)
def test_case_10_features_that_lose_nothing_are_taken(tmp_path: Path, size: Any, wanted: list[list[float]]) -> None:
    items = pl.DataFrame({"item": ["i0", "i1"], "size": size, "a": ["1", "2"], "b": [3, 4]})
    items.write_parquet(tmp_path / "i.parquet")
    made = prepared(tmp_path / "e.parquet", GOOD, FLAG + COLUMNS + SECONDS + ITEM)
    assert made.items["dense_size"].to_list() == wanted
    assert made.items["dense_more"].to_list() == [[1.0, 3.0], [2.0, 4.0]]


@pytest.mark.parametrize(("column", "message"), [("size", r"dense: column 'size' is String, \['big'\] is no number")])
def test_case_10_text_that_is_no_number_is_refused_with_the_option(tmp_path: Path, column: str, message: str) -> None:
    items = pl.DataFrame({"item": ["i0", "i1"], "size": [1, 2], "a": [1, 2], "b": [3, 4]})
    items.with_columns(pl.Series(column, ["1", "big"])).write_parquet(tmp_path / "i.parquet")
    with pytest.raises(DataError, match=message):
        prepared(tmp_path / "e.parquet", GOOD, FLAG + COLUMNS + SECONDS + ITEM)


@pytest.mark.parametrize("ids", [[[1], [2]], [b"\xff", b"a"], [timedelta(1), timedelta(2)], [1.5, 2.0]])
@pytest.mark.parametrize("column", ["user", "item"])
def test_what_is_no_id_is_refused(tmp_path: Path, column: str, ids: list[Any]) -> None:
    with pytest.raises(DataError, match=r"not what the column map says|not usable as String"):
        prepared(tmp_path / "e.parquet", GOOD.with_columns(pl.Series(column, ids)), FLAG + COLUMNS + SECONDS)


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    text = f"user,item,did,did,when\nu,i,1,0,{S}\n"
    with pytest.raises(DataError, match=r"has column 'did' more than once"):
        prepared(tmp_path / "e.csv", text, FLAG + COLUMNS + SECONDS)


BUY = HEAD + '[actions]\nbuy = { column = "kind", equals = ["buy"] }\n'
SHOWN = '[slates]\nfile = "shown.csv"\nuser = "user"\nitem = "item"\nslate = "q"\n' + SECONDS


def test_slates_in_which_no_positive_action_happens_are_refused_with_the_values(tmp_path: Path) -> None:
    (tmp_path / "shown.csv").write_text(f"q,user,item,when,kind\nx,u,i0,{S},BUY\nx,u,i1,{S},view\n")
    table = frame(kind=["buy", "view"], when=[S, S + 1])
    said = (
        r"shown.csv: no positive action of \['buy'\] happens in any slate, .* 'kind' holds \['BUY', 'view'\]; correct"
    )
    with pytest.raises(DataError, match=said):
        prepared(tmp_path / "e.csv", table, BUY + COLUMNS + SECONDS + SHOWN)


def test_slates_of_which_no_positive_action_is_left_are_refused(tmp_path: Path) -> None:
    table = frame(did=[1, 0], when=[S, S + 1], q=[None, "x"])
    with pytest.raises(DataError, match=r"shop: no positive action of \['buy'\] happens in any of the 1 slate rows"):
        prepared(tmp_path / "e.parquet", table, FLAG + COLUMNS + SECONDS + 'slate = "q"\n')


@pytest.mark.parametrize("key", ['file = "e.csv"', 'files = "e.*"'])
def test_a_folder_is_no_text_file(tmp_path: Path, key: str) -> None:
    (tmp_path / "e.csv").mkdir()
    GOOD.write_csv(tmp_path / "e.csv" / "part-0.csv")
    with pytest.raises(DataError, match=r"e.csv is a folder; a column map reads several files with `files`"):
        mapped(tmp_path, FLAG + COLUMNS + SECONDS + key + "\n")


@pytest.mark.parametrize("key", ['file = "other.csv"', 'files = "e*"'])
def test_a_file_as_source_and_other_files_in_the_map_contradict(tmp_path: Path, key: str) -> None:
    with pytest.raises(
        DataError, match=r"e.csv is a file, but \[events\] of the column map names '.*'; give the folder"
    ):
        prepared(tmp_path / "e.csv", GOOD, FLAG + COLUMNS + SECONDS + key + "\n")
    assert prepared(tmp_path / "e.csv", GOOD, FLAG + COLUMNS + SECONDS + 'file = "e.csv"\n').events.height == 2


def test_names_of_time_zones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"%Z would be ignored; take %z"):
        times(tmp_path / "e.csv", ["2020-09-13 12:26:40 CET"], "%Y-%m-%d %H:%M:%S %Z", "format")
    assert times(tmp_path / "e.csv", ["2020-09-13 12:26:40 %Z"], "%Y-%m-%d %H:%M:%S %%Z", "format") == [S * 1000]


@pytest.mark.parametrize("name", ["valid_start_ms", "test_start_ms"])
def test_a_prepared_folder_with_a_split_in_another_unit_is_refused(tmp_path: Path, name: str) -> None:
    made = prepared(tmp_path / "e.parquet", GOOD, FLAG + COLUMNS + SECONDS)
    split = {"valid_start_ms": S * 1000, "test_start_ms": S * 1000, name: S * (10**6 if name[0] == "t" else 1)}
    write_dataset(replace(made, spec=msgspec.structs.replace(made.spec, split=TimeSplit(**split))), tmp_path / "data")
    with pytest.raises(DataError, match=rf"dataset.json: {name} is {split[name]}: .* looks like Unix time in"):
        read_dataset(tmp_path / "data")


def test_an_order_between_whole_numbers_is_refused(tmp_path: Path) -> None:
    toml = FLAG + COLUMNS + 'order = "seq"\n'
    for seq in ([1.5, 1.25], pl.Series(["1.5", "1.25"]).cast(pl.Decimal(5, 2))):
        with pytest.raises(DataError, match=r"column order of type .* is not usable as Int64; give whole numbers"):
            prepared(tmp_path / "e.parquet", frame(did=[1, 0], seq=seq), toml)
    whole = pl.Series(["2", "1"]).cast(pl.Decimal(5, 2))
    made = prepared(tmp_path / "e.parquet", frame(did=[1, 0], seq=whole), toml)
    assert made.events["item_id"].to_list() == ["i1", "i0"]


def test_a_slate_of_the_events_is_no_longer_than_a_day(tmp_path: Path) -> None:
    toml = FLAG + COLUMNS + SECONDS + 'slate = "q"\n'
    day = frame(did=[1, 0, 1], when=[S, S + 86_400, S], q=["7", "7", "8"])
    assert prepared(tmp_path / "e.csv", day, toml).slates["slate_id"].n_unique() == 2
    with pytest.raises(
        DataError, match=r"slate '7' of events.slate spans 36.0 hours, .* \(1 such slates\).* make ids uni"
    ):
        prepared(tmp_path / "e.csv", day.with_columns(when=pl.Series([S, S + 129_600, S])), toml)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("dense = { x = [] }", r"`dense`: 'x' names no column"),
        ('categories = { "a=b" = "item" }', r"`categories`: 'a=b' has a \"=\""),
    ],
)
def test_features_that_nothing_can_name_are_refused(tmp_path: Path, key: str, message: str) -> None:
    items = f'[items]\nfile = "e.csv"\nitem = "item"\n{key}\n'
    with pytest.raises(DataError, match=message):
        prepared(tmp_path / "e.csv", GOOD, FLAG + COLUMNS + SECONDS + items)


@pytest.mark.parametrize("dtype", [pl.List(pl.Int64), pl.Array(pl.Int64, 2)])
@pytest.mark.parametrize(
    ("column", "toml", "option"),
    [
        ("when", FLAG + COLUMNS + SECONDS, "timestamp_unit='s'"),
        ("when", FLAG + COLUMNS + 'timestamp = "when"\ntimestamp_unit = "iso"\n', "timestamp"),
        ("when", FLAG + COLUMNS + 'order = "when"\n', "order"),
        ("user", FLAG + COLUMNS, "user"),
        ("item", FLAG + COLUMNS, "item"),
        ("did", FLAG + COLUMNS, "actions: buy"),
        ("did", HEAD + '[actions]\nbuy = { column = "did", at_least = 1 }\n' + COLUMNS, "actions: buy: at_least"),
    ],
)
def test_a_list_where_one_value_belongs_is_refused_with_column_and_option(
    tmp_path: Path, dtype: pl.DataType, column: str, toml: str, option: str
) -> None:
    table = GOOD.with_columns(pl.Series(column, [[1, 2], [3, 4]], dtype=dtype))
    end = r"give text or whole numbers$|\[\[1, 2\]\] is no number$"
    with pytest.raises(DataError, match=rf"says: {option}: column '{column}' is (List|Array)\(.*({end})"):
        prepared(tmp_path / "e.parquet", table, toml)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["0012-01-31T10:00:00", "2020-01-31"], r"\['0012-01-31T10:00:00'\]"),
        ([datetime(1970, 1, 19, 12), datetime(2020, 1, 19)], "a time of about the year 1970"),
    ],
)
def test_dates_of_other_centuries_are_refused_with_the_column_and_no_unit(
    tmp_path: Path, given: list[Any], said: str
) -> None:
    with pytest.raises(DataError, match=rf"timestamp: column 'when' holds {said}, not between 1990 and 2100; leave"):
        times(tmp_path / "e.parquet", given, "iso")


def test_a_column_without_values_is_one_of_gaps(tmp_path: Path) -> None:
    nothing = GOOD.with_columns(when=None, seq=None, size=None)
    for path in (tmp_path / "e.parquet", tmp_path / "e.csv"):
        made = prepared(path, nothing, FLAG + COLUMNS + SECONDS + 'order = "seq"\n')
        assert made.events["timestamp_ms"].to_list() == [None, None]
        assert made.spec.dropped == {UNORDERED: 2}
        items = f'[items]\nfile = "{path.name}"\nitem = "item"\ndense = {{ size = "size" }}\n'
        with pytest.raises(DataError, match=r"dense: 'size' has gaps in 2 items, the first in row 1; `missing"):
            prepared(path, nothing, FLAG + COLUMNS + items)


ROWS = st.lists(
    st.tuples(
        st.sampled_from(IDS),
        st.sampled_from(IDS) | st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=8),
        st.integers(S * 1000, S * 1000 + 86_400_000 * 500),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda row: row[1],
)
CASES = st.builds(
    Case,
    rows=ROWS,
    stored=st.sampled_from(sorted(STORED)),
    said=st.sampled_from(["right", "right", "right", *SAID]),
    flags=st.sampled_from(FLAGS),
    rule=st.sampled_from(["flag", "1", *RULES]),
    name=st.sampled_from(NAMES),
    ending=st.sampled_from(ENDINGS),
    gap=st.booleans(),
    damage=st.sampled_from(["none", "none", "none", *DAMAGE]),
    index=st.integers(0, 2**16),
)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(CASES)
def test_a_data_set_is_what_its_tables_mean_or_is_refused_in_a_few_words(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(case, Path(folder))


def test_the_usual_cases_are_not_refused(tmp_path: Path) -> None:
    """So that the test above can fail."""
    made = [*((stored, FLAGS[1]) for stored in STORED), *(("Int64 s", flags) for flags in FLAGS[:6])]
    for index, ((stored, flags), ending) in enumerate(itertools.product(made, ENDINGS)):
        case = Case(rows=[("u", "a", S * 1000, True)], stored=stored, flags=flags, ending=ending)
        assert case.usual() == (stored != "Float32 s")
        (tmp_path / str(index)).mkdir()
        check(case, tmp_path / str(index))
