"""Simulated users of an imperfect policy: a data set with a known truth, in place of real data.

For each place in a slate, the policy draws a category by its blurred and late view of the user, then an item of that
category by popularity. The user looks at each position with a known chance, and acts by a logit that is linear in the
user's state. Clicked items pull the state towards them. Between sessions the state drifts back to the long-term
interest, and to a new mood. docs/simulator.md has the formulas.

Users are simulated in parallel, in blocks that bound memory; the only loops are over sessions and slates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from unipinrec.models.config import DAY_MS
from unipinrec.models.data.schema import ACTION_PREFIX, FORMAT_VERSION, Dataset, DatasetSpec, TimeSplit
from unipinrec.models.simulator.oracle import ACTIONS, POSITIVE, Oracle, marginal
from unipinrec.models.simulator.world import (
    CONTENT_DIM,
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


class _Crowd:
    """A block of users over time; its methods change it.

    Attributes:
        interest: Long-term interest, (users, latent_dim), unit length.
        state: Interest at the moment, on which every action depends; same shape.
        view: The policy's estimate of the state; same shape.
        error: The policy's error in this session; same shape.
        last: Latent vector of the last clicked item, meaningless before the first click; same shape.
        clicked: Whether the user has clicked before, (users,).
        clock_ms: End of the last event, (users,).
        engaged: Items with any action so far, (users, items).
    """

    def __init__(self, world: World, config: SimulatorConfig, users: int, rng: np.random.Generator) -> None:
        self._world, self._config, self._rng = world, config, rng
        favourite = rng.integers(0, len(world.centres), users)
        noise = rng.standard_normal((users, config.latent_dim)) / np.sqrt(config.latent_dim)
        self.interest = unit(world.centres[favourite] + noise)
        self.state, self.view, self.last = (self.interest.copy() for _ in range(3))
        self.error = np.zeros_like(self.interest)
        self.clicked = np.zeros(users, dtype=np.bool_)
        self.clock_ms = np.full(users, config.start_ms - DAY_MS, dtype=np.int64)
        self.engaged = np.zeros((users, config.items), dtype=np.bool_)

    def open_session(self, present: IntArray, start_ms: IntArray) -> None:
        """Let the time since the last session pass: interests drift, the mood changes, the policy gets a new error."""
        config, dim = self._config, self._config.latent_dim
        start_ms = np.maximum(start_ms, self.clock_ms[present] + SESSION_GAP_MS)
        days = (start_ms - self.clock_ms[present])[:, None] / DAY_MS
        noise = self._rng.standard_normal((3, len(present), dim)) / np.sqrt(dim)
        interest = unit(self.interest[present] + config.drift * np.sqrt(days) * noise[0])
        kept = np.exp(-days / MOOD_DAYS)
        mood = config.mood * np.sqrt(1 - kept**2) * noise[1]
        self.interest[present] = interest
        self.state[present] = unit(kept * self.state[present] + (1 - kept) * interest + mood)
        self.error[present] = config.policy_noise * noise[2]
        self.clock_ms[present] = start_ms

    def show(self, users: IntArray) -> tuple[Columns, Columns]:
        """Show one slate to each of these users, let them act, and move their states."""
        config, rng = self._config, self._rng
        now = self.clock_ms[users] + (PAUSE_MS * (1 + rng.exponential(3.0, len(users)))).astype(np.int64)
        angle = 2 * np.pi * (now % DAY_MS) / DAY_MS
        state = np.concatenate([self.state[users], np.cos(angle)[:, None], np.sin(angle)[:, None]], axis=1)
        surface = self._surfaces(users, angle)
        view = self._policy_view(users, surface)
        policy = category_chances(view, self._world, config)
        item = draw_slates(policy, self.engaged[users], self._world, config.slate_size, rng)
        conditional = _conditional_chances(self._world, item, state)
        acted = _act(conditional, rng) & (item >= 0)[..., None]
        self._move(users, item, acted)
        self.clock_ms[users] = now + DWELL_MS * (config.slate_size + 1)
        user, position = np.nonzero(item >= 0)
        rows: Columns = {
            "user": users[user],
            "time_ms": now[user],
            "event_ms": now[user] + DWELL_MS * (position + 1) + rng.integers(0, DWELL_MS, len(user)),
            "surface": surface[user],
            "position": position,
            "item": item[user, position],
            "acted": acted[user, position],
            "chance": marginal(conditional[user, position]).astype(np.float32),
        }
        some = item[:, 0] >= 0
        vectors = {"state": state[some].astype(np.float32), "view": view[some].astype(np.float32)}
        return rows, {"user": users[some], "time_ms": now[some], **vectors}

    def _surfaces(self, users: IntArray, angle: FloatArray) -> IntArray:
        draw = self._rng.random(len(angle))
        search = 0.2 - 0.1 * np.cos(angle)  # most at noon
        return np.where(draw < search, SEARCH, np.where(self.clicked[users] & (draw > 0.85), RELATED, HOME))

    def _policy_view(self, users: IntArray, surface: IntArray) -> FloatArray:
        """The vector that the policy uses, (users, latent_dim): its view, in search the state, or the last click."""
        view = np.where((surface == SEARCH)[:, None], self.state[users], self.view[users]) + self.error[users]
        view = np.where((surface == RELATED)[:, None], self.last[users], view)
        return POLICY_SHARPNESS * unit(view)

    def _move(self, users: IntArray, item: IntArray, acted: NDArray[np.bool_]) -> None:
        """After a slate, move the state towards the clicks and the view towards the state, and mark engaged items."""
        latent, clicks = self._world.latent, acted[..., ACTIONS.index(POSITIVE)]
        count = clicks.sum(axis=1)
        clickers = count > 0
        mean = (clicks[..., None] * latent[item]).sum(axis=1) / np.maximum(count, 1)[:, None]
        pull = self._config.momentum * clickers[:, None]
        self.state[users] = unit((1 - pull) * self.state[users] + pull * mean)
        self.view[users] += POLICY_RATE * (self.state[users] - self.view[users])
        final = clicks.shape[1] - 1 - np.argmax(clicks[:, ::-1], axis=1)
        self.last[users[clickers]] = latent[item[clickers, final[clickers]]]
        self.clicked[users] |= clickers
        user, position = np.nonzero(acted.any(axis=-1))
        self.engaged[users[user], item[user, position]] = True


def examination(slate_size: int) -> FloatArray:
    """Chance that a user looks at each position, (slate_size,): 1 at the top, never below a half."""
    chance: FloatArray = 0.5 + 0.5 * 0.85 ** np.arange(slate_size, dtype=np.float64)
    return chance


def simulate(config: SimulatorConfig, on_users: Callable[[int], None] | None = None) -> tuple[Dataset, Oracle]:
    """Simulate a data set.

    Args:
        config: Settings; the same settings give the same tables.
        on_users: Called with the number of users finished since the last call.

    Returns:
        The data set, in the format of `schema`, and the truth behind it.
    """
    world, items = make_world(config, np.random.default_rng([config.seed, 0]))
    size = int(np.clip(_BLOCK_CELLS // config.items, 64, _BLOCK_USERS))
    rows, slates = [], []
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
    """Yield rows and slates step by step: a step shows one slate to each of its users."""
    start_ms = _session_starts(config, users, rng)
    crowd = _Crowd(world, config, users, rng)
    for session in range(start_ms.shape[1]):
        present = np.flatnonzero(start_ms[:, session] >= 0)
        crowd.open_session(present, start_ms[present, session])
        slates = 1 + rng.poisson(config.slates_per_session - 1, len(present))
        for slate in range(int(slates.max())):
            yield crowd.show(present[slates > slate])


def _session_starts(config: SimulatorConfig, users: int, rng: np.random.Generator) -> IntArray:
    """Ascending start times, (users, most sessions of any user), -1 after a user's last; most in the evening."""
    sessions = 1 + rng.poisson(config.sessions_per_user - 1, users)
    shape = (users, int(sessions.max()))
    rhythm = 1 + 0.6 * np.cos(2 * np.pi * (np.arange(24) - 20) / 24)
    hour = rng.choice(24, shape, p=rhythm / rhythm.sum()) + rng.random(shape)
    at = config.start_ms + DAY_MS * rng.integers(0, config.days, shape) + (DAY_MS / 24 * hour).astype(np.int64)
    absent = np.arange(shape[1]) >= sessions[:, None]
    return np.where(absent, -1, np.sort(np.where(absent, np.iinfo(np.int64).max, at), axis=1))


