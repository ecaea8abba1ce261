from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unipinrec.errors import ConfigError
from unipinrec.runtime import CacheOptions, Event, Recommender
from unipinrec.runtime.bundle.manifest import ModelSpec
from unipinrec.runtime.bundle.quality import KvDtype
from unipinrec.runtime.kv.pages import KV_DTYPES, KvGeometry
from unipinrec.runtime.tools.arrivals import KUAIRAND, ArrivalModel
from unipinrec.runtime.tools.capacity import (
    ACTIVITY_EXPONENT,
    GIB,
    HISTORY_SHAPE,
    NO_LIMIT,
    CapacityInput,
    Footprint,
    HistoryLengths,
    StageCosts,
    UserPages,
    histories_of_mean,
    memory_of_all,
    outcome,
    requests_at_limit,
    smallest_fleet,
    user_pages,
)
from unipinrec.runtime.validation import window_start

RESULTS = Path(__file__).resolve().parents[3] / "bench/results/arrivals.json"
COSTS = StageCosts(encode_ms=30.0, extend_ms=3.0, retrieve_ms=2.0, rank_ms=11.0)
DAILY = ArrivalModel(
    weights=(1.0,), mean_hours=(24.0,), new_share=0.0, requests_per_user_day=1.0, users_days=1000.0, source="by hand"
)


def small(dtype: KvDtype = "fp32", page_slots: int = 32, max_history: int = 992) -> Footprint:
    geometry = KvGeometry(tensors=8, heads=8, head_dim=32, dtype=dtype, page_slots=page_slots)
    return Footprint(geometry=geometry, prefix_slots=1, max_history=max_history)


def deployment(**changes: Any) -> CapacityInput:
    """A thousand users of 31 events (one page of 256 KiB) who come once a day."""
    base = CapacityInput(
        footprint=small(), histories=HistoryLengths(events=(31.0,)), users=1000, qps=100.0, arrivals=DAILY, costs=COSTS
    )
    return replace(base, **changes)


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", 8192), ("fp16", 4096), ("bf16", 4096), ("int8", 2304)])
def test_bytes_of_an_event(dtype: KvDtype, expected: int) -> None:
    assert small(dtype).geometry.slot_bytes == expected


def test_a_user_holds_whole_pages() -> None:
    events = np.array([0.0, 1.0, 31.0, 32.0, 63.0, 64.0, 992.0, 5000.0])
    assert small().pages(events).tolist() == [1, 1, 1, 2, 2, 3, 32, 32]
    assert small(max_history=NO_LIMIT).pages(events)[-1] == 157


def test_the_footprint_of_a_model() -> None:
    model = ModelSpec(
        num_layers=12,
        num_kv_heads=4,
        head_dim=64,
        hidden_size=768,
        item_dim=256,
        max_history=1024,
        kv_prefix_slots=1,
        outcome_conditioned=False,
    )
    footprint = Footprint.of(model, "bf16")
    assert footprint.geometry.slot_bytes == 12_288
    assert (footprint.prefix_slots, footprint.max_history) == (1, 1024)


def test_lengths_of_a_mean_keep_it() -> None:
    lengths = np.array(histories_of_mean(200.0).events)
    assert lengths.mean() == pytest.approx(200.0)
    assert lengths.max() / lengths.mean() == pytest.approx(3.575 / 0.97915)


def test_active_users_hold_more_pages() -> None:
    pages = user_pages(small(), HistoryLengths(events=(31.0, 31.0, 31.0, 319.0), activity_exponent=1.0))
    assert pages.of_users == 3.25
    assert pages.of_requests == pytest.approx(6.5)  # 7.97, more than twice the mean of all users
    even = user_pages(small(), HistoryLengths(events=(31.0, 319.0), activity_exponent=0.0))
    assert (even.of_users, even.of_requests) == (5.5, 5.5)


def test_a_cache_fills_with_active_users_first() -> None:
    pages = UserPages(of_users=4.0, of_requests=6.0)
    assert pages.cached_share(0.0) == 0.0
    assert pages.cached_share(2.5) == pytest.approx(0.5)  # half the users, 5 pages each
    assert pages.cached_share(4.0) == pages.cached_share(9.0) == 1.0


