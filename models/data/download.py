"""Fetches a public data set from its owner's published address, verifies it and unpacks it.

The owners publish the checksums: GroupLens next to each file, KuaiRand in its README and its Zenodo record. The SHA-256
of the MovieLens files are of archives with the published MD5. Only a verified archive is unpacked, and a folder under
its final name is always complete.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import stat
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from unipinrec.errors import DataError

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60

Report = Callable[[int, int | None], None]


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A published `.zip` or `.tar.gz`.

    Attributes:
        name: Short name, also of the cache folder.
        url: The owner's address.
        digests: Hexadecimal digest by hashlib name; all must match.
        licence: The terms, printed before the download.
    """

    name: str
    url: str
    digests: dict[str, str]
    licence: str


_MOVIELENS_TERMS = (
    "MovieLens data, GroupLens Research, University of Minnesota. Research use only: no redistribution and "
    "no commercial use without permission, no claim of endorsement; publications cite Harper and Konstan, "
    "The MovieLens Datasets, ACM TiiS 5(4) 2015, doi 10.1145/2827872. Full terms: "
)

KUAIRAND_PURE = Archive(
    name="kuairand-pure",
    url="https://zenodo.org/records/10439422/files/KuaiRand-Pure.tar.gz",
    digests={"md5": "0820331067a3784d9691136f772b35a7"},
    licence=(
        "KuaiRand-Pure, licence CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/): share and "
        "adapt with attribution, under the same licence, with a note of the changes. Cite Gao et al., KuaiRand, "
        "CIKM 2022, doi 10.1145/3511808.3557624."
    ),
)
ML_100K = Archive(
    name="ml-100k",
    url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
    digests={
        "md5": "0e33842e24a9c977be4e0107933c0723",
        "sha256": "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    },
    licence=_MOVIELENS_TERMS + "https://files.grouplens.org/datasets/movielens/ml-100k-README.txt",
)
ML_1M = Archive(
    name="ml-1m",
    url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
    digests={
        "md5": "c4d9eecfca2ab87c1945afe126590906",
        "sha256": "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    },
    licence=_MOVIELENS_TERMS + "https://files.grouplens.org/datasets/movielens/ml-1m-README.txt",
)


def download(archive: Archive, folder: Path, on_progress: Report) -> Path:
    """Fetch, verify and unpack an archive, unless the folder is there.

    Args:
        archive: The archive to fetch.
        folder: The folder of the unpacked files; it appears only when it is complete.
        on_progress: Called with the bytes received so far and the announced total, if there is one.

    Returns:
        The folder.

    Raises:
        DataError: No connection, a truncated transfer, a digest that differs, an unsafe or damaged archive,
            or a full disk. Nothing is left behind.
    """
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            packed, unpacked = Path(scratch, "archive"), Path(scratch, "unpacked")
            _fetch(archive, packed, on_progress)
            _verify(archive, packed)
            _unpack(packed, unpacked)
            unpacked.rename(folder)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"could not fetch {archive.url}: {error}; fetch and unpack it by hand, and give its folder instead"
        ) from error
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{archive.url} could not be unpacked: {reason}; nothing was left behind") from error
    return folder


def _fetch(archive: Archive, target: Path, on_progress: Report) -> None:
    if not archive.url.startswith(("https://", "http://")):
        raise DataError(f"{archive.url}: only http(s) addresses are fetched")
    answer = urllib.request.urlopen(archive.url, timeout=TIMEOUT_S)  # noqa: S310 - the scheme is checked above
    with answer, target.open("wb") as file:
        announced = answer.headers.get("Content-Length")
        total = int(announced) if announced and announced.isdecimal() else None
        received = 0
        while chunk := answer.read(CHUNK_BYTES):
            file.write(chunk)
            received += len(chunk)
            on_progress(received, total)
    if total is not None and received != total:
        raise DataError(f"{archive.url}: received {received} of {total} bytes; try again")


def _verify(archive: Archive, packed: Path) -> None:
    for algorithm, expected in archive.digests.items():
        with packed.open("rb") as file:
            digest = functools.partial(hashlib.new, algorithm, usedforsecurity=False)
            actual = hashlib.file_digest(file, digest).hexdigest()
        if actual != expected:
            raise DataError(
                f"{archive.url}: {algorithm} is {actual}, published is {expected}; the transfer was damaged "
                "or the file was replaced, and it was not unpacked"
            )


def _unpack(packed: Path, folder: Path) -> None:
    """Unpack a zip or tar; members outside the folder are rejected before a file is written."""
    if zipfile.is_zipfile(packed):
        with zipfile.ZipFile(packed) as bundle:
            for member in bundle.infolist():
                _refuse(member.filename, special=stat.S_ISLNK(member.external_attr >> 16))
            bundle.extractall(folder)  # noqa: S202 - the members are checked above
    else:
        with tarfile.open(packed) as tar:
            for entry in tar.getmembers():
                _refuse(entry.name, special=not (entry.isfile() or entry.isdir()))
            tar.extractall(folder, filter="data")


def _refuse(name: str, *, special: bool) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if special or path.is_absolute() or ".." in path.parts:
        raise DataError(f"archive member {name!r} is a link, a device or outside the folder; nothing was unpacked")
