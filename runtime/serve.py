"""From the options of `unipinrec serve` to a running server."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from starlette.applications import Starlette
from starlette.routing import BaseRoute

from unipinrec import __version__
from unipinrec.errors import ConfigError, UnipinrecError
from unipinrec.runtime.batching import BatchOptions
from unipinrec.runtime.bundle.bundle import read_manifest
from unipinrec.runtime.bundle.quality import KvDtype
from unipinrec.runtime.kv.options import CacheOptions
from unipinrec.runtime.machine import available_threads
from unipinrec.runtime.popular import ColdStart
from unipinrec.runtime.retrieval.sampling import RecallSampler
from unipinrec.runtime.server import handlers
from unipinrec.runtime.server.admin import CURRENT, AdminOptions, CurrentWatcher, admin_routes, read_current, read_token
from unipinrec.runtime.server.app import make_app, make_server
from unipinrec.runtime.server.bodies import Limits
from unipinrec.runtime.server.call import Handler, Server, ServerOptions
from unipinrec.runtime.server.deployment import Deployment, DeploymentOptions
from unipinrec.runtime.server.events.sqlite import SqliteEventStore
from unipinrec.runtime.server.events.store import EventStore, MemoryEventStore, StoreLimits
from unipinrec.runtime.server.observe.log import LogOptions, RequestLog, configure_logs
from unipinrec.runtime.server.observe.metrics import ServerMetrics, metrics_route
from unipinrec.runtime.server.observe.metrics_together import metrics_together_route
from unipinrec.runtime.server.observe.served_log import ServedLog, ServedLogOptions
from unipinrec.runtime.server.observe.trace import OtelSpans, Traces, trace_route
from unipinrec.runtime.server.openapi import openapi_route
from unipinrec.runtime.server.page import page_routes
from unipinrec.runtime.server.process.end import ending_with_its_threads
from unipinrec.runtime.server.process.lifecycle import RunOptions, Worker, run
from unipinrec.runtime.server.process.peers import Peers
from unipinrec.runtime.server.process.supervisor import serve_together
from unipinrec.runtime.server.swap import Deployments
from unipinrec.runtime.server.v2.routes import oip_routes

KEPT_HISTORIES = 2
BATCH_OF_A_THREAD = 16
MEBIBYTE = 1 << 20
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServeOptions(RunOptions):
    """The options of `unipinrec serve`, whose help explains each; five of them are those of `RunOptions`.

    Attributes:
        processes: Number of processes; they share the CPU's threads, `cache_mib` and `state`.
        threads: CPU threads of a process; None = its share of the available ones.
        device, strict, allow_bundle_engines, cold_start: See `Recommender.load`.
        gpu: Number of the GPU.
        state: A folder or URL for users' events; None = memory. See `open_store`.
        max_users, events_mib, kept_events: Most users, memory for their events, and most events of a user; None =
            twice the longest history of the model.
        cache_mib, cache_dtype, cache_ttl_s: See `CacheOptions`; 0 MiB = no cache.
        window_slack: See `Recommender.load`.
        max_batch, batches, max_wait_ms: See `BatchOptions`; None = derived from the threads.
        queue, deadline_ms, max_deadline_ms: See `ServerOptions`.
        bundles: The folder of all bundles; None = the folder that holds the bundle.
        watch: Swap to the bundle that `current.json` names.
        admin_token_file, admin_token_env: File or environment variable of the token of /admin; None = no /admin.
        page: Whether there is a page at /.
        log_format, log_level, log_users: See `LogOptions`.
        log_served, log_served_mib: Folder of the log of recommendations, and its largest size.
        recall_share: Share of the index's searches that are compared with a scan.
        traces, otel: Whether traces of requests are kept, and spans sent.
    """

    processes: int = 1
    threads: int | None = None
    device: str = "auto"
    strict: bool = False
    allow_bundle_engines: bool = False
    gpu: int = 0
    cold_start: ColdStart = "popular"
    state: str | None = None
    max_users: int = 100_000
    events_mib: int = 512
    kept_events: int | None = None
    cache_mib: int = 1024
    cache_dtype: KvDtype | None = None
    cache_ttl_s: float | None = None
    window_slack: int | None = None
    max_batch: int | None = None
    batches: int | None = None
    max_wait_ms: float = 0.0
    queue: int = 256
    deadline_ms: float = 2000.0
    max_deadline_ms: float = 30_000.0
    bundles: Path | None = None
    watch: bool = False
    admin_token_file: Path | None = None
    admin_token_env: str | None = None
    page: bool = True
    log_format: Literal["json", "human"] = "json"
    log_level: str = "info"
    log_users: bool = False
    log_served: Path | None = None
    log_served_mib: int = 1024
    recall_share: float = 0.001
    traces: bool = False
    otel: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("processes", "threads", "kept_events", "window_slack", "max_batch", "batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if self.cold_start not in get_args(ColdStart):
            raise ConfigError(f"cold_start={self.cold_start!r} must be one of {', '.join(get_args(ColdStart))}")
        if self.state == "":
            raise ConfigError("state='' names no folder; leave it out to keep users' events in memory")
        if self.bundles is not None and not Path(self.bundles).is_dir():
            raise ConfigError(f"bundles={str(self.bundles)!r} is not a folder")
        if self.processes > 1 and self.state is None:
            raise ConfigError(f"{self.processes} processes need a --state, so that all read the same events of a user")
        if self.processes > 1 and (self.admin_token_file or self.admin_token_env):
            raise ConfigError(
                f"{self.processes} processes swap by --watch, not by /admin: a restarted process must find the active "
                f"bundle in {CURRENT}; leave the admin token out"
            )


def serve_bundle(bundle: Path | str, options: ServeOptions | None = None) -> None:
    """Serve in the main thread until SIGTERM or SIGINT, with one process or several.

    It logs to stderr from then on, and handles both signals while it serves.

    Raises:
        UnipinrecError: An option is not possible, or the bundle cannot be served.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("serve_bundle handles signals: call it in the main thread, or in a process of its own")
    options, bundle = options or ServeOptions(), Path(bundle)
    if options.processes == 1:
        _serve(bundle, options, None)
        return
    configure_logs(_logs(options, None))
    serve_together(options.processes, partial(serve_worker, bundle, options), options)


