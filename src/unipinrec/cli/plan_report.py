"""The report of `unipinrec plan`: the JSON document, and its printed form."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from unipinrec.cli.common import say, stdout
from unipinrec.runtime.tools.arrivals import FOREVER
from unipinrec.runtime.tools.capacity import (
    ACTIVITY_EXPONENT,
    GIB,
    NO_LIMIT,
    CapacityInput,
    Outcome,
    memory_of_all,
    outcome,
    requests_at_limit,
    smallest_fleet,
    user_pages,
)

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0)  # of the memory that all users take
MACHINES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # of --memory-gib
COLUMNS = ("GiB", "users", "found", "hit", "extend", "new", "lost")


def document_of(
    deployment: CapacityInput, budget_gib: float | None, memory_gib: float | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The plan as JSON.

    Raises:
        ConfigError: The deployment contradicts itself.
    """
    everything = memory_of_all(deployment)
    plan: dict[str, Any] | None
    if memory_gib is not None:
        plan = _fleet(deployment, memory_gib)
        choices = [_fleet(deployment, part * memory_gib) for part in MACHINES]
    else:
        plan = None if budget_gib is None else _row(outcome(deployment, int(budget_gib * GIB)))
        choices = [_row(outcome(deployment, int(share * everything))) for share in SHARES]
    return {
        "users": deployment.users,
        "qps": deployment.qps,
        "ttl_hours": None if deployment.ttl_hours == FOREVER else deployment.ttl_hours,
        "stage_costs": dataclasses.asdict(deployment.costs) if deployment.costs else None,
        "utilisation": deployment.utilisation,
        "kv": _memory(deployment, everything),
        "arrivals": dataclasses.asdict(deployment.arrivals),
        "plan": plan,
        "choices": choices,
        "basis": _basis(deployment, options),
    }


def _fleet(deployment: CapacityInput, machine_gib: float) -> dict[str, Any]:
    return _row(smallest_fleet(deployment, int(machine_gib * GIB))) | {"machine_gib": machine_gib}


def _row(result: Outcome) -> dict[str, Any]:
    return {**dataclasses.asdict(result), "found": result.found, "machine_gib": None}


def _memory(deployment: CapacityInput, everything: int) -> dict[str, Any]:
    footprint, events = deployment.footprint, deployment.histories.events
    geometry = footprint.geometry
    pages = user_pages(footprint, deployment.histories)
    user_bytes = pages.of_users * geometry.page_bytes
    used = float(footprint.slots(np.array(events)).mean())
    return {
        "dtype": geometry.dtype,
        "num_layers": geometry.tensors // 2,
        "num_kv_heads": geometry.heads,
        "head_dim": geometry.head_dim,
        "max_history": None if footprint.max_history == NO_LIMIT else footprint.max_history,
        "bytes_per_event": geometry.slot_bytes,
        "page_bytes": geometry.page_bytes,
        "events_per_page": geometry.page_slots,
        "mean_events": sum(events) / len(events),
        "pages_per_user": pages.of_users,
        "pages_per_user_over_requests": pages.of_requests,
        "bytes_per_user": user_bytes,
        "filled": used * geometry.slot_bytes / user_bytes,
        "users_per_gib": GIB / user_bytes,
        "bytes_of_all_users": everything,
        "requests_at_max_history": requests_at_limit(footprint, deployment.histories),
    }


def _basis(deployment: CapacityInput, options: dict[str, Any]) -> dict[str, list[str]]:
    """The source of each figure."""
    arrivals, own_log = deployment.arrivals, options["arrivals"] is not None
    spread = ["spread of history lengths around their mean: KuaiRand-Pure"] if options["events"] is not None else []
    lengths = "mean history length" if spread else "history lengths"
    inputs = [f"users, requests per second, model shape, {lengths}{', stage times' if deployment.costs else ''}"]
    activity = f"activity grows as history length ^ {ACTIVITY_EXPONENT}: KuaiRand-Pure"
    measured = [f"pauses between requests: {arrivals.source}", *spread, activity]
    computed = ["bytes: exact for the given lengths", "shares of requests: expected by the arrival model"]
    pace = f"{arrivals.requests_per_user_day:.3g} requests per user and day"
    if options["requests_per_user_day"] is not None:
        inputs.append(pace)
    elif own_log:
        measured.append(f"{pace}: {options['arrivals']}")
    else:
        computed.append(f"{pace} = qps over users; the pauses are stretched to it, which matters with a TTL only")
    if options["new_share"] is None:
        share = f"{arrivals.new_share:.2%} of the requests from"
        if own_log:
            measured.append(f"{share} users not seen in the first half of the log")
        else:
            computed.append(f"{share} new users, as few as in the data")
    return {"given": inputs, "measured": measured, "computed": computed, "assumed": _assumed(deployment)}


