"""What clients send to the server and get back, and how much of it at once.

Every POST takes one JSON object or a list of them, and answers in kind. Decoding checks shape and limits; whether a
request makes sense to a bundle is checked by `Recommender.resolve`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import msgspec

from unipinrec.errors import MALFORMED, ConfigError, RequestError
from unipinrec.runtime.requests import AS_SECONDS, Event, RecommendOptions, Request, Slate, SlateItem, StageTimes

T = TypeVar("T")
SHOWN_CHARACTERS = 500


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for at most.

    Attributes:
        body_bytes: Of the body of one HTTP request.
        batch: Requests in one HTTP request.
        history: Events of a history that a request carries.
        events: Events that are appended in one HTTP request.
        candidates, k: See `RecommendOptions` and `Request`.
        items: Items of one question for similar items.
        id_characters: Of a user or event id.
        ahead_ms: How far the time of an event may lie ahead of this machine's clock.
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


class Refusal(Exception):  # noqa: N818 - an answer, not a fault
    """An answer other than success, made for the client."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.detail = ErrorDetail(code=code, message=message[:SHOWN_CHARACTERS])


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong: a code for programs, a message for people."""

    code: str
    message: str


class ErrorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is not a success."""

    error: ErrorDetail

    @classmethod
    def of(cls, detail: ErrorDetail) -> ErrorAnswer:
        """An error as a body."""
        return cls(error=detail)


