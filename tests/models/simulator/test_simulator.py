from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from unipinrec.errors import ConfigError, DataError
from unipinrec.models.data.schema import Dataset, read_dataset, write_dataset
from unipinrec.models.simulator.oracle import (
    ACTIONS,
    Oracle,
    oracle_click_chances,
    oracle_item_scores,
    read_oracle,
    write_oracle,
)
from unipinrec.models.simulator.simulator import examination, simulate
from unipinrec.models.simulator.world import SimulatorConfig, category_chances, draw_slates, make_world

CONFIG = SimulatorConfig(users=2100, items=1500, categories=30)
SMALL = SimulatorConfig(users=30, items=60, categories=6, sessions_per_user=2)


@pytest.fixture(scope="module")
def simulated() -> tuple[Dataset, Oracle]:
    return simulate(CONFIG)


@pytest.fixture(scope="module")
def data(simulated: tuple[Dataset, Oracle]) -> Dataset:
    return simulated[0]


@pytest.fixture(scope="module")
def oracle(simulated: tuple[Dataset, Oracle]) -> Oracle:
    return simulated[1]


def auc(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    ranks = pl.Series(scores).rank().to_numpy()
    positives = int(labels.sum())
    pairs = positives * (len(labels) - positives)
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / pairs)


def hit_rate(scores: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    own = scores[np.arange(len(targets)), targets][:, None]
    return float(((scores > own).sum(axis=1) < 10).mean())


def matrix(column: pl.Series) -> NDArray[np.float64]:
    return np.array(column.to_list())


# ---- the tables


def test_folder_is_a_valid_data_set_with_the_oracle_beside_it(tmp_path: Path) -> None:
    dataset, truth = simulate(SMALL)
    write_dataset(dataset, tmp_path / "data")
    write_oracle(truth, tmp_path / "data")
    read = read_dataset(tmp_path / "data")
    assert read.spec == dataset.spec
    assert read.slates.equals(dataset.slates)
    assert read.events.equals(dataset.events)
    assert read.items.equals(dataset.items)
    again = read_oracle(tmp_path / "data")
    assert again.rows.equals(truth.rows)
    assert again.slates.equals(truth.slates)
    assert again.items.equals(truth.items)


def test_declaration(data: Dataset) -> None:
    assert data.spec.actions == ("click", "save", "share", "hide")
    assert data.spec.positive_actions == ("click",)
    assert data.spec.surfaces == ("unknown", "home", "search", "related")
    assert data.spec.dense == {"content": 16, "log_duration": 1}
    assert data.spec.categories["topic"] == tuple(sorted(f"topic-{c}" for c in range(30)))
    assert set(data.items["category_creator"]) <= set(data.spec.categories["creator"])
    assert data.items["dense_content"].list.len().unique().to_list() == [16]


def test_events_are_the_engaged_rows_at_their_own_strictly_increasing_times(data: Dataset) -> None:
    acted = data.slates.filter(pl.any_horizontal(f"action_{name}" for name in ACTIONS))
    same = ["user_id", "item_id", "surface", *(f"action_{name}" for name in ACTIONS)]
    assert data.events.select(same).equals(acted.select(same))
    delay_ms = (data.events["timestamp_ms"] - acted["timestamp_ms"]).to_numpy()
    assert delay_ms.min() == 3_000
    assert 3_000 * 10 < delay_ms.max() < 3_000 * 11
    gaps = data.events.select(pl.col("timestamp_ms").diff().over("user_id").min()).item()
    assert gaps > 0


def test_all_events_of_a_slate_come_before_the_next_slate_of_the_user(data: Dataset) -> None:
    slates = data.slates.unique("slate_id", maintain_order=True).select("slate_id", "user_id", "timestamp_ms")
    assert slates["slate_id"].to_list() == list(range(len(slates)))
    assert slates["user_id"].is_sorted()
    gaps = slates.select(pl.col("timestamp_ms").diff().over("user_id").min()).item()
    assert gaps >= 11 * 3_000 + 10_000


def test_an_item_is_shown_once_per_slate_and_never_after_an_action(data: Dataset) -> None:
    assert data.slates.select("slate_id", "item_id").is_duplicated().sum() == 0
    first_action = data.events.group_by("user_id", "item_id").agg(pl.col("timestamp_ms").min(), pl.len())
    assert first_action["len"].max() == 1
    shown = data.slates.join(first_action, on=["user_id", "item_id"], suffix="_action")
    assert (shown["timestamp_ms"] < shown["timestamp_ms_action"]).all()


def test_actions_are_structured_and_their_rates_plausible(data: Dataset) -> None:
    click, save, share, hide = (data.slates[f"action_{name}"].to_numpy() for name in ACTIONS)
    assert not (save & ~click).any()
    assert not (share & ~click).any()
    assert not (hide & click).any()
    assert 0.25 < click.mean() < 0.38
    assert 0.07 < save.mean() < 0.12
    assert 0.01 < share.mean() < 0.025
    assert 0.01 < hide.mean() < 0.035
    assert 35 < len(data.events) / data.events["user_id"].n_unique() < 60


def test_a_state_moves_towards_the_clicks_within_a_session_and_away_from_them_over_days(
    data: Dataset, oracle: Oracle
) -> None:
    taste = oracle.items.select("item_id", clicked=pl.col("vector_click").list.head(8))
    clicks = data.slates.filter("action_click").join(taste, on="item_id", maintain_order="left")
    last = clicks.unique("slate_id", keep="last", maintain_order=True).select("slate_id", "clicked")
    times = data.slates.unique("slate_id", maintain_order=True).select("slate_id", "timestamp_ms")
    slates = oracle.slates.join(times, on="slate_id", maintain_order="left").join(last, on="slate_id")
    near = (pl.col("state").list.head(8).list.to_array(8) * pl.col("clicked").list.to_array(8)).arr.sum()
    after = pl.col("state").shift(-1).over("user_id").list.head(8).list.to_array(8)
    steps = slates.sort("slate_id").select(
        gain=(after * pl.col("clicked").list.to_array(8)).arr.sum() - near,
        hours=(pl.col("timestamp_ms").shift(-1).over("user_id") - pl.col("timestamp_ms")) / 3_600_000,
    )
    assert steps.filter(pl.col("hours") < 0.5)["gain"].to_numpy().mean() > 0.3
    assert steps.filter(pl.col("hours") > 72)["gain"].to_numpy().mean() < -0.1


def test_examination_falls_with_the_position_from_one_towards_a_half() -> None:
    np.testing.assert_allclose(examination(4), [1.0, 0.925, 0.86125, 0.8070625])


def test_split_is_80_10_10_of_the_simulated_time(data: Dataset) -> None:
    assert data.spec.split is not None
    day_ms = 86_400_000
    assert data.spec.split.valid_start_ms - CONFIG.start_ms == 28 * day_ms * 8 // 10
    assert data.spec.split.test_start_ms - CONFIG.start_ms == 28 * day_ms * 9 // 10
    in_test = (data.slates["timestamp_ms"] >= data.spec.split.test_start_ms).to_numpy().mean()
    assert 0.08 < in_test < 0.13


def test_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    for name, config in {"a": SMALL, "b": SMALL, "c": replace(SMALL, seed=8)}.items():
        dataset, truth = simulate(config)
        write_dataset(dataset, tmp_path / name)
        write_oracle(truth, tmp_path / name)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
        assert file.read_bytes() != (tmp_path / "c" / file.name).read_bytes(), file.name


def test_progress_counts_every_user_once() -> None:
    seen: list[int] = []
    simulate(replace(SMALL, users=1500), on_users=seen.append)
    assert seen == [1024, 476]


@pytest.mark.parametrize(
    "settings",
    [
        {"users": 1},
        {"items": 1, "categories": 1, "slate_size": 1},
        {"items": 20, "categories": 20, "latent_dim": 2},
        {"sessions_per_user": 1, "slates_per_session": 1, "days": 1},
        {"exploration": 0.0, "policy_noise": 0.0, "drift": 0.0, "momentum": 0.0, "mood": 0.0},
        {"exploration": 1.0, "momentum": 1.0, "content_noise": 0.0},
    ],
)
def test_extreme_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    dataset, truth = simulate(replace(SMALL, **settings))
    write_dataset(dataset, tmp_path / "data")
    assert len(read_dataset(tmp_path / "data").slates) == len(truth.rows) > 0
    scores = oracle_item_scores(truth, truth.slates["slate_id"].to_list())
    assert np.isfinite(scores).all()


def test_users_who_have_engaged_with_everything_see_shorter_slates() -> None:
    dataset, truth = simulate(SimulatorConfig(users=20, items=12, categories=2, sessions_per_user=8))
    sizes = dataset.slates.group_by("slate_id").len()["len"].to_numpy()
    assert sizes.min() < 10
    assert sizes.max() == 10
    assert dataset.slates["slate_id"].n_unique() == len(truth.slates)
    assert dataset.slates.select("slate_id", "item_id").is_duplicated().sum() == 0


# ---- how slates are drawn


def test_slates_are_drawn_without_replacement_in_proportion_to_the_weights() -> None:
    config = SimulatorConfig(users=1, items=3, categories=1, slate_size=2)
    world, _ = make_world(config, np.random.default_rng(0))
    users = 200_000
    policy = category_chances(np.zeros((users, 8)), world, config)
    slates = draw_slates(policy, np.zeros((users, 3), dtype=np.bool_), world, 2, np.random.default_rng(1))
    for i, j in ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)):
        share = float(((slates[:, 0] == i) & (slates[:, 1] == j)).mean())
        assert share == pytest.approx(world.share[i] * world.share[j] / (1 - world.share[i]), abs=0.005)


