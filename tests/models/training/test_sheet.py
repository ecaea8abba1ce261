from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import polars as pl
import pytest

from unipinrec.errors import DataError
from unipinrec.models.data.schema import Dataset
from unipinrec.models.data.sequences import sequences_of
from unipinrec.models.training.config import TrainConfig
from unipinrec.models.training.sheet import DataSheet, TrainingFacts, data_sheet, training_facts, training_warnings

MakeData = Callable[..., Dataset]
POSITIVE = np.array([True, True, False])
ACTIONS = ("click", "like", "hide")
GOOD_SHEET = DataSheet(
    split="test",
    requests=500,
    targets=400,
    unseen_targets=0.01,
    without_history=0.02,
    repeats=0.03,
    repeats_counted=False,
)
GOOD_FACTS = TrainingFacts(
    targets=5000,
    shown=100,
    shown_without_positive=80,
    event_rates={"click": 0.9, "like": 0.1, "hide": 0.0},
    shown_rates={"click": 0.2, "like": 0.1, "hide": 0.0},
    positive_actions=("click", "like"),
    valid_targets=300,
)


def test_the_sheet_of_engagements_by_hand(make_dataset: MakeData) -> None:
    events = [
        *[("ann", item, "feed", t, "click") for t, item in enumerate("ab")],
        ("bob", "c", "feed", 5, "click"),  # alone before the split: nothing is trained on it
        ("ann", "c", "feed", 80, "click"),  # unseen by training
        ("ann", "a", "feed", 81, "click"),  # had before
        ("ann", "d", "feed", 82, "hide"),  # not positive
        ("bob", "a", "feed", 83, "click"),
        ("cat", "a", "feed", 84, "click"),  # nothing before it
        ("cat", "b", "feed", 85, "click"),
    ]
    data = sequences_of(make_dataset(events, split=(60, 80)))
    sheet = data_sheet(data, POSITIVE, "test")
    assert sheet == DataSheet(
        split="test",
        requests=3,
        targets=3,
        unseen_targets=1 / 3,
        without_history=1 / 5,
        repeats=1 / 4,
        repeats_counted=False,
    )
    counted = data_sheet(data, POSITIVE, "test", repeats=True)
    assert counted == msgspec.structs.replace(sheet, requests=4, targets=4, unseen_targets=1 / 4, repeats_counted=True)
    assert data_sheet(data, POSITIVE, "valid") == DataSheet(
        split="valid",
        requests=0,
        targets=0,
        unseen_targets=0.0,
        without_history=0.0,
        repeats=0.0,
        repeats_counted=False,
    )


def test_the_sheet_of_slates_by_hand(make_dataset: MakeData) -> None:
    data = sequences_of(
        make_dataset(
            events=[("ann", "a", "feed", 1, "click"), ("ann", "b", "feed", 2, "click")],
            slates=[
                (1, "ann", "feed", 80, [("a", "click"), ("d", "click")]),  # the first was had, the second is unseen
                (2, "ann", "feed", 81, [("b", "hide")]),
                (3, "bob", "feed", 82, [("b", "click")]),
                (4, "ann", "feed", 83, [("c", "like")]),
            ],
            split=(60, 80),
        )
    )
    assert data_sheet(data, POSITIVE, "test") == DataSheet(
        split="test",
        requests=3,
        targets=2,
        unseen_targets=1.0,
        without_history=0.25,
        repeats=0.5,
        repeats_counted=False,
    )


def test_the_sheet_of_last_events_by_hand(make_dataset: MakeData) -> None:
    events = [
        (u, i, "feed", None, "click") for u, items in (("ann", "abcd"), ("bob", "a"), ("cat", "aba")) for i in items
    ]
    sheet = data_sheet(sequences_of(make_dataset(events)), POSITIVE, "test")
    # Ann's d is unseen, cat's a was had, bob has nothing before his one event.
    assert (sheet.requests, sheet.targets, sheet.unseen_targets) == (2, 1, 1.0)
    assert (sheet.without_history, sheet.repeats) == (1 / 3, 1 / 2)


def test_data_of_nine_in_ten_new_targets_says_so(make_dataset: MakeData) -> None:
    events = []
    for user in range(120):
        events += [(f"u{user}", item, "feed", t, "click") for t, item in enumerate(("old", "older", "oldest"))]
        target = "known" if user % 10 == 0 else f"new{user}"
        events.append((f"u{user}", target, "feed", 90, "click"))
    events += [("ann", item, "feed", t, "click") for t, item in enumerate(("known", "old"))]
    sheet = data_sheet(sequences_of(make_dataset(events, split=(60, 80))), POSITIVE, "test")
    assert (sheet.requests, sheet.targets) == (120, 120)
    assert sheet.sentences() == [
        "90.0% of the test targets are items that training never saw; no model without their content can find them: "
        "give item features, train again more often, or serve what is popular"
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"targets": 99},
            "the test part has 99 targets, fewer than 100: chance decides its figures; give more events, or an "
            "earlier split",
        ),
        (
            {"repeats": 0.62},
            "62.0% of the test part's positive events are of items that the user had before; they are not measured. "
            "Where people buy the same again, evaluate with --repeats and ask for recommendations with "
            "exclude_seen: false",
        ),
        (
            {"without_history": 0.25, "split": "valid"},
            "25.0% of the validation part's events are of users without any event before; they are not measured: "
            "give older events, or a later split",
        ),
    ],
)
def test_a_sheet_warns_in_plain_words(change: dict[str, object], said: str) -> None:
    assert GOOD_SHEET.sentences() == []
    assert msgspec.structs.replace(GOOD_SHEET, **change).sentences() == [said]


