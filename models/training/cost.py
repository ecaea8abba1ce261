"""The cost of a run before it starts: parameters, arithmetic and memory, counted on one real example."""

from __future__ import annotations

import msgspec
import numpy as np
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unipinrec.errors import ConfigError
from unipinrec.models.batches import Batch, Batches
from unipinrec.models.data.schema import Dataset
from unipinrec.models.data.sequences import sequences_of, vocabulary_of
from unipinrec.models.model import UniPinRec
from unipinrec.models.training.config import RunConfig
from unipinrec.models.training.losses import Objective
from unipinrec.models.training.sheet import training_facts, training_warnings
from unipinrec.models.training.train import batch_options

COPIES = 4  # a weight, its gradient, and AdamW's two moments


class TrainingCost(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of a run.

    Attributes:
        parameters: Count by part of the model, and their sum as "total".
        windows: Training windows, the examples of an epoch.
        steps_per_epoch: On one process.
        events_per_window: Mean number of events.
        padding: Share of a batch's event slots that are padding, mean over an epoch's batches.
        example_events: Events of the counted example, a window of median length.
        example_candidates: Its candidates.
        flops_per_example: Forward and backward; a multiply-add counts as two. Attention counts as unmasked, and the
            softmax covers the items that a batch of this one example draws.
        state_bytes: Weights, gradients and AdamW's moments in fp32.
        activation_bytes_per_example: Kept from one forward pass for the backward pass, in fp32.
        step_bytes: State, and activations of a batch of such examples.
        warnings: Problems that the run will have on one process, in words.
    """

    parameters: dict[str, int]
    windows: int
    steps_per_epoch: int
    events_per_window: float
    padding: float
    example_events: int
    example_candidates: int
    flops_per_example: int
    state_bytes: int
    activation_bytes_per_example: int
    step_bytes: int
    warnings: list[str]


def training_cost(dataset: Dataset, config: RunConfig) -> TrainingCost:
    """Count the cost of training `config` on `dataset`; runs one example forward and backward on the CPU.

    Raises:
        ConfigError: The settings do not fit the data.
        DataError: No positive action ever happens in the training part.
    """
    data, vocabulary = sequences_of(dataset), vocabulary_of(dataset)
    positive = vocabulary.positive
    batches = Batches(data, positive, batch_options(config))
    if not batches.windows:
        raise ConfigError("the data has no training windows: too few events before its split")
    facts = training_facts(data, positive, vocabulary.actions, fit_validation=config.train.fit_validation)
    warnings = training_warnings(facts, config.train, config.train.epochs * len(batches))
    model = UniPinRec(config.model, vocabulary)
    objective, lengths = Objective(model, data.features, config.train), batches.lengths
    example = batches.collate([int(np.argsort(lengths, kind="stable")[len(lengths) // 2])])
    flops, activations = _count(objective, example)
    parameters = {name: _size(part) for name, part in model.named_children() if _size(part)}
    total = _size(model)
    return TrainingCost(
        parameters={**parameters, "total": total},
        windows=len(lengths),
        steps_per_epoch=len(batches),
        events_per_window=round(float(lengths.mean()), 1),
        padding=round(batches.padding(), 4),
        example_events=int(example.lengths[0]),
        example_candidates=example.candidate_items.shape[1],
        flops_per_example=flops,
        state_bytes=4 * COPIES * total,
        activation_bytes_per_example=activations,
        step_bytes=4 * COPIES * total + activations * min(config.train.batch_size, len(lengths)),
        warnings=warnings,
    )


def _count(objective: Objective, example: Batch) -> tuple[int, int]:
    """FLOPs of forward and backward, and bytes kept between them."""
    weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        objective(example)
    # The CPU's fused attention is not in the counter's table; the plain products are.
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        objective(example)["loss"].backward()
    return counter.get_total_flops(), sum(kept.values())


def _size(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())
