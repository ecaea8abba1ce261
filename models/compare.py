"""A checkpoint beside what it must beat (popularity) and what nothing can beat (the simulator's ceiling)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import CheckpointError, DataError
from unipinrec.models.baselines import popularity_scores
from unipinrec.models.checkpoint import load_checkpoint
from unipinrec.models.config import Vocabulary
from unipinrec.models.data_schema import DatasetSpec, read_dataset
from unipinrec.models.evaluate import (
    EVALUATION_BATCH,
    NO_TARGET,
    Requests,
    Scores,
    Split,
    gather_scores,
    held_out_requests,
    metrics_of,
    model_scores,
    rank_catalogue,
    shown_items,
)
from unipinrec.models.metrics import Metrics
from unipinrec.models.sequences import Sequences, sequences_of, vocabulary_of
from unipinrec.models.simulator_oracle import Oracle, oracle_item_scores, read_oracle


def compare_scorers(
    checkpoint: Path,
    data_folder: Path,
    split: Split,
    limit: int | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Metrics]:
    """Metrics of the model, of popularity and, for simulated data, of the ceiling, on the same requests.

    Raises:
        CheckpointError: The checkpoint was trained on other items or another vocabulary.
        DataError: The data set cannot be read, or its part has nothing to measure.
    """
    dataset = read_dataset(data_folder)
    loaded = load_checkpoint(checkpoint)
    data = sequences_of(dataset)
    then = _words(loaded.model.vocabulary, loaded.catalogue.item_ids)
    difference = _difference(then, _words(vocabulary_of(dataset), data.item_ids))
    if difference:
        raise CheckpointError(
            f"{checkpoint} was trained on other data than {data_folder}: {difference}; give the data it was trained on"
        )
    positive = np.array([name in dataset.spec.positive_actions for name in dataset.spec.actions])
    requests = held_out_requests(data, positive, split, limit)
    if not len(shown_items(data, requests)) and not (requests.targets != NO_TARGET).any():
        raise DataError(f"{data_folder}: nothing to measure in the {split} part: {_why_nothing(data)}")
    parts = []
    for part in model_scores(loaded.model, data, requests):
        parts.append(part)
        on_batch(len(parts), math.ceil(len(requests) / EVALUATION_BATCH))
    scorers = {"model": gather_scores(parts), "popularity": popularity_scores(data, positive, requests)}
    if (data_folder / "oracle.parquet").exists():
        scorers["ceiling"] = ceiling_scores(read_oracle(data_folder), dataset.spec, data, requests)
    return {name: metrics_of(scores, data, requests, dataset.spec.actions) for name, scores in scorers.items()}


def _words(vocabulary: Vocabulary, item_ids: list[str]) -> dict[str, Sequence[object]]:
    return {
        "item ids": item_ids,
        "actions": vocabulary.actions,
        "positive actions": vocabulary.positive_actions,
        "surfaces": vocabulary.surfaces,
        "widths of dense features": [f"{name}: {width}" for name, width in vocabulary.dense.items()],
        "categories": list(vocabulary.categories),
        **{f"words of category {name!r}": words for name, words in vocabulary.categories.items()},
    }


def _difference(trained: dict[str, Sequence[object]], given: dict[str, Sequence[object]]) -> str | None:
    for name, then in trained.items():
        now = given.get(name, ())
        pairs = enumerate(zip_longest(then, now))
        place = next((place for place, (a, b) in pairs if a != b), None)
        if place is not None:
            shown = slice(place, place + 3)
            return f"{name} from number {place + 1} on were {list(then[shown])}, are {list(now[shown])}"
    return None


def _why_nothing(data: Sequences) -> str:
    if data.split is None:
        return "no user has an event to hold out, after others and of a new item; give longer histories"
    if len(data.slate_ids):
        lack = "no slate of that part has an event of its user before it"
    else:
        lack = "no positive event of that part is of an item new to its user, with events before it"
    times = f"valid_start_ms={data.split.valid_start_ms} and test_start_ms={data.split.test_start_ms}"
    return f"{lack}, with {times}; run `unipinrec prepare` again with other --valid-start and --test-start"


def ceiling_scores(oracle: Oracle, spec: DatasetSpec, data: Sequences, requests: Requests) -> Scores:
    """The simulator's own probabilities as a scorer: no model can rank better, other than by chance."""

    def catalogue(part: Requests) -> NDArray[np.float32]:
        return oracle_item_scores(oracle, data.slate_ids[part.slates].tolist())

    rows = oracle.rows.with_row_index()
    order = _rows_in_order(rows["slate_id"].to_numpy(), data)
    truth = np.stack([rows[f"p_{name}"].to_numpy() for name in spec.actions], axis=1)[order]
    return Scores(ranks=rank_catalogue(data, requests, catalogue), probabilities=truth[shown_items(data, requests)])


def _rows_in_order(slate_ids: NDArray[np.int64], data: Sequences) -> NDArray[np.int64]:
    """Where each slate item of `data` stands in the oracle's table, which keeps the order of `slates.parquet`."""
    sizes = np.diff(data.slate_start)
    wanted = np.repeat(data.slate_ids, sizes)
    order = np.argsort(slate_ids, kind="stable")
    begin = np.searchsorted(slate_ids[order], wanted)
    within = np.arange(len(wanted)) - np.repeat(data.slate_start[:-1], sizes)
    rows: NDArray[np.int64] = order[begin + within]
    return rows
