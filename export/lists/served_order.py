"""Choose the order of a model's slates by what its ranker could learn (docs/ranking.md)."""

from __future__ import annotations

from unipinrec.models.model import UniPinRec
from unipinrec.models.training.config import TrainConfig
from unipinrec.models.training.sheet import TrainingFacts
from unipinrec.runtime.bundle.manifest import OrderSpec
from unipinrec.runtime.requests import Order

MAX_LOG_SCALE = 5.0  # as in training
FEWEST_LEFT_ALONE = 1000  # fewer do not teach the ranker anything reliable


def served_order(model: UniPinRec, train: TrainConfig, facts: TrainingFacts) -> OrderSpec:
    """The order of a model's slates, with the reason.

    - By value if the ranker saw enough items that were shown and left alone: it knows the chance of an action on any
      shown item.
    - By product otherwise: the ranker knows the chance of an action after an engagement, and retrieval the next
      positive item.
    - By retrieval alone if all positive events are worth the same.
    """
    scale = float(model.log_scale.detach().clamp(max=MAX_LOG_SCALE).exp())
    by, reason = _decide(model, train, facts)
    return OrderSpec(by=by, retrieval_scale=scale, reason=reason)


def _decide(model: UniPinRec, train: TrainConfig, facts: TrainingFacts) -> tuple[Order, str]:
    if not train.retrieval_weight:
        return "value", "retrieval was not trained"
    weights = dict(zip(model.vocabulary.actions, train.weights_of(model.vocabulary.actions), strict=True))
    learned = [name for name in model.vocabulary.positive_actions if weights[name] * train.ranking_weight > 0]
    if not learned:
        return "retrieval", "the ranker was not trained"
    if facts.shown_without_positive >= FEWEST_LEFT_ALONE:
        share = facts.shown_without_positive / facts.shown
        return "value", f"{share:.1%} of the {facts.shown} items in training slates were shown and left alone"
    left = f"{facts.shown_without_positive or 'no'} items of training slates were shown and left alone"
    on_events = train.mask_probability * train.masked_weight + train.history_candidates > 0
    rates = {name: facts.event_rates[name] for name in learned}
    informative = {name: rate for name, rate in rates.items() if rate is not None and 0 < rate < 1}
    alike = None
    if model.config.outcome_conditioned:
        alike = "retrieval is told which actions are wanted"
    elif len(learned) < 2 or not (informative and on_events):
        alike = "all positive events are worth the same"
    elif model.config.mark_masked:
        alike = "the ranker learned from marked events alone, while candidates carry no mark; train again"
    if alike:
        return "retrieval", f"{left}, and {alike}"
    shares = ", ".join(f"{name} in {rate:.1%}" for name, rate in informative.items())
    return "product", f"{left}; of the training events there is {shares}"
