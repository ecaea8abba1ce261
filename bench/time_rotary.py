"""Rotary encoding by time beside the event index: of each head half of the pairs turn with the index, half with time.

The product of a query and a key then knows how long ago the event was, as well as how many events ago; a key still
depends on its own event alone, so that keys and values could be cached as they are. (After "Rotate Both Ways: Time-and-
Order RoPE", arXiv 2510.20455.) An event without a time does not turn by it. For comparison in `quality_kuairand.py`
alone; the model's own way is the index, and the hour, the weekday and the gap to the event before among the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from unipinrec.models.config import ModelConfig, Vocabulary
from unipinrec.models.layers import Rotary
from unipinrec.models.model import CandidateTokens, HistoryTokens, KeyValues, UniPinRec
from unipinrec.models.training.train import Trainer

SHORTEST_MS, LONGEST_MS = 60_000, 60 * 86_400_000


class TimeRotary(Rotary):
    """`Rotary` that knows the times of the tokens it is called for."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        turned = len(self.frequencies[1::2])
        periods = torch.logspace(math.log10(SHORTEST_MS), math.log10(LONGEST_MS), turned, dtype=torch.float64)
        self.register_buffer("periods_ms", periods.round().long(), persistent=False)
        self.periods_ms: Tensor
        self._times_ms: Tensor | None = None

    @contextmanager
    def at(self, times_ms: Tensor) -> Iterator[None]:
        """The requested positions [B, s] are those of tokens with these times [B, s], or of some of them."""
        self._times_ms = times_ms
        try:
            yield
        finally:
            self._times_ms = None

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See `Rotary`."""
        times = self._times_ms
        assert times is not None
        if times.shape != positions.shape:
            times = times.gather(1, positions)
        times = times.clamp(min=0)[..., None]
        # The remainder is taken of integers: a float32 of today's time is off by a minute.
        by_time = (times % self.periods_ms).float() * (2 * math.pi / self.periods_ms)
        by_index = positions.float()[..., None] * self.frequencies[::2]
        angles = torch.cat([by_index, by_time], dim=-1)[:, None]
        return angles.cos(), angles.sin()


class TimeRotaryModel(UniPinRec):
    """The model with this encoding; it encodes, ranks and trains, and does not extend."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config, vocabulary)
        self.rotary: TimeRotary = TimeRotary(config)

    def encode(self, history: HistoryTokens) -> tuple[KeyValues, Tensor]:
        """See `UniPinRec.encode`."""
        with self.rotary.at(history.timestamps_ms):
            return super().encode(history)

    def rank(self, past: KeyValues, past_lengths: Tensor, past_timestamps_ms: Tensor, slate: CandidateTokens) -> Tensor:
        """See `UniPinRec.rank`."""
        with self.rotary.at(slate.timestamps_ms):
            return super().rank(past, past_lengths, past_timestamps_ms, slate)

    def joint(
        self, history: HistoryTokens, masked: Tensor, slate: CandidateTokens, *, dense_mask: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See `UniPinRec.joint`."""
        with self.rotary.at(torch.cat([history.timestamps_ms, slate.timestamps_ms], dim=1)):
            return super().joint(history, masked, slate, dense_mask=dense_mask)


class TimeRotaryTrainer(Trainer):
    """Trains it."""

    model_type = TimeRotaryModel