def _assumed(deployment: CapacityInput) -> list[str]:
    assumed = [
        "a user's requests always reach the same machine; if a balancer spreads them at random, the machines' "
        "memories do not add up: give one machine's memory as --budget-gib",
        f"users are distinct users of {deployment.arrivals.users_days:.0f} days",
        "memory means the cache's pages, without model, item table and index",
        "no other misses: neither new bundles, which empty the cache, nor edited histories, which are encoded anew",
    ]
    if deployment.unchanged_share == 0:
        assumed.append("every cache hit has new events to encode (--unchanged-share)")
    at_limit = requests_at_limit(deployment.footprint, deployment.histories)
    if at_limit:
        assumed.append(
            f"{at_limit:.0%} of the requests are from users with {deployment.footprint.max_history} events, the "
            "longest history; the plan leaves out the cost of re-encoding when their window moves"
        )
    return assumed


def print_document(document: dict[str, Any]) -> None:
    """Print the plan."""
    _print_memory(document)
    plan = document["plan"]
    fleets = plan is not None and plan["machine_gib"] is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns = [*(["GiB each"] if fleets else []), *COLUMNS, *(["ms", "machines"] if document["stage_costs"] else [])]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in document["choices"]:
        table.add_row(*_cells(row, document["users"]), style="bold" if row == plan else None)
    if plan is not None and plan not in document["choices"]:
        table.add_section()
        table.add_row(*_cells(plan, document["users"]), style="bold")
    stdout.print(table)
    say(_conclusion(document))
    for kind, lines in document["basis"].items():
        say(f"\n{kind}:")
        for line in lines:
            say(f"  {line}")


def _print_memory(document: dict[str, Any]) -> None:
    kv = document["kv"]
    heads = f"{kv['num_layers']} layers, {kv['num_kv_heads']} key/value heads of {kv['head_dim']}, {kv['dtype']}"
    page = f"{kv['events_per_page']} events per page of {kv['page_bytes'] / 1024:,.0f} KiB"
    say(f"{kv['bytes_per_event']:,} bytes per event ({heads}), {page}")
    user = f"{kv['mean_events']:,.4g} events, {kv['pages_per_user']:.2f} pages, {kv['filled']:.0%} filled"
    say(f"{kv['bytes_per_user'] / 2**20:,.2f} MiB per user ({user}), {kv['users_per_gib']:,.0f} users per GiB")
    say(f"{kv['bytes_of_all_users'] / GIB:,.1f} GiB for all {document['users']:,} users")


def _cells(row: dict[str, Any], users: float) -> list[str]:
    cells = [] if row["machine_gib"] is None else [f"{row['machine_gib']:,.4g}"]
    gib = row["memory_bytes"] / GIB
    cells += [f"{gib:,.0f}" if gib >= 100 else f"{gib:.3g}", f"{row['cached_users'] / users:.1%}"]
    cells += [f"{row[name]:.1%}" for name in ("found", "hit", "extend", "miss_new", "miss_lost")]
    return cells if row["machines"] is None else [*cells, f"{row['ms_per_request']:.1f}", f"{row['machines']:,}"]


def _conclusion(document: dict[str, Any]) -> str:
    plan, none = document["plan"], document["choices"][0]["machines"]
    if document["stage_costs"] is None:
        return (
            "machines: not planned, because the stage times are missing. Measure them on your machine, with your "
            "bundle and histories of your length (docs/capacity.md): --encode-ms --extend-ms --retrieve-ms --rank-ms"
        )
    load = f"for {document['qps']:g} requests per second, each busy {document['utilisation']:.0%} of the time"
    if plan is None:
        return f"{none:,} machines without a cache {load}"
    each = "" if plan["machine_gib"] is None else f", {plan['machine_gib']:g} GiB of cache on each,"
    return f"{plan['machines']:,} machines{each} {load}; {none:,} without a cache"
