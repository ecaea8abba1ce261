"""`unipinrec plan`: memory, hit rate and machines for a load."""

from __future__ import annotations

import csv
import dataclasses
from typing import TYPE_CHECKING, Any

import click

from unipinrec.cli.common import FiniteRange, bundle_path, input_file, json_command, positive, print_json, stderr
from unipinrec.errors import ConfigError, DataError

if TYPE_CHECKING:
    from unipinrec.runtime.tools.arrivals import ArrivalModel
    from unipinrec.runtime.tools.capacity import CapacityInput, Footprint, HistoryLengths

EXAMPLES = """\b
Examples:
  unipinrec plan --users 1000000 --qps 200 --bundle bundle/ --events 200
  unipinrec plan --users 1000000 --qps 200 --size small --events 200 --memory-gib 64 \\
      --encode-ms 60 --extend-ms 5 --retrieve-ms 2 --rank-ms 11
  unipinrec plan --users 80000 --qps 30 --layers 12 --dim 768 --heads 12 --dtype bf16 \\
      --events-file lengths.csv --arrivals requests.csv --budget-gib 40 --json"""

COSTS = ("encode_ms", "extend_ms", "retrieve_ms", "rank_ms")
OWN_SHAPE = ("layers", "dim", "heads")


@click.command(short_help="Plan a cache: memory, hit rate, machines.", epilog=EXAMPLES)
@click.option("--users", type=click.IntRange(1), required=True, help="Distinct users per month.")
@click.option("--qps", type=positive, required=True, help="Requests per second at peak.")
@click.option("--bundle", type=bundle_path, help="Take the model's shape from this bundle.")
@click.option(
    "--size", type=click.Choice(["tiny", "small", "paper"]), help="Or take the model's shape from a named size."
)
@click.option("--layers", type=click.IntRange(1), help="Or give the shape: layers, ...")
@click.option("--dim", type=click.IntRange(1), help="... hidden width, ...")
@click.option("--heads", type=click.IntRange(1), help="... attention heads, ...")
@click.option("--kv-heads", type=click.IntRange(1), help="... and key/value heads.  [default: --heads]")
@click.option(
    "--max-history", type=click.IntRange(1), help="Longest history in events.  [default: the model's, or no limit]"
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    help="Precision of cached keys and values.  [default: as the bundle states, else int8]",
)
@click.option("--page-slots", type=click.IntRange(1), help="Events per page of the cache.  [default: the cache's own]")
@click.option("--events", type=positive, help="Mean history length of users, spread as in KuaiRand-Pure.")
@click.option("--events-file", type=input_file, help="Or all history lengths: CSV with a column `events`.")
@click.option("--budget-gib", type=positive, help="Total memory of the cache on all machines.")
@click.option("--memory-gib", type=positive, help="Or memory of the cache per machine; needs the stage times.")
@click.option("--ttl-hours", type=positive, help="Time after which an unused entry expires.  [default: no limit]")
@click.option("--arrivals", type=input_file, help="Your log of requests: CSV with columns `user,timestamp_ms`.")
@click.option(
    "--pattern",
    type=click.Choice(["slate", "exposure"]),
    help="Without --arrivals, a pattern of KuaiRand-Pure: one request per slate, or per exposure.  [default: slate]",
)
@click.option(
    "--requests-per-user-day",
    type=positive,
    help="Requests of a user per day; matters with --ttl-hours only.  [default: the log's, else --qps over --users]",
)
@click.option("--new-share", type=FiniteRange(0, 1, max_open=True), help="Share of requests from new users.")
@click.option(
    "--unchanged-share",
    type=FiniteRange(0, 1),
    default=0.0,
    help="Share of cache hits whose history has no new event.",
)
@click.option("--encode-ms", type=positive, help="Machine time per request to encode a whole history, ...")
@click.option("--extend-ms", type=positive, help="... to encode only its new events, ...")
@click.option("--retrieve-ms", type=positive, help="... to retrieve, ...")
@click.option("--rank-ms", type=positive, help="... and to rank. Give all four, measured on your machine, or none.")
@click.option(
    "--utilisation",
    type=FiniteRange(0, 1, min_open=True),
    default=0.7,
    help="Highest share of time that a machine is busy.",
)
@json_command
def plan(as_json: bool, budget_gib: float | None, memory_gib: float | None, **options: Any) -> None:
    """Plan a key/value cache: bytes per user, expected hit rate per memory, and machines for a load.

    Times are never guessed: without the four stage times the plan has no machines.
    """
    _check(budget_gib, memory_gib, options)
    from unipinrec.cli.plan_report import document_of, print_document

    with stderr.status("planning"):
        try:
            document = document_of(_deployment(options), budget_gib, memory_gib, options)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error
        except OverflowError as error:
            raise click.UsageError(f"a number is too large to plan with ({error}); give a smaller one") from error
    if as_json:
        print_json(document)
    else:
        print_document(document)


