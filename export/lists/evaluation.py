"""Measure the lists of a bundle on held-out requests of prepared data.

Each request is answered as for a client. All figures come from its 200 candidates: the first ten are the served list,
and sorting the candidates otherwise gives the list of another order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unipinrec.export.lists.held_out_requests import MISSING, Client, HeldOut
from unipinrec.models.baselines import baselines_of
from unipinrec.models.evaluate import NO_SLATE, NO_TARGET, Split, left_out, shown_items, slates_of
from unipinrec.models.metrics import action_metrics, gains, hits, standard_error, target_ranks
from unipinrec.models.training.sheet import data_sheet
from unipinrec.runtime import Recommender
from unipinrec.runtime.bundle.quality import ActionQuality, Estimate, Evaluation, ListQuality, named
from unipinrec.runtime.requests import CANDIDATES

TOP = 10
BATCH = 64
CELLS = 1 << 23  # of one [requests, items] array of scores
POPULAR = "popular_all_time"
SURE = 2.0  # standard errors
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """One list per request: 0-based ranks of the T targets, inf if a list lacks its target, and true values [R]."""

    ranks: list[NDArray[np.float64]] = field(default_factory=list)
    true_values: list[NDArray[np.float64]] = field(default_factory=list)

    @cached_property
    def hits(self) -> NDArray[np.float64]:
        """[T] 1 if the target is among the ten."""
        return hits(np.concatenate([np.zeros(0), *self.ranks]), TOP)

    @cached_property
    def gains(self) -> NDArray[np.float64]:
        """[T] NDCG@10."""
        return gains(np.concatenate([np.zeros(0), *self.ranks]), TOP)

    @cached_property
    def truth(self) -> NDArray[np.float64]:
        """[R] true values; empty if unknown."""
        return np.concatenate([np.zeros(0), *self.true_values])

    def quality(self, target_values: NDArray[np.float64] | None, served: Measured) -> ListQuality:
        """Quality with standard errors, compared with the served list; see `HeldOut.target_values`."""
        targets = len(self.hits)
        ahead = served.truth - self.truth if len(self.truth) else served.hits - self.hits
        return ListQuality(
            hit_rate=estimate(self.hits) if targets else None,
            ndcg=estimate(self.gains) if targets else None,
            value=None if target_values is None or not targets else _ratio(target_values * self.hits, target_values),
            true_value=estimate(self.truth) if len(self.truth) else None,
            served_ahead=estimate(ahead) if len(ahead) and self is not served else None,
        )


def evaluate(
    recommender: Recommender,
    folder: Path,
    split: Split = "test",
    limit: int | None = None,
    *,
    repeats: bool = False,
    on_batch: Progress = lambda done, total: None,
) -> Evaluation:
    """Answer held-out requests of prepared data and measure the lists.

    Args:
        recommender: The opened bundle.
        folder: Prepared data of the same items, actions and surfaces.
        split: The part to measure.
        limit: Answer at most this many requests, drawn evenly; None answers all.
        repeats: Recommend items that the user had before, and count them as targets.
        on_batch: Called with the number of answered requests and the number of all.

    Raises:
        DataError: The data cannot be read, has nothing to measure, or does not belong to the bundle.
    """
    held = HeldOut.read(folder, split, limit, repeats=repeats)
    client = Client(recommender, held)
    held = replace(held, requests=client.answerable(held.requests))
    retrieved, lists = _served(client, held, on_batch)
    lists |= _baselines(held, split)
    qualities = {name: measured.quality(held.target_values, lists["served"]) for name, measured in lists.items()}
    sheet = data_sheet(held.data, held.positive, split, repeats=repeats)
    return Evaluation(
        split=split,
        requests=len(held.requests),
        targets=len(retrieved),
        repeats=repeats,
        order=recommender.order,
        candidates=CANDIDATES,
        items=held.data.num_items,
        found=estimate(retrieved) if len(retrieved) else None,
        lists=qualities,
        actions={} if recommender.order == "retrieval" else _actions(client, held),
        gap_closed=_gap_closed(qualities),
        data={name: getattr(sheet, name) for name in ("unseen_targets", "without_history", "repeats")},
        warnings=(*sheet.sentences(), *_beaten(lists, slates=len(held.data.slate_ids) > 0)),
    )


def estimate(values: NDArray[np.float64]) -> Estimate:
    """Mean and standard error of at least one value."""
    return Estimate(mean=float(values.mean()), error=standard_error(values) if len(values) > 1 else 0.0)


def _ratio(parts: NDArray[np.float64], wholes: NDArray[np.float64]) -> Estimate:
    ratio = float(parts.sum() / wholes.sum())
    return Estimate(mean=ratio, error=float(estimate(parts - ratio * wholes).error / wholes.mean()))


def _served(client: Client, held: HeldOut, on_batch: Progress) -> tuple[NDArray[np.float64], dict[str, Measured]]:
    """For each target, 1 if it is among the candidates; and the measured lists of each order."""
    retrieved, lists, done = [np.zeros(0)], defaultdict[str, Measured](Measured), 0
    for part in held.requests.chunks(BATCH):
        answers, has, truth = client.candidates(part), part.targets != NO_TARGET, held.chances(part)
        targets = part.targets[has, None]
        retrieved.append((answers.rows[has] == targets).any(axis=1).astype(np.float64))
        for name, rows in answers.orders().items():
            at = rows[has, :TOP] == targets
            lists[name].ranks.append(np.where(at.any(axis=1), at.argmax(axis=1), np.inf))
            if truth is not None:
                lists[name].true_values.append(_mean_chance(truth, rows[:, :TOP]))
        done += len(part)
        on_batch(done, len(held.requests))
    return np.concatenate(retrieved), dict(lists)


def _mean_chance(truth: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean true chance [R] of the listed items [R, 10], without MISSING ones; `truth` is [R, N]."""
    chances = np.take_along_axis(truth, np.maximum(rows, 0), axis=1).astype(np.float64)
    known = rows != MISSING
    means: NDArray[np.float64] = (chances * known).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return means


