"""The JSON bodies of requests and answers, and their limits.

A POST takes one JSON object or a list, and answers in kind. Decoding checks types and limits; `Recommender.resolve`
checks a request against the bundle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import msgspec

from unipinrec.errors import MALFORMED, ConfigError, RequestError
from unipinrec.runtime.requests import (
    AS_SECONDS,
    Event,
    Range,
    RankOptions,
    RankRequest,
    RecommendOptions,
    Request,
    Slate,
)

T = TypeVar("T")
SHOWN_CHARACTERS = 500


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a request.

    Attributes:
        body_bytes: Bytes of the body of one HTTP request.
        batch: Requests in one HTTP request.
        history: Events in the history of one request.
        events: Events that are appended in one HTTP request.
        candidates, k: See `RecommendOptions` and `Request`; a request names at most `candidates` items to rank.
        items: Items in a request for similar items.
        id_characters: Characters of a user or event id.
        ahead_ms: How far the time of an event may be ahead of this machine's clock.
    """

    body_bytes: int = 8 << 20
    batch: int = 64
    history: int = 10_000
    events: int = 1_000
    candidates: int = 2_000
    k: int = 1_000
    items: int = 100
    id_characters: int = 256
    ahead_ms: int = 86_400_000

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name}={getattr(self, field.name)} must be at least 1")


class ApiError(Exception):
    """An error answer, written for the client."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.detail = ErrorDetail(code=code, message=message[:SHOWN_CHARACTERS])


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """An error: `code` is for programs, `message` for their developers."""

    code: str
    message: str


class ErrorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every error answer."""

    error: ErrorDetail

    @classmethod
    def of(cls, detail: ErrorDetail) -> ErrorAnswer:
        """An error as a body."""
        return cls(error=detail)


