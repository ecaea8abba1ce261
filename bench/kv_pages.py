"""Slots or pages: the memory of real history lengths, and the time to read them, in either layout.

    OMP_NUM_THREADS=1 python bench/kv_pages.py DATA [--rounds 101]

DATA is a prepared data set. Layouts of the `small` size's keys and values:

    slots   every user has room for the longest history that the model takes; nothing is ever copied together
    pages   users have as many pages of 8, 16, 32, 64 or 128 events as their history needs

`filled` is the share of the memory in use that holds events. Reading 992 events into a batch is timed for each layout,
in fp32 and int8, interleaved; a slot in fp32 could be handed to ONNX Runtime as it lies, so its reading time is what
that would save.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import card, finish, interleaved, spread

from unipinrec.models.config import SMALL
from unipinrec.models.data.schema import read_dataset
from unipinrec.models.data.sequences import sequences_of
from unipinrec.runtime.bundle.quality import KvDtype
from unipinrec.runtime.kv.pages import KvGeometry, KvPages

PAGE_SLOTS, EVENTS, GIB = (8, 16, 32, 64, 128), 992, 1 << 30
SLOTS = EVENTS + SMALL.kv_prefix_slots


def geometry(dtype: KvDtype, page_slots: int) -> KvGeometry:
    return KvGeometry(
        tensors=2 * SMALL.num_layers,
        heads=SMALL.num_kv_heads,
        head_dim=SMALL.head_dim,
        dtype=dtype,
        page_slots=page_slots,
    )


def reading(dtype: KvDtype, page_slots: int) -> partial[None]:
    """Read one history of 992 events from pages in random order."""
    shape = geometry(dtype, page_slots)
    count = shape.pages_for(SLOTS)
    pages = KvPages(shape, count)
    order = np.random.default_rng(0).permutation(count).tolist()
    values = np.random.default_rng(1).standard_normal((shape.tensors, shape.heads, SLOTS, shape.head_dim), np.float32)
    pages.write(order, 0, list(values))
    return partial(pages.read, order, SLOTS, np.empty_like(values))


def memory(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, dict[str, float]]:
    slots = np.minimum(lengths, EVENTS) + SMALL.kv_prefix_slots
    result = {}
    for name, size in {"slots": SLOTS, **{f"pages of {size}": size for size in PAGE_SLOTS}}.items():
        shape = geometry("int8", size)
        taken = np.array([shape.pages_for(count) * size for count in slots.tolist()])
        result[name] = {
            "filled": round(float(slots.sum() / taken.sum()), 4),
            "users_per_gib": round(GIB / float(taken.mean() * shape.slot_bytes)),
        }
    return result


def main() -> None:
    """Measure; write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=101)
    options = parser.parse_args()
    lengths = np.diff(sequences_of(read_dataset(options.data)).event_start)
    lengths = lengths[lengths > 0]
    dtypes: tuple[KvDtype, ...] = ("fp32", "int8")
    ways = {
        f"{dtype} {'slot' if size == SLOTS else f'pages of {size}'}": reading(dtype, size)
        for dtype in dtypes
        for size in (SLOTS, *PAGE_SLOTS)
    }
    read = {name: spread(values) for name, values in interleaved(ways, options.rounds).items()}
    events = {"users": len(lengths), "mean": round(float(lengths.mean()), 1), **spread(lengths.tolist())}
    finish({**card("kv_pages"), "histories": events, "memory": memory(lengths), "read_ms": read}, "kv_pages")


if __name__ == "__main__":
    main()