def _baselines(held: HeldOut, split: Split) -> dict[str, Measured]:
    """Lists of each baseline and of the truth, from the catalogue without the items that are left out.

    Baselines know everything before the measured part.
    """
    scorers = baselines_of(held.data, held.positive, fit_validation=split == "test", repeats=held.requests.repeats)
    if held.oracle is not None:
        scorers["best"] = held.known_chances
    lists = {name: Measured() for name in scorers}
    for part in held.requests.chunks(max(1, CELLS // held.data.num_items)):
        seen, truth, has = left_out(held.data, part), held.chances(part), part.targets != NO_TARGET
        for name, scores_of in scorers.items():
            scores = scores_of(part)
            for row, items in enumerate(seen):
                scores[row, items] = -np.inf
            if truth is not None:
                best = np.argpartition(-scores, min(TOP, held.data.num_items) - 1, axis=1)[:, :TOP]
                lists[name].true_values.append(_mean_chance(truth, best))
            lists[name].ranks.append(target_ranks(scores[has], [], part.targets[has]))  # seen items are out already
    return lists


def _actions(client: Client, held: HeldOut) -> dict[str, ActionQuality]:
    """Quality of the action probabilities on shown items."""
    slated = held.requests.take(np.flatnonzero(held.requests.slates != NO_SLATE))
    if not len(slated):
        return {}
    data, shown = held.data, shown_items(held.data, slated)
    judged = [items for part in slated.chunks(BATCH) for items in client.shown(part)]
    names = held.dataset.spec.actions
    probabilities = np.array([[item.actions[name] for name in names] for items in judged for item in items])
    slates = slates_of(data, shown)
    measured = {}
    for index, name in enumerate(names):
        labels, chances = data.slate_actions[shown, index], probabilities[:, index]
        by_user = action_metrics(data.slate_user[slates], labels, chances)
        measured[name] = ActionQuality(
            auc=by_user.auc,
            gauc=by_user.gauc,
            slate_auc=action_metrics(slates, labels, chances).gauc,
            logloss=by_user.logloss,
            rows=by_user.rows,
        )
    return measured


def _gap_closed(lists: Mapping[str, ListQuality]) -> float | None:
    if "best" not in lists:
        return None
    served, popular, best = (lists[name].true_value for name in ("served", POPULAR, "best"))
    if served is None or popular is None or best is None or best.mean <= popular.mean:
        return None
    return (served.mean - popular.mean) / (best.mean - popular.mean)


def _beaten(lists: Mapping[str, Measured], *, slates: bool) -> list[str]:
    """One sentence per baseline that beats or equals the served list, and one if ranking loses by far to retrieval."""
    served, sentences = lists["served"], []
    policy = "; the policy of the log chose to show that item, so look at the ranking metrics too" if slates else ""
    for name, baseline in lists.items():
        if name in ("served", "best") or name.startswith("by_") or not len(served.hits):
            continue
        for metric, ours, theirs in (("HR@10", served.hits, baseline.hits), ("NDCG@10", served.gains, baseline.gains)):
            ahead = estimate(theirs - ours)
            if ahead.mean > 0:
                verb = "beats" if ahead.mean > SURE * ahead.error else "is as good as"
                sentences.append(
                    f"{named(name)} {verb} the served list at the logged next item: {metric} {theirs.mean():.4f} "
                    f"against {ours.mean():.4f} (difference {ahead.mean:.4f}, standard error {ahead.error:.4f})"
                    f"{policy}; train longer or on more events, or serve the simpler list"
                )
                break
    retrieval = lists["by_retrieval"]
    if len(served.hits) and served.hits.mean() < retrieval.hits.mean() / 2:
        sentences.append(
            f"the served list holds the logged next item less than half as often as retrieval's order: HR@10 "
            f"{served.hits.mean():.4f} against {retrieval.hits.mean():.4f}{policy}; compare both lists on your own "
            "traffic (order 'retrieval')"
        )
    return sentences
