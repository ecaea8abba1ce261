"""What a caller asks and gets: types, and how JSON becomes them. Knows no bundle: `validation.py` has the rules."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import MALFORMED, RequestError

EVENT_FORMAT = (
    'a history is a list, oldest first, of {"item": "id", "actions": ["name"], "surface": "name", "timestamp_ms": 0}; '
    "surface and timestamp_ms may be left out"
)


Order = Literal["value", "blend", "product", "retrieval"]


UNKNOWN_SURFACE = "unknown"
AS_SECONDS = range(631_152_000, 10**10)  # Unix times from 1990 on in seconds: as milliseconds they are in early 1970
YEAR_10000_MS = 253_402_300_800_000  # beyond it a time is in micro- or nanoseconds


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One event of a user's history.

    Attributes:
        item: External item id; an integer stands for its decimal string.
        actions: What the user did; empty = saw the item and did nothing.
        surface: Where it happened; one of the bundle's surfaces.
        timestamp_ms: Unix time in ms; None = unknown, allowed only before the first known time.
    """

    item: str | int
    actions: tuple[str, ...]
    surface: str = UNKNOWN_SURFACE
    timestamp_ms: int | None = None


class RecommendOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to answer a request.

    Attributes:
        surface: Where the items will be shown.
        now_ms: Time of the request. None = the current time, or unknown where the whole history's times are: a model
            of data without times has never seen one.
        candidates: How many items retrieval hands to ranking; raised to k, lowered to what is eligible.
        order: What the slate is ordered by: "value", "blend", "product" or "retrieval" (docs/ranking.md). None =
            what the bundle says. With "retrieval" the ranker does not run.
        weights: Weight of each action's probability in the value; an action left out weighs 0. None = 1 for each
            positive action of the bundle.
        outcomes: Actions that retrieval aims at, where the model is conditioned on them. None = the positive actions.
        exclude_seen: Leave out the items of the history.
        exclude: Further item ids to leave out; ids that the catalogue lacks have no effect. As everywhere, an integer
            stands for its decimal string.
        allow: The only item ids that may be recommended; ids that the catalogue lacks have no effect. None = all.
        categories: The words that are accepted of categorical item features, by feature; an item must have one of the
            words of each. None = all.
        exact: Scan all items instead of asking the index.
        truncate: Of a history that is too long keep a window of the newest events (see `window_start`), instead of
            refusing it.
    """

    surface: str = UNKNOWN_SURFACE
    now_ms: int | None = None
    candidates: int = 200
    order: Order | None = None
    weights: dict[str, float] | None = None
    outcomes: tuple[str, ...] | None = None
    exclude_seen: bool = True
    exclude: tuple[str | int, ...] = ()
    allow: tuple[str | int, ...] | None = None
    categories: dict[str, tuple[str, ...]] | None = None
    exact: bool = False
    truncate: bool = True


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One user's question: the k best items after this history (oldest event first).

    Under `user` the encoded history is kept for the next request, where the recommender has a cache; the history itself
    must come with every request.
    """

    history: tuple[Event, ...]
    k: int = 20
    options: RecommendOptions = RecommendOptions()
    user: str | None = None


