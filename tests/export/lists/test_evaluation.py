"""What `evaluate` says is what a client gets: measured again by hand, request by request."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from unipinrec.cli import main
from unipinrec.cli.evaluate import print_evaluation
from unipinrec.errors import DataError, NothingHeldOutError
from unipinrec.export.lists import blend
from unipinrec.export.lists.evaluation import evaluate
from unipinrec.export.lists.held_out_requests import Client, HeldOut
from unipinrec.models.checkpoint import load_checkpoint
from unipinrec.models.data.schema import Dataset, DatasetSpec, TimeSplit, read_dataset, write_dataset
from unipinrec.models.data.sequences import sequences_of
from unipinrec.models.evaluate import NO_TARGET, gather_scores, held_out_requests, metrics_of, model_scores
from unipinrec.models.simulator.oracle import oracle_click_chances, read_oracle
from unipinrec.runtime import Bundle, Event, Recommender, RecommendOptions, agreement
from unipinrec.runtime.bundle.quality import Evaluation

LIMIT = 60


@pytest.fixture(scope="module")
def recommender(bundle: Path) -> Recommender:
    return Recommender.load(bundle, "cpu")


@pytest.fixture(scope="module")
def evaluation(recommender: Recommender, dataset: Path) -> Evaluation:
    return evaluate(recommender, dataset, limit=LIMIT)


def test_the_served_list_is_what_a_client_gets(recommender: Recommender, dataset: Path, evaluation: Evaluation) -> None:
    table = read_dataset(dataset)
    truth = read_oracle(dataset)
    hits, true_values, indices = [], [], {item: row for row, item in enumerate(table.items["item_id"])}
    test = table.slates.filter(pl.col("timestamp_ms") >= table.spec.split.test_start_ms) if table.spec.split else None
    assert test is not None
    measured = held_out(dataset)
    for slate_id, target in measured:
        shown = test.filter(pl.col("slate_id") == slate_id)
        user, now_ms, surface = shown.select("user_id", "timestamp_ms", "surface").row(0)
        events = [event for event in events_of(table, user) if (event.timestamp_ms or 0) < now_ms]
        slate = recommender.recommend(events, 10, RecommendOptions(surface=surface, now_ms=now_ms))
        chances = oracle_click_chances(truth, [slate_id])[0]
        true_values.append(np.mean([chances[indices[item.item]] for item in slate.items]))
        if target is not None:
            hits.append(target in {item.item for item in slate.items})
    served = evaluation.lists["served"]
    assert served.hit_rate is not None
    assert served.true_value is not None
    assert served.hit_rate.mean == pytest.approx(np.mean(hits))
    assert served.true_value.mean == pytest.approx(np.mean(true_values), abs=1e-6)
    assert served.true_value.error == pytest.approx(np.std(true_values, ddof=1) / np.sqrt(LIMIT), abs=1e-6)
    assert (evaluation.requests, evaluation.targets) == (LIMIT, len(hits))


def events_of(table: Dataset, user: str) -> list[Event]:
    return [
        Event(
            item=row["item_id"],
            actions=tuple(name for name in table.spec.actions if row[f"action_{name}"]),
            surface=row["surface"],
            timestamp_ms=row["timestamp_ms"],
        )
        for row in table.events.filter(pl.col("user_id") == user).iter_rows(named=True)
    ]


def held_out(dataset: Path) -> list[tuple[int, str | None]]:
    """Slate and target of each request."""
    table = read_dataset(dataset)
    data = sequences_of(table)
    positive = np.array([name in table.spec.positive_actions for name in table.spec.actions])
    requests = held_out_requests(data, positive, "test", LIMIT)
    return [
        (int(data.slate_ids[slate]), None if target == NO_TARGET else data.item_ids[target])
        for slate, target in zip(requests.slates, requests.targets, strict=True)
    ]


def test_retrieval_and_ranking_are_those_of_the_checkpoint(checkpoint: Path, bundle: Path, dataset: Path) -> None:
    with Recommender.load(bundle, "cpu", window_slack=1) as recommender:  # the last events, as in training
        evaluation = evaluate(recommender, dataset, limit=LIMIT)
    table = read_dataset(dataset)
    data, actions = sequences_of(table), table.spec.actions
    positive = np.array([name in table.spec.positive_actions for name in actions])
    requests = held_out_requests(data, positive, "test", LIMIT)
    scores = gather_scores(list(model_scores(load_checkpoint(checkpoint).model, data, requests)))
    expected = metrics_of(scores, data, requests, actions)
    assert expected.retrieval is not None
    assert expected.ranking is not None
    retrieved = evaluation.lists["by_retrieval"]
    assert retrieved.hit_rate is not None
    assert retrieved.ndcg is not None
    assert retrieved.hit_rate.mean == pytest.approx(expected.retrieval.hit_rate[10])
    assert retrieved.ndcg.mean == pytest.approx(expected.retrieval.ndcg[10])
    for name in actions:
        assert evaluation.actions[name].auc == pytest.approx(expected.ranking[name].auc, abs=1e-4)
        assert evaluation.actions[name].logloss == pytest.approx(expected.ranking[name].logloss, abs=1e-5)
        assert evaluation.actions[name].rows == expected.ranking[name].rows


def test_no_list_beats_the_best_ten(evaluation: Evaluation) -> None:
    values = {name: quality.true_value.mean for name, quality in evaluation.lists.items() if quality.true_value}
    assert set(values) == {
        *("served", "by_retrieval", "by_value"),
        *("popular_all_time", "popular_week", "popular_day", "next_item", "best"),
    }
    assert max(values, key=lambda name: values[name]) == "best"
    assert values["best"] > values["served"] + 0.05
    assert values["served"] == values["by_value"]
    popular, best = values["popular_all_time"], values["best"]
    assert evaluation.gap_closed == pytest.approx((values["served"] - popular) / (best - popular))
    assert evaluation.order == "value"


def test_a_baseline_that_beats_the_model_is_named_with_the_difference(
    evaluation: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs of training on 300 users: far from enough."""
    beaten = [warning for warning in evaluation.warnings if "the served list at the logged next item" in warning]
    ahead = {
        name
        for name, quality in evaluation.lists.items()
        if name.startswith(("popular", "next")) and (quality.hit_rate, evaluation.lists["served"].hit_rate)
        if quality.hit_rate and evaluation.lists["served"].hit_rate
        if quality.hit_rate.mean > evaluation.lists["served"].hit_rate.mean
    }
    assert ahead
    said = {warning.partition(" beats")[0].partition(" is as good")[0].replace(" ", "_") for warning in beaten}
    assert ahead <= said
    print_evaluation(evaluation)
    assert beaten[0] in capsys.readouterr().err.replace("\n", " ")
    assert all("standard error" in warning and "the policy of the log" in warning for warning in beaten)


