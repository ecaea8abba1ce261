"""Check the file of an hnswlib index before hnswlib loads it, as hnswlib checks none of its numbers.

Layout of version 0.8: a header; per item its links at level 0, its vector, its label; per item its links above level 0.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BundleError
from unipinrec.runtime.bundle.manifest import IndexSpec

# Level-0 offset, capacity, count, bytes per item, label offset, vector offset; top level, entry point; links per item
# above and at level 0, M; level multiplier; ef at construction.
HEADER = struct.Struct("<6QiI3QdQ")
CHUNK_ITEMS = 65_536
COUNT_BITS, DELETED_BIT = 0xFFFF, 1 << 16  # of the word before an item's links
Words = NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True)
class _Header:
    """Independent fields of the header; the others follow from them."""

    count: int
    words: int
    top_level: int
    entry: int
    m: int


def check_index_file(path: os.PathLike[str], spec: IndexSpec, item_vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Check that every part of a file is valid for an index of these items.

    Args:
        path: The file.
        spec: Its description.
        item_vectors: [N, E] f32; labels are rows of it.

    Returns:
        The rows that a search can find, unordered.

    Raises:
        BundleError: A part is not valid.
    """
    content = np.memmap(os.fspath(path), np.uint8, "r") if Path(path).stat().st_size else np.zeros(0, np.uint8)
    header = _header(path, content, spec, len(item_vectors))
    end = HEADER.size + 4 * header.words * header.count
    if len(content) < end or len(content) % 4:
        raise _broken(path, f"it has {len(content)} bytes, {header.count} items take more")
    items: Words = content[HEADER.size : end].view("<u4").reshape(header.count, header.words)
    levels = _check_upper_links(path, content[end:].view("<u4"), header)
    if header.count and not (header.entry < header.count and levels[header.entry] == header.top_level == levels.max()):
        raise _broken(path, "its search begins at an item that is not on the top level")
    parts = [
        _check_items(path, items[at : at + CHUNK_ITEMS], header, item_vectors)
        for at in range(0, header.count, CHUNK_ITEMS)
    ]
    labels, deleted = (np.concatenate(part) for part in zip(*parts, strict=True))
    if len(np.unique(labels)) != len(labels):
        raise _broken(path, "two of its items have the same label")
    rows: NDArray[np.int64] = labels[~deleted]
    return rows


def _header(path: os.PathLike[str], content: NDArray[np.uint8], spec: IndexSpec, rows: int) -> _Header:
    if len(content) < HEADER.size:
        raise BundleError(f"{path}: {len(content)} bytes are not an hnswlib index; export the bundle again")
    values = HEADER.unpack(content[: HEADER.size].tobytes())
    level0, capacity, count, item_bytes, label_at, vector_at, top_level, entry, above, at_0, m, scale, _ = values
    dims = ((label_at - vector_at) // 4, count)
    if dims != (spec.dim, spec.count):
        raise BundleError(
            f"{path}: the index does not match the items: it has (dim, count) = {dims}, "
            f"the items need {(spec.dim, spec.count)}; export the bundle again"
        )
    links = 4 + 8 * spec.m
    layout = (0, links, links + 4 * spec.dim, links + 4 * spec.dim + 8, spec.m, 2 * spec.m, spec.m)
    if (level0, vector_at, label_at, item_bytes, above, at_0, m) != layout:
        raise _broken(path, f"its layout is not that of {spec.dim} numbers and M={spec.m}")
    if not 0 < count <= capacity <= max(count, rows) or not 0 < scale < np.inf:
        raise _broken(path, f"it has room for {capacity} of {rows} items, or levels of scale {scale}")
    return _Header(count=count, words=item_bytes // 4, top_level=top_level, entry=entry, m=m)


def _check_items(
    path: os.PathLike[str], items: Words, header: _Header, item_vectors: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Labels of items, and whether each is marked as deleted."""
    most = 2 * header.m
    used = np.arange(most) < (items[:, :1] & COUNT_BITS)
    if (items[:, 0] & COUNT_BITS > most).any() or (items[:, 1 : 1 + most][used] >= header.count).any():
        raise _broken(path, "a link at level 0 leads to no item")
    labels: NDArray[np.int64] = np.ascontiguousarray(items[:, -2:]).view("<i8")[:, 0]
    if (labels < 0).any() or (labels >= len(item_vectors)).any():
        raise _broken(path, "a label is not a row of the items")
    vectors = np.ascontiguousarray(items[:, 1 + most : -2]).view("<f4")
    if not np.array_equal(vectors, item_vectors[labels]):
        raise BundleError(f"{path}: the index does not match the items: it has other vectors; export the bundle again")
    return labels, items[:, 0] & DELETED_BIT != 0


def _check_upper_links(path: os.PathLike[str], words: Words, header: _Header) -> NDArray[np.int64]:
    """The level of each item [count]."""
    per_level = header.m + 1
    levels, starts, at = np.zeros(header.count, np.int64), [], 0
    view = memoryview(words.tobytes()).cast("I")
    for item in range(header.count):
        size = view[at] if at < len(view) else -1
        if size:
            levels[item], rest = divmod(size, 4 * per_level)
            if size < 0 or rest or at + size // 4 >= len(view):
                raise _broken(path, f"the links of item {item} above level 0 do not fit")
            starts += [(at + 1 + level * per_level, level + 1) for level in range(levels[item])]
        at += 1 + size // 4
    if at != len(view):
        raise _broken(path, f"{4 * (len(view) - at)} bytes follow its end")
    if starts:
        _check_lists(path, words, np.array(starts, np.int64), levels, header)
    return levels


def _check_lists(
    path: os.PathLike[str], words: Words, starts: NDArray[np.int64], levels: NDArray[np.int64], header: _Header
) -> None:
    """Check lists of links at the places and levels `starts` [lists, 2]: each link leads to an item on that level."""
    counts = words[starts[:, 0]] & COUNT_BITS
    targets = words[starts[:, :1] + 1 + np.arange(header.m)].astype(np.int64)
    used = np.arange(header.m) < counts[:, None]
    inside = np.where(used & (targets < header.count), targets, 0)
    wrong = used & ((targets >= header.count) | (levels[inside] < starts[:, 1:]))
    if (counts > header.m).any() or wrong.any():
        raise _broken(path, "a link above level 0 leads to no item")


def _broken(path: os.PathLike[str], problem: str) -> BundleError:
    return BundleError(f"{path}: the index is broken: {problem}; export the bundle again")
