"""Bundles of the Hugging Face Hub: `hf://org/name[@revision]`. Its client is imported where a reference needs it.

A branch or tag is resolved to a commit first, and that commit is downloaded. Only files that the manifest names are
downloaded, and no engines. The client caches them (HF_HOME); `Bundle.open` checks them like those of any folder.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from unipinrec.errors import BundleError, decoding, listed
from unipinrec.runtime.bundle.integrity import MANIFEST, MANIFEST_HASH

SCHEME = "hf:/"  # as a Path, hf:// loses a slash
REFERENCE = re.compile(r"hf://?([\w.-]+/[\w.-]+)(?:@(\w[\w.-]*(?:/\w[\w.-]*)*))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
log = logging.getLogger(__name__)


class _Listed(msgspec.Struct):
    """The part of a manifest that any version has."""

    files: dict[str, Any]


@dataclass(frozen=True)
class HubReference:
    """A repository, and a branch, a tag or a commit of it."""

    repo: str
    revision: str

    @classmethod
    def parse(cls, text: str) -> HubReference:
        """Read `hf://org/name[@revision]`; without a revision it is `main`.

        Raises:
            BundleError: The text has another form.
        """
        match = REFERENCE.fullmatch(text)
        if match is None:
            raise BundleError(f"{text[:200]!r} is not hf://org/name or hf://org/name@revision")
        return cls(match[1], match[2] or "main")

    def __str__(self) -> str:
        return f"hf://{self.repo}@{self.revision}"


def is_engine(name: str) -> bool:
    """Whether a bundle's file belongs to TensorRT engines, which are executable code."""
    return name.endswith(".plan") or name == "engines.json"


def local_folder(path: Path | str) -> Path:
    """The folder of a bundle: the path itself, or a downloaded commit if the path is `hf://org/name[@revision]`.

    A full commit that was downloaded before needs no network.

    Raises:
        BundleError: The reference, repository or revision does not exist or may not be read, the download failed, or
            the client is not installed.
    """
    if not str(path).startswith(SCHEME):
        return Path(path)
    reference = HubReference.parse(str(path))
    with hub_client(reference) as client:
        commit = reference.revision
        if COMMIT.fullmatch(commit) is None:
            commit = client.HfApi().model_info(reference.repo, revision=commit).sha
        log.info("%s is commit %s", reference, commit)

        def download(names: list[str]) -> Path:
            patterns = [glob.escape(name) for name in names]
            return Path(client.snapshot_download(reference.repo, revision=commit, allow_patterns=patterns))

        return download(_listed(download([MANIFEST]) / MANIFEST, reference))


def _listed(manifest: Path, reference: HubReference) -> list[str]:
    """The files of a bundle."""
    if not manifest.is_file():
        raise BundleError(f"{reference} holds no bundle: it has no {MANIFEST}; `unipinrec push` uploads one")
    with decoding(BundleError, manifest, "push the bundle again"):
        names = list(msgspec.json.decode(manifest.read_bytes(), type=_Listed).files)
    engines = [name for name in names if is_engine(name)]
    if engines:
        raise BundleError(
            f"{reference} lists the engines {listed(engines, 3)}, which are never downloaded; "
            "push the bundle with `unipinrec push`, which leaves them out"
        )
    return [*names, MANIFEST, MANIFEST_HASH]


@contextmanager
def hub_client(reference: HubReference) -> Iterator[Any]:
    """The package `huggingface_hub`; turns its errors into ours.

    Raises:
        BundleError: It is not installed, or an error of it.
    """
    try:
        import huggingface_hub as client  # noqa: PLC0415 - an extra
        from huggingface_hub import errors  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise BundleError(f"{reference} needs {error.name}; run pip install 'unipinrec[hub]'") from error
    failures: Any = (*errors.HfHubHTTPError.__bases__, ValueError, RuntimeError)  # HTTPError of its version, OSError
    try:
        yield client
    except errors.RevisionNotFoundError as error:
        raise BundleError(f"{reference}: the repository has no revision {reference.revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise BundleError(
            f"{reference}: there is no such repository, or it is private; check the name, and set HF_TOKEN to a token "
            "that may use it"
        ) from error
    except failures as error:
        cause = " ".join(str(error.__cause__ or error).split())[:500]
        raise BundleError(
            f"{reference}: {type(error).__name__}: {cause}; check the network and HF_ENDPOINT; a full commit that "
            "was downloaded before needs no network"
        ) from error
