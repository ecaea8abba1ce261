from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unipinrec.models.batches import Batch, Batches, TrainBatchOptions
from unipinrec.models.data.schema import Dataset
from unipinrec.models.data.sequences import Sequences, sequences_of, vocabulary_of
from unipinrec.models.model import CandidateTokens, HistoryTokens, UniPinRec
from unipinrec.models.training.config import TrainConfig
from unipinrec.models.training.losses import Objective

MakeData = Callable[..., Dataset]
MakeModel = Callable[..., UniPinRec]
POSITIVE = np.array([True, True, False])
WEIGHTS = (1.0, 2.0, 0.5)


@dataclass(frozen=True)
class Setup:
    """A model, its data and one batch of it."""

    model: UniPinRec
    data: Sequences
    batch: Batch

    def losses(
        self, batch: Batch | None = None, action_weights: tuple[float, ...] = WEIGHTS, **options: Any
    ) -> dict[str, Tensor]:
        weights = dict(zip(self.model.vocabulary.actions, action_weights, strict=True))
        objective = Objective(self.model, self.data.features, TrainConfig(action_weights=weights, **options))
        losses: dict[str, Tensor] = objective.eval()(batch or self.batch)
        return losses

    def hidden(self) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors of the whole catalogue, hidden states of the history and of the candidates."""
        features, batch = self.data.features, self.batch
        vectors = self.model.embed_items(
            torch.arange(self.data.num_items), torch.from_numpy(features.dense), torch.from_numpy(features.categories)
        )
        history = HistoryTokens(
            vectors=vectors[batch.item_rows[batch.history_items]],
            actions=batch.history_actions,
            surfaces=batch.history_surfaces,
            timestamps_ms=batch.history_timestamps_ms,
            lengths=batch.lengths,
        )
        slate = CandidateTokens(
            vectors=vectors[batch.item_rows[batch.candidate_items]],
            surfaces=batch.candidate_surfaces,
            timestamps_ms=batch.candidate_timestamps_ms,
            cutoffs=batch.cutoffs,
        )
        return vectors, *self.model.joint(history, batch.masked, slate, dense_mask=True)


def _options(num_negatives: int, mask_probability: float = 0.3) -> TrainBatchOptions:
    return TrainBatchOptions(
        batch_size=4,
        max_history=8,
        max_candidates=20,
        mask_probability=mask_probability,
        num_negatives=num_negatives,
        seed=0,
    )


@pytest.fixture
def setup(random_dataset: MakeData, make_model: MakeModel) -> Setup:
    return _setup(random_dataset(3, users=12, features=True), make_model, num_negatives=99)


def _setup(dataset: Dataset, make_model: MakeModel, num_negatives: int, **overrides: object) -> Setup:
    data = sequences_of(dataset)
    (batch,) = Batches(data, POSITIVE, _options(num_negatives)).epoch(0, [0])
    return Setup(make_model(vocabulary_of(dataset), **overrides), data, batch)


def _positions(batch: Batch) -> list[tuple[int, int]]:
    rows, events = batch.targets.shape
    return [(b, i) for b in range(rows) for i in range(events) if batch.targets[b, i] >= 0 and not batch.masked[b, i]]


def _bce(logits: Tensor, labels: Tensor) -> float:
    """Mean over rows, weighted sum over actions, from the definition."""
    rows = []
    for logit, label in zip(logits.flatten().tolist(), labels.flatten().tolist(), strict=True):
        p = 1.0 / (1.0 + math.exp(-logit))
        rows.append(-math.log(p if label else 1.0 - p))
    by_action = np.array(rows).reshape(logits.shape).mean(axis=0)
    return float((by_action * np.array(WEIGHTS)).sum())


def test_with_all_items_the_retrieval_loss_is_the_full_softmax(setup: Setup) -> None:
    with torch.no_grad():
        vectors, hidden, _ = setup.hidden()
        scale = math.exp(min(5.0, float(setup.model.log_scale)))
        expected = []
        for b, i in _positions(setup.batch):
            scores = scale * (vectors @ setup.model.retrieve(hidden[b, i][None])[0, 0])
            target = int(setup.batch.item_rows[setup.batch.targets[b, i]])
            expected.append(float(torch.logsumexp(scores, 0) - scores[target]))
        assert len(expected) >= 5
        assert float(setup.losses()["retrieval"]) == pytest.approx(np.mean(expected), abs=1e-4)


def test_sampled_items_are_corrected_by_their_log_probability(random_dataset: MakeData, make_model: MakeModel) -> None:
    setup = _setup(random_dataset(3, users=12, features=True), make_model, num_negatives=3)
    batch = setup.batch
    assert 0 < len(batch.sampled_items) < setup.data.num_items
    with torch.no_grad():
        vectors, hidden, _ = setup.hidden()
        scale = math.exp(float(setup.model.log_scale))
        expected = []
        for b, i in _positions(batch):
            query = setup.model.retrieve(hidden[b, i][None])[0, 0]
            scores = {
                int(item): scale * float(vectors[batch.item_rows[item]] @ query) - float(log_q)
                for item, log_q in zip(batch.sampled_items, batch.sampled_log_q, strict=True)
            }
            total = math.log(sum(math.exp(score) for score in scores.values()))
            expected.append(total - scores[int(batch.targets[b, i])])
        assert float(setup.losses()["retrieval"]) == pytest.approx(np.mean(expected), abs=1e-4)


def test_action_losses_are_the_weighted_mean_cross_entropies(setup: Setup) -> None:
    batch = setup.batch
    with torch.no_grad():
        _, hidden, candidates = setup.hidden()
        losses = setup.losses()
        masked, shown = batch.masked > 0, batch.candidate_valid
        assert masked.sum() > 3
        assert shown.sum() > 3
        expected = _bce(setup.model.action_heads(hidden[masked]), batch.history_actions[masked])
        assert float(losses["history_actions"]) == pytest.approx(expected, abs=1e-4)
        expected = _bce(setup.model.action_heads(candidates[shown]), batch.candidate_actions[shown])
        assert float(losses["candidate_actions"]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("retrieval", "ranking", "masked"), [(1.0, 1.0, 1.0), (0.5, 3.0, 0.25), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0)]
)
def test_the_loss_is_the_weighted_sum_of_its_parts(
    setup: Setup, retrieval: float, ranking: float, masked: float
) -> None:
    found = setup.losses(retrieval_weight=retrieval, ranking_weight=ranking, masked_weight=masked)
    losses = {name: float(loss.detach()) for name, loss in found.items()}
    actions = masked * losses["history_actions"] + losses["candidate_actions"]
    assert losses["loss"] == pytest.approx(retrieval * losses["retrieval"] + ranking * actions, abs=1e-5)


def _strength(module: torch.nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize(("retrieval", "ranking"), [(1.0, 0.0), (0.0, 1.0)])
def test_either_head_alone_teaches_the_item_embedder(setup: Setup, retrieval: float, ranking: float) -> None:
    setup.losses(retrieval_weight=retrieval, ranking_weight=ranking)["loss"].backward()
    assert _strength(setup.model.item_embedder.ids) > 0
    assert _strength(setup.model.item_embedder.words) > 0
    assert (_strength(setup.model.retrieval_head) > 0) == (retrieval > 0)
    assert (_strength(setup.model.action_heads) > 0) == (ranking > 0)


def test_an_action_without_weight_teaches_nothing(setup: Setup) -> None:
    setup.losses(action_weights=(0.0, 1.0, 0.0), retrieval_weight=0.0)["loss"].backward()
    gradient = setup.model.action_heads.bias.grad
    assert gradient is not None
    assert [bool(g) for g in gradient] == [False, True, False]


def test_masked_positions_and_padding_ask_for_no_item(setup: Setup) -> None:
    """A change of targets where nothing is asked changes nothing."""
    batch = setup.batch
    asked = (batch.targets >= 0) & (batch.masked == 0)
    other = torch.where(asked, batch.targets, torch.where(batch.masked > 0, 0, -1))
    with torch.no_grad():
        assert setup.losses(replace(batch, targets=other))["retrieval"] == setup.losses()["retrieval"]


def test_no_loss_is_taken_on_unknown_actions(setup: Setup) -> None:
    known = setup.batch.history_known.clone()
    known[..., 0] = 0.0
    flipped = setup.batch.history_actions.clone()
    at = setup.batch.masked > 0
    flipped[..., 0] = torch.where(at, 1.0 - flipped[..., 0], flipped[..., 0])
    with torch.no_grad():
        unknown = setup.losses(replace(setup.batch, history_known=known))
        other = setup.losses(replace(setup.batch, history_known=known, history_actions=flipped))
        without = setup.losses(action_weights=(0.0, *WEIGHTS[1:]))
    assert unknown["history_actions"] == other["history_actions"] == without["history_actions"]


def test_an_action_that_is_known_of_few_positions_is_averaged_over_those(setup: Setup) -> None:
    batch = setup.batch
    history, candidates = torch.zeros_like(batch.history_known), torch.zeros_like(batch.candidate_known)
    expected = {}
    with torch.no_grad():
        _, *hidden = setup.hidden()
        indices = (batch.masked > 0).nonzero(), batch.candidate_valid.nonzero()
        names, labels = ("history_actions", "candidate_actions"), (batch.history_actions, batch.candidate_actions)
        for name, states, known, at, label in zip(names, hidden, (history, candidates), indices, labels, strict=True):
            few = at[:2].unbind(1)
            known[few] = 1.0
            assert len(at) > 3
            expected[name] = _bce(setup.model.action_heads(states[few]), label[few])
        found = setup.losses(replace(batch, history_known=history, candidate_known=candidates))
        assert {name: float(found[name]) for name in names} == pytest.approx(expected, abs=1e-4)


def test_labels_are_no_inputs(setup: Setup) -> None:
    """Labels of candidates and of masked events change their own loss and no other."""
    batch = setup.batch
    flipped = torch.where(batch.masked[..., None] > 0, 1.0 - batch.history_actions, batch.history_actions)
    with torch.no_grad():
        before = setup.losses()
        masked = setup.losses(replace(batch, history_actions=flipped))
        shown = setup.losses(replace(batch, candidate_actions=1.0 - batch.candidate_actions))
    assert masked["retrieval"] == before["retrieval"] == shown["retrieval"]
    assert masked["candidate_actions"] == before["candidate_actions"]
    assert shown["history_actions"] == before["history_actions"]
    assert masked["history_actions"] != before["history_actions"]
    assert shown["candidate_actions"] != before["candidate_actions"]


def test_padding_of_a_batch_does_not_matter(setup: Setup) -> None:
    batch = setup.batch
    padding = ~batch.candidate_valid
    assert padding.any()
    other = replace(
        batch,
        candidate_items=torch.where(padding, 3, batch.candidate_items),
        candidate_actions=torch.where(padding[..., None], 1.0, batch.candidate_actions),
    )
    with torch.no_grad():
        assert float(setup.losses(other)["loss"]) == pytest.approx(float(setup.losses()["loss"]), abs=1e-6)


def test_more_targets_than_the_limit_are_subsampled(setup: Setup) -> None:
    with torch.no_grad():
        each = []
        for b, i in _positions(setup.batch):
            targets = torch.full_like(setup.batch.targets, -1)
            targets[b, i] = setup.batch.targets[b, i]
            each.append(float(setup.losses(replace(setup.batch, targets=targets))["retrieval"]))
        torch.manual_seed(0)
        drawn = {float(setup.losses(max_targets=1)["retrieval"]) for _ in range(20)}
    assert len(drawn) > 3
    assert all(min(abs(value - one) for one in each) < 1e-4 for value in drawn)


def test_a_batch_without_slates_trains_forward_and_backward(make_dataset: MakeData, make_model: MakeModel) -> None:
    events = [("ann", item, "feed", None, "click") for item in "abcabcabc"]
    setup = _setup(make_dataset(events), make_model, num_negatives=99)
    losses = setup.losses()
    assert float(losses["candidate_actions"].detach()) == 0.0
    assert float(losses["retrieval"].detach()) > 0.0
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in setup.model.parameters())


@pytest.mark.parametrize("conditioned", [False, True])
def test_a_batch_with_nothing_to_learn_still_reaches_every_parameter(
    make_dataset: MakeData, make_model: MakeModel, conditioned: bool
) -> None:
    """A distributed wrapper waits for the gradient of every parameter, and other processes have something to learn."""
    dataset = make_dataset([("ann", item, "feed", t, "hide") for t, item in enumerate("abc")], split=(9, 9))
    setup = _setup(dataset, make_model, num_negatives=2, outcome_conditioned=conditioned)
    losses = setup.losses(replace(setup.batch, masked=torch.zeros(1, 3)))
    assert {name: float(value.detach()) for name, value in losses.items()} == dict.fromkeys(losses, 0.0)
    losses["loss"].backward()
    assert [n for n, p in setup.model.named_parameters() if p.grad is None or p.grad.any()] == []


def test_outcome_conditioned_queries_are_asked_with_the_outcome_of_the_target(
    random_dataset: MakeData, make_model: MakeModel
) -> None:
    setup = _setup(random_dataset(3, users=12), make_model, num_negatives=99, outcome_conditioned=True)
    batch = setup.batch
    with torch.no_grad():
        vectors, hidden, _ = setup.hidden()
        expected = []
        for b, i in _positions(batch):
            query = setup.model.retrieve(hidden[b, i][None], batch.target_actions[b, i][None])[0, 0]
            scores = math.exp(float(setup.model.log_scale)) * (vectors @ query)
            expected.append(float(torch.logsumexp(scores, 0) - scores[batch.item_rows[batch.targets[b, i]]]))
        assert float(setup.losses()["retrieval"]) == pytest.approx(np.mean(expected), abs=1e-4)
        other = setup.losses(replace(batch, target_actions=1.0 - batch.target_actions))
        assert other["retrieval"] != setup.losses()["retrieval"]
