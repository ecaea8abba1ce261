"""Proof that a bundle is whole and computes here what PyTorch computed when it was exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BundleError
from unipinrec.runtime.bundle import GOLDEN, INDEX, Bundle, file_problems, read_manifest
from unipinrec.runtime.device import Device, resolve_device
from unipinrec.runtime.engine import Engine, pad_histories
from unipinrec.runtime.index import HnswIndex
from unipinrec.runtime.requests import History
from unipinrec.runtime.session import Tensor

TOLERANCE = 1e-4
Golden = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """One file of a bundle; `problem` is None where it is what the manifest says."""

    file: str
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class GoldenCheck:
    """One output compared with PyTorch's at its valid positions; `max_abs_diff` is None where that is impossible."""

    output: str
    max_abs_diff: float | None
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """All checks of a bundle. `golden` is empty where damage kept the graphs from running."""

    bundle: str
    hash: str | None
    device: Device
    tolerance: float
    files: tuple[FileCheck, ...]
    golden: tuple[GoldenCheck, ...]
    ok: bool


def verify_bundle(path: Path | str, device: str = "auto") -> VerifyReport:
    """Check every file of a bundle and compare the golden requests' outputs; damage is reported, not raised.

    Raises:
        BackendError: The device is not available, or a graph does not run on it.
    """
    folder, running = Path(path), resolve_device(device)
    files, digest = _check_files(folder)
    golden: tuple[GoldenCheck, ...] = ()
    if not any(check.problem for check in files):
        try:
            bundle = Bundle.open(folder)
            HnswIndex(folder / INDEX, bundle.manifest.index, bundle.item_vectors)
            golden = compare_golden(Engine.open(bundle), bundle)
        except BundleError as error:
            files = (*files, FileCheck(file="contents", problem=str(error)))
    return VerifyReport(
        bundle=str(folder),
        hash=digest,
        device=running,
        tolerance=TOLERANCE,
        files=files,
        golden=golden,
        ok=bool(golden) and not any([check.problem for check in files] + [check.problem for check in golden]),
    )


def require_golden(engine: Engine, bundle: Bundle) -> None:
    """Refuse a bundle whose golden outputs do not reproduce here.

    Raises:
        BundleError: At least one does not.
    """
    wrong = [check for check in compare_golden(engine, bundle) if check.problem]
    if wrong:
        raise BundleError(
            f"{bundle.path}: {len(wrong)} golden outputs do not reproduce on this machine, first {wrong[0].output}: "
            f"{wrong[0].problem}; it would serve wrong scores: export it again, or see `unipinrec verify`"
        )


def compare_golden(engine: Engine, bundle: Bundle) -> tuple[GoldenCheck, ...]:
    """Run the golden requests through all graphs and compare every output at its valid positions.

    Raises:
        BundleError: The golden requests themselves cannot be read.
        BackendError: A graph does not run.
    """
    golden, manifest = bundle.golden(), bundle.manifest
    try:
        histories = _histories(golden)
        prefixes = golden["prefix_lengths"]
        candidates = tuple(golden[f"candidates.{name}"] for name in ("rows", "surfaces", "timestamps_ms"))
    except KeyError as error:
        raise BundleError(f"{bundle.path / GOLDEN}: {error} is missing; export the bundle again") from error
    names = manifest.model.kv_names("present")
    encoded = engine.encode(pad_histories(histories))
    lengths = encoded.lengths
    before = engine.encode(pad_histories([h.part(0, int(m)) for h, m in zip(histories, prefixes, strict=True)]))
    after = pad_histories([h.part(int(m)) for h, m in zip(histories, prefixes, strict=True)])
    added, last = engine.encode_new(before, after)
    outcomes = np.array([[name in manifest.positive_actions for name in manifest.actions]] * len(histories), np.float32)
    slots = lengths + manifest.model.kv_prefix_slots
    return (
        *_compare_kv(golden, "encoder", dict(zip(names, encoded.key_values, strict=True)), slots),
        _compare(golden, "encoder.last_hidden_state", encoded.last_hidden_state.numpy()),
        *_compare_kv(golden, "extend", dict(zip(names, added, strict=True)), after.lengths),
        _compare(golden, "extend.last_hidden_state", last.numpy()),
        _compare(golden, "retrieval.queries", engine.retrieve(encoded, outcomes)),
        _compare(golden, "ranker.logits", engine.rank(encoded, *candidates)),
    )


def _check_files(folder: Path) -> tuple[tuple[FileCheck, ...], str | None]:
    try:
        manifest, digest = read_manifest(folder)
    except BundleError as error:
        return (FileCheck(file="manifest.json", problem=str(error)),), None
    problems = file_problems(folder, manifest.files)
    return tuple(
        FileCheck(file=name, problem=problems.get(name)) for name in ("manifest.json", *manifest.files)
    ), digest


def _histories(golden: Golden) -> list[History]:
    columns = [golden[f"history.{name}"] for name in ("item_rows", "actions", "surfaces", "timestamps_ms")]
    return [
        History(item_rows=rows, actions=actions, surfaces=surfaces, timestamps_ms=times).part(0, int(length))
        for rows, actions, surfaces, times, length in zip(*columns, golden["history.lengths"], strict=True)
    ]


def _compare_kv(
    golden: Golden, graph: str, given: dict[str, Tensor], valid: NDArray[np.int64]
) -> tuple[GoldenCheck, ...]:
    """Compare keys/values [B, H_kv, slots, D], of which `valid` [B] slots count."""
    return tuple(_compare(golden, f"{graph}.{name}", tensor.numpy(), valid) for name, tensor in given.items())


def _compare(golden: Golden, output: str, given: NDArray[Any], valid: NDArray[np.int64] | None = None) -> GoldenCheck:
    expected = golden.get(output)
    if expected is None:
        return GoldenCheck(output=output, max_abs_diff=None, problem=f"is missing in {GOLDEN}")
    if expected.shape != given.shape:
        return GoldenCheck(output=output, max_abs_diff=None, problem=f"is {given.shape}, expected {expected.shape}")
    difference = np.abs(given.astype(np.float64) - expected)
    if valid is not None:
        difference = np.concatenate([row[:, :count].ravel() for row, count in zip(difference, valid, strict=True)])
    largest = float(difference.max())
    problem = None if largest <= TOLERANCE else f"differs by up to {largest:.3g}, allowed are {TOLERANCE:g}"
    return GoldenCheck(output=output, problem=problem, max_abs_diff=largest)
