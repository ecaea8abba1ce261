"""The page at `/`: one file that needs nothing else, and the sample users that it shows.

Sample users are histories of real people in many bundles: without the page their endpoints do not exist either.
"""

from __future__ import annotations

import base64
import hashlib
import re
from asyncio import to_thread
from functools import partial
from pathlib import Path

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from unipinrec.errors import RequestError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.requests import Order
from unipinrec.runtime.server.api import Refusal
from unipinrec.runtime.server.app import route
from unipinrec.runtime.server.call import Call, Server, as_json
from unipinrec.runtime.server.operations import READS, Operation

PAGE = Path(__file__).with_name("page.html")
MOST_USERS = 200


class SampleUser(msgspec.Struct, frozen=True, kw_only=True):
    """A sample user of the bundle, and how many events there are."""

    user: str
    events: int


class SampleUsers(msgspec.Struct, frozen=True, kw_only=True):
    """Whom the page offers, and what it must know of the bundle.

    Attributes:
        users: The first sample users; none where the bundle carries none.
        actions, positive_actions: See the bundle's manifest.
        order: What slates are ordered by.
        items: Items that can be recommended.
        bundle: Hash of the bundle.
        device, device_reason: What runs, and why.
    """

    users: tuple[SampleUser, ...]
    actions: tuple[str, ...]
    positive_actions: tuple[str, ...]
    order: Order
    items: int
    bundle: str
    device: str
    device_reason: str


class TitledEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An `Event` with the title of its item, if there is one."""

    item: str
    title: str | None
    actions: tuple[str, ...]
    surface: str
    timestamp_ms: int | None


class SampleHistory(msgspec.Struct, frozen=True, kw_only=True):
    """The events of a sample user, oldest first."""

    user: str
    events: tuple[TitledEvent, ...]
    bundle: str


USERS = Operation(
    method="GET",
    path="/v1/demo/users",
    tag="page",
    summary="The first sample users of the bundle",
    answer=SampleUsers,
    statuses=READS,
)
HISTORY = Operation(
    method="GET",
    path="/v1/demo/history",
    tag="page",
    summary="The events of a sample user",
    answer=SampleHistory,
    statuses=(*READS, 404),
    parameters={"user": {"in": "query", "required": True, "schema": {"type": "string"}}},
)


def page_routes(server: Server) -> list[Route]:
    """The page's lines of the table of routes."""
    content = PAGE.read_bytes()
    return [
        route(server, Operation(method="GET", path="/"), partial(_page, content, page_headers(content))),
        route(server, USERS, _users),
        route(server, HISTORY, _history),
    ]


def page_headers(content: bytes) -> dict[str, str]:
    """What a browser may do with the page: run the one script and style sheet that are in it, and talk to us."""
    allowed = {tag: _hash(content, tag) for tag in ("script", "style")}
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:16]}"',
    }


def _hash(content: bytes, tag: str) -> str:
    (inside,) = re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), content, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"


async def _page(content: bytes, headers: dict[str, str], _server: Server, call: Call) -> Response:
    if call.request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type="text/html", headers=headers)


async def _users(server: Server, _call: Call) -> Response:
    with server.acquire() as deployment:
        recommender, version = deployment.recommender, deployment.version
        return as_json(await to_thread(_sample_users, recommender, version))


async def _history(server: Server, call: Call) -> Response:
    user = call.request.query_params.get("user")
    if user is None:
        raise RequestError("the sample user is missing; ask for /v1/demo/history?user=ID")
    with server.acquire() as deployment:
        bundle, version = deployment.recommender.bundle, deployment.version
        return as_json(await to_thread(_sample_history, bundle, version, user))


def _sample_users(recommender: Recommender, version: str) -> SampleUsers:
    bundle, device = recommender.bundle, recommender.device
    return SampleUsers(
        users=tuple(SampleUser(user=user, events=events) for user, events in bundle.sample_users(MOST_USERS)),
        actions=bundle.manifest.actions,
        positive_actions=bundle.manifest.positive_actions,
        order=recommender.order,
        items=bundle.catalogue.num_live,
        bundle=version,
        device=device.name,
        device_reason=device.reason,
    )


def _sample_history(bundle: Bundle, version: str, user: str) -> SampleHistory:
    try:
        events = bundle.user_events(user)
    except RequestError as error:
        raise Refusal(404, "unknown_user", f"there is no sample user {user[:100]!r}") from error
    titled = tuple(
        TitledEvent(
            item=str(event.item),
            title=bundle.titles[bundle.rows[str(event.item)]],
            actions=event.actions,
            surface=event.surface,
            timestamp_ms=event.timestamp_ms,
        )
        for event in events
    )
    return SampleHistory(user=user, events=titled, bundle=version)
