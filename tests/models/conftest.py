"""Builders that the tests of the PyTorch side share: data sets written by hand, random ones, and small models."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
import torch

from unipinrec.models.config import ModelConfig, Vocabulary
from unipinrec.models.model import UniPinRec

if TYPE_CHECKING:  # some tests run where polars is not installed
    import polars as pl

    from unipinrec.models.data.schema import Dataset, DatasetSpec

ACTIONS = ("click", "like", "hide")
POSITIVE = ("click", "like")
SURFACES = ("unknown", "feed", "search")

# (user, item, surface, time in ms or None, names of its actions)
EventRow = tuple[str, str, str, int | None, str]
# (slate id, user, surface, time in ms, shown items with the names of their actions)
SlateRow = tuple[int, str, str, int, list[tuple[str, str]]]

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_heads=4,
    num_kv_heads=4,
    intermediate_size=24,
    max_history=8,
    item_dim=8,
    id_dim=6,
    feature_dim=4,
)
VOCABULARY = Vocabulary(
    num_items=11,
    actions=ACTIONS,
    positive_actions=POSITIVE,
    surfaces=SURFACES,
    dense={"size": 1, "content": 2},
    categories={"topic": ("x", "y"), "maker": ("m",)},
)


@pytest.fixture(autouse=True, scope="session")
def _single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """Lets no file grow beyond so many bytes meanwhile, as on a disk that is nearly full."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Dataset]:
    """Builds a data set from rows; see `build`."""
    return build


@pytest.fixture(scope="session")
def random_dataset() -> Callable[..., Dataset]:
    """Builds a random data set from a seed; see `draw`."""
    return draw


@pytest.fixture(scope="session")
def make_model() -> Callable[..., UniPinRec]:
    """Builds a small model in eval mode whose every parameter and buffer is away from its neutral value."""

    def model(vocabulary: Vocabulary = VOCABULARY, seed: int = 0, **overrides: Any) -> UniPinRec:
        torch.manual_seed(seed)
        made = UniPinRec(msgspec.structs.replace(MODEL, **overrides), vocabulary)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            made.item_embedder.dense_mean.normal_()
            made.item_embedder.dense_std.uniform_(0.5, 1.5)
        return made.eval()

    return model


def build(
    events: Sequence[EventRow],
    slates: Sequence[SlateRow] = (),
    *,
    items: Sequence[str] | None = None,
    split: tuple[int, int] | None = None,
    features: bool = False,
) -> Dataset:
    """A data set of these rows; the catalogue is `items`, or every item of the rows in alphabetic order."""
    import polars as pl

    from unipinrec.models.data.schema import (
        FORMAT_VERSION,
        Dataset,
        DatasetSpec,
        TimeSplit,
        event_columns,
        slate_columns,
    )

    shown = [
        (slate, user, item, surface, time, names, position)
        for slate, user, surface, time, content in slates
        for position, (item, names) in enumerate(content)
    ]
    catalogue = list(items) if items else sorted({e[1] for e in events} | {s[2] for s in shown})
    spec = DatasetSpec(
        format_version=FORMAT_VERSION,
        name="by-hand",
        actions=ACTIONS,
        positive_actions=POSITIVE,
        surfaces=SURFACES,
        dense={"size": 1, "content": 2} if features else {},
        categories={"topic": ("x", "y"), "maker": ("m",)} if features else {},
        split=TimeSplit(valid_start_ms=split[0], test_start_ms=split[1]) if split else None,
        dropped={},
        source="made for a test",
    )
    event_rows = [(*event[:4], *_flags(event[4])) for event in events]
    slate_rows = [
        (slate, user, item, surface, time, *_flags(names), position)
        for slate, user, item, surface, time, names, position in shown
    ]
    return Dataset(
        spec=spec,
        events=pl.DataFrame(event_rows, schema=event_columns(ACTIONS), orient="row"),
        slates=pl.DataFrame(slate_rows, schema=slate_columns(ACTIONS), orient="row"),
        items=_items(spec, catalogue),
    )


def draw(
    seed: int,
    *,
    users: int = 6,
    items: int = 11,
    max_events: int = 20,
    slates: int = 25,
    split: tuple[int, int] | None = (60, 80),
    features: bool = False,
) -> Dataset:
    """Random users with times in [0, 100), some of them missing; slates fall on, before and between events."""
    rng = np.random.default_rng(seed)
    names = [f"i{n:02d}" for n in range(items)]
    events: list[EventRow] = []
    for user in range(users):
        count = int(rng.integers(0, max_events + 1))
        missing = int(rng.integers(0, count + 1)) // 4
        times = [None] * missing + sorted(rng.integers(0, 100, count - missing).tolist())
        events += [(f"u{user}", str(rng.choice(names)), str(rng.choice(SURFACES)), t, _draw_names(rng)) for t in times]
    shown: list[SlateRow] = []
    for slate in rng.permutation(slates).tolist():
        content = [(str(i), _draw_names(rng)) for i in rng.choice(names, int(rng.integers(1, 5)), replace=False)]
        who, surface = f"u{rng.integers(users + 1)}", str(rng.choice(SURFACES))
        shown.append((slate, who, surface, int(rng.integers(0, 100)), content))
    # Users take turns in the table, as in a log: only the order within a user means something.
    events.sort(key=lambda event: -1 if event[3] is None else event[3])
    return build(events, shown, items=names, split=split, features=features)


def _draw_names(rng: np.random.Generator) -> str:
    return " ".join(name for name in ACTIONS if rng.random() < 0.4)


def _flags(names: str) -> list[bool]:
    assert set(names.split()) <= set(ACTIONS)
    return [name in names.split() for name in ACTIONS]


def _items(spec: DatasetSpec, catalogue: list[str]) -> pl.DataFrame:
    import polars as pl

    from unipinrec.models.data.schema import item_columns

    count = len(catalogue)
    columns: dict[str, list[Any]] = {
        "item_id": catalogue,
        "title": [None if n == 1 else f"title of {item}" for n, item in enumerate(catalogue)],
        "dense_size": [[float(n)] for n in range(count)],
        "dense_content": [[n / 2, 1.0 - n] for n in range(count)],
        "category_topic": [("x", "y", None, "w")[n % 4] for n in range(count)],
        "category_maker": [("m", "?")[n % 2] for n in range(count)],
    }
    schema = item_columns(spec)
    return pl.DataFrame({name: columns[name] for name in schema}, schema=schema)
