"""SASRec of RecTools as something to export.

    model.fit_trainer.save_checkpoint("sasrec.ckpt")     # where RecTools is installed
    source = source_from_sasrec(Path("sasrec.ckpt"))     # RecTools is not needed
    export_bundle(source, Path("bundle/"))

The score of an item is RecTools' own: the dot product, or the cosine, of its embedding and the last event's output.

Keys and values of this model cannot be cached. RecTools puts the last event at position 0 and counts backwards, so
each new event moves all others. It also fills a history with padding up to `session_max_len`. Unless
`use_key_padding_mask` is set, events attend to the padding, and one event more means one padding less for all. In
every block the padding is zero, so its key and value are the biases of the projection. Here one slot stands for all
of it: the logarithm of their number is added to its score.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipinrec.errors import ExportError
from unipinrec.export.protocol import Events, ExportSource, KeyValues

# What the configuration of a model must say. Types are written with their modules.
SUPPORTED = {
    "cls": "SASRecModel",
    "data_preparator_type": "SASRecDataPreparator",
    "transformer_layers_type": "SASRecTransformerLayers",
    "pos_encoding_type": "LearnableInversePositionalEncoding",
    "item_net_constructor_type": "SumOfEmbeddingsConstructor",
    "similarity_module_type": "DistanceSimilarityModule",
    "backbone_type": "TransformerTorchBackbone",
    "use_causal_attn": True,
}
EXTRA_TOKENS = ("PAD",)
COSINE_EPS = 1e-8


def source_from_sasrec(model: Any) -> ExportSource:
    """Make an export source of a trained `rectools.models.SASRecModel`.

    An event is its item; actions, surfaces and times are not read. The bundle has one action, "click".

    Args:
        model: The path of a checkpoint that RecTools' trainer wrote, or the fitted model itself.

    Raises:
        ExportError: The file is no such checkpoint, or the model has parts of other types.
    """
    if isinstance(model, str | Path):
        known, weights = _checkpoint(Path(model))
    elif hasattr(model, "lightning_model"):
        known, weights = model.lightning_model.hparams, model.lightning_model.state_dict()
    else:
        raise ExportError(f"{type(model).__name__} is no fitted SASRecModel; fit it, or pass the path of a checkpoint")
    config = known["model_config"]
    _require_sasrec(config, known["item_extra_tokens"])
    parts = {name.removeprefix("torch_model."): tensor.detach().cpu() for name, tensor in weights.items()}
    table = _item_embeddings({name: parts.pop(name) for name in list(parts) if name.startswith("item_model.")})
    module = ServableSasrec(config, table)
    try:
        module.load_state_dict(parts)
    except RuntimeError as error:
        raise ExportError(f"the weights are not those of a SASRecModel: {str(error)[:500]}") from error
    return ExportSource.simple(
        module,
        known["item_external_ids"][len(EXTRA_TOKENS) :],
        config["session_max_len"],
        similarity="dot",
        cache="none",
        config={"architecture": "SASRec", **config},
    )


def _checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the weights of a checkpoint, read without running code that it may hold."""
    rebuilt = np.empty(0, object).__reduce__()[0]
    named = [(rebuilt, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]  # of numpy 1 and 2
    arrays: list[Any] = [*named, np.ndarray, np.dtype, np.dtypes.ObjectDType, np.dtypes.Int64DType]
    try:
        with torch.serialization.safe_globals(arrays):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        names = ("model_config", "item_external_ids", "item_extra_tokens")
        return {name: checkpoint["hyper_parameters"][name] for name in names}, checkpoint["state_dict"]
    except (OSError, RuntimeError, UnpicklingError, KeyError, TypeError) as error:
        unsafe = isinstance(error, UnpicklingError)  # torch then explains at length how to run such code
        reason = "it holds something else than numbers, words and arrays" if unsafe else str(error)[:300]
        raise ExportError(
            f"{path} is no checkpoint of a SASRecModel: {reason}; write one with "
            "model.fit_trainer.save_checkpoint(path)"
        ) from error


def _require_sasrec(config: Mapping[str, Any], extra_tokens: Any) -> None:
    for name, expected in SUPPORTED.items():
        value = config.get(name)
        if (value.rpartition(".")[2] if isinstance(value, str) else value) != expected:
            raise ExportError(f"this model has {name}={value!r}, only {expected!r} is supported")
    if tuple(extra_tokens) != EXTRA_TOKENS:
        raise ExportError(f"this model has the extra tokens {extra_tokens}, only {EXTRA_TOKENS} are supported")


def _item_embeddings(parts: dict[str, Tensor]) -> Tensor:
    """The embeddings of all items, padding first, [1 + N, d]: those of the ids plus those of the categories."""
    tables = []
    for block in sorted({name.split(".")[2] for name in parts}):
        prefix = f"item_model.item_net_blocks.{block}."
        own = {name.removeprefix(prefix): part for name, part in parts.items() if name.startswith(prefix)}
        if "ids_emb.weight" in own:
            tables.append(own["ids_emb.weight"])
        elif "embedding_bag.weight" in own:
            bag = own["emb_bag_inputs"], own["embedding_bag.weight"], own["offsets"]
            tables.append(F.embedding_bag(*bag, mode="sum"))
        else:
            raise ExportError(f"an item is made of {sorted(own)}, only ids and categories are supported")
    return torch.stack(tables).sum(0).float()


class ServableSasrec(nn.Module):
    """A SASRec under the contract of `ServableModel`, with the names of RecTools' weights.

    An item's vector is its embedding; with cosine similarity, that of unit length and the length behind it.
    """

    def __init__(self, config: Mapping[str, Any], table: Tensor) -> None:
        super().__init__()
        self.longest, width = config["session_max_len"], table.shape[1]
        self.sees_padding = not config["use_key_padding_mask"]
        self.scale = width**0.5 if (config["pos_encoding_kwargs"] or {}).get("use_scale_factor") else 1.0
        self.cosine = (config["similarity_module_kwargs"] or {}).get("distance") == "cosine"
        items = table[len(EXTRA_TOKENS) :]
        lengths = items.norm(dim=1, keepdim=True)
        vectors = torch.cat([F.normalize(items, eps=COSINE_EPS), lengths], 1) if self.cosine else items
        self.register_buffer("items", vectors, persistent=False)
        self.items: Tensor
        blocks = nn.ModuleList(_Block(width, config["n_heads"]) for _ in range(config["n_blocks"]))
        norm = nn.LayerNorm(width, eps=1e-8)
        self.transformer_layers = nn.ModuleDict({"transformer_blocks": blocks, "last_layernorm": norm})
        positions = {"pos_emb": nn.Embedding(self.longest, width)} if config["use_pos_emb"] else {}
        self.pos_encoding_layer = nn.ModuleDict(positions)

    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        """See `ServableModel`."""
        vectors, count, last = events.item_vectors, events.surfaces.shape[1], events.lengths[:, None] - 1
        x = (vectors[..., :-1] * vectors[..., -1:] if self.cosine else vectors) * self.scale
        if self.pos_encoding_layer:
            from_the_end = (last - torch.arange(count)).clamp(min=0)
            x = x + self.pos_encoding_layer["pos_emb"](from_the_end)
        padding = (self.longest - events.lengths) * self.sees_padding
        hidden = torch.full((count, count), -torch.inf).triu(1).expand(x.shape[0], -1, -1)
        mask = torch.cat([padding.to(x.dtype).log()[:, None, None].expand(-1, count, 1), hidden], 2)
        *blocks, final = self.transformer_layers["transformer_blocks"].children()
        for block in blocks:
            x = block(x, x, mask)
        # Behind the last block's keys and values, only the last event is ever used.
        newest, seen = (rows.gather(1, last[..., None].expand(-1, 1, rows.shape[2])) for rows in (x, mask))
        return (), self.transformer_layers["last_layernorm"](final(newest, x, seen))[:, 0]

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        """See `ServableModel`."""
        if self.cosine:
            last_hidden_state = F.pad(F.normalize(last_hidden_state, eps=COSINE_EPS), (0, 1))
        return last_hidden_state[:, None]

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        """See `ServableModel`."""
        return self.items[rows]


class _Block(nn.Module):
    """One transformer block; the keys and values are made of inputs without a norm, as in RecTools."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.multi_head_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.q_layer_norm, self.ff_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        linear = {"ff_linear_1": nn.Linear(width, width), "ff_linear_2": nn.Linear(width, width)}
        self.feed_forward = nn.ModuleDict(linear)

    def forward(self, x: Tensor, events: Tensor, mask: Tensor) -> Tensor:
        """Map x (batch, q, d); `mask` (batch, q, 1 + n) is added to the scores of the padding and the n events."""
        attention, normed, seen = self.multi_head_attn, self.q_layer_norm(x), F.pad(events, (0, 0, 1, 0))
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(part, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, weight, bias in zip((normed, seen, seen), weights, biases, strict=True)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None])
        x = self.ff_layer_norm(normed + attention.out_proj(attended.transpose(1, 2).flatten(2)))
        inner = F.relu(self.feed_forward["ff_linear_1"](x))
        finished: Tensor = x + self.feed_forward["ff_linear_2"](inner)
        return finished
