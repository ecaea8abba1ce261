"""What each route does: decode, ask, encode. Sockets, batches and the files of bundles are known elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import msgspec
from starlette.responses import Response

from unipinrec.errors import BackendError, ColdStartError, RequestError
from unipinrec.runtime.batching import Answer
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.requests import UNKNOWN_SURFACE, Event, Slate
from unipinrec.runtime.server.bodies import (
    ApiError,
    ErrorAnswer,
    EventsBody,
    ForgetAnswer,
    Readiness,
    RecommendAnswer,
    RecommendBody,
    SentEvent,
    UserAnswer,
    decode_events,
    decode_recommend,
    decode_similar,
)
from unipinrec.runtime.server.call import Call, Server, as_json, invalid, refusal_of
from unipinrec.runtime.server.deployment import Deployment
from unipinrec.runtime.server.events.store import Append, StoredEvent
from unipinrec.runtime.server.similar import similar_items
from unipinrec.runtime.validation import check_event

T = TypeVar("T")
log = logging.getLogger(__name__)


async def live(_server: Server, _call: Call) -> Response:
    """GET /health/live: the process runs and its event loop turns."""
    return as_json({"status": "live"})


async def ready(server: Server, _call: Call) -> Response:
    """GET /health/ready: 200 from the first moment to the last at which requests are answered, else 503."""
    if server.deployments is None:
        return as_json(Readiness(status=server.phase), 503)
    current = server.deployments.current
    device = current.recommender.device
    status = server.phase
    answer = Readiness(
        status=status,
        device=device.name,
        device_reason=device.reason,
        refused=device.refused,
        bundle=current.version,
    )
    return as_json(answer, 200 if status == "ready" else 503)


@dataclass(frozen=True, kw_only=True)
class _Started:
    """A request that the batcher has."""

    answer: Answer
    events: int
    skipped: int


async def recommend(server: Server, call: Call) -> Response:
    """POST /v1/recommend."""
    with server.admission.admit(call.left_s, arriving=True) as index:
        limits = server.options.limits
        asked = decode_recommend(await call.body(limits.body_bytes), limits)
        several = asked if isinstance(asked, tuple) else (asked,)
        index.add(len(several) - 1)
        index.begin()
        outcomes = await _recommend(server, call, several)
        ids = [f"{call.id}/{index}" for index in range(len(asked))] if isinstance(asked, tuple) else [call.id]
        answered = zip(ids, several, outcomes, strict=True)
        call.asked = {id_: one for id_, one, outcome in answered if not isinstance(outcome, Exception)}
        if isinstance(asked, tuple):
            return as_json([_in_a_list(outcome, call) for outcome in outcomes])
        if isinstance(outcomes[0], Exception):
            raise outcomes[0]
        return as_json(outcomes[0])


def _in_a_list(outcome: T | Exception, call: Call) -> T | ErrorAnswer:
    if not isinstance(outcome, Exception):
        return outcome
    detail = refusal_of(outcome, call.id).detail
    call.codes_in_list.append(detail.code)
    return ErrorAnswer(error=detail)


async def _recommend(server: Server, call: Call, asked: Sequence[RecommendBody]) -> list[RecommendAnswer | Exception]:
    """Answer requests through the batcher, each with its slate or its error."""
    leave = [server.users.enter(one.user) for one in asked]
    call.users += [one.user for one in asked if one.user is not None]
    started: list[_Started | Exception] = []
    try:
        with server.acquire() as deployment:
            histories = await _histories(server, call, asked)
            started += [_start(deployment, one, events) for one, events in zip(asked, histories, strict=True)]
            await call.wait([one.answer for one in started if isinstance(one, _Started)])
    finally:
        for index, release in enumerate(leave):
            one = started[index] if index < len(started) else None
            _when_done(one.answer if isinstance(one, _Started) else None, release)
    return [_outcome(one, call) for one in started]


async def _histories(server: Server, call: Call, asked: Sequence[RecommendBody]) -> list[Sequence[Event]]:
    """The events of each request: its own, or those that are known of its user."""
    users = [one.user for one in asked if one.history is None and one.user is not None]
    known = await settled(call, lambda: server.store.histories(users)) if users else []
    left = iter(known)
    return [next(left) if one.history is None else one.history for one in asked]


async def settled(call: Call, begin: Callable[[], Future[T]]) -> T:
    """What a store's future brings.

    Raises:
        ApiError: 504, not before the deadline; 503, the store failed.
    """
    try:
        future = begin()
        if not future.done():
            await call.wait([future])
        return future.result()
    except BackendError as error:
        log.error("request %s: %s", call.id, error)
        message = "the events of users cannot be reached; send the request again, or with a history"
        raise ApiError(503, "store_unavailable", message, {"retry-after": "1"}) from error


def _start(deployment: Deployment, asked: RecommendBody, events: Sequence[Event]) -> _Started | Exception:
    try:
        history = tuple(events) if asked.history is not None else usable(events, deployment.recommender.bundle)
        answer = deployment.batcher.submit(asked.request(history))
    except ColdStartError as error:
        return _cold_start(asked, len(events), error)
    except RequestError as error:
        return invalid(error)
    return _Started(answer=answer, events=len(history), skipped=len(events) - len(history))


def _cold_start(asked: RecommendBody, skipped: int, error: ColdStartError) -> ApiError:
    if asked.history is not None:
        return ApiError(422, "cold_start", str(error))
    known = f"the bundle in service has none of the {skipped} items" if skipped else "no events are known"
    return ApiError(422, "cold_start", f"user {asked.user!r}: {known}; {error}")


def usable(events: Sequence[Event], bundle: Bundle) -> tuple[Event, ...]:
    """The events of a user that a bundle can read; an earlier one may have known other items."""
    rows, manifest = bundle.rows, bundle.manifest
    actions, surfaces = frozenset(manifest.actions), frozenset((UNKNOWN_SURFACE, *manifest.surfaces))
    if (
        all(event.item in rows for event in events)
        and surfaces.issuperset([event.surface for event in events])
        and actions.issuperset(chain.from_iterable([event.actions for event in events]))
    ):
        return tuple(events)
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
    answer = started.answer
    slate = answer.result()
    call.slates.append(slate)
    call.answers.append(answer)
    return RecommendAnswer.of(slate, started.events, started.skipped)


async def append_events(server: Server, call: Call) -> Response:
    """POST /v1/events: of a list each element is refused or kept for itself; what is kept is kept in one step."""
    with server.writes.admit(call.left_s, arriving=True) as index:
        now_ms, limits = time.time_ns() // 1_000_000, server.options.limits
        posted = decode_events(await call.body(limits.body_bytes), limits, now_ms)
        posts = posted if isinstance(posted, tuple) else (posted,)
        index.add(len(posts) - 1)
        index.begin()
        checked = _all_checked(server, posts)
        if not isinstance(posted, tuple) and isinstance(checked[0], Exception):
            raise checked[0]
        appends = [one for one in checked if isinstance(one, Append)]
        receipts = await settled(call, lambda: server.store.append(appends, now_ms)) if appends else []
        left = iter(receipts)
        answers = [next(left) if isinstance(one, Append) else _in_a_list(one, call) for one in checked]
        return as_json(answers if isinstance(posted, tuple) else answers[0])


def _all_checked(server: Server, posts: Sequence[EventsBody]) -> list[Append | ApiError]:
    with server.acquire() as deployment:
        return [_checked(post, deployment.recommender.bundle) for post in posts]


def _checked(post: EventsBody, bundle: Bundle) -> Append | ApiError:
    """What to append, or why not: an event that is wrong keeps back those that were sent with it."""
    try:
        for index, event in enumerate(post.events):
            check_event(event, bundle.manifest, bundle.rows, f"events[{index}]")
    except RequestError as error:
        return invalid(error)
    events = (
        StoredEvent(
            item=str(event.item),
            actions=event.actions,
            surface=event.surface,
            timestamp_ms=event.timestamp_ms,
            id=event.id,
        )
        for event in post.events
    )
    return Append(user=post.user, events=tuple(events))


def _user(call: Call, server: Server) -> str:
    user: str = call.request.path_params["user"]
    if not 0 < len(user) <= server.options.limits.id_characters:
        raise RequestError(f"user has {len(user)} characters; send from 1 to {server.options.limits.id_characters}")
    return user


async def user_events(server: Server, call: Call) -> Response:
    """GET /v1/users/{user}."""
    with server.writes.admit(call.left_s, measured=False):
        user = _user(call, server)
        (known,) = await settled(call, lambda: server.store.histories([user]))
        if not known:
            raise ApiError(404, "unknown_user", f"no events are known of user {user!r}")
        events = tuple(SentEvent(**msgspec.structs.asdict(event)) for event in known)
        return as_json(UserAnswer(user=user, events=events))


async def forget_user(server: Server, call: Call) -> Response:
    """DELETE /v1/users/{user}: events, then whatever is cached, of requests under way too."""
    with server.writes.admit(call.left_s, measured=False), server.acquire() as deployment:
        user, cache = _user(call, server), deployment.recommender.cache
        events = await settled(call, lambda: server.store.forget(user))
        cached = cache is not None and cache.invalidate(user)
        under_way = server.users.of(user)  # may have read the events before, and look into the cache only now
        if under_way:
            _, late = await asyncio.wait(under_way, timeout=max(0.0, call.left_s))
            cached |= cache is not None and cache.invalidate(user)
            if late:
                raise ApiError(504, "deadline_exceeded", f"user {user!r} is still being answered; forget them again")
        return as_json(ForgetAnswer(user=user, events=events, cached=cached))


async def similar(server: Server, call: Call) -> Response:
    """POST /v1/items/similar."""
    with server.admission.admit(call.left_s, measured=False, arriving=True) as index:
        limits = server.options.limits
        asked = decode_similar(await call.body(limits.body_bytes), limits)
        index.begin()
        with server.acquire() as deployment:
            answer = server.threads.submit(similar_items, deployment.recommender, asked)
            await call.wait([answer])
        return as_json(answer.result())
