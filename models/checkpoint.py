"""A trained model as a folder: everything needed to export it, and nothing that has to be unpickled.

config.json             format version, architecture, vocabulary
model.safetensors       weights (best by validation)
metrics.json            metrics and settings of the run
catalogue.json          external item ids and titles, in row order
catalogue.safetensors   raw item features, in row order
state.safetensors, state.json   what resuming needs (latest weights, optimizer); absent in a finished copy
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from unipinrec.errors import CheckpointError
from unipinrec.models.config import ModelConfig, Vocabulary
from unipinrec.models.model import UniPinRec
from unipinrec.models.sequences import ItemFeatures

FORMAT_VERSION = 1
T = TypeVar("T")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `config.json` holds."""

    format_version: int
    model: ModelConfig
    vocabulary: Vocabulary


class Catalogue(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `catalogue.json` holds: one entry per catalogue row; titles are for people and may be null."""

    item_ids: list[str]
    titles: list[str | None]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint: the model in eval mode, and its catalogue with raw features."""

    model: UniPinRec
    catalogue: Catalogue
    features: ItemFeatures


def write_catalogue(folder: Path, catalogue: Catalogue, features: ItemFeatures) -> None:
    """Write the two catalogue files."""
    write_atomically(folder / "catalogue.json", msgspec.json.encode(catalogue))
    partial = folder / ".catalogue.safetensors.partial"
    save_arrays({"dense": features.dense, "categories": features.categories}, partial)
    partial.replace(folder / "catalogue.safetensors")


def write_model(folder: Path, model: UniPinRec) -> None:
    """Write `config.json` and `model.safetensors`, each atomically."""
    config = Config(format_version=FORMAT_VERSION, model=model.config, vocabulary=model.vocabulary)
    write_atomically(folder / "config.json", msgspec.json.format(msgspec.json.encode(config)))
    write_tensors(folder / "model.safetensors", dict(model.state_dict()))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically."""
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def read_json(path: Path, kind: type[T]) -> T:
    """Read one of the checkpoint's JSON files.

    Raises:
        CheckpointError: It is missing or not what it should be.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path}: {error}; a checkpoint folder is what `unipinrec train` writes") from error


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load a checkpoint folder on the CPU.

    Raises:
        CheckpointError: A file is missing, damaged, of another format version, or does not fit the others.
    """
    config = read_json(folder / "config.json", Config)
    if config.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: checkpoint format {config.format_version}, this version reads {FORMAT_VERSION}; "
            "use the version that wrote it or train again"
        )
    model = UniPinRec(config.model, config.vocabulary)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
        arrays = load_arrays(folder / "catalogue.safetensors")
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: weights or catalogue do not load: {error}") from error
    catalogue = read_json(folder / "catalogue.json", Catalogue)
    features = ItemFeatures(dense=arrays["dense"], categories=arrays["categories"])
    _check(folder, config.vocabulary, catalogue, features)
    return Checkpoint(model=model.eval(), catalogue=catalogue, features=features)


def _check(folder: Path, vocabulary: Vocabulary, catalogue: Catalogue, features: ItemFeatures) -> None:
    counts: dict[str, Any] = {
        "config.json": vocabulary.num_items,
        "catalogue.json": len(catalogue.item_ids),
        "dense features": len(features.dense),
        "categories": len(features.categories),
    }
    if len(set(counts.values())) != 1:
        raise CheckpointError(
            f"{folder}: the number of items differs between files: {counts}; the folder mixes two runs"
        )
    if not np.isfinite(features.dense).all():
        raise CheckpointError(f"{folder}: catalogue.safetensors holds non-finite item features; train again")