def test_drawing_past_the_first_draws_goes_on_with_the_same_weights() -> None:
    config = SimulatorConfig(users=1, items=200, categories=1, slate_size=1)
    world, _ = make_world(config, np.random.default_rng(0))
    rare = world.order[[50, 100, 199]]
    engaged = np.ones((30_000, 200), dtype=np.bool_)
    engaged[:, rare] = False  # four draws rarely find one of the three
    slates = draw_slates(np.ones((30_000, 1)), engaged, world, 1, np.random.default_rng(1))
    shares = np.bincount(slates[:, 0], minlength=200)[rare] / len(slates)
    np.testing.assert_allclose(shares, world.share[rare] / world.share[rare].sum(), atol=0.015)
    engaged[:, rare[1:]] = True
    assert draw_slates(np.ones((2, 1)), engaged[:2], world, 2, np.random.default_rng(1)).tolist() == [
        [rare[0], -1],
        [rare[0], -1],
    ]


# ---- the ceiling


@pytest.mark.parametrize("action", ACTIONS)
def test_true_chances_are_calibrated(data: Dataset, oracle: Oracle, action: str) -> None:
    chance = oracle.rows[f"p_{action}"].to_numpy()
    label = data.slates[f"action_{action}"].to_numpy()
    expected = chance * examination(10)[data.slates["position"].to_numpy()]
    edges = np.quantile(chance, np.arange(1, 8) / 8)
    for part in range(8):
        inside = np.digitize(chance, edges) == part
        spread = np.sqrt((expected[inside] * (1 - expected[inside])).sum())
        assert abs(label[inside].sum() - expected[inside].sum()) < 4 * spread


