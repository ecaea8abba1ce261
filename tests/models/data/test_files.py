"""Column maps say how files are written, and errors name the line and the option."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from unipinrec.errors import DataError
from unipinrec.models.data.schema import Dataset
from unipinrec.models.data.table import read_column_map, read_mapped
from unipinrec.models.data.validate import build_dataset

HEAD = 'name = "x"\npositive_actions = ["click"]\n'
CLICK = "[actions]\nclick = true\n"
SECONDS = 'timestamp = "many"\ntimestamp_unit = "s"\n'
SPLIT = 'items_separator = " "\nlabel_separator = "="\n'
COLUMNS = '[events]\nuser = "user"\nitem = "item"\n'


def built(folder: Path, data: bytes | str, toml: str, name: str = "e.csv") -> Dataset:
    (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    (folder / "map.toml").write_text(toml, encoding="utf-8")
    return build_dataset(replace(read_mapped(folder / name, read_column_map(folder / "map.toml")), split=None))


@pytest.mark.parametrize(
    ("data", "options", "name"),
    [
        ("user;item\nü;b\n", 'separator = ";"\n', "e.csv"),
        ("user::item\nü::b\n", 'separator = "::"\n', "e.dat"),
        ("user\titem\nü\tb\n", "", "e.tsv"),
        ("user,item\rü,b\r", "", "e.txt"),
        ("user,item\nü,b\n".encode("latin-1"), 'encoding = "latin-1"\n', "e.csv"),
        ("user,item\nü,b\n".encode("utf-16"), 'encoding = "utf-16"\n', "e.csv"),
        ("user,item\n'ü','b'\n", 'quote = "\'"\n', "e.csv"),
        ("ü,b,5\n", 'header = ["user", "item", "more"]\n', "e.csv"),
        (
            gzip.compress("ü|b|5\r".encode("latin-1")),
            'header = ["user", "item", "more"]\nseparator = "|"\nencoding = "cp1252"\n',
            "e.csv.gz",
        ),
        ('{"user": "ü", "item": "b"}\n\n', "", "e.jsonl"),
        ('[{"user": "ü"}, {"user": "ü", "item": "b"}]', "", "e.json"),
    ],
)
def test_files_of_any_form_are_read(tmp_path: Path, data: bytes | str, options: str, name: str) -> None:
    made = built(tmp_path, data, HEAD + CLICK + COLUMNS + options, name)
    assert made.events.select("user_id", "item_id", "action_click").rows() == [("ü", "b", True)]


def test_a_separator_in_quotes_stays(tmp_path: Path) -> None:
    made = built(tmp_path, 'user::item\nu::"a::b"\n', HEAD + CLICK + COLUMNS + 'separator = "::"\n')
    assert made.events["item_id"].to_list() == ["a::b"]


def test_inches_are_no_quotes(tmp_path: Path) -> None:
    made = built(tmp_path, 'user,item\nu,"5\nu,6"\n', HEAD + CLICK + COLUMNS + 'quote = ""\n')
    assert made.events["item_id"].to_list() == ['"5', '6"']


def test_every_value_of_a_column_is_an_action(tmp_path: Path) -> None:
    data = "user,item,kind,stars\nu,a,click,5\nu,b,add to cart,1\nu,c,,5\n"
    toml = f'{HEAD}actions_from = "kind"\n[actions]\nlike = {{ column = "stars", at_least = 4 }}\n{COLUMNS}'
    made = built(tmp_path, data, toml)
    assert made.spec.actions == ("click", "add to cart", "like")
    assert made.events.select("action_click", "action_add to cart", "action_like").rows() == [
        (True, False, True),
        (False, True, False),
        (False, False, True),
    ]


@pytest.mark.parametrize(
    ("data", "toml", "message"),
    [
        ("user;item\nu;a\n", COLUMNS, r"no column 'item', 'user'; it has \['user;item'\]; give `separator = ';'`"),
        ("7,8\n9,8\n", COLUMNS, r"if line 1 of e.csv holds no names, give them as `header`"),
        ("user,item\nu,a\nv,b,c,d\n", COLUMNS, r"line 3 has 4 values, line 1 has 2; .*\['b', 'c', 'd'\]; correct"),
        ("user,item\nu,é\n".encode("latin-1"), COLUMNS, r"line 2: .*xe9.* is not utf-8; give `encoding`"),
        ("user,item\nu,é\n".encode(), COLUMNS + 'encoding = "ascii"\n', r"line 2: .* is not ascii; give `encoding`"),
        ("user,item\nu,a\n", COLUMNS + 'header = ["user"]\n', r"`header` names 1 columns, line 1 has 2: \['user', "),
        ("", COLUMNS + 'header = ["user", "user"]\n', r"`header` names every column .* each once"),
        ("", COLUMNS + 'separator = ""\n', r"`separator` is ''; give what stands between"),
        ("", COLUMNS + 'quote = "ab"\n', r"`quote` is 'ab'; give one ASCII character"),
        ("", COLUMNS + 'encoding = "latin"\n[slates]\n', r"missing required field"),
        ("", COLUMNS + 'encoding = "utf-42"\n', r"`encoding` 'utf-42' is unknown; utf-8, latin-1"),
        ("user,item,n\nu,a,3\nu,b,x\n", COLUMNS + 'order = "n"\n', r"column 'n' .*, \['x'\] is no number \(row 2\)"),
    ],
)
def test_a_wrong_form_is_refused_with_the_line_and_the_option(
    tmp_path: Path, data: bytes | str, toml: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        built(tmp_path, data, HEAD + CLICK + toml)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (HEAD + COLUMNS, r"no action: give `\[actions\]`, such as `click = true`"),
        (HEAD + "[actions]\nclick = false\n" + COLUMNS, r"action 'click' is false; `true` means"),
        (HEAD + 'actions_from = "kind"\n' + COLUMNS, r"\['click'\] is no value of column 'kind'; it holds \['a'"),
        (
            HEAD + 'actions_from = "many"\n' + COLUMNS,
            r"has 40 values, at most 32 .* \['0', '1', '2'\] and",
        ),
        ("slate_gap_minutes = 5\n" + HEAD + CLICK + COLUMNS + SECONDS, r"shown and left alone"),
        (HEAD + CLICK + COLUMNS + 'label_separator = "-"\n', r"`label_separator` is .* needs `items_separator`"),
        (HEAD + CLICK + COLUMNS + 'items_separator = ""\n', r"column 'item' is text; `items_separator` must say"),
        (HEAD + CLICK + COLUMNS + SPLIT, r"holds \['i0'.*\] and 37 more, without '='"),
    ],
)
def test_a_map_without_sense_is_refused(tmp_path: Path, toml: str, message: str) -> None:
    data = "user,item,kind,many\n" + "".join(f"u,i{n},{'ab'[n % 2]},{n}\n" for n in range(40))
    with pytest.raises(DataError, match=message):
        built(tmp_path, data, toml)


def test_impressions_in_one_row_are_a_slate_as_in_the_documentation(tmp_path: Path) -> None:
    data = "1\tu\t11/15/2019 8:55:22 AM\told x\ta-b-1 c-0\n2\tu\t11/15/2019 1:00:00 PM\t\tc-1 d-0  \n"
    document = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    made = built(tmp_path, data, document.split("```toml\n")[2].split("```")[0], "behaviors.tsv")
    assert made.slates.select("slate_id", "item_id", "timestamp_ms", "position", "action_click").rows() == [
        (0, "a-b", 1573808122000, 0, True),
        (0, "c", 1573808122000, 1, False),
        (1, "c", 1573822800000, 0, True),
        (1, "d", 1573822800000, 1, False),
    ]


def test_lists_are_rows_and_lists_beside_them_go_along(tmp_path: Path) -> None:
    data = '{"user": 1, "item": ["a", "b"], "did": [true, false]}\n{"user": 2, "item": ["b"], "did": [true]}\n'
    toml = HEAD + '[actions]\nclick = "did"\n' + COLUMNS + 'items_separator = ""\n'
    made = built(tmp_path, data, toml, "e.jsonl")
    rows = [("1", "a", True), ("1", "b", False), ("2", "b", True)]
    assert made.events.select("user_id", "item_id", "action_click").rows() == rows
    with pytest.raises(DataError, match=r"the lists of the columns \['did', 'item'\] differ in length"):
        built(tmp_path, data.replace('["b"]', '["b", "c"]'), toml, "e.jsonl")


def catalogue(folder: Path, columns: dict[str, Any], options: str) -> pl.DataFrame:
    pl.DataFrame({"item": ["a", "b", "c"], **columns}).write_parquet(folder / "i.parquet")
    toml = f'{HEAD}{CLICK}{COLUMNS}[items]\nfile = "i.parquet"\nitem = "item"\n{options}'
    return built(folder, "user,item\nu,a\nu,b\nu,new\n", toml).items


@pytest.mark.parametrize(
    "texts",
    [
        ["0.5 1", "2 -3", "1e1 0"],
        ["[0.5, 1]", "[2,-3]", " [10, 0] "],
        ["0.5|1", "2|-3", "10|0"],
        ["0.5;1", "2; -3", "10;0"],
    ],
)
def test_numbers_in_a_text_are_a_vector(tmp_path: Path, texts: list[str]) -> None:
    items = catalogue(tmp_path, {"v": texts}, 'dense = { v = "v" }\n')
    assert items["dense_v"].to_list() == [[0.5, 1.0], [2.0, -3.0], [10.0, 0.0]]


@pytest.mark.parametrize("texts", [["1,5", "2,5", "1 2"], ["[1 x]", "[1 2]", "[3 4]"]])
def test_a_text_that_is_no_vector_is_refused(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(
        DataError, match=r"column 'v' is text, \['.*no list of numbers.*\(row 1\); decimals need a point"
    ):
        catalogue(tmp_path, {"v": texts}, 'dense = { v = "v" }\n')


def test_gaps_are_the_mean_and_a_flag(tmp_path: Path) -> None:
    columns = {"price": [1.0, None, 4.0], "v": [[1.0, 2.0], [3.0, 6.0], None], "full": [1, 2, 3]}
    dense = 'dense = { price = "price", v = "v", full = "full" }\n'
    items = catalogue(tmp_path, columns, f'{dense}missing = "mean"\nunion = true\n')
    assert items["item_id"].to_list() == ["a", "b", "c", "new"]
    assert items["dense_price"].to_list() == [[1.0], [2.5], [4.0], [2.5]]
    assert items["dense_price_missing"].to_list() == [[0.0], [1.0], [0.0], [1.0]]
    assert items["dense_v"].to_list() == [[1.0, 2.0], [3.0, 6.0], [2.0, 4.0], [2.0, 4.0]]
    assert items["dense_full"].to_list() == [[1.0], [2.0], [3.0], [2.0]]
    with pytest.raises(DataError, match=r"'price' has gaps in 1 items, the first in row 2; `missing = \"mean\"` fills"):
        catalogue(tmp_path, columns, dense)
    with pytest.raises(DataError, match=r"`union` adds items without numbers; say"):
        catalogue(tmp_path, columns, dense + "union = true\n")


@pytest.mark.parametrize("tags", [["x| y", "y", None], [["x", "y"], ["y"], []]])
def test_several_tags_are_flags_and_the_first_is_a_category(tmp_path: Path, tags: list[Any]) -> None:
    items = catalogue(tmp_path, {"tags": tags}, '[items.tags]\ngenre = { column = "tags" }\n')
    assert items["dense_genre"].to_list() == [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]
    assert items["category_genre"].to_list() == ["x", "y", None]
    items = catalogue(tmp_path, {"tags": tags}, '[items.tags]\ngenre = { column = "tags", most = 1 }\n')
    assert items["dense_genre"].to_list() == [[1.0], [1.0], [0.0]]
