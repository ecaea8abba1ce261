"""Simulated users in front of an imperfect policy: a data set with a known truth, in place of real data.

One slate: the policy picks a category from its own, blurred and late view of the user and an item of that
category by popularity, again and again until the slate is full; the user looks at each position with a known
chance and then acts by a logit that is linear in the user's state. What was clicked pulls the state towards
it; between sessions the state drifts back to the long-term interest, and on to a new mood. docs/simulator.md
gives the formulas.

Users are simulated side by side, in blocks that bound memory; the only loops are over sessions and slates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from unipinrec.models.data.schema import ACTION_PREFIX, FORMAT_VERSION, Dataset, DatasetSpec, TimeSplit
from unipinrec.models.simulator.oracle import ACTIONS, POSITIVE, Oracle, marginal
from unipinrec.models.simulator.world import (
    CONTENT_DIM,
    DAY_MS,
    DWELL_MS,
    PAUSE_MS,
    SESSION_GAP_MS,
    FloatArray,
    IntArray,
    SimulatorConfig,
    World,
    category_chances,
    draw_slates,
    make_world,
    unit,
    vector_series,
)

__all__ = ["SimulatorConfig", "examination", "simulate"]

SURFACES = ("unknown", "home", "search", "related")
HOME, SEARCH, RELATED = 1, 2, 3
MOOD_DAYS = 2.0  # time in which a state falls back to the long-term interest by a factor e
POLICY_SHARPNESS = 7.0
POLICY_RATE = 0.4  # how fast the policy's view follows the user, per slate
_BLOCK_USERS = 1024
_BLOCK_CELLS = 1 << 23

Columns = dict[str, NDArray[Any]]


@dataclass(kw_only=True)
class _Crowd:
    """A block of users in the course of time; changed in place.

    Attributes:
        interest: Long-term interest, (users, latent_dim), unit length.
        state: Interest right now, the truth behind every action; same shape.
        view: What the policy believes; same shape.
        error: The policy's error in this session; same shape.
        last: Latent vector of the last clicked item, of no use before the first click; same shape.
        clicked: Whether the user has clicked before, (users,).
        clock_ms: End of the last thing that happened, (users,).
        engaged: Items with any action so far, (users, items).
    """

    interest: FloatArray
    state: FloatArray
    view: FloatArray
    error: FloatArray
    last: FloatArray
    clicked: NDArray[np.bool_]
    clock_ms: IntArray
    engaged: NDArray[np.bool_]


def examination(slate_size: int) -> FloatArray:
    """Chance that a user looks at each position, (slate_size,): 1 at the top, never below a half."""
    chance: FloatArray = 0.5 + 0.5 * 0.85 ** np.arange(slate_size, dtype=np.float64)
    return chance


def simulate(config: SimulatorConfig, on_users: Callable[[int], None] | None = None) -> tuple[Dataset, Oracle]:
    """Simulate a data set.

    Args:
        config: Settings; the same settings give the same tables.
        on_users: Called with the number of users that were finished since the last call.

    Returns:
        The data set, valid as `data_schema` defines it, and the truth behind it.
    """
    world, items = make_world(config, np.random.default_rng([config.seed, 0]))
    size = int(np.clip(_BLOCK_CELLS // config.items, 64, _BLOCK_USERS))
    rows: list[Columns] = []
    slates: list[Columns] = []
    for block, first in enumerate(range(0, config.users, size)):
        users = min(size, config.users - first)
        rng = np.random.default_rng([config.seed, 1 + block])
        for shown, slate in _simulate_block(world, config, users, rng):
            shown["user"] += first
            slate["user"] += first
            rows.append(shown)
            slates.append(slate)
        if on_users is not None:
            on_users(users)
    return _tables(_sorted(rows), _sorted(slates), world, items, config)


def _simulate_block(
    world: World, config: SimulatorConfig, users: int, rng: np.random.Generator
) -> Iterator[tuple[Columns, Columns]]:
    """Yield the shown rows and the slates of one step of all users who take part in it."""
    start_ms = _session_starts(config, users, rng)
    crowd = _new_crowd(world, config, users, rng)
    for session in range(start_ms.shape[1]):
        present = np.flatnonzero(start_ms[:, session] >= 0)
        _open_session(crowd, present, start_ms[present, session], config, rng)
        slates = 1 + rng.poisson(config.slates_per_session - 1, len(present))
        for slate in range(int(slates.max())):
            yield _show(crowd, present[slates > slate], world, config, rng)


def _session_starts(config: SimulatorConfig, users: int, rng: np.random.Generator) -> IntArray:
    """Ascending start times, (users, most sessions of any user), -1 past a user's last; most at night."""
    sessions = 1 + rng.poisson(config.sessions_per_user - 1, users)
    shape = (users, int(sessions.max()))
    rhythm = 1 + 0.6 * np.cos(2 * np.pi * (np.arange(24) - 20) / 24)
    hour = rng.choice(24, shape, p=rhythm / rhythm.sum()) + rng.random(shape)
    at = config.start_ms + DAY_MS * rng.integers(0, config.days, shape) + (DAY_MS / 24 * hour).astype(np.int64)
    absent = np.arange(shape[1]) >= sessions[:, None]
    return np.where(absent, -1, np.sort(np.where(absent, np.iinfo(np.int64).max, at), axis=1))