def test_rows_of_the_oracle_are_the_rows_of_the_slates(data: Dataset, oracle: Oracle) -> None:
    assert oracle.rows.select("slate_id", "item_id").equals(data.slates.select("slate_id", "item_id"))
    assert oracle.rows.columns == ["slate_id", "item_id", "p_click", "p_save", "p_share", "p_hide", "engaged"]
    assert int(oracle.rows["engaged"].sum()) == len(data.events)


@pytest.mark.parametrize("action", ACTIONS)
def test_no_perturbed_score_ranks_better_than_the_truth(data: Dataset, oracle: Oracle, action: str) -> None:
    assert data.spec.split is not None
    held_out = (data.slates["timestamp_ms"] >= data.spec.split.valid_start_ms).to_numpy()
    chance = oracle.rows[f"p_{action}"].to_numpy()[held_out].astype(np.float64)
    label = data.slates[f"action_{action}"].to_numpy()[held_out]
    best = auc(label, chance)
    assert best > 0.78
    logit = np.log(chance / (1 - chance))
    for scale in (0.5, 1.0, 2.0):
        noise = np.random.default_rng(0).standard_normal(len(logit))
        assert auc(label, logit + scale * noise) < best
    smoothed = (pl.col(f"action_{action}").sum() + 0.1) / (pl.len() + 10)
    rates = data.slates.filter(~held_out).group_by("item_id").agg(rate=smoothed)
    by_item = data.slates.filter(held_out).join(rates, on="item_id", how="left", maintain_order="left")["rate"]
    assert auc(label, by_item.fill_null(0.01).to_numpy()) < best - 0.05


