from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from unipinrec.errors import CheckpointError, DataError
from unipinrec.models.compare import ceiling_scores, compare_scorers
from unipinrec.models.data_schema import TimeSplit, item_columns, read_dataset, write_dataset
from unipinrec.models.evaluate import held_out_requests, shown_items
from unipinrec.models.sequences import sequences_of
from unipinrec.models.simulator import SimulatorConfig, simulate
from unipinrec.models.simulator_oracle import read_oracle


def test_nothing_beats_the_ceiling(checkpoint: Path, dataset: Path) -> None:
    results = compare_scorers(checkpoint, dataset, "test")
    retrieval = {name: metrics.retrieval for name, metrics in results.items()}
    for name in ("model", "popularity"):
        better, worse = retrieval["ceiling"], retrieval[name]
        assert better is not None
        assert worse is not None
        assert better.hit_rate[10] > worse.hit_rate[10] + 0.1
    ceiling, model = results["ceiling"].ranking, results["model"].ranking
    assert ceiling is not None
    assert model is not None
    assert (ceiling["click"].auc or 0) > (model["click"].auc or 1) + 0.05
    assert ceiling["click"].rows == model["click"].rows


def test_the_ceiling_scores_each_shown_item_with_its_own_truth(dataset: Path) -> None:
    prepared, oracle = read_dataset(dataset), read_oracle(dataset)
    data = sequences_of(prepared)
    positive = np.array([name in prepared.spec.positive_actions for name in prepared.spec.actions])
    requests = held_out_requests(data, positive, "test", 40)
    scores = ceiling_scores(oracle, prepared.spec, data, requests)
    truth = {
        (slate, item): chance for slate, item, chance in oracle.rows.select("slate_id", "item_id", "p_save").iter_rows()
    }
    save = prepared.spec.actions.index("save")
    for place, shown in enumerate(shown_items(data, requests)):
        slate = data.slate_ids[np.searchsorted(data.slate_start, shown, side="right") - 1]
        expected = truth[slate, data.item_ids[data.slate_rows[shown]]]
        assert scores.probabilities[place, save] == pytest.approx(expected)


def test_other_data_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    write_dataset(simulate(SimulatorConfig(users=20, items=50, categories=2))[0], tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"was trained on other data than .*: item ids from number 51 on were"):
        compare_scorers(checkpoint, tmp_path / "other", "test")


@pytest.mark.parametrize(
    ("field", "given", "difference"),
    [
        ("surfaces", ("unknown", "a", "home"), r"surfaces from number 2 on were \['home', .*\], are \['a', 'home'\]"),
        ("positive_actions", ("hide",), r"positive actions from number 1 on were \['click'\], are \['hide'\]"),
        ("categories", {"topic": ("b",), "creator": ()}, r"words of category 'topic' from number 1 .*, are \['b'\]"),
        ("categories", {}, r"categories from number 1 on were \['topic', 'creator'\], are \[\]"),
        ("dense", {}, r"widths of dense features from number 1 on were \['content: 16', 'log_duration: 1'\], are \[\]"),
    ],
)
def test_another_vocabulary_for_the_same_items_is_refused(
    checkpoint: Path, dataset: Path, tmp_path: Path, field: str, given: object, difference: str
) -> None:
    prepared = read_dataset(dataset)
    spec = msgspec.structs.replace(prepared.spec, **{field: given})
    items = prepared.items.select(list(item_columns(spec)))
    write_dataset(replace(prepared, spec=spec, items=items), tmp_path / "data")
    with pytest.raises(CheckpointError, match=difference):
        compare_scorers(checkpoint, tmp_path / "data", "test")


def test_engagements_alone_are_measured(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    prepared = read_dataset(dataset)
    write_dataset(replace(prepared, slates=prepared.slates.clear()), tmp_path / "data")
    results = compare_scorers(checkpoint, tmp_path / "data", "valid")
    assert list(results) == ["model", "popularity"]
    for metrics in results.values():
        assert metrics.ranking is None
        assert metrics.retrieval is not None
        assert metrics.retrieval.targets > 100


@pytest.mark.parametrize(
    ("drop", "split", "why"),
    [
        ([], TimeSplit(valid_start_ms=1, test_start_ms=1), "no slate of that part has an event of its user before it"),
        (["slates"], TimeSplit(valid_start_ms=1, test_start_ms=1), "no positive event of that part is of an item new"),
        (["slates", "events"], None, "no user has an event to hold out"),
    ],
)
def test_a_part_with_nothing_to_measure_is_refused(
    checkpoint: Path, dataset: Path, tmp_path: Path, drop: list[str], split: TimeSplit | None, why: str
) -> None:
    prepared = read_dataset(dataset)
    tables = {name: getattr(prepared, name).clear() for name in drop}
    spec = msgspec.structs.replace(prepared.spec, split=split)
    write_dataset(replace(prepared, spec=spec, **tables), tmp_path / "data")
    with pytest.raises(DataError, match=f"nothing to measure in the valid part: {why}"):
        compare_scorers(checkpoint, tmp_path / "data", "valid")
