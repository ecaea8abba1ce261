"""The time-and-order encoding: parts equal the whole, and time matters where it is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quality_runs import loaded, trained
from time_rotary import TimeRotaryModel, TimeRotaryTrainer

from unipinrec.models.config import MISSING_TIMESTAMP_MS
from unipinrec.models.data.schema import read_dataset
from unipinrec.models.model import CandidateTokens, HistoryTokens
from unipinrec.models.training.config import RunConfig, TrainConfig

NOW, DAY = 1_700_000_000_000, 86_400_000


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> TimeRotaryModel:
    found = loaded(checkpoint, TimeRotaryTrainer)
    assert isinstance(found, TimeRotaryModel)
    return found


def tokens(model: TimeRotaryModel) -> tuple[HistoryTokens, CandidateTokens]:
    generator = torch.Generator().manual_seed(0)
    actions = len(model.vocabulary.actions)
    vectors = torch.randn((2, 9, model.config.item_dim), generator=generator)
    ago = torch.randint(0, 40 * DAY, (2, 6), generator=generator).sort(descending=True).values
    history = HistoryTokens(
        vectors=vectors[:, :6],
        actions=torch.ones((2, 6, actions)),
        surfaces=torch.zeros((2, 6), dtype=torch.long),
        timestamps_ms=NOW - ago,
        lengths=torch.tensor([6, 6]),
    )
    shown = CandidateTokens(
        vectors=vectors[:, 6:],
        surfaces=torch.zeros((2, 3), dtype=torch.long),
        timestamps_ms=torch.full((2, 3), NOW),
        cutoffs=torch.full((2, 3), 6),
    )
    return history, shown


@torch.no_grad()
def test_encode_then_rank_equals_one_joint_pass(model: TimeRotaryModel) -> None:
    history, shown = tokens(model)
    cache, last = model.encode(history)
    ranked = model.rank(cache, history.lengths, history.timestamps_ms[:, -1], shown)
    hidden, candidates = model.joint(history, torch.zeros(2, 6), shown)
    torch.testing.assert_close(last, hidden[:, -1], atol=1e-5, rtol=0)
    torch.testing.assert_close(ranked, model.action_heads(candidates), atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_turns_is_how_long_ago_not_when(model: TimeRotaryModel) -> None:
    positions = torch.arange(2)[None]

    def product(earlier_ms: int, later_ms: int) -> torch.Tensor:
        with model.rotary.at(torch.tensor([[earlier_ms, later_ms]])):
            cos, sin = model.rotary(positions)
        turned: torch.Tensor = cos[..., 0, :] * cos[..., 1, :] + sin[..., 0, :] * sin[..., 1, :]
        return turned

    torch.testing.assert_close(product(NOW, NOW + DAY), product(NOW + 77 * DAY, NOW + 78 * DAY), atol=1e-5, rtol=0)
    assert not torch.allclose(product(NOW, NOW + DAY), product(NOW, NOW + 2 * DAY), atol=1e-2)


@torch.no_grad()
def test_an_event_without_a_time_turns_by_its_index_alone(model: TimeRotaryModel) -> None:
    history, _ = tokens(model)
    missing = replace(history, timestamps_ms=torch.full_like(history.timestamps_ms, MISSING_TIMESTAMP_MS))
    with model.rotary.at(missing.timestamps_ms):
        _, sin = model.rotary(torch.arange(6)[None].expand(2, -1))
    half = sin.shape[-1] // 2
    assert (sin[..., half:] == 0).all()
    assert torch.isfinite(model.encode(missing)[1]).all()


def test_it_trains_and_is_measured(
    dataset: Path, model: TimeRotaryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quality_runs.RESULTS", tmp_path / "results")
    train = TrainConfig(epochs=1, batch_size=64, precision="fp32", seed=1)
    run = trained(
        read_dataset(dataset), RunConfig(model=model.config, train=train), tmp_path / "run", "timed", TimeRotaryTrainer
    )
    assert run["metrics"]["retrieval"]["hit_rate"]["10"] >= 0
