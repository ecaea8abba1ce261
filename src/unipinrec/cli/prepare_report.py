"""The report of `unipinrec prepare` on the data set that it wrote: JSON, and its printed form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.markup import escape
from rich.table import Table

from unipinrec.cli.common import stdout
from unipinrec.errors import LONGEST_VALUE, listed

if TYPE_CHECKING:
    import polars as pl

    from unipinrec.models.data.schema import Dataset
    from unipinrec.models.data.validate import RawTables

MANY_TIES = 0.2
PARTS = ("training", "validation", "test")


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of a table, in the source and in the result."""

    given: int
    kept: int


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Size of one part of the split; a leave-one-out split holds out events and no slates."""

    slates: int
    slate_rows: int
    events: int


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """The report. Times are ISO 8601 in UTC; None stands for unknown times or a leave-one-out split."""

    name: str
    out: str
    source: str
    rows: dict[str, Counts]
    users: int
    slates: int
    surfaces: tuple[str, ...]
    first_event: str | None
    last_event: str | None
    action_rates: dict[str, dict[str, float]]
    split: dict[str, Part]
    valid_start: str | None
    test_start: str | None
    dropped: dict[str, int]
    examples: dict[str, tuple[str, ...]]
    warnings: tuple[str, ...]
    seconds: float


def summarize(dataset: Dataset, raw: RawTables, out: Path, seconds: float) -> Prepared:
    """Report on a data set and its raw tables."""
    from unipinrec.models.data.validate import date_text

    spec, tables = dataset.spec, {"events": dataset.events, "slates": dataset.slates}
    rows = {name: (getattr(raw, name).height, getattr(dataset, name).height) for name in (*tables, "items")}
    times = dataset.events["timestamp_ms"]
    return Prepared(
        name=spec.name,
        out=str(out),
        source=spec.source,
        rows={name: Counts(given=read, kept=kept) for name, (read, kept) in rows.items()},
        users=len({*dataset.events["user_id"].unique(), *dataset.slates["user_id"].unique()}),
        slates=dataset.slates["slate_id"].n_unique(),
        surfaces=spec.surfaces,
        first_event=date_text(times.min()),
        last_event=date_text(times.max()),
        action_rates={
            name: {action: _rate(table[f"action_{action}"]) for action in spec.actions}
            for name, table in tables.items()
        },
        split=_parts(dataset),
        valid_start=date_text(spec.split and spec.split.valid_start_ms),
        test_start=date_text(spec.split and spec.split.test_start_ms),
        dropped=spec.dropped,
        examples={
            reason: _unknown(table, dataset.items)
            for name, table in (("events", raw.events), ("slates", raw.slates))
            if (reason := f"{name}: unknown item") in spec.dropped
        },
        warnings=tuple(_warnings(dataset, raw)),
        seconds=round(seconds, 3),
    )


def print_summary(prepared: Prepared) -> None:
    """Print the report."""
    table = Table(title=f"{prepared.name} -> {prepared.out}", title_justify="left", show_header=False)
    for name, counts in prepared.rows.items():
        lists = f" in {prepared.slates:,} slates" if name == "slates" and prepared.slates else ""
        table.add_row(f"{name}: rows", f"{counts.given:,} read, {counts.kept:,} kept{lists}")
    table.add_row("users", f"{prepared.users:,}")
    more = f" and {len(prepared.surfaces) - 50:,} more" if len(prepared.surfaces) > 50 else ""
    table.add_row("surfaces", escape(", ".join(name[:LONGEST_VALUE] for name in prepared.surfaces[:50]) + more))
    if prepared.first_event:
        table.add_row("time (UTC)", f"{prepared.first_event} to {prepared.last_event}")
    for name, rates in prepared.action_rates.items():
        if prepared.rows[name].kept:
            table.add_row(f"{name}: actions", ", ".join(f"{key} {rate:.2%}" for key, rate in rates.items()))
    _add_split(table, prepared)
    for reason, count in prepared.dropped.items():
        examples = f", such as {listed(prepared.examples[reason])}" if reason in prepared.examples else ""
        label = reason if reason.endswith(")") else f"{reason}, dropped"
        table.add_row(label, escape(f"{count:,}{examples}"), style="yellow")
    table.add_row("source", escape(prepared.source))
    table.add_row("seconds", f"{prepared.seconds:.1f}")
    stdout.print(table)


def _add_split(table: Table, prepared: Prepared) -> None:
    starts = {"validation": prepared.valid_start, "test": prepared.test_start}
    for name, part in prepared.split.items():
        slates = f"{part.slates:,} slates ({part.slate_rows:,} rows), " if prepared.slates else ""
        since = f" from {starts[name]}" if starts.get(name) else ""
        how = "" if prepared.valid_start else " (leave-one-out)"
        table.add_row(f"split: {name}", f"{slates}{part.events:,} events{since}{how}")


def _parts(dataset: Dataset) -> dict[str, Part]:
    split, events, slates = dataset.spec.split, dataset.events, dataset.slates
    if split is None:
        lengths = events.group_by("user_id").len()["len"]
        test, validation = int((lengths > 1).sum()), int((lengths > 2).sum())
        sizes = (events.height - test - validation, validation, test)
        return {name: Part(slates=0, slate_rows=0, events=size) for name, size in zip(PARTS, sizes, strict=True)}
    bounds = (-1, split.valid_start_ms, split.test_start_ms, 1 << 62)
    spans = zip(PARTS, bounds[:-1], bounds[1:], strict=True)
    return {name: _part(slates, events, low, high) for name, low, high in spans}


def _part(slates: pl.DataFrame, events: pl.DataFrame, low: int, high: int) -> Part:
    """Size of the part between two times; unknown times count as -1, before all known times."""
    inside = [table["timestamp_ms"].fill_null(-1).is_between(low, high, closed="left") for table in (slates, events)]
    rows = slates.filter(inside[0])
    return Part(slates=rows["slate_id"].n_unique(), slate_rows=rows.height, events=int(inside[1].sum()))


def _unknown(rows: pl.DataFrame, items: pl.DataFrame) -> tuple[str, ...]:
    """Up to three ids that the catalogue lacks."""
    ids = rows["item_id"].cast(str).drop_nulls().unique(maintain_order=True)
    return tuple(ids.filter(~ids.is_in(items["item_id"].implode()) & (ids != "")).head(3).str.head(LONGEST_VALUE))


def _warnings(dataset: Dataset, raw: RawTables) -> Iterator[str]:
    import polars as pl

    from unipinrec.models.data.table import UNORDERED

    dropped, spec = dataset.spec.dropped, dataset.spec
    if UNORDERED in dropped:
        yield (
            f"{dropped[UNORDERED]:,} events have neither a time nor an `order`: they are used in the order of the "
            "file. If that is not the order in which they happened, histories and test are wrong: map "
            "`timestamp` or `order`"
        )
    time = pl.col("timestamp_ms")
    ties = int(dataset.events.select((time == time.shift().over("user_id")).sum()).item())
    if "order" not in raw.events.columns and ties > MANY_TIES * dataset.events.height:
        yield (
            f"{ties:,} of {dataset.events.height:,} events have the same time as their user's event before them: they "
            "are used in the order of the source. If that is not the order in which they happened, histories and test "
            "are wrong: give finer times, or map `order`"
        )
    in_events, in_slates = (
        {name for name in spec.actions if table[f"action_{name}"].any()} for table in (dataset.events, dataset.slates)
    )
    if never := [name for name in spec.actions if name not in in_events | in_slates]:
        yield f"the actions {listed(never)} never happen: correct their definition, or remove them"
    if dataset.slates.height and (never := [name for name in spec.actions if name in in_events - in_slates]):
        yield f"the actions {listed(never)} happen in events but never in slates: correct their definition there"


def _rate(column: pl.Series) -> float:
    return round(int(column.sum()) / column.len(), 6) if column.len() else 0.0
