"""What each route does: decode, compute, encode. Sockets, batches and the files of bundles are handled elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

import msgspec
from starlette.responses import Response

from unipinrec.errors import BackendError, ColdStartError, RequestError
from unipinrec.runtime.batching import Answer
from unipinrec.runtime.requests import Event
from unipinrec.runtime.server.admission import Ticket, when_done
from unipinrec.runtime.server.bodies import (
    ApiError,
    ErrorAnswer,
    EventsBody,
    ForgetAnswer,
    ItemAnswer,
    Limits,
    RankBody,
    Readiness,
    RecommendAnswer,
    RecommendBody,
    SentEvent,
    UserAnswer,
    check_id,
    decode_events,
    decode_rank,
    decode_recommend,
    decode_similar,
)
from unipinrec.runtime.server.call import Call, Server, as_json, invalid, refusal_of
from unipinrec.runtime.server.deployment import Deployment
from unipinrec.runtime.server.events.store import Append, StoredEvent
from unipinrec.runtime.server.similar import similar_items
from unipinrec.runtime.validation import check_event, usable

T = TypeVar("T")
log = logging.getLogger(__name__)


async def live(_server: Server, _call: Call) -> Response:
    """GET /health/live: the process runs, and so does its event loop."""
    return as_json({"status": "live"})


async def ready(server: Server, _call: Call) -> Response:
    """GET /health/ready: 200 while requests are answered, else 503."""
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
class _Submitted:
    """A request in the batcher's queue."""

    answer: Answer
    events: int
    skipped: int


async def recommend(server: Server, call: Call) -> Response:
    """POST /v1/recommend."""
    return await _slates(server, call, decode_recommend)


async def rank(server: Server, call: Call) -> Response:
    """POST /v1/rank."""
    return await _slates(server, call, decode_rank)


Asked = RecommendBody | RankBody
Decode = Callable[[bytes, Limits], Asked | tuple[RecommendBody, ...] | tuple[RankBody, ...]]


