"""The source that export reads from a checkpoint folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from unipinrec.errors import DataError
from unipinrec.export.lists.served_order import served_order
from unipinrec.export.protocol import ExportSource
from unipinrec.export.servable import source_from_model
from unipinrec.models.checkpoint import load_checkpoint, read_json
from unipinrec.models.config import Vocabulary
from unipinrec.models.data.schema import Dataset, read_dataset
from unipinrec.models.data.sequences import sequences_of
from unipinrec.models.training.config import RunConfig
from unipinrec.models.training.sheet import TrainingFacts, training_facts


class _Epoch(msgspec.Struct):
    best: bool
    metrics: dict[str, Any]


class _Run(msgspec.Struct):
    """The fields of `metrics.json` that export reads; earlier versions wrote no facts."""

    epochs: list[_Epoch]
    config: RunConfig | None = None
    facts: TrainingFacts | None = None


def source_from_checkpoint(folder: Path, data: Path | None = None) -> ExportSource:
    """Make an export source of a checkpoint folder.

    Args:
        folder: Written by `train`.
        data: The prepared data that the checkpoint was trained on. Checkpoints of earlier versions lack the facts that
            choose the order of slates; they are then counted on this data.

    Raises:
        CheckpointError: The folder is no usable checkpoint.
        DataError: `data` is no prepared data set, or has other actions than the checkpoint.
    """
    checkpoint = load_checkpoint(folder)
    source = source_from_model(checkpoint.model, checkpoint.catalogue, checkpoint.features)
    if not (folder / "metrics.json").exists():
        return source
    run = read_json(folder / "metrics.json", _Run)
    best = [epoch.metrics for epoch in run.epochs if epoch.best]
    source = replace(source, metrics={"split": "valid", **best[-1]} if best else None)
    facts = run.facts
    if facts is None and data is not None and run.config is not None:
        facts = _facts_of(read_dataset(data), run.config, checkpoint.model.vocabulary, data)
    if facts is None or run.config is None:
        return source
    return replace(source, order=served_order(checkpoint.model, run.config.train, facts))


def _facts_of(dataset: Dataset, config: RunConfig, vocabulary: Vocabulary, folder: Path) -> TrainingFacts:
    actions = dataset.spec.actions
    if actions != vocabulary.actions:
        then, now = list(vocabulary.actions), list(actions)
        raise DataError(f"{folder} is not the data of the checkpoint: actions were {then}, are {now}")
    return training_facts(
        sequences_of(dataset), dataset.spec.positive, actions, fit_validation=config.train.fit_validation
    )
