"""`unipinrec serve`: the HTTP server, and `unipinrec state`: the events of its users."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from unipinrec.cli.common import (
    FiniteRange,
    any_path,
    bundle_argument,
    bundle_path,
    command,
    gpu_option,
    input_file,
    json_command,
    positive,
    print_json,
    progress,
    say,
    stderr,
    warn,
)
from unipinrec.cli.recommend import cold_start_option, device_option, engines_option, strict_option
from unipinrec.errors import BackendError, ConfigError, listed

if TYPE_CHECKING:
    from unipinrec.runtime.server.events.store import Events, EventStore

EXAMPLES = """\b
Examples:
  unipinrec serve bundle/
  unipinrec serve bundle/ --host 0.0.0.0 --port 8000 --state /var/lib/unipinrec --cache-mib 8192
  unipinrec serve bundle/ --processes 4 --state /var/lib/unipinrec
  unipinrec serve bundle/ --log-served served/
  unipinrec serve bundle/ --state redis://cache:6379/0 --deadline-ms 200 --queue 512
  curl localhost:8000/health/ready"""

DAY_S = 86_400


@click.command(short_help="Serve a bundle over HTTP.", epilog=EXAMPLES)
@bundle_argument
@click.option(
    "--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 = all of IPv4, :: = all of IPv6 and IPv4."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0 = any free port.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    help="Number of worker processes behind one port. They share the CPU's threads, --cache-mib and --state.",
)
@click.option(
    "--threads", type=click.IntRange(1, 4096), help="CPU threads of each process.  [default: its share of the CPU]"
)
@device_option
@strict_option
@engines_option
@gpu_option
@cold_start_option
@click.option(
    "--state",
    metavar="DIR|URL",
    help="Where to keep users' events: a folder, or redis://HOST:PORT/DB.  [default: memory, until the server ends]",
)
@click.option(
    "--max-users",
    type=click.IntRange(1),
    default=100_000,
    help="Largest number of users whose events are kept. Beyond it the least recently active users are removed.",
)
@click.option(
    "--events-mib",
    type=click.IntRange(1),
    default=512,
    help="Memory for users' events without --state. Beyond it the least recently active users are removed.",
)
@click.option(
    "--kept-events",
    type=click.IntRange(1),
    help="Largest number of events kept per user.  [default: twice the longest history of the model]",
)
@click.option(
    "--cache-mib",
    type=click.IntRange(0),
    help="Memory for the cache of encoded histories; 0 = no cache.  [default: 1024, at most a quarter of the memory]",
)
@click.option(
    "--work-mib",
    type=click.IntRange(1),
    help="Memory that a batch may take on the CPU, and a request to /v2. A larger batch is split, a larger request "
    "refused.  [default: 512, together at most a quarter of the memory]",
)
@click.option(
    "--cache-dtype",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    help="Precision of cached histories.  [default: as the bundle states, else int8]",
)
@click.option("--cache-ttl-s", type=positive, help="Remove cached histories that are unused for this long.")
@click.option(
    "--window-slack",
    type=click.IntRange(1),
    help="Events by which the window over a long history moves at a time; 1 = always the newest events.  "
    "[default: as the bundle states, else an eighth of the model's limit]",
)
@click.option(
    "--max-batch",
    type=click.IntRange(1),
    help="Largest number of requests in a batch.  [default: 32, or 16 if a process computes with one thread]",
)
@click.option(
    "--batches",
    type=click.IntRange(1),
    help="Batches in progress at the same time: while one computes, the others prepare inputs and answers.  "
    "[default: 2, or 1 if a process computes with one thread]",
)
@click.option(
    "--max-wait-ms",
    type=FiniteRange(0, 60_000),
    default=0.0,
    help="How long an idle server may hold a request to batch it with others. A busy server batches anyway.",
)
@click.option(
    "--queue",
    type=click.IntRange(1),
    default=256,
    help="Largest number of requests that wait or are in progress. Further requests get 429 at once.",
)
@click.option(
    "--deadline-ms",
    type=positive,
    default=2000.0,
    help="Time limit of a request, after which it gets 504. The header X-Deadline-Ms overrides it.",
)
@click.option("--max-deadline-ms", type=positive, default=30_000.0, help="Largest accepted X-Deadline-Ms.")
@click.option(
    "--drain-delay-s",
    type=FiniteRange(0, DAY_S),
    default=1.0,
    help="How long after SIGTERM to accept new connections, while /health/ready answers 503.",
)
@click.option(
    "--drain-s",
    type=FiniteRange(1, DAY_S),
    default=30.0,
    help="Time limit for open requests after --drain-delay-s.",
)
@click.option(
    "--hung-s",
    type=FiniteRange(2),
    default=30.0,
    help="With --processes, restart a process whose event loop is blocked for this long.",
)
@click.option(
    "--bundles",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The folder of all bundles that can be swapped in.  [default: the parent folder of BUNDLE]",
)
@click.option(
    "--watch",
    is_flag=True,
    help="Serve the bundle that current.json in the folder of the bundles names, and swap when that file changes.",
)
@click.option(
    "--tokens",
    type=input_file,
    help="Answer only clients with a token of this TOML file; health checks stay open. Read again when it changes.",
)
@click.option(
    "--rate-limit", type=positive, help="Requests a second of each token, or without --tokens of each address."
)
@click.option("--rate-burst", type=click.IntRange(1), help="Requests at once.  [default: those of a second]")
@click.option("--tls-cert", type=input_file, help="PEM file of the certificate, for HTTPS. Read again when it changes.")
@click.option("--tls-key", type=input_file, help="PEM file of its key, without a password.")
@click.option(
    "--admin-token-file",
    type=input_file,
    help="Enable /admin/reload, /admin/rollback and /admin/status for clients with the token in this file.",
)
@click.option(
    "--admin-token-env", metavar="NAME", help="The same, with the token in the environment variable of this name."
)
@click.option(
    "--page/--no-page",
    default=True,
    help="Show a page at /. It shows the bundle's sample users to every client that can reach the server.",
)
@click.option(
    "--page-images",
    is_flag=True,
    help="Let the page load pictures from the addresses (https) in the column `image` of the items' metadata. Browsers "
    "then send requests to those servers.",
)
@click.option(
    "--cors",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin, such as https://shop.example, read answers; * = of any. May be repeated.",
)
@click.option("--gzip", is_flag=True, help="Compress answers of more than 1,000 bytes for clients that accept gzip.")
@click.option("--v2/--no-v2", default=True, help="Answer the Open Inference Protocol at /v2.")
@click.option("--log-format", type=click.Choice(["json", "human"]), default="json", help="Format of the log on stderr.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    help="Lowest level that is logged.",
)
@click.option("--log-users", is_flag=True, help="Include the user's id in the log line of a request.")
@click.option(
    "--log-served",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Log each recommended item as a row of Parquet files, for `prepare served`. They hold users' ids; "
    "DELETE /v1/users does not remove these.",
)
@click.option(
    "--log-served-mib",
    type=click.IntRange(16),
    default=1024,
    help="Largest disk space for --log-served. Beyond it the oldest files are removed.",
)
@click.option(
    "--recall-share",
    type=FiniteRange(0, 1),
    default=0.001,
    help="Share of index searches that are checked against an exact scan.",
)
@click.option(
    "--traces", is_flag=True, help="Trace requests with the header X-Trace: 1, and show them at /debug/traces."
)
@click.option("--otel", is_flag=True, help="Send spans to the collector at OTEL_EXPORTER_OTLP_ENDPOINT.")
@command
def serve(bundle: Path, **options: Any) -> None:
    """Serve a bundle over HTTP: recommendations, users' events, similar items, health, metrics."""
    from unipinrec.runtime.serve import ServeOptions, serve_command

    serve_command(bundle, ServeOptions(**options))


