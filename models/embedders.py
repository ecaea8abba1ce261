"""From raw inputs to tokens: the item embedder, and the token of an event or a candidate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipinrec.models.config import DAY_MS, MISSING_TIMESTAMP_MS, ModelConfig, Vocabulary

TIME_FEATURES = 7


class ItemEmbedder(nn.Module):
    """Item vectors [N, E] of unit length from an id and optional content, shared by both heads (paper 3.0.1).

    Row 0 of the id table stands for an item that training did not know. In training, an item with content gets it with
    probability `id_dropout`, so that the row is trained.
    """

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.ids = nn.Embedding(vocabulary.num_items + 1, config.id_dim)
        self.words = nn.ModuleList(
            nn.Embedding(len(words) + 1, config.feature_dim) for words in vocabulary.categories.values()
        )
        self.register_buffer("dense_mean", torch.zeros(vocabulary.dense_width))
        self.register_buffer("dense_std", torch.ones(vocabulary.dense_width))
        self.dense_mean: Tensor
        self.dense_std: Tensor
        width = config.id_dim + vocabulary.dense_width + config.feature_dim * len(vocabulary.categories)
        inner = 2 * config.item_dim
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, config.item_dim))
        self.residual = config.item_form == "residual"
        self.category_dropout = config.category_dropout
        self.id_dropout = config.id_dropout if vocabulary.dense_width or vocabulary.categories else 0.0

    def forward(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        """Embed items.

        Args:
            rows: [N] i64 catalogue rows; -1 = an item that training did not know.
            dense: [N, F] f32 raw dense features; this method standardises them.
            categories: [N, number of categorical features] i64 codes; 0 = unknown.

        Returns:
            [N, E] f32, each of unit length.
        """
        ids = rows + 1
        if self.training and self.id_dropout:
            ids = ids * (torch.rand(ids.shape, device=ids.device) >= self.id_dropout)
        if self.training and self.category_dropout:
            kept = torch.rand(categories.shape, device=categories.device) >= self.category_dropout
            categories = categories * kept
        parts = [self.ids(ids), (dense - self.dense_mean) / self.dense_std]
        parts += [table(categories[:, i]) for i, table in enumerate(self.words)]
        vectors = self.mlp(torch.cat(parts, dim=-1)).float()
        return F.normalize(vectors + parts[0] if self.residual else vectors, dim=-1)


class TokenEmbedder(nn.Module):
    """[item vector ; action embedding ; surface ; time] on the feature axis -> input projector -> d (paper 3.1.1).

    The action embedding is linear over C + 1 bits; the extra bit is [MASK], so that "unknown" differs from "none".
    Training adds `logged` to events whose actions it hides (`ModelConfig.mark_masked`); None without such a mark.
    """

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        width = config.feature_dim
        self.actions = nn.Linear(len(vocabulary.actions) + 1, width)
        self.surfaces = nn.Embedding(len(vocabulary.surfaces), width)
        self.time = nn.Linear(TIME_FEATURES, width)
        self.projector = nn.Linear(config.item_dim + 3 * width, config.hidden_size)
        self.dropout = nn.Dropout(config.token_dropout)
        self.logged = nn.Parameter(torch.zeros(config.hidden_size)) if config.mark_masked else None
        self.item_scale = math.sqrt(config.item_dim)

    def forward(
        self, vectors: Tensor, actions: Tensor, masked: Tensor, surfaces: Tensor, times: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Make tokens.

        Args:
            vectors: [B, s, E] f32 item vectors.
            actions: [B, s, C] f32 multi-hot; ignored where masked.
            masked: [B, s] f32, 1 where the action is hidden behind [MASK].
            surfaces: [B, s] i64.
            times: (timestamps_ms, previous_timestamps_ms), each [B, s] i64.

        Returns:
            [B, s, d] f32.
        """
        bits = torch.cat([actions * (1.0 - masked)[..., None], masked[..., None]], dim=-1)
        parts = [
            vectors * self.item_scale,
            self.actions(bits),
            self.surfaces(surfaces),
            self.time(time_features(*times)),
        ]
        token: Tensor = self.dropout(self.projector(torch.cat(parts, dim=-1)))
        return token


def previous_timestamps(timestamps_ms: Tensor, before: Tensor | None = None) -> Tensor:
    """The timestamp of the event before each of [B, s]; `before` [B] precedes the first, missing if None."""
    if before is None:
        before = torch.full_like(timestamps_ms[:, 0], MISSING_TIMESTAMP_MS)
    return torch.cat([before[:, None], timestamps_ms[:, :-1]], dim=1)


def time_features(timestamps_ms: Tensor, previous_ms: Tensor) -> Tensor:
    """Features [B, s, 7] f32 of raw times [B, s] i64: hour, day of week, log gap; a missing time is its own value.

    Nothing here depends on later events or on the time of the request, so the key/values of an event can be kept.
    """
    known = (timestamps_ms >= 0).float()
    gap_known = known * (previous_ms >= 0).float()
    # Clamped as a float: ONNX Runtime's int64 Clip, Max and Min are wrong from 2^31 to 2^32, here 25 to 50 days.
    gap_s = (timestamps_ms - previous_ms).float().clamp(min=0) / 1000.0
    day = (timestamps_ms % DAY_MS).float() * (2.0 * math.pi / DAY_MS)
    week = (timestamps_ms % (7 * DAY_MS)).float() * (2.0 * math.pi / (7 * DAY_MS))
    log_gap = torch.log1p(gap_s) / 10.0
    cycles = [day.sin() * known, day.cos() * known, week.sin() * known, week.cos() * known]
    return torch.stack([*cycles, log_gap * gap_known, 1.0 - known, 1.0 - gap_known], dim=-1)
