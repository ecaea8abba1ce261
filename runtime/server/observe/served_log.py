"""Recommendations as Parquet files, a row for each item of each answer, from which a later model can learn.

A request only puts its answer into a bounded queue. A thread writes the queue into a new file from time to time and at
the end, and removes the oldest files beyond a bound. A file gets its final name when it is complete: a process that is
killed loses only rows that still wait.

Columns: `COLUMNS`. `prepare served` joins them with later events; docs/data.md says how.
"""

from __future__ import annotations

import io
import logging
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from unipinrec.errors import ConfigError
from unipinrec.runtime.server.call import Call
from unipinrec.runtime.server.observe.metrics import counters

if TYPE_CHECKING:
    import polars as pl

COLUMNS = {
    "request_id": "String",
    "user": "String",
    "item": "String",
    "position": "Int32",
    "score": "Float64",
    "value": "Float64",
    "source": "String",
    "surface": "String",
    "bundle": "String",
    "timestamp_ms": "Int64",
}
LISTED = ("item", "position", "score", "value")
PREFIX, PARTIAL = "served-", ".partial"
CHUNK_ROWS = 1_000  # polars holds the interpreter while it reads Python's lists: this many at a time take 0.3 ms
STALE_S = 3_600.0
CLOSE_S = 30.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServedLogOptions:
    """Where recommendations are logged, and how many.

    Attributes:
        folder: Folder of the files, made if missing. Several processes may share it.
        total_bytes: Most bytes of the folder's files; beyond it the oldest are removed.
        file_rows: A file is written when this many rows wait.
        file_s: A file is also written after this many seconds.
        queue_rows: Most rows that wait; the rows of further answers are dropped.
        warn_s: Least seconds between two warnings of lost rows.
    """

    folder: Path
    total_bytes: int = 1 << 30
    file_rows: int = 100_000
    file_s: float = 60.0
    queue_rows: int = 200_000
    warn_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.file_rows <= self.queue_rows:
            raise ConfigError(f"file_rows={self.file_rows} must be from 1 to queue_rows={self.queue_rows}")
        for name in ("total_bytes", "file_s", "warn_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be more than 0")


class _Answer(NamedTuple):
    """One slate in the queue: short, and nothing of it is computed later. Its fields are named like the columns."""

    request_id: str
    user: str | None
    item: list[str]
    score: list[float]
    value: list[float | None]
    source: str
    surface: str
    bundle: str
    timestamp_ms: int

    @property
    def position(self) -> list[int]:
        return list(range(len(self.item)))


