"""From a log without negatives to a ranker trained on a server's own log: does it order better than retrieval?

    python bench/served_loop.py --out FOLDER [--users 1500] [--items 1000] [--epochs 12] [--seeds 7 8 9]

    1  Simulated users; the data is users, items and times of clicks before the last week. No slate, no other action.
    2  Train, export, and serve with `--log-served`.
    3  At each moment of the week at which a simulated user came, in order of time for each: POST /v1/recommend with
       the clicks so far, k = 10; the user looks at the list and clicks by the simulator's truth, which becomes events.
    4  `prepare served`, train again, export.
    5  At the moments of the last two days, which the second model was neither trained nor chosen on: the true chance of
       a click, mean of ten items, of its 200 candidates in the order of its value and of its `retrieval_score`. Beside
       it the lists that were served, and the best ten of the same candidates by the truth.

The first bundle is served in the order of retrieval, since its ranker saw nothing but clicks; the second one by value,
or by the blend that `export` chooses ("as_served_now").
The user's interests are those of the simulator's own run: the lists do not change them. The true chance is that of a
viewed item. Every step is the command that a user would type.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
from common import card, finish
from numpy.typing import NDArray
from open_loop import ask, post
from served import Served

from unipinrec.models.config import DAY_MS
from unipinrec.models.data.schema import Dataset, TimeSplit, event_columns, write_dataset
from unipinrec.models.data.validate import RawTables, build_dataset
from unipinrec.models.simulator.oracle import oracle_click_chances
from unipinrec.models.simulator.simulator import examination, simulate
from unipinrec.models.simulator.world import DWELL_MS, SimulatorConfig
from unipinrec.runtime import Event, Recommender, RecommendOptions

K, CANDIDATES, TOGETHER = 10, 200, 32
LOGGED_DAYS, TEST_DAYS = 7, 2
ACTION = "click"
Moment = Mapping[str, Any]  # slate_id, user_id, timestamp_ms, surface


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Settings of one run."""

    out: Path
    users: int = 1_500
    items: int = 1_000
    epochs: int = 12
    seed: int = 7

    @property
    def simulator(self) -> SimulatorConfig:
        return SimulatorConfig(users=self.users, items=self.items, seed=self.seed)

    @property
    def ends_ms(self) -> int:
        return self.simulator.start_ms + self.simulator.days * DAY_MS


@dataclass(kw_only=True)
class World:
    """The known data of the users, and the truth about them."""

    data: Dataset
    moments: Sequence[Moment]
    chances: NDArray[np.float32]  # (moments, items)
    rows: dict[str, int]
    histories: dict[str, list[Event]] = field(default_factory=dict)

    def before(self, moment: Moment) -> list[Event]:
        """The clicks of a user before a moment."""
        events = self.histories.get(moment["user_id"], [])
        return [event for event in events if (event.timestamp_ms or 0) < moment["timestamp_ms"]]

    def value(self, index: int, items: Sequence[str]) -> float:
        """Mean true chance of a click at a moment."""
        return float(self.chances[index, [self.rows[item] for item in items]].mean())


def world_of(loop: Loop) -> World:
    """Simulate, and keep the clicks before the week as the known data."""
    data, oracle = simulate(loop.simulator)
    begins = loop.ends_ms - LOGGED_DAYS * DAY_MS
    clicks = data.events.filter(pl.col(f"action_{ACTION}") & (pl.col("timestamp_ms") < begins))
    moments = data.slates.unique("slate_id", maintain_order=True).filter(pl.col("timestamp_ms") >= begins)
    moments = moments.sort("timestamp_ms", "slate_id").select("slate_id", "user_id", "timestamp_ms", "surface")
    world = World(
        data=data,
        moments=moments.to_dicts(),
        chances=oracle_click_chances(oracle, moments["slate_id"].to_list()),
        rows={item: row for row, item in enumerate(data.items["item_id"])},
    )
    for user, item, surface, time_ms in clicks.select("user_id", "item_id", "surface", "timestamp_ms").iter_rows():
        event = Event(item=item, actions=(ACTION,), surface=surface, timestamp_ms=time_ms)
        world.histories.setdefault(user, []).append(event)
    return world


