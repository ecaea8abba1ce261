"""Types of requests and answers, and how to read them from JSON. `validation.py` checks a request against a bundle."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import RequestError, decoding

EVENT_FORMAT = (
    'a history is a list, oldest first, of {"item": "id", "actions": ["name"], "surface": "name", "timestamp_ms": 0}; '
    "surface and timestamp_ms may be left out"
)


Order = Literal["value", "blend", "product", "retrieval"]


UNKNOWN_SURFACE = "unknown"
CANDIDATES = 200  # default number of candidates that retrieval passes to ranking
SOON_MS = 60_000  # samples and checks request this long after the last event
AS_SECONDS = range(631_152_000, 10**10)  # Unix times from 1990 on in seconds: as milliseconds they are in early 1970
YEAR_10000_MS = 253_402_300_800_000  # beyond it a time is in micro- or nanoseconds


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One event of a user's history.

    Attributes:
        item: External item id; an integer stands for its decimal string.
        actions: What the user did; empty = saw the item and did nothing.
        surface: Where the user saw the item; one of the bundle's surfaces.
        timestamp_ms: Unix time in ms; None = unknown, allowed only before the first known time.
    """

    item: str | int
    actions: tuple[str, ...]
    surface: str = UNKNOWN_SURFACE
    timestamp_ms: int | None = None


