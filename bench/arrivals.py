"""How well the planner predicts the hit rate of a real cache: fitted on one week, tested on the next.

    python bench/arrivals.py [FOLDER of KuaiRand-Pure]

The log is read in two ways: "exposure", every exposure is a request; "slate", a request begins a slate (exposures of a
user on one surface with pauses under 30 minutes). For each, the arrival model is fitted on 25 April to 1 May 2022, and
an LRU cache replays the real requests of 2 to 8 May. It starts warm, with every earlier request; of the time before
25 April it has at least the last request of each user (`history_users.csv`), so that few known users count as new.

    by users    a cache of a share of the users, with and without a time to live from the last use
    by memory   a cache of a share of the pages of all users, with the real lengths of histories

    own log     the two weeks alone, as for `unipinrec plan --arrivals`: the cache starts empty and is warm after the
                first week; the second week is for the fit and for the comparison
    thinned     the cache over every second or fourth exposure: KuaiRand-Pure holds one in 224 of its users' exposures

Each prediction stands beside that for users who all come equally often and at random (Poisson). The planner's default
constants are the fit on both weeks, printed last.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from common import ROOT, card, finish
from numpy.typing import NDArray

from unipinrec.models.data.kuairand import read_kuairand
from unipinrec.models.data.validate import build_dataset
from unipinrec.runtime.kv.pages import KvGeometry
from unipinrec.runtime.tools.arrivals import FOREVER, ArrivalModel, fit_arrivals, pauses_of
from unipinrec.runtime.tools.capacity import (
    CapacityInput,
    Footprint,
    HistoryLengths,
    histories_of_mean,
    memory_of_all,
    outcome,
)

FIT_MS, TEST_MS, END_MS = 1_650_816_000_000, 1_651_420_800_000, 1_652_025_600_000  # Mondays, 00:00 in Beijing
MIDDLE_MS = (TEST_MS + END_MS) // 2  # histories grow; their mean length is taken in the middle of the test week
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
TTL_HOURS = (FOREVER, 1.0, 6.0, 24.0, 72.0)
SMALL_FP32 = Footprint(
    geometry=KvGeometry(tensors=8, heads=8, head_dim=32, dtype="fp32"), prefix_slots=1, max_history=992
)
FOLDER = Path(os.environ.get("UNIPINREC_DATA", ROOT.parent / "shared" / "data")) / "kuairand-pure"

Users = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Log:
    """Requests in order of time, and the users' histories: the events before the log begins, and those in it."""

    users: Users
    times_ms: Users
    earlier_events: Users
    event_users: Users
    event_times_ms: Users

    def history_lengths(self, time_ms: int) -> Users:
        """Events of each user before a time; users are numbered from 0."""
        before = self.event_users[self.event_times_ms < time_ms]
        return self.earlier_events + np.bincount(before, minlength=len(self.earlier_events))


def read_logs(folder: Path) -> dict[str, Log]:
    """The log under both definitions of a request."""
    dataset = build_dataset(read_kuairand(folder))
    events = dataset.events.select(pl.col("user_id").cast(pl.Int64), "timestamp_ms")
    timed = events.drop_nulls("timestamp_ms")
    slates = dataset.slates.group_by("slate_id").agg(pl.first("user_id").cast(pl.Int64), pl.first("timestamp_ms"))
    last, lengths = earlier_requests(folder, events)
    logs = {}
    for name, table in {"slate": slates, "exposure": timed.unique()}.items():
        requests = pl.concat([last, table.select("user_id", "timestamp_ms")]).sort("timestamp_ms", "user_id")
        logs[name] = Log(
            users=requests["user_id"].to_numpy(),
            times_ms=requests["timestamp_ms"].to_numpy(),
            earlier_events=lengths,
            event_users=timed["user_id"].to_numpy(),
            event_times_ms=timed["timestamp_ms"].to_numpy(),
        )
    return logs


def earlier_requests(folder: Path, events: pl.DataFrame) -> tuple[pl.DataFrame, Users]:
    """The last request of each user before the timed log, and the number of events; empty if all events have a time."""
    lengths = np.zeros(int(events["user_id"].to_numpy().max()) + 1, np.int64)
    paths = list(folder.glob("history_users.csv*"))
    if not paths:
        return events.clear(), lengths
    table = pl.read_csv(paths[0], glob=False)
    lengths[table["user_id"].to_numpy()] = table["history_len"].to_numpy()
    return table.select("user_id", pl.col("last_time_ms").alias("timestamp_ms")), lengths


