"""Shared by the examples of own models: a made-up log, a training loop, and a comparison of lists with the model's.

A model here is a module that has `states`, the hidden state of each event, beside the methods of the contract.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unipinrec.export.protocol import Events
from unipinrec.runtime import CacheOptions, Event, Recommender

ITEM_IDS = [f"item-{row}" for row in range(200)]
LONGEST = 20  # events of a history


def made_up_log(users: int, events: int = LONGEST) -> tuple[Tensor, Tensor]:
    """Item rows and times in ms, [users, events] i64: users walk along a ring of items, and step back after a pause."""
    pauses = torch.rand(users, events) < 0.2
    steps = torch.where(pauses, -3, torch.randint(1, 3, (users, events)))
    rows = (torch.randint(0, len(ITEM_IDS), (users, 1)) + steps.cumsum(1)) % len(ITEM_IDS)
    gaps = torch.where(pauses, 3_600_000, torch.randint(1_000, 60_000, (users, events)))
    return rows, 1_760_000_000_000 + gaps.cumsum(1)


def catalogue(model: Any) -> Tensor:
    """Vectors of all items, [items, width]; they have no features."""
    none = torch.zeros(len(ITEM_IDS), 0)
    vectors: Tensor = model.embed_items(torch.arange(len(ITEM_IDS)), none, none.long())
    return vectors


def events_of(vectors: Tensor, rows: Tensor, times_ms: Tensor) -> Events:
    """Histories as a model gets them, all of the same length."""
    users, events = rows.shape
    return Events(
        item_vectors=vectors[rows],
        actions=torch.ones(users, events, 1),
        surfaces=torch.zeros(users, events, dtype=torch.int64),
        timestamps_ms=times_ms,
        lengths=torch.full((users,), events),
    )


def train(model: Any, steps: int, scale: float = 1.0) -> None:
    """Minimise the cross-entropy of each next item, whose logit is its similarity to the query times `scale`."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        vectors, (rows, times_ms) = catalogue(model), made_up_log(64, LONGEST + 1)
        states = model.states(events_of(vectors, rows[:, :-1], times_ms[:, :-1]))
        queries = model.retrieve(states.flatten(0, 1), None)[:, 0]
        loss = F.cross_entropy(scale * queries @ vectors.T, rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss:.1f} after {steps} steps; a guess has {torch.tensor(len(ITEM_IDS)).log():.1f}")


@torch.no_grad()
def compare(bundle: Path, model: Any, users: int = 10) -> None:
    """Serve a bundle to users whose histories grow, and compare each list and its scores with the model's own."""
    (rows, times_ms), vectors = made_up_log(users), catalogue(model)
    worst, same, kinds = 0.0, 0, dict[str, int]()
    with Recommender.load(bundle, cache=CacheOptions(budget_bytes=64 << 20, dtype="fp32")) as recommender:
        for user in range(users):
            for length in (3, 4, 12, LONGEST):
                part, times = rows[user, :length], times_ms[user, :length]
                state = model.states(events_of(vectors, part[None], times[None]))[:, -1]
                scores = vectors @ model.retrieve(state, None)[0, 0]
                scores[part] = -torch.inf  # lists hold nothing of the history
                best = scores.topk(10)
                history = [
                    Event(item=ITEM_IDS[row], actions=("click",), timestamp_ms=time)
                    for row, time in zip(part.tolist(), times.tolist(), strict=True)
                ]
                slate = recommender.recommend(history, k=10, user=f"user-{user}")
                same += [item.item for item in slate.items] == [ITEM_IDS[row] for row in best.indices]
                served = torch.tensor([item.score for item in slate.items])
                worst = max(worst, float((served - best.values).abs().max()))
                kinds[slate.kv] = kinds.get(slate.kv, 0) + 1
    print(f"{same} of {4 * users} lists are the model's own; scores differ by less than 1e-4: {worst < 1e-4}; {kinds}")
