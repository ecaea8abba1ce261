"""The state to resume a run from: latest weights, optimizer moments, and the position in the run.

One file, `state.safetensors`, with the position in its metadata: weights and position can never disagree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from unipinrec.errors import CheckpointError
from unipinrec.models.checkpoint import write_tensors
from unipinrec.models.model import UniPinRec

STATE_FILE = "state.safetensors"


class Position(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The position in a run. All randomness is drawn from (seed, epoch, batch), so no other state is needed.

    Attributes:
        epoch: Current epoch, from 0.
        batch: Steps of this epoch so far.
        loss_sums: Sum of each loss over those steps.
        best_score: Best validation score so far; None before the first.
        stale_epochs: Epochs since the best one.
        settings: Settings that must be the same when the run is resumed.
    """

    epoch: int = 0
    batch: int = 0
    loss_sums: dict[str, float] = {}
    best_score: float | None = None
    stale_epochs: int = 0
    settings: dict[str, Any] = {}

    def add(self, losses: dict[str, float]) -> None:
        """Count one step."""
        self.batch += 1
        for name, value in losses.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0.0) + value

    def mean_losses(self) -> dict[str, float]:
        """Mean of each loss over the epoch's steps."""
        return {name: total / max(self.batch, 1) for name, total in self.loss_sums.items()}


def write_state(folder: Path, position: Position, model: UniPinRec, optimizer: torch.optim.Optimizer) -> None:
    """Write `state.safetensors` atomically."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    write_tensors(folder / STATE_FILE, tensors, {"position": msgspec.json.encode(position).decode()})


def read_state(folder: Path, model: UniPinRec, optimizer: torch.optim.Optimizer) -> Position:
    """Restore weights and optimizer in place.

    Raises:
        CheckpointError: There is no run to resume, or it belongs to a model of another shape.
    """
    if not (folder / STATE_FILE).exists():
        raise CheckpointError(
            f"{folder} holds no run to resume; leave out --resume to start one, in a folder without a model"
        )
    try:
        with safe_open(folder / STATE_FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            position = msgspec.json.decode((file.metadata() or {}).get("position", ""), type=Position)
        weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        model.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{folder}: the saved state does not fit this model: {error}") from error
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return position
