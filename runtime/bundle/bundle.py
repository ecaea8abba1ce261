"""Open a bundle: check all its files, and read everything except the graphs.

Every file that the manifest lists is checked before it is read; other files are never read.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from unipinrec.errors import (
    MALFORMED,
    BundleCorruptError,
    BundleError,
    BundleVersionError,
    DataError,
    RequestError,
    decoding,
)
from unipinrec.runtime.bundle.catalogue import NO_ROWS, Catalogue, mask_without
from unipinrec.runtime.bundle.hub import local_folder
from unipinrec.runtime.bundle.integrity import MANIFEST, MANIFEST_HASH
from unipinrec.runtime.bundle.manifest import FORMAT_VERSION, Manifest, Similarity
from unipinrec.runtime.bundle.metadata import ItemMetadata, Value
from unipinrec.runtime.bundle.sealed import REMEDY, GraphFile, SealedFile, SealedFiles
from unipinrec.runtime.bundle.stored import check_users, map_tensor, tensor_offsets
from unipinrec.runtime.requests import Event, History

T = TypeVar("T", bound=Sized)

ITEMS, ITEM_IDS, ITEM_TITLES, RETIRED = "items.safetensors", "item_ids.json", "item_titles.json", "retired.json"
ITEM_METADATA = "item_metadata.json"
INDEX, GOLDEN, WEIGHTS = "index.hnsw", "golden.safetensors", "weights.bin"
POPULAR, SHARE = "popular.safetensors", "share"
USERS, USER_IDS = "users.safetensors", "user_ids.json"
REQUIRED_FILES = (ITEMS, ITEM_IDS, GOLDEN, WEIGHTS)
READ_WHILE_SERVING = (ITEMS, GOLDEN, USERS, USER_IDS)
ITEM_VECTORS, CATEGORIES = "item_vectors", "categories"
CHECK_ROWS = 65_536
UNIT_TOLERANCE = 1e-3
REQUIRED: dict[Similarity, str] = {"cosine": "of unit length", "dot": "of finite length"}


class _Format(msgspec.Struct):
    format_version: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """An opened, unaltered bundle.

    Attributes:
        path: Its folder; later changes of the folder have no effect.
        files: Its files as they were when it was opened; a `Recommender` that opens a bundle releases most of them.
        hash: sha256 of its manifest, which covers every file; it identifies the bundle.
        manifest: Its manifest.
        item_vectors: [N, E] f32, mapped from sealed memory; of unit length if the similarity is "cosine".
        item_ids: External ids in row order.
        titles: Titles in row order, for display; None for an item without one.
        catalogue: Item ids, filters and metadata.
        popularity: [S, N] f32, estimated probability that a positive event on a surface is of an item; row 0 is for all
            surfaces together. None if the bundle stores no popularity.
    """

    path: Path
    files: SealedFiles
    hash: str
    manifest: Manifest
    item_vectors: NDArray[np.float32]
    item_ids: tuple[str, ...]
    titles: tuple[str | None, ...]
    catalogue: Catalogue
    popularity: NDArray[np.float32] | None

    @classmethod
    def open(cls, path: Path | str, shared: Path | None = None) -> Bundle:
        """Read all files of a bundle into memory and check their sha256 there.

        Args:
            path: Its folder, or `hf://org/name[@revision]`; see `local_folder`.
            shared: See `SealedFiles`.

        Raises:
            BundleCorruptError: A file is missing, truncated or altered.
            BackendError: The memory does not suffice.
            BundleVersionError: The bundle's format is newer than this version reads.
            BundleError: The bundle contradicts itself, or cannot be downloaded.
        """
        folder = local_folder(path)
        manifest, digest = read_manifest(folder)
        files = SealedFiles(folder, manifest.files, shared)
        count = manifest.num_items
        item_ids = _read_list(files[ITEM_IDS], tuple[str, ...], count)
        titles: tuple[str | None, ...] = (None,) * count
        if ITEM_TITLES in manifest.files:
            titles = _read_list(files[ITEM_TITLES], tuple[str | None, ...], count)
        return cls(
            path=folder,
            files=files,
            hash=digest,
            manifest=manifest,
            item_vectors=_item_vectors(files[ITEMS], manifest),
            item_ids=item_ids,
            titles=titles,
            catalogue=_catalogue(files, manifest, item_ids),
            popularity=_popularity(files, manifest),
        )

    @property
    def rows(self) -> Mapping[str, int]:
        """Catalogue row of each external id."""
        return self.catalogue.rows

    @property
    def kv_namespace(self) -> str:
        """Bundles of one namespace compute the same keys and values for a history with the same `kv_item_keys`."""
        namespace = self.manifest.kv_namespace
        return self.hash if namespace is None or self.manifest.kv_rows is None else namespace

    @property
    def kv_rows(self) -> int:
        """Number of rows that all bundles of this `kv_namespace` share."""
        return self.manifest.num_items if self.manifest.kv_rows is None else self.manifest.kv_rows

    @cached_property
    def kv_item_keys(self) -> NDArray[np.int64]:
        """Keys that identify the item of each row in the cache, [N].

        The key of a row that all updates share is the row. The key of a row that an update added is a hash of the
        item's vector: keys and values depend on nothing else of the item.
        """
        keys = np.arange(self.manifest.num_items)
        for row in range(self.kv_rows, len(keys)):
            digest = hashlib.blake2b(self.item_vectors[row].tobytes(), digest_size=8).digest()
            keys[row] = -1 - (int.from_bytes(digest) >> 1)  # negative: differs from every row
        return keys

    def graph_files(self, precision: str = "fp32") -> dict[str, GraphFile]:
        """The graphs that a request needs, by name, in a precision of this bundle."""
        return {name: self.files.graph(graph.file) for name, graph in self.manifest.graphs_in(precision).items()}

    def golden(self) -> dict[str, NDArray[Any]]:
        """The golden requests with all of PyTorch's outputs for them."""
        return _read_tensors(self.files[GOLDEN])

    def user_events(self, user: str) -> tuple[Event, ...]:
        """The history of one of the bundle's sample users.

        Raises:
            RequestError: The bundle has no such user.
            BundleError: The sample users cannot be read.
        """
        users = self._user_ids()
        if user not in users:
            raise RequestError(
                f"user {user!r} is not among the {len(users)} sample users of this bundle, such as "
                f"{', '.join(users[:3]) or 'none'}; pass the user's events instead (--history EVENTS.json)"
            )
        return self.events_of(self.sample_histories(len(users))[users.index(user)])

    def events_of(self, history: History) -> tuple[Event, ...]:
        """A history in the form that a client sends."""
        manifest = self.manifest
        columns = (history.item_rows, history.actions, history.surfaces, history.timestamps_ms)
        return tuple(
            Event(
                item=self.item_ids[row],
                actions=tuple(itertools.compress(manifest.actions, actions)),
                surface=manifest.surfaces[surface],
                timestamp_ms=None if time_ms == manifest.missing_timestamp_ms else int(time_ms),
            )
            for row, actions, surface, time_ms in zip(*columns, strict=True)
        )

    def sample_users(self, limit: int) -> list[tuple[str, int]]:
        """The first sample users, if the bundle has any, each with its number of events."""
        return list(zip(self._user_ids(), map(len, self.sample_histories(limit)), strict=False))

    def sample_histories(self, limit: int) -> list[History]:
        """The histories of the first sample users, if the bundle has any."""
        users = self._user_ids()
        if not users:
            return []
        tensors = _read_tensors(self.files[USERS])
        check_users(self.path / USERS, tensors, self.manifest, len(users))
        offsets = tensors["offsets"][: limit + 1].tolist()
        columns = {name: tensors[name] for name in ("item_rows", "surfaces", "timestamps_ms")}
        events = History(actions=tensors["actions"].astype(np.float32), **columns)
        return [events.part(*window) for window in itertools.pairwise(offsets)]

    def _user_ids(self) -> tuple[str, ...]:
        stored = {USERS, USER_IDS} <= self.manifest.files.keys()
        users = _read_list(self.files[USER_IDS], tuple[str, ...]) if stored else ()
        if len(set(users)) != len(users):
            raise BundleError(f"{self.path / USER_IDS}: user ids occur twice; export the bundle again")
        return users


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Read a bundle's manifest and its sha256.

    Raises:
        BundleCorruptError: The manifest is missing or altered.
        BundleVersionError: Its format is newer than this version reads.
        BundleError: It does not describe a bundle.
    """
    path = folder / MANIFEST
    try:
        for file in (path, folder / MANIFEST_HASH):
            if file.exists() and not file.is_file():
                raise OSError(f"{file.name} is not a regular file")
        content = path.read_bytes()
        expected = (folder / MANIFEST_HASH).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BundleCorruptError(f"{folder} is not a bundle ({error}); `unipinrec export` writes one") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected:
        raise BundleCorruptError(f"{path} is altered: sha256 {digest}, manifest.sha256 says {expected!r}; {REMEDY}")
    return _decode_manifest(path, content), digest


def _decode_manifest(path: Path, content: bytes) -> Manifest:
    with decoding(BundleError, path, "export the bundle again"):
        # Before strict decoding: a newer format may have fields that this version does not know.
        version = msgspec.json.decode(content, type=_Format).format_version
        if not 1 <= version <= FORMAT_VERSION:
            raise BundleVersionError(
                f"{path.parent}: bundle format {version}, this version reads 1 to {FORMAT_VERSION}; "
                "use the unipinrec that wrote it, or export the checkpoint again with this one"
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    problem = _contradiction(manifest)
    if problem:
        raise BundleError(f"{path}: {problem}; export the bundle again")
    return manifest


def _contradiction(manifest: Manifest) -> str | None:
    """How the manifest contradicts itself, if it does."""
    for name in manifest.files:
        if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
            return f"lists the file {name!r}; use a plain name inside the bundle's folder"
    absent = sorted(set(manifest.model.graphs) - set(manifest.graphs))
    if absent:
        return f"lacks the graphs {', '.join(absent)}"
    needed = {*REQUIRED_FILES, *(graph.file for graph in manifest.graphs.values())}
    needed |= {graph.file for spec in manifest.precisions.values() for graph in spec.graphs.values()}
    needed |= {f"weights_{precision}.bin" for precision in manifest.precisions}
    needed |= {engine.file for engine in manifest.engines}
    needed |= {RETIRED} if manifest.num_retired else set()
    needed |= {INDEX} if manifest.index else set()
    unlisted = sorted(needed - set(manifest.files))
    if unlisted:
        return f"does not list {', '.join(unlisted)}"
    if manifest.model.cache == "prefix" and manifest.model.num_layers < 1:
        return f"has num_layers={manifest.model.num_layers}, which leaves nothing to cache"
    if not set(manifest.positive_actions) <= set(manifest.actions):
        return f"positive_actions {list(manifest.positive_actions)} are not all among {list(manifest.actions)}"
    return _index_contradiction(manifest)


def _index_contradiction(manifest: Manifest) -> str | None:
    index, count, retired = manifest.index, manifest.num_items, manifest.num_retired
    if not 0 <= retired < count:
        return f"{retired} of {count} items are retired"
    if index is None:
        return None
    if not 0 < index.ef_search < 1 << 31:
        return f"ef_search={index.ef_search} of the index is not from 1 to {(1 << 31) - 1}"
    expected = ("ip", manifest.model.item_dim, count)
    # Retired items are marked in an index that was grown, and absent from one that was built anew.
    if (index.space, index.dim) != expected[:2] or not count - retired <= index.count <= count:
        return (
            f"the index does not match the items: it has (space, dim, count) = "
            f"{(index.space, index.dim, index.count)}, the items need {expected}"
        )
    return None


def _catalogue(files: SealedFiles, manifest: Manifest, item_ids: Sequence[str]) -> Catalogue:
    count, retired = manifest.num_items, NO_ROWS
    if manifest.num_retired:
        listed = _read_list(files[RETIRED], tuple[int, ...])
        distinct = len(set(listed)) == len(listed) == manifest.num_retired
        if not distinct or not 0 <= min(listed) <= max(listed) < count:
            raise BundleError(f"{files[RETIRED]}: not {manifest.num_retired} distinct rows; export the bundle again")
        retired = np.array(listed, np.int64)
    rows = dict(zip(item_ids, range(count), strict=True))  # the last row of an id that occurs again
    if len(rows) != count:
        live = np.flatnonzero(mask_without(count, retired)).tolist()
        twice = sum(rows[item_ids[row]] != row for row in live)
        if twice:
            raise BundleError(f"{files[ITEM_IDS]}: {twice} item ids occur twice; export the bundle again")
    return Catalogue(
        rows=rows,
        num_rows=count,
        retired=retired,
        words=manifest.categories,
        codes=_category_codes(files[ITEMS], count, manifest.categories),
        metadata=_metadata(files[ITEM_METADATA], count) if ITEM_METADATA in manifest.files else None,
    )


def _metadata(file: SealedFile, count: int) -> ItemMetadata:
    try:
        return ItemMetadata.of(_read_list(file, dict[str, list[Value]]), count)
    except DataError as error:
        raise BundleError(f"{file}: {error}; export the bundle again") from error


def _read_list(file: SealedFile, kind: type[T], count: int | None = None) -> T:
    try:
        values = msgspec.json.decode(file.read_bytes(), type=kind)
    except (OSError, *MALFORMED) as error:
        raise BundleError(f"{file}: {error}; {REMEDY}") from error
    if count is not None and len(values) != count:
        raise BundleError(f"{file}: {len(values)} entries for {count} items; export the bundle again")
    return values


def _read_tensors(file: SealedFile) -> dict[str, NDArray[Any]]:
    try:
        return load_file(os.fspath(file))
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{file}: {error}; {REMEDY}") from error


def _item_vectors(file: SealedFile, manifest: Manifest) -> NDArray[np.float32]:
    """Map the item table [N, E] f32 and check it."""
    count, model = manifest.num_items, manifest.model
    vectors: NDArray[np.float32] = map_tensor(file, ITEM_VECTORS, "F32", (count, model.item_dim))
    for start in range(0, count, CHECK_ROWS):
        wrong = wrong_rows(vectors[start : start + CHECK_ROWS], model.similarity)
        if len(wrong):
            row = start + wrong[0]
            raise BundleError(
                f"{file}: the vector of item row {row} is not {REQUIRED[model.similarity]}; export the bundle again"
            )
    return vectors


def wrong_rows(vectors: NDArray[np.float32], similarity: Similarity) -> NDArray[np.int64]:
    """Rows of vectors [N, E] that are not finite, or not of unit length as the cosine needs them."""
    lengths = np.sqrt(np.einsum("ne,ne->n", vectors, vectors))
    return np.flatnonzero(~(np.isfinite(lengths) if similarity == "dot" else np.abs(lengths - 1.0) <= UNIT_TOLERANCE))


def _popularity(files: SealedFiles, manifest: Manifest) -> NDArray[np.float32] | None:
    """Map the shares [surfaces, items] f32 and check them; None if the bundle stores none."""
    if POPULAR not in manifest.files:
        return None
    file = files[POPULAR]
    shares: NDArray[np.float32] = map_tensor(file, SHARE, "F32", (len(manifest.surfaces), manifest.num_items))
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise BundleError(f"{file}: {SHARE} is not finite and more than 0 everywhere; export the bundle again")
    return shares


def _category_codes(file: SealedFile, count: int, words: Mapping[str, Sequence[str]]) -> NDArray[np.int32] | None:
    """Map the category codes [count, features] i32 and check them; None if the file lacks them."""
    if not words or CATEGORIES not in tensor_offsets(file):
        return None
    codes: NDArray[np.int32] = map_tensor(file, CATEGORIES, "I32", (count, len(words)))
    if (codes < 0).any() or (codes > [len(known) for known in words.values()]).any():
        raise BundleError(f"{file}: a category code stands for no word; export the bundle again")
    return codes
