"""HSTU (Zhai et al. 2024), trained on a made-up log, exported and served: python examples/hstu.py BUNDLE."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from made_up import ITEM_IDS, LONGEST, compare, train
from torch import Tensor, nn

from unipinrec.export.bundle_writer import export_bundle
from unipinrec.export.protocol import Events, ExportSource, KeyValues

BUCKETS = 64


class Block(nn.Module):
    """Pointwise aggregated attention with a bias by relative position and time, gated by the input."""

    def __init__(self, width: int, heads: int, longest: int) -> None:
        super().__init__()
        self.heads, self.longest = heads, longest
        self.uvqk, self.out = nn.Linear(width, 4 * width), nn.Linear(width, width)
        self.by_position, self.by_time = nn.Embedding(longest, 1), nn.Embedding(BUCKETS, 1)

    def forward(self, x: Tensor, positions: Tensor, gaps: Tensor, causal: Tensor) -> Tensor:
        """From [batch, events, width] to the same; positions [events, events], gaps [batch, events, events]."""
        u, v, q, k = F.silu(self.uvqk(F.layer_norm(x, x.shape[2:]))).chunk(4, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        bias = self.by_position(positions)[..., 0] + self.by_time(gaps)[..., 0]
        weights = F.silu(q @ k.transpose(2, 3) + bias[:, None]) * causal / self.longest
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        result: Tensor = x + self.out(F.layer_norm(mixed, mixed.shape[2:]) * u)
        return result


class HSTU(nn.Module):
    """Layers of it over item vectors of unit length; an item's score is its cosine with the newest event's state."""

    def __init__(self, items: int, width: int = 32, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.items, self.width = nn.Embedding(items, width), width
        self.blocks = nn.ModuleList(Block(width, heads, LONGEST) for _ in range(layers))

    def states(self, events: Events) -> Tensor:
        """State of each event, [batch, events, width]. An event knows when the next one happened; the last does not."""
        count = events.item_vectors.shape[1]
        order = torch.arange(count)
        seconds = events.timestamps_ms // 1000
        following = torch.cat([seconds[:, 1:], seconds[:, -1:]], 1)
        until = torch.where(order < events.lengths[:, None] - 1, following, seconds)
        gaps = (until[:, :, None] - seconds[:, None]).abs().clamp(min=1).float().log() / 0.301
        positions = (order[:, None] - order).clamp(0, LONGEST - 1)
        causal = (order[:, None] >= order).float()
        x: Tensor = events.item_vectors * self.width**0.5
        for block in self.blocks:
            x = block(x, positions, gaps.long().clamp(max=BUCKETS - 1), causal)
        return x

    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        """Nothing to cache, since states depend on the next event, and the state of the last event."""
        last = (events.lengths - 1)[:, None, None].expand(-1, 1, self.width)
        return (), self.states(events).gather(1, last)[:, 0]

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        """The state, at unit length."""
        return F.normalize(last_hidden_state, dim=-1)[:, None]

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        """Embeddings, at unit length."""
        return F.normalize(self.items(rows), dim=-1)


def main(folder: str) -> HSTU:
    """Train, export, serve, compare."""
    torch.manual_seed(0)
    model = HSTU(len(ITEM_IDS))
    train(model, steps=200, scale=20.0)
    source = ExportSource.simple(model, ITEM_IDS, max_history=LONGEST, cache="none")
    export_bundle(source, Path(folder))
    compare(Path(folder), model)
    return model


if __name__ == "__main__":
    main(sys.argv[1])
