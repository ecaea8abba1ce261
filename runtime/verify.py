"""Proof that a bundle is whole, computes here what PyTorch computed, and recommends as it did at export."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from unipinrec.errors import BundleError
from unipinrec.runtime.agreement import measure_agreement
from unipinrec.runtime.bundle.bundle import read_manifest
from unipinrec.runtime.bundle.integrity import file_problems
from unipinrec.runtime.bundle.manifest import Agreement
from unipinrec.runtime.bundle.quality import SampleQuality
from unipinrec.runtime.device import DeviceRules, require_device
from unipinrec.runtime.golden_check import TOLERANCE, GoldenCheck, compare_golden
from unipinrec.runtime.graphs.backend import Device
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.sample import sample_quality

SAMPLE_TOLERANCE = 0.02  # of the users: where two items are all but level, rounding decides


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """One file of a bundle; `problem` is None where it is what the manifest says."""

    file: str
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class SampleCheck:
    """The lists of the bundle's sample users, at export and here; `problem` is None where they are as good."""

    exported: SampleQuality
    here: SampleQuality
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """All checks of a bundle.

    `golden` judges a device that computes in fp32, `agreement` one that rounds; the other is empty or None. Both are,
    and `device` is None, where damage kept the graphs from running. `sample` is None where the bundle carries no users.
    """

    bundle: str
    hash: str | None
    device: Device | None
    tolerance: float
    files: tuple[FileCheck, ...]
    golden: tuple[GoldenCheck, ...]
    agreement: Agreement | None
    sample: SampleCheck | None
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
    agreement = running = sample = None
    if not any(check.problem for check in files):
        try:
            with Recommender.load(folder, device, verify=False, **rules) as recommender:
                bundle, engine = recommender.bundle, recommender.engine
                running = engine.device
                if running.precision == "fp32":
                    golden = compare_golden(engine, bundle)
                else:
                    agreement = measure_agreement(engine, bundle)
                sample = _check_sample(recommender)
        except BundleError as error:
            files = (*files, FileCheck(file="contents", problem=str(error)))
    judged = golden if agreement is None else (agreement,)
    judged_too = () if sample is None else (sample,)
    return VerifyReport(
        bundle=str(folder),
        hash=digest,
        device=running,
        tolerance=TOLERANCE,
        files=files,
        golden=golden,
        agreement=agreement,
        sample=sample,
        ok=bool(judged) and not any(check.problem for check in (*files, *judged, *judged_too)),
    )


def _check_sample(recommender: Recommender) -> SampleCheck | None:
    exported = recommender.bundle.manifest.sample
    if exported is None:
        return None
    here = sample_quality(recommender)
    allowed = math.ceil(SAMPLE_TOLERANCE * exported.users)
    off = max(abs(here.served - exported.served), abs(here.retrieved - exported.retrieved))
    problem = None
    if here.users != exported.users or off > allowed:
        problem = (
            f"{here.served} of {here.users} sample users are served their last item here, {here.retrieved} by "
            f"retrieval alone; at export {exported.served} and {exported.retrieved} of {exported.users} were, and a "
            f"difference of {allowed} is allowed"
        )
    return SampleCheck(exported=exported, here=here, problem=problem)


def _check_files(folder: Path) -> tuple[tuple[FileCheck, ...], str | None]:
    try:
        manifest, digest = read_manifest(folder)
    except BundleError as error:
        return (FileCheck(file="manifest.json", problem=str(error)),), None
    problems = file_problems(folder, manifest.files)
    return tuple(
        FileCheck(file=name, problem=problems.get(name)) for name in ("manifest.json", *manifest.files)
    ), digest
