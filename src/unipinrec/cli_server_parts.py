"""From the options of `unipinrec serve` to a running server."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from starlette.routing import BaseRoute

from unipinrec import __version__
from unipinrec.runtime.batching import BatchOptions
from unipinrec.runtime.bundle import read_manifest
from unipinrec.runtime.event_store import StoreLimits, open_store
from unipinrec.runtime.kv_options import CacheOptions
from unipinrec.runtime.server_admin import CURRENT, AdminOptions, CurrentWatcher, admin_routes, read_current, read_token
from unipinrec.runtime.server_api import Limits
from unipinrec.runtime.server_app import Server, ServerOptions, make_app, make_server
from unipinrec.runtime.server_deployment import Deployment, DeploymentOptions
from unipinrec.runtime.server_log import LogOptions, RequestLog, configure_logs
from unipinrec.runtime.server_metrics import Metrics, metrics_route
from unipinrec.runtime.server_oip import oip_routes
from unipinrec.runtime.server_openapi import openapi_route
from unipinrec.runtime.server_page import page_routes
from unipinrec.runtime.server_recall import RecallSampler
from unipinrec.runtime.server_run import RunOptions, run
from unipinrec.runtime.server_state import Deployments
from unipinrec.runtime.server_trace import OtelSpans, Traces, trace_route

KEPT_HISTORIES = 2
MEBIBYTE = 1 << 20
log = logging.getLogger(__name__)


def serve_bundle(bundle: Path, options: dict[str, Any]) -> None:
    """Serve until a signal ends it.

    Raises:
        UnipinrecError: An option cannot be had, or the bundle cannot be served.
    """
    logs = LogOptions(format=options["log_format"], level=options["log_level"], users=options["log_users"])
    configure_logs(logs)
    folder = options["bundles"] or bundle.absolute().parent
    if options["watch"] and (folder / CURRENT).exists():
        bundle = read_current(folder)
    manifest, _ = read_manifest(bundle)
    process = RunOptions(**{name: options[name] for name in ("host", "port", "drain_delay_s", "drain_s")})
    with ExitStack() as parts:
        sampler = RecallSampler(options["recall_share"]) if options["recall_share"] else None
        if sampler is not None:
            parts.callback(sampler.close)
        deployment = _deployment(options, sampler)
        server = _server(options, manifest.model.max_history)
        routes = _observed(server, options, sampler, parts)
        routes += [*oip_routes(server, version=__version__), openapi_route(server, __version__)]
        routes += page_routes(server) if options["page"] else []
        server.observers.append(RequestLog(logs).observe)
        if options["admin_token_file"] or options["admin_token_env"]:
            token = read_token(file=options["admin_token_file"], variable=options["admin_token_env"])
            routes += admin_routes(server, AdminOptions(folder=folder, token=token))

        def load() -> Deployments:
            deployments = Deployments(Deployment.open(bundle, deployment))
            if options["watch"]:
                watcher = CurrentWatcher(deployments, folder)
                parts.callback(watcher.stop)
                watcher.start()
            return deployments

        run(server, make_app(server, routes), load, process)


def _observed(
    server: Server, options: dict[str, Any], sampler: RecallSampler | None, parts: ExitStack
) -> list[BaseRoute]:
    """Let metrics, traces and spans see every request; returns their routes."""
    metrics = Metrics(server, sampler)
    server.observers.append(metrics.observe)
    routes: list[BaseRoute] = [metrics_route(server, metrics)]
    if options["traces"]:
        traces = Traces()
        server.observers.append(traces.observe)
        routes.append(trace_route(server, traces))
    if options["otel"]:
        spans = OtelSpans.open()
        parts.callback(spans.close)
        server.observers.append(spans.observe)
    return routes


def _deployment(options: dict[str, Any], sampler: RecallSampler | None) -> DeploymentOptions:
    budget_bytes = options["cache_mib"] * MEBIBYTE
    cache = CacheOptions(budget_bytes=budget_bytes, dtype=options["cache_dtype"], ttl_s=options["cache_ttl_s"])
    return DeploymentOptions(
        device=options["device"],
        strict=options["strict"],
        allow_bundle_engines=options["allow_bundle_engines"],
        cache=cache if budget_bytes else None,
        batching=BatchOptions(
            max_batch=options["max_batch"], max_wait_ms=options["max_wait_ms"], workers=options["batches"]
        ),
        sampler=sampler,
    )


def _server(options: dict[str, Any], max_history: int) -> Server:
    treatment = ServerOptions(
        limits=Limits(batch=min(Limits.batch, options["queue"])),
        queue=options["queue"],
        deadline_ms=options["deadline_ms"],
        max_deadline_ms=options["max_deadline_ms"],
    )
    kept = options["kept_events"] or KEPT_HISTORIES * max_history
    memory_bytes = options["events_mib"] * MEBIBYTE
    limits = StoreLimits(events=kept, users=options["max_users"], memory_bytes=memory_bytes)
    store = open_store(options["state"], limits)
    log.info("users' events are kept in %s", store.description)
    return make_server(treatment, store=store)
