"""Metadata of items: from the file to the prepared table, as numbers or as text."""

import math
from pathlib import Path

import msgspec
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unipinrec.errors import DataError
from unipinrec.models.data import schema
from unipinrec.models.data.catalogue import ItemColumns, read_items
from unipinrec.models.data.table import ColumnMap
from unipinrec.models.data.validate import RawTables, build_dataset

EVENTS = pl.DataFrame({"item_id": ["a", "b"]})
HEAD = '[items]\nfile = "items.csv"\nitem = "id"\n'


def kept(folder: Path, text: str, lines: str = "") -> dict[str, list[object]]:
    """The metadata of a CSV file, by the map's key."""
    (folder / "items.csv").write_text(text)
    mapped = msgspec.toml.decode(lines or 'file = "items.csv"\nitem = "id"\nmetadata = ["x"]', type=ItemColumns)
    items = read_items(folder, mapped, [EVENTS])
    return {name: items[name].to_list() for name in items.columns if name.startswith(schema.METADATA_PREFIX)}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["5", "7.50"], [5.0, 7.5]),
        (["5", ""], [5.0, None]),
        (["-0.5", "100000000000000"], [-0.5, 1e14]),
        (["5", "five"], ["5", "five"]),
        (["007", "8"], ["007", "8"]),  # a code
        (["1234567890123456789", "1"], ["1234567890123456789", "1"]),  # more digits than a number holds
        (['"5,99"', "6"], ["5,99", "6"]),
        (["true", "false"], ["true", "false"]),
        (["", ""], [None, None]),
    ],
)
def test_a_column_is_numbers_if_each_value_is_one(values: list[str], expected: list[object], tmp_path: Path) -> None:
    rows = "".join(f"{item},{value}\n" for item, value in zip("ab", values, strict=True))
    assert kept(tmp_path, f"id,x\n{rows}") == {"metadata_x": expected}


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        (("19.90", "n/a", "3"), "'n/a'] is no decimal number with a point (1 of 3)"),
        (("19,90", "5", "3"), "'19,90'] is no decimal number with a point (1 of 3)"),
        (("007", "012", "n/a"), None),
        (("red", "blue", "3"), None),
    ],
)
def test_numbers_that_stay_text_are_named(
    values: tuple[str, ...], warning: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "".join(f'{item},"{value}"\n' for item, value in zip("abc", values, strict=True))
    assert kept(tmp_path, f"id,x\n{rows}") == {"metadata_x": list(values)}
    assert warning in caplog.text if warning else not caplog.text


def test_metadata_has_new_names_and_may_be_taught_too(tmp_path: Path) -> None:
    lines = (
        'file = "items.csv"\nitem = "id"\nmetadata = { cost = "price", maker = "brand" }\n'
        'dense = { price = "price" }\ncategories = { brand = "brand" }'
    )
    columns = kept(tmp_path, "id,price,brand\na,3,x\nb,4,y\n", lines)
    assert columns == {"metadata_cost": [3.0, 4.0], "metadata_maker": ["x", "y"]}


def test_items_that_only_events_name_have_none(tmp_path: Path) -> None:
    lines = 'file = "items.csv"\nitem = "id"\nunion = true\nmetadata = ["x"]'
    assert kept(tmp_path, "id,x\na,3\n", lines) == {"metadata_x": [3.0, None]}


def test_a_parquet_column_of_numbers_has_no_nan(tmp_path: Path) -> None:
    pl.DataFrame({"id": ["a", "b"], "x": [1.5, math.nan], "d": [[1], [2]]}).write_parquet(tmp_path / "i.parquet")
    mapped = ItemColumns(file="i.parquet", item="id", metadata=("x",))
    assert read_items(tmp_path, mapped, [EVENTS])["metadata_x"].to_list() == [1.5, None]
    with pytest.raises(DataError, match=r"metadata: column 'd' is List\(Int64\); give text or whole numbers"):
        read_items(tmp_path, ItemColumns(file="i.parquet", item="id", metadata=("d",)), [EVENTS])


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('metadata = ["a=b"]', "'a=b' is empty or has a \"=\", so that no filter can name it; rename it"),
        (f"metadata = {[f'c{i}' for i in range(65)]}", "`metadata` has 65 columns; keep at most 64"),
    ],
)
def test_a_map_with_names_that_no_filter_could_use_is_refused(line: str, match: str) -> None:
    whole = f'name = "n"\npositive_actions = ["c"]\n[actions]\nc = true\n[events]\nuser = "u"\nitem = "i"\n{HEAD}{line}'
    with pytest.raises(msgspec.ValidationError, match=match):
        msgspec.toml.decode(whole, type=ColumnMap)


def raw(**metadata: list[object]) -> RawTables:
    """Two items with these columns."""
    events = {"user_id": ["u", "u"], "item_id": ["a", "b"], "surface": [None, None], "timestamp_ms": [None, None]}
    return RawTables(
        name="n",
        source="s",
        actions=("click",),
        positive_actions=("click",),
        events=pl.DataFrame({**events, "action_click": [True, True], "order": [0, 1]}),
        items=pl.DataFrame({"item_id": ["a", "b"], "title": ["A", None], **metadata}),
        slates=pl.DataFrame(),
    )


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([1.0, math.inf], "metadata_x of item 'b' is inf; every number must be finite"),
        (
            ["x" * 4_097, ""],
            r"metadata_x of item 'a' is x{1,200}; a text has at most 4,096 characters \(1 such items\)",
        ),
    ],
)
def test_metadata_that_no_bundle_takes_is_refused(values: list[object], match: str) -> None:
    with pytest.raises(DataError, match=match):
        build_dataset(raw(metadata_x=values))


@settings(max_examples=25, deadline=None)
@given(
    numbers=st.lists(st.one_of(st.none(), st.floats(-1e9, 1e9)), min_size=2, max_size=2),
    texts=st.lists(
        st.one_of(st.none(), st.text(st.characters(codec="utf-8"), min_size=1, max_size=9)), min_size=2, max_size=2
    ),
)
def test_a_prepared_folder_keeps_metadata(
    numbers: list[object], texts: list[object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    columns = {
        "metadata_n": pl.Series(numbers, dtype=pl.Float64),
        "metadata_t": pl.Series(texts, dtype=pl.String),
    }
    folder = tmp_path_factory.mktemp("data") / "out"
    schema.write_dataset(build_dataset(raw(**columns)), folder)  # type: ignore[arg-type]
    read = schema.read_dataset(folder)
    assert read.spec.metadata == {"n": "number", "t": "text"}
    assert {name: read.items[name].to_list() for name in columns} == {"metadata_n": numbers, "metadata_t": texts}


def test_data_without_metadata_is_declared_as_before(tmp_path: Path) -> None:
    schema.write_dataset(build_dataset(raw()), tmp_path / "out")
    assert "metadata" not in (tmp_path / "out" / "dataset.json").read_text()