class Range(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Accepted numbers, both ends included; None = no end. A missing number is in no range."""

    min: float | None = None
    max: float | None = None


class RankOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to rank items.

    Attributes:
        surface: Where the items will be shown.
        now_ms: Time of the request. None = the current time; if all times of the history are unknown, so is this one.
        order: Score that the slate is sorted by: "value", "blend", "product" or "retrieval" (docs/ranking.md). None =
            the bundle's order. With "retrieval" the ranker does not run.
        weights: Weight of each action's probability in the value; an omitted action weighs 0. None = 1 for each
            positive action of the bundle.
        outcomes: Actions that retrieval targets, for a model that is conditioned on them. None = the positive actions.
        truncate: Cut a history that is too long to a window of the newest events (see `window_start`) instead of
            rejecting it.
        skip_unknown: Leave out the request's items that the bundle lacks or has retired, and name them in the answer,
            instead of rejecting the request.
    """

    surface: str = UNKNOWN_SURFACE
    now_ms: int | None = None
    order: Order | None = None
    weights: dict[str, float] | None = None
    outcomes: tuple[str, ...] | None = None
    truncate: bool = True
    skip_unknown: bool = False


class RecommendOptions(RankOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to find and rank items; with the fields of `RankOptions`.

    Attributes:
        candidates: How many items retrieval passes to ranking; raised to k, lowered to the number of eligible items.
        own_candidates: Items that are ranked beside those of retrieval, if the filters do not leave them out. One that
            is named twice counts once.
        exclude_seen: Leave out the items of the history.
        exclude: More item ids to leave out; ids outside the catalogue have no effect. An integer stands for its
            decimal string.
        allow: The only item ids that may be recommended; ids outside the catalogue have no effect. None = all.
        categories: Accepted words by categorical item feature; an item needs one of the words of each. None = all.
        ranges: Accepted numbers by column of the items' metadata; an item needs a number in each range. None = all.
        max_per_category: One categorical item feature, and the most items of one of its words in the list. Items whose
            word is unknown are not limited. None = no limit.
        exact: Scan all items instead of searching the index.
    """

    candidates: int = CANDIDATES
    own_candidates: tuple[str | int, ...] = ()
    exclude_seen: bool = True
    exclude: tuple[str | int, ...] = ()
    allow: tuple[str | int, ...] | None = None
    categories: dict[str, tuple[str, ...]] | None = None
    ranges: dict[str, Range] | None = None
    max_per_category: dict[str, int] | None = None
    exact: bool = False


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ask for the k best items after a history (oldest event first).

    A recommender with a cache keeps the encoded history under `user` for the next request. Every request must still
    carry the whole history.
    """

    history: tuple[Event, ...]
    k: int = 20
    options: RecommendOptions = RecommendOptions()
    user: str | int | None = None


class RankRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ask for the order of some items after a history, without retrieval; see `Request`.

    An item that is named twice counts once.
    """

    history: tuple[Event, ...]
    items: tuple[str | int, ...]
    options: RankOptions = RankOptions()
    user: str | int | None = None


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
        return History(**{name: values[start:stop] for name, values in vars(self).items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """A limit for a list of k items: at most `each` of them have one word.

    `codes` [N] i32 holds the word of each item; items of code 0, an unknown word, are not limited.
    """

    codes: NDArray[np.int32]
    each: int
    k: int

    def places(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Places of at most k rows, best first, that a walk from the best keeps: those whose word still has room."""
        codes = self.codes[rows]
        order = np.argsort(codes, kind="stable")
        codes = codes[order]
        before = np.arange(len(codes)) - np.searchsorted(codes, codes)  # better rows of the same word
        return np.sort(order[(before < self.each) | (codes == 0)])[: self.k]

    def most(self, rows: NDArray[np.int64]) -> int:
        """Length of the longest list of these rows, in whatever order they are."""
        counts = np.bincount(self.codes[rows], minlength=1)
        return int(counts[0] + np.minimum(counts[1:], self.each).sum())


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Where the candidates of a valid request come from.

    Attributes:
        k: Items of the slate, at most the number of candidates.
        candidates: How many retrieval finds; 0 = it finds none, and all k items are `own`.
        own: Distinct rows that the request names, ascending; the filters leave them.
        unknown: Ids that it names and the bundle lacks or has retired.
        excluded: Distinct rows that retrieval leaves out.
        allowed: Mask [N] or None, see `Catalogue`; at least `candidates` rows are allowed and not excluded.
        exact: Whether retrieval scans all items.
        spread: Limit for the slate; the eligible items suffice for it. None = no limit.
    """

    k: int
    candidates: int
    own: NDArray[np.int64]
    unknown: tuple[str, ...]
    excluded: NDArray[np.int64]
    allowed: NDArray[np.bool_] | None
    exact: bool
    spread: Spread | None = None

    def first(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Places of the first k of these rows, best first, within the limit of the slate."""
        return np.arange(min(self.k, len(rows))) if self.spread is None else self.spread.places(rows)


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest(Pool):
    """A valid request with rows and ids of its bundle.

    `weights` is [C] f64, `outcomes` [C] f32. `start` is the place of the first event of `history` in the history of the
    request.
    """

    user: str | None
    history: History
    start: int
    surface: int
    now_ms: int
    order: Order
    weights: NDArray[np.float64]
    outcomes: NDArray[np.float32]


EventLike = Event | Mapping[str, Any]


def parse_events(content: bytes, source: str = "history") -> tuple[Event, ...]:
    """Read a JSON list of events; errors name `source`.

    Raises:
        RequestError: The content is not JSON or not a list of events, or an event has an unknown key.
    """
    with decoding(RequestError, source, EVENT_FORMAT):
        return msgspec.json.decode(content.removeprefix(codecs.BOM_UTF8), type=tuple[Event, ...])


def as_events(history: Iterable[EventLike]) -> tuple[Event, ...]:
    """Turn dictionaries with the keys of `Event` into events; keep events as they are.

    Raises:
        RequestError: An element is neither, lacks a key, has an unknown one or a value of the wrong type.
    """
    events = []
    for position, event in enumerate(history):
        try:
            events.append(event if isinstance(event, Event) else msgspec.convert(event, type=Event))
        except msgspec.ValidationError as error:
            raise RequestError(f"history[{position}]: {error}; {EVENT_FORMAT}") from error
    return tuple(events)


def check_types(request: Request | RankRequest) -> None:
    """Check the types of all values of a request.

    Raises:
        RequestError: A value has the wrong type; the message names it.
    """
    options = RankOptions() if isinstance(request, RankRequest) else RecommendOptions()
    typed = isinstance(request.history, tuple) and all(isinstance(event, Event) for event in request.history)
    rest = msgspec.structs.replace(request, options=options, history=() if typed else request.history)
    try:
        for part in (request.options, *(request.history if typed else ()), rest):  # a server's have more fields
            msgspec.convert(msgspec.to_builtins(part), type(part))
    except (TypeError, ValueError) as error:
        raise RequestError(f"the request has a value of the wrong type: {error}") from error


CandidateSource = Literal["retrieval", "request", "both"]


class SlateItem(msgspec.Struct, frozen=True, kw_only=True):
    """One recommended item.

    Attributes:
        item: External id.
        title: Title for display; None if the bundle has none.
        metadata: Numbers and text of the item by column, None = missing; None if the bundle stores none.
        score: The slate is sorted by it (see `Slate.order` and docs/ranking.md); for a popular item its share.
        value: Weighted sum of the action probabilities; None if the ranker did not run.
        actions: Probability of each action; empty if the ranker did not run.
        retrieval_score: Similarity of the item to the user's query; None for a popular item.
        source: Who named the candidate: "retrieval", "request" or "both"; None for a popular item.
    """

    item: str
    title: str | None
    score: float
    value: float | None
    actions: dict[str, float]
    retrieval_score: float | None
    source: CandidateSource | None
    metadata: dict[str, float | str | None] | None = None


class StageTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of each stage; requests of one group share them."""

    encode: float
    retrieve: float
    rank: float
    total: float


class Slate(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one request.

    Attributes:
        items: Best first.
        source: "model", or "popular" for an empty history.
        order: Meaning of the score. "value": the value. "blend": the value times a power of the probability that
            retrieval gives the item, up to a factor per request. "product": logarithm of the value times the
            probability of an engagement, up to a constant per request. "retrieval": the retrieval score. None for
            popular items.
        stages_ms: Duration of each stage.
        kv: Whether the cache held all of the history ("hit"), a beginning of it ("extended") or nothing ("miss").
        kv_reason: Why it did not hold all of it; None for a hit.
        device: Device that computed the answer.
        bundle: Hash of the bundle.
        exact: Why all items were scanned; None = the index found the candidates, the request named all of them, or the
            items are popular ones.
        unknown: Items that the request named and the bundle lacks or has retired; see `RankOptions.skip_unknown`.
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
    unknown: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON form, the same on the command line and over HTTP."""
        document: dict[str, Any] = msgspec.to_builtins(self)
        return document
