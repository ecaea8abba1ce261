from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from unipinrec.errors import ConfigError, DataError
from unipinrec.runtime.tools.arrivals import FOREVER, KUAIRAND, ArrivalModel, fit_arrivals, pauses_of, read_log

RESULTS = Path(__file__).resolve().parents[3] / "bench/results/arrivals.json"
HOUR = 3_600_000
Log = tuple[NDArray[np.int64], NDArray[np.int64]]

DAILY = ArrivalModel(
    weights=(1.0,), mean_hours=(24.0,), new_share=0.0, requests_per_user_day=1.0, users_days=1000.0, source="by hand"
)


@pytest.fixture(scope="module")
def log() -> Log:
    """60 days of 400 users; pauses of 0.5, 12 or 72 hours in the mean, at 50, 30 and 20 %."""
    rng = np.random.default_rng(5)
    users, times = [], []
    for user in range(400):
        pauses = rng.exponential(rng.choice([0.5, 12.0, 72.0], p=[0.5, 0.3, 0.2], size=500))
        time = np.cumsum(pauses) * HOUR
        time = time[time < 60 * 24 * HOUR].astype(np.int64)
        users.append(np.full(len(time), user))
        times.append(time)
    return np.concatenate(users), np.concatenate(times)


def test_equal_users_are_found_as_often_as_they_are_held() -> None:
    for share in (0.1, 0.5, 0.9):
        assert DAILY.found_share(share) == pytest.approx(share)
    assert DAILY.characteristic_hours(0.5) == pytest.approx(24 * math.log(2))
    assert DAILY.characteristic_hours(1.0) == FOREVER
    assert DAILY.found_share(0.5, ttl_hours=1.0) == pytest.approx(1 - math.exp(-1 / 24))


def test_bursts_raise_what_a_small_cache_finds() -> None:
    bursty = ArrivalModel(
        weights=(0.5, 0.5),
        mean_hours=(0.1, 47.9),
        new_share=0.0,
        requests_per_user_day=1.0,
        users_days=1000.0,
        source="by hand",
    )
    assert bursty.found_share(0.02) == pytest.approx(0.508, abs=1e-3)


def test_new_users_are_never_found() -> None:
    model = KUAIRAND["slate"].at_rate(1.0, new_share=0.02)
    assert model.found_share(1.0) == pytest.approx(0.98)
    assert model.new_share == 0.02


@pytest.mark.parametrize("pattern", ["slate", "exposure"])
def test_another_rate_is_the_same_pattern_in_another_time(pattern: str) -> None:
    model = KUAIRAND[pattern]
    rate = model.requests_per_user_day
    assert model.at_rate(rate).mean_hours == pytest.approx(model.mean_hours)
    fast = model.at_rate(10 * rate)
    assert fast.mean_hours[0] == pytest.approx(model.mean_hours[0] / 10, rel=0.01)
    assert fast.new_share == pytest.approx(model.new_share / 10)
    for share in (0.05, 0.3, 0.8):
        assert fast.found_share(share) == pytest.approx(model.found_share(share), abs=0.01)


def test_more_new_users_than_users_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"share of 0.5 new users .*, at 10 requests per user and day, is not"):
        KUAIRAND["slate"].at_rate(10.0, new_share=0.5)


def test_fewer_requests_than_users_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"0.02 requests per user and day are less than one of each user in 29.4"):
        KUAIRAND["slate"].at_rate(0.02)


@given(rate=st.floats(0.04, 100))
def test_the_users_present_stay_the_same_share(rate: float) -> None:
    model = KUAIRAND["slate"]
    window = model.users_days * 24
    assert model.at_rate(rate).seen_share(window) == pytest.approx(model.seen_share(window))


def test_pauses_of_a_log() -> None:
    users = np.array([1, 2, 1, 3, 2, *([4] * 1001)])
    times = np.array([0, 2, 6, 8, 9, *np.linspace(5, 10, 1001)]) * HOUR
    pauses = pauses_of(users, times.astype(np.int64), from_ms=5 * HOUR)
    assert (pauses.new, pauses.users) == (2, 4)  # user 3, and the first of user 4
    assert sorted(pauses.hours.tolist())[-2:] == [6.0, 7.0]
    assert pauses.days == pytest.approx(5 / 24)
    assert pauses.users_days == pytest.approx(10 / 24)


def test_requests_after_the_end_are_left_out(log: Log) -> None:
    users, times = log
    cut = times < 30 * 24 * HOUR
    whole = pauses_of(users, times, to_ms=30 * 24 * HOUR)
    part = pauses_of(users[cut], times[cut], from_ms=15 * 24 * HOUR)
    assert len(whole.hours) == pytest.approx(len(part.hours), rel=0.01)


def test_the_fit_finds_the_pauses_again(log: Log) -> None:
    model = fit_arrivals(pauses_of(*log), "made up")
    assert model.weights == pytest.approx((0.5, 0.3, 0.2), abs=0.03)
    assert model.mean_hours == pytest.approx((0.5, 12.0, 72.0), rel=0.12)
    assert model.new_share < 0.001
    assert model.requests_per_user_day == pytest.approx(24 / (0.25 + 3.6 + 14.4), rel=0.05)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("ttl_hours", [FOREVER, 1.0, 24.0])
