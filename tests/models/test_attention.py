from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor

from unipinrec.models.attention import (
    attend,
    attend_extension,
    attend_history,
    attend_valid,
    attend_with_own,
    extension_mask,
    joint_mask,
)
from unipinrec.models.config import AttentionForm

FORMS: tuple[AttentionForm, ...] = ("sink", "self")
KV_HEADS = (4, 2, 1)
HEADS, WIDTH = 4, 6


def _random(seed: int, heads: int, slots: int, batch: int = 2) -> Tensor:
    return torch.randn((batch, heads, slots, WIDTH), generator=torch.Generator().manual_seed(seed))


def _literal(query: Tensor, keys: Iterable[Tensor], values: Iterable[Tensor]) -> Tensor:
    """Softmax attention of one query [D] over a list of keys and values [D], straight from its definition."""
    key, value = (np.stack([t.numpy().astype(np.float64) for t in part]) for part in (keys, values))
    scores = key @ query.numpy().astype(np.float64) / math.sqrt(WIDTH)
    weights = np.exp(scores - scores.max())
    return torch.from_numpy(weights @ value / weights.sum()).float()


def _check(actual: Tensor, expected: dict[tuple[int, int, int], Tensor]) -> None:
    for at, value in expected.items():
        torch.testing.assert_close(actual[at], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_an_event_sees_the_past_and_a_sink_or_itself(form: AttentionForm, kv_heads: int) -> None:
    events = 5
    slots = events + (form == "sink")
    query, key, value = _random(1, HEADS, events), _random(2, kv_heads, slots), _random(3, kv_heads, slots)
    out = attend_history(form, query, key, value)
    expected = {}
    for b in range(2):
        for h in range(HEADS):
            for i in range(events):
                # sink: slot 0 and the events before i, which sit in slots 1 .. i; self: events 0 .. i
                g = h // (HEADS // kv_heads)
                expected[b, h, i] = _literal(query[b, h, i], key[b, g, : i + 1], value[b, g, : i + 1])
    _check(out, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_new_events_see_the_valid_past_and_the_new_ones_before(form: AttentionForm, kv_heads: int) -> None:
    slots, events, valid = 6, 3, [6, 2]
    query = _random(1, HEADS, events)
    past = _random(2, kv_heads, slots), _random(3, kv_heads, slots)
    new = _random(4, kv_heads, events), _random(5, kv_heads, events)
    index = torch.arange(events).expand(2, -1)
    out = attend_extension(query, past, new, extension_mask(form, index, torch.tensor(valid), slots, events))
    expected = {}
    for b in range(2):
        for h in range(HEADS):
            for i in range(events):
                g, own = h // (HEADS // kv_heads), i + (form == "self")
                key, value = (torch.cat([p[b, g, : valid[b]], n[b, g, :own]]) for p, n in zip(past, new, strict=True))
                expected[b, h, i] = _literal(query[b, h, i], key, value)
    _check(out, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_the_last_event_alone_sees_what_it_sees_among_all(form: AttentionForm, kv_heads: int) -> None:
    events, lengths = 5, [5, 2]
    slots = events + (form == "sink")
    query, key, value = _random(1, HEADS, events), _random(2, kv_heads, slots), _random(3, kv_heads, slots)
    among_all = attend_history(form, query, key, value)
    last = torch.stack([query[b, :, n - 1 : n] for b, n in enumerate(lengths)])
    out = attend_valid(last, key, value, torch.tensor(lengths))
    torch.testing.assert_close(out, torch.stack([among_all[b, :, n - 1 : n] for b, n in enumerate(lengths)]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("shared", [True, False])
def test_a_candidate_sees_its_visible_slots_and_itself_alone(form: AttentionForm, kv_heads: int, shared: bool) -> None:
    slots, candidates = 5, 3
    query = _random(1, HEADS, candidates)
    past = _random(2, kv_heads, slots), _random(3, kv_heads, slots)
    own = _random(4, kv_heads, candidates), _random(5, kv_heads, candidates)
    counts = torch.tensor([[4, 4, 4], [1, 1, 1]] if shared else [[4, 1, 5], [2, 3, 1]])
    visible = torch.arange(slots) < counts[:, :1, None] if shared else torch.arange(slots) < counts[:, :, None]
    if form == "self":
        out = attend_with_own(query, past, own, visible)
    else:
        out = attend(query, *past, visible[:, None].expand(-1, -1, candidates, -1))
    expected = {}
    for b in range(2):
        for h in range(HEADS):
            for c in range(candidates):
                g, seen = h // (HEADS // kv_heads), int(counts[b, c])
                key, value = (
                    torch.cat([p[b, g, :seen], o[b, g, c : c + 1][: form == "self"]])
                    for p, o in zip(past, own, strict=True)
                )
                expected[b, h, c] = _literal(query[b, h, c], key, value)
    _check(out, expected)


def test_a_candidate_without_visible_history_attends_to_itself() -> None:
    own = _random(4, 4, 2), _random(5, 4, 2)
    past = _random(2, 4, 3), _random(3, 4, 3)
    out = attend_with_own(_random(1, 4, 2), past, own, torch.zeros(2, 2, 3, dtype=torch.bool))
    torch.testing.assert_close(out, own[1])


def test_the_dense_mask_of_the_sink_form() -> None:
    mask = joint_mask("sink", 3, torch.tensor([[0, 2], [3, 1]]))
    # slots: sink, events 0 1 2, candidates 0 1
    assert mask.int().tolist() == [
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]],
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]],
    ]


def test_the_dense_mask_of_the_self_form() -> None:
    mask = joint_mask("self", 3, torch.tensor([[0, 2], [3, 1]]))
    # slots: events 0 1 2, candidates 0 1
    assert mask.int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [1, 1, 0, 0, 1]],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 1]],
    ]
