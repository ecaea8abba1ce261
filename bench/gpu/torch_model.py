"""The PyTorch model itself on a device: one shared encode against one pass over everything, and its times."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import milliseconds, spread
from floors import Load, floors_ms
from numpy.typing import NDArray

from unipinrec.models.config import ModelConfig
from unipinrec.models.model import CandidateTokens, HistoryTokens, UniPinRec

NOW_MS = 1_760_000_000_000
ROUNDS = 21
TOLERANCE = 1e-4
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(model: UniPinRec, config: ModelConfig, load: Load, device: str) -> dict[str, Any]:
    """Split = whole in fp32, and times in fp32 and bf16 (autocast) beside their floors."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = model.to(device).eval()
    history, slate = tokens(config, model, load, device)
    off = split_off(model, history, slate)
    problems = [] if off <= TOLERANCE else [f"split differs from whole by {off:.3g}, allowed {TOLERANCE:g}"]
    times: dict[str, Any] = {}
    for precision, dtype in TYPES.items():
        with torch.autocast(device, dtype, enabled=precision != "fp32"):
            took = encode_and_rank(model, history, slate)
        times[precision] = {"floors": floors_ms(config, precision, load), **took}
    return {"ran": True, "split": off, "times_ms": times, "problems": problems}


def tokens(config: ModelConfig, model: UniPinRec, load: Load, device: str) -> tuple[HistoryTokens, CandidateTokens]:
    """A batch of full histories, with candidates that see all of it."""
    generator = torch.Generator().manual_seed(0)
    batch, events, count = load.batch, load.events, load.candidates
    actions = len(model.vocabulary.actions)

    def vectors(width: int) -> torch.Tensor:
        made = torch.randn(batch, width, config.item_dim, generator=generator)
        return torch.nn.functional.normalize(made, dim=-1).to(device)

    gaps = torch.randint(0, 10**7, (batch, events), generator=generator)
    history = HistoryTokens(
        vectors=vectors(events),
        actions=(torch.rand(batch, events, actions, generator=generator) < 0.3).float().to(device),
        surfaces=torch.zeros(batch, events, dtype=torch.int64, device=device),
        timestamps_ms=(NOW_MS - gaps.flip(1).cumsum(1).flip(1)).to(device),
        lengths=torch.full((batch,), events, device=device),
    )
    slate = CandidateTokens(
        vectors=vectors(count),
        surfaces=torch.zeros(batch, count, dtype=torch.int64, device=device),
        timestamps_ms=torch.full((batch, count), NOW_MS, device=device),
        cutoffs=torch.full((batch, count), events, device=device),
    )
    return history, slate


@torch.inference_mode()
def split_off(model: UniPinRec, history: HistoryTokens, slate: CandidateTokens) -> float:
    """Largest difference of a logit between encoder and ranker, and one pass with the dense joint mask."""
    key_values, _ = model.encode(history)
    logits = model.rank(key_values, history.lengths, history.timestamps_ms[:, -1], slate)
    masked = torch.zeros(history.timestamps_ms.shape, device=history.vectors.device)
    _, whole = model.joint(history, masked, slate, dense_mask=True)
    return float((logits - model.action_heads(whole)).abs().max())


@torch.inference_mode()
def encode_and_rank(model: UniPinRec, history: HistoryTokens, slate: CandidateTokens) -> dict[str, Any]:
    """Milliseconds of each, waited for."""
    key_values, _ = model.encode(history)

    def encode() -> None:
        model.encode(history)
        wait(history.vectors.device)

    def rank() -> None:
        model.rank(key_values, history.lengths, history.timestamps_ms[:, -1], slate)
        wait(history.vectors.device)

    rounds: dict[str, NDArray[np.float64]] = {}
    for name, work in (("encode", encode), ("rank", rank)):
        work()
        rounds[name] = np.array([milliseconds(work) for _ in range(ROUNDS)])
    return {name: spread(values.tolist()) for name, values in rounds.items()}


def wait(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