def replay(log: Log, capacity: float, ttl_hours: float, pages_of: Callable[[int, int], int]) -> tuple[float, float]:
    """Shares of the requests of the test week that are hits of an LRU cache, and that come from new users.

    Args:
        log: Requests; those before the test week only warm the cache.
        capacity: Pages that the cache holds.
        ttl_hours: Longest time since the last use.
        pages_of: Pages that a user (first argument) takes at a time in ms.
    """
    cache: OrderedDict[int, tuple[int, int]] = OrderedDict()
    seen: set[int] = set()
    used = found = new = count = 0
    for user, time in zip(log.users.tolist(), log.times_ms.tolist(), strict=True):
        if time >= END_MS:
            break
        last, held = cache.pop(user, (None, 0))
        if time >= TEST_MS:
            count += 1
            found += last is not None and time - last <= ttl_hours * 3.6e6
            new += user not in seen
        seen.add(user)
        pages = pages_of(user, time)
        cache[user] = (time, pages)
        used += pages - held
        while used > capacity:
            used -= cache.popitem(last=False)[1][1]
    return found / count, new / count


def poisson(cached_share: float, ttl_hours: float, mean_hours: float) -> float:
    """Hit rate if all users come independently at the same rate: the share of cached users."""
    pause = min(-math.log1p(-cached_share) * mean_hours, ttl_hours)
    return -math.expm1(-pause / mean_hours)


def by_users(log: Log, model: ArrivalModel) -> list[dict[str, Any]]:
    """Predicted and replayed hit rates over sizes and times to live."""
    known = len(np.unique(log.users[log.times_ms < END_MS]))
    rows = []
    for share in SHARES:
        for ttl in TTL_HOURS:
            replayed, new = replay(log, int(share * known), ttl, lambda user, time: 1)
            row = {"users": share, "ttl_hours": None if ttl == FOREVER else ttl, "replayed": replayed, "new": new}
            random = poisson(share, ttl, 24 / model.requests_per_user_day)
            rows.append(row | {"predicted": model.found_share(share, ttl), "poisson": random})
    return rows


def by_memory(log: Log, model: ArrivalModel, histories: HistoryLengths) -> list[dict[str, Any]]:
    """The same over shares of the pages that all histories take, without a time to live."""
    lengths = log.history_lengths(MIDDLE_MS)
    users = np.unique(log.users[log.times_ms < END_MS])
    all_pages = SMALL_FP32.pages(lengths[users].astype(np.float64)).sum()
    pages = {
        time: SMALL_FP32.pages(log.history_lengths(time).astype(np.float64))
        for time in range(FIT_MS, END_MS, 86_400_000)
    }
    deployment = CapacityInput(footprint=SMALL_FP32, histories=histories, users=len(users), qps=1.0, arrivals=model)
    rows = []
    for share in SHARES:

        def pages_of(user: int, time: int) -> int:
            day = max(FIT_MS, time - (time - FIT_MS) % 86_400_000)
            return int(pages[day][user])

        replayed, _ = replay(log, share * all_pages, FOREVER, pages_of)
        predicted = outcome(deployment, int(share * memory_of_all(deployment))).found
        rows.append({"memory": share, "replayed": replayed, "predicted": predicted, "poisson": share})
    return rows


def own_log(log: Log) -> list[dict[str, Any]]:
    """The log without earlier events, as for `--arrivals`."""
    inside = (log.times_ms >= FIT_MS) & (log.times_ms < END_MS)
    part = replace(log, users=log.users[inside], times_ms=log.times_ms[inside])
    model = fit_arrivals(pauses_of(part.users, part.times_ms), "own log")
    known = len(np.unique(part.users))
    rows = []
    for share in SHARES:
        replayed, new = replay(part, int(share * known), FOREVER, lambda user, time: 1)
        rows.append({"users": share, "replayed": replayed, "new": new, "predicted": model.found_share(share)})
    return rows


def thinned(log: Log) -> list[dict[str, Any]]:
    """The replayed hit rate over a random part of the requests; shares are of the users in that part."""
    rng = np.random.default_rng(0)
    rows = []
    for kept in (1.0, 0.5, 0.25):
        mask = rng.random(len(log.users)) < kept
        part = replace(log, users=log.users[mask], times_ms=log.times_ms[mask])
        known = len(np.unique(part.users[part.times_ms < END_MS]))
        found = {str(share): replay(part, int(share * known), FOREVER, lambda user, time: 1) for share in SHARES}
        new = found[str(SHARES[0])][1]
        rows.append({"kept": kept, "users": known, "new": new, "replayed": {s: f for s, (f, _) in found.items()}})
    return rows