def test_repeats_that_are_measured_need_no_warning() -> None:
    assert msgspec.structs.replace(GOOD_SHEET, repeats=0.62, repeats_counted=True).sentences() == []


def test_training_facts_by_hand(make_dataset: MakeData) -> None:
    data = sequences_of(
        make_dataset(
            events=[
                ("ann", "a", "feed", 1, "click"),
                ("ann", "b", "feed", 2, "like"),
                ("ann", "c", "feed", 3, ""),
                ("ann", "d", "feed", 65, "click"),
                ("bob", "a", "feed", 4, "click"),
                ("bob", "b", "feed", 90, "click"),
            ],
            slates=[
                (1, "ann", "feed", 2, [("a", "hide"), ("b", "like"), ("c", "")]),
                (2, "ann", "feed", 66, [("a", "click"), ("c", "")]),
                (3, "bob", "feed", 95, [("a", "click")]),
            ],
            split=(60, 80),
        )
    )
    facts = training_facts(data, POSITIVE, ACTIONS)
    # Bob's one training event is in no window, and nothing comes before Ann's first.
    assert facts == TrainingFacts(
        targets=1,
        shown=3,
        shown_without_positive=2,
        event_rates={"click": 1 / 3, "like": 1 / 3, "hide": 0.0},
        shown_rates={"click": 0.0, "like": 1 / 3, "hide": 1 / 3},
        positive_actions=("click", "like"),
        valid_targets=1,
    )
    fitted = training_facts(data, POSITIVE, ACTIONS, fit_validation=True)
    assert (fitted.targets, fitted.shown, fitted.shown_without_positive) == (2, 5, 3)


def test_an_action_that_nothing_is_known_of_has_no_rate(make_dataset: MakeData) -> None:
    dataset = make_dataset([("ann", item, "feed", t, "click") for t, item in enumerate("abc")], split=(60, 80))
    unknown = dataset.events.with_columns(action_like=pl.lit(None, pl.Boolean))
    data = sequences_of(Dataset(spec=dataset.spec, events=unknown, slates=dataset.slates, items=dataset.items))
    facts = training_facts(data, POSITIVE, ACTIONS)
    assert facts.event_rates == {"click": 1.0, "like": None, "hide": 0.0}
    assert facts.shown_rates == {"click": None, "like": None, "hide": None}


def _warnings(steps: int = 1000, settings: dict[str, object] | None = None, **change: object) -> list[str]:
    facts = msgspec.structs.replace(GOOD_FACTS, **change)
    return training_warnings(facts, msgspec.convert(settings or {}, TrainConfig), steps)


def test_a_good_run_is_not_warned_of() -> None:
    assert _warnings() == []
    assert _warnings(steps=51) == []


def test_training_inside_its_warm_up_is_warned_of() -> None:
    assert _warnings(steps=50) == [
        "training ends after 50 steps, inside its warm-up of 50: it never reaches its learning rate; train more epochs "
        "than 10, or lower warmup_steps or batch_size"
    ]


def test_a_positive_action_that_never_happens_is_named() -> None:
    rates = {"click": 0.9, "like": 0.0, "hide": 0.1}
    assert _warnings(event_rates=rates) == [], "it happens in slates"
    assert _warnings(event_rates=rates, shown_rates={**rates, "like": None}) == [
        "the positive actions ['like'] never happen in the training part: the model cannot learn them; declare only "
        "actions that happen"
    ]


def test_no_positive_action_at_all_is_an_error() -> None:
    nothing = {"click": 0.0, "like": None, "hide": 0.5}
    with pytest.raises(DataError, match=r"none of the positive actions \['click', 'like'\] ever happens in the train"):
        _warnings(event_rates=nothing, shown_rates=nothing)


def test_few_targets_are_warned_of_where_retrieval_is_trained() -> None:
    assert _warnings(targets=99) == [
        "retrieval learns from 99 positive next events, fewer than 100: it will find little; give more events"
    ]
    assert _warnings(targets=99, settings={"retrieval_weight": 0.0}) == []


def test_a_validation_part_without_anything_to_measure_is_warned_of() -> None:
    assert _warnings(valid_targets=0) == [
        "the validation part has nothing to measure: the last weights are kept, and nothing chooses an epoch; give an "
        "earlier --valid-start, or train with few epochs"
    ]
    assert _warnings(valid_targets=0, settings={"fit_validation": True}) == []


def test_slates_that_tell_nothing_apart_are_no_validation(make_dataset: MakeData) -> None:
    events = [("ann", "a", "feed", 1, "click"), ("ann", "b", "feed", 2, "click"), ("ann", "c", "feed", 3, "click")]
    for shown, valid_targets in (([("d", ""), ("e", "")], 0), ([("d", ""), ("e", "hide")], 1), ([("d", "click")], 1)):
        slates = [(1, "ann", "feed", 2, [("d", "")]), (2, "ann", "feed", 5, shown), (3, "ann", "feed", 9, [("d", "")])]
        data = sequences_of(make_dataset(events, slates, items=list("abcde"), split=(4, 8)))
        assert training_facts(data, POSITIVE, ACTIONS).valid_targets == valid_targets
