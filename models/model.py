"""The model: one causal transformer that encodes a history once, then retrieves and ranks from its keys and values.

    encode   a history               -> per-layer keys/values, last hidden state
    extend   those + new events      -> the new events' keys/values, last hidden state
    retrieve last hidden state       -> query vectors
    rank     keys/values + candidates -> action logits
    joint    history and candidates in one pass, for training; the four above must give the same

The first four have the signatures of the exported graphs. Histories are right-padded; `lengths` counts real events.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipinrec.models import attention
from unipinrec.models.config import MISSING_TIMESTAMP_MS, ModelConfig, Vocabulary
from unipinrec.models.embedders import ItemEmbedder, TokenEmbedder, previous_timestamps
from unipinrec.models.layers import Block, Rotary

KeyValues = list[tuple[Tensor, Tensor]]
INITIAL_TEMPERATURE = 0.05


@dataclass(frozen=True, kw_only=True)
class HistoryTokens:
    """Raw inputs of n events per row: vectors [B,n,E] f32, actions [B,n,C] f32, the rest [B,n] i64, lengths [B] i64."""

    vectors: Tensor
    actions: Tensor
    surfaces: Tensor
    timestamps_ms: Tensor
    lengths: Tensor


@dataclass(frozen=True, kw_only=True)
class CandidateTokens:
    """Raw inputs of k candidates per row, which may belong to several slates.

    vectors [B,k,E] f32; surfaces, timestamps_ms [B,k] i64; cutoffs [B,k] i64: number of events that each may see;
    logged [B,k] f32, in training alone: 1 for candidates that are events of the history. None means all 0.
    """

    vectors: Tensor
    surfaces: Tensor
    timestamps_ms: Tensor
    cutoffs: Tensor
    logged: Tensor | None = None


class ActionHeads(nn.Module):
    """One two-layer MLP per action (paper 3.1.1), computed side by side: (..., d) -> logits (..., C)."""

    def __init__(self, config: ModelConfig, num_actions: int) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.up = nn.Linear(config.hidden_size, num_actions * config.hidden_size)
        self.down = nn.Parameter(torch.empty(num_actions, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_actions))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., d) to logits (..., C)."""
        inner = torch.unflatten(F.silu(self.up(hidden)), -1, (self.num_actions, -1))
        return (inner * self.down).sum(-1) + self.bias


class RetrievalHead(nn.Module):
    """Last hidden state [B, d], optionally with outcomes to aim at [B, C], to one query [B, 1, E] of unit length."""

    def __init__(self, config: ModelConfig, num_actions: int) -> None:
        super().__init__()
        d = config.hidden_size
        self.outcome = nn.Linear(num_actions, d, bias=False) if config.outcome_conditioned else None
        self.mlp = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, config.item_dim))

    def forward(self, hidden: Tensor, outcomes: Tensor | None = None) -> Tensor:
        """Map hidden (..., d) to unit queries (..., E); `outcomes` (..., C) f32 if the model is conditioned on them."""
        if self.outcome is not None:
            if outcomes is None:
                raise ValueError("this model's queries are conditioned on outcomes; pass outcomes")
            hidden = hidden + self.outcome(outcomes)
        return F.normalize(self.mlp(hidden).float(), dim=-1)


