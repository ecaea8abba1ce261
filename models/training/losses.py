"""The one-stage objective: sampled softmax with logQ correction + masked-action and candidate BCE (paper Eq. 1-5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipinrec.models.batches import Batch
from unipinrec.models.data.item_features import ItemFeatures
from unipinrec.models.model import CandidateTokens, HistoryTokens, UniPinRec
from unipinrec.models.training.config import TrainConfig
from unipinrec.models.training.softmax_loss import softmax_loss


class Objective(nn.Module):
    """Model plus losses as one module, so that a distributed wrapper sees a single `forward`."""

    def __init__(self, model: UniPinRec, features: ItemFeatures, options: TrainConfig) -> None:
        super().__init__()
        self.model, self.options = model, options
        action_weights = torch.tensor(options.weights_of(model.vocabulary.actions))
        self.register_buffer("dense", torch.from_numpy(features.dense), persistent=False)
        self.register_buffer("categories", torch.from_numpy(features.categories), persistent=False)
        self.register_buffer("action_weights", action_weights, persistent=False)
        self.dense: Tensor
        self.categories: Tensor
        self.action_weights: Tensor

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar losses: `loss` (the sum to minimise), `retrieval`, `history_actions`, `candidate_actions`."""
        vectors, history, slate = self.inputs(batch)
        hidden, candidates = self.model.joint(history, batch.masked, slate)
        retrieval = self._retrieval(hidden, vectors, batch)
        at = batch.masked > 0
        masked = self._actions(hidden[at], batch.history_actions[at], batch.history_known[at])
        at = batch.candidate_valid
        shown = self._actions(candidates[at], batch.candidate_actions[at], batch.candidate_known[at])
        ranking = self.options.masked_weight * masked + shown
        loss = self.options.retrieval_weight * retrieval + self.options.ranking_weight * ranking
        return {"loss": loss, "retrieval": retrieval, "history_actions": masked, "candidate_actions": shown}

    def inputs(self, batch: Batch) -> tuple[Tensor, HistoryTokens, CandidateTokens]:
        """Vectors [U, E] of the batch's items, and its histories and candidates."""
        rows = batch.item_rows
        vectors = self.model.embed_items(rows, self.dense[rows], self.categories[rows])
        history = HistoryTokens(
            vectors=F.embedding(batch.history_items, vectors),
            actions=batch.history_actions,
            surfaces=batch.history_surfaces,
            timestamps_ms=batch.history_timestamps_ms,
            lengths=batch.lengths,
        )
        slate = CandidateTokens(
            vectors=F.embedding(batch.candidate_items, vectors),
            surfaces=batch.candidate_surfaces,
            timestamps_ms=batch.candidate_timestamps_ms,
            cutoffs=batch.cutoffs,
            logged=batch.candidate_logged,
        )
        return vectors, history, slate

    def _retrieval(self, hidden: Tensor, vectors: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy over the sampled items at unmasked positions whose next event is positive."""
        chosen = ((batch.targets >= 0) & (batch.masked == 0)).nonzero()
        if len(chosen) > self.options.max_targets:
            chosen = chosen[torch.randperm(len(chosen), device=chosen.device)[: self.options.max_targets]]
        at = chosen.unbind(1)
        outcomes = batch.target_actions[at] if self.model.config.outcome_conditioned else None
        queries = self.model.retrieval_head(hidden[at], outcomes)
        scale = self.model.log_scale.clamp(max=5.0).exp()
        labels = torch.searchsorted(batch.sampled_items, batch.targets[at])
        items = F.embedding(batch.sampled_items, vectors)
        return softmax_loss(scale * queries, items, batch.sampled_log_q, labels, self.options.label_smoothing)

    def _actions(self, hidden: Tensor, labels: Tensor, known: Tensor) -> Tensor:
        """Sum over actions of w_c times the mean BCE over the positions with a known action."""
        logits: Tensor = self.model.action_heads(hidden).float()
        if not len(hidden):
            return logits.sum() * 0.0  # 0, with gradients of 0
        losses = F.binary_cross_entropy_with_logits(logits, labels, weight=known, reduction="none").sum(0)
        return (losses / known.sum(0).clamp(min=1.0) * self.action_weights).sum()