def _new_crowd(world: World, config: SimulatorConfig, users: int, rng: np.random.Generator) -> _Crowd:
    favourite = rng.integers(0, len(world.centres), users)
    noise = rng.standard_normal((users, config.latent_dim)) / np.sqrt(config.latent_dim)
    interest = unit(world.centres[favourite] + noise)
    return _Crowd(
        interest=interest,
        state=interest.copy(),
        view=interest.copy(),
        error=np.zeros_like(interest),
        last=interest.copy(),
        clicked=np.zeros(users, dtype=np.bool_),
        clock_ms=np.full(users, config.start_ms - DAY_MS, dtype=np.int64),
        engaged=np.zeros((users, config.items), dtype=np.bool_),
    )


def _open_session(
    crowd: _Crowd, present: IntArray, start_ms: IntArray, config: SimulatorConfig, rng: np.random.Generator
) -> None:
    """Let the time since the last session pass: interests drift, the mood changes, the policy errs anew."""
    start_ms = np.maximum(start_ms, crowd.clock_ms[present] + SESSION_GAP_MS)
    days = (start_ms - crowd.clock_ms[present])[:, None] / DAY_MS
    noise = rng.standard_normal((3, len(present), config.latent_dim)) / np.sqrt(config.latent_dim)
    interest = unit(crowd.interest[present] + config.drift * np.sqrt(days) * noise[0])
    kept = np.exp(-days / MOOD_DAYS)
    mood = config.mood * np.sqrt(1 - kept**2) * noise[1]
    crowd.interest[present] = interest
    crowd.state[present] = unit(kept * crowd.state[present] + (1 - kept) * interest + mood)
    crowd.error[present] = config.policy_noise * noise[2]
    crowd.clock_ms[present] = start_ms


def _show(
    crowd: _Crowd, users: IntArray, world: World, config: SimulatorConfig, rng: np.random.Generator
) -> tuple[Columns, Columns]:
    """Show one slate to each of these users, let them act, and move their states."""
    now = crowd.clock_ms[users] + (PAUSE_MS * (1 + rng.exponential(3.0, len(users)))).astype(np.int64)
    angle = 2 * np.pi * (now % DAY_MS) / DAY_MS
    state = np.concatenate([crowd.state[users], np.cos(angle)[:, None], np.sin(angle)[:, None]], axis=1)
    surface = _surfaces(crowd.clicked[users], angle, rng)
    view = _policy_view(crowd, users, surface)
    policy = category_chances(view, world, config)
    item = draw_slates(policy, crowd.engaged[users], world, config.slate_size, rng)
    conditional = _conditional_chances(world, item, state)
    acted = _act(conditional, rng) & (item >= 0)[..., None]
    _move(crowd, users, world, item, acted, config.momentum)
    crowd.clock_ms[users] = now + DWELL_MS * (config.slate_size + 1)
    user, position = np.nonzero(item >= 0)
    event_ms = now[user] + DWELL_MS * (position + 1) + rng.integers(0, DWELL_MS, len(user))
    rows: Columns = {
        "user": users[user],
        "time_ms": now[user],
        "event_ms": event_ms,
        "surface": surface[user],
        "position": position,
        "item": item[user, position],
        "acted": acted[user, position],
        "chance": marginal(conditional[user, position]).astype(np.float32),
    }
    some = item[:, 0] >= 0
    slates: Columns = {
        "user": users[some],
        "time_ms": now[some],
        "state": state[some].astype(np.float32),
        "view": view[some].astype(np.float32),
    }
    return rows, slates


def _surfaces(clicked: NDArray[np.bool_], angle: FloatArray, rng: np.random.Generator) -> IntArray:
    draw = rng.random(len(angle))
    search = 0.2 - 0.1 * np.cos(angle)  # most at noon
    related = clicked & (draw > 0.85)
    return np.where(draw < search, SEARCH, np.where(related, RELATED, HOME))


def _policy_view(crowd: _Crowd, users: IntArray, surface: IntArray) -> FloatArray:
    """What the policy goes by, (users, latent_dim): on home late, on search timely, else the last click."""
    view = np.where((surface == SEARCH)[:, None], crowd.state[users], crowd.view[users]) + crowd.error[users]
    view = np.where((surface == RELATED)[:, None], crowd.last[users], view)
    return POLICY_SHARPNESS * unit(view)


def _conditional_chances(world: World, item: IntArray, state: FloatArray) -> FloatArray:
    """Chances along the path of actions, (users, slate_size, actions); see `simulator_oracle.marginal`."""
    logits = [
        bias[item] + np.einsum("usd,ud->us", vector[item], state)
        for bias, vector in zip(world.bias, world.vector, strict=True)
    ]
    chances: FloatArray = 1 / (1 + np.exp(-np.stack(logits, axis=-1)))
    return chances


