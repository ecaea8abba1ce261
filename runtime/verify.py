"""Check a bundle: its files, its outputs on this machine, and its recommendations against those at export."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from unipinrec.errors import BundleError
from unipinrec.runtime.agreement import MARGIN
from unipinrec.runtime.bundle.bundle import read_manifest
from unipinrec.runtime.bundle.hub import local_folder
from unipinrec.runtime.bundle.integrity import file_problems
from unipinrec.runtime.bundle.manifest import Agreement
from unipinrec.runtime.bundle.quality import CacheAgreement, KvDtype, SampleQuality
from unipinrec.runtime.device import DeviceRules, require_device
from unipinrec.runtime.golden_check import TOLERANCE, GoldenCheck, check_outputs
from unipinrec.runtime.graphs.backend import Device
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.sample import MIN_OVERLAP, cache_agreement, sample_quality

SAMPLE_TOLERANCE = 0.02  # share of the users: rounding decides between items of almost equal score


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """One file of a bundle; `problem` is None if it matches the manifest."""

    file: str
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class SampleCheck:
    """Hits of the bundle's sample users at export and here; `problem` is None if they agree."""

    exported: SampleQuality
    here: SampleQuality
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class CacheCheck:
    """Agreement of lists with and without a cache of a type, at export and here; `problem` is None if it suffices."""

    dtype: KvDtype
    exported: CacheAgreement
    here: CacheAgreement
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """All checks of a bundle.

    `golden` checks a device that computes in fp32, `agreement` a device that rounds; the other is empty or None. If
    damage keeps the graphs from running, both are, and `device` and `retrieval` are None. `retrieval` says what
    finds the candidates here, index or scan, and why. `sample` is None if the bundle has no users, `cache` if the
    bundle states no type of the cache, or the device rounds more than a cache does.
    """

    bundle: str
    hash: str | None
    device: Device | None
    retrieval: str | None
    tolerance: float
    files: tuple[FileCheck, ...]
    golden: tuple[GoldenCheck, ...]
    agreement: Agreement | None
    sample: SampleCheck | None
    cache: CacheCheck | None
    ok: bool


def verify_bundle(path: Path | str, device: str = "auto", **rules: Unpack[DeviceRules]) -> VerifyReport:
    """Check every file of a bundle and compare the golden requests' outputs; damage is reported, not raised.

    Args:
        path: The bundle's folder, or `hf://org/name[@revision]`.
        device: As in `Recommender.load`.
        **rules: See `DeviceRules`.

    Raises:
        BackendError: The device does not run the graphs, and no other device may be used.
        BundleError: The bundle cannot be downloaded.
    """
    require_device(device)
    folder = local_folder(path)
    files, digest = _check_files(folder)
    golden: tuple[GoldenCheck, ...] = ()
    agreement = running = retrieval = sample = cache = None
    if not any(check.problem for check in files):
        try:
            with Recommender.load(folder, device, verify=False, **rules) as recommender:
                running, retrieval = recommender.device, recommender.retriever.way
                golden, agreement = check_outputs(recommender.engine, recommender.bundle)
                sample, cache = _check_sample(recommender), _check_cache(recommender)
        except BundleError as error:
            files = (*files, FileCheck(file="contents", problem=str(error)))
    checks = [check for check in (*files, *golden, agreement, sample, cache) if check]
    return VerifyReport(
        bundle=str(folder),
        hash=digest,
        device=running,
        retrieval=retrieval,
        tolerance=TOLERANCE,
        files=files,
        golden=golden,
        agreement=agreement,
        sample=sample,
        cache=cache,
        ok=bool(golden or agreement) and not any(check.problem for check in checks),
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
            f"{here.served} of {here.users} sample users get their last item here, {here.retrieved} by retrieval "
            f"alone; at export {exported.served} and {exported.retrieved} of {exported.users} did; a difference of "
            f"{allowed} is allowed"
        )
    return SampleCheck(exported=exported, here=here, problem=problem)


def _check_cache(recommender: Recommender) -> CacheCheck | None:
    spec = recommender.bundle.manifest.cache
    if spec is None or recommender.device.precision != "fp32":
        return None
    here, least, problem = cache_agreement(recommender, spec.dtype), 1.0 - MARGIN * (1.0 - MIN_OVERLAP), None
    if not here.overlap >= least:
        problem = (
            f"with a cache in {spec.dtype}, {here.overlap:.4f} of the ten best items are those without a cache; at "
            f"least {least:.4f} is needed"
        )
    return CacheCheck(dtype=spec.dtype, exported=spec.agreement, here=here, problem=problem)


def _check_files(folder: Path) -> tuple[tuple[FileCheck, ...], str | None]:
    try:
        manifest, digest = read_manifest(folder)
    except BundleError as error:
        return (FileCheck(file="manifest.json", problem=str(error)),), None
    problems = file_problems(folder, manifest.files)
    names = ("manifest.json", *manifest.files)
    return tuple(FileCheck(file=name, problem=problems.get(name)) for name in names), digest