@dataclass(frozen=True, kw_only=True)
class History:
    """A valid history of n events, oldest first: item_rows, surfaces, timestamps_ms [n] i64, actions [n, C] f32."""

    item_rows: NDArray[np.int64]
    actions: NDArray[np.float32]
    surfaces: NDArray[np.int64]
    timestamps_ms: NDArray[np.int64]

    def __len__(self) -> int:
        """n."""
        return len(self.item_rows)

    def part(self, start: int, stop: int | None = None) -> History:
        """Events `start` up to `stop`."""
        window = slice(start, stop)
        return History(
            item_rows=self.item_rows[window],
            actions=self.actions[window],
            surfaces=self.surfaces[window],
            timestamps_ms=self.timestamps_ms[window],
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A valid request in the terms of its bundle.

    `excluded` holds distinct catalogue rows, `allowed` is a mask [N] of the others or None (see `Catalogue`), `weights`
    is [C] f64, `outcomes` [C] f32; k <= candidates, and at least `candidates` rows are allowed and not excluded.
    `start` is the place of the first event of `history` among those that were sent.
    """

    user: str | None
    history: History
    start: int
    surface: int
    now_ms: int
    k: int
    candidates: int
    order: Order
    weights: NDArray[np.float64]
    outcomes: NDArray[np.float32]
    excluded: NDArray[np.int64]
    allowed: NDArray[np.bool_] | None
    exact: bool


EventLike = Event | Mapping[str, Any]


def parse_events(content: bytes, source: str = "history") -> tuple[Event, ...]:
    """Read a JSON list of events; `source` names it in errors.

    Raises:
        RequestError: It is not JSON, or not a list of events; an unknown key is an error.
    """
    try:
        return msgspec.json.decode(content.removeprefix(codecs.BOM_UTF8), type=tuple[Event, ...])
    except MALFORMED as error:
        raise RequestError(f"{source}: {error}; {EVENT_FORMAT}") from error


def as_events(history: Iterable[EventLike]) -> tuple[Event, ...]:
    """Turn dictionaries with the keys of `Event` into events; events pass.

    Raises:
        RequestError: An element is neither, lacks a key, has an unknown one or a value of the wrong type.
    """
    events = []
    for position, given in enumerate(history):
        try:
            events.append(given if isinstance(given, Event) else msgspec.convert(given, type=Event))
        except msgspec.ValidationError as error:
            raise RequestError(f"history[{position}]: {error}; {EVENT_FORMAT}") from error
    return tuple(events)


def check_types(request: Request) -> None:
    """Find what in a request is of a type that its fields do not take.

    Raises:
        RequestError: Something is; names it.
    """
    try:
        msgspec.convert(msgspec.to_builtins(request), Request)
    except (TypeError, ValueError) as error:
        raise RequestError(f"the request has a value of the wrong type: {error}") from error


class SlateItem(msgspec.Struct, frozen=True, kw_only=True):
    """One recommended item.

    Attributes:
        item: External id.
        title: For people; None where the bundle has none.
        score: What the slate is sorted by (see `Slate.order` and docs/ranking.md); the share of a popular item.
        value: Weighted sum of the action probabilities; None where the ranker did not run.
        actions: Probability of each action; empty where the ranker did not run.
        retrieval_score: Similarity of the item with the user's query; None of a popular item.
    """

    item: str
    title: str | None
    score: float
    value: float | None
    actions: dict[str, float]
    retrieval_score: float | None


class StageTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of each stage; of the whole batch where requests were answered together."""

    encode: float
    retrieve: float
    rank: float
    total: float


class Slate(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one request.

    Attributes:
        items: Best first.
        source: What chose the items: "model"; "popular", as the history is empty.
        order: What the score is: "value"; "blend", the value times a power of the chance that retrieval gives the item,
            up to a factor of the request; "product", the logarithm of the value times the chance of an engagement, up
            to a constant of the request; "retrieval", the retrieval score. None of popular items.
        stages_ms: What each stage took.
        kv: Where the history's keys and values came from.
        kv_reason: Why they were not, or not wholly, cached.
        device: What ran.
        bundle: Hash of the bundle.
        exact: Why all items were scanned; None = the index found the candidates, or the items are popular ones.
    """

    items: tuple[SlateItem, ...]
    source: Literal["model", "popular"]
    order: Order | None
    stages_ms: StageTimes
    kv: Literal["hit", "extended", "miss"]
    kv_reason: str | None
    device: str
    bundle: str
    exact: str | None

    def to_json(self) -> dict[str, Any]:
        """The documented JSON form; titles and `exact` are not part of it."""
        document: dict[str, Any] = msgspec.to_builtins(self)
        del document["exact"]
        for item in document["items"]:
            del item["title"]
        return document
