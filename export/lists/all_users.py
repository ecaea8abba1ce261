"""The list of every user of prepared data, as one Parquet file with the columns of `COLUMNS`.

Users are answered part by part in the order of the data. Each part is a file of its own, which appears only when it is
complete. A run that was killed goes on behind the parts that are there; the last step joins them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import msgspec
import polars as pl

from unipinrec.errors import ColdStartError, DataError, RequestError, TooFewItemsError
from unipinrec.export.lists.prepared import PreparedHistories
from unipinrec.models.data.schema import require_new
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.requests import SOON_MS, Event, RecommendOptions, Request, Slate
from unipinrec.runtime.validation import usable

COLUMNS = {
    "user": pl.String(),
    "position": pl.Int32(),
    "item": pl.String(),
    "score": pl.Float64(),
    "value": pl.Float64(),
    "source": pl.String(),
}
PART_USERS, PART_EVENTS, PART_ROWS = 4_096, 250_000, 400_000  # bound the memory of a part
BATCH = 128  # users: full groups of similar length for the engine
PLAN = "plan.json"

Refused = tuple[str, str]  # user and reason


@dataclass(frozen=True, kw_only=True)
class AllUsers:
    """What a run did.

    Attributes:
        users: Users of the data.
        lists: Users in the file; the others could not be answered.
        resumed: Users whose lists an earlier run had written.
        refused: Users of this run who could not be answered, each with the reason.
        seconds: Duration of this run.
    """

    users: int
    lists: int
    resumed: int
    refused: Sequence[Refused]
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class AllUsersTask:
    """What to recommend to whom.

    Attributes:
        recommender: Loaded with one thread, since `workers` batches run at the same time.
        histories: The users.
        k: Items of a list.
        options: For every user. `now_ms` = None is a minute after the user's last event, if its time is known.
        workers: Batches at the same time.
    """

    recommender: Recommender
    histories: PreparedHistories
    k: int
    options: RecommendOptions
    workers: int

    def plan(self) -> bytes:
        """What decides the content of the parts, as JSON."""
        stat = self.histories.path.stat()
        plan = {
            "bundle": self.recommender.bundle.hash,
            "device": self.recommender.device.name,
            "cold_start": self.recommender.popular is not None,
            "events": [str(self.histories.path.absolute()), stat.st_size, stat.st_mtime_ns],
            "k": self.k,
            "options": self.options,
            "part": [PART_USERS, PART_EVENTS, PART_ROWS],
        }
        return msgspec.json.format(msgspec.json.encode(plan)) + b"\n"


def recommend_all(task: AllUsersTask, out: Path, on_users: Callable[[int], None] = lambda users: None) -> AllUsers:
    """Write the list of every user of the data, or go on with a run that was killed.

    Args:
        task: What to recommend to whom.
        out: The file. Until it is complete, its parts lie beside it in a folder named `out` + ".parts".
        on_users: Called with the number of users so far.

    Raises:
        DataError: `out` exists, its parts are those of another task, another run writes them, or a file cannot be read
            or written.
        RequestError: A request is invalid, for another reason than a user with too few items left or without events.
        BackendError: The computation failed.
    """
    require_new(out)
    began, resumed, refused = time.perf_counter(), 0, list[Refused]()
    histories, folder = task.histories, out.with_name(out.name + ".parts")
    parts = histories.parts(max(1, min(PART_USERS, PART_ROWS // task.k)), PART_EVENTS)
    try:
        with _own(folder, task.plan()), ThreadPoolExecutor(task.workers, "unipinrec-lists") as pool:
            try:
                for number, part in enumerate(parts):
                    path = folder / f"{number:06d}.parquet"
                    if path.exists():
                        resumed += len(part)
                    else:
                        frame, others = _answer_part(task, part, pool)
                        refused += others
                        _write(path, frame.lazy())
                    on_users(part.stop)
            finally:
                pool.shutdown(cancel_futures=True)
            lists = (
                pl.scan_parquet(sorted(folder.glob("*.parquet")), glob=False) if parts else pl.LazyFrame(schema=COLUMNS)
            )
            _write(out, lists)
            answered = (
                pl.scan_parquet(out, glob=False).filter(pl.col("position") == 0).select(pl.len()).collect().item()
            )
            shutil.rmtree(folder)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{out}: {error}; run the command again to go on with the parts in {folder}") from error
    seconds = time.perf_counter() - began
    return AllUsers(users=len(histories.users), lists=answered, resumed=resumed, refused=refused, seconds=seconds)


@contextmanager
def _own(folder: Path, plan: bytes) -> Iterator[IO[bytes]]:
    """Keep the folder of the parts for this process; it has the parts of this plan alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / PLAN).open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{folder}: another process writes these lists; wait for it, or give another --out"
            ) from error
        file.seek(0)
        if (before := file.read()) not in (b"", plan):
            was, now = msgspec.json.decode(before), msgspec.json.decode(plan)
            names = [name for name in now if was.get(name) != now[name]]
            raise DataError(
                f"{folder} holds lists that were begun with other {', '.join(names)}; give the same bundle, data and "
                "options to go on with them, or remove the folder to begin again"
            )
        if not before:
            file.write(plan)
            file.flush()
        yield file


def _write(path: Path, frame: pl.LazyFrame) -> None:
    """Write a file that has its name only when it is complete."""
    partial_path = path.with_name(f".{path.name}.partial")
    frame.sink_parquet(partial_path)
    os.replace(partial_path, path)  # noqa: PTH105


def _answer_part(task: AllUsersTask, part: range, pool: ThreadPoolExecutor) -> tuple[pl.DataFrame, list[Refused]]:
    """The lists of the users of a part in their order, and the users who cannot be answered."""
    place = {user: at for at, user in enumerate(task.histories.users[part.start : part.stop])}
    users = sorted(task.histories.read(part), key=lambda one: len(one[1]))
    batches = [users[begin : begin + BATCH] for begin in range(0, len(users), BATCH)]
    answers = list(
        pool.map(partial(_answer_batch, task), reversed(batches))
    )  # the longest first: they take the longest
    frame = pl.concat([frame for frame, _ in answers])
    order = pl.col("user").replace_strict(list(place), list(place.values()), return_dtype=pl.Int64)
    return frame.sort(order, "position"), [one for _, refused in answers for one in refused]


def _answer_batch(
    task: AllUsersTask, users: Sequence[tuple[str, tuple[Event, ...]]]
) -> tuple[pl.DataFrame, list[Refused]]:
    requests, answered, refused = [], list[str](), list[Refused]()
    for user, events in users:
        last_ms, options = events[-1].timestamp_ms, task.options
        if options.now_ms is None and last_ms is not None:
            options = msgspec.structs.replace(options, now_ms=last_ms + SOON_MS)
        history = usable(events, task.recommender.bundle)
        try:
            requests.append(task.recommender.resolve(Request(history=history, k=task.k, options=options)))
            answered.append(user)
        except (ColdStartError, TooFewItemsError) as error:
            refused.append((user, str(error)))
        except RequestError as error:
            raise RequestError(f"user {user!r}: {error}") from error
    slates = list[tuple[str, Slate]]()
    for user, answer in zip(answered, task.recommender.answer(requests), strict=True):
        if isinstance(answer, Exception):
            raise answer
        slates.append((user, answer))
    rows = [
        (user, position, item.item, item.score, item.value, slate.source)
        for user, slate in slates
        for position, item in enumerate(slate.items)
    ]
    return pl.DataFrame(rows, schema=COLUMNS, orient="row"), refused
