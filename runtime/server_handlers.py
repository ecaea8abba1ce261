"""What each route does: decode, ask, encode. Sockets, batches and the files of bundles are known elsewhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response

from unipinrec.errors import RequestError
from unipinrec.runtime.batching import Answer
from unipinrec.runtime.bundle import Bundle
from unipinrec.runtime.requests import UNKNOWN_SURFACE, Event
from unipinrec.runtime.server_api import (
    ErrorAnswer,
    Readiness,
    RecommendAnswer,
    RecommendBody,
    Refusal,
    decode_recommend,
)
from unipinrec.runtime.server_context import Call, Server
from unipinrec.runtime.server_state import Deployment
from unipinrec.runtime.slate import Slate

T = TypeVar("T")
_ENCODER = msgspec.json.Encoder()
log = logging.getLogger(__name__)


def as_json(answer: Any, status: int = 200) -> Response:
    """An answer as JSON."""
    return Response(_ENCODER.encode(answer), status, media_type="application/json")


def refusal_of(error: Exception, call_id: str) -> Refusal:
    """What the client is told of an error; what was not made for it is logged, and said to be internal."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestError):
        return Refusal(400, "invalid_request", str(error))
    log.error("request %s failed", call_id, exc_info=error)
    return Refusal(500, "internal", f"the server failed to answer; its log has more about request {call_id}")


async def live(_server: Server, _call: Call) -> Response:
    """GET /health/live: the process runs and its event loop turns."""
    return as_json({"status": "live"})


async def ready(server: Server, _call: Call) -> Response:
    """GET /health/ready: 200 from the first moment to the last at which requests are answered, else 503."""
    if server.deployments is None:
        return as_json(Readiness(status=server.phase), 503)
    current = server.deployments.current
    device = current.recommender.device
    answer = Readiness(
        status=server.phase,
        device=device.name,
        device_reason=device.reason,
        refused=device.refused,
        bundle=current.version,
    )
    return as_json(answer, 200 if server.phase == "ready" else 503)


@dataclass(frozen=True, kw_only=True)
class _Started:
    """A request that the batcher has."""

    answer: Answer
    events: int
    skipped: int


async def recommend(server: Server, call: Call) -> Response:
    """POST /v1/recommend."""
    with server.admission.admit(call.left_s) as place:
        limits = server.options.limits
        asked = decode_recommend(await call.body(limits.body_bytes), limits)
        if not isinstance(asked, tuple):
            (outcome,) = await _recommend(server, call, (asked,))
            if isinstance(outcome, Exception):
                raise outcome
            place.answered()
            return as_json(outcome)
        place.add(len(asked) - 1)
        outcomes = await _recommend(server, call, asked)
        place.answered()
        return as_json([_in_a_list(outcome, call) for outcome in outcomes])


def _in_a_list(outcome: RecommendAnswer | Exception, call: Call) -> RecommendAnswer | ErrorAnswer:
    return ErrorAnswer(error=refusal_of(outcome, call.id).detail) if isinstance(outcome, Exception) else outcome


async def _recommend(server: Server, call: Call, asked: Sequence[RecommendBody]) -> list[RecommendAnswer | Exception]:
    """Answer requests through the batcher, each with its slate or its error."""
    leave = [server.users.enter(one.user) for one in asked]
    started: list[_Started | Exception] = []
    try:
        with server.acquire() as deployment:
            histories = await _histories(server, call, asked)
            started += [_start(deployment, one, events) for one, events in zip(asked, histories, strict=True)]
            await call.wait([one.answer for one in started if isinstance(one, _Started)])
    finally:
        for place, release in enumerate(leave):
            one = started[place] if place < len(started) else None
            _when_done(one.answer if isinstance(one, _Started) else None, release)
    return [_outcome(one, call) for one in started]


async def _histories(server: Server, call: Call, asked: Sequence[RecommendBody]) -> list[Sequence[Event]]:
    """The events of each request: its own, or those that are known of its user."""
    users = [one.user for one in asked if one.history is None and one.user is not None]
    known = await settled(call, server.store.histories(users)) if users else []
    left = iter(known)
    return [next(left) if one.history is None else one.history for one in asked]


async def settled(call: Call, future: Future[T]) -> T:
    """What a store's future brings.

    Raises:
        Refusal: 504, not before the deadline.
    """
    if not future.done():
        await call.wait([future])
    return future.result()


def _start(deployment: Deployment, asked: RecommendBody, events: Sequence[Event]) -> _Started | Exception:
    try:
        history = tuple(events) if asked.history is not None else usable(events, deployment.recommender.bundle)
        if asked.history is None and not history:
            raise _cold_start(asked.user, len(events))
        answer = deployment.batcher.submit(asked.request(history))
    except (RequestError, Refusal) as error:
        return error
    return _Started(answer=answer, events=len(history), skipped=len(events) - len(history))


def _cold_start(user: str | None, skipped: int) -> Refusal:
    known = f"the bundle in service has none of the {skipped} items" if skipped else "no events are known"
    return Refusal(
        422, "cold_start", f"user {user!r}: {known}; send events or a history first, or show what is popular"
    )


def usable(events: Sequence[Event], bundle: Bundle) -> tuple[Event, ...]:
    """The events of a user that a bundle can read; an earlier one may have known other items."""
    rows, manifest = bundle.rows, bundle.manifest
    actions, surfaces = frozenset(manifest.actions), frozenset((UNKNOWN_SURFACE, *manifest.surfaces))
    return tuple(
        event
        if event.surface in surfaces and actions.issuperset(event.actions)
        else _translated(event, actions, surfaces)
        for event in events
        if event.item in rows
    )


def _translated(event: Event, actions: frozenset[str], surfaces: frozenset[str]) -> Event:
    """Without the actions and the surface that are not known any more."""
    kept = tuple(action for action in event.actions if action in actions)
    surface = event.surface if event.surface in surfaces else UNKNOWN_SURFACE
    return msgspec.structs.replace(event, actions=kept, surface=surface)


def _when_done(answer: Future[Slate] | None, release: Callable[[], None]) -> None:
    """Release when the batcher is done with a request, which may be after its client was answered."""
    if answer is None or answer.done():
        release()
        return
    loop = asyncio.get_running_loop()
    answer.add_done_callback(lambda _: loop.call_soon_threadsafe(release))


def _outcome(started: _Started | Exception, call: Call) -> RecommendAnswer | Exception:
    if isinstance(started, Exception):
        return started
    error = started.answer.exception()
    if error is not None:
        return error if isinstance(error, Exception) else RuntimeError(repr(error))
    slate = started.answer.result()
    call.slates.append(slate)
    call.answers.append(started.answer)
    return RecommendAnswer.of(slate, started.events, started.skipped)
