"""From an items file with price, address and picture to the list that a server answers and a terminal shows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from live_server import SMALL, served
from starlette.testclient import TestClient

from unipinrec.cli import main

ITEMS = 30


def run(*words: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a shop's files, by the commands that a user runs."""
    folder, rng = tmp_path_factory.mktemp("shop"), random.Random(7)
    rows = [f"u{i % 40},sku{rng.randrange(ITEMS)},{1_760_000_000 + 60 * i},buy\n" for i in range(400)]
    (folder / "events.csv").write_text("user,item,time,action\n" + "".join(rows))
    lines = (
        f"sku{i},Thing {i},{'abc'[i % 3]},{'' if i == 4 else 1.5 * i},brand {i % 5},https://x.example/{i}.png,https://x.example/{i}\n"
        for i in range(ITEMS)
    )
    (folder / "items.csv").write_text("item,name,kind,price,brand,image,url\n" + "".join(lines))
    run("prepare", "inspect", folder, "--out", folder / "columns.toml")
    columns = (folder / "columns.toml").read_text()
    kept = 'metadata = ["price", "image", "url"]'
    assert kept in columns
    (folder / "columns.toml").write_text(columns.replace(kept, 'metadata = ["price", "brand", "image", "url"]'))
    run("prepare", "table", folder, "--columns", folder / "columns.toml", "--out", folder / "data")
    run("train", "--data", folder / "data", "--out", folder / "ck", "--epochs", "1")
    run("export", folder / "ck", folder / "bundle", "--data", folder / "data", "--evaluate", "0")
    return folder / "bundle"


def known(item: str) -> dict[str, Any]:
    row = int(item[3:])
    addresses = {"image": f"https://x.example/{row}.png", "url": f"https://x.example/{row}"}
    return {"price": None if row == 4 else 1.5 * row, "brand": f"brand {row % 5}", **addresses}


def test_a_served_list_has_what_the_file_says(shop: Path) -> None:
    with served(shop, SMALL) as app, TestClient(app) as client:
        for history in ([], [{"item": "sku1", "actions": ["buy"]}]):
            body = {
                "history": history,
                "k": 6,
                "ranges": {"price": {"min": 3, "max": 33}},
                "max_per_category": {"kind": 2},
            }
            answer = client.post("/v1/recommend", json=body)
            assert answer.status_code == 200, answer.text
            items = answer.json()["items"]
            assert [item["metadata"] for item in items] == [known(item["item"]) for item in items]
            assert all(3 <= item["metadata"]["price"] <= 33 for item in items)
            kinds = [int(item["item"][3:]) % 3 for item in items]
            assert sorted(kinds) == [0, 0, 1, 1, 2, 2]
        assert client.get("/v1/items/sku4").json()["metadata"] == known("sku4")


def test_a_terminal_shows_it_and_takes_the_same_filters(shop: Path) -> None:
    asked = ("recommend", shop, "--user", "none", "-k", "3", "--range", "price=3:33", "--max-per", "kind=1")
    document = json.loads(run(*asked, "--json").stdout)
    assert [item["metadata"] for item in document["items"]] == [known(item["item"]) for item in document["items"]]
    assert sorted(int(item["item"][3:]) % 3 for item in document["items"]) == [0, 1, 2]
    table = run(*asked).stdout
    assert all(
        word in table for word in ("price", "brand", f"brand {known(document['items'][0]['item'])['brand'][-1]}")
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--range", "price"), "'price' is not NAME=MIN:MAX, such as price=5:20, price=5: or price=:20"),
        (("--range", "price=a:b"), "'price=a:b' is not NAME=MIN:MAX"),
        (("--range", "price=:"), "'price=:' is not NAME=MIN:MAX"),
        (("--max-per", "kind"), "'kind' is not NAME=N, such as genre=2"),
        (("--max-per", "kind=x"), "'kind=x' is not NAME=N, such as genre=2"),
    ],
)
def test_a_filter_that_says_nothing_is_refused(tmp_path: Path, words: tuple[str, str], message: str) -> None:
    result = CliRunner().invoke(main, ["recommend", str(tmp_path), "--user", "u", *words], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output
