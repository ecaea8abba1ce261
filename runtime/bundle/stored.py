"""Arrays that a bundle stores: mapped, and checked before use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from unipinrec.errors import MALFORMED, BackendError, BundleError
from unipinrec.runtime.bundle.manifest import Manifest, TensorSpec, check_inputs
from unipinrec.runtime.bundle.sealed import REMEDY, SealedFile
from unipinrec.runtime.requests import YEAR_10000_MS

Arrays = Mapping[str, NDArray[Any]]
DTYPES = {"F32": "<f4", "I32": "<i4"}
Bounds = Mapping[str, tuple[int, int]]
Shapes = dict[str, tuple[str, tuple[int | str, ...]]]


def map_tensor(file: SealedFile, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Map one tensor of a safetensors file; the library itself can only copy it.

    Raises:
        BundleError: The file lacks the tensor, or it has another type or shape.
    """
    offsets = tensor_offsets(file)
    if name not in offsets:
        raise BundleError(f"{file}: does not contain tensor {name}; export the bundle again")
    *stored, begin = offsets[name]
    if stored != [dtype, shape]:
        raise BundleError(f"{file}: {name} is {tuple(stored)}, expected {(dtype, shape)}; export the bundle again")
    return np.asarray(np.memmap(os.fspath(file), dtype=DTYPES[dtype], mode="r", offset=begin, shape=shape))


def tensor_offsets(file: SealedFile) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Type, shape and offset in the file of every tensor; the library checks that they are consistent.

    Raises:
        BundleError: It is not a safetensors file.
    """
    try:
        with safe_open(os.fspath(file), framework="numpy") as tensors:
            names = list(tensors.keys())
        with Path(file).open("rb") as raw:
            header_bytes = int.from_bytes(raw.read(8), "little")
            header = msgspec.json.decode(raw.read(header_bytes))
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise BundleError(f"{file}: {error}; {REMEDY}") from error
    return {
        name: (header[name]["dtype"], tuple(header[name]["shape"]), 8 + header_bytes + header[name]["data_offsets"][0])
        for name in names
    }


def check_users(path: Path, arrays: Arrays, manifest: Manifest, users: int) -> None:
    """Check the events of sample users.

    Raises:
        BundleError: An array is missing, has the wrong type or shape, or a value that does not fit the bundle.
    """
    shapes: Shapes = {
        "item_rows": ("int64", ("events",)),
        "actions": ("uint8", ("events", len(manifest.actions))),
        "surfaces": ("int64", ("events",)),
        "timestamps_ms": ("int64", ("events",)),
        "offsets": ("int64", (users + 1,)),
    }
    _check(path, arrays, shapes, {**_event_bounds(manifest), "actions": (0, 1)})
    offsets = arrays["offsets"]
    if offsets[0] != 0 or offsets[-1] != len(arrays["item_rows"]) or (np.diff(offsets) < 0).any():
        raise BundleError(f"{path}: offsets do not divide the events among {users} users; export the bundle again")


def check_golden(path: Path, arrays: Arrays, manifest: Manifest) -> None:
    """Check the inputs of golden requests; `compare_golden` checks their outputs.

    Raises:
        BundleError: See `check_users`.
    """
    history = ("batch", "history")
    shapes: Shapes = {
        "history.item_rows": ("int64", history),
        "history.actions": ("float32", (*history, len(manifest.actions))),
        "history.surfaces": ("int64", history),
        "history.timestamps_ms": ("int64", history),
        "history.lengths": ("int64", ("batch",)),
        "prefix_lengths": ("int64", ("batch",)),
        "candidates.rows": ("int64", ("batch", "candidates")),
        "candidates.surfaces": ("int64", ("batch",)),
        "candidates.timestamps_ms": ("int64", ("batch",)),
    }
    events = _event_bounds(manifest)
    rows = arrays.get("history.item_rows", np.zeros(0))
    longest = min(manifest.model.max_history, rows.shape[-1])
    bounds = {
        **{f"history.{name}": bound for name, bound in events.items()},
        "history.lengths": (1, longest),
        "prefix_lengths": (0, longest),
        "candidates.rows": events["item_rows"],
        "candidates.surfaces": events["surfaces"],
        "candidates.timestamps_ms": events["timestamps_ms"],
    }
    _check(path, arrays, shapes, bounds)


def _event_bounds(manifest: Manifest) -> dict[str, tuple[int, int]]:
    return {
        "item_rows": (0, manifest.num_items - 1),
        "surfaces": (0, len(manifest.surfaces) - 1),
        "timestamps_ms": (min(0, manifest.missing_timestamp_ms), YEAR_10000_MS - 1),
    }


def _check(path: Path, arrays: Arrays, shapes: Shapes, bounds: Bounds) -> None:
    specs = [TensorSpec(name=name, dtype=dtype, shape=shape) for name, (dtype, shape) in shapes.items()]
    missing = sorted(set(shapes) - set(arrays))
    if missing:
        raise BundleError(f"{path}: {', '.join(missing)} is missing; export the bundle again")
    try:
        check_inputs(path.name, specs, {name: arrays[name] for name in shapes})
    except BackendError as error:
        raise BundleError(f"{path}: {error}; export the bundle again") from error
    for name, (least, most) in bounds.items():
        if not least <= arrays[name].min() <= arrays[name].max() <= most:
            raise BundleError(f"{path}: a value of {name} is not from {least} to {most}; export the bundle again")
