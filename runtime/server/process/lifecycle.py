"""The life of a server process: listen, load, serve, and on SIGTERM answer what was accepted before it ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from unipinrec.errors import ConfigError
from unipinrec.runtime.machine import keep_memory_flat
from unipinrec.runtime.server.call import Server
from unipinrec.runtime.server.swap import Deployments

KEEP_ALIVE_S = 75  # longer than what proxies keep idle connections for, so that they end them and not we
BACKLOG = 2_048
BEAT_S = 1.0
LINGER_S = 0.5  # after the last connection was accepted: what a client has sent by then is read and answered
# The event loop waits this long at most for a batch that holds the interpreter; Python's own 5 ms are felt in the p99.
SWITCH_INTERVAL_S = 1e-3
# Python's own (700, 10, 10) looks through all objects of the process again and again: 40 ms, in which nobody is served.
GC_THRESHOLDS = (50_000, 20, 100)
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where to listen, and how to end.

    Attributes:
        host, port: The address; port 0 = one that is free, which the log names.
        drain_delay_s: How long after SIGTERM connections are still accepted. Meanwhile /health/ready says 503, so that
            load balancers go elsewhere, and every answer ends its connection.
        drain_s: How long after that the requests that were accepted may take.
        hung_s: Of processes that serve together, one whose event loop stands still for so long is killed and replaced.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    drain_delay_s: float = 1.0
    drain_s: float = 30.0
    hung_s: float = 30.0

    def __post_init__(self) -> None:
        if not (self.drain_delay_s >= 0 and self.drain_s >= 1):
            raise ConfigError(
                f"drain_delay_s={self.drain_delay_s} must be at least 0, drain_s={self.drain_s} at least 1"
            )
        if not self.hung_s >= 2 * BEAT_S:
            raise ConfigError(f"hung_s={self.hung_s} must be at least {2 * BEAT_S:g}")


@dataclass(frozen=True, kw_only=True)
class Worker:
    """The place of one process among those that serve together.

    Attributes:
        index: From 0 on.
        count: How many there are.
        folder: Where each of them makes a socket for the others as soon as it serves.
        listener: What clients connect to; all of them accept from it.
        again: Start with what served last here: what was to be served did not come up.
    """

    index: int
    count: int
    folder: Path
    listener: socket.socket
    again: bool = False

    def note(self, bundle: Path) -> None:
        """Remember what serves, for processes that are started again."""
        new = self.folder / f"{self.index}.last"
        new.write_text(str(bundle.absolute()))
        new.replace(self.folder / "last")

    def last_served(self) -> Path | None:
        """The bundle that took over last in one of the processes; None if there is none yet."""
        try:
            return Path((self.folder / "last").read_text())
        except FileNotFoundError:
            return None

    def socket_of(self, index: int) -> Path:
        """The socket of a process; its time of change is that of the last beat of the event loop."""
        return self.folder / f"{index}.sock"


def run(
    server: Server, app: Starlette, load: Callable[[], Deployments], options: RunOptions, worker: Worker | None = None
) -> None:
    """Serve until a signal ends it; then all that was accepted is answered, and everything is closed.

    Args:
        server: What the application's handlers share; it is opened when `load` is done.
        app: The application.
        load: Called in a thread of its own, while the server already says that it is not ready. Of processes that serve
            together one that loads accepts nothing, for others may be ready.
        options: Where to listen, and how to end.
        worker: Of this process among those that serve together; None = it serves alone.

    Raises:
        ConfigError: The address cannot be had.
        UnipinrecError: What `load` raises.
    """
    with worker.listener if worker else listen(options.host, options.port) as listener:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.set_threshold(*GC_THRESHOLDS)
        keep_memory_flat()
        process = _Process(app, server, load, options, worker)
        try:
            process.run(sockets=[listener])
        finally:
            if server.deployments is not None and not server.deployments.close(timeout_s=options.drain_s):
                log.warning("ended before all that was computed was done")
            server.threads.shutdown()
            server.store.close()
    if process.failure is not None:
        raise process.failure


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to.

    Raises:
        ConfigError: The address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from error
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    return listener


class _Process(uvicorn.Server):
    """uvicorn, with loading in the background, and an end in two steps."""

    def __init__(
        self,
        app: Starlette,
        server: Server,
        load: Callable[[], Deployments],
        options: RunOptions,
        worker: Worker | None,
    ) -> None:
        super().__init__(_config(app, options))
        self.failure: BaseException | None = None
        self._server, self._load, self._options, self._worker = server, load, options, worker
        self._ends: float | None = None
        self._beating: asyncio.Task[None] | None = None  # a loop holds its tasks weakly

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._load_in, args=(loop,), name="unipinrec-load", daemon=True).start()
        while self._worker is not None and self._server.deployments is None and not self.should_exit:
            await asyncio.sleep(0.02)
        if self.should_exit:
            return
        await super().startup(sockets)
        if self._worker is not None:
            path = self._worker.socket_of(self._worker.index)
            self.servers.append(await loop.create_unix_server(self._protocol, path))
            self._beating = loop.create_task(_beat(path))

    def _load_in(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError):  # the server has ended meanwhile
            try:
                deployments = self._load()
            except BaseException as error:  # whatever it is, the process must end with it
                loop.call_soon_threadsafe(self._failed, error)
            else:
                loop.call_soon_threadsafe(self._server.open, deployments)

    def _failed(self, error: BaseException) -> None:
        self.failure, self.should_exit = error, True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first SIGTERM begins the end, a further signal hastens it; a last Ctrl-C waits for nothing."""
        if self.should_exit:
            self.force_exit = sig == signal.SIGINT
        elif sig == signal.SIGTERM and self._server.phase == "ready":
            self._ends = time.monotonic() + self._options.drain_delay_s
        else:
            self.should_exit = True
        self._server.phase = "draining"

    async def on_tick(self, counter: int) -> bool:
        if self._ends is not None and time.monotonic() >= self._ends:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, answer all that was accepted, then end."""
        await self._accept_the_last(sockets or [])
        await self._read_the_last()
        await super().shutdown(sockets)

    async def _accept_the_last(self, sockets: list[socket.socket]) -> None:
        """Closing a socket resets the connections that wait in it, though their clients think they are served."""
        waiting = [listener.dup() for listener in sockets]
        for server in self.servers:
            server.close()
        for listener in sockets:
            listener.close()
        await asyncio.sleep(0)  # uvloop closes a step later
        accepted = []
        for listener in waiting:
            listener.setblocking(False)
            with listener, suppress(BlockingIOError):
                while True:
                    accepted.append(listener.accept()[0])
        loop = asyncio.get_running_loop()
        for connection in accepted:
            await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        state, app_state = self.server_state, self.lifespan.state
        return self.config.http_protocol_class(config=self.config, server_state=state, app_state=app_state)  # type: ignore[call-arg]  # as uvicorn has it

    async def _read_the_last(self) -> None:
        """uvicorn closes a connection whose request it has not begun to read."""
        ends = time.monotonic() + LINGER_S
        while self.server_state.connections and time.monotonic() < ends and not self.force_exit:
            await asyncio.sleep(0.01)


async def _beat(path: Path) -> None:
    """Show the parent process that the event loop turns, until the loop ends."""
    while True:
        with suppress(FileNotFoundError):  # its server was closed
            os.utime(path)
        await asyncio.sleep(BEAT_S)


def _config(app: Starlette, options: RunOptions) -> uvicorn.Config:
    http: Any = "h11"
    if find_spec("httptools") is not None:
        from unipinrec.runtime.server.process.http import BoundedHttp  # noqa: PLC0415 - needs httptools

        http = BoundedHttp
    return uvicorn.Config(
        app,
        http=http,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(options.drain_s),
    )
