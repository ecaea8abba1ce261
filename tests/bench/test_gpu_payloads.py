"""Archives for a machine with a GPU: removed kernels, and pieces that arrive in several calls."""

from __future__ import annotations

import hashlib
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from carried import take
from prune import MAGIC, keep_architecture

KERNELS = {75: b"a" * 24, 90: b"b" * 40, 120: b"c" * 16}
NAMES = b"\0.text\0.nv_fatbin\0.shstrtab\0"


def library() -> bytearray:
    """A shared library with nothing but a section of kernels, in two containers with padding between them."""
    section = container({75: KERNELS[75], 90: KERNELS[90]}) + bytes(8) + container({120: KERNELS[120]})
    text = b"MAGIC is no kernel: " + struct.pack("<I", MAGIC)
    start = 64
    offsets = [start, start + len(text), start + len(text) + len(section)]
    sections = [(1, offsets[0], len(text)), (7, offsets[1], len(section)), (18, offsets[2], len(NAMES))]
    body = text + section + NAMES
    headers = b"".join(struct.pack("<IIQQQQ24x", name, 1, 0, 0, offset, size) for name, offset, size in sections)
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    struct.pack_into("<Q", header, 0x28, 64 + len(body))
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 2)
    return bytearray(bytes(header) + body + headers)


def container(kernels: dict[int, bytes]) -> bytes:
    """Kernels as the compiler packs them."""
    entries = b"".join(
        struct.pack("<HHIQ12xI", 2, 0x101, 32, len(code), architecture) + code for architecture, code in kernels.items()
    )
    return struct.pack("<IHHQ", MAGIC, 1, 16, len(entries)) + entries


def test_kernels_of_one_architecture_are_kept() -> None:
    content = library()
    size = len(content)
    assert keep_architecture(content, 90) == (40, 40)
    assert len(content) == size
    assert KERNELS[90] in content
    assert KERNELS[75] not in content
    assert KERNELS[120] not in content
    assert b"MAGIC is no kernel" in content
    assert keep_architecture(library(), 80) == (0, 80)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An archive in two pieces, and a wheel."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "module.py").write_text("VALUE = 1\n")
    whole = tmp_path / "whole.tar.xz"
    with tarfile.open(whole, "w:xz") as archive:
        archive.add(site, ".")
    out = tmp_path / "carried"
    out.mkdir()
    content, lines = whole.read_bytes(), []
    for number, part in enumerate((content[:50], content[50:])):
        piece = out / f"small.tar.xz.{number:02d}"
        piece.write_bytes(part)
        lines.append(f"{hashlib.sha256(part).hexdigest()}  {piece.name}\n")
    (out / "small.tar.xz.sha256").write_text("".join(lines))
    with zipfile.ZipFile(out / "one-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("one.py", "")
    return out


def test_pieces_may_arrive_in_two_calls(folder: Path, tmp_path: Path) -> None:
    work, later = tmp_path / "work", tmp_path / "later"
    later.mkdir()
    (folder / "small.tar.xz.01").rename(later / "small.tar.xz.01")
    wheel = "one-1-py3-none-any.whl"
    assert take(folder, work) == {"small": "waits for small.tar.xz.01", wheel: "unpacked"}
    assert not (work / "sites" / "small").exists()
    assert take(later, work) == {"small": "unpacked", wheel: "unpacked"}
    assert (work / "sites" / "small" / "module.py").read_text() == "VALUE = 1\n"
    assert (work / "sites" / "wheels" / "one.py").exists()
    assert take(None, work) == {"small": "unpacked", wheel: "unpacked"}


def test_a_damaged_piece_is_taken_again(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "small.tar.xz.00").read_bytes()
    (folder / "small.tar.xz.00").write_bytes(whole[:-1])
    assert take(folder, tmp_path / "work")["small"] == "small.tar.xz.00 arrived damaged; carry it again"
    (folder / "small.tar.xz.00").write_bytes(whole)
    assert take(folder, tmp_path / "work")["small"] == "unpacked"
