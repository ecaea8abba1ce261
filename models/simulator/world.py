"""Settings of the simulator, its invented catalogue, and the draws of a policy from that catalogue.

The logit of an action is linear in the user's state and the hour: bias[a, i] + vector[a, i] . state, where
state = [unit interest vector, cos(hour), sin(hour)]. Two arrays per action hold the whole truth about an item, so the
oracle is a small file. This module has neither time nor single users.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from unipinrec.errors import ConfigError
from unipinrec.models.config import DAY_MS
from unipinrec.models.simulator.oracle import ACTIONS

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

DWELL_MS = 3_000  # from one position to the next
PAUSE_MS = 10_000  # least time between slates; the mean is four times that
SESSION_GAP_MS = 1_800_000
CONTENT_DIM = 16
POPULARITY_EXPONENT = 0.8
CATEGORY_SPREAD = 0.7  # length of an item's own direction next to its category's, before normalising
TOPIC_UNKNOWN = 0.1
ITEMS_PER_CREATOR = 12


class _ActionModel(NamedTuple):
    """Coefficients of one action's logit."""

    intercept: float
    affinity: float
    quality: float
    category: float
    hour: float


_MODELS = {
    "click": _ActionModel(-2.9, 5.0, 0.9, 0.35, 0.25),
    "save": _ActionModel(-2.4, 1.8, 0.5, 0.7, 0.0),
    "share": _ActionModel(-4.1, 0.4, 0.8, 0.6, 0.2),
    "hide": _ActionModel(-2.7, -2.0, -0.6, 0.3, 0.0),
}


