from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import jsonschema_rs
import pytest
from answers import STORED
from live_server import SMALL, served
from starlette.applications import Starlette
from starlette.testclient import TestClient

from unipinrec import __version__
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.popular import ColdStart
from unipinrec.runtime.serve import assembled
from unipinrec.runtime.server.app import operations_of

TOKEN = "not-a-secret-at-all"
UNDOCUMENTED = {("get", "/"), ("get", "/openapi.json")}


EVERYTHING = replace(SMALL, admin_token_env="TOKEN_OF_A_TEST", traces=True)


@pytest.fixture(scope="module", autouse=True)
def token() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKEN_OF_A_TEST", TOKEN)
        yield


def client_of(app: Starlette) -> TestClient:
    return TestClient(app, headers={"authorization": f"Bearer {TOKEN}"})


@pytest.fixture(scope="module")
def client(token: None) -> Iterator[TestClient]:
    with served(STORED, EVERYTHING) as app, client_of(app) as client:
        yield client


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    answer = client.get("/openapi.json")
    assert answer.status_code == 200
    described: dict[str, Any] = answer.json()
    return described


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(method, path, one) for path, item in document["paths"].items() for method, one in item.items()]


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    return jsonschema_rs.validator_for({**schema, "components": document["components"]})


def test_every_route_is_described_and_nothing_else(client: TestClient, document: dict[str, Any]) -> None:
    routes = operations_of(cast(Starlette, client.app).routes)
    there = {(one.method.lower(), one.documented) for one in routes}
    assert {(method, path) for method, path, _ in operations(document)} == there - UNDOCUMENTED
    assert len({one["operationId"] for _, _, one in operations(document)}) == len(operations(document))
    assert (document["openapi"], document["info"]["version"]) == ("3.1.0", __version__)


def test_every_reference_and_schema_is_valid(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    for name in set(text.split("#/components/schemas/")[1:]):
        assert name.partition('"')[0] in document["components"]["schemas"]
    for schema in document["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)
    item = document["components"]["schemas"]["SlateItem"]
    assert item["description"] == "One recommended item."
    assert (
        item["properties"]["actions"]["description"] == "Probability of each action; empty if the ranker did not run."
    )


def examples() -> list[tuple[str, str]]:
    from unipinrec.runtime.server.openapi_examples import examples

    return [(of, name) for of, given in examples(Bundle.open(STORED), cold_start=False).items() for name in given]


@pytest.mark.parametrize(("of", "name"), examples())
def test_every_example_is_answered_as_it_says(client: TestClient, document: dict[str, Any], of: str, name: str) -> None:
    routes = operations_of(cast(Starlette, client.app).routes)
    (path,) = (one.documented for one in routes if one.examples == of)
    operation = document["paths"][path]["post"]
    body = operation["requestBody"]["content"]["application/json"]
    example = body["examples"][name]
    if example["x-status"] == 200:
        validator(document, body["schema"]).validate(example["value"])
    parameters = {one["name"]: one["example"] for one in operation["parameters"] if "example" in one}
    answer = client.post(path.format(**parameters), json=example["value"])
    assert answer.status_code == example["x-status"], answer.text
    schema = operation["responses"][str(answer.status_code)]["content"]["application/json"]["schema"]
    validator(document, schema).validate(answer.json())


@pytest.mark.parametrize(("cold_start", "status"), [("popular", 200), ("refuse", 422)])
def test_the_example_of_an_unknown_user_is_answered_as_it_says(
    popular: Path, cold_start: ColdStart, status: int
) -> None:
    with served(popular, replace(EVERYTHING, cold_start=cold_start)) as app, client_of(app) as client:
        document = client.get("/openapi.json").json()
        operation = document["paths"]["/v1/recommend"]["post"]
        example = operation["requestBody"]["content"]["application/json"]["examples"]["unknown_user"]
        answer = client.post("/v1/recommend", json=example["value"])
    assert answer.status_code == example["x-status"] == status
    schema = operation["responses"][str(status)]["content"]["application/json"]["schema"]
    validator(document, schema).validate(answer.json())


def test_the_example_user_is_known_then_forgotten(client: TestClient, document: dict[str, Any]) -> None:
    path = "/v1/users/{user}"
    (user,) = (one["example"] for one in document["paths"][path]["get"]["parameters"] if one["name"] == "user")
    one = document["paths"]["/v1/events"]["post"]["requestBody"]["content"]["application/json"]["examples"]["one"]
    assert one["value"]["user"] == user
    client.post("/v1/events", json=one["value"])
    for method, status in (("get", 200), ("delete", 200), ("get", 404)):
        answer = client.request(method, path.format(user=user))
        assert answer.status_code == status
        content = document["paths"][path][method]["responses"][str(status)]["content"]["application/json"]
        validator(document, content["schema"]).validate(answer.json())


@pytest.mark.parametrize("user", ["a/b", "line\nbreak\n", "../..", "\U0001f600 ?#&", "/"])
def test_whoever_can_be_written_can_be_read_and_forgotten(client: TestClient, user: str) -> None:
    assert client.post("/v1/events", json={"user": user, "events": [{"item": "item-1", "actions": []}]}).is_success
    path = f"/v1/users/{quote(user, safe='')}"
    assert client.get(path).json()["user"] == user
    assert client.delete(path).json() == {"user": user, "events": 1, "cached": False}
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    "path",
    ["/health/live", "/health/ready", "/v2", "/v2/health/live", "/v2/health/ready", "/v1/demo/users", "/admin/status"],
)
def test_what_takes_nothing_answers_as_described(client: TestClient, document: dict[str, Any], path: str) -> None:
    content = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]
    validator(document, content["schema"]).validate(client.get(path).json())


def test_before_there_is_a_bundle_there_are_no_examples() -> None:
    with assembled(STORED, EVERYTHING) as (_, app, _load), client_of(app) as client:
        document = client.get("/openapi.json").json()
        assert "examples" not in json.dumps(document["paths"])
        assert client.get("/health/ready").status_code == 503
        assert client.get("/v1/demo/users").json()["error"]["code"] == "not_ready"
        assert client.get("/v2/models/ranker").json() == {"error": "the server is still loading its bundle"}


def test_sample_users_are_not_in_it(document: dict[str, Any]) -> None:
    users = json.loads(Path(STORED / "user_ids.json").read_text())
    assert users
    assert not any(user in json.dumps(document) for user in users)
