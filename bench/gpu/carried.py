"""Unpacks carried archives, whose pieces may arrive in several calls.

Pieces are copied to a folder of their own first, so that a later call need not bring them again. `payloads.py` writes
beside the pieces of an archive a list of them with their hashes, as `sha256sum` does. An archive waits until all of its
pieces are there.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import zipfile
from pathlib import Path

LIST = ".tar.xz.sha256"
MODELS = "models"


def sha256(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take(folder: Path | None, work: Path) -> dict[str, str]:
    """Unpack everything that is complete.

    Args:
        folder: Carried archives and wheels; None = none with this call.
        work: Gets `pieces/`, `sites/NAME/` for an archive of packages, and `models/` for the archive of that name.

    Returns:
        What became of each archive, by name.
    """
    pieces = work / "pieces"
    pieces.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()) if folder else ():
        if not (pieces / file.name).exists() or file.suffix == ".sha256":
            shutil.copy(file, pieces)
    found = {}
    for listed in sorted(pieces.glob(f"*{LIST}")):
        name = listed.name.removesuffix(LIST)
        found[name] = unpack(name, dict(line.split()[::-1] for line in listed.read_text().splitlines()), work)
    wheels = sorted(pieces.glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "sites" / "wheels")
    return {**found, **{wheel.name: "unpacked" for wheel in wheels}}


def unpack(name: str, hashes: dict[str, str], work: Path) -> str:
    """Unpack one archive once, given the hash of each piece; says what happened."""
    pieces = work / "pieces"
    done = pieces / f"{name}.unpacked"
    content = "\n".join(hashes.values())
    if done.exists() and done.read_text() == content:
        return "unpacked"
    missing = [piece for piece in hashes if not (pieces / piece).exists()]
    if missing:
        return f"waits for {', '.join(missing)}"
    damaged = [piece for piece, expected in hashes.items() if sha256(pieces / piece) != expected]
    for piece in damaged:
        (pieces / piece).unlink()  # another call may bring it whole
    if damaged:
        return f"{', '.join(damaged)} arrived damaged; carry it again"
    whole = pieces / f"{name}.whole"
    with whole.open("wb") as out:
        for piece in sorted(hashes):
            with (pieces / piece).open("rb") as part:
                shutil.copyfileobj(part, out, 1 << 22)
    into = work / MODELS if name == MODELS else work / "sites" / name
    with tarfile.open(whole, "r:xz") as archive:
        archive.extractall(into, filter="tar")
    whole.unlink()
    done.write_text(content)
    return "unpacked"