@dataclass(frozen=True, kw_only=True)
class SimulatorConfig:
    """Settings of one simulated data set; the same settings give the same tables.

    Attributes:
        users: Number of users.
        items: Size of the catalogue.
        categories: Number of item categories, at most `items`.
        latent_dim: Width of the hidden interest space.
        sessions_per_user: Mean number of sessions per user, at least 1.
        slates_per_session: Mean number of slates per session, at least 1.
        slate_size: Items per slate; a slate is shorter only if the user has engaged with nearly all items.
        days: Length of the simulated time.
        start_ms: Its beginning (Unix ms, UTC).
        drift: Random walk of the long-term interest (length 1), in lengths per square root of a day.
        mood: Length of the random change of a user's state after days of absence, next to that interest.
        momentum: How far the mean clicked item of a slate pulls the state towards it, in [0, 1].
        policy_noise: Length of the error in the policy's view of a user, next to a view of length 1.
        exploration: Share of impressions whose category is drawn uniformly, in [0, 1].
        content_noise: Noise in the visible content features, next to a signal of length 1.
        seed: Seed of everything random.

    Raises:
        ConfigError: A setting is out of range or contradicts another.
    """

    users: int = 2000
    items: int = 2000
    categories: int = 40
    latent_dim: int = 8
    sessions_per_user: float = 4.0
    slates_per_session: float = 3.0
    slate_size: int = 10
    days: int = 28
    start_ms: int = 1_735_689_600_000
    drift: float = 0.1
    mood: float = 0.8
    momentum: float = 0.6
    policy_noise: float = 0.4
    exploration: float = 0.1
    content_noise: float = 0.5
    seed: int = 7

    def __post_init__(self) -> None:
        for name in ("users", "items", "categories", "slate_size", "days"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("sessions_per_user", "slates_per_session"):
            self._require(name, 1 <= getattr(self, name) < math.inf, "at least 1")
        self._require("latent_dim", self.latent_dim >= 2, "at least 2")
        for name in ("start_ms", "drift", "mood", "policy_noise", "content_noise", "seed"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "at least 0")
        for name in ("momentum", "exploration"):
            self._require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        for name in ("slate_size", "categories"):
            if getattr(self, name) > self.items:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is more than items={self.items}, but no slate shows an item "
                    f"twice and no category is empty: lower {name} or raise items"
                )
        self._check_time()

    def _check_time(self) -> None:
        slate_ms = DWELL_MS * (self.slate_size + 1) + 4 * PAUSE_MS
        busy = self.sessions_per_user * (self.slates_per_session * slate_ms + SESSION_GAP_MS) / DAY_MS
        if busy > self.days / 2:
            raise ConfigError(
                f"sessions_per_user={self.sessions_per_user} with "
                f"slates_per_session={self.slates_per_session} take {busy:.1f} days of a user's time, "
                f"more than half of days={self.days}: raise days or lower the others"
            )

    def _require(self, name: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise ConfigError(f"{name}={getattr(self, name)} is out of range; it must be {accepted}")


@dataclass(frozen=True, kw_only=True)
class World:
    """The truth about the catalogue.

    Attributes:
        centres: Unit vector per category, (categories, latent_dim).
        category: Category of each item, (items,).
        latent: Unit vector per item, (items, latent_dim).
        share: Chance of the item once its category is drawn, (items,); sums to 1 within a category.
        bias: Part of each action's logit that is the same for all users, (actions, items).
        vector: Weights of the state in each action's logit, (actions, items, latent_dim + 2).
        order: Items sorted by category, (items,).
        cumulative: Category number + cumulative share along `order`, (items,): one scale for all draws.
    """

    centres: FloatArray
    category: IntArray
    latent: FloatArray
    share: FloatArray
    bias: FloatArray
    vector: FloatArray
    order: IntArray
    cumulative: FloatArray


def unit(vectors: FloatArray) -> FloatArray:
    """Vectors along the last axis, scaled to length 1."""
    scaled: FloatArray = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return scaled


def make_world(config: SimulatorConfig, rng: np.random.Generator) -> tuple[World, pl.DataFrame]:
    """Invent a catalogue.

    Returns:
        The truth, and the `items` table of the data format: noisy views of the truth.
    """
    items, categories, dim = config.items, config.categories, config.latent_dim
    centres = unit(rng.standard_normal((categories, dim)))
    sizes = np.arange(1, categories + 1, dtype=np.float64) ** -0.5
    rest = rng.choice(categories, items - categories, p=sizes / sizes.sum())
    category = rng.permutation(np.concatenate([np.arange(categories), rest]))
    latent = unit(centres[category] + CATEGORY_SPREAD * rng.standard_normal((items, dim)) / np.sqrt(dim))
    creator, creators = _creators(category, categories, rng)
    quality = 0.6 * rng.standard_normal(creators)[creator] + 0.8 * rng.standard_normal(items)
    share, order, cumulative = _popularity(category, 0.5 * quality + rng.standard_normal(items))
    bias, vector = _action_logits(category, latent, quality, rng)
    world = World(
        centres=centres, category=category, latent=latent, share=share,
        bias=bias, vector=vector, order=order, cumulative=cumulative,
    )  # fmt: skip
    return world, _catalogue(world, creator, quality, config, rng)


def _creators(category: IntArray, categories: int, rng: np.random.Generator) -> tuple[IntArray, int]:
    """A creator per item, most with items in one category; and the number of creators."""
    per_category = max(1, len(category) // (ITEMS_PER_CREATOR * categories))
    home = np.where(rng.random(len(category)) < 0.9, category, rng.integers(0, categories, len(category)))
    return home * per_category + rng.integers(0, per_category, len(category)), categories * per_category


def _popularity(category: IntArray, appeal: FloatArray) -> tuple[FloatArray, IntArray, FloatArray]:
    order = np.lexsort((-appeal, category))
    sizes = np.bincount(category)
    start = np.repeat(np.cumsum(sizes) - sizes, sizes)
    weight = (1.0 + np.arange(len(category)) - start) ** -POPULARITY_EXPONENT
    total = np.bincount(category[order], weights=weight)
    share = np.empty(len(category))
    share[order] = weight / total[category[order]]
    return share, order, np.cumsum(share[order])


def _action_logits(
    category: IntArray, latent: FloatArray, quality: FloatArray, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    categories = int(category.max()) + 1
    peak = rng.uniform(0.0, 2 * np.pi, categories)[category]
    hour = np.stack([np.cos(peak), np.sin(peak)], axis=1)
    biases, vectors = [], []
    for model in (_MODELS[name] for name in ACTIONS):
        of_category = model.category * rng.standard_normal(categories)
        biases.append(model.intercept + model.quality * quality + of_category[category])
        vectors.append(np.concatenate([model.affinity * latent, model.hour * hour], axis=1))
    return np.stack(biases), np.stack(vectors)


def _catalogue(
    world: World, creator: IntArray, quality: FloatArray, config: SimulatorConfig, rng: np.random.Generator
) -> pl.DataFrame:
    items = config.items
    projection = rng.standard_normal((config.latent_dim, CONTENT_DIM)) / np.sqrt(CONTENT_DIM)
    noise = config.content_noise * rng.standard_normal((items, CONTENT_DIM)) / np.sqrt(CONTENT_DIM)
    duration = 3.5 + 0.5 * quality + 0.5 * rng.standard_normal(items)
    hidden = rng.random(items) < TOPIC_UNKNOWN
    return pl.DataFrame(
        {
            "item_id": [f"item-{i}" for i in range(items)],
            "title": [f"Topic {c} · item {i}" for i, c in enumerate(world.category)],
            "dense_content": vector_series(world.latent @ projection + noise),
            "dense_log_duration": vector_series(duration[:, None]),
            "category_topic": [None if h else f"topic-{c}" for c, h in zip(world.category, hidden, strict=True)],
            "category_creator": [f"creator-{c}" for c in creator],
        },
        schema_overrides={"category_topic": pl.String},
    )


def vector_series(rows: FloatArray) -> pl.Series:
    """A 2-D array as a column of Float32 lists."""
    return pl.Series(values=rows.astype(np.float32)).cast(pl.List(pl.Float32))


def category_chances(view: FloatArray, world: World, config: SimulatorConfig) -> FloatArray:
    """Chance of each category in an impression, (users, categories)."""
    weight = np.exp(view @ world.centres.T)
    exploited: FloatArray = weight / weight.sum(axis=1, keepdims=True)
    return (1 - config.exploration) * exploited + config.exploration / len(world.centres)


def draw_slates(
    policy: FloatArray, engaged: NDArray[np.bool_], world: World, slate_size: int, rng: np.random.Generator
) -> IntArray:
    """Items of each slate, (users, slate_size), -1 where no item is left.

    A slate holds the first items of an endless series of draws, without engaged and repeated items.
    """
    draws = _draw_items(policy, 4 * slate_size, world, rng)
    order = np.argsort(draws, axis=1, kind="stable")
    ordered = np.take_along_axis(draws, order, axis=1)
    repeated = np.zeros_like(draws, dtype=np.bool_)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    refused = repeated | np.take_along_axis(engaged, draws, axis=1)
    first = np.argsort(refused, axis=1, kind="stable")[:, :slate_size]
    slates = np.where(np.take_along_axis(refused, first, axis=1), -1, np.take_along_axis(draws, first, axis=1))
    for row in np.flatnonzero(slates[:, -1] < 0):
        _fill(slates[row], policy[row, world.category] * world.share * ~engaged[row], rng)
    return slates


def _draw_items(policy: FloatArray, count: int, world: World, rng: np.random.Generator) -> IntArray:
    """Independent draws, (users, count): a category by policy, then an item of it by popularity."""
    users, categories = policy.shape
    row = np.arange(users)[:, None]
    edges = np.cumsum(policy, axis=1)
    edges = row + edges / edges[:, -1:]
    draw = np.searchsorted(edges.ravel(), row + rng.random((users, count)), side="right") - row * categories
    draw = np.minimum(draw, categories - 1)  # a draw next to 1 may round up to the next user's edge
    slot = np.searchsorted(world.cumulative, draw + rng.random((users, count)), side="right")
    items: IntArray = world.order[np.minimum(slot, len(world.order) - 1)]
    return items


def _fill(slate: IntArray, weight: FloatArray, rng: np.random.Generator) -> None:
    """Fill the open end of a slate in place, with draws over the whole catalogue at once."""
    taken = slate[slate >= 0]
    weight[taken] = 0.0
    left = np.flatnonzero(weight)
    arrival = rng.exponential(size=len(left)) / weight[left]  # arrivals come in the order of such draws
    drawn = left[np.argsort(arrival)[: len(slate) - len(taken)]]
    slate[len(taken) : len(taken) + len(drawn)] = drawn
