"""The memory of a key/value cache, its hit rate, and the machines for a load. Arithmetic alone.

Bytes follow from the geometry of the cache (`kv/pages.py`) and are exact. The hit rate is an estimate from an arrival
model (`arrivals.py`). The caller passes the times of the stages.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import ConfigError
from unipinrec.runtime.bundle.manifest import ModelSpec
from unipinrec.runtime.bundle.quality import KvDtype
from unipinrec.runtime.kv.pages import PAGE_SLOTS, KvGeometry
from unipinrec.runtime.tools.arrivals import FOREVER, ArrivalModel

GIB = 2**30
NO_LIMIT = 2**31

# KuaiRand-Pure by bench/arrivals.py: history lengths at the 2.5th, 7.5th ... 97.5th percentile over their mean.
HISTORY_SHAPE = (
    *(0.041, 0.102, 0.163, 0.223, 0.284, 0.366, 0.427, 0.508, 0.589, 0.67),
    *(0.772, 0.873, 0.995, 1.117, 1.28, 1.463, 1.686, 1.991, 2.458, 3.575),
)
ACTIVITY_EXPONENT = 0.51  # a user's requests grow with this power of the history's length, by the same benchmark


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The size of a user's history in a cache.

    Attributes:
        geometry: Bytes of a slot, slots of a page.
        prefix_slots: Slots before the first event (1 with an attention sink).
        max_history: Longest history in events; longer histories are cut. `NO_LIMIT` = no limit.
    """

    geometry: KvGeometry
    prefix_slots: int
    max_history: int

    def __post_init__(self) -> None:
        if self.prefix_slots < 0 or self.max_history < 1:
            raise ConfigError(
                f"prefix_slots={self.prefix_slots} must be at least 0, max_history={self.max_history} at least 1"
            )

    @classmethod
    def of(cls, model: ModelSpec, dtype: KvDtype, page_slots: int = PAGE_SLOTS) -> Footprint:
        """The footprint of a bundle's model."""
        geometry = KvGeometry.of(model, dtype, page_slots)
        return cls(geometry=geometry, prefix_slots=model.kv_prefix_slots, max_history=model.max_history)

    def slots(self, events: NDArray[np.float64]) -> NDArray[np.float64]:
        """Slots of histories of these lengths."""
        return np.ceil(np.minimum(events, self.max_history)) + self.prefix_slots

    def pages(self, events: NDArray[np.float64]) -> NDArray[np.float64]:
        """Whole pages that histories of these lengths hold."""
        return np.ceil(self.slots(events) / self.geometry.page_slots)


@dataclass(frozen=True, kw_only=True)
class HistoryLengths:
    """Equally likely lengths of users' histories in events, and how a user's activity grows with the length."""

    events: tuple[float, ...]
    activity_exponent: float = ACTIVITY_EXPONENT

    def __post_init__(self) -> None:
        if not self.events or not all(0 <= length < FOREVER for length in self.events) or max(self.events) == 0:
            raise ConfigError("history lengths must be numbers of events, 0 or more, and not all 0")


def histories_of_mean(mean_events: float) -> HistoryLengths:
    """Lengths with this mean, distributed as in KuaiRand-Pure."""
    scale = mean_events / (sum(HISTORY_SHAPE) / len(HISTORY_SHAPE))
    return HistoryLengths(events=tuple(scale * part for part in HISTORY_SHAPE))


@dataclass(frozen=True, kw_only=True)
class UserPages:
    """Mean pages per user: over all users, and over the requests, where active users count more."""

    of_users: float
    of_requests: float

    def cached_share(self, pages_per_user: float) -> float:
        """Share of the users in a cache with this many pages per user of the whole population.

        A small cache holds the active users with long histories: the mean pages of its users fall in a straight line
        from `of_requests` for an empty cache to `of_users` for a cache of all users.
        """
        if pages_per_user >= self.of_users:
            return 1.0
        bend = self.of_requests - self.of_users  # pages = s * of_requests - s**2 * bend, solved for s
        return 2 * pages_per_user / (self.of_requests + math.sqrt(self.of_requests**2 - 4 * bend * pages_per_user))


def user_pages(footprint: Footprint, histories: HistoryLengths) -> UserPages:
    """Mean whole pages per user."""
    events = np.array(histories.events)
    pages = footprint.pages(events)
    activity = events**histories.activity_exponent
    of_users, of_requests = float(pages.mean()), float((pages * activity).sum() / activity.sum())
    # Beyond twice the mean, the line would give the last users negative numbers of pages.
    return UserPages(of_users=of_users, of_requests=min(of_requests, 2 * of_users))


