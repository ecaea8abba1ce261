"""Where a request's time went, for whoever asks."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from live_server import deployed
from served_process import started
from starlette.testclient import TestClient

from unipinrec.errors import ConfigError
from unipinrec.runtime.server.app import make_app, make_server
from unipinrec.runtime.server.call import Server
from unipinrec.runtime.server.observe.trace import OtelSpans, Traces, trace_route

EVENTS = [{"item": "item-7", "actions": ["click"]}]
BODY = {"history": EVENTS, "user": "ann", "k": 2}


@pytest.fixture(scope="module")
def server(twins: tuple[Path, Path]) -> Iterator[Server]:
    with deployed(twins[0]) as deployments:
        yield make_server(deployments=deployments)


@pytest.fixture
def client(server: Server) -> Iterator[TestClient]:
    traces = Traces(keep=3)
    server.observers[:] = [traces.observe]
    with TestClient(make_app(server, [trace_route(server, traces)])) as opened:
        yield opened


def trace_of(client: TestClient, body: object) -> tuple[Any, dict[str, Any]]:
    answer = client.post("/v1/recommend", json=body, headers={"x-trace": "1", "x-request-id": "r-1"})
    assert answer.status_code == 200
    trace: dict[str, Any] = client.get(answer.headers["x-trace"]).json()
    return answer.json(), trace


def test_a_trace_shows_every_stage(client: TestClient) -> None:
    slate, trace = trace_of(client, BODY)
    spans = {event["name"]: event for event in trace["traceEvents"] if event["ph"] == "X"}
    assert list(spans) == ["/v1/recommend", "queue", "batch", "encode", "retrieve", "rank"]
    assert spans["/v1/recommend"]["args"] == {"request_id": "r-1", "status": 200}
    assert spans["batch"]["args"] == {"bundle": slate["bundle"], "device": "cpu", "batch": 1}
    assert spans["encode"]["args"] == {"kv": "miss", "kv_reason": "new"}
    for stage in ("encode", "retrieve", "rank"):
        assert spans[stage]["dur"] == pytest.approx(slate["stages_ms"][stage] * 1e3, abs=0.2)
    ends = {name: span["ts"] + span["dur"] for name, span in spans.items()}
    assert spans["/v1/recommend"]["ts"] == 0
    assert 0 < spans["queue"]["ts"] < ends["queue"] <= spans["batch"]["ts"] + 0.2
    assert spans["batch"]["ts"] <= spans["encode"]["ts"] + 0.2
    assert ends["encode"] == pytest.approx(spans["retrieve"]["ts"], abs=0.3)
    assert ends["retrieve"] == pytest.approx(spans["rank"]["ts"], abs=0.3)
    assert ends["rank"] <= ends["batch"] + 0.3
    assert ends["batch"] <= ends["/v1/recommend"]


def test_every_slate_has_a_lane(client: TestClient) -> None:
    _, trace = trace_of(client, [BODY, BODY])
    named = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert named == {0: "request", 1: "slate 1", 2: "slate 2"}
    ranked = [event["tid"] for event in trace["traceEvents"] if event["name"] == "rank"]
    assert ranked == [1, 2]


def test_only_who_asks_gets_one_and_the_latest_are_kept(client: TestClient) -> None:
    assert "x-trace" not in client.post("/v1/recommend", json=BODY).headers
    assert "x-trace" not in client.post("/v1/recommend", json=BODY, headers={"x-trace": "yes"}).headers
    where = [client.get("/health/live", headers={"x-trace": "1"}).headers["x-trace"] for _ in range(4)]
    assert [client.get(path).status_code for path in where] == [404, 200, 200, 200]
    answer = client.get("/debug/traces/r-1")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_such_trace")


def test_spans_of_opentelemetry(server: Server) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    sent = OtelSpans(SimpleSpanProcessor(exporter))
    server.observers[:] = [sent.observe]
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with TestClient(make_app(server)) as client:
        client.post("/v1/recommend", json=BODY, headers={"traceparent": caller, "x-request-id": "r-2"})
        client.get("/health/live", headers={"traceparent": "nonsense"})
    sent.close()
    *spans, alone = exporter.get_finished_spans()
    names = ["/v1/recommend", "queue", "batch", "encode", "retrieve", "rank"]
    assert [span.name for span in spans] == names
    of = dict(zip(names, spans, strict=True))
    parents = {name: span.parent.span_id for name, span in of.items() if span.parent}
    ids = {name: span.context.span_id for name, span in of.items() if span.context}
    assert parents["/v1/recommend"] == 0xB7AD6B7169203331
    assert parents["queue"] == parents["batch"] == ids["/v1/recommend"]
    assert parents["encode"] == parents["retrieve"] == parents["rank"] == ids["batch"]
    assert {span.context.trace_id for span in spans if span.context} == {0x0AF7651916CD43DD8448EB211C80319C}
    assert of["/v1/recommend"].attributes == {"request_id": "r-2", "status": 200}
    assert of["/v1/recommend"].resource.attributes["service.name"] == "unipinrec"
    assert "retrieval" not in (of["retrieve"].attributes or {})
    for name, span in of.items():
        assert span.start_time is not None
        assert span.end_time is not None
        assert 0 <= span.end_time - span.start_time < 20e9, name
    assert (alone.name, alone.parent) == ("/health/live", None)


def test_spans_reach_the_collector_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (find_spec("opentelemetry") and find_spec("opentelemetry.exporter")):
        pytest.skip("opentelemetry-exporter-otlp-proto-http is not installed")
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        with started("--otel", "--drain-delay-s", "0") as running:
            running.ready()
            assert running.ask("POST", "/v1/recommend", {"history": EVENTS, "k": 1})[0] == 200
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(20) == 0
        collector.shutdown()
    assert {path for path, _ in received} == {"/v1/traces"}
    sent = b"".join(body for _, body in received)
    for name in ("unipinrec", "/v1/recommend", "queue", "batch", "encode", "retrieve", "rank"):
        assert sent.count(bytes([len(name)]) + name.encode()) >= 1, name  # a string in protobuf


def test_spans_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"spans need opentelemetry.* run pip install 'unipinrec\[otel\]'"):
        OtelSpans.open()
