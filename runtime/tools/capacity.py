"""How much memory a key/value cache takes, what it finds, and how many machines a load needs. Arithmetic alone.

Bytes follow from the geometry of the cache itself (`kv/pages.py`) and are exact; the share of requests that the cache
serves follows from an arrival model (`arrivals.py`) and is an estimate; times are the caller's, measured elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import ConfigError
from unipinrec.runtime.bundle.manifest import ModelSpec
from unipinrec.runtime.kv.pages import PAGE_SLOTS, KvDtype, KvGeometry
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
    """What a user's history takes in a cache.

    Attributes:
        geometry: Bytes of a slot, slots of a page.
        prefix_slots: Slots before the first event (1 with an attention sink).
        max_history: Longest history in events; longer ones are cut to it. `NO_LIMIT` if there is none.
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
class Histories:
    """How long the users' histories are: equally likely lengths in events, and how activity goes with them."""

    events: tuple[float, ...]
    activity_exponent: float = ACTIVITY_EXPONENT

    def __post_init__(self) -> None:
        if not self.events or not all(0 <= length < FOREVER for length in self.events) or max(self.events) == 0:
            raise ConfigError("history lengths must be numbers of events, 0 or more, and not all 0")


def histories_of_mean(mean_events: float) -> Histories:
    """Lengths of this mean, spread as those of KuaiRand-Pure."""
    scale = mean_events / (sum(HISTORY_SHAPE) / len(HISTORY_SHAPE))
    return Histories(events=tuple(scale * part for part in HISTORY_SHAPE))


@dataclass(frozen=True, kw_only=True)
class UserPages:
    """Mean pages per user: over all users, and over the requests, where the active ones count more."""

    of_users: float
    of_requests: float

    def cached_share(self, pages_per_user: float) -> float:
        """Share of the users that a cache of so many pages per user of the whole population holds.

        Its few users are the active ones, with the long histories: the mean pages of those held fall in a straight line
        from `of_requests`, where it holds hardly anyone, to `of_users`, where it holds everyone.
        """
        if pages_per_user >= self.of_users:
            return 1.0
        bend = self.of_requests - self.of_users  # pages = s * of_requests - s**2 * bend, solved for s
        return 2 * pages_per_user / (self.of_requests + math.sqrt(self.of_requests**2 - 4 * bend * pages_per_user))


def user_pages(footprint: Footprint, histories: Histories) -> UserPages:
    """Mean whole pages per user."""
    events = np.array(histories.events)
    pages = footprint.pages(events)
    activity = events**histories.activity_exponent
    of_users, of_requests = float(pages.mean()), float((pages * activity).sum() / activity.sum())
    # Beyond twice the mean the line would give the last users fewer than no pages.
    return UserPages(of_users=of_users, of_requests=min(of_requests, 2 * of_users))


def requests_at_limit(footprint: Footprint, histories: Histories) -> float:
    """Share of the requests whose history is as long as the model allows, or longer."""
    events = np.array(histories.events)
    activity = events**histories.activity_exponent
    return float(activity[events >= footprint.max_history].sum() / activity.sum())


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """EngineHost time of each stage in ms: how long one machine is busy with it for one request."""

    encode_ms: float
    extend_ms: float
    retrieve_ms: float
    rank_ms: float


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """All that a plan is computed from.

    Attributes:
        footprint: What a history takes.
        histories: Lengths of the users' histories.
        users: Distinct users of `arrivals.users_days`.
        qps: Requests per second to be served.
        arrivals: When users come back.
        ttl_hours: An entry not used for so long is not served.
        unchanged_share: Share of the found requests without a new event, which need no `extend`.
        costs: EngineHost time per stage, or None if unknown.
        utilisation: Share of a machine's time to be planned with.
    """

    footprint: Footprint
    histories: Histories
    users: float
    qps: float
    arrivals: ArrivalModel
    ttl_hours: float = FOREVER
    unchanged_share: float = 0.0
    costs: StageCosts | None = None
    utilisation: float = 0.7


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a cache of one size brings.

    Attributes:
        memory_bytes: Size of the cache, over all machines.
        cached_users: Users that it holds.
        hit, extend, miss_new, miss_lost: Shares of the requests that are served as they are, that encode the new
            events, that encode all for a new user, and that encode all for one evicted or expired; they sum to 1.
        ms_per_request: Mean machine time, if stage costs are known.
        machines: Machines for the requests per second at the planned utilisation, if stage costs are known.
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
        """Share of the requests that find their user: hit or extend."""
        return self.hit + self.extend


def memory_of_all(deployment: Deployment) -> int:
    """Bytes that hold every user."""
    pages = user_pages(deployment.footprint, deployment.histories)
    return math.ceil(deployment.users * pages.of_users) * deployment.footprint.geometry.page_bytes


def outcome(deployment: Deployment, memory_bytes: int) -> Outcome:
    """What a cache of this size, over all machines together, brings."""
    footprint, arrivals = deployment.footprint, deployment.arrivals
    pages_per_user = memory_bytes // footprint.geometry.page_bytes / deployment.users
    cached = user_pages(footprint, deployment.histories).cached_share(pages_per_user)
    found = arrivals.found_share(cached, deployment.ttl_hours)
    if deployment.ttl_hours < FOREVER:
        cached = min(cached, arrivals.seen_share(deployment.ttl_hours))  # who was seen earlier has expired
    extend = found * (1 - deployment.unchanged_share)
    milliseconds = machines = None
    if deployment.costs is not None:
        costs = deployment.costs
        milliseconds = (1 - found) * costs.encode_ms + extend * costs.extend_ms + costs.retrieve_ms + costs.rank_ms
        busy = deployment.qps * milliseconds / 1000 / deployment.utilisation
        machines = max(1, math.ceil(round(busy, 9)))
    return Outcome(
        memory_bytes=memory_bytes,
        cached_users=cached * deployment.users,
        hit=found - extend,
        extend=extend,
        miss_new=arrivals.new_share,
        miss_lost=1 - arrivals.new_share - found,
        ms_per_request=milliseconds,
        machines=machines,
    )


def smallest_fleet(deployment: Deployment, machine_bytes: int) -> Outcome:
    """The fewest machines that carry the load when each adds `machine_bytes` to the cache.

    More machines hold more users and so need less time per request; the fewest that suffice are found by bisection.
    The outcome's `machines` is their number, its memory that of all together.

    Raises:
        ConfigError: Stage costs are unknown.
    """
    if deployment.costs is None:
        raise ConfigError("machines cannot be counted without stage costs; give the time of each stage")

    def needed(machines: int) -> int:
        return outcome(deployment, machines * machine_bytes).machines or 1

    low, high = 1, needed(0)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if needed(middle) <= middle else (middle + 1, high)
    return replace(outcome(deployment, low * machine_bytes), machines=low)
