"""How glibc treats a server's memory; elsewhere nothing is done."""

from __future__ import annotations

import ctypes

M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3  # of mallopt
LARGE_BYTES = 4 << 20


def keep_memory_flat() -> None:
    """One heap for all threads, and large buffers outside it, which go back to the system as soon as they are freed.

    By default glibc has eight heaps for each core and puts larger and larger buffers into them. What lives between them
    keeps the rest from being given back: a server that swapped bundles grew by a megabyte with each.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(M_ARENA_MAX, 1)
        tune(M_MMAP_THRESHOLD, LARGE_BYTES)


def give_back_memory() -> None:
    """Let the system have what was freed between what still lives, such as after a bundle was closed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
