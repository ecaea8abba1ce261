"""The input form that masked actions replace: an event is two tokens, its item and then its actions, as in HSTU.

The same weights, losses and candidates as the model; 2n tokens for n events, and no masking: every item token predicts
its actions, every action token the next item. For comparison in `quality_kuairand.py` alone, it cannot be served.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unipinrec.models.batches import Batch
from unipinrec.models.config import MISSING_TIMESTAMP_MS
from unipinrec.models.model import CandidateTokens, HistoryTokens, UniPinRec
from unipinrec.models.training.losses import Objective
from unipinrec.models.training.train import Trainer


class InterleavedModel(UniPinRec):
    """Runs histories as [item 1, actions 1, item 2, actions 2, ...]."""

    def joint(
        self, history: HistoryTokens, masked: Tensor, slate: CandidateTokens, *, dense_mask: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of the action tokens [B, n, d] and of the candidates [B, k, d]."""
        _, acted, shown = self.item_action_candidate(history, slate)
        return acted, shown

    def item_action_candidate(self, history: HistoryTokens, slate: CandidateTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Normed hidden states of item tokens, action tokens (each [B, n, d]) and candidates [B, k, d]."""
        hidden = torch.ones_like(history.vectors[..., 0])
        blank = replace(history, vectors=torch.zeros_like(history.vectors))
        items = self._event_tokens(history, hidden, before=None)
        actions = self._event_tokens(blank, torch.zeros_like(hidden), before=None)
        tokens = torch.stack([items, actions], dim=2).flatten(1, 2)
        known = torch.cat(
            [torch.full_like(history.timestamps_ms[:, :1], MISSING_TIMESTAMP_MS), history.timestamps_ms], dim=1
        )
        x = torch.cat([tokens, self._candidate_tokens(slate, known.gather(1, slate.cutoffs))], dim=1)
        events, cutoffs = tokens.shape[1], 2 * slate.cutoffs
        indices = torch.arange(events, device=x.device)[None].expand(len(x), -1)
        rotation = self.rotary(torch.cat([indices, cutoffs], dim=1))
        for block in self.layers():
            x = block.finish(x, self._joint_split(block, block.project(x, rotation), events, cutoffs))
        x = self.final_norm(x)
        return x[:, 0:events:2], x[:, 1:events:2], x[:, events:]


class InterleavedObjective(Objective):
    """The losses of `Objective`, at every event instead of masked and unmasked ones."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar losses, named as those of `Objective`."""
        assert isinstance(self.model, InterleavedModel)
        vectors, history, slate = self.inputs(batch)
        items, actions, shown = self.model.item_action_candidate(history, slate)
        real = torch.arange(items.shape[1], device=items.device) < batch.lengths[:, None]
        retrieval = self._retrieval(actions, vectors, replace(batch, masked=torch.zeros_like(batch.masked)))
        acted = self._actions(items[real], batch.history_actions[real], batch.history_known[real])
        at = batch.candidate_valid
        ranked = self._actions(shown[at], batch.candidate_actions[at], batch.candidate_known[at])
        loss = self.options.retrieval_weight * retrieval + self.options.ranking_weight * (acted + ranked)
        return {"loss": loss, "retrieval": retrieval, "history_actions": acted, "candidate_actions": ranked}


class InterleavedTrainer(Trainer):
    """Trains the interleaved form."""

    model_type = InterleavedModel
    objective_type = InterleavedObjective
