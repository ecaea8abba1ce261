"""How well the last events of real users are predicted from earlier events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from unipinrec.runtime.graphs.engine import Engine, pad_histories
from unipinrec.runtime.requests import History

LAST_EVENTS = 4


def held_out_logits(engine: Engine, history: History) -> NDArray[np.float32]:
    """Logits [LAST_EVENTS, C] of a history's last events, each from the events before it.

    The history must have more than LAST_EVENTS events. It is encoded once, without the last event: the keys and values
    of an event do not depend on later events.
    """
    encoded, logits = engine.encode(pad_histories([history.part(0, -1)])), []
    for index in range(len(history) - LAST_EVENTS, len(history)):
        last_timestamps_ms = history.timestamps_ms[index - 1 : index]
        before = replace(encoded, lengths=np.array([index]), last_timestamps_ms=last_timestamps_ms)
        shown = history.part(index, index + 1)
        logits.append(engine.rank(before, shown.item_rows[None], shown.surfaces, shown.timestamps_ms)[0])
    return np.concatenate(logits)


def auc_by_action(
    actions: Sequence[str], histories: Sequence[History], logits: Sequence[NDArray[np.float32]]
) -> dict[str, float]:
    """AUC of each action over the last events of all histories. Leaves out actions that were always or never taken.

    Args:
        actions: Names of the C actions.
        histories: H histories of more than LAST_EVENTS events.
        logits: Logits of their last events, H times [LAST_EVENTS, C].
    """
    from unipinrec.models.metrics import action_metrics  # noqa: PLC0415 - needs polars; an export without data does not

    labels = np.concatenate([history.actions[-LAST_EVENTS:] for history in histories]).astype(np.uint8)
    owners = np.repeat(np.arange(len(histories)), LAST_EVENTS)
    scores = np.concatenate(logits).astype(np.float64)
    measured = {name: action_metrics(owners, labels[:, i], scores[:, i]).auc for i, name in enumerate(actions)}
    return {name: auc for name, auc in measured.items() if auc is not None}
