"""The page at `/`, a single file, and the endpoints of the sample users that it shows.

Many bundles hold histories of real people as sample users: without the page their endpoints do not exist either.
"""

from __future__ import annotations

import base64
import hashlib
import re
from asyncio import to_thread
from pathlib import Path

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from unipinrec.errors import RequestError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.recommender import Recommender
from unipinrec.runtime.requests import Order
from unipinrec.runtime.server.app import route
from unipinrec.runtime.server.bodies import ApiError
from unipinrec.runtime.server.call import Call, Server, as_json
from unipinrec.runtime.server.operations import READS, Operation

PAGE = Path(__file__).with_name("page.html")
MOST_USERS = 200


class SampleUser(msgspec.Struct, frozen=True, kw_only=True):
    """A sample user of the bundle, and the number of events."""

    user: str
    events: int


class SampleUsers(msgspec.Struct, frozen=True, kw_only=True):
    """The sample users that the page lists, and facts about the bundle.

    Attributes:
        users: The first sample users of the bundle.
        actions, positive_actions: See the bundle's manifest.
        order: Default order of slates.
        items: Items that can be recommended.
        bundle: Hash of the bundle.
        device, device_reason: The device, and why it was chosen.
        images: Whether the page may load pictures from other servers.
    """

    users: tuple[SampleUser, ...]
    actions: tuple[str, ...]
    positive_actions: tuple[str, ...]
    order: Order
    items: int
    bundle: str
    device: str
    device_reason: str
    images: bool


class TitledEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An `Event` with the title of its item; null where the bundle has none."""

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
    path="/v1/demo/users",
    tag="page",
    summary="The first sample users of the bundle",
    answer=SampleUsers,
    statuses=READS,
)
HISTORY = Operation(
    path="/v1/demo/history",
    tag="page",
    summary="The events of a sample user",
    answer=SampleHistory,
    statuses=(*READS, 404),
    parameters={"user": {"in": "query", "required": True, "schema": {"type": "string"}}},
)


def page_routes(server: Server, *, images: bool = False) -> list[Route]:
    """The routes of the page; with `images`, it loads the pictures of items from wherever they lie."""
    content = PAGE.read_bytes()
    headers = page_headers(content, images=images)

    async def page(_server: Server, call: Call) -> Response:
        if call.request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type="text/html", headers=headers)

    async def users(_server: Server, _call: Call) -> Response:
        with server.acquire() as deployment:
            return as_json(await to_thread(_sample_users, deployment.recommender, images))

    return [
        route(server, Operation(path="/"), page),
        route(server, USERS, users),
        route(server, HISTORY, _history),
    ]


def page_headers(content: bytes, *, images: bool = False) -> dict[str, str]:
    """Headers that allow a browser only to run the page's own script and style sheet, and to call this server.

    With `images` it may load pictures over HTTPS from other servers too.
    """
    allowed = {}
    for tag in (b"script", b"style"):
        (inside,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), content, re.DOTALL)
        allowed[tag] = f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"
    pictures = "data: https:" if images else "data:"
    policy = (
        f"default-src 'none'; script-src {allowed[b'script']}; style-src {allowed[b'style']}; img-src {pictures}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:16]}"',
    }


async def _history(server: Server, call: Call) -> Response:
    user = call.request.query_params.get("user")
    if user is None:
        raise RequestError(f"the query has no user; send {HISTORY.path}?user=ID")
    with server.acquire() as deployment:
        return as_json(await to_thread(_sample_history, deployment.recommender.bundle, user))


def _sample_users(recommender: Recommender, images: bool) -> SampleUsers:
    bundle, device = recommender.bundle, recommender.device
    return SampleUsers(
        users=tuple(SampleUser(user=user, events=events) for user, events in bundle.sample_users(MOST_USERS)),
        actions=bundle.manifest.actions,
        positive_actions=bundle.manifest.positive_actions,
        order=recommender.order,
        items=bundle.catalogue.num_live,
        bundle=bundle.hash,
        device=device.name,
        device_reason=device.reason,
        images=images,
    )


def _sample_history(bundle: Bundle, user: str) -> SampleHistory:
    try:
        events = bundle.user_events(user)
    except RequestError as error:
        message = f"there is no sample user {user[:100]!r}; {USERS.path} lists them"
        raise ApiError(404, "unknown_user", message) from error
    titled = (
        TitledEvent(**msgspec.structs.asdict(event), title=bundle.titles[bundle.rows[str(event.item)]])
        for event in events
    )
    return SampleHistory(user=user, events=tuple(titled), bundle=bundle.hash)
