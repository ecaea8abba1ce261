"""Deadlines, overload, clients that leave, and what every answer has in common."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from answers import STORED
from starlette.applications import Starlette

from unipinrec.errors import ConfigError, RequestError
from unipinrec.runtime.batching import BatchOptions
from unipinrec.runtime.kv.options import CacheOptions
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.server.app import make_app, make_server
from unipinrec.runtime.server.bodies import Limits
from unipinrec.runtime.server.call import Call, Server, ServerOptions
from unipinrec.runtime.server.deployment import Deployment, DeploymentOptions
from unipinrec.runtime.server.events.store import Events, MemoryEventStore, StoreLimits
from unipinrec.runtime.server.swap import Deployments

WAIT_MS = 400  # how long a request waits for company, so that a test can look at it while it waits
BODY = {"history": [{"item": "item-1", "actions": ["click"]}], "k": 1}
ONE = Limits(batch=1)


@pytest.fixture(scope="module")
def patient() -> Iterator[Deployments]:
    """Collects requests for a long time before it answers them."""
    batching = BatchOptions(max_wait_ms=WAIT_MS, max_batch=4)
    options = DeploymentOptions(device="cpu", cache=CacheOptions(budget_bytes=8 << 20), batching=batching)
    deployments = Deployments(Deployment.open(STORED, options))
    yield deployments
    assert deployments.close(timeout_s=30)


@asynccontextmanager
async def connected(app: Starlette) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://server") as client:
        yield client


def served(server: Server, scenario: Callable[[httpx2.AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        async with connected(make_app(server)) as client:
            await asyncio.wait_for(scenario(client), 20)

    asyncio.run(run())


async def pending(server: Server, count: int) -> None:
    limit = time.monotonic() + 10
    while server.admission.pending != count:
        assert time.monotonic() < limit
        await asyncio.sleep(0.002)


def answered(deployments: Deployments) -> int:
    return deployments.current.recommender.padding()["encode"].useful


# Overload.


def test_beyond_the_queue_there_is_429_and_health_goes_on(patient: Deployments) -> None:
    server = make_server(ServerOptions(queue=2, limits=ONE), deployments=patient)

    async def scenario(client: httpx2.AsyncClient) -> None:
        waiting = [asyncio.create_task(client.post("/v1/recommend", json=BODY)) for _ in range(2)]
        await pending(server, 2)
        refused = await client.post("/v1/recommend", content=b"not even read")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "overloaded"
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/health/ready")).status_code == 200
        events = {"user": "u", "events": BODY["history"]}
        assert (await client.post("/v1/events", json=events)).status_code == 200
        assert [(await one).status_code for one in waiting] == [200, 200]
        assert (await client.post("/v1/recommend", json=BODY)).status_code == 200

    served(server, scenario)
    assert (server.admission.pending, server.admission.refused, server.admission.most_pending) == (0, 1, 2)
    assert server.admission.seconds_each > 0


def test_a_list_takes_the_room_of_all_its_requests(patient: Deployments) -> None:
    server = make_server(ServerOptions(queue=3, limits=Limits(batch=3)), deployments=patient)

    async def scenario(client: httpx2.AsyncClient) -> None:
        waiting = asyncio.create_task(client.post("/v1/recommend", json=[BODY] * 2))
        await pending(server, 2)
        assert (await client.post("/v1/recommend", json=[BODY] * 2)).status_code == 429
        assert server.admission.pending == 2
        assert (await waiting).status_code == 200

    served(server, scenario)


def test_who_would_wait_too_long_is_told_at_once(patient: Deployments) -> None:
    server = make_server(deployments=patient)
    server.admission.learn(0.5)

    async def scenario(client: httpx2.AsyncClient) -> None:
        waiting = [asyncio.create_task(client.post("/v1/recommend", json=BODY)) for _ in range(3)]
        await pending(server, 3)
        hurried = await client.post("/v1/recommend", json=BODY, headers={"x-deadline-ms": "1200"})
        assert (hurried.status_code, hurried.headers["retry-after"]) == (429, "2")
        assert (await asyncio.gather(*waiting))[0].status_code == 200

    served(server, scenario)


# Deadlines.


def test_past_the_deadline_there_is_504_and_no_work(patient: Deployments) -> None:
    server, before = make_server(deployments=patient), answered(patient)

    async def scenario(client: httpx2.AsyncClient) -> None:
        began = time.perf_counter()
        late = await client.post("/v1/recommend", json=BODY, headers={"x-deadline-ms": "50"})
        assert 0.04 < time.perf_counter() - began < WAIT_MS / 1e3
        assert late.status_code == 504
        assert late.json()["error"] == {"code": "deadline_exceeded", "message": "there was no answer within 50 ms"}

    served(server, scenario)
    time.sleep(1.5 * WAIT_MS / 1e3)
    assert answered(patient) == before
    assert server.admission.pending == 0


def test_what_still_computes_after_its_deadline_keeps_its_place(
    patient: Deployments, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, go_on = make_server(ServerOptions(queue=1, limits=ONE), deployments=patient), threading.Event()
    answer = Recommender.answer

    def slow(recommender: Recommender, requests: Any) -> Any:
        assert go_on.wait(20)
        return answer(recommender, requests)

    monkeypatch.setattr(Recommender, "answer", slow)

    async def scenario(client: httpx2.AsyncClient) -> None:
        headers = {"x-deadline-ms": str(2 * WAIT_MS)}
        assert (await client.post("/v1/recommend", json=BODY, headers=headers)).status_code == 504
        assert server.admission.pending == 1
        assert (await client.post("/v1/recommend", json=BODY)).status_code == 429
        go_on.set()
        await pending(server, 0)
        assert (await client.post("/v1/recommend", json=BODY)).status_code == 200

    served(server, scenario)


def test_a_computation_that_ends_after_the_server_is_not_missed(
    patient: Deployments, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server, go_on, ended = make_server(deployments=patient), threading.Event(), threading.Event()

    def slow(_: Recommender, requests: Any) -> Any:
        assert go_on.wait(20)
        ended.set()
        return [RequestError("late")] * len(requests)

    monkeypatch.setattr(Recommender, "answer", slow)

    async def scenario(client: httpx2.AsyncClient) -> None:
        sent = {**BODY, "user": "u"}
        answer = await client.post("/v1/recommend", json=sent, headers={"x-deadline-ms": str(2 * WAIT_MS)})
        assert answer.status_code == 504

    served(server, scenario)
    go_on.set()
    assert ended.wait(20)
    time.sleep(0.1)
    assert not caplog.records


def test_the_default_deadline_and_the_largest(patient: Deployments) -> None:
    options = ServerOptions(deadline_ms=30, max_deadline_ms=60)
    server = make_server(options, deployments=patient)

    async def scenario(client: httpx2.AsyncClient) -> None:
        default = await client.post("/v1/recommend", json=BODY)
        most = await client.post("/v1/recommend", json=BODY, headers={"x-deadline-ms": "100000"})
        for answer, limit in ((default, 30), (most, 60)):
            assert answer.json()["error"]["message"] == f"there was no answer within {limit} ms"

    served(server, scenario)


@pytest.mark.parametrize("given", ["0", "-5", "1.5", "soon", "", "9" * 13, "٣"])
def test_a_deadline_that_is_none_is_told(patient: Deployments, given: str) -> None:
    async def scenario(client: httpx2.AsyncClient) -> None:
        answer = await client.post("/v1/recommend", json=BODY, headers={b"x-deadline-ms": given.encode()})
        assert answer.status_code == 400
        assert "must be an integer number of ms" in answer.json()["error"]["message"]

    served(make_server(deployments=patient), scenario)


class SlowStore(MemoryEventStore):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__(StoreLimits(events=10))
        self.go = threading.Event()
        self.futures: list[Future[Any]] = []

    def histories(self, users: Any) -> Future[list[Events]]:
        known, future = super().histories(users).result(), Future[list[Events]]()
        self.futures.append(future)

        def answer() -> None:
            self.go.wait(10)
            if future.set_running_or_notify_cancel():
                future.set_result(known)

        threading.Thread(target=answer).start()
        return future


def test_a_store_that_hangs_is_not_waited_for(patient: Deployments) -> None:
    store = SlowStore()

    async def scenario(client: httpx2.AsyncClient) -> None:
        answer = await client.post("/v1/recommend", json={"user": "u"}, headers={"x-deadline-ms": "40"})
        assert answer.status_code == 504

    served(make_server(deployments=patient, store=store), scenario)
    assert store.futures[0].cancelled()
    store.go.set()


def test_a_user_who_is_forgotten_is_not_cached_by_what_began_before(patient: Deployments) -> None:
    store, cache = SlowStore(), patient.current.recommender.cache
    server = make_server(deployments=patient, store=store)
    assert cache is not None
    cache.clear()

    async def scenario(client: httpx2.AsyncClient) -> None:
        await client.post("/v1/events", json={"user": "u", "events": BODY["history"]})
        answering = asyncio.create_task(client.post("/v1/recommend", json={"user": "u", "k": 1}))
        while not store.futures:  # it has read the events
            await asyncio.sleep(0.001)
        forgetting = asyncio.create_task(client.delete("/v1/users/u"))
        await asyncio.sleep(0.05)
        assert not forgetting.done()
        store.go.set()
        assert (await answering).status_code == 200
        assert (await forgetting).json() == {"user": "u", "events": 1, "cached": True}

    served(server, scenario)
    assert cache.statistics().entries == 0


def test_a_user_is_forgotten_only_when_the_batcher_is_done_with_them(
    patient: Deployments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is told that it takes too long, but the batch goes on, and would put the user into the cache."""
    cache, answer = patient.current.recommender.cache, Recommender.answer
    computing, go = threading.Event(), threading.Event()
    assert cache is not None
    cache.clear()

    def slowly(self: Recommender, asked: Any) -> Any:
        computing.set()
        assert go.wait(10)
        return answer(self, asked)

    monkeypatch.setattr(Recommender, "answer", slowly)

    async def scenario(client: httpx2.AsyncClient) -> None:
        full_batch = [{"user": "u", **BODY}] * 4
        late = await client.post("/v1/recommend", json=full_batch, headers={"x-deadline-ms": "500"})
        assert (late.status_code, computing.is_set()) == (504, True)
        forgetting = asyncio.create_task(client.delete("/v1/users/u"))
        await asyncio.sleep(0.05)
        assert not forgetting.done()
        go.set()
        assert (await forgetting).json() == {"user": "u", "events": 0, "cached": True}

    try:
        served(make_server(deployments=patient), scenario)
    finally:
        go.set()
    assert cache.statistics().entries == 0