ANY_NUMBER = 1 << 62
WITHOUT_BUNDLE = 1_024  # events kept of a user
state_option = click.option(
    "--state", "url", metavar="DIR|URL", required=True, help="The --state of the server: a folder or a URL."
)


@click.group(short_help="Load, show, forget or export the users' events of a server.")
def state() -> None:
    """Read and write the users' events of a server that has --state, while it runs or before it starts."""


@contextmanager
def _store(url: str, *, kept: int | None = None) -> Iterator[EventStore]:
    """The store; without `kept` it must be there already."""
    from unipinrec.runtime.serve import open_store
    from unipinrec.runtime.server.events.sqlite import FILE
    from unipinrec.runtime.server.events.store import StoreLimits

    if kept is None and "://" not in url and not (Path(url) / FILE).is_file():
        raise BackendError(f"--state {url}: holds no {FILE}; give the folder that `serve --state` names")
    store = open_store(url, StoreLimits(events=kept or ANY_NUMBER, users=ANY_NUMBER))
    try:
        yield store
    finally:
        store.close()


@state.command(epilog="Example: unipinrec state load data/ --state /var/lib/unipinrec --bundle bundle/")
@click.argument("data", type=any_path)
@state_option
@click.option(
    "--bundle", type=bundle_path, help="Warn of items, actions and surfaces that this bundle does not know; keep them."
)
@click.option(
    "--kept-events",
    type=click.IntRange(1),
    help=f"Largest number of events per user, the newest ones; as for `serve`.  [default: twice the longest history of "
    f"the model of --bundle, else {WITHOUT_BUNDLE}]",
)
@click.option("--max-users", type=click.IntRange(1), default=100_000, help="The --max-users of the server.")
@json_command
def load(data: Path, url: str, bundle: Path | None, kept_events: int | None, max_users: int, as_json: bool) -> None:
    """Bring the histories of prepared data into a server's events, so that it answers every user from the start.

    An event is loaded once: to load the same data again changes nothing, and newer data adds its new events.
    """
    with stderr.status("reading"):
        from unipinrec.export.lists.prepared import PreparedHistories
        from unipinrec.export.warm_state import load_histories
        from unipinrec.runtime import Bundle
        from unipinrec.runtime.serve import KEPT_HISTORIES

        histories, unknown = PreparedHistories.open(data), {}
        if bundle is not None:
            opened = Bundle.open(bundle)
            unknown = histories.unknown_to(opened)
            kept_events = kept_events or KEPT_HISTORIES * opened.manifest.model.max_history
    for kind, values in unknown.items():
        warn(f"{bundle} does not know {len(values)} {kind} of {data}, such as {listed(values, 3)}; it skips them")
    kept = kept_events or WITHOUT_BUNDLE
    with _store(url, kept=kept) as store, progress() as bar:
        users = len({*store.users().result(), *histories.users})
        if users > max_users:
            raise ConfigError(
                f"--max-users {max_users}: the server would have events of {users} users and forget some; give the "
                "same larger --max-users here and to `serve`"
            )
        task, began = bar.add_task("load", total=histories.starts[-1], note="events"), time.perf_counter()
        loaded = load_histories(histories, store, kept, lambda events: bar.update(task, completed=events))
        events_per_s = loaded.events / (time.perf_counter() - began)
    if as_json:
        print_json({**asdict(loaded), "events_per_s": round(events_per_s), "unknown": unknown})
        return
    say(
        f"{loaded.events} events of {loaded.users} users, {events_per_s:,.0f} events/s: {loaded.appended} appended, "
        f"{loaded.known} were there, {loaded.left_out} older ones left out, {loaded.dropped} of the store dropped "
        f"(at most {kept} events per user)"
    )


