"""Counts before a run: what a data set can measure, and what a model can learn from it, with warnings."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import DataError
from unipinrec.models.batches import Window, positive_events, training_windows, window_events
from unipinrec.models.data.sequences import Sequences
from unipinrec.models.evaluate import (
    NO_SLATE,
    NO_TARGET,
    Requests,
    Split,
    held_out,
    held_out_requests,
    seen_before,
    shown_items,
)
from unipinrec.models.training.config import TrainConfig

FEW_TARGETS = 100
LARGE_SHARE = 0.2


class DataSheet(msgspec.Struct, frozen=True, kw_only=True):
    """The held-out part of a data set; a share of nothing is 0.

    Attributes:
        split: "test" or "valid".
        requests: Measured requests: held-out slates or events with a history.
        targets: Those of them with an item to retrieve.
        unseen_targets: Share of the targets in no event or slate of the training part.
        without_history: Share of held-out slates or positive events without an earlier event of their user; they are
            not measured.
        repeats: Share of held-out positive events, or of first positive items of slates, whose user had the item
            before. They are targets only if `repeats_counted`.
        repeats_counted: Whether repeats are targets.
    """

    split: Split
    requests: int
    targets: int
    unseen_targets: float
    without_history: float
    repeats: float
    repeats_counted: bool

    def sentences(self) -> list[str]:
        """Warnings in plain words, each with a remedy."""
        part, warnings = {"test": "test", "valid": "validation"}[self.split], []
        if self.unseen_targets >= LARGE_SHARE:
            warnings.append(
                f"{self.unseen_targets:.1%} of the {part} targets are items that training never saw; no model without "
                "their content can find them: give item features, train again more often, or serve what is popular"
            )
        if self.targets < FEW_TARGETS:
            warnings.append(
                f"the {part} part has {self.targets} targets, fewer than {FEW_TARGETS}: chance decides its figures; "
                "give more events, or an earlier split"
            )
        if self.repeats >= LARGE_SHARE and not self.repeats_counted:
            warnings.append(
                f"{self.repeats:.1%} of the {part} part's positive events are of items that the user had before; they "
                "are not measured. Where people buy the same again, evaluate with --repeats and ask for "
                "recommendations with exclude_seen: false"
            )
        if self.without_history >= LARGE_SHARE:
            warnings.append(
                f"{self.without_history:.1%} of the {part} part's events are of users without any event before; they "
                "are not measured: give older events, or a later split"
            )
        return warnings


class TrainingFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the training part holds.

    Attributes:
        targets: Positive events after another event, from which retrieval learns.
        shown: Slate items in the training part.
        shown_without_positive: Those of them with no positive action, the logged negatives.
        event_rates: Per action its share among the training events where it is known; None if it is never known.
        shown_rates: Per action its share among the slate items; None without slate items.
        positive_actions: Names of the actions that make an event a target.
        valid_targets: Requests of the validation part that have a target or a slate.
    """

    targets: int
    shown: int
    shown_without_positive: int
    event_rates: dict[str, float | None]
    shown_rates: dict[str, float | None]
    positive_actions: tuple[str, ...]
    valid_targets: int


def data_sheet(data: Sequences, positive: NDArray[np.bool_], split: Split, *, repeats: bool = False) -> DataSheet:
    """Describe a held-out part; `positive` [C] marks the actions that make an event a target."""
    every = held_out(data, positive, split, repeats=True)
    has_history = every.ends > data.event_start[every.users]
    targeted = every.take(np.flatnonzero(has_history & (every.targets != NO_TARGET)))
    requests = held_out_requests(data, positive, split, repeats=repeats)
    targets = requests.targets[requests.targets != NO_TARGET]
    windows = training_windows(data, max(1, len(data.rows)))
    trained = data.rows[window_events(windows, len(data.rows))]
    shown = data.slate_rows[_slate_items(data, windows)]
    return DataSheet(
        split=split,
        requests=len(requests),
        targets=len(targets),
        unseen_targets=_share(~np.isin(targets, np.concatenate([trained, shown]))),
        without_history=_share(~has_history),
        repeats=_share(seen_before(data, targeted.users, targeted.targets, targeted.ends)),
        repeats_counted=repeats,
    )


