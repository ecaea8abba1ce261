"""How many requests a client may send. Everything runs in the event loop's thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from unipinrec.errors import ConfigError
from unipinrec.runtime.server.bodies import ApiError, whole_seconds

MOST_CLIENTS = 20_000
TOLERANCE_S = 1e-6  # of sums of floats


class RateLimit:
    """A bucket of requests for each client, filled at a steady rate."""

    def __init__(self, per_s: float, burst: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Let each client send `per_s` requests a second, and `burst` at once; None = those of a second, at least 1.

        Raises:
            ConfigError: The rate is not above 0, or `burst` is below 1.
        """
        self.burst = max(1, math.ceil(per_s)) if burst is None and 0 < per_s < math.inf else burst
        if not 0 < per_s < math.inf or self.burst is None or self.burst < 1:
            raise ConfigError(f"rate_limit={per_s} must be more than 0 a second, and rate_burst={burst} at least 1")
        self.per_s, self._now = per_s, clock
        self._full_at: dict[str, float] = {}  # when a client's bucket is full again; the latest client is the last

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, client: str) -> None:
        """Count a request.

        Raises:
            ApiError: 429, the client's bucket is empty.
        """
        assert self.burst is not None  # see __init__
        now = self._now()
        wait_s = max(0.0, self._full_at.get(client, now) - now) - (self.burst - 1) / self.per_s
        if wait_s > TOLERANCE_S:
            message = (
                f"this client may send {self.per_s:g} requests a second, {self.burst} at once; send the request again "
                "after Retry-After seconds"
            )
            raise ApiError(429, "rate_limited", message, {"retry-after": whole_seconds(wait_s)})
        self.charge(client, 1)

    def charge(self, client: str, count: int) -> None:
        """Count requests that were accepted already, as those of a list; the next ones wait for longer.

        Beyond `MOST_CLIENTS` the client that was silent for longest is forgotten.
        """
        now = self._now()
        self._full_at[client] = max(now, self._full_at.pop(client, now)) + count / self.per_s
        if len(self._full_at) > MOST_CLIENTS:
            del self._full_at[next(iter(self._full_at))]
