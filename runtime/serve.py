"""From the options of `unipinrec serve` to a running server."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import BaseRoute

from unipinrec import __version__
from unipinrec.errors import ConfigError, UnipinrecError
from unipinrec.runtime.batching import BatchOptions
from unipinrec.runtime.bundle.bundle import read_manifest
from unipinrec.runtime.kv.options import CacheOptions
from unipinrec.runtime.machine import available_threads, usable_bytes
from unipinrec.runtime.retrieval.sampling import RecallSampler
from unipinrec.runtime.serve_options import MEBIBYTE, ServeOptions, memory_of
from unipinrec.runtime.server import handlers
from unipinrec.runtime.server.access.access import Access, read_certificate
from unipinrec.runtime.server.access.files import Reloaded
from unipinrec.runtime.server.access.rate_limit import RateLimit
from unipinrec.runtime.server.access.tokens import read_admin_token, read_tokens
from unipinrec.runtime.server.admin import CURRENT, CurrentWatcher, admin_routes, read_current
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
from unipinrec.runtime.server.process.lifecycle import Worker, run
from unipinrec.runtime.server.process.peers import Peers
from unipinrec.runtime.server.process.supervisor import serve_together
from unipinrec.runtime.server.swap import Deployments
from unipinrec.runtime.server.v2.graphs import GraphLimits
from unipinrec.runtime.server.v2.routes import oip_routes

__all__ = ["ServeOptions", "serve_bundle"]
KEPT_HISTORIES = 2
GZIP_BYTES = 1_000  # shorter answers are not compressed
BATCH_OF_A_THREAD = 16
log = logging.getLogger(__name__)


def serve_bundle(bundle: Path | str, options: ServeOptions | None = None) -> None:
    """Serve in the main thread until SIGTERM or SIGINT, with one process or several.

    It logs to stderr from then on, and handles both signals while it serves.

    Raises:
        UnipinrecError: An option is not possible, or the bundle cannot be served.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("serve_bundle handles signals: call it in the main thread, or in a process of its own")
    options, bundle = options or ServeOptions(), Path(bundle)
    configure_logs(_logs(options, None))
    _warn_of_strangers(options)
    if options.processes == 1:
        _serve(bundle, options, None)
        return
    if options.rate_limit is not None:
        log.warning(
            "each of %d processes counts for --rate-limit by itself; their sum may be as much more", options.processes
        )
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


def _warn_of_strangers(options: ServeOptions) -> None:
    """Say in the log what other machines can do."""
    with suppress(ValueError):
        if options.host == "localhost" or ip_address(options.host).is_loopback:
            return
    if options.tokens is None:
        log.warning(
            "%s can be reached from other machines, and without --tokens each of them may read, change and delete the "
            "events of users; docs/serving.md says how to make tokens",
            options.host,
        )
    if options.tls_cert is None:
        log.warning(
            "%s can be reached from other machines, and without --tls-cert everything travels unencrypted, tokens too; "
            "let a proxy encrypt it, or give a certificate",
            options.host,
        )


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
        server = _server(options, manifest.model.max_history, _access(options, parts))
        parts.callback(server.close)
        routes = _observed(server, options, sampler, peers, parts)
        if options.v2:
            routes += oip_routes(server, GraphLimits(work_bytes=deployment.work_bytes), version=__version__)
        routes += [openapi_route(server, __version__)]
        routes += page_routes(server, images=options.page_images) if options.page else []
        if options.processes == 1 and (options.tokens or server.access.admin):
            routes += admin_routes(server, folder)

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
        app = make_app(server, routes, **shared)
        _for_browsers(app, options)
        yield server, app, load


def _for_browsers(app: Starlette, options: ServeOptions) -> None:
    """Compress answers, and let pages of other origins read them, if the operator wants it."""
    if options.gzip:
        app.add_middleware(GZipMiddleware, minimum_size=GZIP_BYTES, compresslevel=1)
    if options.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )


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
    threads = options.threads or max(1, available_threads() // share)
    batches = options.batches or min(2, threads)
    cache_bytes, work_bytes = memory_of(options, share * (batches + options.v2), usable_bytes())
    budget_bytes = cache_bytes // share
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
            workers=batches,
        ),
        sampler=sampler,
        shared=worker.folder if worker else None,
        work_bytes=work_bytes,
    )


def _access(options: ServeOptions, parts: ExitStack) -> Access:
    """Who may send requests; files that change are watched until the end."""
    admin, certificate, tokens = None, None, None
    if options.admin_token_file or options.admin_token_env:
        admin = read_admin_token(file=options.admin_token_file, variable=options.admin_token_env)
    if options.tokens is not None:
        tokens = parts.enter_context(Reloaded(partial(read_tokens, options.tokens), [options.tokens]))
    if options.tls_cert is not None and options.tls_key is not None:
        read = partial(read_certificate, options.tls_cert, options.tls_key)
        certificate = parts.enter_context(Reloaded(read, [options.tls_key, options.tls_cert]))
    limit = RateLimit(options.rate_limit, options.rate_burst) if options.rate_limit is not None else None
    return Access(tokens=tokens, admin=admin, limit=limit, certificate=certificate)


def _server(options: ServeOptions, max_history: int, access: Access) -> Server:
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
    return make_server(server, access=access, store=store)


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
