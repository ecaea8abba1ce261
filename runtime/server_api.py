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

from unipinrec.errors import ConfigError, RequestError
from unipinrec.runtime.requests import Event, RecommendOptions, Request
from unipinrec.runtime.slate import Slate, SlateItem, StageTimes

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


class RecommendBody(RecommendOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The k best items for a user, or after a history; with the fields of `RecommendOptions`.

    Attributes:
        user: Whose encoded history is kept for the next request; without `history`, whose events the server knows.
        history: All events, oldest first. It stands for itself: the events that the server knows are left alone.
        k: How many items.
    """

    user: str | None = None
    history: tuple[Event, ...] | None = None
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
            stages_ms=slate.stages_ms,
            kv=slate.kv,
            kv_reason=slate.kv_reason,
            device=slate.device,
            bundle=slate.bundle,
            exact=slate.exact,
            events=events,
            skipped_events=skipped,
        )


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


def _decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"the body: {error}; send one JSON object, or a list of them, as documented") from error


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


def _at_most(name: str, given: int, limit: int, unit: str = "") -> None:
    if given > limit:
        raise RequestError(f"{name}: {given} {unit}{' ' * bool(unit)}is more than this server allows ({limit})")


def whole_seconds(seconds: float) -> str:
    """For the header Retry-After, which knows nothing smaller than a second."""
    return str(max(1, math.ceil(seconds)))
