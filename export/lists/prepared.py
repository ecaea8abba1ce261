"""The histories of prepared data, as clients would send them: some users at a time, so that memory stays bounded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import polars as pl

from unipinrec.errors import DataError, listed
from unipinrec.models.data.schema import ACTION_PREFIX, PREPARE_AGAIN, DatasetSpec, event_columns, read_spec
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.requests import Event


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedHistories:
    """The users of a prepared data set, each with at least one event, in the order of the file.

    Attributes:
        path: The file of the events, whose rows of a user stand together.
        spec: The declaration of the data set.
        users: External id of each of the U users.
        starts: U + 1 rows: where the events of each user begin, and the end of the file.
    """

    path: Path
    spec: DatasetSpec
    users: Sequence[str]
    starts: Sequence[int]

    @classmethod
    def open(cls, folder: Path) -> PreparedHistories:
        """Find where each user's events are; reads no history.

        Raises:
            DataError: The folder is no prepared data set, or the rows of a user do not stand together.
        """
        spec, path = read_spec(folder), folder / "events.parquet"
        row = pl.col("row")
        try:
            path.open("rb").close()
            scan = pl.scan_parquet(path.absolute(), glob=False, row_index_name="row")
            schema = {name: kind for name, kind in scan.collect_schema().items() if name != "row"}
            if schema != (columns := event_columns(spec.actions)):
                raise DataError(f"{path}: columns are {listed(schema.items())}, expected {columns}")
            runs = scan.group_by("user_id").agg(row.min(), last=row.max(), events=pl.len()).sort("row")
            users = runs.collect(engine="streaming")
        except (OSError, pl.exceptions.PolarsError) as error:
            raise DataError(f"{path}: not readable as Parquet: {error}; {PREPARE_AGAIN}") from error
        apart = users.filter(pl.col("last") - row + 1 != pl.col("events"))["user_id"]
        if len(apart):
            raise DataError(
                f"{path}: the events of {len(apart)} users, such as {apart[0]!r}, do not stand together; sort the file "
                f"by user_id and timestamp_ms, or {PREPARE_AGAIN}"
            )
        starts = [*users["row"].to_list(), users["events"].sum()]
        return cls(path=path, spec=spec, users=users["user_id"].to_list(), starts=starts)

    def parts(self, users: int, events: int) -> list[range]:
        """All users in their order, cut into parts of at most so many users and events; one user may have more."""
        parts, begin = [], 0
        for user in range(1, len(self.users) + 1):
            whole = user == len(self.users)
            if whole or user - begin == users or self.starts[user + 1] - self.starts[begin] > events:
                parts.append(range(begin, user))
                begin = user
        return parts

    def read(self, part: range) -> Iterator[tuple[str, tuple[Event, ...]]]:
        """Each user of a part with all events, oldest first. An action that is unknown did not happen.

        Raises:
            DataError: The file is not readable.
        """
        begin, end = self.starts[part.start], self.starts[part.stop]
        try:
            scan = pl.scan_parquet(self.path.absolute(), glob=False)
            frame = scan.slice(begin, end - begin).collect()
        except (OSError, pl.exceptions.PolarsError) as error:
            raise DataError(f"{self.path}: not readable as Parquet: {error}; {PREPARE_AGAIN}") from error

        @lru_cache(maxsize=4096)
        def names(happened: tuple[bool | None, ...]) -> tuple[str, ...]:
            return tuple(itertools.compress(self.spec.actions, happened))

        columns = frame.select("item_id", "surface", "timestamp_ms").iter_rows()
        actions = frame.select(ACTION_PREFIX + name for name in self.spec.actions).iter_rows()
        events = (
            Event(item=item, actions=names(happened), surface=surface, timestamp_ms=time_ms)
            for (item, surface, time_ms), happened in zip(columns, actions, strict=True)
        )
        for user in part:
            yield self.users[user], tuple(itertools.islice(events, self.starts[user + 1] - self.starts[user]))

    def unknown_to(self, bundle: Bundle) -> dict[str, list[str]]:
        """The items, actions and surfaces of the events that a bundle does not know; keys without any are left out."""
        scan, manifest = pl.scan_parquet(self.path.absolute(), glob=False), bundle.manifest
        items, surfaces = (
            scan.select(pl.col(name).unique().sort()).collect(engine="streaming")[name]
            for name in ("item_id", "surface")
        )
        unknown = {
            "items": [item for item in items if item not in bundle.rows],
            "actions": [action for action in self.spec.actions if action not in manifest.actions],
            "surfaces": [surface for surface in surfaces if surface not in ("unknown", *manifest.surfaces)],
        }
        return {kind: values for kind, values in unknown.items() if values}