def _conditional_chances(world: World, item: IntArray, state: FloatArray) -> FloatArray:
    """Chances along the path of actions, (users, slate_size, actions); see `oracle.marginal`."""
    actions = zip(world.bias, world.vector, strict=True)
    logits = [bias[item] + np.einsum("usd,ud->us", vector[item], state) for bias, vector in actions]
    chances: FloatArray = 1 / (1 + np.exp(-np.stack(logits, axis=-1)))
    return chances


def _act(conditional: FloatArray, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Actions of users who look at some positions and act along the path, (users, slate_size, actions)."""
    would = rng.random(conditional.shape) < conditional
    looked = rng.random(conditional.shape[:2]) < examination(conditional.shape[1])
    click = would[..., :1]
    acted = np.concatenate([click, click & would[..., 1:3], ~click & would[..., 3:]], axis=-1)
    return acted & looked[..., None]


def _sorted(parts: list[Columns]) -> Columns:
    """Join the parts, by user and time; rows of one slate keep their order."""
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((joined["time_ms"], joined["user"]))
    return {name: column[order] for name, column in joined.items()}


def _tables(
    rows: Columns, slates: Columns, world: World, items: pl.DataFrame, config: SimulatorConfig
) -> tuple[Dataset, Oracle]:
    new = (np.diff(rows["user"]) != 0) | (np.diff(rows["time_ms"]) != 0)
    width = len(str(config.users - 1))  # padded, so that ids sort as text in the order of the tables
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
