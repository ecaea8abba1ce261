"""A trained model as a folder: everything that export needs, and no pickled files.

config.json             format version, architecture, vocabulary
model.safetensors       weights (best by validation)
metrics.json            metrics and settings of the run
catalogue.json          external item ids, titles and metadata, in row order
catalogue.safetensors   raw item features, in row order
state.safetensors       state to resume from (latest weights, optimizer, position); not needed to export
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

from unipinrec.errors import MALFORMED, CheckpointError, ConfigError
from unipinrec.models.config import ModelConfig, Vocabulary
from unipinrec.models.data.item_features import ItemFeatures
from unipinrec.models.model import UniPinRec

FORMAT_VERSION = 1
T = TypeVar("T")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of `config.json`."""

    format_version: int
    model: ModelConfig
    vocabulary: Vocabulary


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    """The one field of `config.json` that every format version has."""

    format_version: int


class ItemList(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The content of `catalogue.json`: one entry per catalogue row; titles are for display and may be null.

    `metadata` holds columns that the model does not see, numbers or text, null = missing.
    """

    item_ids: list[str]
    titles: list[str | None]
    metadata: dict[str, list[float | str | None]] = {}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint: the model in eval mode, and its catalogue with raw features."""

    model: UniPinRec
    catalogue: ItemList
    features: ItemFeatures


def write_catalogue(folder: Path, catalogue: ItemList, features: ItemFeatures) -> None:
    """Write the two catalogue files."""
    write_atomically(folder / "catalogue.json", msgspec.json.encode(catalogue))
    arrays = {"dense": torch.from_numpy(features.dense), "categories": torch.from_numpy(features.categories)}
    write_tensors(folder / "catalogue.safetensors", arrays)


def write_model(folder: Path, model: UniPinRec) -> None:
    """Write `config.json` and `model.safetensors`, each atomically."""
    config = Config(format_version=FORMAT_VERSION, model=model.config, vocabulary=model.vocabulary)
    write_atomically(folder / "config.json", msgspec.json.format(msgspec.json.encode(config)))
    write_tensors(folder / "model.safetensors", dict(model.state_dict()))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; see `write_atomically`."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _replace(path, lambda partial: save_file(contiguous, partial, metadata=metadata))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        CheckpointError: The file could not be written (disk full, no permission); the old content is untouched.
    """
    _replace(path, lambda partial: partial.write_bytes(content))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.chmod(0o644)  # safetensors writes files for the owner alone; another account may serve them
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}: {error}; the old file is untouched") from error


def read_json(path: Path, kind: type[T]) -> T:
    """Read one of the checkpoint's JSON files.

    Raises:
        CheckpointError: The file is missing or malformed.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, ConfigError, *MALFORMED) as error:
        raise CheckpointError(f"{path}: {error}; pass a folder that `unipinrec train` wrote") from error


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load a checkpoint folder on the CPU.

    Raises:
        CheckpointError: A file is missing, damaged, of another format version, or does not fit the others.
    """
    version = read_json(folder / "config.json", _Header).format_version
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: checkpoint format {version}, this version reads {FORMAT_VERSION}; "
            "use the version that wrote it or train again"
        )
    config = read_json(folder / "config.json", Config)
    model = UniPinRec(config.model, config.vocabulary)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
        arrays = load_arrays(folder / "catalogue.safetensors")
        features = ItemFeatures(dense=arrays["dense"], categories=arrays["categories"])
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder}: weights or catalogue do not load: {error}") from error
    catalogue = read_json(folder / "catalogue.json", ItemList)
    _check(folder, config.vocabulary, catalogue, features)
    return Checkpoint(model=model.eval(), catalogue=catalogue, features=features)


def _check(folder: Path, vocabulary: Vocabulary, catalogue: ItemList, features: ItemFeatures) -> None:
    items, dense, words = vocabulary.num_items, vocabulary.dense_width, len(vocabulary.categories)
    expected = {"item_ids": (items,), "titles": (items,), "dense": (items, dense), "categories": (items, words)}
    shapes = {
        "item_ids": (len(catalogue.item_ids),),
        "titles": (len(catalogue.titles),),
        "dense": features.dense.shape,
        "categories": features.categories.shape,
    }
    if shapes != expected:
        raise CheckpointError(
            f"{folder}: the catalogue has the shapes {shapes}, config.json expects {expected}; the folder mixes two "
            "runs, train again"
        )
    if not np.isfinite(features.dense).all():
        raise CheckpointError(f"{folder}: catalogue.safetensors holds non-finite item features; train again")
    largest = [len(known) for known in vocabulary.categories.values()]
    if ((features.categories < 0) | (features.categories > largest)).any():
        raise CheckpointError(
            f"{folder}: a category code of catalogue.safetensors stands for no word; the folder mixes two runs"
        )
