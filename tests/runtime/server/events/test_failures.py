"""Every store against a plain model, while connections are closed, writes are refused and the process restarts."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unipinrec.errors import BackendError
from unipinrec.runtime.serve import open_store
from unipinrec.runtime.server.events.seen import ItemsByHash
from unipinrec.runtime.server.events.store import Append, EventStore, StoredEvent, StoreLimits

T = TypeVar("T")
LIMITS = StoreLimits(events=8, seen=5)
NOW = 1_700_000_000_000
ITEMS = [f"i{number}" for number in range(7)]
appended = st.tuples(st.sampled_from("uv"), st.integers(1, 5))  # fewer than are kept: all ids are known
STEPS = st.lists(
    appended
    | st.tuples(st.just("forget"), st.sampled_from("uv"))
    | st.tuples(st.sampled_from(("closed", "storm", "refused")), appended)
    | st.just("restart"),
    max_size=12,
)


class Model:
    """What a store of `LIMITS` must hold: (number, item) of the kept events, and the items of the others."""

    def __init__(self) -> None:
        self.kept: dict[str, list[tuple[int, str]]] = {"u": [], "v": []}
        self.gone: dict[str, list[str]] = {"u": [], "v": []}

    def append(self, user: str, events: list[tuple[int, str]]) -> None:
        kept = self.kept[user] + events
        over = len(kept) - 7 if len(kept) > 8 else 0
        self.kept[user] = kept[over:]
        for _, item in kept[:over]:
            self.gone[user] = [item, *(other for other in self.gone[user] if other != item)][:5]

    def check(self, store: EventStore) -> None:
        for user, kept in self.kept.items():
            (events,) = store.histories([user]).result(20)
            assert [(event.timestamp_ms, event.item) for event in events] == kept
            (seen,) = store.seen([user]).result(20)
            assert ItemsByHash(ITEMS).named(seen) == self.gone[user]


def until_done(begin: Callable[[], Future[T]]) -> T:
    """As a client that gets 503: the same again."""
    for _ in range(50):
        with contextlib.suppress(BackendError):
            return begin().result(20)
    raise AssertionError("the store never recovered")


@contextlib.contextmanager
def closing(server: Any) -> Iterator[None]:
    """Closes all connections again and again, also between a write and its answer."""
    done = threading.Event()

    def close() -> None:
        while not done.wait(0.0005):
            server.client_kill_filter(_type="normal", skipme=True)

    thread = threading.Thread(target=close)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def run(state: str | None, server: Any, steps: list[Any]) -> None:
    store, model, number = open_store(state, LIMITS), Model(), 0
    try:
        for step in steps:
            if step == "restart":
                if state is not None:
                    store.close()
                    store = open_store(state, LIMITS)
                continue
            if step[0] == "forget":
                until_done(partial(store.forget, step[1]))
                model.kept[step[1]], model.gone[step[1]] = [], []
                continue
            failure, (user, count) = step if isinstance(step[1], tuple) else ("", step)
            events = [(at, ITEMS[at * at % 7]) for at in range(number, number + count)]
            number += count
            sent = tuple(StoredEvent(item=item, actions=(), timestamp_ms=at, id=str(at)) for at, item in events)
            fails = failure if server is not None else ""
            if fails == "closed":
                server.client_kill_filter(_type="normal", skipme=True)
            elif fails == "refused":
                server.replicaof("127.0.0.1", 1)
                with pytest.raises(BackendError, match="read only replica"):
                    store.append([Append(user=user, events=sent)], NOW).result(20)
                server.replicaof("NO", "ONE")
            with closing(server) if fails == "storm" else contextlib.nullcontext():
                until_done(partial(store.append, [Append(user=user, events=sent)], NOW))
            model.append(user, events)
            model.check(store)
    finally:
        store.close()


@settings(max_examples=30, deadline=None)
@given(steps=STEPS)
@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_local_store_is_as_the_model(kind: str, steps: list[Any]) -> None:
    folder = tempfile.mkdtemp()
    try:
        run(None if kind == "memory" else str(Path(folder) / "state"), None, steps)
    finally:
        shutil.rmtree(folder)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_a_store_in_redis_is_as_the_model_through_failures(redis_url: str, steps: list[Any]) -> None:
    import redis

    server = redis.Redis.from_url(redis_url)
    server.flushall()
    run(redis_url, server, steps)
