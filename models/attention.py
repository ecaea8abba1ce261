"""The two attention forms. Each is one rule about the key slots that a query sees, for events and for candidates.

Keys and values are laid out in *slots*. In the "sink" form slot 0 is a learned sink; event i sits in slot i + 1 and
sees the slots before its own. In the "self" form event i sits in slot i and also sees itself. A candidate sees the
slots of its history and, in the "self" form, itself; never another candidate (paper section 3.1.1).

All tensors are (batch, heads, slots or queries, head_dim); key/value heads may be fewer than query heads (GQA).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unipinrec.models.config import AttentionForm


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Scaled dot-product attention; `mask` is boolean, True = may see, (batch, 1, queries, slots)."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def attend_history(form: AttentionForm, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention among the n events of a history; `key`/`value` hold all its slots (n + 1 with a sink)."""
    events = query.shape[2]
    if form == "sink":
        # Without the last slot the remaining n line up with the queries: plain causal attention.
        key, value = key[:, :, :events], value[:, :, :events]
    return attend(query, key, value, causal=True)


def attend_extension(query: Tensor, past: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
    """Attention over past slots and m new events, as far as `visible` (see `extension_mask`) allows."""
    key, value = torch.cat([past[0], new[0]], dim=2), torch.cat([past[1], new[1]], dim=2)
    return attend(query, key, value, visible[:, None])


def extension_mask(form: AttentionForm, index: Tensor, past_slots: Tensor, slots: int, events: int) -> Tensor:
    """Which of `slots` past slots and `events` new ones each new event sees, (batch, queries, slots + events).

    Args:
        form: The attention form.
        index: [B, q] i64, place of each query among the new events.
        past_slots: [B] i64, number of valid past slots.
        slots: Past slots, padding included.
        events: New events, padding included.
    """
    new = torch.arange(events, device=index.device)
    seen = new < index[..., None] if form == "sink" else new <= index[..., None]
    in_past = torch.arange(slots, device=index.device)[None, :] < past_slots[:, None]
    return torch.cat([in_past[:, None, :].expand(-1, index.shape[1], -1), seen], dim=-1)


def attend_valid(query: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> Tensor:
    """Attention over the first `valid` [B] i64 slots of each row; the others are padding."""
    if torch.onnx.is_in_onnx_export():
        # nonpad_kv_seqlen: ONNX Runtime runs it without the mask's extra pass, a quarter faster.
        inputs, shape = (query, key, value, None, None, None, valid), query.shape
        attended: Tensor = torch.onnx.ops.symbolic("::Attention", inputs, dtype=query.dtype, shape=shape, version=24)
        return attended
    slots = torch.arange(key.shape[2], device=key.device)
    mask = (slots[None, :] < valid[:, None])[:, None, None]
    return attend(query, key, value, mask.expand(-1, -1, query.shape[2], -1))


def attend_with_own(query: Tensor, past: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
    """Attention of k candidates over the slots that `visible` [B, 1 or k, slots] allows, and each over its own."""
    groups = query.shape[1] // own[0].shape[1]
    past_key, past_value, own_key, own_value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in past + own)
    scale = query.shape[-1] ** -0.5
    query = query * scale
    scores = torch.matmul(query, past_key.transpose(2, 3)).masked_fill(~visible[:, None], float("-inf"))
    own_score = (query * own_key).sum(-1, keepdim=True)
    weights = torch.softmax(torch.cat([scores, own_score], dim=-1), dim=-1)
    return torch.matmul(weights[..., :-1], past_value) + weights[..., -1:] * own_value


def joint_mask(form: AttentionForm, events: int, cutoffs: Tensor) -> Tensor:
    """The dense mask of one pass over [history ; candidates], (batch, n + k, slots of both).

    Args:
        form: The attention form.
        events: n, the padded history length.
        cutoffs: [B, k] i64, number of events that each candidate may see.
    """
    prefix = 1 if form == "sink" else 0
    candidates = cutoffs.shape[1]
    slots = prefix + events + candidates
    slot = torch.arange(slots, device=cutoffs.device)
    event = torch.arange(events, device=cutoffs.device)
    history = (slot[None, :] <= event[:, None]).expand(cutoffs.shape[0], -1, -1)
    seen = slot < prefix + cutoffs[:, :, None]
    if form == "self":
        own = events + torch.arange(candidates, device=cutoffs.device)
        seen = seen | (slot == own[:, None])
    return torch.cat([history, seen], dim=1)