def training_facts(
    data: Sequences, positive: NDArray[np.bool_], actions: tuple[str, ...], *, fit_validation: bool = False
) -> TrainingFacts:
    """Count what a run can learn from, for any window length; `positive` [C] belongs to `actions`."""
    windows = training_windows(data, max(1, len(data.rows)), fit_validation=fit_validation)
    trained = window_events(windows, len(data.rows))
    targets = trained & positive_events(data, positive)
    targets[data.event_start[:-1][np.diff(data.event_start) > 0]] = False  # a user's first event has no history
    labels = data.slate_actions[_slate_items(data, windows)]
    known = data.actions_known[trained].sum(axis=0)
    had = data.actions[trained].sum(axis=0)
    valid = held_out_requests(data, positive, "valid")
    measurable = (valid.targets != NO_TARGET) | (valid.slates != NO_SLATE)
    return TrainingFacts(
        targets=int(targets.sum()),
        shown=len(labels),
        shown_without_positive=int((~np.any(labels[:, positive] > 0, axis=1)).sum()),
        event_rates={name: float(had[c] / known[c]) if known[c] else None for c, name in enumerate(actions)},
        shown_rates={name: float(labels[:, c].mean()) if len(labels) else None for c, name in enumerate(actions)},
        positive_actions=tuple(name for name, counts in zip(actions, positive, strict=True) if counts),
        valid_targets=int(measurable.sum()) if _measurable(data, valid) else 0,
    )


def training_warnings(facts: TrainingFacts, config: TrainConfig, total_steps: int) -> list[str]:
    """Problems that a run of `total_steps` steps will have, each with its remedy.

    Raises:
        DataError: No positive action ever happens in the training part.
    """
    never = [name for name in facts.positive_actions if not facts.event_rates[name] and not facts.shown_rates[name]]
    if len(never) == len(facts.positive_actions):
        raise DataError(
            f"none of the positive actions {never} ever happens in the training part: there is nothing to learn; "
            "declare positive actions that happen there, and run `unipinrec prepare` again"
        )
    warnings = []
    if total_steps <= config.warmup_steps:
        warnings.append(
            f"training ends after {total_steps} steps, inside its warm-up of {config.warmup_steps}: it never reaches "
            f"its learning rate; train more epochs than {config.epochs}, or lower warmup_steps or batch_size"
        )
    if never:
        warnings.append(
            f"the positive actions {never} never happen in the training part: the model cannot learn them; declare "
            "only actions that happen"
        )
    if facts.targets < FEW_TARGETS and config.retrieval_weight:
        warnings.append(
            f"retrieval learns from {facts.targets} positive next events, fewer than {FEW_TARGETS}: it will find "
            "little; give more events"
        )
    if not facts.valid_targets and not config.fit_validation:
        warnings.append(
            "the validation part has nothing to measure: the last weights are kept, and nothing chooses an epoch; "
            "give an earlier --valid-start, or train with few epochs"
        )
    return warnings


def _slate_items(data: Sequences, windows: list[Window]) -> NDArray[np.int64]:
    """Indices of the slate items in windows."""
    spans = [np.arange(data.slate_start[w.slate_begin], data.slate_start[w.slate_end]) for w in windows]
    return np.concatenate([np.zeros(0, np.int64), *spans])


def _measurable(data: Sequences, requests: Requests) -> bool:
    """Whether there is a target, or an action that some shown items got and others did not."""
    labels = data.slate_actions[shown_items(data, requests)]
    mixed = len(labels) > 0 and bool((labels.min(axis=0) < labels.max(axis=0)).any())
    return mixed or bool((requests.targets != NO_TARGET).any())


def _share(flags: NDArray[np.bool_]) -> float:
    return float(flags.mean()) if len(flags) else 0.0
