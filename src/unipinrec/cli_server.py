"""`unipinrec serve`: the HTTP server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unipinrec.cli_common import command
from unipinrec.cli_serve import bundle_argument, device_option, engines_option, strict_option

if TYPE_CHECKING:
    from unipinrec.runtime.server_app import ServerOptions
    from unipinrec.runtime.server_deployment import DeploymentOptions
    from unipinrec.runtime.server_run import RunOptions

EXAMPLES = """\b
Examples:
  unipinrec serve bundle/
  unipinrec serve bundle/ --host 0.0.0.0 --port 8000 --state /var/lib/unipinrec --cache-mib 8192
  unipinrec serve bundle/ --state redis://cache:6379/0 --deadline-ms 200 --queue 512
  curl localhost:8000/health/ready"""

KEPT_HISTORIES = 2
MEBIBYTE = 1 << 20
log = logging.getLogger(__name__)
positive = click.FloatRange(0, min_open=True)


@click.command(epilog=EXAMPLES)
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 = all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 = one that is free.")
@device_option
@strict_option
@engines_option
@click.option(
    "--state",
    metavar="DIR|URL",
    help="Where users' events are kept: a folder, or redis://HOST:PORT/DB.  [default: memory, until the server ends]",
)
@click.option(
    "--max-users",
    type=click.IntRange(1),
    default=100_000,
    show_default=True,
    help="Users whose events are kept, in memory or a folder; then those go who were not heard of for longest.",
)
@click.option(
    "--kept-events",
    type=click.IntRange(1),
    help=f"Events kept of a user.  [default: {KEPT_HISTORIES} times the longest history of the model]",
)
@click.option(
    "--cache-mib",
    type=click.IntRange(0),
    default=1024,
    show_default=True,
    help="Memory for encoded histories; 0 = encode every history anew.",
)
@click.option(
    "--cache-dtype",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    default="int8",
    show_default=True,
    help="Precision that encoded histories are kept in.",
)
@click.option("--cache-ttl-s", type=positive, help="Drop encoded histories that were not used for so long.")
@click.option("--max-batch", type=click.IntRange(1), default=32, show_default=True, help="Requests answered together.")
@click.option(
    "--max-wait-ms",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    help="How long a request waits for others to be answered with, while nothing else is computed.",
)
@click.option(
    "--queue",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Requests that wait or are computed; further ones get 429 at once.",
)
@click.option(
    "--deadline-ms",
    type=positive,
    default=2000.0,
    show_default=True,
    help="How long a request may take, unless its header X-Deadline-Ms says otherwise; then it gets 504.",
)
@click.option(
    "--max-deadline-ms", type=positive, default=30_000.0, show_default=True, help="The most that X-Deadline-Ms may say."
)
@click.option(
    "--drain-delay-s",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="How long after SIGTERM new connections are still accepted, while /health/ready says 503.",
)
@click.option(
    "--drain-s", type=click.FloatRange(1), default=30.0, show_default=True, help="How long the rest may then take."
)
@command
def serve(bundle: Path, state: str | None, max_users: int, kept_events: int | None, **options: Any) -> None:
    """Serve a bundle over HTTP: recommendations, users' events, similar items, health."""
    from unipinrec.runtime.bundle import read_manifest
    from unipinrec.runtime.event_store import StoreLimits, open_store
    from unipinrec.runtime.server_app import make_app, make_server
    from unipinrec.runtime.server_run import run
    from unipinrec.runtime.server_state import Deployment, Deployments

    deployment, treatment, process = _deployment(options), _server(options), _process(options)
    manifest, _ = read_manifest(bundle)
    limits = StoreLimits(events=kept_events or KEPT_HISTORIES * manifest.model.max_history, users=max_users)
    store = open_store(state, limits)
    log.info("users' events are kept in %s", store.description)
    server = make_server(treatment, store=store)
    app = make_app(server)
    run(server, app, lambda: Deployments(Deployment.open(bundle, deployment)), process)


def _deployment(options: dict[str, Any]) -> DeploymentOptions:
    from unipinrec.runtime.batching import BatchOptions
    from unipinrec.runtime.kv_options import CacheOptions
    from unipinrec.runtime.server_deployment import DeploymentOptions

    budget_bytes = options["cache_mib"] * MEBIBYTE
    cache = CacheOptions(budget_bytes=budget_bytes, dtype=options["cache_dtype"], ttl_s=options["cache_ttl_s"])
    return DeploymentOptions(
        device=options["device"],
        strict=options["strict"],
        allow_bundle_engines=options["allow_bundle_engines"],
        cache=cache if budget_bytes else None,
        batching=BatchOptions(max_batch=options["max_batch"], max_wait_ms=options["max_wait_ms"]),
    )


def _server(options: dict[str, Any]) -> ServerOptions:
    from unipinrec.runtime.server_api import Limits
    from unipinrec.runtime.server_app import ServerOptions

    return ServerOptions(
        limits=Limits(batch=min(Limits.batch, options["queue"])),
        queue=options["queue"],
        deadline_ms=options["deadline_ms"],
        max_deadline_ms=options["max_deadline_ms"],
    )


def _process(options: dict[str, Any]) -> RunOptions:
    from unipinrec.runtime.server_run import RunOptions

    return RunOptions(
        host=options["host"], port=options["port"], drain_delay_s=options["drain_delay_s"], drain_s=options["drain_s"]
    )
