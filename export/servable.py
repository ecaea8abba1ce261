"""Our own model under the export contract. Needs no prepared data, and so no polars."""

from __future__ import annotations

import msgspec
from torch import Tensor, nn

from unipinrec.export.protocol import Candidates, Events, ExportSource, KeyValues, Past
from unipinrec.models.checkpoint import ItemList
from unipinrec.models.config import Vocabulary
from unipinrec.models.data.item_features import ItemFeatures
from unipinrec.models.model import CandidateTokens, HistoryTokens, UniPinRec
from unipinrec.runtime.bundle.manifest import ModelSpec


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
        metadata=catalogue.metadata,
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
