"""One line for every request, for machines or for people, that gives away no more than it must."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from live_server import deployed
from starlette.responses import Response
from starlette.testclient import TestClient

from unipinrec.errors import ConfigError
from unipinrec.runtime.server.app import make_app, make_server, route
from unipinrec.runtime.server.call import Call, Server
from unipinrec.runtime.server.observe.log import LogOptions, RequestLog, configure_logs
from unipinrec.runtime.server.operations import Operation

EVENTS = [{"item": "item-7", "actions": ["click"]}, {"item": "item-8", "actions": []}]


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where logs go; what pytest and others had set is put back."""
    names = ("unipinrec", "uvicorn", "uvicorn.error", "uvicorn.access", None)
    before = [(logger, dict(vars(logger))) for logger in map(logging.getLogger, names)]
    yield io.StringIO()
    for logger, state in before:
        for name in ("handlers", "propagate", "disabled"):
            setattr(logger, name, state[name])
        logger.setLevel(state["level"])


@pytest.fixture(scope="module")
def served(twins: tuple[Path, Path]) -> Iterator[Server]:
    with deployed(twins[0]) as deployments:
        yield make_server(deployments=deployments)


def client_of(server: Server, options: LogOptions, stream: io.StringIO) -> TestClient:
    async def broken(_server: Server, _call: Call) -> Response:
        raise ZeroDivisionError("the secret of the house")

    configure_logs(options, stream)
    server.observers[:] = [RequestLog(options).observe]
    return TestClient(make_app(server, [route(server, Operation(method="GET", path="/broken"), broken)]))


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_json_with_the_id_of_the_answer(served: Server, stream: io.StringIO) -> None:
    with client_of(served, LogOptions(), stream) as client:
        given = client.post(
            "/v1/recommend", json={"history": EVENTS, "user": "ann", "k": 2}, headers={"x-request-id": "r-1"}
        )
        made = client.post("/v1/recommend", json=[{"history": EVENTS, "k": 2}] * 2)
        wrong = client.post("/v1/recommend", json={"history": EVENTS, "k": 0})
    first, second, third = lines(stream)
    assert given.headers["x-request-id"] == first["request_id"] == "r-1"
    assert made.headers["x-request-id"] == second["request_id"]
    assert wrong.headers["x-request-id"] == third["request_id"]
    assert len({first["request_id"], second["request_id"], third["request_id"]}) == 3
    assert {
        name: first[name] for name in ("level", "logger", "message", "route", "status", "batch", "kv", "kv_reason")
    } == {
        "level": "info",
        "logger": "unipinrec.requests",
        "message": "/v1/recommend 200",
        "route": "/v1/recommend",
        "status": 200,
        "batch": 1,
        "kv": "miss",
        "kv_reason": "new",
    }
    assert (first["device"], first["bundle"]) == ("cpu", given.json()["bundle"][:12])
    times = given.json()["stages_ms"]
    for stage in ("encode", "retrieve", "rank"):
        assert first[f"{stage}_ms"] == pytest.approx(times[stage], abs=1e-3)
    assert first["ms"] > times["total"]
    assert first["time"].endswith("Z")
    assert (second["slates"], "slates" in first) == (2, False)
    assert (third["status"], third["error"], "kv" in third) == (400, "invalid_request", False)


def test_whose_history_and_what_is_in_it_is_not_logged(served: Server, stream: io.StringIO) -> None:
    body = {"history": EVENTS, "user": "ann-of-green-gables", "k": 2}
    with client_of(served, LogOptions(level="debug"), stream) as client:
        items = [item["item"] for item in client.post("/v1/recommend", json=body).json()["items"]]
        client.get("/v1/users/ann-of-green-gables")
    assert len(lines(stream)) >= 2
    for secret in ("ann", "item-7", "click", *items):
        assert secret not in stream.getvalue()
    with client_of(served, LogOptions(users=True), stream) as client:
        client.post("/v1/recommend", json=body)
    assert lines(stream)[-1]["users"] == ["ann-of-green-gables"]


def test_a_fault_is_an_error_with_its_traceback(served: Server, stream: io.StringIO) -> None:
    with client_of(served, LogOptions(), stream) as client:
        answer = client.get("/broken")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    traced, told = lines(stream)
    assert (traced["level"], told["level"]) == ("error", "error")
    assert "ZeroDivisionError: the secret of the house" in traced["exception"]
    assert answer.headers["x-request-id"] == told["request_id"]
    assert told["request_id"] in traced["message"]
    assert told["request_id"] in answer.json()["error"]["message"]


@pytest.mark.parametrize("given", ["", "two words", "line\tbreak", "x" * 129, "ä"])
def test_an_id_that_is_no_id_is_replaced(served: Server, stream: io.StringIO, given: str) -> None:
    with client_of(served, LogOptions(probes=True), stream) as client:
        answer = client.get("/health/live", headers={b"x-request-id": given.encode()})
    assert answer.headers["x-request-id"] == lines(stream)[0]["request_id"]
    assert len(answer.headers["x-request-id"]) == 16


def test_probes_that_went_well_are_left_out(served: Server, stream: io.StringIO) -> None:
    with client_of(served, LogOptions(), stream) as client:
        client.get("/health/live")
        client.get("/health/ready")
    assert lines(stream) == []
    loading = make_server()
    with client_of(loading, LogOptions(), stream) as client:
        client.get("/health/ready")
    (line,) = lines(stream)
    assert (line["route"], line["status"], line["level"]) == ("/health/ready", 503, "info")


def test_for_people(served: Server, stream: io.StringIO) -> None:
    with client_of(served, LogOptions(format="human"), stream) as client:
        client.post("/v1/recommend", json={"history": EVENTS, "k": 2}, headers={"x-request-id": "r-9"})
        client.get("/broken")
    first, rest = stream.getvalue().split("\n", 1)
    assert " info    /v1/recommend 200 request_id=r-9 ms=" in first
    assert " kv=miss kv_reason=anonymous device=cpu bundle=" in first
    assert "Traceback" in rest


def test_levels_and_other_loggers(stream: io.StringIO) -> None:
    uvicorn.Config("unused")  # sends its logs elsewhere
    configure_logs(LogOptions(level="warning"), stream)
    for name in ("unipinrec.runtime.device", "uvicorn.error", "some.library"):
        logging.getLogger(name).info("%s said nothing of interest", name)
        logging.getLogger(name).warning("%s: %s", name, 'a "quoted"\nline')
    logging.getLogger("uvicorn.access").error("not twice")
    told = lines(stream)
    assert [line["logger"] for line in told] == ["unipinrec.runtime.device", "uvicorn.error", "some.library"]
    assert {line["level"] for line in told} == {"warning"}
    assert told[0]["message"] == 'unipinrec.runtime.device: a "quoted"\nline'


def test_options() -> None:
    with pytest.raises(ConfigError, match="log level 'loud' is unknown; use one of debug, info, warning, error"):
        LogOptions(level="loud")
    with pytest.raises(ConfigError, match="log format 'xml' is unknown; use json or human"):
        LogOptions(format="xml")  # type: ignore[arg-type]