def serve_command(bundle: Path, options: ServeOptions) -> None:
    """`unipinrec serve`: as `serve_bundle`, but the process ends by it. The log has the error that ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until it handles signals, for which nothing needs an end
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not started by nohup
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    configure_logs(_logs(options, None))
    with ending_with_its_threads(), _logged_error():
        serve_bundle(bundle, options)


def serve_worker(bundle: Path, options: ServeOptions, worker: Worker) -> None:
    """Serve with one of several processes, which ends with exit code 1 if it cannot."""
    configure_logs(_logs(options, worker))
    with ending_with_its_threads(), _logged_error():
        _serve(bundle, options, worker)


@contextmanager
def _logged_error() -> Iterator[None]:
    """Log the error that ends the process, in the format of its log."""
    try:
        yield
    except UnipinrecError as error:
        log.error("%s", error)
        sys.exit(1)


def _serve(bundle: Path, options: ServeOptions, worker: Worker | None) -> None:
    configure_logs(logs := _logs(options, worker))
    with assembled(_first_bundle(bundle, options, worker), options, worker) as (server, app, load):
        server.observers.append(RequestLog(logs).observe)
        run(server, app, load, options, worker)


def _first_bundle(bundle: Path, options: ServeOptions, worker: Worker | None) -> Path:
    """The bundle to load at first: `bundle`, unless `current.json` names another or it failed to load before."""
    folder = Path(options.bundles) if options.bundles else bundle.absolute().parent
    last = worker.last_served() if worker is not None and worker.again else None
    if last is not None:
        log.error("the bundle could not be loaded; the last active one is used: %s", last)
        return last
    if options.watch and (folder / CURRENT).exists():
        named = read_current(folder)
        if named.absolute() != bundle.absolute():
            log.warning("%s names %s, which is used instead of %s", folder / CURRENT, named.name, bundle)
        return named
    return bundle


def _logs(options: ServeOptions, worker: Worker | None) -> LogOptions:
    process = worker.index if worker else None
    return LogOptions(format=options.log_format, level=options.log_level, users=options.log_users, process=process)


@contextmanager
def assembled(
    bundle: Path, options: ServeOptions, worker: Worker | None = None
) -> Iterator[tuple[Server, Starlette, Callable[[], Deployments]]]:
    """The server of a bundle, its application, and a function that loads the bundle for `Server.open`.

    The log and the socket are not part of it.

    Raises:
        UnipinrecError: See `serve_bundle`.
    """
    folder = Path(options.bundles) if options.bundles else bundle.absolute().parent
    manifest, _ = read_manifest(bundle)
    peers = Peers(worker=worker) if worker else None
    with ExitStack() as parts:
        sampler = RecallSampler(options.recall_share) if options.recall_share else None
        if sampler is not None:
            parts.callback(sampler.close)
        deployment = _deployment(options, sampler, worker)
        server = _server(options, manifest.model.max_history)
        parts.callback(server.close)
        routes = _observed(server, options, sampler, peers, parts)
        routes += [*oip_routes(server, version=__version__), openapi_route(server, __version__)]
        routes += page_routes(server) if options.page else []
        if options.admin_token_file or options.admin_token_env:
            token = read_token(file=options.admin_token_file, variable=options.admin_token_env)
            routes += admin_routes(server, AdminOptions(folder=folder, token=token))

        def load() -> Deployments:
            deployments = Deployments(Deployment.open(bundle, deployment))
            device = deployments.current.recommender.device.name
            if worker is not None and not device.startswith(("cpu", "openvino")):
                deployments.close()
                raise ConfigError(
                    f"{worker.count} processes would each load the bundle into the GPU's memory; {device} needs one "
                    "process, several are for --device cpu and openvino"
                )
            if worker is not None:
                worker.note(deployments.current.path)
            if options.watch:
                watcher = CurrentWatcher(deployments, folder, swapped=worker.note if worker else lambda _: None)
                parts.callback(watcher.stop)
                watcher.start()
            return deployments

        shared: dict[str, Handler] = {}
        if peers is not None:
            shared = {
                "recommend": peers.at_owner(handlers.recommend),
                "rank": peers.at_owner(handlers.rank),
                "forget": peers.forgetting(handlers.forget_user),
            }
        yield server, make_app(server, routes, **shared), load


def _observed(
    server: Server, options: ServeOptions, sampler: RecallSampler | None, peers: Peers | None, parts: ExitStack
) -> list[BaseRoute]:
    """Let metrics, the log of recommendations, traces and spans observe every request; returns their routes."""
    metrics = ServerMetrics(server, sampler)
    server.observers.append(metrics.observe)
    scrape = metrics_together_route(server, metrics, peers) if peers else metrics_route(server, metrics)
    routes: list[BaseRoute] = [scrape]
    if options.log_served is not None:
        total_bytes = options.log_served_mib * MEBIBYTE
        served = ServedLog(ServedLogOptions(folder=Path(options.log_served), total_bytes=total_bytes))
        parts.callback(served.close)
        server.observers.append(served.observe)
        metrics.registry.register(served)
    if options.traces:
        traces = Traces()
        server.observers.append(traces.observe)
        routes.append(trace_route(server, traces, peers.anywhere if peers else None))
    if options.otel:
        spans = OtelSpans.open()
        parts.callback(spans.close)
        server.observers.append(spans.observe)
    return routes


def _deployment(options: ServeOptions, sampler: RecallSampler | None, worker: Worker | None) -> DeploymentOptions:
    """How bundles are opened; processes share memory and threads evenly."""
    share = worker.count if worker else 1
    budget_bytes = options.cache_mib * MEBIBYTE // share
    threads = options.threads or max(1, available_threads() // share)
    cache = CacheOptions(
        budget_bytes=budget_bytes, dtype=options.cache_dtype, ttl_s=options.cache_ttl_s, threads=threads
    )
    return DeploymentOptions(
        device=options.device,
        strict=options.strict,
        allow_bundle_engines=options.allow_bundle_engines,
        gpu=options.gpu,
        threads=threads,
        cache=cache if budget_bytes else None,
        window_slack=options.window_slack,
        cold_start=options.cold_start,
        batching=BatchOptions(
            max_batch=options.max_batch or BATCH_OF_A_THREAD * min(2, threads),
            max_wait_ms=options.max_wait_ms,
            workers=options.batches or min(2, threads),
        ),
        sampler=sampler,
        shared=worker.folder if worker else None,
    )


def _server(options: ServeOptions, max_history: int) -> Server:
    server = ServerOptions(
        limits=Limits(batch=min(Limits.batch, options.queue)),
        queue=options.queue,
        deadline_ms=options.deadline_ms,
        max_deadline_ms=options.max_deadline_ms,
    )
    kept = options.kept_events or KEPT_HISTORIES * max_history
    limits = StoreLimits(events=kept, users=options.max_users, memory_bytes=options.events_mib * MEBIBYTE)
    store = open_store(options.state, limits)
    log.info("users' events are kept in %s", store.description)
    return make_server(server, store=store)


def open_store(state: str | None, limits: StoreLimits) -> EventStore:
    """The store of users' events.

    Args:
        state: A folder, made if missing, or a URL of a Redis or Valkey server; None = this process's memory.
        limits: How much it keeps; a Redis server limits the number of users itself (`maxmemory`).

    Raises:
        BackendError: It cannot be opened.
    """
    if state is None:
        return MemoryEventStore(limits)
    if "://" in state:
        from unipinrec.runtime.server.events.redis import RedisEventStore  # noqa: PLC0415 - an extra

        return RedisEventStore(state, limits)
    return SqliteEventStore(Path(state), limits)
