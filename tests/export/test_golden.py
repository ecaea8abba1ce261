from __future__ import annotations

from pathlib import Path

import numpy as np

from unipinrec.export.checkpoint_source import source_from_checkpoint
from unipinrec.export.golden import golden_tensors, random_histories
from unipinrec.export.histories import Histories


def test_where_no_user_has_two_events_histories_are_random(checkpoint: Path) -> None:
    source = source_from_checkpoint(checkpoint)
    vectors = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
    made = random_histories(source)
    short = Histories(
        user_ids=["a", "b"],
        offsets=np.array([0, 1, 2]),
        item_rows=made.item_rows[:2],
        actions=made.actions[:2],
        surfaces=made.surfaces[:2],
        timestamps_ms=made.timestamps_ms[:2],
    )
    given, expected = golden_tensors(source, short, vectors), golden_tensors(source, made, vectors)
    assert list(given) == list(expected)
    assert all(np.array_equal(given[name], array) for name, array in expected.items())
