"""A real server on a free port of this machine, for as long as a test needs it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp

from unipinrec.runtime.kv.options import CacheOptions
from unipinrec.runtime.popular import ColdStart
from unipinrec.runtime.serve import ServeOptions, assembled
from unipinrec.runtime.server.deployment import Deployment, DeploymentOptions
from unipinrec.runtime.server.swap import Deployments

SMALL = ServeOptions(device="cpu", cache_mib=8)


@contextmanager
def deployed(bundle: Path, cold_start: ColdStart = "popular") -> Iterator[Deployments]:
    """A bundle in service on the CPU, with a small cache."""
    options = DeploymentOptions(device="cpu", cache=CacheOptions(budget_bytes=8 << 20), cold_start=cold_start)
    deployments = Deployments(Deployment.open(bundle, options))
    try:
        yield deployments
    finally:
        assert deployments.close(timeout_s=30)


@contextmanager
def served(bundle: Path, options: ServeOptions = SMALL) -> Iterator[Starlette]:
    """All that `unipinrec serve` answers with, in this process."""
    with assembled(bundle, options) as (server, app, load):
        server.open(deployments := load())
        yield app
        assert deployments.close(timeout_s=30)


@contextmanager
def listening(app: ASGIApp) -> Iterator[int]:
    """The port on which an application answers."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    limit = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < limit, "the server does not start"
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