def test_the_command_measures_checkpoints_and_bundles_alike(checkpoint: Path, exported: Path, dataset: Path) -> None:
    found = []
    for model in (checkpoint, exported):
        words = ["evaluate", str(model), "--data", str(dataset), "--limit", "40", "--json"]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.stderr
        found.append(json.loads(result.stdout)["evaluation"])
    assert found[0] == found[1]
    printed = CliRunner().invoke(main, ["evaluate", str(exported), "--data", str(dataset), "--limit", "40"])
    assert f"served by {found[0]['order']}" in printed.stdout
    assert "of the gap in true value" in printed.stdout


@pytest.fixture(scope="module")
def exported(checkpoint: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    words = ["export", str(checkpoint), str(folder), "--data", str(dataset), "--evaluate", "40"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.stderr
    assert "slates are ordered by" in result.stdout
    return folder


def test_an_export_with_data_stores_what_is_served(exported: Path, dataset: Path) -> None:
    with Recommender.load(exported, "cpu") as recommender:
        manifest = recommender.bundle.manifest
        assert manifest.evaluation == evaluate(recommender, dataset, limit=40)
    assert manifest.sample is not None
    assert manifest.sample.users > 100
    assert manifest.order is not None
    assert manifest.order.by in ("value", "blend")
    assert "were shown and left alone" in manifest.order.reason


def test_the_blend_is_that_which_orders_pairs_of_validation_slates_best(
    recommender: Recommender, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blend, "WEIGHTS", (0.0, 0.3, 3.0))
    monkeypatch.setattr(blend, "MOST_SLATES", 25)
    table = read_dataset(dataset)
    data, spec = sequences_of(table), recommender.bundle.manifest.order
    assert spec is not None
    assert table.spec.split is not None
    telling = []
    for (slate,), shown in table.slates.group_by("slate_id", maintain_order=True):
        time_ms = shown["timestamp_ms"][0]
        early = time_ms < table.spec.split.valid_start_ms or time_ms >= table.spec.split.test_start_ms
        user = data.user_ids.index(shown["user_id"][0])
        known = data.slate_cutoff[data.slate_ids.tolist().index(slate)]
        if not early and known and shown["action_click"].n_unique() == 2:
            telling.append((user, time_ms, slate, shown))
    telling.sort(key=lambda one: one[:3])
    rates = np.zeros(3)
    positions = np.linspace(0, len(telling) - 1, 25).astype(int)
    for user, time_ms, _, shown in [telling[position] for position in positions]:
        history = [event for event in events_of(table, data.user_ids[user]) if (event.timestamp_ms or 0) < time_ms]
        items, clicked = shown["item_id"].to_list(), dict(shown.select("item_id", "action_click").iter_rows())
        options = RecommendOptions(
            surface=shown["surface"][0], now_ms=time_ms, allow=tuple(items), exclude_seen=False, order="value"
        )
        slate = recommender.recommend(history, len(items), options)
        for number, weight in enumerate((0.0, 0.3, 3.0)):
            scored = [
                (item.score * np.exp(weight * spec.retrieval_scale * (item.retrieval_score or 0)), clicked[item.item])
                for item in slate.items
            ]
            pairs = [(a, b) for a, good in scored if good for b, bad in scored if not bad]
            rates[number] += np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]) / 25
    chosen = blend.chosen_blend(recommender, dataset)
    best = int(rates.argmax())
    if best == 0:
        assert chosen is None
    else:
        assert chosen is not None
        assert (chosen.by, chosen.retrieval_weight) == ("blend", (0.0, 0.3, 3.0)[best])
        assert f"logit {rates[best]:.4f} of the pairs within 25 validation slates" in chosen.reason
        with blend.with_order(recommender, chosen) as blended:
            assert blended.order == "blend"


