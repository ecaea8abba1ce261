"""What a scrape says is what was done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import deployed
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from unipinrec.errors import BundleError
from unipinrec.runtime import Request
from unipinrec.runtime.machine import driver_problem
from unipinrec.runtime.requests import Event
from unipinrec.runtime.retrieval.sampling import RecallSampler
from unipinrec.runtime.server.app import make_app, make_server
from unipinrec.runtime.server.call import Call, Server
from unipinrec.runtime.server.deployment import Deployment
from unipinrec.runtime.server.observe.metrics import ServerMetrics, metrics_route
from unipinrec.runtime.server.swap import Deployments

NOW_MS = 1_760_000_000_000
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def deployments(twins: tuple[Path, Path]) -> Iterator[Deployments]:
    with deployed(twins[0]) as opened:
        yield opened


@pytest.fixture
def server(deployments: Deployments) -> Server:
    return make_server(deployments=deployments)


@pytest.fixture
def client(server: Server) -> Iterator[TestClient]:
    metrics = ServerMetrics(server)
    server.observers.append(metrics.observe)
    with TestClient(make_app(server, [metrics_route(server, metrics)])) as opened:
        yield opened


def scrape(client: TestClient) -> Samples:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    assert len({family.name for family in families}) == len(families)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"unipinrec_{name}", tuple(sorted(labels.items()))]


def body(events: int, user: str | None = None) -> dict[str, object]:
    history = [{"item": f"item-{index}", "actions": ["click"], "timestamp_ms": NOW_MS} for index in range(events)]
    return {"history": history, "user": user, "k": 3, "now_ms": NOW_MS + 1, "candidates": 6}


@pytest.fixture
def answers(client: TestClient) -> list[dict[str, Any]]:
    """What seven requests got, of which the last two came together, and one that failed."""
    alone = [
        client.post("/v1/recommend", json=asked).json()
        for asked in (body(3, "ann"), body(3, "ann"), body(5, "ann"), body(2, "ann"), body(2))
    ]
    assert client.post("/v1/recommend", json={"k": 0}).status_code == 400
    together: list[dict[str, Any]] = client.post("/v1/recommend", json=[body(4, "bob"), body(4, "eve")]).json()
    return [*alone, *together]


def test_requests_by_endpoint_and_code(client: TestClient, answers: list[dict[str, Any]]) -> None:
    assert len(answers) == 7
    assert client.get("/health/ready").status_code == 200
    samples, recommend = scrape(client), {"endpoint": "/v1/recommend"}
    assert value(samples, "http_requests_total", code="200", **recommend) == 6
    assert value(samples, "http_requests_total", code="400", **recommend) == 1
    assert value(samples, "http_requests_total", code="200", endpoint="/health/ready") == 1
    assert value(samples, "http_errors_total", reason="invalid_request", **recommend) == 1
    assert value(samples, "http_seconds_count", **recommend) == 7
    assert value(samples, "http_seconds_bucket", le="+Inf", **recommend) == 7
    assert value(samples, "recommend_pending") == 0
    assert value(samples, "recommend_pending_max") == 2
    assert value(samples, "recommend_turned_away_total") == 0
    assert samples["process_resident_memory_bytes", ()] > 1e6


def test_errors_in_a_list_are_counted_each(client: TestClient) -> None:
    wrong = {"history": [{"item": "no such item", "actions": []}]}
    assert client.post("/v1/recommend", json=[body(2), wrong, wrong, {"user": "nobody"}]).status_code == 200
    samples, recommend = scrape(client), {"endpoint": "/v1/recommend"}
    assert value(samples, "http_requests_total", code="200", **recommend) == 1
    assert value(samples, "http_errors_total", reason="invalid_request", **recommend) == 2
    assert value(samples, "http_errors_total", reason="cold_start", **recommend) == 1


def test_popular_answers_are_counted_apart_and_are_no_misses(popular: Path) -> None:
    with deployed(popular) as deployments:
        server = make_server(deployments=deployments)
        metrics = ServerMetrics(server)
        server.observers.append(metrics.observe)
        with TestClient(make_app(server, [metrics_route(server, metrics)])) as client:
            client.post("/v1/recommend", json=body(3, "ann"))
            client.post("/v1/recommend", json=[{"user": "nobody"}, {"history": []}])
            samples = scrape(client)
    assert value(samples, "popular_slates_total") == 2
    assert sum(count for (name, _), count in samples.items() if name == "unipinrec_slates_total") == 1
    assert sum(count for (name, _), count in samples.items() if name == "unipinrec_kv_misses_total") == 1
    assert value(samples, "stage_seconds_count", stage="encode") == 1
    assert value(samples, "slate_batch_size_count") == 3


def test_stages_and_batches(client: TestClient, answers: list[dict[str, Any]]) -> None:
    samples = scrape(client)
    for stage in ("encode", "retrieve", "rank", "total"):
        assert value(samples, "stage_seconds_count", stage=stage) == 7
        spent = sum(one["stages_ms"][stage] for one in answers) / 1e3
        assert value(samples, "stage_seconds_sum", stage=stage) == pytest.approx(spent)
    assert value(samples, "queue_seconds_count") == 7
    assert 0 < value(samples, "queue_seconds_sum") < 7
    assert value(samples, "slate_batch_size_count") == 7
    assert value(samples, "slate_batch_size_bucket", le="1.0") >= 5
    assert value(samples, "batched_requests_total") == 7
    assert 6 <= value(samples, "batches_total") <= 7


def test_what_the_cache_had(client: TestClient, answers: list[dict[str, Any]], deployments: Deployments) -> None:
    samples = scrape(client)
    assert [one["kv"] for one in answers] == ["miss", "hit", "extended", "miss", "miss", "miss", "miss"]
    assert value(samples, "slates_total", kv="miss", search="scan") == 5
    assert value(samples, "slates_total", kv="hit", search="scan") == 1
    assert value(samples, "slates_total", kv="extended", search="scan") == 1
    assert value(samples, "kv_hits_total", kind="hit") == 1
    assert value(samples, "kv_hits_total", kind="extended") == 1
    assert value(samples, "kv_misses_total", reason="new") == 3
    assert value(samples, "kv_misses_total", reason="truncated") == 1
    assert value(samples, "kv_entries") == 3
    assert value(samples, "kv_budget_bytes") <= 8 << 20
    assert 0 < value(samples, "kv_used_bytes") <= value(samples, "kv_high_water_bytes")
    assert value(samples, "kv_evictions_total") == 0
    assert value(samples, "device_fallbacks") == 0
    serving = {"bundle": "a", "version": deployments.current.version, "device": "cpu"}
    assert value(samples, "serving_info", precision="fp32", reason="requested", **serving) == 1


def test_padding(client: TestClient) -> None:
    before = scrape(client)  # warm-up
    for asked in (body(3, "ann"), body(5, "ann"), body(2)):
        client.post("/v1/recommend", json=asked)
    after = scrape(client)
    for name in ("rows_given_total", "rows_computed_total"):
        grown = {stage: value(after, name, stage=stage) for stage in ("encode", "extend", "rank")}
        for stage in ("encode", "rank"):
            grown[stage] -= value(before, name, stage=stage)
        assert grown == {"encode": 3 + 2, "extend": 2, "rank": 3 * 6}


def test_swaps_are_counted_and_totals_go_on(
    client: TestClient, deployments: Deployments, twins: tuple[Path, Path], tmp_path: Path
) -> None:
    client.post("/v1/recommend", json=body(3, "ann"))
    with deployments.acquire() as held:
        deployments.swap(twins[1])
        with pytest.raises(BundleError, match="nothing"):
            deployments.swap(tmp_path / "nothing")
        samples = scrape(client)
        assert value(samples, "swaps_total", kind="swap", result="swapped") == 1
        assert value(samples, "swaps_total", kind="swap", result="refused") == 1
        assert (value(samples, "draining"), value(samples, "draining_requests")) == (1, 1)
        assert held.version != deployments.current.version
    client.post("/v1/recommend", json=body(3, "ann"))
    end = time.monotonic() + 20
    while deployments.status().draining:
        assert time.monotonic() < end
        time.sleep(0.005)
    samples = scrape(client)
    assert value(samples, "batched_requests_total") == 2
    assert value(samples, "kv_misses_total", reason="version") == 1
    assert value(samples, "draining") == 0
    (serving,) = [dict(labels) for name, labels in samples if name == "unipinrec_serving_info"]
    assert (serving["bundle"], serving["version"]) == ("b", deployments.current.version)


def test_what_does_not_serve_says_why(twins: tuple[Path, Path]) -> None:
    deployments = Deployments(Deployment.open(twins[0]))  # auto
    server = make_server(deployments=deployments)
    with TestClient(make_app(server, [metrics_route(server, ServerMetrics(server))])) as client:
        samples = scrape(client)
    refused = deployments.current.recommender.device.refused
    assert deployments.close(timeout_s=20)
    assert value(samples, "device_fallbacks") == len(refused)
    assert value(samples, "device_fell_back") == (driver_problem() is None)  # without a GPU, auto is the CPU
    whys = [dict(labels)["why"] for name, labels in samples if name == "unipinrec_device_refused"]
    assert sorted(whys) == sorted(refused)
    if driver_problem():
        assert any(why.startswith("tensorrt") for why in whys)


def test_before_the_first_bundle_there_are_metrics_too() -> None:
    server = make_server()
    with TestClient(make_app(server, [metrics_route(server, ServerMetrics(server))])) as client:
        samples = scrape(client)
    assert value(samples, "ready") == 0
    assert not any(name.startswith("unipinrec_serving") for name, _ in samples)


def test_openmetrics_where_it_is_asked_for(client: TestClient) -> None:
    client.post("/v1/recommend", json=body(3))
    answer = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = list(parse_openmetrics(answer.text))  # type: ignore[no-untyped-call] # of the library
    assert {"unipinrec_stage_seconds", "unipinrec_kv_hits"} <= {one.name for one in families}


def test_two_servers_do_not_share_a_registry(server: Server) -> None:
    sampler = RecallSampler(0.0)
    first, second = ServerMetrics(server), ServerMetrics(server, sampler)
    sampler.close()
    assert first.registry is not second.registry
    assert b"unipinrec_ann_recall" not in first.render()[0]
    assert b"unipinrec_ann_recall_count 0.0" in second.render()[0]


def test_a_bucket_holds_its_bound(server: Server) -> None:
    metrics = ServerMetrics(server)
    for seconds in (0.001, 0.0011, 99.0):
        metrics.observe(call(seconds=seconds))
    text = metrics.render()[0].decode()
    assert 'unipinrec_http_seconds_bucket{endpoint="/v1/x",le="0.001"} 1.0' in text
    assert 'unipinrec_http_seconds_bucket{endpoint="/v1/x",le="0.0025"} 2.0' in text
    assert 'unipinrec_http_seconds_bucket{endpoint="/v1/x",le="5.0"} 2.0' in text
    assert 'unipinrec_http_seconds_bucket{endpoint="/v1/x",le="+Inf"} 3.0' in text


def test_counting_takes_microseconds(server: Server, deployments: Deployments) -> None:
    metrics, request = ServerMetrics(server), Request(history=(Event(item="item-1", actions=()),), k=1)
    answer = deployments.current.batcher.submit(request)
    one = call(seconds=0.01)
    one.slates, one.answers = [answer.result()], [answer]
    best = 1.0
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(200):
            metrics.observe(one)
        best = min(best, (time.perf_counter() - began) / 200)
    assert best < 30e-6


def call(*, seconds: float) -> Call:
    from starlette.requests import Request as HttpRequest

    http = HttpRequest({"type": "http", "method": "POST", "path": "/", "headers": []})
    return Call(request=http, id="1", route="/v1/x", began=0.0, deadline=1.0, status=200, seconds=seconds)
