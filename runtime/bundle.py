"""A bundle on disk: proof that it is whole, and what of it is not a graph.

Every file that the manifest lists is checked before it is read; a file that it does not list is never read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from unipinrec.errors import BundleCorruptError, BundleError, BundleVersionError, RequestError
from unipinrec.runtime.manifest import FORMAT_VERSION, REQUIRED_GRAPHS, FileSpec, Manifest
from unipinrec.runtime.requests import Event

T = TypeVar("T", bound=Sized)

ITEMS, ITEM_IDS, ITEM_TITLES = "items.safetensors", "item_ids.json", "item_titles.json"
INDEX, GOLDEN = "index.hnsw", "golden.safetensors"
USERS, USER_IDS = "users.safetensors", "user_ids.json"
REQUIRED_FILES = (ITEMS, ITEM_IDS, INDEX, GOLDEN)
REMEDY = "copy the bundle again, or export it again"
CHECK_ROWS = 65_536
UNIT_TOLERANCE = 1e-3


class _Format(msgspec.Struct):
    format_version: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """An opened, unaltered bundle.

    Attributes:
        path: Its folder.
        hash: sha256 of its manifest, which covers every file: the bundle's identity.
        manifest: What it declares.
        item_vectors: [N, E] f32, mapped from disk, read-only; unit length.
        item_ids: External ids in row order.
        titles: Titles in row order, for people; None where there is none.
        rows: Catalogue row of each external id.
    """

    path: Path
    hash: str
    manifest: Manifest
    item_vectors: NDArray[np.float32]
    item_ids: tuple[str, ...]
    titles: tuple[str | None, ...]
    rows: Mapping[str, int]

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Open a bundle, checking the sha256 of all its files.

        Raises:
            BundleCorruptError: A file is missing, truncated or altered.
            BundleVersionError: The bundle's format is newer than this version reads.
            BundleError: The bundle contradicts itself.
        """
        folder = Path(path)
        manifest, digest = read_manifest(folder)
        problems = file_problems(folder, manifest.files)
        if problems:
            listed = "; ".join(f"{name} {problem}" for name, problem in problems.items())
            raise BundleCorruptError(f"{folder}: {listed}; {REMEDY}")
        count = manifest.num_items
        item_ids = _read_list(folder / ITEM_IDS, tuple[str, ...], count)
        titles: tuple[str | None, ...] = (None,) * count
        if ITEM_TITLES in manifest.files:
            titles = _read_list(folder / ITEM_TITLES, tuple[str | None, ...], count)
        rows = {item: row for row, item in enumerate(item_ids)}
        if len(rows) != count:
            raise BundleError(f"{folder / ITEM_IDS}: {count - len(rows)} item ids occur twice; export the bundle again")
        return cls(
            path=folder,
            hash=digest,
            manifest=manifest,
            item_vectors=_item_vectors(folder / ITEMS, count, manifest.model.item_dim),
            item_ids=item_ids,
            titles=titles,
            rows=rows,
        )

    def graph_files(self) -> dict[str, Path]:
        """The graphs that answering a request takes, by name."""
        return {name: self.path / self.manifest.graphs[name].file for name in REQUIRED_GRAPHS}

    def golden(self) -> dict[str, NDArray[Any]]:
        """The golden requests with every output that PyTorch gave for them."""
        return _read_tensors(self.path / GOLDEN)

    def user_events(self, user: str) -> tuple[Event, ...]:
        """The history of one of the sample users that the bundle carries.

        Raises:
            RequestError: The bundle carries no such user.
        """
        users = self._user_ids()
        if user not in users:
            raise RequestError(
                f"user {user!r} is not among the {len(users)} sample users of this bundle; "
                "pass the user's events instead (--history EVENTS.json)"
            )
        tensors = _read_tensors(self.path / USERS)
        place = users.index(user)
        window = slice(*tensors["offsets"][place : place + 2].tolist())
        columns = (tensors[name][window] for name in ("item_rows", "actions", "surfaces", "timestamps_ms"))
        return tuple(self._event(*values) for values in zip(*columns, strict=True))

    def _user_ids(self) -> tuple[str, ...]:
        carried = USERS in self.manifest.files and USER_IDS in self.manifest.files
        return _read_list(self.path / USER_IDS, tuple[str, ...]) if carried else ()

    def _event(self, row: int, actions: NDArray[np.uint8], surface: int, timestamp_ms: int) -> Event:
        names = zip(self.manifest.actions, actions, strict=True)
        return Event(
            item=self.item_ids[row],
            actions=tuple(name for name, taken in names if taken),
            surface=self.manifest.surfaces[surface],
            timestamp_ms=None if timestamp_ms == self.manifest.missing_timestamp_ms else int(timestamp_ms),
        )


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Read a bundle's manifest and its sha256.

    Raises:
        BundleCorruptError: It is missing or altered.
        BundleVersionError: Its format is newer than this version reads.
        BundleError: It does not describe a bundle.
    """
    path = folder / "manifest.json"
    try:
        content = path.read_bytes()
        expected = (folder / "manifest.sha256").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BundleCorruptError(f"{folder} is not a bundle ({error}); `unipinrec export` writes one") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected:
        raise BundleCorruptError(
            f"{path} is altered: its sha256 is {digest}, manifest.sha256 says {expected!r}; {REMEDY}"
        )
    return _decode_manifest(path, content), digest


def _decode_manifest(path: Path, content: bytes) -> Manifest:
    try:
        # Before the strict decoding: a newer format may have fields that this version does not know.
        version = msgspec.json.decode(content, type=_Format).format_version
        if version != FORMAT_VERSION:
            raise BundleVersionError(
                f"{path.parent}: bundle format {version}, this version reads {FORMAT_VERSION}; "
                "use the unipinrec that wrote it, or export the checkpoint again with this one"
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except msgspec.DecodeError as error:
        raise BundleError(f"{path}: {error}; export the bundle again") from error
    problem = _contradiction(manifest)
    if problem:
        raise BundleError(f"{path}: {problem}; export the bundle again")
    return manifest


def _contradiction(manifest: Manifest) -> str | None:
    """What the manifest says that cannot be, if anything."""
    for name in manifest.files:
        if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
            return f"lists the file {name!r}; a file of a bundle has a plain name inside its folder"
    absent = sorted(set(REQUIRED_GRAPHS) - set(manifest.graphs))
    if absent:
        return f"lacks the graphs {', '.join(absent)}"
    needed = {*REQUIRED_FILES, *(graph.file for graph in manifest.graphs.values())}
    unlisted = sorted(needed - set(manifest.files))
    if unlisted:
        return f"does not list {', '.join(unlisted)}"
    if not set(manifest.positive_actions) <= set(manifest.actions):
        return f"positive_actions {list(manifest.positive_actions)} are not all among {list(manifest.actions)}"
    index, want = manifest.index, ("ip", manifest.model.item_dim, manifest.num_items)
    if (index.space, index.dim, index.count) != want:
        return (
            f"the index does not match the items: it has (space, dim, count) = "
            f"{(index.space, index.dim, index.count)}, the items need {want}"
        )
    return None


def file_problems(folder: Path, files: Mapping[str, FileSpec]) -> dict[str, str]:
    """What is wrong with each damaged file: missing, truncated or altered. Raises nothing."""
    found = {name: _file_problem(folder / name, spec) for name, spec in files.items()}
    return {name: problem for name, problem in found.items() if problem}


def _file_problem(path: Path, spec: FileSpec) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != spec.size_bytes:
            return f"is truncated or altered: {size} bytes, expected {spec.size_bytes}"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read: {error}"
    return None if digest == spec.sha256 else f"is altered: its sha256 is {digest}, expected {spec.sha256}"


def _read_list(path: Path, kind: type[T], count: int | None = None) -> T:
    try:
        values = msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise BundleError(f"{path}: {error}; {REMEDY}") from error
    if count is not None and len(values) != count:
        raise BundleError(f"{path}: {len(values)} entries for {count} items; export the bundle again")
    return values


def _read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: {error}; {REMEDY}") from error


def _item_vectors(path: Path, count: int, dim: int) -> NDArray[np.float32]:
    """Map the item table [count, dim] f32 from disk and check it."""
    vectors = _map_tensor(path, "item_vectors", (count, dim))
    for start in range(0, count, CHECK_ROWS):
        chunk = vectors[start : start + CHECK_ROWS]
        wrong = ~(np.abs(np.sqrt(np.einsum("ne,ne->n", chunk, chunk)) - 1.0) <= UNIT_TOLERANCE)
        if wrong.any():
            raise BundleError(
                f"{path}: the vector of item row {start + int(wrong.argmax())} is not finite or not of unit length; "
                "export the bundle again"
            )
    return vectors


def _map_tensor(path: Path, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Map one f32 tensor of a safetensors file; the library itself only copies."""
    try:
        with safe_open(path, framework="numpy") as file:
            view = file.get_slice(name)
            given = (view.get_dtype(), tuple(view.get_shape()))
        with path.open("rb") as raw:
            header_bytes = int.from_bytes(raw.read(8), "little")
            header = msgspec.json.decode(raw.read(header_bytes))
    except (OSError, SafetensorError, msgspec.DecodeError) as error:
        raise BundleError(f"{path}: {error}; {REMEDY}") from error
    if given != ("F32", shape):
        raise BundleError(f"{path}: {name} is {given}, expected {('F32', shape)}; export the bundle again")
    begin = 8 + header_bytes + header[name]["data_offsets"][0]
    return np.asarray(np.memmap(path, dtype="<f4", mode="r", offset=begin, shape=shape))
