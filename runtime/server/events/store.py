"""What the server knows of users: their events, appended as they happen, in the order of their times.

One rule for all stores, `merged`: an event takes the place that its time says, after those of the same time; an event
whose id is known is a duplicate and changes nothing; beyond the limit the oldest go, an eighth of all at a time, so
that what is cached of a history does not move with every event.
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

T = TypeVar("T")
DROPPED_PART = 8


class StoredEvent(Event, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True):
    """An event with the id under which it was sent, if any; the item is a string."""

    id: str | None = None


Events = tuple[StoredEvent, ...]


_EVENTS: msgspec.msgpack.Decoder[Events] = msgspec.msgpack.Decoder(Events)


class Append(msgspec.Struct, frozen=True, kw_only=True):
    """What a user just did: events in the order in which they were sent."""

    user: str
    events: Events


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an `Append`.

    Attributes:
        user: Whose events.
        appended: Events that are now part of the history.
        duplicates: Events whose id was known.
        out_of_order: Of the appended, those that went before an event that was there: their user is encoded anew.
        dropped: Events that were too old to be kept.
        events: How many the history has now.
    """

    user: str
    appended: int
    duplicates: int
    out_of_order: int
    dropped: int
    events: int


class EventStore(Protocol):
    """Keeps users' events. Safe to use from several threads; nothing here waits, futures do.

    What an `append` reported is read by every later `histories`. Futures fail with BackendError where the store does;
    one that is cancelled before its work began leaves nothing behind.
    """

    description: str
    """Where events are kept, for people."""

    def append(self, appends: Sequence[Append], now_ms: int) -> Future[list[Receipt]]:
        """Add events that came in at `now_ms`; all of them are kept, or none is."""
        ...

    def histories(self, users: Sequence[str]) -> Future[list[Events]]:
        """The events of each user, oldest first; none of a user who is not known."""
        ...

    def forget(self, user: str) -> Future[int]:
        """Delete a user; returns how many events that were."""
        ...

    def close(self) -> None:
        """Keep what was appended, then release everything."""
        ...


def merged(known: Events, append: Append, limit: int, now_ms: int) -> tuple[Events, Receipt]:
    """A history with new events in it, of at most `limit`.

    An event without a time gets `now_ms`, or the time of the last event if that is later; it stays without one where no
    event before it has one, since data without times has none anywhere.
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
    dropped = 0
    if len(events) > limit:
        dropped = len(events) - (limit - limit // DROPPED_PART)
        del events[:dropped]
    receipt = Receipt(
        user=append.user,
        appended=appended,
        duplicates=len(append.events) - appended,
        out_of_order=late,
        dropped=dropped,
        events=len(events),
    )
    return tuple(events), receipt


def _time(event: Event) -> int:
    return -1 if event.timestamp_ms is None else event.timestamp_ms


def encode_events(events: Events) -> bytes:
    """What stores keep of a user: MessagePack, a tenth of what the objects take."""
    return msgspec.msgpack.encode(events)


def decode_events(stored: bytes | None) -> Events:
    """What was encoded; nothing of None.

    Raises:
        DecodeError: It is something else.
    """
    return () if stored is None else _EVENTS.decode(stored)


def done(value: T) -> Future[T]:
    """A future that need not be waited for."""
    future: Future[T] = Future()
    future.set_result(value)
    return future


class StoreLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much a store keeps.

    Attributes:
        events: Of one user.
        users: In all; beyond it the user whose last event came longest ago is forgotten.
        memory_bytes: Of all users' events where they are kept in memory; beyond it the same.
    """

    events: int
    users: int = 100_000
    memory_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        if min(self.events, self.users, self.memory_bytes) < 1:
            raise ConfigError(
                f"a store of {self.users} users with {self.events} events in {self.memory_bytes} bytes must hold at "
                "least 1 of each"
            )


class MemoryEventStore:
    """Keeps events in this process; a restart forgets them. For one thread alone, that of the event loop."""

    description = "memory, which a restart forgets"

    def __init__(self, limits: StoreLimits) -> None:
        self._limits = limits
        self._users: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def append(self, appends: Sequence[Append], now_ms: int) -> Future[list[Receipt]]:
        """See `EventStore.append`."""
        receipts = []
        for append in appends:
            events, receipt = merged(self._read(append.user), append, self._limits.events, now_ms)
            receipts.append(receipt)
            if receipt.appended:
                self._drop(append.user)
                self._users[append.user] = encode_events(events)
                self._bytes += len(self._users[append.user])
            while len(self._users) > self._limits.users or self._bytes > self._limits.memory_bytes:
                self._drop(next(iter(self._users)))
        return done(receipts)

    def histories(self, users: Sequence[str]) -> Future[list[Events]]:
        """See `EventStore.histories`."""
        return done([self._read(user) for user in users])

    def forget(self, user: str) -> Future[int]:
        """See `EventStore.forget`."""
        known = len(self._read(user))
        self._drop(user)
        return done(known)

    def close(self) -> None:
        """See `EventStore.close`."""
        self._users.clear()

    def _read(self, user: str) -> Events:
        return decode_events(self._users.get(user))

    def _drop(self, user: str) -> None:
        self._bytes -= len(self._users.pop(user, b""))
