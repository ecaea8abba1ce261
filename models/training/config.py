"""Settings of a training run, read from a TOML file; unknown keys are errors.

size = "tiny"            # or "small", "paper"

[model]                  # overrides of the size; see ModelConfig
max_history = 128

[train]                  # see TrainConfig
epochs = 12
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from unipinrec.errors import ConfigError
from unipinrec.models.config import SIZES, ModelConfig

COUNTS = {"epochs", "batch_size", "num_negatives", "max_candidates", "max_targets", "valid_requests", "log_every"}
WEIGHTS = {"retrieval_weight", "ranking_weight", "masked_weight", "weight_decay"}


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model is trained.

    Attributes:
        epochs: Passes over all training windows.
        batch_size: Windows per step and process.
        learning_rate: Peak of the schedule.
        weight_decay: AdamW decay of matrices; embeddings, norms and biases have none.
        warmup_steps: Steps of linear warm-up.
        schedule: After the warm-up: "cosine" falls to a tenth over the run, "constant" stays.
        grad_clip: Largest gradient norm.
        mask_probability: p of Masked Action Modeling (paper: 0.2).
        num_negatives: Random items added to the in-batch ones; at the catalogue's size or above, a full softmax.
        label_smoothing: Share of a retrieval target's probability that is spread over the sampled items.
        max_candidates: Shown items per window and step. Beyond it, whole slates are left out at random. A larger slate
            is drawn alone, with this many of its items.
        history_candidates: History events per window that are also scored as candidates, each after the events before
            it. They give the action heads more labels, without hiding context as a higher `mask_probability` does.
        max_targets: Retrieval targets per step; more are subsampled.
        action_weights: w_c by action name; other actions weigh 1.
        retrieval_weight: Weight of the retrieval loss; 0 trains a ranking-only model.
        ranking_weight: Weight of the action losses; 0 trains a retrieval-only model.
        masked_weight: Weight of the action losses at masked events (paper: 1). A lower one favours retrieval.
        precision: "fp32", "bf16" or "fp16" (needs a GPU) autocast, or "auto": bf16 on a GPU that has it, else fp32.
        patience: Stop after this many epochs without a better validation score; None = never.
        valid_requests: Held-out requests scored after each epoch.
        fit_validation: Train on the validation part too, as a last fit before serving. No epoch is chosen then; the
            latest weights are kept.
        log_every: Steps per row of log.csv.
        seed: Of initial weights, order, masks and negatives.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 50
    schedule: Literal["cosine", "constant"] = "cosine"
    grad_clip: float = 1.0
    mask_probability: float = 0.2
    num_negatives: int = 2048
    label_smoothing: float = 0.0
    max_candidates: int = 256
    history_candidates: int = 0
    max_targets: int = 4096
    action_weights: dict[str, float] = {}
    retrieval_weight: float = 1.0
    ranking_weight: float = 1.0
    masked_weight: float = 1.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    patience: int | None = None
    valid_requests: int = 2000
    fit_validation: bool = False
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        values = msgspec.structs.asdict(self)
        values |= {f"action_weights[{name!r}]": weight for name, weight in self.action_weights.items()}
        for name, value in values.items():
            if name in COUNTS and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
            if name in ("learning_rate", "grad_clip") and not 0 < value < 1e30:
                raise ConfigError(f"{name}={value} must be positive and below 1e30")
            if name in ("mask_probability", "label_smoothing") and not 0 <= value < 1:
                raise ConfigError(f"{name}={value} must be in [0, 1)")
            weight = name in WEIGHTS or name.startswith("action_weights[")
            if (weight or name in ("warmup_steps", "history_candidates")) and not 0 <= value < math.inf:
                raise ConfigError(f"{name}={value} must be finite and not negative")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"patience={self.patience} must be at least 1; leave it out to never stop early")
        if self.patience is not None and self.fit_validation:
            raise ConfigError(f"patience={self.patience} needs held-out requests; leave it out with fit_validation")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be in [0, 2**32)")
        if self.retrieval_weight == 0 and self.ranking_weight == 0:
            raise ConfigError("retrieval_weight and ranking_weight are both 0: nothing would be trained")

    def weights_of(self, actions: tuple[str, ...]) -> tuple[float, ...]:
        """w_c in the order of `actions`.

        Raises:
            ConfigError: A weight names an action that the data does not have, or all weights are 0.
        """
        foreign = set(self.action_weights) - set(actions)
        if foreign:
            raise ConfigError(f"action_weights names {sorted(foreign)}; the data has {list(actions)}")
        weights = tuple(self.action_weights.get(name, 1.0) for name in actions)
        if self.retrieval_weight == 0 and not any(weights):
            raise ConfigError(
                f"retrieval_weight and the weights of all actions {list(actions)} are 0: nothing would be trained"
            )
        return weights


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Architecture and training settings of one run."""

    model: ModelConfig
    train: TrainConfig


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    size: str = "tiny"
    model: dict[str, Any] = {}
    train: TrainConfig = TrainConfig()


def load_run_config(source: str, overrides: dict[str, Any]) -> RunConfig:
    """Read a named size or a TOML file, then apply `overrides` of training settings; None keeps the setting.

    Raises:
        ConfigError: The name or file is unknown, or a key or value is not accepted.
    """
    changes = {key: value for key, value in overrides.items() if value is not None}
    try:
        file = _File(size=source) if source in SIZES else msgspec.toml.decode(_read(source), type=_File)
        if file.size not in SIZES:
            raise ConfigError(f"size={file.size!r} is unknown; sizes are {sorted(SIZES)}")
        model = msgspec.convert({**msgspec.to_builtins(SIZES[file.size]), **file.model}, ModelConfig)
        train = msgspec.convert({**msgspec.to_builtins(file.train), **changes}, TrainConfig)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: {error}") from error
    return RunConfig(model=model, train=train)


def _read(source: str) -> bytes:
    path = Path(source)
    if os.sep not in source and not path.exists():
        raise ConfigError(f"--config {source!r} is neither a size ({', '.join(SIZES)}) nor a file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--config {source}: {error}") from error