def test_the_prediction_is_that_of_a_replay(log: Log, share: float, ttl_hours: float) -> None:
    model = fit_arrivals(pauses_of(*log), "made up")
    assert model.found_share(share, ttl_hours) == pytest.approx(replayed(log, int(share * 400), ttl_hours), abs=0.015)


def replayed(log: Log, size: int, ttl_hours: float) -> float:
    """Share of the second month's requests that an LRU cache of so many users finds."""
    cache: OrderedDict[int, int] = OrderedDict()
    found = count = 0
    order = np.argsort(log[1], kind="stable")
    for user, time in zip(log[0][order].tolist(), log[1][order].tolist(), strict=True):
        last = cache.pop(user, None)
        if time >= 30 * 24 * HOUR:
            count += 1
            found += last is not None and time - last <= ttl_hours * HOUR
        cache[user] = time
        if len(cache) > size:
            cache.popitem(last=False)
    return found / count


rates = st.floats(0.04, 50)


@given(low=st.floats(0, 1), high=st.floats(0, 1), ttl=st.floats(0.01, 2000), rate=rates)
def test_larger_caches_find_no_less(low: float, high: float, ttl: float, rate: float) -> None:
    model = KUAIRAND["exposure"].at_rate(rate)
    less, more = (model.found_share(share, ttl) for share in sorted((low, high)))
    assert 0 <= less <= more + 1e-9
    assert more <= 1


@given(share=st.floats(0.001, 0.8), rate=rates)
def test_the_characteristic_time_is_when_the_cache_is_full(share: float, rate: float) -> None:
    model = KUAIRAND["slate"].at_rate(rate)
    assert model.seen_share(model.characteristic_hours(share)) == pytest.approx(share, rel=1e-6)


def test_a_log_is_read_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("timestamp_ms,page,user\n1650000001000,home,b\n1650000000500,search,a\n1650000001500,home,b\n")
    users, times = read_log(path)
    assert (users.tolist(), times.tolist()) == ([0, 1, 0], [1_650_000_001_000, 1_650_000_000_500, 1_650_000_001_500])


def test_the_earliest_and_the_latest_time(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,timestamp_ms\na,100000000000\na,253402300799999\n")
    assert read_log(path)[1].tolist() == [100_000_000_000, 253_402_300_799_999]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,time\na,1\n", r"no column \['timestamp_ms'\]; a log needs a header line"),
        ("", r"no column \['timestamp_ms', 'user'\]"),
        ("user,timestamp_ms\na,1650000000000\nb,soon\n", "line 3: timestamp_ms is Unix time in ms, whole"),
        (
            "user,timestamp_ms\na,1650000000000\nb,0\n",
            "line 3: .* Unix time in ms, whole: 0 is not one from 100000000000",
        ),
        ("user,timestamp_ms\na,1650000000\n", "line 2: .* 1650000000 is not one from 100000000000 to 253402300799999"),
        ("user,timestamp_ms\na,1650000000000000\n", "line 2: .* 1650000000000000 is not one from"),
        ("user,timestamp_ms\na,99999999999999999999\n", "line 2: .* 99999999999999999999 is not one from"),
        ("user,timestamp_ms\na,-1650000000000\n", "line 2: .* -1650000000000 is not one from"),
        ("user,timestamp_ms\na\n", "line 2: timestamp_ms is Unix time in ms, whole"),
    ],
)
def test_a_log_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_log(path)


def test_a_log_that_is_too_short(log: Log) -> None:
    with pytest.raises(DataError, match="requests of returning users in the measured part of the log; at least 1000"):
        pauses_of(log[0][:500], log[1][:500])
    with pytest.raises(DataError, match="0 requests of returning users"):
        pauses_of(np.array([], np.int64), np.array([], np.int64))


@pytest.mark.parametrize("pattern", ["slate", "exposure"])
def test_the_constants_are_the_measured_ones(pattern: str) -> None:
    measured = json.loads(RESULTS.read_bytes())[pattern]["fitted_on_both_weeks"]
    model = KUAIRAND[pattern]
    for name in ("new_share", "requests_per_user_day", "users_days"):
        assert getattr(model, name) == measured[name]
    assert list(model.weights) == measured["weights"]
    assert list(model.mean_hours) == measured["mean_hours"]


@pytest.mark.parametrize("pattern", ["slate", "exposure"])
def test_the_measured_predictions_are_those_of_this_code(pattern: str) -> None:
    result = json.loads(RESULTS.read_bytes())[pattern]
    fitted: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in result["fitted"].items()
    }
    model = ArrivalModel(**fitted)
    for row in result["by_users"]:
        predicted = model.found_share(row["users"], row["ttl_hours"] or FOREVER)
        assert predicted == pytest.approx(row["predicted"], abs=2e-4)
        assert abs(row["predicted"] - row["replayed"]) < 0.033
