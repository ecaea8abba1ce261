"""The lists that a bundle serves, measured on held-out requests of prepared data.

Each request is answered as a client would get it. The 200 candidates that come back hold every figure: the served list
is the first ten of them, and the same candidates in another order are what that order would serve.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unipinrec.export.lists.held_out_requests import MISSING, Client, HeldOut
from unipinrec.models.baselines import Scorer, baselines_of
from unipinrec.models.evaluate import NO_SLATE, NO_TARGET, Split, shown_items
from unipinrec.models.metrics import action_metrics, target_ranks
from unipinrec.models.training.sheet import data_sheet
from unipinrec.runtime import Recommender
from unipinrec.runtime.bundle.quality import ActionQuality, Estimate, Evaluation, ListQuality, named
from unipinrec.runtime.requests import CANDIDATES

TOP = 10
BATCH = 64
CELLS = 1 << 23  # of [requests, items] at once
POPULAR = "popular_all_time"
SURE = 2.0  # standard errors
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """One list per request: 0-based ranks of the T targets, inf where a list lacks its target, and true values [R]."""

    ranks: list[NDArray[np.float64]] = field(default_factory=list)
    true_values: list[NDArray[np.float64]] = field(default_factory=list)

    @cached_property
    def hits(self) -> NDArray[np.float64]:
        """[T] whether the target is among the ten."""
        return (np.concatenate([np.zeros(0), *self.ranks]) < TOP).astype(np.float64)

    @cached_property
    def gains(self) -> NDArray[np.float64]:
        """[T] NDCG@10."""
        return self.hits / np.log2(np.concatenate([np.zeros(0), *self.ranks]) + 2.0)

    @cached_property
    def truth(self) -> NDArray[np.float64]:
        """[R] true values; empty where they are not known."""
        return np.concatenate([np.zeros(0), *self.true_values])

    def quality(self, target_values: NDArray[np.float64] | None, served: Measured) -> ListQuality:
        """With standard errors, and compared with the served list; see `HeldOut.target_values`."""
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
        recommender: Of the bundle.
        folder: Prepared data of the same items, actions and surfaces.
        split: Which part.
        limit: Answer at most so many requests, drawn evenly; None = all.
        repeats: Serve items that the user had before, and count them as targets.
        on_batch: Called with how many requests are answered, and how many there are.

    Raises:
        DataError: The data cannot be read, has nothing to measure, or is not that of the bundle.
    """
    held = HeldOut.read(folder, split, limit, repeats=repeats)
    client = Client(recommender, held)
    held = replace(held, requests=client.answerable(held.requests))
    found, lists = _served(client, held, on_batch)
    lists |= _baselines(held, split)
    qualities = {name: measured.quality(held.target_values, lists["served"]) for name, measured in lists.items()}
    sheet = data_sheet(held.data, held.positive, split, repeats=repeats)
    return Evaluation(
        split=split,
        requests=len(held.requests),
        targets=len(found),
        repeats=repeats,
        order=recommender.order,
        candidates=CANDIDATES,
        items=held.data.num_items,
        found=estimate(found) if len(found) else None,
        lists=qualities,
        actions={} if recommender.order == "retrieval" else _actions(client, held),
        gap_closed=_gap_closed(qualities),
        data={name: getattr(sheet, name) for name in ("unseen_targets", "without_history", "repeats")},
        warnings=(*sheet.sentences(), *_beaten(lists, slates=len(held.data.slate_ids) > 0)),
    )


def estimate(values: NDArray[np.float64]) -> Estimate:
    """Mean and standard error of values [R], of which there is at least one."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return Estimate(mean=float(values.mean()), error=error)


def _ratio(parts: NDArray[np.float64], wholes: NDArray[np.float64]) -> Estimate:
    ratio = float(parts.sum() / wholes.sum())
    return Estimate(mean=ratio, error=float(estimate(parts - ratio * wholes).error / wholes.mean()))


def _served(client: Client, held: HeldOut, on_batch: Progress) -> tuple[NDArray[np.float64], dict[str, Measured]]:
    """Whether each target is among the candidates, and the candidates in each order."""
    found, lists, done = [np.zeros(0)], defaultdict[str, Measured](Measured), 0
    for part in held.chunks(BATCH):
        answers, has, truth = client.candidates(part), part.targets != NO_TARGET, held.chances(part)
        targets = part.targets[has, None]
        found.append((answers.rows[has] == targets).any(axis=1).astype(np.float64))
        for name, rows in answers.orders().items():
            at = rows[has, :TOP] == targets
            lists[name].ranks.append(np.where(at.any(axis=1), at.argmax(axis=1), np.inf))
            if truth is not None:
                lists[name].true_values.append(_mean_chance(truth, rows[:, :TOP]))
        done += len(part)
        on_batch(done, len(held.requests))
    return np.concatenate(found), dict(lists)


def _mean_chance(truth: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of the listed items [R, 10], where MISSING is none, the mean of truth [R, N]."""
    chances = np.take_along_axis(truth, np.maximum(rows, 0), axis=1).astype(np.float64)
    known = rows != MISSING
    means: NDArray[np.float64] = (chances * known).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return means


def _baselines(held: HeldOut, split: Split) -> dict[str, Measured]:
    """The whole catalogue, but for what is not served, in the order of each baseline, and of the truth.

    Baselines know all that came before the part that is measured.
    """
    scorers: dict[str, Scorer] = baselines_of(
        held.data, held.positive, fit_validation=split == "test", repeats=held.requests.repeats
    )
    if held.oracle is not None:
        scorers["best"] = held.known_chances
    lists = {name: Measured() for name in scorers}
    for part in held.chunks(max(1, CELLS // held.data.num_items)):
        seen, truth, has = held.seen(part), held.chances(part), part.targets != NO_TARGET
        for name, scores_of in scorers.items():
            scores = scores_of(part)
            for row, items in enumerate(seen):
                scores[row, items] = -np.inf
            if truth is not None:
                best = np.argpartition(-scores, min(TOP, held.data.num_items) - 1, axis=1)[:, :TOP]
                lists[name].true_values.append(_mean_chance(truth, best))
            nothing = [np.zeros(0, np.int64)] * int(has.sum())  # it is left out above
            lists[name].ranks.append(target_ranks(scores[has], nothing, part.targets[has]))
    return lists


def _actions(client: Client, held: HeldOut) -> dict[str, ActionQuality]:
    """How the probabilities order what slates showed."""
    slated = held.requests.take(np.flatnonzero(held.requests.slates != NO_SLATE))
    if not len(slated):
        return {}
    data, shown = held.data, shown_items(held.data, slated)
    judged = [items for part in held.chunks(BATCH, slated) for items in client.shown(part)]
    names = held.dataset.spec.actions
    probabilities = np.array([[item.actions[name] for name in names] for items in judged for item in items])
    slates = np.searchsorted(data.slate_start, shown, side="right") - 1
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
    """A sentence about each baseline that beats what is served or is as good, and about a ranker that loses by far."""
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
