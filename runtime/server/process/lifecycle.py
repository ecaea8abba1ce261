"""The life of a server process: listen, load, serve, and on SIGTERM answer all accepted requests before it ends."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import math
import os
import resource
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Set
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

KEEP_ALIVE_S = 75  # longer than proxies keep idle connections, so that they close them first
BACKLOG = 2_048
MOST_FILES = 1 << 16  # the limit of open files is raised to this, if it may be
OWN_FILES = 48  # open files that are no client's connection, also while a bundle is swapped
BEAT_S = 1.0
PARENT_S = 1.0  # one of several processes awaits its parent's second signal for so long
HANDSHAKE_S = 0.1  # after new connections are stopped: time for handshakes under way
LINGER_S = 0.5  # after the last connection was accepted: time for a request on it to arrive
FIRST_REQUEST_S = 2.0  # the same, for connections that have not had a request
TLS_END_S = 1.0  # for a client to confirm the end of its connection
# The socket option of Linux, and a program that drops packets with the flag SYN, which open a connection.
SO_ATTACH_FILTER = 26
DROP_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
# The event loop waits at most this long for a batch that holds the interpreter; Python's own 5 ms raise the p99.
SWITCH_INTERVAL_S = 1e-3
# Python's default of (700, 10, 10) scans all objects of the process often, and stops it for 40 ms each time.
GC_THRESHOLDS = (50_000, 20, 100)
Load = Callable[[], Deployments]
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where to listen, and how to end.

    Attributes:
        host, port: The address; port 0 = any free port, which the log names.
        drain_delay_s: How long after SIGTERM connections are still accepted. Meanwhile /health/ready answers 503, so
            that load balancers go elsewhere, and every answer closes its connection.
        drain_s: How long accepted requests may take after that.
        hung_s: Of several processes, one whose event loop stands still for so long is killed and replaced.
        tls_cert, tls_key: PEM files of the certificate and its key, read again when they change; None = no TLS.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    drain_delay_s: float = 1.0
    drain_s: float = 30.0
    hung_s: float = 30.0
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.drain_delay_s < math.inf and 1 <= self.drain_s < math.inf):
            raise ConfigError(
                f"drain_delay_s={self.drain_delay_s} must be at least 0, drain_s={self.drain_s} at least 1"
            )
        if not self.hung_s >= 2 * BEAT_S:
            raise ConfigError(f"hung_s={self.hung_s} must be at least {2 * BEAT_S:g}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError(f"tls_cert={self.tls_cert} and tls_key={self.tls_key} go together; give both or neither")


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One of several processes that serve together.

    Attributes:
        index: Number of the process, from 0.
        count: Number of processes.
        folder: Folder in which each ready process makes a socket for the others.
        listener: The socket for clients; all processes accept from it.
        again: Whether the process failed to load its bundle; it then loads the last active one.
    """

    index: int
    count: int
    folder: Path
    listener: socket.socket
    again: bool = False

    def note(self, bundle: Path) -> None:
        """Note the active bundle, for processes that are restarted."""
        new = self.folder / f"{self.index}.last"
        new.write_text(str(bundle.absolute()))
        new.replace(self.folder / "last")

    def last_served(self) -> Path | None:
        """The last bundle that any process made active; None if there is none yet."""
        try:
            return Path((self.folder / "last").read_text())
        except FileNotFoundError:
            return None

    def socket_of(self, index: int) -> Path:
        """The socket of a process; its modification time is that of the event loop's last beat."""
        return self.folder / f"{index}.sock"


def run(server: Server, app: Starlette, load: Load, options: RunOptions, worker: Worker | None = None) -> None:
    """Serve until a signal; then answer all accepted requests, and close everything.

    Args:
        server: Shared by the application's handlers; it is opened when `load` is done.
        app: The application.
        load: Runs in a thread, while the server already answers that it is not ready. One of several processes accepts
            no connections meanwhile, for others may be ready.
        options: Where to listen, and how to end.
        worker: This process among several; None = it is the only one.

    Raises:
        ConfigError: The address is not available.
        UnipinrecError: Raised by `load`.
    """
    with worker.listener if worker else listen(options) as listener:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.set_threshold(*GC_THRESHOLDS)
        keep_memory_flat()
        process = _Process(app, server, load, options, worker)
        try:
            process.run(sockets=[listener])
        finally:
            if server.deployments is not None and not server.deployments.close(timeout_s=options.drain_s):
                log.warning("ended before all computations were done")
    if process.failure is not None:
        raise process.failure


def listen(options: RunOptions) -> socket.socket:
    """A socket that clients can connect to.

    Raises:
        ConfigError: The address is not available.
    """
    host, port = options.host, options.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = host == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from error
    host, port = listener.getsockname()[:2]
    scheme = "http" if options.tls_cert is None else "https"
    log.info("listening on %s://%s:%d", scheme, f"[{host}]" if ":" in host else host, port)
    return listener


