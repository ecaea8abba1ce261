"""Cross-entropy over many items, in chunks: the [targets, items] logits and their gradient never exist as a whole.

Memory limits a full softmax over a catalogue, not arithmetic. Each chunk of rows becomes its share of the gradient
while it is still in the cache. So memory stays flat, and no row is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}  # 2 MB of logits stay in a core's cache
MIN_ROWS = 64


def softmax_loss(queries: Tensor, items: Tensor, log_q: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of softmax(queries @ items.T - log_q), differentiable in queries and items.

    Args:
        queries: [T, E] f32, temperature applied. If T is 0, the loss is 0 with gradients of 0.
        items: [S, E] f32.
        log_q: [S] f32, the log of each item's expected count in the sample (paper Eq. 1); no gradient.
        labels: [T] i64 in [0, S).
        smoothing: Share of each target's probability that is spread evenly over the S items.
    """
    with torch.autocast(queries.device.type, enabled=False):
        apply: Callable[..., Tensor] = _SoftmaxLoss.apply
        return apply(queries.float(), items.float(), log_q, labels, smoothing)


class _SoftmaxLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, which holds each chunk's logits."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, items: Tensor, log_q: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        count = max(len(queries), 1)
        loss = queries.new_zeros(())
        grad_queries, grad_items = torch.zeros_like(queries), torch.zeros_like(items)
        rows = max(MIN_ROWS, CHUNK_ELEMENTS.get(queries.device.type, 1 << 24) // len(items))
        for begin in range(0, len(queries), rows):
            part, target = queries[begin : begin + rows], labels[begin : begin + rows, None]
            logs = torch.log_softmax(torch.addmm(-log_q, part, items.T), dim=1)
            loss -= (1.0 - smoothing) * logs.gather(1, target).sum() + smoothing * logs.mean(1).sum()
            slope = logs.exp_().sub_(smoothing / len(items))
            slope.scatter_add_(1, target, slope.new_full(target.shape, smoothing - 1.0))
            grad_queries[begin : begin + rows] = slope @ items
            grad_items.addmm_(slope.T, part)
        ctx.save_for_backward(grad_queries.div_(count), grad_items.div_(count))
        return loss / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_queries, grad_items = ctx.saved_tensors
        return grad_queries * grads[0], grad_items * grads[0], None, None, None
