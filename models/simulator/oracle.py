"""The truth behind a simulated data set, which bounds the score of any model.

    oracle.parquet         one row per row of slates.parquet, in its order: slate_id, item_id,
                           p_{action} (chance of the action if looked at), engaged (any action was taken)
    oracle_slates.parquet  one row per slate: slate_id, user_id, state (the user's interests and the hour),
                           view (the vector that the policy uses), exploration (share of random impressions)
    oracle_items.parquet   the items in catalogue order: item_id, share (chance within the item's category),
                           centre (of its category), bias_{action}, vector_{action}

    chance of an action on its path = sigmoid(bias + vector . state); see `marginal`
    chance that an impression is i  = (1 - exploration) * share_i * exp(centre_i . view) / sum over all items
                                      + exploration * share_i / number of categories

The chance of an action at a position is examination[position] * p_{action}. This module computes no metric: rank the
shown rows by `p_{action}` and the catalogue by `oracle_item_scores`, and use the metrics of the models.
docs/simulator.md says how exact these bounds are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from unipinrec.errors import DataError
from unipinrec.models.data.schema import read_parquet

ACTIONS = ("click", "save", "share", "hide")
POSITIVE = "click"
_FILES = {"rows": "oracle.parquet", "slates": "oracle_slates.parquet", "items": "oracle_items.parquet"}
_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """The three tables of the module docstring."""

    rows: pl.DataFrame
    slates: pl.DataFrame
    items: pl.DataFrame


def marginal(conditional: NDArray[np.float64]) -> NDArray[np.float64]:
    """Chance of each action from the chances along the path to it.

    Args:
        conditional: (..., actions): click; save and share after a click; hide without a click.

    Returns:
        (..., actions): the chance of each action on its own.
    """
    click = conditional[..., :1]
    return np.concatenate([click, click * conditional[..., 1:3], (1 - click) * conditional[..., 3:]], axis=-1)


def write_oracle(oracle: Oracle, folder: Path) -> None:
    """Add the oracle's tables to the folder of its data set.

    Raises:
        DataError: A file could not be written.
    """
    for name, file in _FILES.items():
        try:
            getattr(oracle, name).write_parquet(folder / file)
        except OSError as error:
            raise DataError(f"could not write {folder / file}: {error}") from error


def read_oracle(folder: Path) -> Oracle:
    """Read the oracle of a simulated data set.

    Raises:
        DataError: The folder has no readable oracle; only simulated data sets have one.
    """
    remedy = "only data sets made with `unipinrec prepare simulate` have an oracle"
    return Oracle(**{name: read_parquet(folder / file, remedy) for name, file in _FILES.items()})


def oracle_item_scores(oracle: Oracle, slate_ids: Sequence[int]) -> NDArray[np.float32]:
    """Score the catalogue for the next positive event at the moment each slate was shown, by the truth.

    The score of item i is exposure_i * p_click_i: the chance that one impression is i and is clicked when
    looked at. It is 0 for items the user has engaged with before, which are never shown again.

    For the first impression of a slate this order is exactly the best. For the first click of a whole slate it is the
    best if every item's chance of exposure is small. A slate shows no item twice, so an item with a chance near
    1 / slate size gets less than its share of later positions, which the score ignores. Excluding engaged items scales
    the chances of all others alike and changes no rank.

    The score uses the user's true state, the policy's view and the surface. A model has none of them, so it cannot
    reach this score.

    Args:
        oracle: The truth.
        slate_ids: Slates to score, in any order, repeats allowed.

    Returns:
        (len(slate_ids), items) float32; columns are the rows of `items.parquet`. Score a few thousand
        slates per call if the catalogue is large.

    Raises:
        DataError: A slate id is unknown.
    """
    slates = _slates_of(oracle, slate_ids)
    scores = oracle_click_chances(oracle, slate_ids)
    centre, share = _matrix(oracle.items["centre"]), oracle.items["share"].to_numpy()
    for start in range(0, len(slates), _CHUNK):
        part = slates[start : start + _CHUNK]
        exploited = share * np.exp(_matrix(part["view"]) @ centre.T)
        exploited /= exploited.sum(axis=1, keepdims=True)
        exploration = part["exploration"].to_numpy()[:, None]
        exposure = (1 - exploration) * exploited + exploration * share / share.sum()
        scores[start : start + _CHUNK] *= exposure
    scores[_engaged_before(oracle, slates)] = 0.0
    return scores


def oracle_click_chances(oracle: Oracle, slate_ids: Sequence[int]) -> NDArray[np.float32]:
    """The true chance of the positive action on each item, if it is looked at, at the moment each slate was shown.

    Args:
        oracle: The truth.
        slate_ids: The slates, in any order, repeats allowed.

    Returns:
        (len(slate_ids), items) float32; columns are the rows of `items.parquet`.

    Raises:
        DataError: A slate id is unknown.
    """
    slates = _slates_of(oracle, slate_ids)
    bias, vector = oracle.items[f"bias_{POSITIVE}"].to_numpy(), _matrix(oracle.items[f"vector_{POSITIVE}"])
    chances = np.empty((len(slates), len(oracle.items)), dtype=np.float32)
    for start in range(0, len(slates), _CHUNK):
        state = _matrix(slates["state"][start : start + _CHUNK])
        chances[start : start + _CHUNK] = 1 / (1 + np.exp(-(bias + state @ vector.T)))
    return chances


def _slates_of(oracle: Oracle, slate_ids: Sequence[int]) -> pl.DataFrame:
    """`oracle.slates` in the order of these ids, and `row`, the place among them."""
    requests = pl.DataFrame({"slate_id": slate_ids}, schema={"slate_id": pl.Int64}).with_row_index("row")
    slates = requests.join(oracle.slates, on="slate_id", how="left", maintain_order="left")
    unknown = slates.filter(pl.col("user_id").is_null())["slate_id"].to_list()
    if unknown:
        raise DataError(f"slates {unknown[:5]} are not in the oracle; give ids of this data set's slates.parquet")
    return slates


def _engaged_before(oracle: Oracle, slates: pl.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row, item) pairs of the items that each slate's user had engaged with; a user's slate ids ascend with time."""
    users = slates.select("row", "user_id", now="slate_id")
    engaged = (
        oracle.rows.filter("engaged")
        .join(oracle.slates.select("slate_id", "user_id"), on="slate_id")
        .join(users, on="user_id")
        .filter(pl.col("slate_id") < pl.col("now"))
        .join(oracle.items.select("item_id").with_row_index("item"), on="item_id")
    )
    return engaged["row"].to_numpy(), engaged["item"].cast(pl.Int64).to_numpy()


def _matrix(column: pl.Series) -> NDArray[np.float32]:
    width = len(column[0]) if len(column) else 0
    return column.list.to_array(width).to_numpy()
