"""The server's table of routes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from unipinrec.runtime.server import handlers
from unipinrec.runtime.server.bodies import (
    ErrorAnswer,
    ErrorDetail,
    EventsBody,
    ForgetAnswer,
    Readiness,
    RecommendAnswer,
    RecommendBody,
    SimilarAnswer,
    SimilarBody,
    UserAnswer,
)
from unipinrec.runtime.server.call import Endpoint, Handler, Observer, Server, ServerOptions, as_json
from unipinrec.runtime.server.events.store import EventStore, MemoryEventStore, Receipt, StoreLimits
from unipinrec.runtime.server.openapi_examples import EXAMPLE_USER
from unipinrec.runtime.server.operations import POSTS, READS, STORE, AnyOf, Operation, in_path
from unipinrec.runtime.server.swap import Deployments

__all__ = ["Endpoint", "Server", "ServerOptions", "make_app", "make_server", "route"]

log = logging.getLogger(__name__)


RECOMMEND = Operation(
    method="POST",
    path="/v1/recommend",
    tag="recommend",
    summary="The best items for a user, or for each of a list",
    body=RecommendBody | list[RecommendBody],
    answer=AnyOf((RecommendAnswer, AnyOf((RecommendAnswer, ErrorAnswer), listed=True))),
    statuses=(*POSTS, 422),
)
APPEND = Operation(
    method="POST",
    path="/v1/events",
    tag="users",
    summary="Append what users just did",
    body=EventsBody | list[EventsBody],
    answer=AnyOf((Receipt, AnyOf((Receipt, ErrorAnswer), listed=True))),
    statuses=POSTS,
)
NAMED = {"user": in_path(EXAMPLE_USER, maxLength=256)}
USER = Operation(
    method="GET",
    path="/v1/users/{user:text}",
    tag="users",
    summary="What is known of a user",
    answer=UserAnswer,
    statuses=(*STORE, 404),
    parameters=NAMED,
)
FORGET = Operation(
    method="DELETE",
    path=USER.path,
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
)
LIVE = Operation(method="GET", path="/health/live", summary="Whether the process answers", answer=dict[str, str])
READY = Operation(
    method="GET",
    path="/health/ready",
    summary="Whether requests are answered, and with what",
    answer=Readiness,
    statuses=READS,
    refused={503: Readiness},
)


class _Text(Convertor[str]):
    """The rest of a path, whatever is in it: Starlette's own ends at a line break, which an id may have."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("text", _Text())


def route(server: Server, operation: Operation, handler: Handler) -> Route:
    """A line of the table."""
    endpoint = Endpoint(server=server, operation=operation, handler=handler)
    return Route(operation.path, endpoint, methods=[operation.method])


def operations_of(routes: Iterable[BaseRoute]) -> list[Operation]:
    """What the routes of an application do."""
    endpoints = (one.endpoint for one in routes if isinstance(one, Route))
    return [endpoint.operation for endpoint in endpoints if isinstance(endpoint, Endpoint)]


def make_server(
    options: ServerOptions | None = None,
    *,
    deployments: Deployments | None = None,
    store: EventStore | None = None,
    observers: Sequence[Observer] = (),
) -> Server:
    """What handlers share, ready if there is something to serve with; `Server.open` gives it to it later."""
    server = Server(
        options=options or ServerOptions(),
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
    forget: Handler = handlers.forget_user,
) -> Starlette:
    """The application: its own table of routes, and `more` of them.

    Processes that serve together hand requests to each other, and bring handlers of their own.
    """
    routes = [
        route(server, RECOMMEND, recommend),
        route(server, APPEND, handlers.append_events),
        route(server, USER, handlers.user_events),
        route(server, FORGET, forget),
        route(server, SIMILAR, handlers.similar),
        route(server, LIVE, handlers.live),
        route(server, READY, handlers.ready),
        *more,
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
    app.router.redirect_slashes = False  # a path is what it is, and a body is not sent twice
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    """An error in the shape of the routes that begin as this path does."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    code, message = {
        404: ("no_such_route", "there is nothing here; GET /openapi.json lists what there is"),
        405: ("method_not_allowed", "this path does not answer to this method"),
    }.get(status, ("http_error", "the request cannot be answered"))
    headers = error.headers if isinstance(error, HTTPException) else None
    first = request.url.path.split("/")[1]
    near = [one for one in operations_of(request.app.routes) if one.path.split("/")[1] == first]
    body = (near[0].error if near else ErrorAnswer).of(ErrorDetail(code=code, message=message))
    response = as_json(body, status)
    response.headers.update(headers or {})
    return response