def test_other_data_is_refused(recommender: Recommender, dataset: Path, tmp_path: Path) -> None:
    table, renamed = read_dataset(dataset), pl.col("item_id") + "x"
    tables = {name: getattr(table, name).with_columns(item_id=renamed) for name in ("items", "events", "slates")}
    surfaces = tuple(name.upper() for name in table.spec.surfaces[1:])
    for name, changed, match in (
        ("items", replace(table, **tables), r"lacks 300 of its items, such as \['item-0x', 'item-1x', 'item-2x'\]"),
        ("surfaces", replace(table, spec=with_fields(table, surfaces=("unknown", *surfaces))), "surfaces were "),
        ("actions", replace(table, spec=with_fields(table, positive_actions=("hide",))), "positive_actions were"),
    ):
        write_dataset(changed, tmp_path / name)
        with pytest.raises(DataError, match=match):
            evaluate(recommender, tmp_path / name)


def with_fields(table: Dataset, **changes: Any) -> DatasetSpec:
    return msgspec.structs.replace(table.spec, **changes)


def test_a_split_without_anything_to_measure_is_refused(
    recommender: Recommender, dataset: Path, tmp_path: Path
) -> None:
    table = read_dataset(dataset)
    late = TimeSplit(valid_start_ms=4_000_000_000_000, test_start_ms=4_000_000_000_000)
    write_dataset(replace(table, spec=with_fields(table, split=late)), tmp_path / "late")
    with pytest.raises(DataError, match="nothing to measure in the test part: no slate of that part has an event"):
        evaluate(recommender, tmp_path / "late")


def test_items_that_the_user_had_before_are_served_where_repeats_count(recommender: Recommender, dataset: Path) -> None:
    held = HeldOut.read(dataset, "test", 20, repeats=True)
    answers = Client(recommender, held).candidates(held.requests)
    plain = HeldOut.read(dataset, "test", 20, repeats=False)
    fewer = Client(recommender, plain).candidates(plain.requests)
    seen = [
        set(plain.data.rows[plain.data.event_start[u] : e])
        for u, e in zip(plain.requests.users, plain.requests.ends, strict=True)
    ]
    assert any(rows & set(found) for rows, found in zip(seen, answers.rows.tolist(), strict=True))
    assert not any(rows & set(found) for rows, found in zip(seen, fewer.rows.tolist(), strict=True))


def test_retired_items_and_users_with_nothing_left_are_no_requests(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "gone.txt").write_text("\n".join(f"item-{number}" for number in range(10)))
    words = ["index", str(bundle), "--out", str(tmp_path / "few"), "--retire", str(tmp_path / "gone.txt")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.stderr
    with Recommender.load(tmp_path / "few", "cpu") as few:
        held = HeldOut.read(dataset, "test", None, repeats=False)
        left = Client(few, held).answerable(held.requests)
        assert len(held.requests) / 4 < len(left) < len(held.requests)
        found = evaluate(few, dataset, limit=30)
        assert 0 < found.requests < 30
        assert found.lists["served"].true_value is not None
        with pytest.raises(NothingHeldOutError, match="none of the 0 requests can be answered"):
            Client(few, held).answerable(held.requests.take(np.zeros(0, np.int64)))


def test_what_is_served_follows_the_order_in_every_precision(bundle: Path) -> None:
    """The judge of backends that round looks at what the bundle orders by."""
    manifest = Bundle.open(bundle).manifest
    assert manifest.order is not None
    given, similarity = np.array([[2.0, 0, 0, 0], [1.0, 0, 0, 0]], np.float32), np.array([0.1, 0.9], np.float32)
    first = {}
    for by in ("value", "blend", "product", "retrieval"):
        spec = msgspec.structs.replace(manifest.order, by=by, retrieval_scale=20.0, retrieval_weight=0.1)
        scores, tied = agreement._scores(msgspec.structs.replace(manifest, order=spec), given, similarity, 5e-4)
        first[by] = int(scores.argmax())
        assert (tied > 0).all()
    assert first == {"value": 0, "blend": 1, "product": 1, "retrieval": 1}
