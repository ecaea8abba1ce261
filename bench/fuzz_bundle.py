"""Opening and reading any bundle folder ends with a `BundleError`, or with a bundle that can serve.

Every input changes the stored bundle of the tests, whose manifest is then written again with correct hashes, so that
the checks behind the hashes are tested. The first byte of an input names a file; the rest is its content, or, by the
second byte, a list of edits of its numbers, text and JSON. The graphs are left to the engines that load them.

Another second byte damages files instead, before or after the bundle is opened, without a new manifest: they are
overwritten, cut, touched, linked, moved or removed. Then the bundle is rejected, or its content stays the same.
Usage: see bench/fuzzing.py.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np

with contextlib.ExitStack() as stack:
    if fuzzing.CHILD in sys.argv:
        atheris = importlib.import_module("atheris")
        stack.enter_context(atheris.instrument_imports(include=["unipinrec"]))
    from unipinrec.errors import BackendError, BundleError, RequestError
    from unipinrec.runtime.bundle.bundle import Bundle
    from unipinrec.runtime.bundle.golden import read_golden
    from unipinrec.runtime.retrieval.retriever import Retriever

STORED = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "bundle_v1"
MANIFEST, MANIFEST_HASH = "manifest.json", "manifest.sha256"
FILES = (
    *(
        MANIFEST,
        MANIFEST_HASH,
        "item_ids.json",
        "item_titles.json",
        "item_metadata.json",
        "retired.json",
        "user_ids.json",
    ),
    *("items.safetensors", "users.safetensors", "golden.safetensors", "index.hnsw"),
)
ORIGINAL = {path.name: path.read_bytes() for path in STORED.iterdir()}
SCRATCH = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
FOLDER = SCRATCH / "bundle"
VALUES: tuple[Any, ...] = (
    *(
        0,
        1,
        -1,
        2,
        23,
        24,
        25,
        2**31,
        2**63,
        2**64,
        -(2**63),
        10**30,
        1e308,
        0.5,
        None,
        True,
        "",
        "x",
        [],
        {},
        [0],
        [[]],
    ),
    *(
        "../x",
        "items.safetensors",
        "ip",
        "l2",
        "F32",
        "\x00",
        [1, 2, 3],
        {"a": 1},
        "F64",
        "I64",
        [24, 4],
        [4, 24],
        [2**60],
    ),
)
WORDS = (
    *("format_version", "num_items", "num_retired", "files", "index", "data_offsets", "dtype", "shape", "F32", "I64"),
)


def target(data: bytes) -> None:
    """One input."""
    if len(data) < 2:
        return
    if data[1] % 8 == 6:
        _strike(_Choices(data[2:]))
        return
    name = FILES[data[0] % len(FILES)]
    content = data[2:] if data[1] % 4 == 0 else _edited(name, data[1:])
    _write(name, content)
    with contextlib.suppress(BundleError):
        _read(Bundle.open(FOLDER))


def _read(bundle: Bundle) -> None:
    """Everything that serving reads of a bundle, beside its graphs."""
    with contextlib.suppress(BundleError):
        read_golden(bundle)
    with contextlib.suppress(BundleError):
        for user, count in bundle.sample_users(5):
            assert len(bundle.user_events(user)) == count
        bundle.sample_histories(3)
    for feature, words in bundle.manifest.categories.items():
        with contextlib.suppress(RequestError):  # of a bundle that does not carry the words of its items
            bundle.catalogue.allowed(None, {feature: words[:1]})
    retriever = Retriever.open(bundle)
    query = bundle.item_vectors[:1]
    with contextlib.suppress(BackendError):
        assert retriever.index is not None
        assert bundle.manifest.index is not None
        rows, similarity = retriever.index.search(query, min(3, bundle.manifest.index.count))
        assert np.isfinite(similarity).all()
        assert [bundle.item_ids[row] for row in rows[0]]


def _strike(choose: _Choices) -> None:
    """Faults of some files at some moments; sealed files always hold the content that the manifest lists."""
    for folder in (FOLDER, SCRATCH / "other"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in ORIGINAL.items():
            (folder / name).write_bytes(content)
    for _ in range(choose.number(3)):
        _fault(choose)
    whole = all(
        (FOLDER / name).is_file() and (FOLDER / name).read_bytes() == content for name, content in ORIGINAL.items()
    )
    try:
        bundle = Bundle.open(FOLDER)
    except BundleError:
        assert not whole
        return
    assert whole
    for _ in range(1 + choose.number(3)):
        _fault(choose)
    for name in bundle.manifest.files:
        assert bundle.files[name].read_bytes() == ORIGINAL[name]
    _read(bundle)


def _fault(choose: _Choices) -> None:
    """One fault, if a file is left to damage."""
    names = sorted(ORIGINAL)
    path, other = FOLDER / names[choose.number(len(names))], SCRATCH / "other" / names[choose.number(len(names))]
    if not path.is_file():
        return
    with path.open("r+b") as file:
        match choose.number(7):
            case 0:
                file.write(bytes([choose.number(256)]) * (1 + choose.number(64)))
            case 1:
                file.truncate(choose.number(path.stat().st_size + 9))
            case 2:
                os.utime(path, ns=(choose.number(2**16), choose.number(2**16)))
            case 3:
                path.unlink()
                path.symlink_to(other)
            case 4:
                path.unlink()
                path.write_bytes(ORIGINAL[other.name])
            case 5:
                path.rename(FOLDER / other.name)
            case _:
                path.unlink()


def _write(name: str, content: bytes) -> None:
    """The stored bundle with one other file, sealed again."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for other, original in ORIGINAL.items():
        (FOLDER / other).write_bytes(content if other == name else original)
    (FOLDER / name).write_bytes(content)
    if name not in (MANIFEST, MANIFEST_HASH):
        manifest = json.loads(ORIGINAL[MANIFEST])
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
        if name == "retired.json":
            manifest["num_retired"] = content.count(b",") + 1
        (FOLDER / MANIFEST).write_text(json.dumps(manifest))
    if name != MANIFEST_HASH:
        (FOLDER / MANIFEST_HASH).write_text(hashlib.sha256((FOLDER / MANIFEST).read_bytes()).hexdigest())


