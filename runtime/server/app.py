"""The server's table of routes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from starlette.applications import Starlette
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from unipinrec.runtime.server import handlers
from unipinrec.runtime.server.access.access import Access
from unipinrec.runtime.server.bodies import (
    ErrorAnswer,
    ErrorDetail,
    EventsBody,
    ForgetAnswer,
    ItemAnswer,
    RankBody,
    Readiness,
    RecommendAnswer,
    RecommendBody,
    SimilarAnswer,
    SimilarBody,
    UserAnswer,
)
from unipinrec.runtime.server.call import Endpoint, Handler, Observer, Server, ServerOptions, as_json, id_of
from unipinrec.runtime.server.events.store import EventStore, MemoryEventStore, Receipt, StoreLimits
from unipinrec.runtime.server.openapi_examples import EXAMPLE_USER
from unipinrec.runtime.server.operations import POSTS, READS, STORE, AnyOf, Operation, in_path
from unipinrec.runtime.server.swap import Deployments

RECOMMEND = Operation(
    method="POST",
    path="/v1/recommend",
    tag="recommend",
    summary="The best items for a user, or for each of a list",
    body=RecommendBody | list[RecommendBody],
    answer=AnyOf((RecommendAnswer, AnyOf((RecommendAnswer, ErrorAnswer), listed=True))),
    statuses=(*POSTS, 422),
    examples="recommend",
)
RANK = Operation(
    method="POST",
    path="/v1/rank",
    tag="recommend",
    summary="Some items, best first for a user, or for each of a list",
    body=RankBody | list[RankBody],
    answer=RECOMMEND.answer,
    statuses=RECOMMEND.statuses,
    examples="rank",
)
APPEND = Operation(
    method="POST",
    path="/v1/events",
    scope="events",
    tag="users",
    summary="Append new events of users",
    body=EventsBody | list[EventsBody],
    answer=AnyOf((Receipt, AnyOf((Receipt, ErrorAnswer), listed=True))),
    statuses=POSTS,
    examples="events",
)
NAMED = {"user": in_path(EXAMPLE_USER, maxLength=256)}
USER = Operation(
    path="/v1/users/{user:text}",
    scope="events",
    tag="users",
    summary="The stored events of a user",
    answer=UserAnswer,
    statuses=(*STORE, 404),
    parameters=NAMED,
)
FORGET = Operation(
    method="DELETE",
    path=USER.path,
    scope="events",
    tag="users",
    summary="Forget a user",
    answer=ForgetAnswer,
    statuses=STORE,
    parameters=NAMED,
)
SIMILAR = Operation(
    method="POST",
    path="/v1/items/similar",
    tag="recommend",
    summary="Items like other items",
    body=SimilarBody,
    answer=SimilarAnswer,
    statuses=POSTS,
    examples="similar",
)
ITEM = Operation(
    path="/v1/items/{item:text}",
    tag="recommend",
    summary="What the bundle knows of an item",
    answer=ItemAnswer,
    statuses=(*READS, 404),
    parameters={"item": in_path()},
)
LIVE = Operation(
    path="/health/live", scope=None, summary="Whether the process answers", answer=dict[str, str], polled=True
)
READY = Operation(
    path="/health/ready",
    scope=None,
    summary="Whether requests are answered, and on what device",
    answer=Readiness,
    statuses=READS,
    refused={503: Readiness},
    polled=True,
)


class _Text(PathConvertor):
    """The rest of a path with line breaks, which an id may hold; Starlette's own stops at them."""

    regex = r"[\s\S]*"


register_url_convertor("text", _Text())


def route(server: Server, operation: Operation, handler: Handler) -> Route:
    """A row of the table of routes."""
    endpoint = Endpoint(server=server, operation=operation, handler=handler)
    return Route(operation.path, endpoint, methods=[operation.method])


def operations_of(routes: Iterable[BaseRoute]) -> list[Operation]:
    """The operations of an application's routes."""
    endpoints = (route.endpoint for route in routes if isinstance(route, Route))
    return [endpoint.operation for endpoint in endpoints if isinstance(endpoint, Endpoint)]


def make_server(
    options: ServerOptions | None = None,
    *,
    access: Access | None = None,
    deployments: Deployments | None = None,
    store: EventStore | None = None,
    observers: Sequence[Observer] = (),
) -> Server:
    """What handlers share. It is ready at once with `deployments`, else after `Server.open`."""
    server = Server(
        options=options or ServerOptions(),
        access=access or Access(),
        store=store or MemoryEventStore(StoreLimits(events=2_000)),
        observers=list(observers),
    )
    if deployments is not None:
        server.open(deployments)
    return server


def make_app(
    server: Server,
    more: Sequence[BaseRoute] = (),
    *,
    recommend: Handler = handlers.recommend,
    rank: Handler = handlers.rank,
    forget: Handler = handlers.forget_user,
) -> Starlette:
    """The application: its own table of routes, and `more` of them.

    Processes that serve together pass handlers that hand requests to each other.
    """
    routes = [
        route(server, RECOMMEND, recommend),
        route(server, RANK, rank),
        route(server, APPEND, handlers.append_events),
        route(server, USER, handlers.user_events),
        route(server, FORGET, forget),
        route(server, SIMILAR, handlers.similar),
        route(server, ITEM, handlers.item),
        route(server, LIVE, handlers.live),
        route(server, READY, handlers.ready),
        *more,
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
    app.router.redirect_slashes = False  # so that no client sends its body twice
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    """An error in the format of the routes whose paths begin like this one."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    code, message = {
        404: ("no_such_route", "this path does not exist; GET /openapi.json lists those that do"),
        405: ("method_not_allowed", "this path does not accept this method"),
    }.get(status, ("http_error", "the request cannot be answered"))
    headers = error.headers if isinstance(error, HTTPException) else None
    first = request.url.path.split("/")[1]
    near = (known.error for known in operations_of(request.app.routes) if known.path.split("/")[1] == first)
    response = as_json(next(near, ErrorAnswer).of(ErrorDetail(code=code, message=message)), status)
    response.headers.update({"x-request-id": id_of(request), **(headers or {})})
    return response