def test_requests_at_the_limit() -> None:
    histories = HistoryLengths(events=(100.0, 400.0, 992.0, 2000.0), activity_exponent=0.0)
    assert requests_at_limit(small(), histories) == 0.5
    assert requests_at_limit(small(max_history=NO_LIMIT), histories) == 0.0


def test_equal_users_are_found_as_often_as_they_are_held() -> None:
    result = outcome(deployment(), 400 * 256 * 1024)
    assert result.cached_users == pytest.approx(400)
    assert result.found == pytest.approx(0.4)
    assert (result.hit, result.miss_new) == (0.0, 0.0)
    assert result.miss_lost == pytest.approx(0.6)
    assert result.ms_per_request == pytest.approx(0.4 * 3 + 0.6 * 30 + 13)
    assert result.machines == 5  # 100 / s * 32.2 ms / 0.7 = 4.6


def test_a_time_to_live_empties_the_cache() -> None:
    result = outcome(deployment(ttl_hours=24.0), memory_of_all(deployment()))
    assert result.found == pytest.approx(1 - np.exp(-1))
    assert result.cached_users == pytest.approx(1000 * (1 - np.exp(-1)))


def test_unchanged_histories_are_hits() -> None:
    result = outcome(deployment(unchanged_share=0.25), 400 * 256 * 1024)
    assert result.hit == pytest.approx(0.1)
    assert result.extend == pytest.approx(0.3)
    assert result.ms_per_request == pytest.approx(0.3 * 3 + 0.6 * 30 + 13)


def test_without_costs_no_machines() -> None:
    result = outcome(deployment(costs=None), GIB)
    assert (result.ms_per_request, result.machines) == (None, None)
    with pytest.raises(ConfigError, match="machines cannot be counted without stage costs"):
        smallest_fleet(deployment(costs=None), GIB)


def test_the_smallest_fleet_pools_its_memory() -> None:
    page = 256 * 1024
    assert smallest_fleet(deployment(), 0).machines == 7  # 100 / s * 43 ms / 0.7 = 6.1
    fleet = smallest_fleet(deployment(), 100 * page)
    assert (fleet.machines, fleet.memory_bytes) == (5, 500 * page)  # with 400 pages on four: 4.6
    assert smallest_fleet(deployment(), 300 * page).machines == 3  # with 900 pages: 2.7; on two, 600: 3.8
    assert smallest_fleet(deployment(qps=1.0), page).machines == 1


def test_a_footprint_or_a_history_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="max_history=0 at least 1"):
        small(max_history=0)
    for events in ((), (0.0, 0.0), (-1.0, 5.0), (float("nan"),), (float("inf"),)):
        with pytest.raises(ConfigError, match="history lengths must be numbers"):
            HistoryLengths(events=events)


shares = st.floats(0, 1)
lengths = st.lists(st.floats(1, 5000), min_size=1, max_size=20)


@given(low=shares, high=shares, mean=st.floats(1, 2000), pattern=st.sampled_from(["slate", "exposure"]))
def test_more_memory_finds_no_less(low: float, high: float, mean: float, pattern: str) -> None:
    plan = deployment(histories=histories_of_mean(mean), arrivals=KUAIRAND[pattern])
    everything = memory_of_all(plan)
    less, more = (outcome(plan, int(share * everything)) for share in sorted((low, high)))
    assert less.found <= more.found + 1e-9
    assert less.cached_users <= more.cached_users + 1e-6
    for result in (less, more):
        assert 0 <= result.found <= 1
        assert 0 <= result.cached_users <= 1000
        parts = result.hit + result.extend + result.miss_new + result.miss_lost
        assert parts == pytest.approx(1)
        assert min(result.hit, result.extend, result.miss_new, result.miss_lost) >= -1e-9


