"""`unipinrec serve`: the HTTP server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from unipinrec.cli.common import FiniteRange, command
from unipinrec.cli.recommend import bundle_argument, cold_start_option, device_option, engines_option, strict_option

EXAMPLES = """\b
Examples:
  unipinrec serve bundle/
  unipinrec serve bundle/ --host 0.0.0.0 --port 8000 --state /var/lib/unipinrec --cache-mib 8192
  unipinrec serve bundle/ --processes 4 --state /var/lib/unipinrec
  unipinrec serve bundle/ --log-served served/
  unipinrec serve bundle/ --state redis://cache:6379/0 --deadline-ms 200 --queue 512
  curl localhost:8000/health/ready"""

DAY_S = 86_400
positive = FiniteRange(0, min_open=True)


@click.command(epilog=EXAMPLES)
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 = all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 = one that is free.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Serve with so many processes at one port, which share the CPU's threads, --cache-mib and --state.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 4096),
    help="CPU threads that a process computes with.  [default: its share of what may be used]",
)
@device_option
@strict_option
@engines_option
@cold_start_option
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
    "--events-mib",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Memory for users' events where no --state is given; beyond it the same.",
)
@click.option(
    "--kept-events",
    type=click.IntRange(1),
    help="Events kept of a user.  [default: twice the longest history of the model]",
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
@click.option(
    "--max-batch",
    type=click.IntRange(1),
    help="Requests answered together.  [default: 32, or 16 for a process that computes with one thread]",
)
@click.option(
    "--batches",
    type=click.IntRange(1),
    help="Batches computed at the same time: one computes while the other collects what it needs and makes answers.  "
    "[default: 2, or 1 for a process that computes with one thread]",
)
@click.option(
    "--max-wait-ms",
    type=FiniteRange(0, 60_000),
    default=0.0,
    show_default=True,
    help="How long a request waits for others to be answered with while nothing is computed; while something is, the "
    "next batch collects anyway.",
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
    type=FiniteRange(0, DAY_S),
    default=1.0,
    show_default=True,
    help="How long after SIGTERM new connections are still accepted, while /health/ready says 503.",
)
@click.option(
    "--drain-s", type=FiniteRange(1, DAY_S), default=30.0, show_default=True, help="How long the rest may then take."
)
@click.option(
    "--hung-s",
    type=FiniteRange(2),
    default=30.0,
    show_default=True,
    help="Of --processes, one whose event loop stands still for so long is killed and started again.",
)
@click.option(
    "--bundles",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The folder of all bundles between which may be swapped.  [default: that in which BUNDLE lies]",
)
@click.option(
    "--watch",
    is_flag=True,
    help="Serve what current.json beside the bundles names, and swap when it is replaced.",
)
@click.option(
    "--admin-token-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Answer to /admin/reload, /admin/rollback and /admin/status for whoever knows the token in this file.",
)
@click.option(
    "--admin-token-env",
    metavar="NAME",
    help="The same, with the token in this environment variable.",
)
@click.option(
    "--page/--no-page",
    default=True,
    show_default=True,
    help="Show a page at /, and the bundle's sample users on it to whoever can reach the server.",
)
@click.option("--log-format", type=click.Choice(["json", "human"]), default="json", show_default=True)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
@click.option("--log-users", is_flag=True, help="Name the user in the line about a request.")
@click.option(
    "--log-served",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Log what is recommended, a row for each item, to Parquet files for `prepare served`. They hold users' ids; "
    "DELETE /v1/users does not remove them there.",
)
@click.option(
    "--log-served-mib",
    type=click.IntRange(16),
    default=1024,
    show_default=True,
    help="All files in the folder of --log-served; beyond it the oldest are removed.",
)
@click.option(
    "--recall-share",
    type=FiniteRange(0, 1),
    default=0.001,
    show_default=True,
    help="Share of the index's searches that are compared with an exact scan.",
)
@click.option("--traces", is_flag=True, help="Trace requests that ask for it with X-Trace: 1, for /debug/traces.")
@click.option("--otel", is_flag=True, help="Send spans to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names.")
@command
def serve(bundle: Path, **options: Any) -> None:
    """Serve a bundle over HTTP: recommendations, users' events, similar items, health, metrics."""
    from unipinrec.runtime.serve import ServeOptions, serve_bundle

    serve_bundle(bundle, ServeOptions(**options))