def first_clicks(data: Dataset, since_ms: int) -> tuple[list[int], NDArray[np.int64]]:
    """Slates with a click, and the catalogue row of the first item clicked."""
    clicks = data.slates.filter(pl.col("action_click") & (pl.col("timestamp_ms") >= since_ms))
    clicks = clicks.unique("slate_id", keep="first", maintain_order=True)
    rows = clicks.join(data.items.select("item_id").with_row_index("row"), on="item_id", maintain_order="left")["row"]
    return clicks["slate_id"].to_list(), rows.cast(pl.Int64).to_numpy()


def test_catalogue_scores_are_chances_of_the_first_impression(data: Dataset, oracle: Oracle) -> None:
    first = data.slates.unique("user_id", keep="first", maintain_order=True)  # nothing was engaged with yet
    scores = oracle_item_scores(oracle, first["slate_id"].to_list())
    clicked = first.filter("action_click").join(
        data.items.select("item_id").with_row_index("row"), on="item_id", maintain_order="left"
    )
    observed = np.bincount(clicked["row"].to_numpy(), minlength=1500)
    expected = scores.sum(axis=0, dtype=np.float64)
    order = np.argsort(expected)
    for part in np.array_split(order, 10):
        assert abs(observed[part].sum() - expected[part].sum()) < 4 * np.sqrt(expected[part].sum())


def test_click_chances_are_those_that_the_shown_rows_were_drawn_by(data: Dataset, oracle: Oracle) -> None:
    rows = {item: row for row, item in enumerate(data.items["item_id"])}
    for slate in (5000, 17, 20000):
        shown = oracle.rows.filter(pl.col("slate_id") == slate)
        (chances,) = oracle_click_chances(oracle, [slate])
        assert chances.shape == (1500,)
        indices = [rows[item] for item in shown["item_id"]]
        np.testing.assert_allclose(chances[indices], shown["p_click"].to_numpy(), atol=1e-5)


def test_click_chances_of_a_slate_that_is_not_there(oracle: Oracle) -> None:
    with pytest.raises(DataError, match=r"slates \[-1\] are not in the oracle"):
        oracle_click_chances(oracle, [0, -1])


def test_catalogue_scores_are_zero_exactly_for_engaged_items(data: Dataset, oracle: Oracle) -> None:
    rows = {item: row for row, item in enumerate(data.items["item_id"])}
    slates = data.slates.unique("slate_id", maintain_order=True)[[5000, 17, 17, 20000]]
    scores = oracle_item_scores(oracle, slates["slate_id"].to_list())
    for score, (user, now) in zip(scores, slates.select("user_id", "timestamp_ms").iter_rows(), strict=True):
        seen = data.events.filter((pl.col("user_id") == user) & (pl.col("timestamp_ms") < now))["item_id"]
        assert np.flatnonzero(score == 0).tolist() == sorted(rows[item] for item in seen)


def test_catalogue_scores_agree_with_the_shown_rows(data: Dataset, oracle: Oracle) -> None:
    shown = oracle.rows.filter(pl.col("slate_id") == 123)
    slate = oracle.slates.filter(pl.col("slate_id") == 123)
    item = oracle.items.join(shown, on="item_id", how="inner", maintain_order="right")
    exposure = np.exp(matrix(oracle.items["centre"]) @ matrix(slate["view"])[0]) * oracle.items["share"].to_numpy()
    rows = np.array([oracle.items["item_id"].to_list().index(i) for i in item["item_id"]])
    uniform = item["share"].to_numpy() / 30
    expected = (0.9 * exposure[rows] / exposure.sum() + 0.1 * uniform) * item["p_click"].to_numpy()
    np.testing.assert_allclose(oracle_item_scores(oracle, [123])[0, rows], expected, rtol=1e-4)


