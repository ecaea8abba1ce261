"""Removes GPU kernels of other architectures from a shared library, so that its archive gets small.

NVIDIA's compiler puts kernels into the ELF section `.nv_fatbin`: containers, each with a header of 16 bytes and entries
for one architecture each. Cleared entries keep their place and their header, so the library loads as before; their
zeros compress to nothing. The layout is not documented; it was read off libraries of CUDA 12 and 13.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

SECTION = b".nv_fatbin"
MAGIC = 0xBA55ED50
LARGEST_HEADER = 4096


def keep_architecture(library: bytearray, architecture: int) -> tuple[int, int]:
    """Clear the kernels of all other architectures in place.

    Args:
        library: A 64-bit little-endian ELF file.
        architecture: Such as 90.

    Returns:
        Bytes of kernels kept and cleared.
    """
    kept = cleared = 0
    for start, size in sections(library, SECTION):
        for at, length, built_for in entries(library, start, start + size):
            if built_for == architecture:
                kept += length
            else:
                library[at : at + length] = bytes(length)
                cleared += length
    return kept, cleared


def sections(library: bytes | bytearray, wanted: bytes) -> Iterator[tuple[int, int]]:
    """Offset and size of each section of a name, of an ELF file."""
    (table,) = struct.unpack_from("<Q", library, 0x28)
    width, count, names_at = struct.unpack_from("<HHH", library, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", library, table + index * width) for index in range(count)]
    names = headers[names_at][4]
    for name, _, _, _, offset, size in headers:
        begin = names + name
        if bytes(library[begin : library.index(b"\0", begin)]) == wanted:
            yield offset, size


def entries(library: bytes | bytearray, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Offset, size and architecture of the kernels of each entry of a section."""
    at = start
    while at + 16 <= stop:
        magic, _, header, size = struct.unpack_from("<IHHQ", library, at)
        if magic != MAGIC:
            at += 8  # padding between containers
            continue
        entry, end = at + header, at + header + size
        while entry + 32 <= end:
            entry_header, length = struct.unpack_from("<IQ", library, entry + 4)
            if not 0 < entry_header <= LARGEST_HEADER:
                break
            (architecture,) = struct.unpack_from("<I", library, entry + 28)
            yield entry + entry_header, length, architecture
            entry += entry_header + length
        at = end