class UniPinRec(nn.Module):
    """The UniPinRec model (arXiv 2606.00422, section 3)."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.item_embedder = ItemEmbedder(config, vocabulary)
        self.token_embedder = TokenEmbedder(config, vocabulary)
        self.rotary = Rotary(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.action_heads = ActionHeads(config, len(vocabulary.actions))
        self.retrieval_head = RetrievalHead(config, len(vocabulary.actions))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(INITIAL_TEMPERATURE)))
        self.apply(_initialise)
        self._initialise_residuals()

    def _initialise_residuals(self) -> None:
        nn.init.normal_(self.action_heads.down, std=0.02)
        for block in self.layers():
            for branch in (block.out, block.down):
                nn.init.normal_(branch.weight, std=(2 * self.config.num_layers * branch.in_features) ** -0.5)
            if block.sink is not None:
                nn.init.normal_(block.sink, std=0.02)

    def layers(self) -> list[Block]:
        """The transformer blocks, first to last."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def embed_items(self, rows: Tensor, dense: Tensor, categories: Tensor) -> Tensor:
        """Item vectors [N, E]; see `ItemEmbedder.forward`."""
        vectors: Tensor = self.item_embedder(rows, dense, categories)
        return vectors

    def encode(self, history: HistoryTokens) -> tuple[KeyValues, Tensor]:
        """Encode histories: per-layer (key, value) [B, H_kv, slots, D], and the last hidden state [B, d]."""
        x = self._event_tokens(history, torch.zeros_like(history.timestamps_ms).float(), before=None)
        rotation = self.rotary(_positions(history.surfaces))
        cache: KeyValues = []
        *blocks, final = self.layers()
        for block in blocks:
            query, key, value = block.project(x, rotation)
            cache.append(block.with_prefix(key, value))
            x = block.finish(x, attention.attend_history(self.config.attention, query, *cache[-1]))
        # Behind the last layer's keys and values, only the last event is ever used.
        cache.append(final.with_prefix(*final.key_value(x, rotation)))
        x, position = _pick(x, history.lengths - 1)
        # The last event sees all slots before its own, and without a sink its own slot too.
        attended = attention.attend_valid(final.query(x, self.rotary(position)), *cache[-1], history.lengths)
        return cache, self.final_norm(final.finish(x, attended)[:, 0])

    def extend(
        self, history: HistoryTokens, past: KeyValues, past_lengths: Tensor, past_timestamps_ms: Tensor
    ) -> tuple[KeyValues, Tensor]:
        """Encode m new events after a cached past.

        Args:
            history: The new events alone.
            past: Per-layer keys/values of the past, right-padded to p slots.
            past_lengths: [B] i64, number of *events* in each row's past.
            past_timestamps_ms: [B] i64, the time of each row's last cached event.

        Returns:
            The new events' per-layer (key, value) [B, H_kv, m, D], and the last hidden state [B, d].
        """
        x = self._event_tokens(history, torch.zeros_like(history.timestamps_ms).float(), before=past_timestamps_ms)
        rotation = self.rotary(_positions(history.surfaces) + past_lengths[:, None])
        slots = past_lengths + self.config.kv_prefix_slots
        form, sizes = self.config.attention, (past[0][0].shape[2], x.shape[1])
        visible = attention.extension_mask(form, _positions(history.surfaces), slots, *sizes)
        added: KeyValues = []
        *blocks, final = self.layers()
        for block, cached in zip(blocks, past, strict=False):
            query, key, value = block.project(x, rotation)
            added.append((key, value))
            x = block.finish(x, attention.attend_extension(query, cached, (key, value), visible))
        added.append(final.key_value(x, rotation))
        x, position = _pick(x, history.lengths - 1)
        visible = attention.extension_mask(form, position, slots, *sizes)
        query = final.query(x, self.rotary(position + past_lengths[:, None]))
        attended = attention.attend_extension(query, past[-1], added[-1], visible)
        return added, self.final_norm(final.finish(x, attended)[:, 0])

    def retrieve(self, last_hidden_state: Tensor, outcomes: Tensor | None = None) -> Tensor:
        """Query vectors [B, 1, E] of unit length from last hidden states [B, d] (and outcomes [B, C])."""
        query: Tensor = self.retrieval_head(last_hidden_state, outcomes)
        return query[:, None]

    def rank(self, past: KeyValues, past_lengths: Tensor, past_timestamps_ms: Tensor, slate: CandidateTokens) -> Tensor:
        """Action logits [B, k, C] of candidates that attend to a cached history (paper 3.3.2).

        Args:
            past: Per-layer keys/values, right-padded.
            past_lengths: [B] i64, events per row.
            past_timestamps_ms: [B] i64, time of each row's last event.
            slate: The candidates. `cutoffs` is not read: every candidate sees the row's whole past.
        """
        count = slate.vectors.shape[1]
        x = self._candidate_tokens(slate, past_timestamps_ms[:, None].expand(-1, count))
        rotation = self.rotary(past_lengths[:, None].expand(-1, count))
        valid = past_lengths + self.config.kv_prefix_slots
        for block, cached in zip(self.layers(), past, strict=True):
            x = block.finish(x, self._attend_past(block, x, rotation, cached, valid))
        logits: Tensor = self.action_heads(self.final_norm(x))
        return logits

    def _attend_past(
        self, block: Block, x: Tensor, rotation: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor], valid: Tensor
    ) -> Tensor:
        """Attention of candidates over the `valid` [B] slots of the past and, in the "self" form, themselves."""
        if self.config.attention == "sink":
            return attention.attend_valid(block.query(x, rotation), *past, valid)
        query, key, value = block.project(x, rotation)
        slots = torch.arange(past[0].shape[2], device=x.device)
        return attention.attend_with_own(query, past, (key, value), (slots[None, :] < valid[:, None])[:, None])

    def joint(
        self, history: HistoryTokens, masked: Tensor, slate: CandidateTokens, *, dense_mask: bool = False
    ) -> tuple[Tensor, Tensor]:
        """One pass over [history ; candidates]: normed hidden states [B, n, d] and [B, k, d].

        Args:
            history: The events; their actions are hidden where `masked`.
            masked: [B, n] f32, 1 where Masked Action Modeling hides the actions; these events carry a mark.
            slate: Candidates of one or more slates; each sees the events before its cutoff.
            dense_mask: Attend through one dense (n + k) x (slots) mask instead of two calls. The result is the same,
                and slower; tests use it as the reference.
        """
        events = history.vectors.shape[1]
        last_times = F.pad(history.timestamps_ms, (1, 0), value=MISSING_TIMESTAMP_MS).gather(1, slate.cutoffs)
        event_tokens = self._event_tokens(history, masked, before=None)
        x = torch.cat([event_tokens, self._candidate_tokens(slate, last_times)], dim=1)
        if self.token_embedder.logged is not None:
            logged = torch.zeros_like(slate.vectors[..., 0]) if slate.logged is None else slate.logged
            x = x + torch.cat([masked, logged], dim=1)[..., None] * self.token_embedder.logged
        rotation = self.rotary(torch.cat([_positions(history.surfaces), slate.cutoffs], dim=1))
        attend_joint = self._joint_dense if dense_mask else self._joint_split
        for block in self.layers():
            query, key, value = block.project(x, rotation)
            x = block.finish(x, attend_joint(block, (query, key, value), events, slate.cutoffs))
        x = self.final_norm(x)
        return x[:, :events], x[:, events:]

    def _joint_dense(self, block: Block, qkv: tuple[Tensor, Tensor, Tensor], events: int, cutoffs: Tensor) -> Tensor:
        query, key, value = qkv
        mask = attention.joint_mask(self.config.attention, events, cutoffs)
        return attention.attend(query, *block.with_prefix(key, value), mask[:, None])

    def _joint_split(self, block: Block, qkv: tuple[Tensor, Tensor, Tensor], events: int, cutoffs: Tensor) -> Tensor:
        form = self.config.attention
        (past_query, query), (past_key, key), (past_value, value) = (
            t.split_with_sizes([events, cutoffs.shape[1]], 2) for t in qkv
        )
        past = block.with_prefix(past_key, past_value)
        slots = torch.arange(past[0].shape[2], device=query.device)
        visible = slots < (cutoffs + self.config.kv_prefix_slots)[:, :, None]
        if form == "sink":
            attended = attention.attend(query, *past, visible[:, None])
        else:
            attended = attention.attend_with_own(query, past, (key, value), visible)
        return torch.cat([attention.attend_history(form, past_query, *past), attended], dim=2)

    def _event_tokens(self, history: HistoryTokens, masked: Tensor, before: Tensor | None) -> Tensor:
        times = history.timestamps_ms, previous_timestamps(history.timestamps_ms, before)
        token: Tensor = self.token_embedder(history.vectors, history.actions, masked, history.surfaces, times)
        return token

    def _candidate_tokens(self, slate: CandidateTokens, previous_ms: Tensor) -> Tensor:
        masked = torch.ones_like(slate.vectors[..., 0])
        actions = masked[..., None].expand(-1, -1, len(self.vocabulary.actions)) * 0.0
        times = slate.timestamps_ms, previous_ms
        token: Tensor = self.token_embedder(slate.vectors, actions, masked, slate.surfaces, times)
        return token


def _pick(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row, (batch, 1, d), and its index, [B, 1]."""
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[-1])), index[:, None]


def _positions(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device)[None].expand(like.shape[0], -1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        # By fan-in: narrow models learn the order of events more than twice as fast as with a fixed 0.02.
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