def write_known(world: World, folder: Path, split: TimeSplit) -> None:
    """A prepared data set of the known clicks."""
    rows = [
        (user, event.item, event.surface, event.timestamp_ms, True)
        for user, events in world.histories.items()
        for event in events
    ]
    events = pl.DataFrame(rows, schema=event_columns((ACTION,)), orient="row")
    raw = RawTables(
        name="clicks",
        source="simulated, no real person or item",
        actions=(ACTION,),
        positive_actions=(ACTION,),
        events=events,
        items=world.data.items,
        split=split,
    )
    write_dataset(build_dataset(raw), folder)


def command(*words: str | Path) -> None:
    """Run one subcommand of `unipinrec`; its output goes to standard error."""
    given = [str(word) for word in words]
    sys.stderr.write(f"$ unipinrec {' '.join(given)}\n")
    subprocess.run([sys.executable, "-m", "unipinrec", *given], check=True, stdout=sys.stderr)


def bundle_of(loop: Loop, name: str, data: Path) -> Path:
    """Train on a data set and export."""
    checkpoint, bundle = loop.out / f"{name}-checkpoint", loop.out / f"{name}-bundle"
    command("train", "--data", data, "--out", checkpoint, "--epochs", str(loop.epochs), "--seed", str(loop.seed))
    command("export", checkpoint, bundle, "--data", data)
    return bundle


def serve_the_week(loop: Loop, world: World, bundle: Path) -> tuple[Path, dict[int, list[str]]]:
    """Ask a real server at every moment and let the users click; the log, and the lists by place of the moment."""
    log, rng, lists = loop.out / "served", np.random.default_rng(loop.seed), dict[int, list[str]]()
    options = ("--log-served", log, "--threads", "1", "--deadline-ms", "30000")
    with _stopped(Served.of(bundle, loop.out, *options)) as server:
        for together in _visits(world.moments):
            known = [index for index in together if world.before(world.moments[index])]
            for start in range(0, len(known), TOGETHER):
                part = known[start : start + TOGETHER]
                for index, items in zip(part, _recommended(server.port, world, part), strict=True):
                    lists[index] = items
                    _click(world, index, items, rng)
    return log, lists


def _visits(moments: Sequence[Moment]) -> Iterator[list[int]]:
    """Places of moments, the first of every user, then the second of every user, and so on: users are independent."""
    visits: dict[str, int] = {}
    rounds: dict[int, list[int]] = {}
    for index, moment in enumerate(moments):
        visits[moment["user_id"]] = visits.get(moment["user_id"], 0) + 1
        rounds.setdefault(visits[moment["user_id"]], []).append(index)
    yield from rounds.values()


def _recommended(port: int, world: World, indices: Sequence[int]) -> list[list[str]]:
    """The items that the server recommends at these moments."""
    asked = [
        {
            "user": moment["user_id"],
            "history": world.before(moment),
            "k": K,
            "now_ms": moment["timestamp_ms"],
            "surface": moment["surface"],
        }
        for moment in (world.moments[index] for index in indices)
    ]
    (answer,) = ask(port, [post("/v1/recommend", msgspec.json.encode(asked))])
    if answer.status != 200 or b'"error"' in answer.content:
        raise SystemExit(f"the server said {answer.status}: {answer.content[:300]!r}")
    return [[item["item"] for item in one["items"]] for one in msgspec.json.decode(answer.content)]


def _click(world: World, index: int, items: Sequence[str], rng: np.random.Generator) -> None:
    """Let a user look at a list and click; clicks become events."""
    moment = world.moments[index]
    chance = examination(K) * world.chances[index, [world.rows[item] for item in items]]
    for position in np.flatnonzero(rng.random(K) < chance).tolist():
        clicked = Event(
            item=items[position],
            actions=(ACTION,),
            surface=moment["surface"],
            timestamp_ms=moment["timestamp_ms"] + DWELL_MS * (position + 1),
        )
        world.histories[moment["user_id"]].append(clicked)


@contextmanager
def _stopped(server: Served) -> Iterator[Served]:
    """A server that ends as SIGTERM ends it, so that the rest of its log is written."""
    with server:
        yield server
        if server.stop() != 0:
            raise SystemExit(f"the server did not end well: {server.log.read_text()[-2000:]}")