class RecommendBody(RecommendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The k best items for a user, or after a history; with the fields of `RecommendOptions`.

    Attributes:
        user: Whose encoded history is kept for the next request; without `history`, whose events the server knows.
        history: All events, oldest first. It stands for itself: the events that the server knows are left alone.
        k: How many items.
    """

    user: str | None = None
    history: tuple[SentEvent, ...] | None = None
    k: int = 20

    def request(self, history: tuple[Event, ...]) -> Request:
        """What the recommender is asked."""
        return Request(history=history, k=self.k, options=self, user=self.user)


class RecommendAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A slate, see `Slate`, and what of the user's events it rests on.

    Attributes:
        events: How many events the history had.
        skipped_events: Events known of the user that the bundle in service has no item for.
    """

    items: tuple[SlateItem, ...]
    source: str
    order: str | None
    stages_ms: StageTimes
    kv: str
    kv_reason: str | None
    device: str
    bundle: str
    exact: str | None
    events: int
    skipped_events: int

    @classmethod
    def of(cls, slate: Slate, events: int, skipped: int) -> RecommendAnswer:
        """Wrap a slate."""
        return cls(
            items=slate.items,
            source=slate.source,
            order=slate.order,
            stages_ms=slate.stages_ms,
            kv=slate.kv,
            kv_reason=slate.kv_reason,
            device=slate.device,
            bundle=slate.bundle,
            exact=slate.exact,
            events=events,
            skipped_events=skipped,
        )


class SentEvent(Event, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An event that a user just caused.

    Attributes:
        id: Of the event, so that it can be sent again: of several with one id and user the first counts.
    """

    id: str | None = None


class EventsBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one user just did, oldest first."""

    user: str
    events: tuple[SentEvent, ...]


class UserAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a user, oldest event first."""

    user: str
    events: tuple[SentEvent, ...]


class ForgetAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What was known of a user who is forgotten now: how many events, and whether their keys and values were cached."""

    user: str
    events: int
    cached: bool


class SimilarBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The k items most similar to some; what filters mean is said in `RecommendOptions`.

    Attributes:
        items: Items to start from; a result's similarity is that with the one it is most similar to.
    """

    items: tuple[str | int, ...]
    k: int = 20
    exclude: tuple[str, ...] = ()
    allow: tuple[str, ...] | None = None
    categories: dict[str, tuple[str, ...]] | None = None
    exact: bool = False


class SimilarItem(msgspec.Struct, frozen=True, kw_only=True):
    """An item and the cosine of its vector with that of the item asked for."""

    item: str
    title: str | None
    similarity: float


class SimilarAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Most similar first; `exact` says why all items were scanned, None = the index found them."""

    items: tuple[SimilarItem, ...]
    exact: str | None
    bundle: str


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the server answers, and with what.

    Attributes:
        status: loading, ready or draining.
        device, device_reason: What runs, and why.
        refused: What was preferred to it, each with the reason why it does not run.
        bundle: Hash of the bundle.
    """

    status: str
    device: str | None = None
    device_reason: str | None = None
    refused: tuple[str, ...] = ()
    bundle: str | None = None


Recommends = RecommendBody | tuple[RecommendBody, ...]
Posts = EventsBody | tuple[EventsBody, ...]
_EVENTS: msgspec.json.Decoder[Posts] = msgspec.json.Decoder(Posts)
_SIMILAR: msgspec.json.Decoder[SimilarBody] = msgspec.json.Decoder(SimilarBody)
_RECOMMEND: msgspec.json.Decoder[Recommends] = msgspec.json.Decoder(Recommends)


def decode_recommend(body: bytes, limits: Limits) -> Recommends:
    """Read the body of POST /v1/recommend.

    Raises:
        RequestError: It is not JSON of that form, or asks for more than is allowed.
    """
    asked = _decode(_RECOMMEND, body)
    for where, one in _each(asked, limits):
        if one.user is None and one.history is None:
            raise RequestError(f"{where}neither user nor history is given; send a user, a history, or both")
        _check_id(f"{where}user", one.user, limits)
        _at_most(f"{where}history", len(one.history or ()), limits.history, "events")
        _at_most(f"{where}k", one.k, limits.k)
        _at_most(f"{where}candidates", one.candidates, limits.candidates)
    return asked


def decode_events(body: bytes, limits: Limits, now_ms: int) -> Posts:
    """Read the body of POST /v1/events.

    Raises:
        RequestError: It is not JSON of that form, holds more than is allowed, or an event of the future.
    """
    posted = _decode(_EVENTS, body)
    count = 0
    for where, one in _each(posted, limits):
        _check_id(f"{where}user", one.user, limits)
        if not one.events:
            raise RequestError(f"{where}events is empty; send at least one")
        count += len(one.events)
        _at_most("the body", count, limits.events, "events")
        for place, event in enumerate(one.events):
            _check_id(f"{where}events[{place}].id", event.id, limits)
            if event.timestamp_ms is not None:
                _check_time(f"{where}events[{place}].timestamp_ms", event.timestamp_ms, now_ms + limits.ahead_ms)
    return posted


def decode_similar(body: bytes, limits: Limits) -> SimilarBody:
    """Read the body of POST /v1/items/similar.

    Raises:
        RequestError: It is not JSON of that form, or asks for more than is allowed.
    """
    asked = _decode(_SIMILAR, body)
    if not asked.items:
        raise RequestError("items is empty; send the ids of one or more items")
    _at_most("items", len(asked.items), limits.items)
    _at_most("k", asked.k, limits.k)
    return asked


def _decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except MALFORMED as error:
        raise RequestError(f"the body: {error}; /openapi.json says what it must be, with examples") from error


def _each(asked: T | tuple[T, ...], limits: Limits) -> Sequence[tuple[str, T]]:
    """Every request of a body, with its place for messages."""
    if not isinstance(asked, tuple):
        return [("", asked)]
    if not asked:
        raise RequestError("the body is an empty list; send at least one request")
    _at_most("the list", len(asked), limits.batch, "requests")
    return [(f"[{place}]: ", one) for place, one in enumerate(asked)]


def _check_id(name: str, given: str | None, limits: Limits) -> None:
    if given is not None and not 0 < len(given) <= limits.id_characters:
        raise RequestError(f"{name} has {len(given)} characters; send from 1 to {limits.id_characters}")


def _check_time(name: str, given_ms: int, latest_ms: int) -> None:
    if given_ms > latest_ms:
        raise RequestError(f"{name}={given_ms} is after {latest_ms}, too far in the future; send Unix time in ms")
    if given_ms in AS_SECONDS:
        raise RequestError(f"{name}={given_ms} is in 1970, or in seconds; send Unix time in ms")


def _at_most(name: str, given: int, limit: int, unit: str = "") -> None:
    if given > limit:
        raise RequestError(f"{name}: {given} {unit}{' ' * bool(unit)}is more than this server allows ({limit})")


def whole_seconds(seconds: float) -> str:
    """For the header Retry-After, which knows nothing smaller than a second."""
    return str(max(1, math.ceil(seconds)))
