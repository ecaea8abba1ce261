"""What slates are ordered by, decided by what the ranker could learn; and whole runs on small logs without slates."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from unipinrec.export.lists.served_order import served_order
from unipinrec.models.config import TINY, Vocabulary
from unipinrec.models.model import UniPinRec
from unipinrec.models.training.config import TrainConfig
from unipinrec.models.training.sheet import TrainingFacts

ACTIONS = ("click", "like", "hide")
FACTS = TrainingFacts(
    targets=1000,
    shown=0,
    shown_without_positive=0,
    event_rates={"click": 1.0, "like": 0.25, "hide": None},
    shown_rates=dict.fromkeys(ACTIONS),
    positive_actions=("click", "like"),
    valid_targets=100,
)


def order(
    facts: TrainingFacts = FACTS, positive: tuple[str, ...] = ("click", "like"), *, mark: bool = False, **train: Any
) -> tuple[str, str]:
    vocabulary = Vocabulary(
        num_items=5, actions=ACTIONS, positive_actions=positive, surfaces=("unknown",), dense={}, categories={}
    )
    model = UniPinRec(msgspec.structs.replace(TINY, mark_masked=mark), vocabulary)
    spec = served_order(model, TrainConfig(**train), facts)
    assert spec.retrieval_scale == pytest.approx(20.0)  # of an untrained model
    return spec.by, spec.reason


def facts(**changes: Any) -> TrainingFacts:
    return msgspec.structs.replace(FACTS, **changes)


def test_items_that_were_shown_and_left_alone_teach_the_value() -> None:
    assert order(facts(shown=4000, shown_without_positive=3000)) == (
        "value",
        "75.0% of the 4000 items in training slates were shown and left alone",
    )
    assert order(facts(shown=4000, shown_without_positive=3000), mark=True)[0] == "value"


def test_a_handful_of_them_teaches_nothing() -> None:
    by, reason = order(facts(shown=1000, shown_without_positive=999, event_rates=dict.fromkeys(ACTIONS, 1.0)))
    assert by == "retrieval"
    assert "999 items of training slates were shown and left alone" in reason


def test_without_them_an_action_that_tells_events_apart_makes_a_product() -> None:
    assert order() == (
        "product",
        "no items of training slates were shown and left alone; of the training events there is like in 25.0%",
    )
    assert order(facts(shown=400))[0] == "product"
    assert order(mask_probability=0.0, history_candidates=4)[0] == "product"


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({"event_rates": dict.fromkeys(ACTIONS, 1.0)}, {}, "all positive events are worth the same"),
        ({}, {"positive": ("like",)}, "all positive events are worth the same"),
        ({}, {"positive": ("click",)}, "all positive events are worth the same"),
        ({}, {"positive": ("hide",)}, "all positive events are worth the same"),
        ({}, {"mask_probability": 0.0}, "all positive events are worth the same"),
        ({}, {"mark": True}, "the ranker learned from marked events alone"),
        ({}, {"ranking_weight": 0.0}, "the ranker was not trained"),
        ({"shown": 9, "shown_without_positive": 9}, {"ranking_weight": 0.0}, "the ranker was not trained"),
        ({}, {"action_weights": {"click": 0.0, "like": 0.0}}, "the ranker was not trained"),
    ],
)
def test_a_ranker_that_learned_nothing_does_not_run(
    changes: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    by, said = order(facts(**changes), **options)
    assert by == "retrieval"
    assert reason in said


def test_without_retrieval_only_the_value_is_left() -> None:
    assert order(retrieval_weight=0.0) == ("value", "retrieval was not trained")
