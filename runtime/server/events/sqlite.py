"""Users' events in one SQLite file: acknowledged events are on the disk, even if the process is killed.

One thread writes. It takes all waiting appends, writes them in one transaction, and acknowledges them when that is on
the disk: many appends share one wait. Readers read in their own thread and do not wait (write-ahead log): reading a row
takes some ten microseconds, and handing that to another thread and back many times as long.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from unipinrec.errors import BackendError
from unipinrec.runtime.server.events.seen import remembered
from unipinrec.runtime.server.events.store import (
    Append,
    Events,
    Receipt,
    StoreLimits,
    decode_events,
    encode_events,
    merged,
)

T = TypeVar("T")
FILE = "events.sqlite3"
FORMAT = 2
BUSY_S = 5.0  # how long to wait for another process, such as a backup
READERS_MS = 50  # how long emptying the log waits for reads of other processes
log = logging.getLogger(__name__)
SCHEMA = (
    "CREATE TABLE users (user TEXT PRIMARY KEY, updated_ms INTEGER NOT NULL, events BLOB NOT NULL)",
    "CREATE INDEX users_by_update ON users (updated_ms)",
    "CREATE TABLE total (users INTEGER NOT NULL)",  # counting rows takes longer than writing some
    "INSERT INTO total VALUES (0)",
    "CREATE TRIGGER counted_in AFTER INSERT ON users BEGIN UPDATE total SET users = users + 1; END",
    "CREATE TRIGGER counted_out AFTER DELETE ON users BEGIN UPDATE total SET users = users - 1; END",
)
SEEN = (  # in every file, also of versions that knew no such table, and still use the file beside this one
    "CREATE TABLE IF NOT EXISTS seen (user TEXT PRIMARY KEY, items BLOB NOT NULL)",
    "CREATE TRIGGER IF NOT EXISTS seen_out AFTER DELETE ON users BEGIN DELETE FROM seen WHERE user = old.user; END",
)


@dataclass(frozen=True, kw_only=True)
class _Write:
    """Work for a transaction, and its future."""

    work: Callable[[], Any]
    done: Future[Any]


class SqliteEventStore:
    """See `EventStore`; several processes may share a folder."""

    def __init__(self, folder: Path, limits: StoreLimits) -> None:
        """Open the store in a folder, which is made if missing.

        Raises:
            BackendError: The store cannot be opened or made, or another version of this package wrote it.
        """
        self._path, self._limits = folder / FILE, limits
        self.description = f"{self._path} (SQLite {sqlite3.sqlite_version})"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._writer, self._reader = (
                sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
                for _ in range(2)
            )
            _prepare(self._writer, self._path)
            self._file = self._path.stat()
        except (OSError, sqlite3.Error) as error:
            raise self._failed(error) from error
        self._queue: list[_Write] = []
        self._changed = threading.Condition()
        self._closed = False
        self._left_in_log = False
        self._writing = threading.Thread(target=self._write_all, name="unipinrec-events", daemon=True)
        self._writing.start()
        self._reading = threading.Lock()

    def append(self, appends: Sequence[Append], now_ms: int) -> Future[list[Receipt]]:
        """See `EventStore.append`."""
        return self._submit(lambda: [self._append(append, now_ms) for append in appends])

    def histories(self, users: Sequence[str]) -> Future[list[Events]]:
        """See `EventStore.histories`."""
        return self._read(_select, users)

    def seen(self, users: Sequence[str]) -> Future[list[bytes]]:
        """See `EventStore.seen`."""
        return self._read(_select_seen, users)

    def _read(self, select: Callable[[sqlite3.Connection, str], T], users: Sequence[str]) -> Future[list[T]]:
        future: Future[list[T]] = Future()
        try:
            self._require_file()
            with self._reading:
                future.set_result([select(self._reader, user) for user in users])
        except (OSError, sqlite3.Error, msgspec.DecodeError) as error:
            future.set_exception(self._failed(error))
        return future

    def users(self) -> Future[list[str]]:
        """See `EventStore.users`."""
        return self._submit(lambda: [user for (user,) in self._writer.execute("SELECT user FROM users")])

    def forget(self, user: str) -> Future[int]:
        """See `EventStore.forget`."""
        return self._submit(lambda: self._forget(user))

    def close(self) -> None:
        """See `EventStore.close`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._writing.join()
        with self._reading:
            self._reader.close()
        self._writer.close()

    def _submit(self, work: Callable[[], Any]) -> Future[Any]:
        write = _Write(work=work, done=Future())
        with self._changed:
            if self._closed:
                raise BackendError(f"{self._path} is closed")
            self._queue.append(write)
            self._changed.notify_all()
        return write.done

    def _write_all(self) -> None:
        while writes := self._next_writes():
            running = [write for write in writes if write.done.set_running_or_notify_cancel()]
            try:
                self._require_file()
                with self._writer:
                    self._writer.execute("BEGIN IMMEDIATE")
                    results = [write.work() for write in running]
                    self._make_room()
                self._empty_log()
            except Exception as error:  # any failure must reach the futures
                for write in running:
                    write.done.set_exception(self._failed(error))
            else:
                for write, result in zip(running, results, strict=True):
                    write.done.set_result(result)

    def _require_file(self) -> None:
        """SQLite would go on to use a file that was deleted, and its events would be lost."""
        if not os.path.samestat(self._path.stat(), self._file):
            raise OSError("another file lies in its place; start again to use that one")

    def _next_writes(self) -> list[_Write]:
        """All waiting writes; empty once the store is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            writes, self._queue = self._queue, []
            return writes

    def _append(self, append: Append, now_ms: int) -> Receipt:
        known = _select(self._writer, append.user)
        events, receipt, gone = merged(known, append, self._limits.events, now_ms)
        if gone:
            seen = remembered(_select_seen(self._writer, append.user), gone, self._limits.seen)
            self._writer.execute("INSERT OR REPLACE INTO seen VALUES (?, ?)", (append.user, seen))
        if receipt.appended:
            self._writer.execute(
                "INSERT INTO users VALUES (?1, ?2, ?3) ON CONFLICT (user) DO UPDATE SET updated_ms = ?2, events = ?3",
                (append.user, now_ms, encode_events(events)),
            )
        return receipt

    def _forget(self, user: str) -> int:
        known = _select(self._writer, user)
        self._writer.execute("DELETE FROM users WHERE user = ?", (user,))
        self._left_in_log |= bool(known)
        return len(known)

    def _empty_log(self) -> None:
        """A forgotten user is in the write-ahead log, and still in the file, until the log is copied and emptied."""
        if not self._left_in_log:
            return
        try:
            self._writer.execute(f"PRAGMA busy_timeout = {READERS_MS}")
            (busy, *_) = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._left_in_log = bool(busy)  # if so, try again after the next write
            self._writer.execute(f"PRAGMA busy_timeout = {BUSY_S * 1e3:.0f}")
        except sqlite3.Error as error:  # the events themselves were written
            log.warning("%s: forgotten users are still in its log: %s", self._path, error)

    def _make_room(self) -> None:
        (users,) = self._writer.execute("SELECT users FROM total").fetchone()
        if users > self._limits.users:
            oldest = "SELECT rowid FROM users ORDER BY updated_ms LIMIT ?"
            over = users - self._limits.users
            self._writer.execute(f"DELETE FROM users WHERE rowid IN ({oldest})", (over,))  # noqa: S608 - ours

    def _failed(self, error: Exception) -> BackendError:
        return BackendError(
            f"{self._path}: {error}; check the folder, its rights and free space, or give another --state"
        )


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Make the tables if there are none.

    Raises:
        BackendError: Another version of this package wrote the file.
    """
    _switch_to_wal(connection)
    connection.execute("PRAGMA synchronous = FULL")  # acknowledged events survive a power cut too
    connection.execute("PRAGMA secure_delete = ON")  # forgotten users do not stay in free pages of the file
    connection.execute("BEGIN IMMEDIATE")  # if processes start together, one makes the tables
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0:
        for statement in SCHEMA:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {FORMAT}")
    for statement in SEEN if version in (0, FORMAT) else ():
        connection.execute(statement)
    connection.execute("COMMIT")
    if version not in (0, FORMAT):
        raise BackendError(f"{path}: its format is {version}, this version reads {FORMAT}; give another --state")


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """SQLite itself does not wait here for other processes, such as those that start at the same moment."""
    limit = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.01)


def _select(connection: sqlite3.Connection, user: str) -> Events:
    row = connection.execute("SELECT events FROM users WHERE user = ?", (user,)).fetchone()
    return decode_events(None if row is None else row[0])


def _select_seen(connection: sqlite3.Connection, user: str) -> bytes:
    row = connection.execute("SELECT items FROM seen WHERE user = ?", (user,)).fetchone()
    return b"" if row is None else bytes(row[0])
