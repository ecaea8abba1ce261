"""How much memory a run of a graph takes at most, from the shapes of its inputs, before it runs.

The bound holds for transformers whose feed-forward layers are at most four times as wide as their tokens.
`bench/memory.py` compares it with the measured peak.
"""

from __future__ import annotations

from unipinrec.runtime.bundle.manifest import ModelSpec

WORK_BYTES = 512 << 20
TOKEN_WIDTHS = 32  # of numbers that live at once per token; 18 to 22 were measured


def work_bytes(model: ModelSpec, rows: int, tokens: int, slots: int) -> int:
    """Bytes that a run takes beside weights and inputs.

    Args:
        model: The model.
        rows: Histories, B.
        tokens: New events or candidates of each.
        slots: Slots that each of them attends to, new ones included.
    """
    heads = max(model.num_kv_heads, model.hidden_size // max(1, model.head_dim))
    token = TOKEN_WIDTHS * max(model.hidden_size, model.item_dim) + 2 * heads * slots  # scores before and after softmax
    slot = 4 * model.num_layers * model.num_kv_heads * model.head_dim  # keys and values, and a copy of them
    return 4 * rows * (tokens * token + slots * slot)
