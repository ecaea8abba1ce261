"""Users' events in a Redis or Valkey server, for several replicas. Only this module uses its client.

There is one key for each user, and one for the items of dropped events. An append reads them and writes them if they
are as they were, and begins again if another replica wrote meanwhile. Connections to a server that was replaced are
closed, so that the next attempt goes to the server that has its address now.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

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
PREFIX, SEEN = "unipinrec:events:1:", "unipinrec:seen:1:"  # the number is that of the format
SCHEMES = ("redis", "rediss", "unix")
CONNECTIONS = 8
TIMEOUT_S = 2.0
ATTEMPTS = 20
RECONNECTS = 3  # other threads may put connections to a replaced server back meanwhile
RECONNECT_S = 0.05
SCANNED = 1_000  # keys at a time
# All or nothing, in any version of the server. Not MULTI: after a lost connection its client reports a conflict, and
# events that were stored would be stored again.
WRITE = """
for i, key in ipairs(KEYS) do
  local value = redis.call('GET', key)
  if (value and redis.sha1hex(value) or '') ~= ARGV[i] then return 0 end
end
for i, key in ipairs(KEYS) do redis.call('SET', key, ARGV[#KEYS + i]) end
return 1"""
FORGET = """
local events = redis.call('GET', KEYS[1])
redis.call('DEL', KEYS[1], KEYS[2])
return events"""


class RedisEventStore:
    """See `EventStore`. Events are as durable as the server's configuration makes them."""

    def __init__(self, url: str, limits: StoreLimits) -> None:
        """Connect to a server.

        Raises:
            BackendError: It does not answer, is a Sentinel or a node of a cluster, or refuses scripts; the client is
                not installed; or the URL has none of `SCHEMES`, or decodes answers.
        """
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            advice = "; Sentinel and clusters are not supported" if "+" in parts.scheme else ""
            raise BackendError(f"--state {parts.scheme}://...: give a folder, or a URL of {', '.join(SCHEMES)}{advice}")
        if "decode_responses" in parts.query:
            raise BackendError("--state: leave decode_responses out of the URL; events are stored as bytes")
        try:
            import redis  # noqa: PLC0415 - an extra
            from redis.backoff import NoBackoff  # noqa: PLC0415
            from redis.retry import Retry  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise BackendError("--state redis://... needs redis; run pip install 'unipinrec[redis]'") from error
        self.description = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"  # no password
        self._failures, self._lost = (redis.RedisError, OSError, msgspec.DecodeError), redis.ConnectionError
        # By these the server says that it did nothing.
        self._replaced = (redis.ReadOnlyError, redis.exceptions.MasterDownError, redis.BusyLoadingError)
        self._limits = limits
        self._threads = ThreadPoolExecutor(CONNECTIONS, "unipinrec-events")
        try:
            # Any: its types do not say whether answers are decoded.
            self._server: Any = redis.Redis.from_url(
                url,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                max_connections=CONNECTIONS,
                retry=Retry(NoBackoff(), 0),  # it would repeat writes whose answer was lost
            )
            self._check(self._server.info())
        except (*self._failures, ValueError) as error:
            raise self._failed(error) from error

    def _check(self, server: dict[str, Any]) -> None:
        mode = server.get("redis_mode", "standalone")
        if mode != "standalone" or server.get("cluster_enabled"):
            kind = "a Sentinel" if mode == "sentinel" else "a node of a cluster"
            raise BackendError(
                f"{self.description} is {kind}, which is not supported; give the address of one server, or one that "
                "leads to the main server after a failover"
            )
        self._server.eval(WRITE, 0)

    def append(self, appends: Sequence[Append], now_ms: int) -> Future[list[Receipt]]:
        """See `EventStore.append`."""
        return self._submit(partial(self._append, appends, now_ms))

    def histories(self, users: Sequence[str]) -> Future[list[Events]]:
        """See `EventStore.histories`."""
        return self._submit(lambda: [decode_events(raw) for raw in self._read([PREFIX + user for user in users])])

    def seen(self, users: Sequence[str]) -> Future[list[bytes]]:
        """See `EventStore.seen`."""
        return self._submit(lambda: [raw or b"" for raw in self._read([SEEN + user for user in users])])

    def users(self) -> Future[list[str]]:
        """See `EventStore.users`."""
        keys = partial(self._server.scan_iter, match=PREFIX + "*", count=SCANNED)
        found = partial(self._connected, lambda: {*keys()}, read=True)  # a scan may repeat keys
        return self._submit(lambda: [key.decode()[len(PREFIX) :] for key in found()])

    def forget(self, user: str) -> Future[int]:
        """See `EventStore.forget`."""
        forget = partial(self._server.eval, FORGET, 2, PREFIX + user, SEEN + user)
        return self._submit(lambda: len(decode_events(self._connected(forget))))

    def close(self) -> None:
        """See `EventStore.close`."""
        self._threads.shutdown()
        self._server.close()

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        def guarded() -> T:
            try:
                return work()
            except self._failures as error:
                raise self._failed(error) from error

        try:
            return self._threads.submit(guarded)
        except RuntimeError as error:
            raise BackendError(f"{self.description} is closed") from error

    def _connected(self, work: Callable[[], T], *, read: bool = False) -> T:
        """The result, by new connections if the server was replaced, or if the connection is lost in a read."""
        for _ in range(RECONNECTS):
            try:
                return work()
            except self._failures as error:
                self._server.connection_pool.disconnect(inuse_connections=False)
                old = "READONLY" in str(error)  # in a script, before version 7
                if not isinstance(error, (*self._replaced, self._lost) if read else self._replaced) and not old:
                    raise
                time.sleep(RECONNECT_S)
        return work()

    def _read(self, keys: Sequence[str]) -> list[bytes | None]:
        values: list[bytes | None] = self._connected(partial(self._server.mget, keys), read=True)
        return values

    def _append(self, appends: Sequence[Append], now_ms: int) -> list[Receipt]:
        for attempt in range(ATTEMPTS):
            receipts = self._try_append(appends, now_ms)
            if receipts is not None:
                return receipts
            time.sleep(random.uniform(0.0, 1e-3 * 2 ** min(attempt, 7)))
        raise BackendError(f"{self.description}: others wrote the same users {ATTEMPTS} times; send the events again")

    def _try_append(self, appends: Sequence[Append], now_ms: int) -> list[Receipt] | None:
        """None if another replica wrote meanwhile."""
        keys, receipts = [PREFIX + append.user for append in appends], []
        before = dict(zip(keys, self._read(keys), strict=True))
        known = {key: decode_events(raw) for key, raw in before.items()}
        gone: dict[str, Events] = {}
        for key, append in zip(keys, appends, strict=True):
            known[key], receipt, dropped = merged(known[key], append, self._limits.events, now_ms)
            receipts.append(receipt)
            if dropped:
                gone[SEEN + append.user] = gone.get(SEEN + append.user, ()) + dropped
        after = {key: encode_events(events) for key, events in known.items() if events}
        if gone:
            for (key, events), seen in zip(gone.items(), self._read([*gone]), strict=True):
                before[key], after[key] = seen, remembered(seen or b"", events, self._limits.seen)
        hashes = ["" if (value := before[key]) is None else hashlib.sha1(value).hexdigest() for key in after]  # noqa: S324
        write = partial(self._server.eval, WRITE, len(after), *after, *hashes, *after.values())
        return receipts if self._connected(write) else None

    def _failed(self, error: Exception) -> BackendError:
        return BackendError(f"{self.description}: {error}; check that the server runs and can be reached from here")