def compared(loop: Loop, world: World, bundle: Path, lists: Mapping[int, Sequence[str]]) -> dict[str, list[float]]:
    """True values of the ten items at the top at each held-out moment, by the order of the candidates."""
    recommender, held_out = Recommender.load(bundle, device="cpu"), loop.ends_ms - TEST_DAYS * DAY_MS
    if recommender.order not in ("value", "blend"):
        raise SystemExit(f"the second bundle is ordered by {recommender.order}: its ranker was taught nothing")
    names = ("as_served_now", "by_value", "by_retrieval", "best_of_candidates", "served")
    values: dict[str, list[float]] = {name: [] for name in names}
    for index, moment in enumerate(world.moments):
        if index not in lists or moment["timestamp_ms"] < held_out:
            continue
        options = RecommendOptions(
            surface=moment["surface"], now_ms=moment["timestamp_ms"], candidates=CANDIDATES, exact=True, order="value"
        )
        items = recommender.recommend(world.before(moment), CANDIDATES, options).items
        now = recommender.recommend(world.before(moment), K, msgspec.structs.replace(options, order=None)).items
        values["as_served_now"].append(world.value(index, [item.item for item in now]))
        orders = {
            "by_value": [item.score for item in items],
            "by_retrieval": [item.retrieval_score or 0.0 for item in items],
            "best_of_candidates": [float(world.chances[index, world.rows[item.item]]) for item in items],
        }
        for name, scores in orders.items():
            top = np.argsort(-np.array(scores), kind="stable")[:K]
            values[name].append(world.value(index, [items[one].item for one in top]))
        values["served"].append(world.value(index, lists[index]))
    return values


def summary(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Means, and by how much they are above retrieval's order, with the standard error of paired differences."""
    found: dict[str, Any] = {
        "requests": len(values["served"]),
        "true_value": {name: round(float(np.mean(each)), 4) for name, each in values.items()},
    }
    for name in ("as_served_now", "by_value"):
        ahead = np.subtract(values[name], values["by_retrieval"])
        error = float(ahead.std(ddof=1) / np.sqrt(len(ahead)))
        found[f"{name}_minus_retrieval"] = {"mean": round(float(ahead.mean()), 4), "standard_error": round(error, 4)}
    return found


def run(loop: Loop) -> dict[str, Any]:
    """The whole loop; see the module docstring."""
    loop.out.mkdir(parents=True, exist_ok=True)
    world = world_of(loop)
    week = loop.ends_ms - LOGGED_DAYS * DAY_MS
    clicks_before = sum(map(len, world.histories.values()))
    write_known(world, loop.out / "before", TimeSplit(valid_start_ms=week - DAY_MS, test_start_ms=week - DAY_MS // 2))
    log, lists = serve_the_week(loop, world, bundle_of(loop, "first", loop.out / "before"))
    test = loop.ends_ms - TEST_DAYS * DAY_MS
    write_known(world, loop.out / "after", TimeSplit(valid_start_ms=test - DAY_MS // 2, test_start_ms=test))
    command("prepare", "served", log, loop.out / "after", "--out", loop.out / "joined")
    found = summary(compared(loop, world, bundle_of(loop, "second", loop.out / "joined"), lists))
    return {
        "users": loop.users,
        "items": loop.items,
        "epochs": loop.epochs,
        "seed": loop.seed,
        "clicks_before_the_week": clicks_before,
        "clicks_of_the_week": sum(map(len, world.histories.values())) - clicks_before,
        "answers": len(lists),
        **found,
    }


def main() -> None:
    """Run the loop for each setting, or take the folder's earlier result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--users", type=int, default=Loop.users)
    parser.add_argument("--items", type=int, default=Loop.items)
    parser.add_argument("--epochs", type=int, default=Loop.epochs)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        out = options.out / f"seed{seed}"
        sizes = {"users": options.users, "items": options.items, "epochs": options.epochs}
        kept = out / "result.json"
        if not kept.exists():
            kept.write_bytes(msgspec.json.encode(run(Loop(out=out, **sizes, seed=seed))))
        runs.append(msgspec.json.decode(kept.read_bytes()))
        sys.stderr.write(f"{runs[-1]}\n")
    finish({**card("served_loop"), "runs": runs}, "served_loop")


if __name__ == "__main__":
    main()
