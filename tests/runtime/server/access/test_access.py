"""Which token opens which route, in an application with all of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import pytest
from answers import STORED
from live_server import SMALL, served
from starlette.applications import Starlette
from starlette.testclient import TestClient

from unipinrec.runtime.server.access.access import Access, _client
from unipinrec.runtime.server.access.rate_limit import RateLimit
from unipinrec.runtime.server.app import operations_of
from unipinrec.runtime.server.bodies import ApiError

SCOPES = ("recommend", "events", "metrics", "admin")
OPEN = {"/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"}
NEEDED = {
    "/v1/events": "events",
    "/v1/users/{user}": "events",
    "/metrics": "metrics",
    "/debug/traces/{name}": "metrics",
    "/admin/reload": "admin",
    "/admin/rollback": "admin",
    "/admin/status": "admin",
}


def entry(name: str, secret: str, *scopes: str, expires: str = "") -> str:
    listed = ", ".join(f'"{scope}"' for scope in scopes)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    end = f"expires = {expires}\n" if expires else ""
    return f'[{name}]\nsha256 = "{digest}"\nscopes = [{listed}]\n{end}'


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    file = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    expired = entry("former", "secret-of-former", *SCOPES, expires="2026-01-01T00:00:00Z")
    file.write_text("".join(entry(scope, f"secret-of-{scope}", scope) for scope in SCOPES) + expired)
    with served(STORED, replace(SMALL, tokens=file, traces=True)) as app, TestClient(app) as opened:
        yield opened


def routes_of(client: TestClient) -> list[tuple[str, str]]:
    return [(one.method, one.documented) for one in operations_of(cast(Starlette, client.app).routes)]


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "secret-of-admin"},
        {"authorization": "Basic secret-of-admin"},
        bearer(""),
        bearer("secret-of-nobody"),
        bearer("secret-of-former"),
        bearer(hashlib.sha256(b"secret-of-admin").hexdigest()),
    ],
)
def test_without_a_token_that_is_known_only_health_is_open(client: TestClient, headers: dict[str, str]) -> None:
    bodies = set()
    for method, path in routes_of(client):
        answer = client.request(method, path, headers=headers, content=b"{}")
        if path in OPEN:
            assert answer.status_code == 200
            continue
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
        bodies.add(answer.text)
    graphs = '{"error":"send Authorization: Bearer TOKEN"}'
    others = '{"error":{"code":"unauthorized","message":"send Authorization: Bearer TOKEN"}}'
    assert bodies == {graphs, others}, "it looks the same for all tokens"


@pytest.mark.parametrize("scope", SCOPES)
def test_a_token_opens_the_routes_of_its_scope_and_no_others(client: TestClient, scope: str) -> None:
    for method, path in routes_of(client):
        answer = client.request(method, path, headers=bearer(f"secret-of-{scope}"), content=b"{}")
        needed = None if path in OPEN else NEEDED.get(path, "recommend")
        if needed in (None, scope):
            assert answer.status_code not in (401, 403), path
            continue
        assert answer.status_code == 403, path
        assert answer.headers["www-authenticate"] == f'Bearer error="insufficient_scope", scope="{needed}"'
        assert f"this token lacks the scope {needed}" in answer.text


def test_the_document_says_which_token(client: TestClient) -> None:
    document = client.get("/openapi.json", headers=bearer("secret-of-recommend")).json()
    assert document["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    for path, item in document["paths"].items():
        for operation in item.values():
            statuses = {"401", "403"} & set(operation["responses"])
            if path in OPEN:
                assert (operation.get("security"), statuses) == (None, set())
            else:
                needed = NEEDED.get(path, "recommend")
                assert (operation["security"], statuses) == ([{"token": [needed]}], {"401", "403"})


def test_the_log_names_tokens_and_never_holds_them(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    from unipinrec.runtime.server.observe.log import LogOptions, RequestLog

    server = next(iter(cast(Starlette, client.app).routes)).endpoint.server  # type: ignore[attr-defined]
    lines = RequestLog(LogOptions()).observe
    server.observers.append(lines)
    with caplog.at_level(logging.DEBUG):
        for secret in ("secret-of-recommend", "secret-of-nobody", "secret-of-events"):  # the last lacks the scope
            client.get("/v2", headers=bearer(secret))
    server.observers.remove(lines)
    requests = [record for record in caplog.records if record.name == "unipinrec.requests"]
    assert [vars(record)["unipinrec_fields"].get("token") for record in requests] == ["recommend", None, "events"]
    assert not any("secret-of" in repr(vars(record)) for record in requests)


def test_operators_are_not_limited() -> None:
    access = Access(limit=RateLimit(1))
    access.admit("recommend", None, "10.0.0.1")
    with pytest.raises(ApiError, match="requests a second"):
        access.admit("events", None, "10.0.0.1")
    for _ in range(5):
        access.admit("metrics", None, "10.0.0.1")
        access.admit(None, None, "10.0.0.1")
    access.admit("recommend", None, "10.0.0.2")


def test_addresses_of_one_network_are_one_client() -> None:
    assert _client(None, "2001:db8:1:2:3::4") == _client(None, "2001:db8:1:2:ffff::") == "2001:0db8:0001:0002:"
    assert _client(None, "2001:db8:1:3::4") == "2001:0db8:0001:0003:"
    assert (_client(None, "10.0.0.1"), _client(None, ""), _client("shop", "10.0.0.1")) == ("10.0.0.1", "", "shop")
