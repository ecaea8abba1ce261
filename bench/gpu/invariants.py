"""The five invariants over a running engine, without a test framework: seeded cases, largest difference of each.

split        encoder -> keys/values -> ranker, and the query, against one pass of PyTorch with the dense joint mask
extend       extending a past against encoding at once
independent  a candidate alone, in another order, and in a padded batch
golden       PyTorch's answers to the golden requests (fp32), or agreement with fp32 (other precisions)
same         the same request again, through a cache, alone and in a batch
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from unipinrec.models.model import CandidateTokens, HistoryTokens, UniPinRec
from unipinrec.runtime import Event, Recommender, RecommendOptions, Request
from unipinrec.runtime.graphs.engine import Engine, pad_histories
from unipinrec.runtime.requests import History

NOW_MS = 1_760_000_000_000
Differences = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Limits of the cases: their longest history and most candidates."""

    events: int
    candidates: int
    cases: int


def random_history(rng: np.random.Generator, engine: Engine, actions: int, events: int) -> History:
    """Events with gaps from a millisecond to a year; the first ones may have no time."""
    gaps = (10 ** rng.uniform(0, 10.5, events)).astype(np.int64)
    times = NOW_MS - gaps[::-1].cumsum()[::-1]
    times[: rng.integers(0, events + 1)] = -1
    return History(
        item_rows=rng.integers(0, len(engine.item_vectors), events),
        actions=(rng.random((events, actions)) < 0.4).astype(np.float32),
        surfaces=np.zeros(events, np.int64),
        timestamps_ms=times,
    )


def cases(engine: Engine, actions: int, shape: Shape) -> Iterator[tuple[list[History], NDArray[np.int64]]]:
    """Batches of histories with candidates for each; the first is a single one at the full shape."""
    rng = np.random.default_rng(0)
    for index in range(shape.cases):
        lengths = [shape.events] if index == 0 else rng.integers(1, shape.events + 1, rng.integers(1, 5)).tolist()
        count = shape.candidates if index == 0 else int(rng.integers(1, shape.candidates + 1))
        histories = [random_history(rng, engine, actions, length) for length in lengths]
        yield histories, rng.integers(0, len(engine.item_vectors), (len(lengths), count))


