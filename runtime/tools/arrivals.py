"""A small model of request arrivals: when users return, and the hit rate of a cache of recent users.

A user returns after one of three kinds of pause, each exponential (soon, about a day, several days); some requests come
from new users. That is the whole model. A cache that evicts the least recently seen user holds, at size s, the users
seen within its characteristic time T (Che's approximation). So a request is a hit if the pause before it was at most T,
or the time to live if that is shorter.

Knows nothing of bytes (`capacity.py`) or of the cached values.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import ConfigError, DataError
from unipinrec.runtime.requests import YEAR_10000_MS

KINDS = 3
MIN_RETURNS = 1000
COLUMNS = ("user", "timestamp_ms")
FOREVER = math.inf
HOUR_MS = 3_600_000
EARLIEST_MS = 100_000_000_000  # March 1973; a smaller time is in seconds, or means that it is unknown
BINS_PER_DECADE = 100
ROUNDS = 1000
BISECTIONS = 80


@dataclass(frozen=True, kw_only=True)
class ArrivalModel:
    """Pauses between a user's requests, and how many requests come from new users.

    Attributes:
        weights: Share of each kind of pause among the requests of returning users; they sum to 1.
        mean_hours: Mean of each kind.
        new_share: Share of requests from users who were not seen before. As many users leave.
        requests_per_user_day: Requests per day over the distinct users of `users_days`.
        users_days: The days over which distinct users are counted.
        source: Description of the measured log.
    """

    weights: tuple[float, ...]
    mean_hours: tuple[float, ...]
    new_share: float
    requests_per_user_day: float
    users_days: float
    source: str

    def found_share(self, cached_share: float, ttl_hours: float = FOREVER) -> float:
        """Share of requests that find their user in a cache of `cached_share` of the users, 0 to 1."""
        pause = min(self.characteristic_hours(cached_share), ttl_hours)
        return (1 - self.new_share) * sum(
            weight * -math.expm1(-pause / mean) for weight, mean in zip(self.weights, self.mean_hours, strict=True)
        )

    def seen_share(self, hours: float) -> float:
        """Users seen within the last `hours`, as a share of the users of `users_days`."""
        returning = sum(
            weight * mean * -math.expm1(-hours / mean)
            for weight, mean in zip(self.weights, self.mean_hours, strict=True)
        )
        return self.requests_per_user_day / 24 * (self.new_share * hours + (1 - self.new_share) * returning)

    def characteristic_hours(self, cached_share: float) -> float:
        """T: time since the last request of the next user that a full cache of this size evicts."""
        if cached_share <= 0:
            return 0.0
        if cached_share >= min(1.0, self._present):
            return FOREVER
        return _bisected(lambda hours: self.seen_share(hours) < cached_share, self.users_days * 24)

    def at_rate(self, requests_per_user_day: float, new_share: float | None = None) -> ArrivalModel:
        """The same pattern, stretched in time to another rate of requests; the number of lost users stays the same.

        Args:
            requests_per_user_day: The rate to stretch to.
            new_share: Share of requests from new users; None = the same number of new users per day as before.

        Raises:
            ConfigError: The rate or the share contradicts the number of users.
        """
        rate = requests_per_user_day
        share = self.new_share * self.requests_per_user_day / rate if new_share is None else new_share
        present = self._present
        if rate * self.users_days <= present:
            raise ConfigError(
                f"{rate:.3g} requests per user and day are less than one of each user in {self.users_days:.3g} days; "
                f"count the distinct users of {self.users_days:.3g} days, or give a rate above "
                f"{present / self.users_days:.3g}"
            )
        if not 0 <= share * rate * self.users_days < present:
            raise ConfigError(
                f"a share of {share:.3g} new users among the requests, at {rate:.3g} requests per user and day, is not "
                f"possible: in {self.users_days:.3g} days the new users alone would outnumber all users; give a share "
                f"below {present / rate / self.users_days:.3g}, or the distinct users of {self.users_days:.3g} days"
            )
        factor = _bisected(lambda factor: self._stretched(factor, rate, share)._present < present, 1e6)
        return self._stretched(factor, rate, share)

    @property
    def _present(self) -> float:
        return self.seen_share(self.users_days * 24)

    def _stretched(self, factor: float, rate: float, new_share: float) -> ArrivalModel:
        hours = tuple(hours * factor for hours in self.mean_hours)
        return replace(self, mean_hours=hours, new_share=new_share, requests_per_user_day=rate)


def _bisected(too_small: Callable[[float], bool], most: float) -> float:
    """The smallest number from 0 to `most` that is not too small."""
    low, high = 0.0, most
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if too_small(middle) else (low, middle)
    return high


# Fitted by bench/arrivals.py on KuaiRand-Pure, 25 April to 8 May 2022: 27,077 users, exposures to 7,583 videos only.
KUAIRAND = {
    "slate": ArrivalModel(
        weights=(0.1478, 0.5207, 0.3315),
        mean_hours=(2.1472, 21.6051, 90.4883),
        new_share=0.0032,
        requests_per_user_day=0.5078,
        users_days=29.4193,
        source="KuaiRand-Pure, a request begins a slate",
    ),
    "exposure": ArrivalModel(
        weights=(0.2071, 0.4629, 0.33),
        mean_hours=(0.5323, 17.4119, 85.0875),
        new_share=0.0028,
        requests_per_user_day=0.582,
        users_days=29.4193,
        source="KuaiRand-Pure, every exposure is a request",
    ),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Pauses:
    """The pause before each request of the measured time.

    Attributes:
        hours: [R] f64, of the requests of known users.
        new: Number of requests of new users.
        days: Length of the measured time.
        users: Distinct users of the whole log.
        users_days: Length of the whole log.
    """

    hours: NDArray[np.float64]
    new: int
    days: float
    users: int
    users_days: float


def pauses_of(
    users: NDArray[np.int64], times_ms: NDArray[np.int64], from_ms: int | None = None, to_ms: int | None = None
) -> Pauses:
    """Measure pauses in a log of requests, in any order.

    The log before `from_ms` only shows known users, so that their first measured requests do not count as new users.

    Args:
        users: [R] user of each request, as any number.
        times_ms: [R] time of each request.
        from_ms: Start of the measured time; None = the middle of the log.
        to_ms: End of the measured time; None = the end of the log.

    Raises:
        DataError: Too few users came back.
    """
    end = int(times_ms.max(initial=0)) + 1 if to_ms is None else to_ms
    users, times_ms = users[times_ms < end], times_ms[times_ms < end]
    begin = int(times_ms.min(initial=end))
    start = (begin + end) // 2 if from_ms is None else from_ms
    order = np.lexsort((times_ms, users))
    user, time = users[order], times_ms[order]
    returns = np.flatnonzero((np.diff(user) == 0) & (time[1:] >= start)) + 1
    if len(returns) < MIN_RETURNS:
        raise DataError(
            f"{len(returns)} requests of returning users in the measured part of the log; at least {MIN_RETURNS} are "
            "needed; give a longer log, or more users"
        )
    measured = int((time >= start).sum())
    return Pauses(
        hours=(time[returns] - time[returns - 1]) / HOUR_MS,
        new=measured - len(returns),
        days=(end - start) / HOUR_MS / 24,
        users=len(np.unique(user)),
        users_days=(end - begin) / HOUR_MS / 24,
    )


def fit_arrivals(pauses: Pauses, source: str) -> ArrivalModel:
    """Fit the mixture of pauses by expectation maximisation (maximum likelihood) over logarithmic bins."""
    seconds = np.maximum(pauses.hours * 3600, 1.0)
    bins = (np.log10(seconds) * BINS_PER_DECADE).astype(np.int64)
    counts = np.bincount(bins)
    hours = np.bincount(bins, weights=seconds)[counts > 0] / counts[counts > 0] / 3600
    share = counts[counts > 0] / len(seconds)
    weights = np.full(KINDS, 1 / KINDS)
    means = np.quantile(seconds / 3600, (np.arange(KINDS) + 0.5) / KINDS) * np.linspace(0.9, 1.1, KINDS)
    for _ in range(ROUNDS):
        density = weights / means * np.exp(-hours[:, None] / means)  # (bins, kinds)
        belongs = share[:, None] * density / np.maximum(density.sum(1, keepdims=True), 1e-300)
        weights = belongs.sum(0) / belongs.sum()
        means = (belongs * hours[:, None]).sum(0) / np.maximum(belongs.sum(0), 1e-300)
        means = np.maximum(means, 1 / 3600)
    order = np.argsort(means)
    requests = len(seconds) + pauses.new
    return ArrivalModel(
        weights=tuple(weights[order].tolist()),
        mean_hours=tuple(means[order].tolist()),
        new_share=pauses.new / requests,
        requests_per_user_day=requests / pauses.days / pauses.users,
        users_days=pauses.users_days,
        source=source,
    )


def read_log(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read a log of requests: CSV with the columns `user` and `timestamp_ms`, in any order; others are ignored.

    Returns:
        [R] user numbers and [R] times.

    Raises:
        DataError: Not readable, a column is missing, or a time is not a Unix time in whole ms.
    """
    codes: dict[str, int] = {}
    users, times = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = set(COLUMNS) - set(rows.fieldnames or ())
            if missing:
                raise DataError(f"{path}: no column {sorted(missing)}; a log needs a header line with {list(COLUMNS)}")
            for row in rows:
                users.append(codes.setdefault(row["user"], len(codes)))
                times.append(_unix_ms(row["timestamp_ms"]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as CSV: {error}") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: line {len(times) + 2}: timestamp_ms is Unix time in ms, whole: {error}") from error
    return np.array(users, np.int64), np.array(times, np.int64)


def _unix_ms(text: str) -> int:
    time_ms = int(text)
    if not EARLIEST_MS <= time_ms < YEAR_10000_MS:
        raise ValueError(f"{time_ms} is not one from {EARLIEST_MS} to {YEAR_10000_MS - 1}; remove the row, or convert")
    return time_ms