class ServedLog(Collector):
    """Logs recommendations; an observer of the server's calls, and a collector of its own counts."""

    def __init__(self, options: ServedLogOptions) -> None:
        """Begin to write.

        Raises:
            ConfigError: polars is not installed, or the folder cannot be written.
        """
        self.options = options
        _require_polars()
        _require_writable(options.folder)
        self.rows: Counter[str] = Counter(written=0, queue_full=0, write_failed=0)
        self.files_removed = 0
        self._token = f"{os.getpid()}-{random.getrandbits(32):08x}"
        self._waiting: deque[_Answer] = deque()
        self._put = self._taken = 0  # rows; one thread counts each
        self._failure, self._warned_of, self._warned = "", 0, -float("inf")
        self._wake, self._closing = threading.Event(), threading.Event()
        self._writer = threading.Thread(target=self._write_until_closed, name="unipinrec-served-log", daemon=True)
        self._writer.start()
        log.info("recommendations are logged in %s, users' ids included", options.folder)

    def observe(self, call: Call) -> None:
        """Queue the slates of a call; it never waits. Called in the event loop's thread alone."""
        now_ms = time.time_ns() // 1_000_000
        if not call.requests:  # the slates of /v1/rank: their client chooses what to show
            return
        for (request_id, request), slate in zip(call.requests.items(), call.slates, strict=True):
            if not slate.items:
                continue
            if self._put - self._taken + len(slate.items) > self.options.queue_rows:
                self.rows["queue_full"] += len(slate.items)
                continue
            answer = _Answer(
                request_id=request_id,
                user=request.user,
                item=[item.item for item in slate.items],
                score=[item.score for item in slate.items],
                value=[item.value for item in slate.items],
                source=slate.source,
                surface=request.surface,
                bundle=slate.bundle,
                timestamp_ms=now_ms if request.now_ms is None else request.now_ms,
            )
            self._put += len(slate.items)
            self._waiting.append(answer)
        if self._put - self._taken >= self.options.file_rows:
            self._wake.set()

    def close(self) -> None:
        """Write the waiting rows, and end; `observe` may not be called after it."""
        self._closing.set()
        self._wake.set()
        self._writer.join(CLOSE_S)
        if self._writer.is_alive():
            log.error("the log of recommendations could not be written in %g s; its last rows are lost", CLOSE_S)

    def collect(self) -> Iterator[Metric]:
        """The counts, for Prometheus."""
        yield counters("served_log_rows", "Rows of the log of recommendations, by result.", ("result",), self.rows)
        text = "Files of that log that were removed for newer ones."
        yield CounterMetricFamily("unipinrec_served_log_files_removed", text, value=self.files_removed)

    def _write_until_closed(self) -> None:
        closing = False
        while not closing:
            self._wake.wait(self.options.file_s)
            self._wake.clear()
            closing = self._closing.is_set()
            self._write(self._take())
            while self._waiting and (closing or self._put - self._taken >= self.options.file_rows):
                self._write(self._take())
            self._warn_of_losses(last=closing)

    def _take(self) -> list[_Answer]:
        """The oldest waiting answers, with about the rows of one file."""
        answers: list[_Answer] = []
        rows = 0
        while self._waiting and rows < self.options.file_rows:
            answers.append(self._waiting.popleft())
            rows += len(answers[-1].item)
        return answers

    def _write(self, answers: Sequence[_Answer]) -> None:
        rows = sum(len(answer.item) for answer in answers)
        if not rows:
            return
        try:
            newest = self._write_file(_parquet(answers))
            self.rows["written"] += rows
            self._remove_oldest(newest)
        except Exception as error:  # after any failure serving goes on, and the next file is tried
            self.rows["write_failed"] += rows
            self._failure = repr(error)
        finally:
            self._taken += rows

    def _write_file(self, content: bytes) -> Path:
        """Write a file, which gets its final name when it is complete."""
        folder, now = self.options.folder, datetime.now(UTC)
        final = folder / f"{PREFIX}{now:%Y%m%dT%H%M%S.%fZ}-{self._token}.parquet"
        partial = folder / f".{final.name}{PARTIAL}"
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(final)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        return final

    def _remove_oldest(self, newest: Path) -> None:
        """Remove the oldest files beyond the bound of the folder."""
        sizes = {path: _size(path) for path in sorted(self.options.folder.glob(f"{PREFIX}*.parquet"))}
        total = sum(sizes.values())
        removed = []
        for path, size in sizes.items():
            if total <= self.options.total_bytes or path == newest:
                break
            try:
                path.unlink(missing_ok=True)  # another process may have done it
            except OSError as error:
                log.warning("the log of recommendations is beyond its bound, but %s cannot be removed: %s", path, error)
                break
            removed.append(path.name)
            total -= size
        if removed:
            self.files_removed += len(removed)
            bound = self.options.total_bytes >> 20
            log.info("log of recommendations beyond %d MiB: removed the oldest, %s", bound, ", ".join(removed[:5]))

    def _warn_of_losses(self, last: bool) -> None:
        full, failed, now = self.rows["queue_full"], self.rows["write_failed"], time.monotonic()
        if full + failed > self._warned_of and (last or now - self._warned >= self.options.warn_s):
            text = "log of recommendations: %d rows were lost as the queue was full, %d as they were not written%s"
            log.warning(text, full, failed, f" ({self._failure})" if self._failure else "")
            self._warned_of, self._warned = full + failed, now


def _require_polars() -> None:
    try:
        import polars  # noqa: F401, PLC0415 - an extra, and slow to import
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--log-served writes Parquet with polars, which is not installed; run pip install 'unipinrec[log]', or "
            "leave --log-served out"
        ) from error


def _require_writable(folder: Path) -> None:
    """Make the folder, try to write into it, and remove unfinished files of killed processes."""
    trial = folder / f".{PREFIX}{random.getrandbits(64):016x}{PARTIAL}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"\0")
        trial.unlink()
        for path in folder.glob(f".{PREFIX}*{PARTIAL}"):
            with suppress(FileNotFoundError):  # another process has just renamed it
                if time.time() - path.stat().st_mtime > STALE_S:
                    path.unlink()
    except OSError as error:
        raise ConfigError(
            f"--log-served {folder} cannot be written: {error}; give a folder that this user may write"
        ) from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process has removed it
        return 0


def _parquet(answers: Sequence[_Answer]) -> bytes:
    import polars as pl  # noqa: PLC0415 - an extra, and slow to import

    chunks: list[list[_Answer]] = [[]]
    rows = 0
    for answer in answers:
        if rows >= CHUNK_ROWS:
            chunks.append([])
            rows = 0
        chunks[-1].append(answer)
        rows += len(answer.item)
    content = io.BytesIO()
    pl.concat([_frame(chunk) for chunk in chunks]).write_parquet(content, compression="zstd")
    return content.getvalue()


def _frame(answers: Sequence[_Answer]) -> pl.DataFrame:
    import polars as pl  # noqa: PLC0415 - an extra, and slow to import

    schema = {name: getattr(pl, kind) for name, kind in COLUMNS.items()}
    schema |= {name: pl.List(schema[name]) for name in LISTED}
    columns = {name: [getattr(answer, name) for answer in answers] for name in COLUMNS}
    return pl.DataFrame(columns, schema=schema).explode(LISTED)
