"""Bring the histories of prepared data into the store of a server's events, so that the server starts warm."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec

from unipinrec.export.lists.prepared import PreparedHistories
from unipinrec.runtime.requests import Event
from unipinrec.runtime.server.events.store import Append, EventStore, Receipt, StoredEvent

USERS, EVENTS = 64, 5_000  # of an append: Redis holds up other clients for the time of one
IN_FLIGHT = 3
ID_BYTES = 8


@dataclass(kw_only=True)
class Loaded:
    """What became of the events of a data set.

    Attributes:
        users: Users of the data set.
        events: Their events.
        appended: Events that are new in the store.
        known: Events that were in the store.
        left_out: Events that are older than a user's newest `kept`, or than those that an earlier load brought.
        dropped: The oldest events of the store, which gave way to new ones beyond its limit.
    """

    users: int = 0
    events: int = 0
    appended: int = 0
    known: int = 0
    left_out: int = 0
    dropped: int = 0


def load_histories(
    histories: PreparedHistories, store: EventStore, kept: int, on_part: Callable[[int], None] = lambda events: None
) -> Loaded:
    """Append the newest `kept` events of each user, unless they are in the store; once more changes nothing.

    Args:
        histories: The users and their events.
        store: Keeps at least `kept` events of a user.
        kept: Most events of a user.
        on_part: Called with the number of events so far.

    Raises:
        DataError: The data cannot be read.
        BackendError: The store failed; what it acknowledged before is kept.
    """
    loaded, waiting = Loaded(), deque[Future[list[Receipt]]]()

    def settle(most: int) -> None:
        while len(waiting) > most:
            for receipt in waiting.popleft().result():
                loaded.appended += receipt.appended
                loaded.known += receipt.duplicates
                loaded.dropped += receipt.dropped

    for part in histories.parts(USERS, EVENTS):
        users = list(histories.read(part))
        appends = []
        stored = store.histories([user for user, _ in users]).result()
        for (user, events), before in zip(users, stored, strict=True):
            new = _missing(with_ids(events)[-kept:], {event.id for event in before}, loaded)
            loaded.users += 1
            loaded.events += len(events)
            loaded.left_out += max(0, len(events) - kept)
            if new:
                appends.append(Append(user=user, events=new))
        if appends:
            waiting.append(store.append(appends, time.time_ns() // 1_000_000))
        settle(IN_FLIGHT)
        on_part(loaded.events)
    settle(0)
    return loaded


def _missing(events: tuple[StoredEvent, ...], ids: set[str | None], loaded: Loaded) -> tuple[StoredEvent, ...]:
    """The events that are not in the store; those before the first one there went beyond its limit, and stay out."""
    first = next((place for place, event in enumerate(events) if event.id in ids), 0)
    new = tuple(event for event in events[first:] if event.id not in ids)
    loaded.left_out += first
    loaded.known += len(events) - first - len(new)
    return new


def with_ids(events: Sequence[Event]) -> tuple[StoredEvent, ...]:
    """All events of a user with ids: 16 hexadecimal digits of the content, and of its number among equal events.

    They stay the same when newer events follow.
    """
    times, stored = Counter[Event](), []
    for event in events:
        content = msgspec.json.encode([event.item, event.actions, event.surface, event.timestamp_ms, times[event]])
        times[event] += 1
        digest = hashlib.blake2b(content, digest_size=ID_BYTES).hexdigest()
        stored.append(StoredEvent(**msgspec.structs.asdict(event), id=digest))
    return tuple(stored)
