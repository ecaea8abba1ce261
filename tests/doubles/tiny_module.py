"""A tiny causal transformer with positions, written for `ServableModel` alone, of any shape that `ModelSpec` has."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipinrec.export.protocol import Candidates, Events, ExportSource, KeyValues, Past
from unipinrec.runtime.bundle.manifest import ModelSpec

ITEMS = 40
SPEC = ModelSpec(
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
    hidden_size=8,
    item_dim=8,
    max_history=20,
    kv_prefix_slots=0,
    outcome_conditioned=False,
)


class Tiny(nn.Module):
    """SASRec with actions: learned positions, causal attention, candidates that attend to the history."""

    def __init__(self, spec: ModelSpec = SPEC, actions: int = 1, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        d, width = spec.hidden_size, spec.num_kv_heads * spec.head_dim
        self.spec, self.heads = spec, (spec.num_kv_heads, spec.head_dim)
        self.items = nn.Embedding(ITEMS, spec.item_dim)
        self.enter, self.ask = nn.Linear(spec.item_dim + actions, d), nn.Linear(spec.item_dim, d)
        self.positions = nn.Embedding(spec.max_history, d)
        self.prefix = nn.Parameter(
            torch.randn(spec.num_layers, 2, spec.num_kv_heads, spec.kv_prefix_slots, spec.head_dim)
        )
        self.qkv = nn.ModuleList(nn.Linear(d, 3 * width) for _ in range(spec.num_layers))
        self.out = nn.ModuleList(nn.Linear(width, d) for _ in range(spec.num_layers))
        self.query, self.outcome = nn.Linear(d, spec.item_dim), nn.Linear(actions, d)
        self.head, self.last = nn.Linear(d, actions), nn.Linear(d, d)

    def where(self, start: Tensor, count: int) -> Tensor:
        """Positions [B, count] of events."""
        return (start[:, None] + torch.arange(count)).clamp(max=self.spec.max_history - 1)

    def seen(self, count: int) -> Tensor:
        """Which new events [count, count] each new event sees."""
        return torch.ones(count, count, dtype=torch.bool).tril()

    def cached(self, slots: int, lengths: Tensor) -> Tensor:
        """Which cached slots [B, slots] hold something."""
        return torch.arange(slots) < lengths[:, None] + self.spec.kv_prefix_slots

    def split(self, projected: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.unflatten(-1, self.heads).transpose(1, 2) for part in projected.chunk(3, -1))

    def run(self, events: Events, past: Past) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        count, x = events.surfaces.shape[1], self.enter(torch.cat([events.item_vectors, events.actions], -1))
        x = x + self.positions(self.where(past.lengths, count))
        added = []
        for qkv, out, (old_key, old_value) in zip(self.qkv, self.out, past.key_values, strict=True):
            query, key, value = self.split(qkv(x))
            added.append((key, value))
            old = self.cached(old_key.shape[2], past.lengths)[:, None].expand(-1, count, -1)
            mask = torch.cat([old, self.seen(count).expand(len(x), -1, -1)], 2)[:, None]
            key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
            read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            x = x + out(read.transpose(1, 2).flatten(2))
        return added, x.gather(1, (events.lengths - 1)[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]

    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        batch = len(events.lengths)
        own = [tuple(part[None].expand(batch, -1, -1, -1) for part in layer) for layer in self.prefix]
        start = torch.zeros_like(events.lengths)
        added, hidden = self.run(events, Past(key_values=[(k, v) for k, v in own], lengths=start, timestamps_ms=start))
        pairs = [
            (torch.cat([k, key], 2), torch.cat([v, value], 2)) for (k, v), (key, value) in zip(own, added, strict=True)
        ]
        return pairs, hidden

    def extend(self, events: Events, past: Past) -> tuple[KeyValues, Tensor]:
        return self.run(events, past)

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        wanted = 0.0 if outcomes is None else self.outcome(outcomes)
        queries = self.query(last_hidden_state + wanted)[:, None]
        if self.spec.item_bias:
            queries = torch.cat([queries[..., :-1], torch.ones_like(queries[..., :1])], -1)
        return F.normalize(queries, dim=-1) if self.spec.similarity == "cosine" else queries

    def rank(self, past: Past, candidates: Candidates, last_hidden_state: Tensor | None = None) -> Tensor:
        x = self.ask(candidates.item_vectors)
        if last_hidden_state is not None:
            x = x + self.last(last_hidden_state)[:, None]
        for qkv, out, (key, value) in zip(self.qkv, self.out, past.key_values, strict=True):
            mask = self.cached(key.shape[2], past.lengths)[:, None, None]
            read = F.scaled_dot_product_attention(self.split(qkv(x))[0], key, value, attn_mask=mask)
            x = x + out(read.transpose(1, 2).flatten(2))
        return self.head(x)  # type: ignore[no-any-return]

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        vectors = self.items(rows)
        return F.normalize(vectors, dim=-1) if self.spec.similarity == "cosine" else vectors


def tiny_source(module: nn.Module | None = None, *, actions: tuple[str, ...] = ("click",), **spec: Any) -> ExportSource:
    """A source of a module; `spec` changes what `ModelSpec` says, whatever the module is."""
    return ExportSource(
        module=Tiny() if module is None else module,
        model=msgspec.structs.replace(SPEC, **spec),
        actions=actions,
        positive_actions=actions[:1],
        surfaces=("unknown", "home"),
        dense={},
        categories={},
        item_ids=[f"item-{i}" for i in range(ITEMS)],
        titles=[None] * ITEMS,
        item_dense=np.zeros((ITEMS, 0), np.float32),
        item_categories=np.zeros((ITEMS, 0), np.int64),
        config={"architecture": "Tiny"},
    )
