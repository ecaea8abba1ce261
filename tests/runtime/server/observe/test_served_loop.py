"""From clicks alone, over what a real server logged, to a ranker that orders better than retrieval."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from served_loop import K, Loop, run

from unipinrec.models.data.schema import read_dataset


@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_what_was_served_teaches_a_ranker_that_orders_better_than_retrieval(tmp_path: Path) -> None:
    found = run(Loop(out=tmp_path, epochs=10))
    ahead = found["as_served_now_minus_retrieval"]
    assert ahead["mean"] > 2 * ahead["standard_error"] > 0
    assert found["true_value"]["as_served_now"] > found["true_value"]["served"]
    assert found["true_value"]["by_value"] < found["true_value"]["best_of_candidates"]
    before, joined = read_dataset(tmp_path / "before"), read_dataset(tmp_path / "joined")
    assert before.slates.height == 0
    late = joined.spec.dropped.pop("served: no event of the data follows", 0)  # the answers after the last click of all
    assert joined.slates.height == K * found["answers"] - late
    assert late < 0.01 * K * found["answers"]
    assert joined.spec.dropped.keys() == {"served: the data ends before the answer's hours are over (kept)"}
    # The label is what the user did with that very list: all clicks of the week, and no others.
    clicks = joined.slates.filter("action_click")
    assert clicks.height == found["clicks_of_the_week"]
    assert clicks["slate_id"].n_unique() > found["answers"] / 4
    assert joined.events.height == before.events.height + clicks.height
    assert joined.events.select(pl.col("action_click").all()).item()
