"""Runtime against PyTorch on real requests: logits of every candidate, and the final top-10 lists.

    python bench/parity.py CHECKPOINT BUNDLE --data DATA [--requests 200] [--seed 0]

PyTorch runs the one-pass forward with the dense joint mask over [history ; candidates], retrieves by exact search and
ranks; the runtime encodes, hands the keys and values on, retrieves (exact) and ranks. Exit code 1 if they differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import card, finish
from numpy.typing import NDArray

from unipinrec.models.checkpoint import load_checkpoint
from unipinrec.models.data.schema import read_dataset
from unipinrec.models.data.sequences import Sequences, sequences_of
from unipinrec.models.evaluate import item_vectors
from unipinrec.models.model import CandidateTokens, HistoryTokens, UniPinRec
from unipinrec.runtime import Event, Recommender, RecommendOptions

TOLERANCE = 1e-4
CANDIDATES = 200
NOW_AFTER_MS = 60_000


def draw(data: Sequences, longest: int, count: int, seed: int) -> list[NDArray[np.int64]]:
    """Random users, each with a random stretch of real events."""
    rng = np.random.default_rng(seed)
    users = rng.choice(np.flatnonzero(np.diff(data.event_start) > 0), count)
    spans = []
    for user in users:
        end = int(rng.integers(data.event_start[user] + 1, data.event_start[user + 1] + 1))
        spans.append(np.arange(max(int(data.event_start[user]), end - longest), end))
    return spans


@torch.inference_mode()
def in_pytorch(
    model: UniPinRec, data: Sequences, span: NDArray[np.int64], table: torch.Tensor, now_ms: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Candidate rows by exact search, and their logits, from one dense joint pass."""
    rows = torch.from_numpy(data.rows[span])
    history = HistoryTokens(
        vectors=table[rows][None],
        actions=torch.from_numpy(data.actions[span].astype(np.float32))[None],
        surfaces=torch.from_numpy(data.surfaces[span])[None],
        timestamps_ms=torch.from_numpy(data.timestamps_ms[span])[None],
        lengths=torch.tensor([len(span)]),
    )
    none_masked = torch.zeros(1, len(span))

    def slate(candidates: torch.Tensor) -> CandidateTokens:
        shape = (1, len(candidates))
        return CandidateTokens(
            vectors=table[candidates][None],
            surfaces=torch.zeros(shape, dtype=torch.int64),
            timestamps_ms=torch.full(shape, now_ms),
            cutoffs=torch.full(shape, len(span)),
        )

    hidden, _ = model.joint(history, none_masked, slate(rows[:1]), dense_mask=True)
    similarity = table @ model.retrieve(hidden[:, -1])[0, 0]
    similarity[rows] = -torch.inf
    unseen = len(table) - len(rows.unique())
    candidates = similarity.topk(min(CANDIDATES, unseen)).indices
    _, ranked = model.joint(history, none_masked, slate(candidates), dense_mask=True)
    return candidates.numpy(), model.action_heads(ranked)[0].numpy()


def as_events(data: Sequences, span: NDArray[np.int64], model: UniPinRec) -> list[Event]:
    """The same events as a caller of the runtime would send them."""
    vocabulary = model.vocabulary
    return [
        Event(
            item=data.item_ids[data.rows[i]],
            actions=tuple(name for name, bit in zip(vocabulary.actions, data.actions[i], strict=True) if bit),
            surface=vocabulary.surfaces[data.surfaces[i]],
            timestamp_ms=int(data.timestamps_ms[i]) if data.timestamps_ms[i] >= 0 else None,
        )
        for i in span
    ]


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Compare request by request."""
    loaded = load_checkpoint(options.checkpoint)
    model, data = loaded.model, sequences_of(read_dataset(options.data))
    recommender = Recommender.load(options.bundle)
    table = item_vectors(model, data)
    positive = np.array([name in model.vocabulary.positive_actions for name in model.vocabulary.actions])
    differences, same_lists, lengths = [], 0, []
    for span in draw(data, model.config.max_history, options.requests, options.seed):
        now_ms = int(data.timestamps_ms[span[-1]]) + NOW_AFTER_MS if data.timestamps_ms[span[-1]] >= 0 else -1
        candidates, logits = in_pytorch(model, data, span, table, now_ms)
        history, given_now = as_events(data, span, model), now_ms if now_ms >= 0 else None
        asked = RecommendOptions(candidates=CANDIDATES, exact=True, now_ms=given_now)
        served = recommender.score(history, [data.item_ids[row] for row in candidates], asked)
        differences.append(float(np.abs(served - logits).max()))
        probabilities = 1.0 / (1.0 + np.exp(-logits[:, positive].astype(np.float64)))
        best = candidates[np.lexsort((candidates, -probabilities.sum(1)))[:10]]
        slate = recommender.recommend(history, 10, asked)
        same_lists += [item.item for item in slate.items] == [data.item_ids[row] for row in best]
        lengths.append(len(span))
    return {
        "requests": options.requests,
        "history_events": {"min": min(lengths), "median": float(np.median(lengths)), "max": max(lengths)},
        "candidates": CANDIDATES,
        "max_abs_diff_logits": max(differences),
        "identical_top10": same_lists,
        "allowed": TOLERANCE,
    }


def main() -> None:
    """Compare and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = compare(options)
    finish({**card("parity"), "data": read_dataset(options.data).spec.name, **result}, "parity")
    sys.exit(result["max_abs_diff_logits"] > TOLERANCE or result["identical_top10"] < result["requests"])


if __name__ == "__main__":
    main()