@given(short=st.floats(0.01, 1000), long=st.floats(0.01, 1000), share=shares)
def test_a_longer_time_to_live_finds_no_less(short: float, long: float, share: float) -> None:
    short, long = sorted((short, long))
    arrivals = KUAIRAND["slate"]
    found = [outcome(deployment(arrivals=arrivals, ttl_hours=ttl), int(share * GIB)).found for ttl in (short, long)]
    assert found[0] <= found[1] + 1e-9


@given(events=lengths, slots=st.integers(1, 128), dtype=st.sampled_from(["fp32", "bf16", "int8"]))
def test_pages_hold_the_slots_and_no_page_is_empty(events: list[float], slots: int, dtype: KvDtype) -> None:
    footprint = small(dtype, slots)
    held, needed = footprint.pages(np.array(events)), footprint.slots(np.array(events))
    assert (held * slots >= needed).all()
    assert ((held - 1) * slots < needed).all()


@given(events=lengths, users=st.integers(1, 10**6))
def test_memory_of_all_users_holds_all_users(events: list[float], users: int) -> None:
    plan = deployment(histories=HistoryLengths(events=tuple(events)), users=users)
    result = outcome(plan, memory_of_all(plan))
    assert result.cached_users == pytest.approx(users)
    per_user = user_pages(plan.footprint, plan.histories).of_users * plan.footprint.geometry.page_bytes
    assert memory_of_all(plan) == pytest.approx(users * per_user, abs=plan.footprint.geometry.page_bytes)


@given(gib=st.floats(0, 2), qps=st.floats(1, 1000))
def test_no_smaller_fleet_would_do(gib: float, qps: float) -> None:
    plan = deployment(qps=qps)
    fleet = smallest_fleet(plan, int(gib * GIB))
    assert fleet.machines is not None
    assert (outcome(plan, fleet.memory_bytes).machines or 0) <= fleet.machines
    if fleet.machines > 1:
        fewer = fleet.machines - 1
        assert (outcome(plan, fewer * int(gib * GIB)).machines or 0) > fewer


def test_the_constants_are_the_measured_ones() -> None:
    measured = json.loads(RESULTS.read_bytes())["slate"]["histories"]
    assert list(HISTORY_SHAPE) == measured["quantiles_over_mean"]
    assert measured["activity_exponent"] == ACTIVITY_EXPONENT


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_the_formula_gives_the_bytes_that_a_real_cache_uses(bundle: Path, dtype: KvDtype) -> None:
    recommender = Recommender.load(bundle, cache=CacheOptions(budget_bytes=1 << 22, dtype=dtype))
    lengths = [1, 14, 15, 16, 40, 64, 70]  # a page has 16 slots, one is the sink's; the last is beyond the limit of 64
    for user, events in enumerate(lengths):
        history = [Event(item=recommender.bundle.item_ids[0], actions=())] * events
        recommender.recommend(history, 5, user=str(user))
    model = recommender.bundle.manifest.model
    footprint = Footprint.of(model, dtype)
    kept = [min(events, events - window_start(events, model.max_history, 8)) for events in lengths]
    expected = footprint.pages(np.array(kept, np.float64)).sum() * footprint.geometry.page_bytes
    assert recommender.cache is not None
    statistics = recommender.cache.statistics()
    assert statistics.bytes_used == expected
    assert statistics.bytes_budget <= 1 << 22 < statistics.bytes_budget + footprint.geometry.page_bytes


GROWN = """
import re, sys
from pathlib import Path
from unipinrec.runtime import Bundle, CacheOptions, KvCache

def resident_kib():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))

model, before = Bundle.open(sys.argv[1]).manifest.model, resident_kib()
cache = KvCache(model, CacheOptions(budget_bytes=1 << 28))
print(cache.pages.nbytes, (resident_kib() - before) * 1024)
"""


def test_the_budget_is_resident_memory_from_the_start(bundle: Path) -> None:
    # In a process of its own: this one may have memory to give that it had freed before.
    done = subprocess.run([sys.executable, "-c", GROWN, str(bundle)], capture_output=True, text=True, check=True)
    allocated, grown = map(int, done.stdout.split())
    assert allocated == pytest.approx(1 << 28, rel=1e-3)
    assert grown == pytest.approx(1 << 28, rel=0.02)
