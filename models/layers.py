"""One transformer block and the rotary encoding; attention itself is in `attention.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipinrec.models.config import ModelConfig


class Rotary(nn.Module):
    """Rotary position encoding over the event index, rotating the two halves of each head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.register_buffer("frequencies", config.rope_theta**-exponents, persistent=False)
        self.frequencies: Tensor

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Map positions [B, s] i64 to (cos, sin), each [B, 1, s, D / 2] f32."""
        angles = positions.to(torch.float32)[:, None, :, None] * self.frequencies
        return angles.cos(), angles.sin()


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate (batch, heads, seq, head_dim) by the (cos, sin) of each position."""
    cos, sin = (part.to(heads.dtype) for part in rotation)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block, cut where attention looks at other tokens.

    `project` makes queries, keys and values; `query` and `key_value` make a part of them. The caller attends, and
    `finish` does the rest. So the same weights work for histories, extensions and candidates.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, kv = config.hidden_size, config.num_kv_heads * config.head_dim
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.widths = (d, kv, kv)
        self.attention_norm = nn.RMSNorm(d, eps=config.norm_eps)
        self.qkv = nn.Linear(d, d + 2 * kv, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.mlp_norm = nn.RMSNorm(d, eps=config.norm_eps)
        self.gate_up = nn.Linear(d, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, d, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        sink = (2, config.num_kv_heads, 1, config.head_dim)
        self.sink = nn.Parameter(torch.zeros(sink)) if config.attention == "sink" else None

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Map x (batch, seq, d) to query, key, value (batch, heads, seq, head_dim), query and key rotated."""
        query, key, value = self._projected(x, (0, 1, 2))
        return rotate(query, rotation), rotate(key, rotation), value

    def query(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """The query of `project` alone, for tokens that no other token sees."""
        return rotate(self._projected(x, (0,))[0], rotation)

    def key_value(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Key and value of `project` alone, for tokens that see no other token."""
        key, value = self._projected(x, (1, 2))
        return rotate(key, rotation), value

    def _projected(self, x: Tensor, parts: tuple[int, ...]) -> list[Tensor]:
        """Chosen parts of (query, key, value), each by its own product: splitting a joint product would copy it."""
        normed, weights = self.attention_norm(x), self.qkv.weight.split(self.widths)
        return [F.linear(normed, weights[part]).unflatten(-1, (self.heads[part], -1)).transpose(1, 2) for part in parts]

    def with_prefix(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the sink, if this form has one, into slot 0 of a history's keys and values."""
        if self.sink is None:
            return key, value
        sink = self.sink[:, None].expand(-1, key.shape[0], -1, -1, -1).to(key.dtype)
        return torch.cat([sink[0], key], dim=2), torch.cat([sink[1], value], dim=2)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention output (batch, heads, seq, head_dim) and the feed-forward to x (batch, seq, d)."""
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(x.shape)))
        normed = self.mlp_norm(x)
        gate, up = (F.linear(normed, weight) for weight in self.gate_up.weight.chunk(2))
        finished: Tensor = x + self.dropout(self.down(F.silu(gate) * up))
        return finished