# Clients that leave, and bodies that do not come.


async def asked(app: Starlette, messages: list[dict[str, Any]], path: str = "/v1/recommend") -> list[dict[str, Any]]:
    """What an application sends to a client that sends these messages, and then is silent."""
    sent: list[dict[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        if not messages:
            await asyncio.sleep(60)
        message = messages.pop(0)
        await asyncio.sleep(message.pop("after", 0))
        return message

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(dict(message))

    headers = [(b"x-deadline-ms", b"200")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    await app(scope, receive, send)
    return sent


def body(content: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": content, "more_body": more}


def test_a_client_that_leaves_frees_its_work(patient: Deployments) -> None:
    server, before = make_server(deployments=patient), answered(patient)
    calls: list[Call] = []
    server.observers.append(calls.append)
    messages = [body(json.dumps(BODY).encode()), {"type": "http.disconnect", "after": 0.03}]
    began = time.perf_counter()
    asyncio.run(asked(make_app(server), messages))
    assert time.perf_counter() - began < 0.15
    assert [call.status for call in calls] == [499]
    assert server.admission.pending == 0
    time.sleep(1.5 * WAIT_MS / 1e3)
    assert answered(patient) == before


def test_a_client_that_leaves_amid_its_body(patient: Deployments) -> None:
    server = make_server(deployments=patient)
    asyncio.run(asked(make_app(server), [body(b"{", more=True), {"type": "http.disconnect"}]))
    assert server.admission.pending == 0


def test_a_body_that_does_not_come_is_not_waited_for(patient: Deployments) -> None:
    server = make_server(deployments=patient)
    start, content = asyncio.run(asked(make_app(server), [body(b"{", more=True)]))
    assert start["status"] == 408
    assert json.loads(content["body"])["error"]["code"] == "body_timeout"
    assert server.admission.pending == 0


def test_a_body_that_is_too_large(patient: Deployments) -> None:
    server = make_server(ServerOptions(limits=Limits(body_bytes=100)), deployments=patient)
    chunks = [body(b" " * 60, more=True), body(b" " * 60, more=True)]
    start, content = asyncio.run(asked(make_app(server), chunks))
    assert start["status"] == 413
    assert json.loads(content["body"])["error"]["message"].startswith("the body is larger than 100 bytes")

    async def scenario(client: httpx2.AsyncClient) -> None:
        for path in ("/v1/recommend", "/v1/events", "/v1/items/similar"):
            assert (await client.post(path, content=b" " * 101)).status_code == 413
        assert (await client.post("/v1/recommend", content=b" " * 100)).status_code == 400

    served(server, scenario)


# What every answer has in common.


def test_requests_have_ids(patient: Deployments) -> None:
    async def scenario(client: httpx2.AsyncClient) -> None:
        for given in ("mine", "x" * 128):
            answer = await client.get("/health/live", headers={"x-request-id": given})
            assert answer.headers["x-request-id"] == given
        made = {(await client.get("/health/live")).headers["x-request-id"] for _ in range(2)}
        made.add((await client.get("/health/live", headers={"x-request-id": "a b"})).headers["x-request-id"])
        made.add((await client.get("/health/live", headers={"x-request-id": "x" * 129})).headers["x-request-id"])
        assert len(made) == 4
        assert {len(one) for one in made} == {16}

    served(make_server(deployments=patient), scenario)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "no_such_route"),
        ("GET", "/v1/recommend", 405, "method_not_allowed"),
        ("PUT", "/v1/users/u", 405, "method_not_allowed"),
        ("GET", "/v1/recommend/", 404, "no_such_route"),
        ("GET", "/../../etc/passwd", 404, "no_such_route"),
    ],
)
def test_what_is_not_there(patient: Deployments, method: str, path: str, status: int, code: str) -> None:
    async def scenario(client: httpx2.AsyncClient) -> None:
        answer = await client.request(method, path, headers={"x-request-id": "mine"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.headers["x-request-id"] == "mine"

    served(make_server(deployments=patient), scenario)


def test_observers_see_what_became_of_a_request(patient: Deployments) -> None:
    calls: list[Call] = []
    server = make_server(deployments=patient, observers=[calls.append])

    async def scenario(client: httpx2.AsyncClient) -> None:
        await client.post("/v1/recommend", json=[BODY, {"user": "nobody"}])
        await client.get("/v1/users/nobody")

    served(server, scenario)
    first, second = calls
    assert (first.route, first.status, first.code, len(first.slates)) == ("/v1/recommend", 200, None, 1)
    assert (second.route, second.status, second.code) == ("/v1/users/{user}", 404, "unknown_user")
    assert first.seconds > second.seconds > 0


def test_an_observer_that_fails_changes_no_answer(patient: Deployments, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[Call] = []

    def broken(call: Call) -> None:
        raise KeyError(call.route)

    async def scenario(client: httpx2.AsyncClient) -> None:
        answer = await client.get("/health/live", headers={"x-request-id": "mine"})
        assert (answer.status_code, answer.headers["x-request-id"], answer.json()) == (200, "mine", {"status": "live"})

    served(make_server(deployments=patient, observers=[broken, calls.append]), scenario)
    assert [call.route for call in calls] == ["/health/live"]
    assert "request mine was answered, but" in caplog.text
    assert "KeyError: '/health/live'" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deadline_ms": 0}, "must be more than 0"),
        ({"deadline_ms": 10, "max_deadline_ms": 5}, "at most max_deadline_ms=5"),
        ({"queue": 10}, "queue=10 must hold a list of 64 requests"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerOptions(**options)


def test_the_runtime_does_not_need_a_web_framework() -> None:
    import subprocess
    import sys

    code = "import sys, unipinrec.runtime; sys.exit('starlette' in sys.modules or 'uvicorn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
