"""A module as `contract.py` calls it: its items, its histories, padding full of junk, and differences in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unipinrec.export.cases import CaseMaker, at_last
from unipinrec.export.protocol import Candidates, Events, ExportSource, Past
from unipinrec.runtime.requests import YEAR_10000_MS

# The bound of parity, for each tensor's values up to 1 in size, and in proportion beyond. Sums in another order, as of
# another width, move an fp32 result by some 1e-6 of the largest value; a fault that moves it by less than 1e-4 also
# changes an answer by less than the invariants allow.
TOLERANCE = 1e-4
EVENTS, CANDIDATES, ITEMS, EXTRA = 24, 7, 64, 5
JUNK = 1e3
LONGEST_REASON = 200
Outputs = dict[str, Tensor]


class ProbeError(Exception):
    """A method raised, or returned something that cannot be compared."""


@dataclass(frozen=True)
class EncodedHistories:
    """What `encode` or `extend` returned."""

    key_values: list[tuple[Tensor, Tensor]]
    hidden: Tensor

    def outputs(self) -> Outputs:
        """All tensors by a name for messages."""
        parts = ("key", "value")
        layers = enumerate(self.key_values)
        named = {f"{part} of layer {i}": tensor for i, pair in layers for part, tensor in zip(parts, pair, strict=True)}
        return {"hidden state": self.hidden, **named}

    def part(self, row: int, begin: int, end: int) -> Outputs:
        """The hidden state of a row, and its keys and values in slots [begin, end)."""
        one = slice(row, row + 1)
        return {
            name: tensor[one, :, begin:end] if tensor.ndim == 4 else tensor[one]
            for name, tensor in self.outputs().items()
        }


@dataclass(frozen=True)
class State:
    """All that a ranker may read of encoded histories."""

    past: Past
    hidden: Tensor

    def row(self, row: int, slots: int) -> State:
        """One history alone, without padding."""
        one = slice(row, row + 1)
        cut = [(key[one, :, :slots], value[one, :, :slots]) for key, value in self.past.key_values]
        past = Past(key_values=cut, lengths=self.past.lengths[one], timestamps_ms=self.past.timestamps_ms[one])
        return State(past, self.hidden[one])

    def with_junk(self, prefix: int) -> State:
        """The same histories with more slots, and large numbers in all slots that hold no event."""

        def spoiled(tensor: Tensor) -> Tensor:
            wide = torch.nn.functional.pad(tensor, (0, 0, 0, EXTRA))
            empty = torch.arange(wide.shape[2]) >= (self.past.lengths + prefix)[:, None]
            return torch.where(empty[:, None, :, None], JUNK, wide)

        pairs = [(spoiled(key), spoiled(value)) for key, value in self.past.key_values]
        return replace(self, past=replace(self.past, key_values=pairs))


class Probe:
    """The module as the checks call it, and the histories, items and results that they share."""

    def __init__(self, source: ExportSource) -> None:
        self.source, self.spec = source, source.model
        self.rows = torch.linspace(0, len(source.item_ids) - 1, min(ITEMS, len(source.item_ids))).long()
        # Well within `max_history`, whose edge has a check of its own.
        self.longest = min(EVENTS, max(2, self.spec.max_history // 2))
        self.lengths = [self.longest, max(2, self.longest // 3), 1]
        self.extra = min(EXTRA, self.spec.max_history - self.longest)
        self.items = torch.arange(CANDIDATES) % len(self.rows)
        self._alone: dict[tuple[int, int], EncodedHistories] = {}

    @cached_property
    def vectors(self) -> Tensor:
        """The item vectors of `rows`."""
        return self.embed(self.rows)

    @cached_property
    def events(self) -> Events:
        """Random histories of `lengths`."""
        return self.histories(self.lengths)

    @cached_property
    def encoded(self) -> EncodedHistories:
        """What `encode` gives for them."""
        return self.encode(self.events)

    @cached_property
    def state(self) -> State:
        """The same as a past."""
        return state_of(self.encoded, self.events)

    @cached_property
    def step(self) -> tuple[Events, Past]:
        """New events, and a past of them: the second half of one history, and all but the first event of another."""
        cuts, totals = [self.longest // 2, 1], self.lengths[:2]
        head = window(self.events, [0, 1], [0, 0], cuts)
        new = [total - cut for total, cut in zip(totals, cuts, strict=True)]
        return window(self.events, [0, 1], cuts, new), state_of(self.encode(head), head).past

    def histories(self, lengths: Sequence[int]) -> Events:
        """Random histories of these lengths."""
        return Events(**CaseMaker(self.source, self.vectors.numpy()).encoder(lengths).feeds)

    def call(self, method: str, *arguments: object) -> Any:
        """What a method returns; its exception in words."""
        try:
            return getattr(self.source.module, method)(*arguments)
        except Exception as error:  # a module raises what it likes; each is one problem, not a crash
            reason = " ".join(str(error).split())[:LONGEST_REASON]
            raise ProbeError(f"{method} raised {type(error).__name__}: {reason}") from error

    def tensor(self, method: str, *arguments: object) -> Tensor:
        """What a method returns, which must be a tensor."""
        result = self.call(method, *arguments)
        if not isinstance(result, Tensor):
            raise ProbeError(f"{method} returns a {type(result).__name__}; return one tensor")
        return result

    def embed(self, rows: Tensor, *, known: bool = True) -> Tensor:
        """Vectors of catalogue items, as training knew them or as new ones with the same features."""
        dense, categories = self.source.item_dense[rows.numpy()], self.source.item_categories[rows.numpy()]
        ids = rows if known else torch.full_like(rows, -1)
        return self.tensor("embed_items", ids, torch.from_numpy(dense), torch.from_numpy(categories))

    def encode(self, events: Events) -> EncodedHistories:
        """Whole histories."""
        return self._encoded("encode", events)

    def alone(self, row: int, length: int) -> EncodedHistories:
        """The first events of one of `events`, without padding."""
        if (row, length) not in self._alone:
            self._alone[row, length] = self.encode(window(self.events, [row], [0], [length]))
        return self._alone[row, length]

    def extend(self, events: Events, past: Past) -> EncodedHistories:
        """New events."""
        return self._encoded("extend", events, past)

    def _encoded(self, method: str, *arguments: object) -> EncodedHistories:
        result = self.call(method, *arguments)
        try:
            key_values, hidden = result
            pairs = [(key, value) for key, value in key_values]
            tensors = [hidden, *(tensor for pair in pairs for tensor in pair)]
        except (TypeError, ValueError):
            tensors = [None]
        if not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise ProbeError(f"{method} returns something else than ([(key, value) per layer], hidden state)")
        return EncodedHistories(pairs, hidden)

    def retrieve(self, hidden: Tensor, outcome: float = 1.0) -> Tensor:
        """Queries; all outcomes are the same."""
        outcomes = torch.full((len(hidden), len(self.source.actions)), outcome)
        return self.tensor("retrieve", hidden, outcomes if self.spec.outcome_conditioned else None)

    def rank(self, state: State, items: Tensor) -> Tensor:
        """Logits of the same items for every history, a minute after its last event."""
        batch = len(state.hidden)
        candidates = Candidates(
            item_vectors=self.vectors[items].expand(batch, -1, -1),
            surfaces=torch.zeros(batch, dtype=torch.int64),
            timestamps_ms=state.past.timestamps_ms.clamp(min=0) + 60_000,
        )
        hidden = [state.hidden] if self.spec.ranker == "past+last_hidden_state" else []
        return self.tensor("rank", state.past, candidates, *hidden)


def state_of(encoded: EncodedHistories, events: Events) -> State:
    """EncodedHistories histories as a past."""
    times = at_last(events.timestamps_ms, events.lengths)
    return State(Past(key_values=encoded.key_values, lengths=events.lengths, timestamps_ms=times), encoded.hidden)


def window(events: Events, rows: Sequence[int], begin: Sequence[int], lengths: Sequence[int], extra: int = 0) -> Events:
    """Events [begin, begin + length) of some rows; the padding holds events that follow, or the last one again."""
    columns = torch.tensor(begin)[:, None] + torch.arange(max(lengths) + extra)
    columns, chosen = columns.clamp(max=events.surfaces.shape[1] - 1), torch.tensor(rows)[:, None]
    parts = {name: tensor[chosen, columns] for name, tensor in vars(events).items() if name != "lengths"}
    return Events(**parts, lengths=torch.tensor(lengths))


def with_junk(events: Events) -> Events:
    """The same events with large numbers in the padding."""
    padding = torch.arange(events.surfaces.shape[1]) >= events.lengths[:, None]
    return replace(
        events,
        item_vectors=torch.where(padding[..., None], JUNK, events.item_vectors),
        actions=torch.where(padding[..., None], 1.0, events.actions),
        surfaces=torch.where(padding, 0, events.surfaces),
        timestamps_ms=torch.where(padding, YEAR_10000_MS - 1, events.timestamps_ms),
    )


def difference(actual: Outputs, expected: Outputs) -> str:
    """The largest difference in words; empty if all are within the tolerance."""
    worst, words = TOLERANCE, ""
    for name, wanted in expected.items():
        got = actual[name]
        if got.shape != wanted.shape:
            return f"{name} has shape {list(got.shape)} instead of {list(wanted.shape)}"
        if not wanted.numel():
            continue
        off, largest = float((got - wanted).abs().max()), float(wanted.abs().max())
        relative = off / max(1.0, largest) if math.isfinite(off) else math.inf
        if relative > worst:
            worst, words = relative, f"{name} off by {off:.2g} (largest value {largest:.2g})"
    return words


def wrong(method: str, actual: Outputs, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """The first tensor of a wrong shape or type, or with values that are not finite."""
    for name, shape in shapes.items():
        tensor = actual[name]
        if tuple(tensor.shape) != shape:
            yield f"{method}: shape of {name} is {list(tensor.shape)}, as described it must be {list(shape)}"
        elif tensor.dtype != torch.float32:
            yield f"{method}: type of {name} is {tensor.dtype}; return float32"
        elif not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            yield f"{method}: {count} of {tensor.numel()} numbers of {name} are not finite; check the weights"
        else:
            continue
        return