def static_taste(data: Dataset, oracle: Oracle, users: pl.Series, before_ms: int) -> NDArray[np.float64]:
    """exp(8 * cosine) of each item to the mean of what a user clicked in training: the truth, but for the time."""
    latent = matrix(oracle.items["vector_click"])[:, :-2]
    latent /= np.linalg.norm(latent, axis=1, keepdims=True)
    rows = {item: row for row, item in enumerate(data.items["item_id"])}
    clicks = data.events.filter(pl.col("action_click") & (pl.col("timestamp_ms") < before_ms))
    items = dict(clicks.group_by("user_id").agg("item_id").iter_rows())
    mean = np.array([latent[[rows[item] for item in items.get(user, [])]].sum(axis=0) for user in users])
    cosine = mean @ latent.T / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-9)
    taste: NDArray[np.float64] = np.exp(8 * cosine)
    return taste


def test_truth_retrieves_better_than_popularity_and_static_taste(data: Dataset, oracle: Oracle) -> None:
    assert data.spec.split is not None
    cut = data.spec.split.valid_start_ms
    slate_ids, targets = first_clicks(data, cut)
    scores = oracle_item_scores(oracle, slate_ids)
    train = data.slates.filter(pl.col("timestamp_ms") < cut).group_by("item_id").agg(pl.col("action_click").sum())
    counts = data.items.join(train, on="item_id", how="left", maintain_order="left")["action_click"].fill_null(0)
    popularity = (1 + counts.to_numpy()) * (scores > 0)
    taste = static_taste(data, oracle, oracle.slates["user_id"].gather(slate_ids), cut) * popularity
    assert 0.02 < hit_rate(popularity, targets) < 0.07
    assert 0.08 < hit_rate(taste, targets) < 0.20
    assert 0.30 < hit_rate(scores, targets) < 0.42


def test_truth_retrieves_better_than_parts_of_itself(data: Dataset, oracle: Oracle) -> None:
    slate_ids, targets = first_clicks(data, 0)
    slate_ids, targets = slate_ids[::4], targets[::4]
    whole = oracle_item_scores(oracle, slate_ids)
    zero = pl.lit(0.0, dtype=pl.Float32)
    exposure = replace(oracle, items=oracle.items.with_columns(pl.col("vector_click") * zero, bias_click=zero))
    appeal = replace(
        oracle,
        items=oracle.items.with_columns(share=zero + 1),
        slates=oracle.slates.with_columns(exploration=zero + 1),
    )
    shifted = oracle.slates.with_columns(pl.col("state", "view").shift(1000).fill_null(strategy="backward"))
    others = replace(oracle, slates=shifted)
    for part in (exposure, appeal, others):
        assert hit_rate(oracle_item_scores(part, slate_ids) * (whole > 0), targets) < hit_rate(whole, targets) - 0.01


def test_unknown_slate_is_refused(oracle: Oracle) -> None:
    with pytest.raises(DataError, match=r"slates \[-1, 99999999\] are not in the oracle"):
        oracle_item_scores(oracle, [0, -1, 99999999])


def test_no_slates_give_no_scores(oracle: Oracle) -> None:
    assert oracle_item_scores(oracle, []).shape == (0, 1500)


def test_data_without_an_oracle_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only data sets made with `unipinrec prepare simulate` have an oracle"):
        read_oracle(tmp_path)


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"users": 0}, "users=0 is out of range; it must be at least 1"),
        ({"sessions_per_user": 0.5}, "sessions_per_user=0.5 is out of range; it must be at least 1"),
        ({"slates_per_session": float("nan")}, "slates_per_session=nan is out of range"),
        ({"latent_dim": 1}, "latent_dim=1 is out of range; it must be at least 2"),
        ({"momentum": 1.5}, "momentum=1.5 is out of range; it must be from 0 to 1"),
        ({"drift": -1.0}, "drift=-1.0 is out of range; it must be at least 0"),
        ({"slate_size": 3000}, "slate_size=3000 is more than items=2000.*lower slate_size or raise items"),
        ({"categories": 3000}, "categories=3000 is more than items=2000.*lower categories or raise items"),
        ({"sessions_per_user": 900.0}, "take 21.. days of a user's time, more than half of days=28: raise days"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SimulatorConfig(**settings)