def _act(conditional: FloatArray, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Actions of users who look at some positions and act along the path, (users, slate_size, actions)."""
    would = rng.random(conditional.shape) < conditional
    looked = rng.random(conditional.shape[:2]) < examination(conditional.shape[1])
    click = would[..., :1]
    acted = np.concatenate([click, click & would[..., 1:3], ~click & would[..., 3:]], axis=-1)
    return acted & looked[..., None]


def _move(
    crowd: _Crowd, users: IntArray, world: World, item: IntArray, acted: NDArray[np.bool_], momentum: float
) -> None:
    """After a slate: move the state towards the clicks and the view after it, and note what was engaged."""
    clicks = acted[..., ACTIONS.index(POSITIVE)]
    count = clicks.sum(axis=1)
    mean = (clicks[..., None] * world.latent[item]).sum(axis=1) / np.maximum(count, 1)[:, None]
    pull = momentum * (count > 0)[:, None]
    crowd.state[users] = unit((1 - pull) * crowd.state[users] + pull * mean)
    crowd.view[users] += POLICY_RATE * (crowd.state[users] - crowd.view[users])
    final = clicks.shape[1] - 1 - np.argmax(clicks[:, ::-1], axis=1)
    clickers = count > 0
    crowd.last[users[clickers]] = world.latent[item[clickers, final[clickers]]]
    crowd.clicked[users] |= clickers
    user, position = np.nonzero(acted.any(axis=-1))
    crowd.engaged[users[user], item[user, position]] = True


def _sorted(parts: list[Columns]) -> Columns:
    """Join the parts, by user and time; rows of one slate keep their order."""
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((joined["time_ms"], joined["user"]))
    return {name: column[order] for name, column in joined.items()}


def _tables(
    rows: Columns, slates: Columns, world: World, items: pl.DataFrame, config: SimulatorConfig
) -> tuple[Dataset, Oracle]:
    new = (np.diff(rows["user"]) != 0) | (np.diff(rows["time_ms"]) != 0)
    width = len(str(config.users - 1))  # by padding, the order of ids as text is that of the tables
    names = pl.Series([f"user-{user:0{width}}" for user in range(config.users)])
    shown = pl.DataFrame(
        {
            "slate_id": np.concatenate([[0], np.cumsum(new)]),
            "user_id": names.gather(rows["user"]),
            "item_id": items["item_id"].gather(rows["item"]),
            "surface": pl.Series(SURFACES).gather(rows["surface"]),
            "timestamp_ms": rows["time_ms"],
            **{ACTION_PREFIX + name: rows["acted"][:, i] for i, name in enumerate(ACTIONS)},
            "position": rows["position"].astype(np.int32),
        }
    )
    engaged = pl.Series("engaged", rows["acted"].any(axis=1))
    events = shown.with_columns(timestamp_ms=pl.Series(rows["event_ms"])).filter(engaged).drop("slate_id", "position")
    chances = [pl.Series(f"p_{name}", rows["chance"][:, i]) for i, name in enumerate(ACTIONS)]
    oracle = Oracle(
        rows=shown.select("slate_id", "item_id").hstack([*chances, engaged]),
        slates=pl.DataFrame(
            {
                "slate_id": np.arange(len(slates["user"])),
                "user_id": names.gather(slates["user"]),
                "state": vector_series(slates["state"]),
                "view": vector_series(slates["view"]),
                "exploration": np.full(len(slates["user"]), config.exploration, dtype=np.float32),
            }
        ),
        items=_item_truth(world, items),
    )
    return Dataset(spec=_spec(config, items), events=events, slates=shown, items=items), oracle


def _item_truth(world: World, items: pl.DataFrame) -> pl.DataFrame:
    truth = {
        "item_id": items["item_id"],
        "share": pl.Series(world.share.astype(np.float32)),
        "centre": vector_series(world.centres[world.category]),
    }
    for i, name in enumerate(ACTIONS):
        truth[f"bias_{name}"] = pl.Series(world.bias[i].astype(np.float32))
        truth[f"vector_{name}"] = vector_series(world.vector[i])
    return pl.DataFrame(truth)


def _spec(config: SimulatorConfig, items: pl.DataFrame) -> DatasetSpec:
    tenth_ms = config.days * DAY_MS // 10
    settings = ", ".join(f"{name}={value}" for name, value in asdict(config).items())
    return DatasetSpec(
        format_version=FORMAT_VERSION,
        name="simulated",
        actions=ACTIONS,
        positive_actions=(POSITIVE,),
        surfaces=SURFACES,
        dense={"content": CONTENT_DIM, "log_duration": 1},
        categories={
            name: tuple(sorted(items[f"category_{name}"].drop_nulls().unique().to_list()))
            for name in ("topic", "creator")
        },
        split=TimeSplit(valid_start_ms=config.start_ms + 8 * tenth_ms, test_start_ms=config.start_ms + 9 * tenth_ms),
        dropped={},
        source=f"simulated, no real person or item, free to use; {settings}",
    )