def _check(budget_gib: float | None, memory_gib: float | None, options: dict[str, Any]) -> None:
    own = [name for name in OWN_SHAPE if options[name] is not None]
    named = [name for name in ("bundle", "size") if options[name] is not None]
    if len(named) + bool(own) != 1 or 0 < len(own) < len(OWN_SHAPE):
        raise click.UsageError("give the model's shape: one of --bundle, --size, or --layers with --dim and --heads")
    if options["kv_heads"] and not own:
        raise click.UsageError(f"--kv-heads belongs to --layers, --dim and --heads; --{named[0]} has its own")
    if (options["events"] is None) == (options["events_file"] is None):
        raise click.UsageError("give exactly one of --events and --events-file")
    if budget_gib is not None and memory_gib is not None:
        raise click.UsageError("give --budget-gib (all machines together) or --memory-gib (each), not both")
    if options["arrivals"] is not None and options["pattern"] is not None:
        raise click.UsageError("give --arrivals or --pattern, not both")
    missing = [name for name in COSTS if options[name] is None]
    if missing and len(missing) < len(COSTS):
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise click.UsageError(f"stage times go together: {flags} is missing")
    if memory_gib is not None and missing:
        raise click.UsageError("--memory-gib plans machines and needs all four stage times; --budget-gib needs none")


def _deployment(options: dict[str, Any]) -> CapacityInput:
    from unipinrec.runtime.tools.arrivals import FOREVER
    from unipinrec.runtime.tools.capacity import CapacityInput, StageCosts

    return CapacityInput(
        footprint=_footprint(options),
        histories=_histories(options),
        arrivals=_arrivals(options),
        ttl_hours=options["ttl_hours"] or FOREVER,
        costs=None if options["encode_ms"] is None else StageCosts(**{name: options[name] for name in COSTS}),
        **{name: options[name] for name in ("users", "qps", "unchanged_share", "utilisation")},
    )


def _footprint(options: dict[str, Any]) -> Footprint:
    from unipinrec.runtime.bundle.bundle import read_manifest
    from unipinrec.runtime.kv.pages import PAGE_SLOTS
    from unipinrec.runtime.tools.capacity import Footprint

    page_slots = options["page_slots"] or PAGE_SLOTS
    if options["bundle"] is not None:
        manifest = read_manifest(options["bundle"])[0]
        if manifest.model.cache == "none":
            raise click.UsageError(f"{options['bundle']}: this model's histories cannot be cached; no cache to plan")
        footprint = Footprint.of(manifest.model, options["dtype"] or manifest.cache_dtype, page_slots)
    else:
        footprint = _footprint_of_sizes(options, page_slots)
    longest = options["max_history"] or footprint.max_history
    if longest > footprint.max_history:
        raise click.UsageError(f"--max-history {longest} must be at most the model's own, {footprint.max_history}")
    return dataclasses.replace(footprint, max_history=longest)


def _footprint_of_sizes(options: dict[str, Any], page_slots: int) -> Footprint:
    from unipinrec.models.config import SIZES
    from unipinrec.runtime.bundle.quality import DEFAULT_KV_DTYPE
    from unipinrec.runtime.kv.pages import KvGeometry
    from unipinrec.runtime.tools.capacity import NO_LIMIT, Footprint

    if options["size"] is not None:
        config = SIZES[options["size"]]
        layers, kv_heads, head_dim = config.num_layers, config.num_kv_heads, config.head_dim
        prefix, longest = config.kv_prefix_slots, config.max_history
    else:
        if options["dim"] % options["heads"]:
            raise click.UsageError(f"--dim {options['dim']} is not a multiple of --heads {options['heads']}")
        layers, kv_heads = options["layers"], options["kv_heads"] or options["heads"]
        head_dim, prefix, longest = options["dim"] // options["heads"], 1, NO_LIMIT
    dtype = options["dtype"] or DEFAULT_KV_DTYPE
    geometry = KvGeometry(tensors=2 * layers, heads=kv_heads, head_dim=head_dim, dtype=dtype, page_slots=page_slots)
    return Footprint(geometry=geometry, prefix_slots=prefix, max_history=longest)


def _histories(options: dict[str, Any]) -> HistoryLengths:
    from unipinrec.runtime.tools.capacity import HistoryLengths, histories_of_mean

    if options["events"] is not None:
        return histories_of_mean(options["events"])
    path, lengths = options["events_file"], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                lengths.append(float(row["events"]))
    except KeyError as error:
        raise DataError(
            f"{path}: no column 'events'; give a row per user with the length of its history in that column"
        ) from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: line {len(lengths) + 2}: events is a number of events: {error}") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: not readable as CSV: {error}") from error
    return HistoryLengths(events=tuple(lengths))


def _arrivals(options: dict[str, Any]) -> ArrivalModel:
    from unipinrec.runtime.tools.arrivals import KUAIRAND, fit_arrivals, pauses_of, read_log

    if options["arrivals"] is not None:
        model = fit_arrivals(pauses_of(*read_log(options["arrivals"])), f"{options['arrivals']}, fitted")
        rate = options["requests_per_user_day"] or model.requests_per_user_day
    else:
        model = KUAIRAND[options["pattern"] or "slate"]
        rate = options["requests_per_user_day"] or options["qps"] * 86_400 / options["users"]
    return model.at_rate(rate, options["new_share"])