def history_shape(log: Log) -> dict[str, Any]:
    """Spread of the history lengths, and how a user's requests grow with the length; nothing of the test week."""
    before, after = log.history_lengths(FIT_MS), log.history_lengths(TEST_MS)
    requests = np.bincount(log.users[(log.times_ms >= FIT_MS) & (log.times_ms < TEST_MS)], minlength=len(before))
    known, lengths = before > 0, after[after > 0]
    ratio = float((before * requests).sum() / requests[known].sum() / before[known].mean())
    return {
        "mean_events": round(float(lengths.mean()), 2),
        "quantiles_over_mean": np.round(np.quantile(lengths, (np.arange(20) + 0.5) / 20) / lengths.mean(), 3).tolist(),
        "mean_over_requests_over_mean_over_users": round(ratio, 3),
        "activity_exponent": activity_exponent(before[known], ratio),
    }


def activity_exponent(lengths: Users, ratio: float) -> float:
    """The power of the length that, as a user's rate, gives this ratio of the means over requests and over users."""
    events = lengths.astype(np.float64)
    powers = np.arange(0.0, 2.0, 0.01)
    ratios = [(events ** (1 + p)).mean() / (events**p).mean() / events.mean() for p in powers]
    return round(float(powers[np.argmin(np.abs(np.array(ratios) - ratio))]), 2)


def measure(log: Log) -> dict[str, Any]:
    """Fit on the first week, compare with the second; the fit on both weeks beside it."""
    model = fit_arrivals(pauses_of(log.users, log.times_ms, FIT_MS, TEST_MS), "first week")
    both = fit_arrivals(pauses_of(log.users, log.times_ms, FIT_MS, END_MS), "both weeks")
    lengths = log.history_lengths(MIDDLE_MS)
    histories = histories_of_mean(float(lengths[lengths > 0].mean()))
    users, memory, own = by_users(log, model), by_memory(log, model, histories), own_log(log)
    return {
        "fitted": asdict(model),
        "fitted_on_both_weeks": asdict(both),
        "histories": history_shape(log),
        "by_users": users,
        "by_memory": memory,
        "own_log": own,
        "largest_difference": {
            "by_users": max(abs(row["predicted"] - row["replayed"]) for row in users),
            "by_memory": max(abs(row["predicted"] - row["replayed"]) for row in memory),
            "own_log": max(abs(row["predicted"] - row["replayed"]) for row in own),
            "poisson_by_users": max(abs(row["poisson"] - row["replayed"]) for row in users),
        },
    }


def rounded(value: Any) -> Any:
    """The same document with four decimals."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def show(name: str, result: dict[str, Any]) -> None:
    """Print the tables."""
    sys.stdout.write(f"\na request is one {name}: replayed / predicted / Poisson\n")
    heads = ["no TTL" if ttl == FOREVER else f"{ttl:g} h" for ttl in TTL_HOURS]
    sys.stdout.write("users  " + "".join(f"{head:>22}" for head in heads) + "\n")
    for share in SHARES:
        rows = [row for row in result["by_users"] if row["users"] == share]
        cells = (f"{row['replayed']:.3f} / {row['predicted']:.3f} / {row['poisson']:.3f}" for row in rows)
        sys.stdout.write(f"{share:<7.0%}" + "".join(f"{cell:>22}" for cell in cells) + "\n")
    for part, key in (("by_memory", "memory"), ("own_log", "users")):
        sys.stdout.write(f"{part}\n")
        for row in result[part]:
            cell = f"{row['replayed']:.3f} / {row['predicted']:.3f} / {row.get('poisson', row[key]):.3f}"
            sys.stdout.write(f"{row[key]:<7.0%}{cell:>22}\n")
    sys.stdout.write(
        f"fitted {result['fitted_on_both_weeks']}\n{result['histories']}\n{result['largest_difference']}\n"
    )


def main() -> None:
    """Measure both readings, print the tables, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    options = parser.parse_args()
    logs = read_logs(options.folder)
    results = {name: rounded(measure(log)) for name, log in logs.items()}
    for name, result in results.items():
        show(name, result)
    thin = rounded(thinned(logs["exposure"]))
    sys.stdout.write("".join(f"thinned {row}\n" for row in thin))
    about = {"data": "KuaiRand-Pure, 25 April to 8 May 2022", "by_memory_kv": asdict(SMALL_FP32)}
    document = {**card("arrivals"), **about, **results, "thinned": thin}
    finish(document, "arrivals")


if __name__ == "__main__":
    main()