class _Choices:
    """Choices read from bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    @property
    def left(self) -> bool:
        """Whether any are left."""
        return self._place < len(self._data)

    def number(self, count: int) -> int:
        """One of so many; two bytes each."""
        self._place += 2
        return int.from_bytes(self._data[self._place - 2 : self._place], "little") % count

    def value(self) -> Any:
        """Something for JSON."""
        return VALUES[self.number(len(VALUES))]


def _edited(name: str, data: bytes) -> bytes:
    choose = _Choices(data[1:])
    content = ORIGINAL.get(name, b"[1]")
    edit: Callable[[bytes, _Choices], bytes] = _bytes_edited
    if name.endswith(".json"):
        edit = _json_edited
    elif name.endswith(".safetensors") and data[0] % 4 == 1:
        edit = _header_edited
    for _ in range(4):
        if choose.left:
            content = edit(content, choose)
    return content


def _bytes_edited(content: bytes, choose: _Choices) -> bytes:
    """Another number at some place, or an earlier end."""
    index = choose.number(max(1, len(content)))
    width = (1, 4, 8)[choose.number(3)]
    number = (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, choose.number(2**16))[choose.number(7)]
    if choose.number(8) == 7:
        return content[:index]
    index -= index % width
    changed: bytes = content[:index] + (number % 2 ** (8 * width)).to_bytes(width, "little") + content[index + width :]
    return changed


def _json_edited(content: bytes, choose: _Choices) -> bytes:
    try:
        document = json.loads(content)
    except ValueError:
        return content
    return json.dumps(_with_another_value(document, choose)).encode()


def _header_edited(content: bytes, choose: _Choices) -> bytes:
    """A safetensors file with an altered header."""
    size = int.from_bytes(content[:8], "little")
    header = _json_edited(content[8 : 8 + size], choose)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _with_another_value(document: Any, choose: _Choices) -> Any:
    """One value replaced, added or removed, somewhere inside."""
    if not isinstance(document, dict | list) or not document or choose.number(6) == 5:
        return choose.value()
    keys: list[Any] = list(document) if isinstance(document, dict) else list(range(len(document)))
    key, change = keys[choose.number(len(keys))], choose.number(12)
    if change == 11:
        del document[key]
    elif change == 10 and isinstance(document, list):
        document.append(document[key])
    else:
        document[key] = _with_another_value(document[key], choose)
    return document


def _seeds() -> list[bytes]:
    whole = [bytes([index, 0]) + ORIGINAL.get(name, b"[1, 2]") for index, name in enumerate(FILES)]
    edits = [bytes([index, way]) + bytes(range(way, way + 24)) for index in range(len(FILES)) for way in (1, 2, 3)]
    struck = [bytes([0, 6, *(part for fault in range(7) for part in (index, 0, fault, 0))]) for index in range(14)]
    return [*whole, *edits, *struck]


atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
if __name__ == "__main__":
    fuzzing.main(__file__, target, _seeds(), WORDS, longest=24_576)
