"""Proof that a bundle is whole and computes here what PyTorch computed when it was exported."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError, BundleError
from unipinrec.runtime.agreement import measure_agreement
from unipinrec.runtime.bundle import GOLDEN, Bundle, read_manifest
from unipinrec.runtime.bundle_files import file_problems
from unipinrec.runtime.device import Device, DeviceRules, require_device
from unipinrec.runtime.engine import Engine, pad_histories
from unipinrec.runtime.golden import read_golden
from unipinrec.runtime.index import HnswIndex
from unipinrec.runtime.manifest import Agreement
from unipinrec.runtime.session import Tensor

TOLERANCE = 1e-4
log = logging.getLogger(__name__)
Outputs = dict[str, NDArray[Any]]


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
    """All checks of a bundle.

    `golden` judges a device that computes in fp32, `agreement` one that rounds; the other is empty or None. Both are,
    and `device` is None, where damage kept the graphs from running.
    """

    bundle: str
    hash: str | None
    device: Device | None
    tolerance: float
    files: tuple[FileCheck, ...]
    golden: tuple[GoldenCheck, ...]
    agreement: Agreement | None
    ok: bool


def verify_bundle(path: Path | str, device: str = "auto", **rules: Unpack[DeviceRules]) -> VerifyReport:
    """Check every file of a bundle and compare the golden requests' outputs; damage is reported, not raised.

    Args:
        path: The bundle's folder.
        device: As in `Recommender.load`.
        **rules: See `DeviceRules`.

    Raises:
        BackendError: The device is not available and nothing else may be used, or a graph does not run on it.
    """
    require_device(device)
    folder = Path(path)
    files, digest = _check_files(folder)
    golden: tuple[GoldenCheck, ...] = ()
    agreement = running = None
    if not any(check.problem for check in files):
        try:
            bundle = Bundle.open(folder)
            HnswIndex.open(bundle)
            with closing(Engine.open(bundle, device, **rules)) as engine:
                running = engine.device
                if running.precision == "fp32":
                    golden = compare_golden(engine, bundle)
                else:
                    agreement = measure_agreement(engine, bundle)
        except BundleError as error:
            files = (*files, FileCheck(file="contents", problem=str(error)))
    judged = golden if agreement is None else (agreement,)
    return VerifyReport(
        bundle=str(folder),
        hash=digest,
        device=running,
        tolerance=TOLERANCE,
        files=files,
        golden=golden,
        agreement=agreement,
        ok=bool(judged) and not any(check.problem for check in (*files, *judged)),
    )


def require_golden(engine: Engine, bundle: Bundle) -> None:
    """Refuse to serve unless the golden requests' outputs reproduce, or nearly so where the device rounds.

    Raises:
        BundleError: They do not.
        BackendError: A graph does not run.
    """
    try:
        _require_golden(engine, bundle)
    except BackendError as error:
        if engine.device.name == "cpu":
            raise
        raise BackendError(f"{bundle.path} does not run on {engine.device.name}: {error}; use device cpu") from error


def _require_golden(engine: Engine, bundle: Bundle) -> None:
    device = engine.device
    kind = device.name.partition("-")[0]
    if device.precision != "fp32":
        agreement = measure_agreement(engine, bundle)
        log.info("%s on %s agrees with fp32: %s", bundle.path, device.name, agreement)
        if agreement.problem:
            raise BundleError(
                f"{bundle.path}: {device.name} does not recommend what fp32 recommends: {agreement.problem}; "
                f"use device {'tensorrt-fp32' if kind == 'tensorrt' else kind} or cpu"
            )
        return
    wrong = [check for check in compare_golden(engine, bundle) if check.problem]
    if wrong:
        raise BundleError(
            f"{bundle.path}: {len(wrong)} golden outputs do not reproduce on {device.name} of this machine, first "
            f"{wrong[0].output}: {wrong[0].problem}; it would serve wrong scores: "
            f"{'export it again' if kind == 'cpu' else 'use device cpu'}, or see `unipinrec verify`"
        )


def compare_golden(engine: Engine, bundle: Bundle) -> tuple[GoldenCheck, ...]:
    """Run the golden requests through all graphs and compare every output at its valid positions.

    Raises:
        BundleError: The golden requests themselves cannot be read.
        BackendError: A graph does not run.
    """
    golden, manifest = read_golden(bundle), bundle.manifest
    histories, prefixes, expected = golden.histories, golden.prefixes, golden.outputs
    names = manifest.model.kv_names("present")
    encoded = engine.encode(pad_histories(histories))
    lengths = encoded.lengths
    before = engine.encode(pad_histories([h.part(0, int(m)) for h, m in zip(histories, prefixes, strict=True)]))
    after = pad_histories([h.part(int(m)) for h, m in zip(histories, prefixes, strict=True)])
    added, last = engine.encode_new(before, after)
    outcomes = np.array([[name in manifest.positive_actions for name in manifest.actions]] * len(histories), np.float32)
    slots = lengths + manifest.model.kv_prefix_slots
    return (
        *_compare_kv(expected, "encoder", dict(zip(names, encoded.key_values, strict=True)), slots),
        _compare(expected, "encoder.last_hidden_state", encoded.last_hidden_state.numpy()),
        *_compare_kv(expected, "extend", dict(zip(names, added, strict=True)), after.lengths),
        _compare(expected, "extend.last_hidden_state", last.numpy()),
        _compare(expected, "retrieval.queries", engine.retrieve(encoded, outcomes)),
        _compare(expected, "ranker.logits", engine.rank(encoded, golden.candidates, golden.surfaces, golden.now_ms)),
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


def _compare_kv(
    outputs: Outputs, graph: str, given: dict[str, Tensor], valid: NDArray[np.int64]
) -> tuple[GoldenCheck, ...]:
    """Compare keys/values [B, H_kv, slots, D], of which `valid` [B] slots count."""
    return tuple(_compare(outputs, f"{graph}.{name}", tensor.numpy(), valid) for name, tensor in given.items())


def _compare(outputs: Outputs, output: str, given: NDArray[Any], valid: NDArray[np.int64] | None = None) -> GoldenCheck:
    expected = outputs.get(output)
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
