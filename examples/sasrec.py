"""A SASRec with cached histories, trained on a made-up log, exported and served: python examples/sasrec.py BUNDLE."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from made_up import ITEM_IDS, LONGEST, compare, train
from torch import Tensor, nn

from unipinrec.export.bundle_writer import export_bundle
from unipinrec.export.protocol import Events, ExportSource, KeyValues, Past

Pair = tuple[Tensor, Tensor]


class Block(nn.Module):
    """A pre-norm layer of a transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.before, self.after = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, past: Pair | None, mask: Tensor) -> tuple[Tensor, Pair]:
        """The layer's output, and the keys and values of these events alone."""
        parts = self.qkv(self.before(x)).chunk(3, -1)
        query, *new = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        keys, values = new if past is None else (torch.cat(pair, 2) for pair in zip(past, new, strict=True))
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(F.relu(self.wide(self.after(x)))), (new[0], new[1])


class SASRec(nn.Module):
    """Learned positions from the oldest event on; an item's score is a dot product with the newest event's state."""

    def __init__(self, items: int, width: int = 32, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.items, self.positions = nn.Embedding(items, width), nn.Embedding(LONGEST, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def run(self, events: Events, past: Past | None) -> tuple[KeyValues, Tensor]:
        """Keys and values of these events, and their states [batch, events, width]."""
        first = torch.zeros_like(events.lengths) if past is None else past.lengths
        places = first[:, None] + torch.arange(events.item_vectors.shape[1])
        known = places
        if past is not None:
            slots = torch.arange(past.key_values[0][0].shape[2])
            known = torch.cat([torch.where(slots < past.lengths[:, None], slots, LONGEST), places], 1)
        mask = (known[:, None] <= places[:, :, None])[:, None]  # no event sees later ones, nor an empty slot
        x, new = events.item_vectors + self.positions(places.clamp(max=LONGEST - 1)), []  # padding may lie beyond
        for layer, block in enumerate(self.blocks):
            x, pair = block(x, past.key_values[layer] if past else None, mask)
            new.append(pair)
        return new, self.norm(x)

    def states(self, events: Events) -> Tensor:
        """State of each event, for training."""
        return self.run(events, None)[1]

    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        """A whole history."""
        return self.extend(events, None)

    def extend(self, events: Events, past: Past | None) -> tuple[KeyValues, Tensor]:
        """New events after a cached history."""
        new, states = self.run(events, past)
        last = (events.lengths - 1)[:, None, None].expand(-1, 1, states.shape[2])
        return new, states.gather(1, last)[:, 0]

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        """The state."""
        return last_hidden_state[:, None]

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        """Embeddings."""
        return self.items.weight[rows]


def main(folder: str) -> SASRec:
    """Train, export, serve, compare."""
    torch.manual_seed(0)
    model = SASRec(len(ITEM_IDS))
    train(model, steps=200)
    source = ExportSource.simple(model, ITEM_IDS, max_history=LONGEST, similarity="dot")
    export_bundle(source, Path(folder))
    compare(Path(folder), model)
    return model


if __name__ == "__main__":
    main(sys.argv[1])
