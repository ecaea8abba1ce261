"""Fingerprints of a bundle's files, and writing a folder completely or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from unipinrec.errors import ExportError
from unipinrec.runtime.bundle.manifest import FileSpec, Manifest
from unipinrec.runtime.machine import available_threads

MANIFEST, MANIFEST_HASH = "manifest.json", "manifest.sha256"


def fingerprint(path: Path) -> FileSpec:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return FileSpec(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size_bytes=path.stat().st_size)


def largest_first(files: Mapping[str, FileSpec]) -> list[str]:
    """Names by falling size, so that threads finish them soonest."""
    return sorted(files, key=lambda name: -files[name].size_bytes)


def file_problems(folder: Path, files: Mapping[str, FileSpec]) -> dict[str, str]:
    """Problem of each damaged file: missing, truncated or altered. Raises nothing."""
    names = largest_first(files)
    with ThreadPoolExecutor(available_threads()) as pool:  # hashing releases Python's lock
        problems = dict(zip(names, pool.map(lambda name: file_problem(folder / name, files[name]), names), strict=True))
    return {name: problem for name in files if (problem := problems[name])}


def file_problem(file: os.PathLike[str], spec: FileSpec) -> str | None:
    """Problem of a file, if it has one. Raises nothing."""
    path = Path(file)
    try:
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != spec.size_bytes:
            return f"is truncated or altered: {size} bytes, expected {spec.size_bytes}"
        digest = fingerprint(path).sha256
    except OSError as error:
        return f"cannot be read: {error}"
    return None if digest == spec.sha256 else f"is altered: its sha256 is {digest}, expected {spec.sha256}"


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`: renamed to `out` if the block succeeds, removed if it fails.

    Raises:
        ExportError: `out` exists, or a file cannot be written, such as on a full disk. Nothing is left behind, unless
            the message says that `out` is in place.
    """
    if os.path.lexists(out):
        raise ExportError(f"{out} exists; a bundle is never overwritten, choose another name or remove it")
    partial: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        yield partial
        for path in partial.iterdir():
            path.chmod(0o644)
            _sync_path(path)
        _sync_path(partial)
        partial.chmod(0o755)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"could not write {out}: {_reason(error)}; nothing was left behind") from error
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
    try:
        _sync_path(out.parent)
    except OSError as error:
        raise ExportError(
            f"{out} is complete and in place, but a power cut may lose it: its folder could not be synced: {error}"
        ) from error


def seal(folder: Path, manifest: Manifest) -> str:
    """Write a manifest and its sha256; return the sha256."""
    content = msgspec.json.format(msgspec.json.encode(manifest))
    digest = hashlib.sha256(content).hexdigest()
    (folder / MANIFEST).write_bytes(content)
    (folder / MANIFEST_HASH).write_text(digest + "\n")
    return digest


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays of any memory order to a safetensors file; the library itself ignores the order."""
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def _reason(error: OSError | SafetensorError) -> str:
    full = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    # safetensors passes the system's error on only as text.
    if getattr(error, "errno", None) in full or any(f"(os error {code})" in str(error) for code in full):
        return "no space left on the disk"
    return str(error)


def _sync_path(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
