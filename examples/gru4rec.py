"""GRU4Rec in plain PyTorch, trained on a made-up log, exported and served: python examples/gru4rec.py BUNDLE."""

import sys
from pathlib import Path

import torch
from made_up import ITEM_IDS, LONGEST, compare, train
from torch import Tensor, nn

from unipinrec.export.bundle_writer import export_bundle
from unipinrec.export.protocol import Events, ExportSource, KeyValues


class GRU4Rec(nn.Module):
    """A GRU over item vectors; an item's score is a dot product with the GRU's state, plus a bias."""

    def __init__(self, items: int, width: int = 32) -> None:
        super().__init__()
        self.items, self.bias = nn.Embedding(items, width), nn.Embedding(items, 1)
        self.gru = nn.GRU(width, width, batch_first=True)

    def states(self, events: Events) -> Tensor:
        """State after each event, [batch, events, width]; the last number of an item vector is its bias."""
        states: Tensor = self.gru(events.item_vectors[..., :-1])[0]
        return states

    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        """Nothing to cache, and the state after the last event: rows are padded on the right."""
        states = self.states(events)
        last = (events.lengths - 1)[:, None, None].expand(-1, 1, states.shape[2])
        return (), states.gather(1, last)[:, 0]

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        """The state, and a 1 for the bias."""
        return torch.cat([last_hidden_state, torch.ones_like(last_hidden_state[:, :1])], 1)[:, None]

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        """Embeddings and biases side by side."""
        return torch.cat([self.items(rows), self.bias(rows)], 1)


def main(folder: str) -> GRU4Rec:
    """Train, export, serve, compare."""
    torch.manual_seed(0)
    model = GRU4Rec(len(ITEM_IDS))
    train(model, steps=200)
    source = ExportSource.simple(model, ITEM_IDS, max_history=LONGEST, item_bias=True, cache="none")
    export_bundle(source, Path(folder))
    compare(Path(folder), model)
    return model


if __name__ == "__main__":
    main(sys.argv[1])
