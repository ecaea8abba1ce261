"""The store in Redis: servers that are replaced, and servers that are none for it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unipinrec.errors import BackendError
from unipinrec.runtime.serve import open_store
from unipinrec.runtime.server.events.redis import RedisEventStore
from unipinrec.runtime.server.events.store import Append, StoredEvent, StoreLimits

redis = pytest.importorskip("redis", reason="pip install 'unipinrec[redis]'")
pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
LIMITS = StoreLimits(events=100)
NOW = 1_700_000_000_000
Start = Callable[..., int]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a server with options, which ends with the test; returns its port."""
    with contextlib.ExitStack() as servers:

        def begin(*options: str) -> int:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port: int = free.getsockname()[1]
            folder = tmp_path / str(port)
            folder.mkdir()
            words = [
                "redis-server",
                *options,
                "--port",
                str(port),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--repl-diskless-sync-delay",
                "0",
            ]
            server = subprocess.Popen([*words, "--dir", str(folder)], stdout=subprocess.DEVNULL)
            servers.callback(server.wait, 20)
            servers.callback(server.kill)
            until(lambda: bool(redis.Redis(port=port).info()))
            return port

        yield begin


def until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        with contextlib.suppress(redis.RedisError):
            if true():
                return
        time.sleep(0.02)
    raise AssertionError("not in time")


class Address:
    """A stable address that leads to one of several servers; connections stay where they began."""

    def __init__(self, port: int) -> None:
        self.target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self.target))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def add(store: RedisEventStore, name: str) -> int:
    event = StoredEvent(item=name, actions=(), id=name)
    return store.append([Append(user="u", events=(event,))], NOW).result(20)[0].appended


def names(store: RedisEventStore) -> str:
    (events,) = store.histories(["u"]).result(20)
    return "".join(str(event.item) for event in events)


def test_writes_go_to_the_new_main_server_after_a_failover(start: Start) -> None:
    """The old server lives on as a replica, and keeps its connections: it refuses writes, but answers."""
    ports = start(), start()
    old, new = (redis.Redis(port=port) for port in ports)
    new.replicaof("127.0.0.1", ports[0])
    address = Address(ports[0])
    store = RedisEventStore(address.url, LIMITS)
    assert add(store, "a") == 1
    until(lambda: new.dbsize() == 1 and bool(new.info()["master_link_status"] == "up"))
    new.replicaof("NO", "ONE")
    old.replicaof("127.0.0.1", ports[1])
    address.target = ports[1]
    for name in "bcd":
        assert add(store, name) == 1
    assert names(store) == "abcd"
    assert store.forget("u").result(20) == 4
    assert new.dbsize() == 0
    store.close()
    address.close()


def test_a_server_that_only_reads_is_an_error_until_it_writes_again(start: Start) -> None:
    port = start()
    store, server = RedisEventStore(f"redis://127.0.0.1:{port}", LIMITS), redis.Redis(port=port)
    assert add(store, "a") == 1
    server.replicaof("127.0.0.1", 1)
    with pytest.raises(BackendError, match="read only replica"):
        add(store, "b")
    server.replicaof("NO", "ONE")
    assert add(store, "b") == 1
    assert names(store) == "ab"
    store.close()


def test_closed_connections_are_opened_again(start: Start) -> None:
    port = start()
    store, server = RedisEventStore(f"redis://127.0.0.1:{port}", LIMITS), redis.Redis(port=port)
    assert add(store, "a") == 1
    server.client_kill_filter(_type="normal", skipme=True)
    assert names(store) == "a"
    server.client_kill_filter(_type="normal", skipme=True)
    assert add(store, "b") == 1
    store.close()


def test_commands_of_old_servers_suffice(start: Start) -> None:
    """GETDEL, for example, came with version 6.2."""
    renamed = [word for name in ("GETDEL", "GETEX", "COPY") for word in ("--rename-command", name, "")]
    store = RedisEventStore(f"redis://127.0.0.1:{start(*renamed)}", LIMITS)
    assert add(store, "a") == 1
    assert (store.forget("u").result(20), store.forget("u").result(20)) == (1, 0)
    store.close()


def test_what_is_no_single_server_is_refused_at_the_start(start: Start, tmp_path: Path) -> None:
    cluster = start("--cluster-enabled", "yes")
    with pytest.raises(BackendError, match="is a node of a cluster, which is not supported; give the address of one"):
        open_store(f"redis://127.0.0.1:{cluster}/0", LIMITS)
    settings = tmp_path / "sentinel.conf"
    settings.write_text("")
    sentinel = start(str(settings), "--sentinel")
    with pytest.raises(BackendError, match="is a Sentinel, which is not supported"):
        open_store(f"redis://127.0.0.1:{sentinel}/0", LIMITS)
    with pytest.raises(BackendError, match=r"redis\+sentinel://.*Sentinel and clusters are not supported"):
        open_store("redis+sentinel://127.0.0.1:26379/main", LIMITS)


def test_what_the_store_needs_is_checked_at_the_start(start: Start) -> None:
    url = "redis://127.0.0.1:" + str(start("--rename-command", "EVAL", ""))
    with pytest.raises(BackendError, match="unknown command 'EVAL'"):
        open_store(url, LIMITS)
    with pytest.raises(BackendError, match="leave decode_responses out of the URL"):
        open_store(f"{url}?decode_responses=True", LIMITS)
