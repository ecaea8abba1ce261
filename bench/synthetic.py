"""A `small` model with random weights, its bundle, and requests of any length, for the benchmarks."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import torch

from unipinrec.export.bundle_writer import export_bundle
from unipinrec.export.protocol import ExportSource
from unipinrec.export.servable import source_from_model
from unipinrec.models.checkpoint import ItemList
from unipinrec.models.config import SMALL, AttentionForm, ModelConfig, Vocabulary
from unipinrec.models.data.item_features import ItemFeatures
from unipinrec.models.model import UniPinRec
from unipinrec.runtime import Event, RecommendOptions, Request

ACTIONS = ("click", "save", "share", "hide")
NOW_MS = 1_750_000_000_000


def random_model(form: AttentionForm, items: int, size: ModelConfig = SMALL) -> UniPinRec:
    """A model with random weights."""
    config = msgspec.structs.replace(size, attention=form)
    vocabulary = Vocabulary(
        num_items=items, actions=ACTIONS, positive_actions=("save",), surfaces=("unknown",), dense={}, categories={}
    )
    torch.manual_seed(0)
    return UniPinRec(config, vocabulary)


def random_source(form: AttentionForm, items: int, size: ModelConfig = SMALL) -> ExportSource:
    """Such a model over a random catalogue."""
    catalogue = ItemList(item_ids=[str(i) for i in range(items)], titles=[None] * items)
    nothing = ItemFeatures(dense=np.zeros((items, 0), np.float32), categories=np.zeros((items, 0), np.int64))
    return source_from_model(random_model(form, items, size), catalogue, nothing)


def random_bundle(folder: Path, items: int, size: ModelConfig = SMALL) -> Path:
    """Export such a model, unless the folder holds a bundle already."""
    if not folder.exists():
        export_bundle(random_source("sink", items, size), folder)
    return folder


def random_events(events: int, items: int, seed: int) -> tuple[Event, ...]:
    """A history of random items, oldest first."""
    rng = np.random.default_rng(seed)
    times = NOW_MS - np.sort(rng.integers(1, 10**9, events))[::-1]
    acted = rng.random((events, len(ACTIONS))) < 0.3
    rows = rng.integers(0, items, events).tolist()
    return tuple(
        Event(
            item=str(row),
            actions=tuple(action for action, bit in zip(ACTIONS, bits, strict=True) if bit),
            timestamp_ms=int(time_ms),
        )
        for row, bits, time_ms in zip(rows, acted, times, strict=True)
    )


def request(events: tuple[Event, ...], candidates: int, user: str | None = None) -> Request:
    """Request twenty items from `candidates` candidates."""
    return Request(history=events, k=20, options=RecommendOptions(now_ms=NOW_MS, candidates=candidates), user=user)
