"""Held-out requests of prepared data, sent to a bundle as a client would send them.

The history is the user's events before the request; its items are left out. Time and surface are those of the shown
slate, or of the next event.
"""

from __future__ import annotations

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
from unipinrec.runtime.requests import CANDIDATES, History

MISSING = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Held-out requests of a prepared data set, and the known truth about them.

    Attributes:
        folder, dataset, data: The data.
        positive: [C] which actions make an event a target.
        requests: R requests.
        oracle: The true chances of simulated data.
    """

    folder: Path
    dataset: Dataset
    data: Sequences
    positive: NDArray[np.bool_]
    requests: Requests
    oracle: Oracle | None

    @classmethod
    def read(cls, folder: Path, split: Split, limit: int | None, *, repeats: bool) -> HeldOut:
        """Read the requests of a split, at most `limit` of them, drawn evenly.

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
        simulated = len(data.slate_ids) and (folder / "oracle.parquet").exists()
        oracle = read_oracle(folder) if simulated else None
        return cls(folder=folder, dataset=dataset, data=data, positive=positive, requests=requests, oracle=oracle)

    @cached_property
    def target_values(self) -> NDArray[np.float64] | None:
        """Positive actions of each of the T targets; None if slates hold them, or if all targets have as many."""
        if len(self.data.slate_ids):
            return None
        indices = np.flatnonzero(self.requests.targets != NO_TARGET).tolist()
        values = np.array([self._value(index) for index in indices], np.float64)
        return values if len(set(values.tolist())) > 1 else None

    def _value(self, index: int) -> int:
        target, event = self.requests.targets[index], self.requests.ends[index]
        while self.data.rows[event] != target:  # among events of the same time, the target may not be the first
            event += 1
        return int(self.data.actions[event][self.positive].sum())

    def chances(self, part: Requests) -> NDArray[np.float32] | None:
        """True chance [requests, N] of a positive action; None if unknown."""
        return None if self.oracle is None else self.known_chances(part)

    def known_chances(self, part: Requests) -> NDArray[np.float32]:
        """True chance [requests, N] of a positive action in simulated data."""
        assert self.oracle is not None
        return oracle_click_chances(self.oracle, self.data.slate_ids[part.slates].tolist())


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Candidates of R requests as the bundle returns them, best first.

    Attributes:
        rows: [R, K] in the catalogue of the data; MISSING behind the last candidate.
        similarity: [R, K] retrieval score.
        values: [R, K]; None if the ranker did not run.
        positive: [R, K] chance of any positive action, with actions taken as independent. None if the ranker did not
            run, or if only one action is positive: the order by product then equals retrieval's.
        retrieval_scale: See `OrderSpec`.
    """

    rows: NDArray[np.int64]
    similarity: NDArray[np.float64]
    values: NDArray[np.float64] | None
    positive: NDArray[np.float64] | None
    retrieval_scale: float | None

    def orders(self) -> dict[str, NDArray[np.int64]]:
        """Rows [R, K] in each order; by product only if the bundle has a scale."""
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


class Client:
    """Sends held-out requests to a recommender."""

    def __init__(self, recommender: Recommender, held: HeldOut) -> None:
        """Check that the bundle knows all actions, surfaces and items of the data.

        Raises:
            DataError: The data has other actions or surfaces than the bundle, or items that the bundle lacks.
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
        self.recommender, self.held = recommender, held
        catalogue = recommender.bundle.catalogue
        self._bundle_rows = np.array([catalogue.rows[item] for item in held.data.item_ids])
        live = np.ones(catalogue.num_rows, np.bool_) if catalogue.live is None else catalogue.live
        self._live = live[self._bundle_rows]
        self._rows = {item: row for row, item in enumerate(held.data.item_ids)}
        self._user, self._events = -1, tuple[Event, ...]()

    def answerable(self, requests: Requests) -> Requests:
        """The requests that have an item left to serve and no retired item in their slates.

        Raises:
            NothingHeldOutError: There are none.
        """
        data, left = self.held.data, np.array(self._eligible(requests)) > 0
        spans = [slice(*data.slate_start[slate : slate + 2]) if slate >= 0 else slice(0) for slate in requests.slates]
        shown = np.array([bool(self._live[data.slate_rows[span]].all()) for span in spans], np.bool_)
        kept = requests.take(np.flatnonzero(left & shown))
        if not len(kept):
            raise NothingHeldOutError(
                f"{self.held.folder}: none of the {len(requests)} requests can be answered: their users have seen all "
                "items that are left, or their slates show items that were retired"
            )
        return kept

    def _eligible(self, part: Requests) -> list[int]:
        live = self.recommender.bundle.catalogue.num_live
        return [live - int(self._live[np.unique(rows)].sum()) for rows in left_out(self.held.data, part)]

    def candidates(self, part: Requests) -> Answers:
        """The candidates of requests, as the bundle returns them."""
        counts = [min(CANDIDATES, eligible) for eligible in self._eligible(part)]
        slates = self._recommend(part, counts, [{"exclude_seen": not part.repeats}] * len(part))
        width = max(len(slate.items) for slate in slates)
        rows, (similarity, values, positive) = np.full((len(slates), width), MISSING), np.zeros((3, len(slates), width))
        names = self.held.dataset.spec.positive_actions
        for at, slate in enumerate(slates):
            own = slice(len(slate.items))
            # The data lacks items that were added to the bundle after export.
            rows[at, own] = [self._rows.get(item.item, MISSING) for item in slate.items]
            similarity[at, own] = [item.retrieval_score for item in slate.items]
            if slate.order != "retrieval":
                values[at, own] = [item.value for item in slate.items]
                chances = np.array([[item.actions[name] for name in names] for item in slate.items])
                positive[at, own] = 1.0 - np.prod(1.0 - chances, axis=1)
        ranked, scoring = self.recommender.order != "retrieval", self.recommender.scoring
        return Answers(
            rows=rows,
            similarity=similarity,
            values=values if ranked else None,
            positive=positive if ranked and len(names) > 1 else None,
            retrieval_scale=scoring.retrieval_scale if scoring else None,
        )

    def shown(self, part: Requests) -> list[list[SlateItem]]:
        """The shown items of each request's slate, in the order of `shown_items`, as the bundle ranks them."""
        data = self.held.data
        rows = data.slate_rows[shown_items(data, part)]
        sizes = np.diff(data.slate_start)[part.slates]
        shown = [[data.item_ids[row] for row in run] for run in np.split(rows, np.cumsum(sizes)[:-1])]
        options = [{"allow": tuple(items), "order": "value", "exclude_seen": False} for items in shown]
        slates = self._recommend(part, sizes.tolist(), options)
        ranked = [{item.item: item for item in slate.items} for slate in slates]
        return [[by_id[item] for item in items] for by_id, items in zip(ranked, shown, strict=True)]

    def _recommend(self, part: Requests, counts: list[int], options: list[dict[str, Any]]) -> list[Slate]:
        """Slates of so many items; `options` are further fields of `RecommendOptions`."""
        data, surfaces = self.held.data, self.held.dataset.spec.surfaces
        columns = (part.users, part.ends, request_surfaces(data, part), request_times_ms(data, part))
        rows = zip(*(column.tolist() for column in columns), counts, options, strict=True)
        requests = [
            Request(
                history=self._events_of(user)[: end - data.event_start[user]],
                k=k,
                options=RecommendOptions(
                    surface=surfaces[surface],
                    now_ms=None if time_ms == MISSING_TIMESTAMP_MS else time_ms,
                    candidates=max(CANDIDATES, k),
                    **further,
                ),
            )
            for user, end, surface, time_ms, k, further in rows
        ]
        return self.recommender.recommend_many(requests)

    def _events_of(self, user: int) -> tuple[Event, ...]:
        """All events of a user. Keeps those of the last user, since requests of one user stand together."""
        if user != self._user:
            data = self.held.data
            own = slice(*data.event_start[user : user + 2])
            history = History(
                item_rows=self._bundle_rows[data.rows[own]],
                actions=data.actions[own].astype(np.float32),
                surfaces=data.surfaces[own],
                timestamps_ms=data.timestamps_ms[own],
            )
            self._user, self._events = user, self.recommender.bundle.events_of(history)
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
