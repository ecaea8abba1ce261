"""Users' events in a Redis or Valkey server, for several replicas. Only this module uses its client.

There is one key for each user. An append reads it and writes it, and begins again if another replica wrote meanwhile.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from unipinrec.errors import BackendError
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
PREFIX = "unipinrec:events:1:"  # the number is that of the format
SCHEMES = ("redis", "rediss", "unix")
CONNECTIONS = 8
TIMEOUT_S = 2.0
ATTEMPTS = 20
SCANNED = 1_000  # keys at a time


class RedisEventStore:
    """See `EventStore`. Events are as durable as the server's configuration makes them."""

    def __init__(self, url: str, limits: StoreLimits) -> None:
        """Connect to a server.

        Raises:
            BackendError: It does not answer, the client is not installed, or the URL has none of `SCHEMES`.
        """
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise BackendError(f"--state {parts.scheme}://...: give a folder, or a URL of {', '.join(SCHEMES)}")
        try:
            import redis  # noqa: PLC0415 - an extra
        except ModuleNotFoundError as error:
            raise BackendError("--state redis://... needs redis; run pip install 'unipinrec[redis]'") from error
        self.description = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"  # no password
        self._failures, self._conflict = (redis.RedisError, OSError, msgspec.DecodeError), redis.WatchError
        self._limits = limits
        self._threads = ThreadPoolExecutor(CONNECTIONS, "unipinrec-events")
        try:
            # Any: its types do not say whether answers are decoded.
            self._server: Any = redis.Redis.from_url(
                url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, max_connections=CONNECTIONS
            )
            self._server.ping()
        except (*self._failures, ValueError) as error:
            raise self._failed(error) from error

    def append(self, appends: Sequence[Append], now_ms: int) -> Future[list[Receipt]]:
        """See `EventStore.append`."""
        return self._submit(partial(self._append, appends, now_ms))

    def histories(self, users: Sequence[str]) -> Future[list[Events]]:
        """See `EventStore.histories`."""
        return self._submit(lambda: [decode_events(raw) for raw in self._server.mget([_key(user) for user in users])])

    def users(self) -> Future[list[str]]:
        """See `EventStore.users`."""
        keys = partial(self._server.scan_iter, match=_key("*"), count=SCANNED)
        return self._submit(lambda: [key.decode()[len(PREFIX) :] for key in {*keys()}])  # a scan may repeat keys

    def forget(self, user: str) -> Future[int]:
        """See `EventStore.forget`."""
        return self._submit(lambda: len(decode_events(self._server.getdel(_key(user)))))

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

    def _append(self, appends: Sequence[Append], now_ms: int) -> list[Receipt]:
        for attempt in range(ATTEMPTS):
            try:
                return self._try_append(appends, now_ms)
            except self._conflict:
                time.sleep(random.uniform(0.0, 1e-3 * 2 ** min(attempt, 7)))
        raise BackendError(f"{self.description}: others wrote the same users {ATTEMPTS} times; send the events again")

    def _try_append(self, appends: Sequence[Append], now_ms: int) -> list[Receipt]:
        keys, receipts = [_key(append.user) for append in appends], []
        with self._server.pipeline() as pipe:
            pipe.watch(*keys)
            known = {key: decode_events(raw) for key, raw in zip(keys, pipe.mget(keys), strict=True)}
            pipe.multi()
            for key, append in zip(keys, appends, strict=True):
                known[key], receipt = merged(known[key], append, self._limits.events, now_ms)
                receipts.append(receipt)
            for key, events in known.items():
                pipe.set(key, encode_events(events))
            pipe.execute()
        return receipts

    def _failed(self, error: Exception) -> BackendError:
        return BackendError(f"{self.description}: {error}; check that the server runs and can be reached from here")


def _key(user: str) -> str:
    return PREFIX + user