def requests_at_limit(footprint: Footprint, histories: HistoryLengths) -> float:
    """Share of the requests whose history reaches the model's longest history."""
    events = np.array(histories.events)
    activity = events**histories.activity_exponent
    return float(activity[events >= footprint.max_history].sum() / activity.sum())


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """Machine time of each stage for one request, in ms."""

    encode_ms: float
    extend_ms: float
    retrieve_ms: float
    rank_ms: float


@dataclass(frozen=True, kw_only=True)
class CapacityInput:
    """The input of a plan.

    Attributes:
        footprint: The size of a history in a cache.
        histories: Lengths of the users' histories.
        users: Distinct users of `arrivals.users_days`.
        qps: Requests per second.
        arrivals: When users return.
        ttl_hours: Time to live of an unused entry.
        unchanged_share: Share of the requests of cached users without a new event, which need no `extend`.
        costs: Machine time per stage; None = unknown.
        utilisation: Planned share of a machine's time.
    """

    footprint: Footprint
    histories: HistoryLengths
    users: float
    qps: float
    arrivals: ArrivalModel
    ttl_hours: float = FOREVER
    unchanged_share: float = 0.0
    costs: StageCosts | None = None
    utilisation: float = 0.7


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The effect of a cache of one size.

    Attributes:
        memory_bytes: Size of the cache, over all machines.
        cached_users: Number of users in the cache.
        hit, extend, miss_new, miss_lost: Shares of the requests that encode nothing, that encode new events, and that
            encode all events of a new user, or of an evicted or expired user; they sum to 1.
        ms_per_request: Mean machine time; None = stage costs are unknown.
        machines: Machines for the requests per second at the planned utilisation; None = stage costs are unknown.
    """

    memory_bytes: int
    cached_users: float
    hit: float
    extend: float
    miss_new: float
    miss_lost: float
    ms_per_request: float | None
    machines: int | None

    @property
    def found(self) -> float:
        """Share of the requests of cached users: hit or extend."""
        return self.hit + self.extend


def memory_of_all(deployment: CapacityInput) -> int:
    """Bytes that hold every user."""
    pages = user_pages(deployment.footprint, deployment.histories)
    return math.ceil(deployment.users * pages.of_users) * deployment.footprint.geometry.page_bytes


def outcome(deployment: CapacityInput, memory_bytes: int) -> Outcome:
    """The effect of a cache of this size over all machines."""
    footprint, arrivals = deployment.footprint, deployment.arrivals
    pages_per_user = memory_bytes // footprint.geometry.page_bytes / deployment.users
    cached = user_pages(footprint, deployment.histories).cached_share(pages_per_user)
    hits = arrivals.found_share(cached, deployment.ttl_hours)  # or extended
    if deployment.ttl_hours < FOREVER:
        cached = min(cached, arrivals.seen_share(deployment.ttl_hours))  # earlier users have expired
    extend = hits * (1 - deployment.unchanged_share)
    milliseconds = machines = None
    if deployment.costs is not None:
        costs = deployment.costs
        milliseconds = (1 - hits) * costs.encode_ms + extend * costs.extend_ms + costs.retrieve_ms + costs.rank_ms
        busy = deployment.qps * milliseconds / 1000 / deployment.utilisation
        machines = max(1, math.ceil(round(busy, 9)))
    return Outcome(
        memory_bytes=memory_bytes,
        cached_users=cached * deployment.users,
        hit=hits - extend,
        extend=extend,
        miss_new=arrivals.new_share,
        miss_lost=1 - arrivals.new_share - hits,
        ms_per_request=milliseconds,
        machines=machines,
    )


def smallest_fleet(deployment: CapacityInput, machine_bytes: int) -> Outcome:
    """The fewest machines that carry the load when each adds `machine_bytes` to the cache.

    More machines cache more users and so need less time per request. The outcome's memory is that of all machines.

    Raises:
        ConfigError: Stage costs are unknown.
    """
    if deployment.costs is None:
        raise ConfigError("machines cannot be counted without stage costs; give the time of each stage")

    def needed(machines: int) -> int:
        return outcome(deployment, machines * machine_bytes).machines or 1

    fleets = range(1, needed(0))  # with an empty cache, needed(0) machines suffice
    machines = 1 + bisect.bisect_left(fleets, True, key=lambda count: needed(count) <= count)
    return replace(outcome(deployment, machines * machine_bytes), machines=machines)
