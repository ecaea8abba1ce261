"""What the quality benchmarks measure beside the metrics of `evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from unipinrec.models.checkpoint import load_checkpoint
from unipinrec.models.data.schema import read_dataset
from unipinrec.models.data.sequences import sequences_of
from unipinrec.models.evaluate import held_out_requests

ROOT = Path(__file__).resolve().parents[2]


def test_frozen_histories_hold_every_earlier_event_and_none_of_the_test(
    dataset: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    from quality_runs import frozen, test_metrics

    prepared = read_dataset(dataset)
    data = sequences_of(prepared)
    assert data.split is not None
    start = data.split.test_start_ms
    live = held_out_requests(data, np.ones(len(prepared.spec.actions), bool), "test")
    old = frozen(data, live, start)
    assert len(live) > 100
    for user, end, was in zip(old.users, old.ends, live.ends, strict=True):
        assert (data.timestamps_ms[data.event_start[user] : end] < start).all()
        assert (data.timestamps_ms[end:was] >= start).all()
    assert (old.ends < live.ends).any()
    assert set(old.targets) == {-1}
    metrics = test_metrics(prepared, load_checkpoint(checkpoint).model)
    for name in prepared.spec.actions:
        found = [metrics[part][name] for part in ("ranking", "frozen", "by_request")]
        assert len({part["rows"] for part in found}) == 1
        assert found[0]["auc"] == found[2]["auc"]
        assert found[0]["logloss"] != found[1]["logloss"]


def test_engagements_have_no_ranking_to_freeze(
    dataset: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    from quality_runs import figures, test_metrics

    prepared = read_dataset(dataset)
    engagements = replace(prepared, slates=prepared.slates.clear())
    metrics = test_metrics(engagements, load_checkpoint(checkpoint).model)
    assert metrics["retrieval"]["targets"] > 100
    assert metrics["ranking"] is None
    assert not {"frozen", "by_request"} & metrics.keys()
    assert list(figures(metrics, ())) == ["HR@10", "NDCG@10", "HR@50", "NDCG@50"]
