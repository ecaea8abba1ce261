"""Logged recommendations of a server, joined with later events: slates that also have items without any action.

The log is a folder of the Parquet files that `unipinrec serve --log-served` writes, a row for each item of each answer.
An answer becomes a slate with its user, surface and time. An item's label for an action is 1 if the user has an event
with that action on that item after the answer, at most `within_ms` later. An event counts for the last answer that had
its item. Events and slates of the data set stay as they are; only new slates are labelled.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import polars as pl

from unipinrec.errors import DataError, listed
from unipinrec.models.data import schema
from unipinrec.models.data.validate import RawTables, SplitFractions, date_text, drop_rows

HOUR_MS = 3_600_000
SCHEMA = pl.Schema(
    {
        "request_id": pl.String(),
        "user": pl.String(),
        "item": pl.String(),
        "position": pl.Int32(),
        "score": pl.Float64(),
        "value": pl.Float64(),
        "source": pl.String(),
        "surface": pl.String(),
        "bundle": pl.String(),
        "timestamp_ms": pl.Int64(),
    }
)
ANSWER = ["request_id", "timestamp_ms", "user", "surface"]


def read_served(log: Path, data: Path, within_ms: int, split: schema.TimeSplit | None = None) -> RawTables:
    """Read a log and a prepared data set, and add the logged answers to its slates.

    Args:
        log: A folder of files that `unipinrec serve --log-served` wrote.
        data: A prepared data set that includes the events after the answers.
        within_ms: How long after an answer an event counts for it.
        split: Times of the split; None = the split of the data set, or shares of the slates if it has none.

    Raises:
        DataError: The log has no files or foreign files, the data set is not readable, or they have nothing in common.
    """
    answers, dataset = _read_log(log), schema.read_dataset(data)
    dropped: Counter[str] = Counter()
    seconds = bool((dataset.events["timestamp_ms"].drop_nulls() % 1000 == 0).all())
    if seconds:  # an event in the second of an answer counts as later, and is not in its history
        answers = answers.with_columns(pl.col("timestamp_ms") // 1000 * 1000)
    answers = _usable(_distinct(answers, dropped), dataset, within_ms, dropped)
    new = label(answers, dataset.events, dataset.spec.actions, within_ms, same_time=seconds)
    count = answers["request_id"].n_unique()
    old = dataset.slates.with_columns(slate_id=pl.format("data {}", "slate_id"))
    return RawTables(
        name=dataset.spec.name,
        source=f"{dataset.spec.source}; with {count} answers of a server as slates",
        actions=dataset.spec.actions,
        positive_actions=dataset.spec.positive_actions,
        events=dataset.events.with_row_index("order"),  # keeps the order of ties, without a warning
        items=dataset.items,
        slates=pl.concat([old, new]),
        split=split or dataset.spec.split or SplitFractions(),
        dropped=dropped,
    )


def label(
    answers: pl.DataFrame, events: pl.DataFrame, actions: tuple[str, ...], within_ms: int, *, same_time: bool = False
) -> pl.DataFrame:
    """Rows of slates from rows of answers; see the module docstring for the labels.

    Args:
        answers: `request_id, user, item, position, surface, timestamp_ms`, no item twice in a request.
        events: As in `schema`.
        actions: Names of the actions.
        within_ms: How long after an answer an event counts for it.
        same_time: Whether an event at the time of an answer counts as later.

    Returns:
        The columns of `slates.parquet`, with `request_id` as `slate_id`.
    """
    columns = [schema.ACTION_PREFIX + name for name in actions]
    by, time = ["user_id", "item_id"], "timestamp_ms"
    shown = answers.rename({"request_id": "slate_id", "user": "user_id", "item": "item_id"})
    served = shown.select(*by, "slate_id", time, served_ms=pl.col(time)).sort(time)
    after = (
        events.filter(pl.col(time).is_not_null())
        .select(*by, *columns, time)
        .sort(time)
        .join_asof(served, on=time, by=by, allow_exact_matches=same_time, check_sortedness=False)
        .filter(pl.col(time) - pl.col("served_ms") <= within_ms)
        .group_by("slate_id", "item_id")
        .agg(pl.col(columns).max())
    )
    labelled = shown.join(after, on=["slate_id", "item_id"], how="left", maintain_order="left")
    return labelled.with_columns(pl.col(columns).fill_null(False)).select(list(schema.slate_columns(actions)))


def _read_log(log: Path) -> pl.DataFrame:
    """All rows of a log."""
    files = sorted(log.glob("*.parquet"))
    if not files:
        raise DataError(f"{log} has no Parquet files; give the folder that `unipinrec serve --log-served` wrote")
    parts = []
    for file in files:
        part = schema.read_parquet(file, f"remove it from {log}")
        if part.schema != SCHEMA:
            columns = listed(part.schema.items())
            raise DataError(f"{file} is no log of `unipinrec serve --log-served`: it has {columns}, not {dict(SCHEMA)}")
        parts.append(part.select(*ANSWER, "item", "position"))
    answers = pl.concat(parts)
    if not answers.height:
        raise DataError(f"{log} holds no rows; give the folder that `unipinrec serve --log-served` wrote")
    schema.require_times(answers["timestamp_ms"], f"{log}: timestamp_ms")
    return answers


def _distinct(answers: pl.DataFrame, dropped: Counter[str]) -> pl.DataFrame:
    """The last answer for each request id: after a retry, the client has shown that answer."""
    whole = answers.drop_nulls(["request_id", "timestamp_ms", "item", "position"])
    dropped["served: incomplete row"] = answers.height - whole.height
    last = whole.sort("timestamp_ms", maintain_order=True).unique("request_id", keep="last").select(ANSWER)
    rows = whole.join(last, on=ANSWER, how="semi", nulls_equal=True)
    for key in ("position", "item"):
        rows = rows.unique(["request_id", key], keep="first", maintain_order=True)
    dropped["served: request id again"] = whole.height - rows.height
    return rows


def _usable(answers: pl.DataFrame, dataset: schema.Dataset, within_ms: int, dropped: Counter[str]) -> pl.DataFrame:
    """The rows whose user, item and time fit the data set."""
    events, last_ms = dataset.events, _last_event(answers, dataset, within_ms)
    users = pl.concat([events["user_id"], dataset.slates["user_id"]]).unique()
    unfit = {
        "served: no user": pl.col("user").is_null(),
        "served: unknown user": ~pl.col("user").is_in(users.implode()),
        "served: unknown item": ~pl.col("item").is_in(dataset.items["item_id"].implode()),
        "served: no event of the data follows": pl.col("timestamp_ms") >= last_ms,
    }
    kept = drop_rows(answers, unfit, dropped)
    known = dataset.slates.select("timestamp_ms", "surface", user="user_id")
    new = kept.join(known, on=["user", "timestamp_ms", "surface"], how="anti")
    dropped["served: slate that the data has"] = kept.height - new.height
    if not new.height:
        reasons = {reason: count for reason, count in dropped.items() if count}
        raise DataError(
            f"none of the {answers.height} rows of the log can be used ({reasons}); log and data must have users and "
            "items in common, and the data must have events after the answers"
        )
    unfinished = new.filter(pl.col("timestamp_ms") > last_ms - within_ms).height
    dropped["served: the data ends before the answer's hours are over (kept)"] = unfinished
    return new


def _last_event(answers: pl.DataFrame, dataset: schema.Dataset, within_ms: int) -> int:
    """The time of the last event, in ms.

    Raises:
        DataError: No event can have come after an answer.
    """
    times = dataset.events["timestamp_ms"].drop_nulls()
    if not times.len():
        raise DataError("no event of the data has a time, so it is unknown which events came after an answer")
    spans = [(int(series.min()), int(series.max())) for series in (answers["timestamp_ms"], times)]  # type: ignore[arg-type]  # integers
    (begins, ends), (first, last) = spans
    begin, end, since, until = map(date_text, (begins, ends, first, last))
    covered = f"the log covers {begin} to {end}, the data's events {since} to {until}"
    if begins >= last:
        raise DataError(f"{covered}: none came after an answer; prepare data that has the events since the log began")
    if ends + within_ms < first:
        raise DataError(
            f"{covered}: the log ends more than {within_ms / HOUR_MS:g} hours before every event; give a log and data "
            "of the same time"
        )
    return last
