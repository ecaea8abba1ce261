"""What a shop knows of its items, over HTTP: in every answer, by id, and as a filter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import msgspec
import pytest
from answers import STORED
from live_server import SMALL, listening, served
from starlette.testclient import TestClient

from unipinrec.runtime import Bundle
from unipinrec.runtime.bundle.derived import seal_derived
from unipinrec.runtime.server.page import PAGE, page_headers

EVENT = {"item": "item-1", "actions": ["click"]}


@pytest.fixture(scope="module")
def client(shop: Path) -> Iterator[TestClient]:
    with served(shop) as app, TestClient(app) as client:
        yield client


def metadata(row: int) -> dict[str, Any]:
    return {"price": None if row == 3 else float(row), "url": f"https://shop.example/{row}", "image": None}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/recommend", {"history": [EVENT], "k": 5}),
        ("/v1/recommend", {"history": [], "k": 5}),
        ("/v1/rank", {"history": [EVENT], "items": ["item-3", "item-4"]}),
        ("/v1/rank", {"history": [], "items": ["item-3", "item-4"]}),
        ("/v1/items/similar", {"items": ["item-7"], "k": 5}),
    ],
)
def test_every_list_has_the_metadata_of_its_items(client: TestClient, path: str, body: dict[str, Any]) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    items = answer.json()["items"]
    assert items
    assert [item["metadata"] for item in items] == [metadata(int(item["item"][5:])) for item in items]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/recommend", {"history": [EVENT]}),
        ("/v1/recommend", {"history": []}),
        ("/v1/items/similar", {"items": ["item-1"]}),
    ],
)
def test_every_list_takes_ranges(client: TestClient, path: str, body: dict[str, Any]) -> None:
    answer = client.post(path, json={**body, "k": 4, "ranges": {"price": {"min": 2, "max": 6}}})
    assert {item["item"] for item in answer.json()["items"]} == {"item-2", "item-4", "item-5", "item-6"}
    text = client.post(path, json={**body, "k": 1, "ranges": {"url": {"min": 2}}})
    assert text.status_code == 400
    assert text.json()["error"]["message"] == "ranges: 'url' is text; this bundle has the numbers price"


def test_a_limit_over_http(client: TestClient, shop: Path) -> None:
    codes = Bundle.open(shop).catalogue.codes_of("kind", "")
    answer = client.post("/v1/recommend", json={"history": [EVENT], "k": 4, "max_per_category": {"kind": 1}})
    words = [int(codes[int(item["item"][5:])]) for item in answer.json()["items"]]
    assert len(words) == 4
    assert all(words.count(word) <= 1 for word in (1, 2))
    unknown = client.post("/v1/recommend", json={"history": [EVENT], "max_per_category": {"colour": 1}})
    assert unknown.json()["error"]["message"].startswith("max_per_category: unknown feature 'colour'")


def test_an_item_by_its_id(client: TestClient, shop: Path) -> None:
    bundle = Bundle.open(shop)
    for row in range(24):
        codes = bundle.catalogue.codes_of("kind", "")
        assert client.get(f"/v1/items/item-{row}").json() == {
            "item": f"item-{row}",
            "title": f"Item {row}",
            "categories": {"kind": "ab"[codes[row] - 1]} if codes[row] else {},
            "metadata": metadata(row),
            "retired": False,
            "bundle": client.get("/health/ready").json()["bundle"],
        }


NAMES = ("similar", "a/b", "a%2Fb", "%", "../..", "\U0001f600 ?#&", "line\nbreak", "/", "item-99")


def test_any_id_can_be_looked_up_on_a_real_server(tmp_path: Path) -> None:
    bundle, folder = Bundle.open(STORED), tmp_path / "bundle"
    folder.mkdir()
    (folder / "item_ids.json").write_bytes(msgspec.json.encode([*NAMES, *bundle.item_ids[len(NAMES) :]]))
    (folder / "retired.json").write_text("[0]")
    seal_derived(folder, bundle, num_retired=1)
    with served(folder) as app, listening(app) as port:
        for name in NAMES:
            with urlopen(f"http://127.0.0.1:{port}/v1/items/{quote(name, safe='')}") as answer:
                document = json.load(answer)
            assert (document["item"], document["metadata"], document["categories"]) == (name, None, {})
            assert document["retired"] is (name == "similar")
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"http://127.0.0.1:{port}/v1/items/item-0")


def test_an_unknown_id_is_said_to_be_unknown(client: TestClient) -> None:
    answer = client.get("/v1/items/" + "x" * 2_000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_item")
    assert len(answer.text) < 300


def test_a_picture_is_loaded_only_if_the_operator_allows_it(shop: Path) -> None:
    for allowed, source in ((False, "img-src data:;"), (True, "img-src data: https:;")):
        with served(shop, replace(SMALL, page_images=allowed)) as app, TestClient(app) as client:
            assert source in client.get("/").headers["content-security-policy"]
            assert client.get("/v1/demo/users").json()["images"] is allowed
    assert "https:" not in page_headers(PAGE.read_bytes())["Content-Security-Policy"]


def test_the_log_of_recommendations_and_the_other_protocol_are_as_before(shop: Path, tmp_path: Path) -> None:
    import polars as pl

    with served(shop, replace(SMALL, log_served=tmp_path / "log")) as app, TestClient(app) as client:
        body = {"history": [EVENT], "k": 3, "max_per_category": {"kind": 2}, "ranges": {"price": {"min": 2}}}
        answer = client.post("/v1/recommend", json=body).json()
        assert client.get("/v2/models/ranker").status_code == 200
    (file,) = (tmp_path / "log").glob("*.parquet")
    assert pl.read_parquet(file)["item"].to_list() == [item["item"] for item in answer["items"]]


def test_a_limit_of_any_size_is_a_limit(client: TestClient) -> None:
    body = {"history": [EVENT], "k": 5}
    free = client.post("/v1/recommend", json=body).json()["items"]
    for most in (5, 2**63, 10**30):
        limited = client.post("/v1/recommend", json={**body, "max_per_category": {"kind": most}})
        assert (limited.status_code, limited.json().get("items")) == (200, free)