def ranked(engine: Engine, histories: list[History], candidates: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [B, k, C] through encoder and ranker."""
    encoded = engine.encode(pad_histories(histories))
    batch = len(histories)
    return engine.rank(encoded, candidates, np.zeros(batch, np.int64), np.full(batch, NOW_MS))


def split(engine: Engine, model: UniPinRec, actions: int, shape: Shape) -> Differences:
    """Largest difference of logits and queries from one pass of PyTorch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    model = model.to(device).eval()
    table = torch.from_numpy(np.array(engine.item_vectors)).to(device)
    logits_off, queries_off = 0.0, 0.0
    for histories, candidates in cases(engine, actions, shape):
        logits = ranked(engine, histories, candidates)
        encoded = engine.encode(pad_histories(histories))
        queries = engine.retrieve(encoded, np.zeros((len(histories), actions), np.float32))
        for row, history in enumerate(histories):
            whole_logits, whole_query = one_pass(model, table, history, candidates[row])
            logits_off = max(logits_off, float(np.abs(logits[row] - whole_logits).max()))
            queries_off = max(queries_off, float(np.abs(queries[row, 0] - whole_query).max()))
    return {"logits": logits_off, "queries": queries_off}


@torch.inference_mode()
def one_pass(
    model: UniPinRec, table: torch.Tensor, history: History, candidates: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits [k, C] and query [E] from one pass over [history ; candidates] with the dense joint mask."""
    events, count, device = len(history), len(candidates), table.device
    tokens = HistoryTokens(
        vectors=table[torch.from_numpy(history.item_rows).to(device)][None],
        actions=torch.from_numpy(history.actions).to(device)[None],
        surfaces=torch.from_numpy(history.surfaces).to(device)[None],
        timestamps_ms=torch.from_numpy(history.timestamps_ms).to(device)[None],
        lengths=torch.tensor([events], device=device),
    )
    slate = CandidateTokens(
        vectors=table[torch.from_numpy(candidates).to(device)][None],
        surfaces=torch.zeros(1, count, dtype=torch.int64, device=device),
        timestamps_ms=torch.full((1, count), NOW_MS, device=device),
        cutoffs=torch.full((1, count), events, device=device),
    )
    hidden, shown = model.joint(tokens, torch.zeros(1, events, device=device), slate, dense_mask=True)
    logits, query = model.action_heads(shown)[0], model.retrieve(hidden[:, -1])[0, 0]
    return logits.float().cpu().numpy(), query.float().cpu().numpy()


def extend(engine: Engine, actions: int, shape: Shape) -> Differences:
    """Largest difference between extending at a random event and encoding at once."""
    rng, state_off, values_off = np.random.default_rng(1), 0.0, 0.0
    for made, _ in cases(engine, actions, shape):
        histories = [history for history in made if len(history) > 1]
        if not histories:
            continue
        cuts = [max(1, len(history) - int(rng.integers(1, min(64, len(history))))) for history in histories]
        whole = engine.encode(pad_histories(histories))
        past = engine.encode(pad_histories([h.part(0, m) for h, m in zip(histories, cuts, strict=True)]))
        grown = engine.extend(past, pad_histories([h.part(m) for h, m in zip(histories, cuts, strict=True)]))
        state = np.abs(grown.last_hidden_state.numpy() - whole.last_hidden_state.numpy())
        state_off = max(state_off, float(state.max()))
        for old, new in zip(whole.key_values, grown.key_values, strict=True):
            before, after = old.numpy(), new.numpy()
            for row, length in enumerate(whole.lengths + engine.model.kv_prefix_slots):
                difference = np.abs(before[row, :, :length] - after[row, :, :length])
                values_off = max(values_off, float(difference.max()))
    return {"last_hidden_state": state_off, "key_values": values_off}


def independent(engine: Engine, actions: int, shape: Shape) -> Differences:
    """Largest difference of a score that other candidates, their order, or a padded batch make."""
    rng, off = np.random.default_rng(2), {"order": 0.0, "alone": 0.0, "batch": 0.0}
    for (history, *_), (rows, *_) in cases(engine, actions, shape):
        together = ranked(engine, [history], rows[None])[0]
        order = rng.permutation(len(rows))
        strangers = [random_history(rng, engine, actions, length) for length in (shape.events, 1)]
        batch = np.stack([rng.permutation(rows), rows, rng.permutation(rows)])
        others = {
            "order": (ranked(engine, [history], rows[order][None])[0], together[order]),
            "alone": (ranked(engine, [history], rows[None, :1])[0, 0], together[0]),
            "batch": (ranked(engine, [strangers[0], history, strangers[1]], batch)[1], together),
        }
        for name, (given, expected) in others.items():
            off[name] = max(off[name], float(np.abs(given - expected).max()))
    return off


def same(recommender: Recommender, events: tuple[Event, ...]) -> Differences:
    """Largest difference of a returned score: first and again through the cache, extended, and in a batch.

    `recommender` must have a cache.
    """
    options = RecommendOptions(now_ms=NOW_MS, candidates=100)

    def scores(user: str | None, count: int) -> dict[str, float]:
        return {item.item: item.score for item in recommender.recommend(events[:count], 20, options, user=user).items}

    whole = scores(None, len(events))
    scores("extended", len(events) - 3)
    others = {
        "miss": scores("again", len(events)),
        "hit": scores("again", len(events)),
        "extended": scores("extended", len(events)),
    }
    shorter = Request(history=events[: len(events) // 2], k=20, options=options)
    batch = recommender.recommend_many([shorter, Request(history=events, k=20, options=options)])
    others["batch"] = {item.item: item.score for item in batch[1].items}
    return {
        name: max(abs(whole[item] - score) if item in whole else np.inf for item, score in found.items())
        for name, found in others.items()
    }