def stop_connections(listener: socket.socket) -> None:
    """Let no new connection begin, while those that have begun can still be accepted.

    Otherwise one that begins between the last accept and the close is established, and then reset. Clients see a
    connection that is refused a second later. It concerns all processes that share the socket. Only Linux can do it,
    and gVisor only for root; elsewhere that moment remains.
    """
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in DROP_SYN)
    kept = ctypes.create_string_buffer(program, len(program))
    if sys.platform == "linux":
        pointer = struct.pack("HP", len(DROP_SYN), ctypes.addressof(kept))
        try:
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, pointer)
        except PermissionError as error:
            log.warning("connections that begin as the socket closes may be reset, for no filter is allowed: %s", error)


class _Process(uvicorn.Server):
    """uvicorn, with loading in the background and an end in two steps."""

    def __init__(self, app: Starlette, server: Server, load: Load, options: RunOptions, worker: Worker | None) -> None:
        super().__init__(_config(app, options, server.access.tls()))
        self.failure: BaseException | None = None
        self._server, self._load, self._options, self._worker = server, load, options, worker
        self._ends: float | None = None
        self._beating: asyncio.Task[None] | None = None  # a loop holds its tasks weakly
        self._ending: asyncio.Task[None] | None = None

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
            except BaseException as error:  # any failure must end the process
                loop.call_soon_threadsafe(self._failed, error)
            else:
                loop.call_soon_threadsafe(self._server.open, deployments)

    def _failed(self, error: BaseException) -> None:
        self.failure, self.should_exit = error, True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first SIGTERM starts draining, the next signal ends that; later ones wait for no answer if by Ctrl-C."""
        if self.should_exit:
            self.force_exit = sig == signal.SIGINT
        elif sig == signal.SIGTERM and self._server.phase == "ready":
            self._ends = time.monotonic() + self._options.drain_delay_s + (PARENT_S if self._worker else 0)
        else:
            self.should_exit = True
        self._server.phase = "draining"

    async def on_tick(self, counter: int) -> bool:
        if self._ends is not None and time.monotonic() >= self._ends:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop to accept, answer all accepted requests, then end.

        Closing a socket resets the connections that wait in it, so those are accepted first. And uvicorn closes
        connections whose request it has not begun to read, so it gets some time to read them.
        """
        if self._worker is None:  # otherwise the parent has done it
            for listener in sockets or []:
                stop_connections(listener)
        await asyncio.sleep(HANDSHAKE_S)
        waiting = [listener.dup() for listener in sockets or []]
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        await asyncio.sleep(0)  # uvloop closes a step later
        accepted = []
        for listener in waiting:
            listener.setblocking(False)
            with listener, suppress(BlockingIOError):
                while True:
                    accepted.append(listener.accept()[0])
        loop, tls = asyncio.get_running_loop(), self.config.ssl
        limit_s = FIRST_REQUEST_S if tls else None
        connecting = (
            loop.connect_accepted_socket(self._protocol, connection, ssl=tls, ssl_handshake_timeout=limit_s)
            for connection in accepted
        )
        await asyncio.gather(*connecting, return_exceptions=True)  # clients may leave, or not speak TLS
        began, connections = time.monotonic(), self.server_state.connections
        while (connections or tls) and not self.force_exit:  # a TLS handshake under way is not among them yet
            fresh = any(getattr(connection, "cycle", None) is None for connection in connections)
            if time.monotonic() > began + (FIRST_REQUEST_S if fresh else LINGER_S):
                break
            await asyncio.sleep(0.01)
        if tls:
            self._ending = loop.create_task(_end_tls(connections))
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        state, app_state = self.server_state, self.lifespan.state
        return self.config.http_protocol_class(config=self.config, server_state=state, app_state=app_state)  # type: ignore[call-arg]  # as uvicorn has it


async def _end_tls(connections: Set[Any]) -> None:
    """Abort connections that were closed: TLS waits 30 s for the client's own end, which idle clients do not send."""
    while True:
        closed = {connection for connection in connections if connection.transport.is_closing()}
        await asyncio.sleep(TLS_END_S)
        for connection in closed & connections:
            connection.transport.abort()


async def _beat(path: Path) -> None:
    """Show the parent process that the event loop runs."""
    while True:
        with suppress(FileNotFoundError):  # its server was closed
            os.utime(path)
        await asyncio.sleep(BEAT_S)


def _config(app: Starlette, options: RunOptions, tls: ssl.SSLContext | None) -> uvicorn.Config:
    http: Any = "h11"
    if find_spec("httptools") is not None:
        from unipinrec.runtime.server.process.http import BoundedHttp  # noqa: PLC0415 - needs httptools

        http = BoundedHttp
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < MOST_FILES:
        files = MOST_FILES if most == resource.RLIM_INFINITY else max(files, min(most, MOST_FILES))
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    return uvicorn.Config(
        app,
        http=http,
        ws="none",
        ssl_context_factory=None if tls is None else lambda *_: tls,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        limit_concurrency=max(1, files - OWN_FILES),
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(options.drain_s),
    )
