"""The manifest of a bundle that is made from another one: more items, engines, or graphs in another precision."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any

import msgspec

from unipinrec import __version__
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.integrity import MANIFEST, MANIFEST_HASH, fingerprint, seal
from unipinrec.runtime.bundle.manifest import Manifest


def seal_derived(folder: Path, parent: Bundle, *, dropped: Container[str] = (), **changes: Any) -> Manifest:
    """Complete and seal a bundle that is made from another.

    Args:
        folder: Holds the files that are new or differ. The parent's other files are copied there. In the parent's own
            folder, the bundle keeps its date and its ancestors.
        parent: The bundle to start from.
        dropped: Files of the parent to leave out.
        changes: Fields of the manifest that differ from the parent's.

    Returns:
        The new manifest, which lists all files.
    """
    files = {path.name: fingerprint(path) for path in folder.iterdir() if path.name not in (MANIFEST, MANIFEST_HASH)}
    for name in parent.manifest.files.keys() - files.keys():
        if name not in dropped:
            shutil.copyfile(parent.files[name], folder / name)
            files[name] = parent.manifest.files[name]
    manifest = msgspec.structs.replace(parent.manifest, files=dict(sorted(files.items())), **changes)
    if folder != parent.path:
        manifest = msgspec.structs.replace(
            manifest,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            tools=manifest.tools | {"unipinrec": __version__},
            parent=parent.hash,
            kv_namespace=parent.kv_namespace,
            kv_rows=parent.kv_rows,
        )
    seal(folder, manifest)
    return manifest