@state.command(epilog="Example: unipinrec state show user-17 --state /var/lib/unipinrec")
@click.argument("user")
@state_option
@command
def show(user: str, url: str) -> None:
    """Print the stored events of a user as JSON, and how many items of dropped events are still left out."""
    from unipinrec.runtime.server.events.seen import HASH

    with _store(url) as store:
        (events,) = store.histories([user]).result()
        (seen,) = store.seen([user]).result()
        if not events:
            raise BackendError(f"{store.description}: user {user!r} has no events; `state export` lists all users")
    print_json({**_as_sent(user, events), "seen_before": len(seen) // HASH.itemsize})


@state.command(epilog="Example: unipinrec state forget user-17 --state /var/lib/unipinrec")
@click.argument("user")
@state_option
@command
def forget(user: str, url: str) -> None:
    """Delete the events of a user.

    A running server may still hold the encoded history in its cache; DELETE /v1/users deletes both.
    """
    with _store(url) as store:
        say(f"{store.forget(user).result()} events of user {user!r} deleted")


@state.command(name="export", epilog="Example: unipinrec state export --state /var/lib/unipinrec > events.jsonl")
@state_option
@command
def export_events(url: str) -> None:
    """Print the events of all users as JSON lines, each as POST /v1/events takes it."""
    with _store(url) as store:
        users = sorted(store.users().result())
        for begin in range(0, len(users), 256):
            some = users[begin : begin + 256]
            for user, events in zip(some, store.histories(some).result(), strict=True):
                if events:
                    sys.stdout.buffer.write(msgspec.json.encode(_as_sent(user, events)) + b"\n")


def _as_sent(user: str, events: Events) -> dict[str, Any]:
    return {"user": user, "events": [msgspec.structs.asdict(event) for event in events]}
