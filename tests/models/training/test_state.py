from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unipinrec.errors import CheckpointError
from unipinrec.models.model import UniPinRec
from unipinrec.models.training.state import Position, read_state, write_state

Make = Callable[..., UniPinRec]


def _stepped(model: UniPinRec) -> torch.optim.AdamW:
    """An optimizer with moments, as after two steps; one parameter has never had a gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        model.log_scale.grad = None
        optimizer.step()
    return optimizer


def test_a_position_counts_steps_and_averages_losses() -> None:
    position = Position()
    assert (position.epoch, position.batch, position.best_score, position.mean_losses()) == (0, 0, None, {})
    position.add({"loss": 3.0, "retrieval": 1.0})
    position.add({"loss": 5.0, "retrieval": 2.0})
    assert (position.epoch, position.batch) == (0, 2)
    assert position.mean_losses() == {"loss": 4.0, "retrieval": 1.5}


@pytest.mark.parametrize(
    "position",
    [
        Position(),
        Position(epoch=3, batch=7, loss_sums={"loss": 0.1 + 0.2}, best_score=1 / 3, stale_epochs=2),
    ],
)
def test_a_state_comes_back_bit_for_bit(tmp_path: Path, make_model: Make, position: Position) -> None:
    model = make_model(seed=1)
    optimizer = _stepped(model)
    write_state(tmp_path, position, model, optimizer)
    other = make_model(seed=2)
    fresh = torch.optim.AdamW(other.parameters(), lr=0.5)
    assert read_state(tmp_path, other, fresh) == position
    expected, actual = model.state_dict(), other.state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    before, after = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert sorted(after) == sorted(before)
    assert len(before) == len(list(model.parameters())) - 1
    for index, moments in before.items():
        assert sorted(moments) == ["exp_avg", "exp_avg_sq", "step"]
        assert all(torch.equal(after[index][name], moment) for name, moment in moments.items())


def test_nothing_to_resume_is_an_error(tmp_path: Path, make_model: Make) -> None:
    model = make_model()
    with pytest.raises(CheckpointError, match="holds no run to resume; leave out --resume"):
        read_state(tmp_path, model, torch.optim.AdamW(model.parameters()))


def test_a_state_of_another_model_is_refused(tmp_path: Path, make_model: Make) -> None:
    model = make_model()
    write_state(tmp_path, Position(), model, _stepped(model))
    for other in (make_model(item_dim=4), make_model(num_layers=3), make_model(attention="self")):
        with pytest.raises(CheckpointError, match="the saved state does not fit this model"):
            read_state(tmp_path, other, torch.optim.AdamW(other.parameters()))


def test_a_damaged_state_is_refused(tmp_path: Path, make_model: Make) -> None:
    model = make_model()
    optimizer = _stepped(model)
    write_state(tmp_path, Position(epoch=1), model, optimizer)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_state(tmp_path, model, optimizer)


def test_a_file_without_a_position_is_refused(tmp_path: Path, make_model: Make) -> None:
    model = make_model()
    save_file({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit this model: .*truncated"):
        read_state(tmp_path, model, torch.optim.AdamW(model.parameters()))
