"""Held-out requests of prepared data, put to a bundle as a client would put them.

The user's events before the request are its history, and its items are left out. The request's time and surface are
those of the slate that was shown, or of the event that followed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import DataError, NothingHeldOutError
from unipinrec.models.config import MISSING_TIMESTAMP_MS
from unipinrec.models.data.schema import Dataset, read_dataset
from unipinrec.models.data.sequences import Sequences, sequences_of
from unipinrec.models.evaluate import (
    NO_SLATE,
    NO_TARGET,
    Requests,
    Split,
    held_out_requests,
    left_out,
    request_surfaces,
    request_times_ms,
    shown_items,
)
from unipinrec.models.simulator.oracle import Oracle, oracle_click_chances, read_oracle
from unipinrec.runtime import Event, Recommender, RecommendOptions, Request, Slate, SlateItem
from unipinrec.runtime.requests import CANDIDATES

MISSING = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Held-out requests of a prepared data set, and what is known about right answers.

    Attributes:
        folder, dataset, data: The data.
        positive: [C] which actions make an event a target.
        requests: R requests.
        oracle: The truth behind simulated data.
    """

    folder: Path
    dataset: Dataset
    data: Sequences
    positive: NDArray[np.bool_]
    requests: Requests
    oracle: Oracle | None

    @classmethod
    def read(cls, folder: Path, split: Split, limit: int | None, *, repeats: bool) -> HeldOut:
        """Read the requests of a split, at most `limit`, drawn evenly.

        Raises:
            NothingHeldOutError: The split has nothing to measure.
            DataError: The folder is no prepared data set.
        """
        dataset = read_dataset(folder)
        data = sequences_of(dataset)
        positive = dataset.spec.positive
        requests = held_out_requests(data, positive, split, limit, repeats=repeats)
        if not ((requests.targets != NO_TARGET) | (requests.slates != NO_SLATE)).any():
            raise NothingHeldOutError(f"{folder}: nothing to measure in the {split} part: {_why_nothing(data)}")
        known = len(data.slate_ids) and (folder / "oracle.parquet").exists()
        oracle = read_oracle(folder) if known else None
        return cls(folder=folder, dataset=dataset, data=data, positive=positive, requests=requests, oracle=oracle)

    @cached_property
    def has_target(self) -> NDArray[np.bool_]:
        """[R]."""
        found: NDArray[np.bool_] = self.requests.targets != NO_TARGET
        return found

    @cached_property
    def target_values(self) -> NDArray[np.float64] | None:
        """How many positive actions each of the T targets has; None where slates hold them, or all are alike."""
        if len(self.data.slate_ids):
            return None
        values = np.array([self._value(int(index)) for index in np.flatnonzero(self.has_target)], np.float64)
        return values if len(set(values.tolist())) > 1 else None

    def _value(self, index: int) -> int:
        target, event = self.requests.targets[index], self.requests.ends[index]
        while self.data.rows[event] != target:  # of events at one time, it may not be the first
            event += 1
        return int(self.data.actions[event][self.positive].sum())

    def seen(self, part: Requests) -> list[NDArray[np.int64]]:
        """Rows that are not served to each request."""
        return left_out(self.data, part)

    def chances(self, part: Requests) -> NDArray[np.float32] | None:
        """True chance [requests, N] of a positive action; None where it is not known."""
        return None if self.oracle is None else self.known_chances(part)

    def known_chances(self, part: Requests) -> NDArray[np.float32]:
        """The same of simulated data."""
        assert self.oracle is not None
        return oracle_click_chances(self.oracle, self.data.slate_ids[part.slates].tolist())

    def chunks(self, size: int, some: Requests | None = None) -> Iterator[Requests]:
        """All requests, or some of them, `size` at a time."""
        requests = self.requests if some is None else some
        for start in range(0, len(requests), size):
            yield requests.take(np.arange(start, min(start + size, len(requests))))


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Candidates of R requests as they were served, best first.

    Attributes:
        rows: [R, K] in the catalogue of the data, MISSING where there were fewer.
        similarity: [R, K] retrieval score.
        values: [R, K]; None where the ranker did not run.
        positive: [R, K] chance of any positive action, taken as independent; None likewise, and where one action alone
            is positive: the product is then retrieval's order.
    """

    rows: NDArray[np.int64]
    similarity: NDArray[np.float64]
    values: NDArray[np.float64] | None
    positive: NDArray[np.float64] | None
    retrieval_scale: float | None

    def orders(self) -> dict[str, NDArray[np.int64]]:
        """Rows [R, K] in each order; by product only where the bundle has a scale (see `OrderSpec`)."""
        scores = {"by_retrieval": self.similarity}
        if self.values is not None:
            scores["by_value"] = self.values
            if self.retrieval_scale is not None and self.positive is not None:
                with np.errstate(divide="ignore", invalid="ignore"):
                    scores["by_product"] = self.retrieval_scale * self.similarity + np.log(self.values / self.positive)
        missing = self.rows == MISSING
        indices = {name: np.argsort(np.where(missing, np.inf, -score), kind="stable") for name, score in scores.items()}
        return {
            "served": self.rows,
            **{name: np.take_along_axis(self.rows, index, axis=1) for name, index in indices.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Query:
    """How many items are wanted, and further fields of `RecommendOptions`."""

    k: int
    options: dict[str, Any]


class Client:
    """Puts held-out requests to a recommender."""

    def __init__(self, recommender: Recommender, held: HeldOut) -> None:
        """Check that the bundle knows what the data names.

        Raises:
            DataError: The data has other actions or surfaces than the bundle, or items that it lacks.
        """
        manifest, spec = recommender.bundle.manifest, held.dataset.spec
        for name in ("actions", "positive_actions", "surfaces"):
            then, now = list(getattr(manifest, name)), list(getattr(spec, name))
            if then != now:
                raise DataError(f"{held.folder} is not the data of the bundle: {name} were {then}, are {now}")
        unknown = [item for item in held.data.item_ids if item not in recommender.bundle.rows]
        if unknown:
            raise DataError(
                f"{held.folder} is not the data of the bundle, which lacks {len(unknown)} of its items, such as "
                f"{unknown[:3]}; give the data that the model was trained on"
            )
        self._recommender, self._held = recommender, held
        catalogue = recommender.bundle.catalogue
        rows = np.array([catalogue.rows[item] for item in held.data.item_ids])
        self._live = np.ones(len(rows), np.bool_) if catalogue.live is None else catalogue.live[rows]
        self._rows = {item: row for row, item in enumerate(held.data.item_ids)}
        self._user, self._events = -1, tuple[Event, ...]()

    def answerable(self, requests: Requests) -> Requests:
        """Those with an item left to serve, and with nothing in their slates that was retired since.

        Raises:
            NothingHeldOutError: There are none.
        """
        data, left = self._held.data, np.array(self._eligible(requests)) > 0
        spans = [slice(*data.slate_start[slate : slate + 2]) if slate >= 0 else slice(0) for slate in requests.slates]
        shown = np.array([bool(self._live[data.slate_rows[span]].all()) for span in spans], np.bool_)
        kept = requests.take(np.flatnonzero(left & shown))
        if not len(kept):
            raise NothingHeldOutError(
                f"{self._held.folder}: none of the {len(requests)} requests can be answered: their users have seen all "
                "items that are left, or their slates show items that were retired"
            )
        return kept

    def _eligible(self, part: Requests) -> list[int]:
        live = self._recommender.bundle.catalogue.num_live
        return [live - int(self._live[np.unique(rows)].sum()) for rows in self._held.seen(part)]

    def candidates(self, part: Requests) -> Answers:
        """The candidates of requests as they are served."""
        asked = [
            Query(k=min(CANDIDATES, eligible), options={"exclude_seen": not part.repeats})
            for eligible in self._eligible(part)
        ]
        slates = self._ask(part, asked)
        width = max(len(slate.items) for slate in slates)
        rows, (similarity, values, positive) = np.full((len(slates), width), MISSING), np.zeros((3, len(slates), width))
        names = self._held.dataset.spec.positive_actions
        for at, slate in enumerate(slates):
            own = slice(len(slate.items))
            # An item that was added to the bundle after export is none of the data's.
            rows[at, own] = [self._rows.get(item.item, MISSING) for item in slate.items]
            similarity[at, own] = [item.retrieval_score for item in slate.items]
            if slate.order != "retrieval":
                values[at, own] = [item.value for item in slate.items]
                chances = np.array([[item.actions[name] for name in names] for item in slate.items])
                positive[at, own] = 1.0 - np.prod(1.0 - chances, axis=1)
        ranked, scoring = self._recommender.order != "retrieval", self._recommender.scoring
        return Answers(
            rows=rows,
            similarity=similarity,
            values=values if ranked else None,
            positive=positive if ranked and len(names) > 1 else None,
            retrieval_scale=scoring.retrieval_scale if scoring else None,
        )

    def shown(self, part: Requests) -> list[list[SlateItem]]:
        """What each request's slate showed, in the order of `shown_items`, as the bundle judges it."""
        data = self._held.data
        rows = data.slate_rows[shown_items(data, part)]
        sizes = np.diff(data.slate_start)[part.slates]
        shown = [[data.item_ids[row] for row in run] for run in np.split(rows, np.cumsum(sizes)[:-1])]
        asked = [
            Query(k=len(items), options={"allow": tuple(items), "order": "value", "exclude_seen": False})
            for items in shown
        ]
        judged = [{item.item: item for item in slate.items} for slate in self._ask(part, asked)]
        return [[found[item] for item in items] for found, items in zip(judged, shown, strict=True)]

    def _ask(self, part: Requests, asked: list[Query]) -> list[Slate]:
        data, surfaces = self._held.data, self._held.dataset.spec.surfaces
        times = request_times_ms(data, part).tolist()
        requests = [
            Request(
                history=self._events_of(user)[: end - data.event_start[user]],
                k=query.k,
                options=RecommendOptions(
                    surface=surfaces[surface],
                    now_ms=None if time_ms == MISSING_TIMESTAMP_MS else time_ms,
                    candidates=max(CANDIDATES, query.k),
                    **query.options,
                ),
            )
            for query, user, end, surface, time_ms in zip(
                asked,
                part.users.tolist(),
                part.ends.tolist(),
                request_surfaces(data, part).tolist(),
                times,
                strict=True,
            )
        ]
        return self._recommender.recommend_many(requests)

    def _events_of(self, user: int) -> tuple[Event, ...]:
        """All events of a user; requests of one user stand together."""
        if user != self._user:
            data, spec = self._held.data, self._held.dataset.spec
            own = slice(*data.event_start[user : user + 2].tolist())
            self._user, self._events = (
                user,
                tuple(
                    Event(
                        item=data.item_ids[row],
                        actions=tuple(itertools.compress(spec.actions, actions)),
                        surface=spec.surfaces[surface],
                        timestamp_ms=None if time_ms == MISSING_TIMESTAMP_MS else time_ms,
                    )
                    for row, actions, surface, time_ms in zip(
                        data.rows[own],
                        data.actions[own],
                        data.surfaces[own],
                        data.timestamps_ms[own].tolist(),
                        strict=True,
                    )
                ),
            )
        return self._events


def _why_nothing(data: Sequences) -> str:
    if data.split is None:
        return "no user has an event to hold out, after others and of a new item; give longer histories"
    if len(data.slate_ids):
        lack = "no slate of that part has an event of its user before it"
    else:
        lack = "no positive event of that part is of an item new to its user, with events before it"
    times = f"valid_start_ms={data.split.valid_start_ms} and test_start_ms={data.split.test_start_ms}"
    return f"{lack}, with {times}; run `unipinrec prepare` again with other --valid-start and --test-start"
