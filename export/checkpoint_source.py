"""Our own model under the export contract, and the source that export reads from a checkpoint folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor, nn

from unipinrec.errors import DataError
from unipinrec.export.lists.served_order import served_order
from unipinrec.export.protocol import Candidates, Events, ExportSource, KeyValues, Past
from unipinrec.models.checkpoint import ItemList, load_checkpoint, read_json
from unipinrec.models.config import Vocabulary
from unipinrec.models.data.item_features import ItemFeatures
from unipinrec.models.data.schema import Dataset, read_dataset
from unipinrec.models.data.sequences import sequences_of
from unipinrec.models.model import CandidateTokens, HistoryTokens, UniPinRec
from unipinrec.models.training.config import RunConfig
from unipinrec.models.training.sheet import TrainingFacts, training_facts
from unipinrec.runtime.bundle.manifest import ModelSpec


class _Epoch(msgspec.Struct):
    best: bool
    metrics: dict[str, Any]


class _Run(msgspec.Struct):
    """The fields of `metrics.json` that export reads; earlier versions wrote no facts."""

    epochs: list[_Epoch]
    config: RunConfig | None = None
    facts: TrainingFacts | None = None


class ServableUniPinRec(nn.Module):
    """`UniPinRec` with the method signatures of `ServableModel`."""

    def __init__(self, model: UniPinRec) -> None:
        super().__init__()
        self.model = model

    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        """See `ServableModel`."""
        return self.model.encode(_history(events))

    def extend(self, events: Events, past: Past) -> tuple[KeyValues, Tensor]:
        """See `ServableModel`."""
        return self.model.extend(_history(events), list(past.key_values), past.lengths, past.timestamps_ms)

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        """See `ServableModel`."""
        return self.model.retrieve(last_hidden_state, outcomes)

    def rank(self, past: Past, candidates: Candidates) -> Tensor:
        """See `ServableModel`."""
        shape = candidates.item_vectors.shape[:2]
        slate = CandidateTokens(
            vectors=candidates.item_vectors,
            surfaces=candidates.surfaces[:, None].expand(shape),
            timestamps_ms=candidates.timestamps_ms[:, None].expand(shape),
            cutoffs=past.lengths[:, None].expand(shape),
        )
        return self.model.rank(list(past.key_values), past.lengths, past.timestamps_ms, slate)

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        """See `ServableModel`."""
        return self.model.embed_items(rows, dense, categories)


def _history(events: Events) -> HistoryTokens:
    tensors = dict(vars(events))
    return HistoryTokens(vectors=tensors.pop("item_vectors"), **tensors)


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


def source_from_model(model: UniPinRec, catalogue: ItemList, features: ItemFeatures) -> ExportSource:
    """Make an export source of a model in memory. Puts the model in eval mode; its slates are ordered by value."""
    config, vocabulary = model.config, model.vocabulary
    return ExportSource(
        module=ServableUniPinRec(model).eval(),
        model=msgspec.convert(config, ModelSpec, from_attributes=True),
        actions=vocabulary.actions,
        positive_actions=vocabulary.positive_actions,
        surfaces=vocabulary.surfaces,
        dense=vocabulary.dense,
        categories=vocabulary.categories,
        item_ids=catalogue.item_ids,
        titles=_labels(catalogue, features, vocabulary),
        item_dense=features.dense,
        item_categories=features.categories,
        config={"architecture": "UniPinRec", **msgspec.to_builtins(config)},
    )


def _labels(catalogue: ItemList, features: ItemFeatures, vocabulary: Vocabulary) -> list[str | None]:
    """A readable name of each item: its title, else its known category words, else None."""
    words = list(vocabulary.categories.items())
    labels: list[str | None] = []
    for title, codes in zip(catalogue.titles, features.categories.tolist(), strict=True):
        known = [f"{name} {names[code - 1]}" for (name, names), code in zip(words, codes, strict=True) if code]
        labels.append(title or ", ".join(known) or None)
    return labels