class RecommendBody(RecommendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The k best items for a user, or after a history; with the fields of `RecommendOptions`.

    Attributes:
        user: The server caches this user's encoded history for the next request. Without `history` it uses the events
            that it has stored of the user.
        history: All events, oldest first. Stored events are then neither read nor changed.
        k: How many items.
    """

    sent_user: str | int | None = msgspec.field(default=None, name="user")
    history: tuple[SentEvent, ...] | None = None
    k: int = 20

    @property
    def user(self) -> str | None:
        """The user's id as a string."""
        return None if self.sent_user is None else str(self.sent_user)

    def request(self, history: tuple[Event, ...]) -> Request:
        """The request for the recommender."""
        return Request(history=history, k=self.k, options=self, user=self.user)


class RankBody(RankOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of some items, best first, for a user or after a history; with the fields of `RankOptions`.

    Attributes:
        items: Ids of the items; one that is named twice counts once.
        user, history: As for recommendations.
    """

    items: tuple[str | int, ...]
    sent_user: str | int | None = msgspec.field(default=None, name="user")
    history: tuple[SentEvent, ...] | None = None

    @property
    def user(self) -> str | None:
        """The user's id as a string."""
        return None if self.sent_user is None else str(self.sent_user)

    def request(self, history: tuple[Event, ...]) -> RankRequest:
        """The request for the recommender."""
        return RankRequest(history=history, items=self.items, options=self, user=self.user)


class RecommendAnswer(Slate, frozen=True, kw_only=True):
    """A slate, see `Slate`, and what it says about the user's events.

    Attributes:
        events: How many events the history had.
        skipped_events: Stored events of the user whose items the active bundle lacks.
    """

    events: int
    skipped_events: int


class SentEvent(Event, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An event that a user just caused.

    Attributes:
        id: Makes a retry safe: of several events with one id and user the first counts.
    """

    id: str | None = None


class EventsBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """New events of one user, oldest first. A user's id may be sent as an integer, which stands for its string."""

    sent_user: str | int = msgspec.field(name="user")
    events: tuple[SentEvent, ...]

    @property
    def user(self) -> str:
        """The user's id as a string."""
        return str(self.sent_user)


class UserAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The stored events of a user, oldest first."""

    user: str
    events: tuple[SentEvent, ...]


class ForgetAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How many events of the user were deleted, and whether keys and values were cached."""

    user: str
    events: int
    cached: bool


class SimilarBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The k items most similar to some items; `RecommendOptions` explains the filters.

    Attributes:
        items: Items to start from; the similarity of a result is that to the most similar of them.
    """

    items: tuple[str | int, ...]
    k: int = 20
    exclude: tuple[str | int, ...] = ()
    allow: tuple[str | int, ...] | None = None
    categories: dict[str, tuple[str, ...]] | None = None
    ranges: dict[str, Range] | None = None
    exact: bool = False


class SimilarItem(msgspec.Struct, frozen=True, kw_only=True):
    """An item, the cosine of its vector and that of the item in the request, and its metadata as in a slate."""

    item: str
    title: str | None
    similarity: float
    metadata: dict[str, float | str | None] | None = None


class SimilarAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Most similar first; `exact` says why all items were scanned, null = the index was searched."""

    items: tuple[SimilarItem, ...]
    exact: str | None
    bundle: str


class ItemAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the bundle knows of an item.

    Attributes:
        item, title: External id, and title for display, null if the bundle has none.
        categories: Word of each categorical feature; one that is unknown is left out.
        metadata: Numbers and text by column, null = missing; null if the bundle stores none.
        retired: Whether it is no longer recommended.
        bundle: Hash of the bundle.
    """

    item: str
    title: str | None
    categories: dict[str, str]
    metadata: dict[str, float | str | None] | None
    retired: bool
    bundle: str


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the server is ready, and on what it runs.

    Attributes:
        status: loading, ready or draining.
        device, device_reason: The device, and why it was chosen.
        refused: Preferred devices that do not run here, each with the reason.
        bundle: Hash of the active bundle.
    """

    status: str
    device: str | None = None
    device_reason: str | None = None
    refused: tuple[str, ...] = ()
    bundle: str | None = None


Recommends = RecommendBody | tuple[RecommendBody, ...]
Ranks = RankBody | tuple[RankBody, ...]
Posts = EventsBody | tuple[EventsBody, ...]
_EVENTS: msgspec.json.Decoder[Posts] = msgspec.json.Decoder(Posts)
_SIMILAR: msgspec.json.Decoder[SimilarBody] = msgspec.json.Decoder(SimilarBody)
_RECOMMEND: msgspec.json.Decoder[Recommends] = msgspec.json.Decoder(Recommends)
_RANK: msgspec.json.Decoder[Ranks] = msgspec.json.Decoder(Ranks)


def decode_recommend(body: bytes, limits: Limits) -> Recommends:
    """Read the body of POST /v1/recommend.

    Raises:
        RequestError: It is not such JSON, or it exceeds a limit.
    """
    bodies = _decode(_RECOMMEND, body)
    for where, request in _each(bodies, limits):
        _check_user(where, request, limits)
        _at_most(f"{where}k", request.k, limits.k)
        _at_most(f"{where}candidates", request.candidates, limits.candidates)
        _at_most(f"{where}own_candidates", len(request.own_candidates), limits.candidates, "items")
    return bodies


def decode_rank(body: bytes, limits: Limits) -> Ranks:
    """Read the body of POST /v1/rank.

    Raises:
        RequestError: It is not such JSON, or it exceeds a limit.
    """
    bodies = _decode(_RANK, body)
    for where, request in _each(bodies, limits):
        _check_user(where, request, limits)
        _at_most(f"{where}items", len(request.items), limits.candidates, "items")
    return bodies


def _check_user(where: str, request: RecommendBody | RankBody, limits: Limits) -> None:
    if request.user is None and request.history is None:
        raise RequestError(f"{where}neither user nor history is given; send a user, a history, or both")
    check_id(f"{where}user", request.user, limits)
    _at_most(f"{where}history", len(request.history or ()), limits.history, "events")


def decode_events(body: bytes, limits: Limits, now_ms: int) -> Posts:
    """Read the body of POST /v1/events.

    Raises:
        RequestError: It is not such JSON, it exceeds a limit, or the time of an event is not plausible.
    """
    bodies = _decode(_EVENTS, body)
    latest_ms, count = now_ms + limits.ahead_ms, 0
    for where, post in _each(bodies, limits):
        check_id(f"{where}user", post.user, limits)
        if not post.events:
            raise RequestError(f"{where}events is empty; send at least one")
        count += len(post.events)
        _at_most("the body", count, limits.events, "events")
        for index, event in enumerate(post.events):
            name, time_ms = f"{where}events[{index}]", event.timestamp_ms
            check_id(f"{name}.id", event.id, limits)
            if time_ms is not None and time_ms > latest_ms:
                problem = f"is after {latest_ms}, too far in the future"
                raise RequestError(f"{name}.timestamp_ms={time_ms} {problem}; send Unix time in ms")
            if time_ms is not None and time_ms in AS_SECONDS:
                raise RequestError(f"{name}.timestamp_ms={time_ms} is in 1970, or in seconds; send Unix time in ms")
    return bodies


def decode_similar(body: bytes, limits: Limits) -> SimilarBody:
    """Read the body of POST /v1/items/similar.

    Raises:
        RequestError: It is not such JSON, or it exceeds a limit.
    """
    request = _decode(_SIMILAR, body)
    if not request.items:
        raise RequestError("items is empty; send the ids of one or more items")
    _at_most("items", len(request.items), limits.items)
    _at_most("k", request.k, limits.k)
    return request


def _decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except MALFORMED as error:
        raise RequestError(f"the body: {error}; /openapi.json says what it must be, with examples") from error


def _each(bodies: T | tuple[T, ...], limits: Limits) -> Sequence[tuple[str, T]]:
    """Every request of a body, with its place for messages."""
    if not isinstance(bodies, tuple):
        return [("", bodies)]
    if not bodies:
        raise RequestError("the body is an empty list; send at least one request")
    _at_most("the list", len(bodies), limits.batch, "requests")
    return [(f"[{index}]: ", body) for index, body in enumerate(bodies)]


def check_id(name: str, value: str | None, limits: Limits) -> None:
    """Check the length of an id.

    Raises:
        RequestError: It is empty or too long.
    """
    if value is not None and not 0 < len(value) <= limits.id_characters:
        raise RequestError(f"{name} has {len(value)} characters; send from 1 to {limits.id_characters}")


def _at_most(name: str, value: int, limit: int, unit: str = "") -> None:
    if value > limit:
        raise RequestError(f"{name}: {value} {unit}{' ' * bool(unit)}is more than this server allows ({limit})")


def whole_seconds(seconds: float) -> str:
    """The value of a Retry-After header: whole seconds, rounded up, at least 1."""
    return str(max(1, math.ceil(seconds)))
