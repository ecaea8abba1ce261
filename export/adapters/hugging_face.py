"""Causal decoders of Hugging Face transformers whose tokens are items: Llama and Qwen2, as something to export.

    model = LlamaForCausalLM.from_pretrained("decoder/")
    source = source_from_decoder(model, item_ids, item_tokens=range(4, 4 + len(item_ids)), max_history=256)
    export_bundle(source, Path("bundle/"))

The score of an item is the model's logit of its token after the tokens of the history. The weights, norms and
feed-forward layers are the model's own; attention is that of `models/attention.py`, which ONNX can express.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unipinrec.errors import ExportError
from unipinrec.export.protocol import Events, ExportSource, KeyValues, Past
from unipinrec.models import attention
from unipinrec.models.layers import rotate

DECODERS = ("LlamaForCausalLM", "Qwen2ForCausalLM")
STATIC_ROTARY = ("default", "linear", "llama3", "yarn")  # the others depend on the length of the input


def source_from_decoder(
    model: Any,
    item_ids: Sequence[str],
    *,
    max_history: int,
    item_tokens: Sequence[int] | None = None,
    prefix_tokens: Sequence[int] = (),
) -> ExportSource:
    """Make an export source of a trained decoder. Puts it in eval mode.

    An event is its item; actions, surfaces and times are not read. The bundle has one action, "click".

    Args:
        model: A `LlamaForCausalLM` or `Qwen2ForCausalLM` with f32 weights on the CPU.
        item_ids: External id of each of the N items.
        max_history: Longest history in events.
        item_tokens: The token of each item, [N]; None = 0 to N - 1, if the model has no other tokens.
        prefix_tokens: Tokens before the first event of every history, such as the one for the beginning of a sequence.

    Raises:
        ExportError: The model is not such a decoder, or its tokens do not fit.
    """
    _require_decoder(model)
    config, vocabulary = model.config, model.model.embed_tokens.num_embeddings
    tokens = list(range(len(item_ids)) if item_tokens is None else item_tokens)
    if item_tokens is None and vocabulary != len(item_ids):
        raise ExportError(
            f"the model has {vocabulary} tokens, not {len(item_ids)}; pass item_tokens, one for each item"
        )
    if len(tokens) != len(item_ids):
        raise ExportError(f"there are {len(tokens)} item_tokens for {len(item_ids)} items; pass one for each")
    for name, values in (("item_tokens", tokens), ("prefix_tokens", list(prefix_tokens))):
        wrong = [token for token in values if not 0 <= token < vocabulary]
        if wrong:
            raise ExportError(f"{name} holds {wrong[0]}, but the tokens of this model are 0 to {vocabulary - 1}")
    longest = config.max_position_embeddings - len(prefix_tokens)
    if max_history > longest:
        raise ExportError(
            f"max_history={max_history} is beyond the {longest} events that this model has positions for; pass at most "
            f"{longest}"
        )
    module = ServableDecoder(model, torch.tensor(tokens), torch.tensor(list(prefix_tokens), dtype=torch.int64))
    described = json.loads(config.to_json_string(use_diff=False))
    return ExportSource.simple(
        module, item_ids, max_history, similarity="dot", config={"architecture": type(model).__name__, **described}
    )


def _require_decoder(model: Any) -> None:
    """Raise unless this module computes what the model computes."""
    name = type(model).__name__
    if name not in DECODERS:
        raise ExportError(f"{name} is not supported; pass one of {list(DECODERS)}, or write the five methods yourself")
    config = model.config
    layer_types = getattr(config, "layer_types", None) or ()
    if getattr(config, "use_sliding_window", False) or "sliding_attention" in layer_types:
        raise ExportError(
            f"this {name} attends through a sliding window (use_sliding_window); train it with full attention"
        )
    rotary = getattr(model.model.rotary_emb, "rope_type", "default")
    if rotary not in STATIC_ROTARY:
        raise ExportError(
            f"this {name} has rotary positions of type {rotary!r}, which change with the length of a history; the "
            f"types {list(STATIC_ROTARY)} do not"
        )
    for path, module in model.named_modules():
        if path.endswith(("_proj", "lm_head")) and type(module) is not nn.Linear:
            raise ExportError(
                f"{path} is a {type(module).__name__}, not a plain linear layer; load the model without quantization, "
                "and merge its adapters (merge_and_unload)"
            )
    for path, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ExportError(
                f"{path} is {parameter.dtype} on {parameter.device}; export needs f32 on the CPU: call "
                "model.float().cpu()"
            )


class ServableDecoder(nn.Module):
    """A decoder under the contract of `ServableModel`.

    An item's vector is its output embedding, with its input embedding behind it unless the two are tied.
    """

    def __init__(self, model: Any, item_tokens: Tensor, prefix_tokens: Tensor) -> None:
        super().__init__()
        self.layers, self.norm, rotary = model.model.layers, model.model.norm, model.model.rotary_emb
        self.head_dim, self.rotary_scale = self.layers[0].self_attn.head_dim, rotary.attention_scaling
        inputs, outputs = model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
        tied = inputs.data_ptr() == outputs.data_ptr()
        parts = [outputs[item_tokens]] if tied else [outputs[item_tokens], inputs[item_tokens]]
        self.register_buffer("items", torch.cat(parts, 1))
        self.register_buffer("prefix", inputs[prefix_tokens])
        self.register_buffer("frequencies", rotary.inv_freq.detach().clone())
        self.items: Tensor
        self.prefix: Tensor
        self.frequencies: Tensor

    def encode(self, events: Events) -> tuple[KeyValues, Tensor]:
        """See `ServableModel`."""
        x = self._tokens(events)
        slots = len(self.prefix)
        if slots:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1)
        rotation = self._rotation(_positions(x))
        cache: list[tuple[Tensor, Tensor]] = []
        *layers, final = self.layers
        for layer in layers:
            query, key, value = self._project(layer, x, rotation)
            cache.append((key, value))
            x = _finish(layer, x, attention.attend_history("self", query, key, value))
        query, key, value = self._project(final, x, rotation)
        cache.append((key, value))
        last = events.lengths + slots - 1
        attended = attention.attend_valid(_at(query, last, 2), key, value, last + 1)
        return cache, self.norm(_finish(final, _at(x, last, 1), attended))[:, 0]

    def extend(self, events: Events, past: Past) -> tuple[KeyValues, Tensor]:
        """See `ServableModel`."""
        x, filled = self._tokens(events), past.lengths + len(self.prefix)
        rotation = self._rotation(_positions(x) + filled[:, None])
        sizes = past.key_values[0][0].shape[2], x.shape[1]
        visible = attention.extension_mask("self", _positions(x), filled, *sizes)
        added: list[tuple[Tensor, Tensor]] = []
        for layer, cached in zip(self.layers, past.key_values, strict=True):
            query, key, value = self._project(layer, x, rotation)
            added.append((key, value))
            x = _finish(layer, x, attention.attend_extension(query, cached, (key, value), visible))
        return added, self.norm(_at(x, events.lengths - 1, 1))[:, 0]

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None) -> Tensor:
        """See `ServableModel`."""
        unread = self.items.shape[1] - last_hidden_state.shape[1]
        return nn.functional.pad(last_hidden_state, (0, unread))[:, None]

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        """See `ServableModel`."""
        return self.items[rows]

    def _tokens(self, events: Events) -> Tensor:
        return events.item_vectors[..., -self.prefix.shape[1] :]

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.to(torch.float32)[:, None, :, None] * self.frequencies
        return angles.cos() * self.rotary_scale, angles.sin() * self.rotary_scale

    def _project(self, layer: Any, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        own, normed = layer.self_attn, layer.input_layernorm(x)
        query, key, value = (
            part(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in (own.q_proj, own.k_proj, own.v_proj)
        )
        return rotate(query, rotation), rotate(key, rotation), value


def _finish(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    x = x + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    finished: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
    return finished


def _at(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """One element of each row along an axis, which stays with length 1."""
    shape = list(x.shape)
    shape[axis] = 1
    return x.gather(axis, index.view(-1, *[1] * (x.ndim - 1)).expand(shape))


def _positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[None].expand(x.shape[0], -1)