async def _slates(server: Server, call: Call, decode: Decode) -> Response:
    with server.admission.admit(call.left_s, arriving=True) as ticket:
        limits = server.options.limits
        body = decode(await call.body(limits.body_bytes), limits)
        requests: Sequence[Asked] = body if isinstance(body, tuple) else (body,)
        ticket.add(len(requests) - 1)
        if len(requests) > 1:
            server.access.charge(call.token, call.address, len(requests) - 1)
        ticket.begin()
        outcomes: list[RecommendAnswer | Exception] = []
        for index, submitted in enumerate(await _compute(server, call, requests, ticket)):
            if isinstance(submitted, Exception):
                outcomes.append(submitted)
            elif (error := submitted.answer.exception()) is not None:
                outcomes.append(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            else:
                slate = submitted.answer.result()
                if isinstance(request := requests[index], RecommendBody):
                    call.requests[f"{call.id}/{index}" if isinstance(body, tuple) else call.id] = request
                call.slates.append(slate)
                call.answers.append(submitted.answer)
                fields = msgspec.structs.asdict(slate)
                outcomes.append(RecommendAnswer(**fields, events=submitted.events, skipped_events=submitted.skipped))
        return _in_kind(outcomes, call, listed=isinstance(body, tuple))


async def _compute(
    server: Server, call: Call, requests: Sequence[Asked], ticket: Ticket
) -> list[_Submitted | Exception]:
    """Submit requests to the batcher and wait for all of them; a request that is not valid gets its error."""
    leave: list[Callable[[], None]] = []
    submitted: list[_Submitted | Exception] = []
    try:
        leave.extend(server.users.enter(request.user) for request in requests)
        call.users += [request.user for request in requests if request.user is not None]
        with server.acquire() as deployment:
            users = [request.user for request in requests if request.history is None and request.user is not None]
            stored = await settled(call, lambda: server.store.histories(users)) if users else []
            # After the events: what is dropped meanwhile is in both, not in neither.
            seen = await settled(call, lambda: server.store.seen(users)) if any(stored) else [b""] * len(users)
            left = zip(stored, seen, strict=True)
            for request in requests:
                events, gone = next(left) if request.history is None else (request.history, b"")
                asked = _without_seen(request, gone, deployment)
                submitted.append(_submit(deployment, asked, events, server.options.limits.ahead_ms))
            await call.wait([entry.answer for entry in submitted if isinstance(entry, _Submitted)])
    finally:
        for release, entry in zip_longest(leave, submitted):
            if isinstance(entry, _Submitted) and not entry.answer.done():  # the batcher computes it, though none waits
                when_done(entry.answer, release)
                ticket.outlast(entry.answer)
            else:
                release()
    return submitted


def _without_seen(request: Asked, seen: bytes, deployment: Deployment) -> Asked:
    """Leave out the items of dropped events too, the newest first, but not more than half of all items."""
    if not seen or isinstance(request, RankBody) or not request.exclude_seen:
        return request
    items = deployment.items_by_hash.named(seen)[: deployment.recommender.bundle.catalogue.num_live // 2]
    return msgspec.structs.replace(request, exclude=(*request.exclude, *items))


def _submit(deployment: Deployment, request: Asked, events: Sequence[Event], ahead_ms: int) -> _Submitted | Exception:
    try:
        if request.history is not None:
            history = tuple(events)
        else:
            history = usable(events, deployment.recommender.bundle)
            last_ms = history[-1].timestamp_ms if history else None
            if last_ms and request.now_ms and 0 < last_ms - request.now_ms <= ahead_ms:  # the client's clock is behind
                request = msgspec.structs.replace(request, now_ms=last_ms)
        answer = deployment.batcher.submit(request.request(history))
    except ColdStartError as error:
        stored = f"the active bundle has none of the {len(events)} items" if events else "no events are known"
        reason = f"user {request.user!r}: {stored}; " if request.history is None else ""
        return ApiError(422, "cold_start", f"{reason}{error}")
    except RequestError as error:
        return invalid(error)
    except Exception as error:  # a fault of ours costs the other requests of a list nothing
        return error
    return _Submitted(answer=answer, events=len(history), skipped=len(events) - len(history))


async def settled(call: Call, begin: Callable[[], Future[T]]) -> T:
    """The result of a store's future.

    Raises:
        ApiError: 504, the deadline has passed; 503, the store failed.
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


def _in_kind(outcomes: Sequence[T | Exception], call: Call, *, listed: bool) -> Response:
    """The answer to one request, or of a list of requests a list, in which errors stand in their places.

    Raises:
        Exception: The outcome of one request, if it is an error.
    """
    if not listed:
        if isinstance(outcomes[0], Exception):
            raise outcomes[0]
        return as_json(outcomes[0])
    answers: list[T | ErrorAnswer] = []
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            detail = refusal_of(outcome, call.id).detail
            call.codes_in_list.append(detail.code)
            answers.append(ErrorAnswer(error=detail))
        else:
            answers.append(outcome)
    return as_json(answers)


async def append_events(server: Server, call: Call) -> Response:
    """POST /v1/events: each element of a list is rejected or kept by itself; one transaction keeps all."""
    with server.writes.admit(call.left_s, arriving=True) as ticket:
        now_ms, limits = time.time_ns() // 1_000_000, server.options.limits
        body = decode_events(await call.body(limits.body_bytes), limits, now_ms)
        posts = body if isinstance(body, tuple) else (body,)
        ticket.add(len(posts) - 1)
        if len(posts) > 1:
            server.access.charge(call.token, call.address, len(posts) - 1)
        ticket.begin()
        checked = _checked(server, posts, now_ms)
        appends = [append for append in checked if isinstance(append, Append)]
        receipts = await settled(call, lambda: server.store.append(appends, now_ms)) if appends else []
        left = iter(receipts)
        outcomes = [next(left) if isinstance(append, Append) else append for append in checked]
        return _in_kind(outcomes, call, listed=isinstance(body, tuple))


def _checked(server: Server, posts: Sequence[EventsBody], now_ms: int) -> list[Append | ApiError]:
    """What to append, or why not: one invalid event rejects all events of its element.

    A time ahead of this machine's clock is that of another clock; the event gets the time of its arrival, for otherwise
    later events and requests would have to wait for that time.
    """
    checked: list[Append | ApiError] = []
    with server.acquire() as deployment:
        bundle = deployment.recommender.bundle
        for post in posts:
            try:
                for index, event in enumerate(post.events):
                    check_event(event, bundle.manifest, bundle.rows, f"events[{index}]")
            except RequestError as error:
                checked.append(invalid(error))
                continue
            events, ahead = [], 0
            for event in post.events:
                values = msgspec.structs.asdict(event) | {"item": str(event.item)}
                if event.timestamp_ms is not None and event.timestamp_ms > now_ms:
                    ahead, values["timestamp_ms"] = ahead + 1, now_ms
                events.append(StoredEvent(**values))
            checked.append(Append(user=post.user, events=tuple(events), ahead=ahead))
    return checked


def _user(call: Call, server: Server) -> str:
    user: str = call.request.path_params["user"]
    check_id("user", user, server.options.limits)
    return user


async def user_events(server: Server, call: Call) -> Response:
    """GET /v1/users/{user}."""
    with server.writes.admit(call.left_s, measured=False):
        user = _user(call, server)
        (stored,) = await settled(call, lambda: server.store.histories([user]))
        if not stored:
            raise ApiError(404, "unknown_user", f"user {user!r} has no stored events; send some to POST /v1/events")
        events = tuple(SentEvent(**msgspec.structs.asdict(event)) for event in stored)
        return as_json(UserAnswer(user=user, events=events))


async def forget_user(server: Server, call: Call) -> Response:
    """DELETE /v1/users/{user}: events, then cache entries, those of requests in flight too."""
    with server.writes.admit(call.left_s, measured=False), server.acquire() as deployment:
        user, cache = _user(call, server), deployment.recommender.cache
        events = await settled(call, lambda: server.store.forget(user))
        cached = cache is not None and cache.invalidate(user)
        in_flight = server.users.of(user)  # they may have read the events already, and not yet the cache
        if in_flight:
            _, late = await asyncio.wait(in_flight, timeout=max(0.0, call.left_s))
            cached |= cache is not None and cache.invalidate(user)
            if late:
                raise ApiError(504, "deadline_exceeded", f"user {user!r} is still being answered; forget them again")
        return as_json(ForgetAnswer(user=user, events=events, cached=cached))


async def item(server: Server, call: Call) -> Response:
    """GET /v1/items/{item}."""
    name = call.request.path_params["item"]
    with server.acquire() as deployment:
        bundle = deployment.recommender.bundle
        catalogue, row = bundle.catalogue, bundle.rows.get(name)
        if row is None:
            raise ApiError(404, "unknown_item", f"item {name[:100]!r} is not among the {len(bundle.rows)} items")
        codes = [0] * len(catalogue.words) if catalogue.codes is None else catalogue.codes[row].tolist()
        answer = ItemAnswer(
            item=name,
            title=bundle.titles[row],
            categories={
                feature: words[code - 1]
                for (feature, words), code in zip(catalogue.words.items(), codes, strict=True)
                if code
            },
            metadata=catalogue.metadata_of(row),
            retired=catalogue.live is not None and not catalogue.live[row],
            bundle=bundle.hash,
        )
    return as_json(answer)


async def similar(server: Server, call: Call) -> Response:
    """POST /v1/items/similar."""
    with server.admission.admit(call.left_s, measured=False, arriving=True) as ticket:
        limits = server.options.limits
        body = decode_similar(await call.body(limits.body_bytes), limits)
        ticket.begin()
        with server.acquire() as deployment:
            answer = server.threads.submit(similar_items, deployment.recommender, body)
            try:
                await call.wait([answer])
            finally:
                ticket.outlast(answer)
        return as_json(answer.result())
