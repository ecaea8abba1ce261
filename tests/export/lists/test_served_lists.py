"""Whole runs on small logs of known behaviour: prepare, train, export, and what is then served."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
import pytest
from served_without_slates import case_a, synthetic

from unipinrec.export.bundle_writer import ExportOptions, export_bundle
from unipinrec.export.checkpoint_source import source_from_checkpoint
from unipinrec.export.data_histories import histories_from_data
from unipinrec.export.lists.evaluation import evaluate
from unipinrec.models.config import TINY
from unipinrec.models.data.schema import write_dataset
from unipinrec.models.data.validate import RawTables, SplitFractions, build_dataset
from unipinrec.models.training.config import RunConfig, TrainConfig
from unipinrec.models.training.train import Trainer
from unipinrec.runtime import Bundle, Recommender
from unipinrec.runtime.bundle.quality import ListQuality

START_MS, HOUR_MS = 1_700_000_000_000, 3_600_000
Event = tuple[str, str, int, bool, bool]  # user, item, time, and two actions


def log_of(events: Sequence[Event], actions: tuple[str, str] = ("click", "like"), used: int = 1) -> RawTables:
    """A log of events alone; the first `used` actions are declared, all of them positive."""
    columns = list(zip(*events, strict=True))
    flags = {f"action_{name}": column for name, column in zip(actions[:used], columns[3:], strict=False)}
    items = sorted(set(columns[1]))
    return RawTables(
        name="log",
        source="made for a test",
        actions=actions[:used],
        positive_actions=actions[:used],
        events=pl.DataFrame(
            {"user_id": columns[0], "item_id": columns[1], "surface": None, "timestamp_ms": columns[2], **flags}
        ),
        items=pl.DataFrame({"item_id": items, "title": [None] * len(items)}, schema_overrides={"title": pl.String}),
        split=SplitFractions(),
    )


def steps(users: int, items: int, seed: int = 0) -> Iterator[Event]:
    """Each next item is one, two or three further than the one before; every event is a click."""
    rng = random.Random(seed)
    for user in range(users):
        item, time_ms = rng.randrange(items), START_MS + rng.randrange(720) * HOUR_MS
        for _ in range(12):
            yield f"u{user}", f"i{item}", time_ms, True, False
            item = (item + rng.choice((1, 2, 3))) % items
            time_ms += rng.randint(1, 47) * HOUR_MS


def baskets(users: int, items: int, seed: int = 0) -> Iterator[Event]:
    """Users who mostly buy again what they bought before."""
    rng = random.Random(seed)
    for user in range(users):
        time_ms, usual = START_MS + rng.randrange(24) * HOUR_MS, rng.sample(range(items), 4)
        for _ in range(14):
            item = rng.choice(usual) if rng.random() < 0.8 else rng.randrange(items)
            yield f"u{user}", f"i{item}", time_ms, True, False
            time_ms += rng.randint(24, 72) * HOUR_MS


def served(tables: RawTables, folder: Path, epochs: int, learning_rate: float = 5e-3) -> tuple[Path, Path]:
    """Data and bundle of a log."""
    dataset = build_dataset(tables)
    write_dataset(dataset, folder / "data")
    config = RunConfig(model=TINY, train=TrainConfig(epochs=epochs, precision="fp32", learning_rate=learning_rate))
    for _ in Trainer(dataset, config, folder / "checkpoint").run():
        pass
    source = source_from_checkpoint(folder / "checkpoint")
    histories = histories_from_data(folder / "data", source, 100)
    export_bundle(
        source,
        folder / "bundle",
        histories=histories,
        options=ExportOptions(data=folder / "data", evaluated=2000),
    )
    return folder / "data", folder / "bundle"


def hit_rate(quality: ListQuality) -> float:
    assert quality.hit_rate is not None
    return quality.hit_rate.mean


def test_a_log_of_one_action_is_served_as_retrieval_orders_it(tmp_path: Path) -> None:
    _, bundle = served(log_of(list(steps(300, 80))), tmp_path, 8)
    manifest = Bundle.open(bundle).manifest
    assert manifest.order is not None
    assert manifest.order.by == "retrieval"
    assert manifest.evaluation is not None
    lists = manifest.evaluation.lists
    assert hit_rate(lists["served"]) == hit_rate(lists["by_retrieval"]) > 0.9
    assert hit_rate(lists["popular_all_time"]) < 0.3
    with Recommender.load(bundle, "cpu") as recommender:
        ((user, _),) = recommender.bundle.sample_users(1)
        slate = recommender.recommend(recommender.bundle.user_events(user), 5)
    assert (slate.order, slate.source) == ("retrieval", "model")
    assert [(item.value, item.actions, item.score) for item in slate.items] == [
        (None, {}, item.retrieval_score) for item in slate.items
    ]


def test_where_people_buy_again_the_sheet_says_so_and_repeats_are_served(tmp_path: Path) -> None:
    data, bundle = served(log_of(list(baskets(250, 60))), tmp_path, 6)
    plain = Bundle.open(bundle).manifest.evaluation
    assert plain is not None
    assert plain.data["repeats"] > 0.5
    assert any("are of items that the user had before" in warning for warning in plain.warnings)
    with Recommender.load(bundle, "cpu") as recommender:
        again = evaluate(recommender, data, repeats=True)
    assert again.targets > 2 * plain.targets
    assert hit_rate(again.lists["served"]) > hit_rate(plain.lists["served"]) + 0.2
    assert hit_rate(again.lists["served"]) > 1.5 * hit_rate(again.lists["popular_all_time"])
    assert not any("had before" in warning for warning in again.warnings)


@pytest.mark.slow
def test_of_a_log_of_one_action_all_of_retrieval_is_served(tmp_path: Path) -> None:
    _, bundle = served(case_a(), tmp_path, 12, learning_rate=2e-3)
    measured = Bundle.open(bundle).manifest.evaluation
    assert measured is not None
    assert hit_rate(measured.lists["served"]) >= 0.98 * hit_rate(measured.lists["by_retrieval"]) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["always", "sometimes"])
def test_of_two_actions_without_slates_more_value_is_served_than_by_retrieval(tmp_path: Path, kind: str) -> None:
    _, bundle = served(synthetic(kind), tmp_path, 9, learning_rate=2e-3)
    manifest = Bundle.open(bundle).manifest
    assert manifest.order is not None
    assert manifest.order.by == "product"
    assert manifest.evaluation is not None
    lists = manifest.evaluation.lists
    (ours, theirs), chance = (lists[name].value for name in ("served", "by_retrieval")), lists["by_value"].value
    assert ours is not None
    assert theirs is not None
    assert chance is not None
    assert ours.mean > theirs.mean + 0.015
    assert chance.mean < theirs.mean / 2
    assert hit_rate(lists["served"]) > hit_rate(lists["by_retrieval"]) - 0.02
