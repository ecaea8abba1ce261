"""The stores of users' events, which are appended as they happen and kept in the order of their times.

All stores follow `merged`: an event goes behind those of the same time; an event with a known id is a duplicate and
changes nothing; beyond the limit the oldest events go, an eighth of all at a time, so that a cached history does not
move with every event.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

import msgspec

from unipinrec.errors import ConfigError
from unipinrec.runtime.requests import Event
from unipinrec.runtime.server.events.seen import remembered

T = TypeVar("T")
DROPPED_PART = 8


class StoredEvent(Event, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True):
    """An event with the id from its client, if any; the item is a string."""

    id: str | None = None


Events = tuple[StoredEvent, ...]


_EVENTS: msgspec.msgpack.Decoder[Events] = msgspec.msgpack.Decoder(Events)


class Append(msgspec.Struct, frozen=True, kw_only=True):
    """New events of a user, in the order in which they were sent; `ahead` is that of the receipt."""

    user: str
    events: Events
    ahead: int = 0


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an `Append`.

    Attributes:
        user: The user.
        appended: Events that are now part of the history.
        duplicates: Events whose id was known.
        out_of_order: Appended events that went before an event already there: the history must be encoded again.
        dropped: The oldest events, which were dropped beyond the limit.
        events: Events in the history now.
        ahead: Sent events whose time was ahead of the server's clock; they have the time of their arrival.
    """

    user: str
    appended: int
    duplicates: int
    out_of_order: int
    dropped: int
    events: int
    ahead: int = 0


class EventStore(Protocol):
    """Keeps users' events. Safe to use from several threads; methods return futures and do not wait.

    Every later `histories` reads the events of a finished `append`. Futures fail with BackendError where the store
    does; a future that is cancelled before its work began changes nothing.
    """

    description: str
    """Where events are kept, for the log."""

    def append(self, appends: Sequence[Append], now_ms: int) -> Future[list[Receipt]]:
        """Add events that arrived at `now_ms`; all of them are kept, or none."""
        ...

    def histories(self, users: Sequence[str]) -> Future[list[Events]]:
        """The events of each user, oldest first; empty for an unknown user."""
        ...

    def seen(self, users: Sequence[str]) -> Future[list[bytes]]:
        """Hashes of the items of each user's dropped events, the newest first, as in `remembered`."""
        ...

    def users(self) -> Future[list[str]]:
        """All users, in no order; with writes at the same time, some of them may be missing."""
        ...

    def forget(self, user: str) -> Future[int]:
        """Delete all of a user; returns the number of deleted events."""
        ...

    def close(self) -> None:
        """Finish all appends, then release everything."""
        ...


def merged(known: Events, append: Append, limit: int, now_ms: int) -> tuple[Events, Receipt, Events]:
    """A history with new events, of at most `limit`, and the events that it drops.

    An event without a time gets `now_ms`, or the time of the last event if that is later. It stays without a time where
    no event before it has one, since data without times has none anywhere.
    """
    events, ids = list(known), {event.id for event in known}
    appended = late = 0
    for event in append.events:
        if event.id is not None and event.id in ids:
            continue
        last_ms = events[-1].timestamp_ms if events else None
        if event.timestamp_ms is None and last_ms is not None:
            event = msgspec.structs.replace(event, timestamp_ms=max(now_ms, last_ms))  # noqa: PLW2901
        index = bisect_right(events, _time(event), key=_time)
        late += index < len(events)
        events.insert(index, event)
        ids.add(event.id)
        appended += 1
    dropped = len(events) - (limit - limit // DROPPED_PART) if len(events) > limit else 0
    gone, events = events[:dropped], events[dropped:]
    receipt = Receipt(
        user=append.user,
        appended=appended,
        duplicates=len(append.events) - appended,
        out_of_order=late,
        dropped=dropped,
        events=len(events),
        ahead=append.ahead,
    )
    return tuple(events), receipt, tuple(gone)


def _time(event: Event) -> int:
    return -1 if event.timestamp_ms is None else event.timestamp_ms


def encode_events(events: Events) -> bytes:
    """Events as stores keep them: MessagePack, a tenth of the objects' memory."""
    return msgspec.msgpack.encode(events)


def decode_events(stored: bytes | None) -> Events:
    """Events from their stored form; None is an empty history.

    Raises:
        DecodeError: It is not that form.
    """
    return () if stored is None else _EVENTS.decode(stored)


def done(value: T) -> Future[T]:
    """A future that is done already."""
    future: Future[T] = Future()
    future.set_result(value)
    return future


class StoreLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much a store keeps.

    Attributes:
        events: Most events of one user.
        seen: Most items of dropped events that are remembered of one user; 8 bytes each.
        users: Most users; beyond it the user whose last event is the oldest is forgotten.
        memory_bytes: Most bytes of all events and items, in a store in memory; beyond it the same.
    """

    events: int
    seen: int = 10_000
    users: int = 100_000
    memory_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        if min(self.events, self.users, self.memory_bytes) < 1:
            raise ConfigError(
                f"a store of {self.users} users with {self.events} events in {self.memory_bytes} bytes must hold at "
                "least 1 of each"
            )


class MemoryEventStore:
    """Keeps events in this process, until it ends. Only for the event loop's thread."""

    description = "memory, which a restart forgets"

    def __init__(self, limits: StoreLimits) -> None:
        self._limits = limits
        self._users: OrderedDict[str, bytes] = OrderedDict()
        self._seen: dict[str, bytes] = {}
        self._bytes = 0

    def append(self, appends: Sequence[Append], now_ms: int) -> Future[list[Receipt]]:
        """See `EventStore.append`."""
        receipts = []
        for append in appends:
            user, limits = append.user, self._limits
            events, receipt, gone = merged(self._read(user), append, limits.events, now_ms)
            receipts.append(receipt)
            if receipt.appended:
                seen = self._seen.get(user, b"")
                self._drop(user)
                self._users[user] = encode_events(events)
                self._seen[user] = remembered(seen, gone, limits.seen) if gone else seen
                self._bytes += len(self._users[user]) + len(self._seen[user])
            while len(self._users) > self._limits.users or self._bytes > self._limits.memory_bytes:
                self._drop(next(iter(self._users)))
        return done(receipts)

    def histories(self, users: Sequence[str]) -> Future[list[Events]]:
        """See `EventStore.histories`."""
        return done([self._read(user) for user in users])

    def seen(self, users: Sequence[str]) -> Future[list[bytes]]:
        """See `EventStore.seen`."""
        return done([self._seen.get(user, b"") for user in users])

    def users(self) -> Future[list[str]]:
        """See `EventStore.users`."""
        return done(list(self._users))

    def forget(self, user: str) -> Future[int]:
        """See `EventStore.forget`."""
        known = len(self._read(user))
        self._drop(user)
        return done(known)

    def close(self) -> None:
        """See `EventStore.close`."""
        self._users.clear()
        self._seen.clear()

    def _read(self, user: str) -> Events:
        return decode_events(self._users.get(user))

    def _drop(self, user: str) -> None:
        self._bytes -= len(self._users.pop(user, b"")) + len(self._seen.pop(user, b""))
