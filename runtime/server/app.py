"""The server's table of routes, and how a handler becomes one: every answer, errors too, leaves through one place."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from unipinrec.runtime.server import handlers
from unipinrec.runtime.server.api import ErrorAnswer, ErrorDetail, Refusal
from unipinrec.runtime.server.context import Call, Handler, Observer, Server, ServerOptions
from unipinrec.runtime.server.deployments import Deployments
from unipinrec.runtime.server.events.store import EventStore, MemoryEventStore, StoreLimits
from unipinrec.runtime.server.process.peers import Peers
from unipinrec.runtime.server.v2.codec import InferError

__all__ = ["Endpoint", "Server", "ServerOptions", "make_app", "make_server", "route"]

CLIENT_LEFT = 499
log = logging.getLogger(__name__)


class _Text(Convertor[str]):
    """The rest of a path, whatever is in it: Starlette's own ends at a line break, which an id may have."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("text", _Text())


@dataclass(frozen=True, kw_only=True, eq=False)
class Endpoint:
    """A handler as an ASGI application, with a request id, a deadline, and its errors as JSON."""

    server: Server
    path: str
    handler: Handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        call = self.server.call(Request(scope, receive, send), self.path)
        try:
            self.server.set_deadline(call)
            response = await self.handler(self.server, call)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_LEFT)
        except Exception as error:
            response = _refused(handlers.refusal_of(error, call.id), call)
            _let_go(error)
        response.headers["x-request-id"] = call.id
        if self.server.phase == "draining":
            response.headers["connection"] = "close"
        call.status, call.seconds = response.status_code, time.perf_counter() - call.began
        for observe in () if call.answered_elsewhere else self.server.observers:
            observe(call)
        response.headers.update(call.headers)
        await response(scope, receive, send)


def _let_go(error: BaseException | None) -> None:
    """Of the frames of a traceback: they hold the request and its body, and often a future that holds the error.

    Only the garbage collector would find that cycle, and it counts objects, not their bytes.
    """
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _refused(refusal: Refusal, call: Call) -> Response:
    call.code = refusal.detail.code
    response = handlers.as_json(_error_body(refusal.detail, call.request), refusal.status)
    response.headers.update(refusal.headers or {})
    return response


def _error_body(detail: ErrorDetail, request: Request) -> ErrorAnswer | InferError:
    """An error in the shape of ours, or of the Open Inference Protocol on its paths."""
    protocol = f"{request.url.path}/".startswith("/v2/")
    return InferError(error=detail.message) if protocol else ErrorAnswer(error=detail)


def route(server: Server, method: str, path: str, handler: Handler) -> Route:
    """A line of the table."""
    endpoint = Endpoint(server=server, path=path.replace(":text}", "}"), handler=handler)
    return Route(path, endpoint, methods=[method])


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


def make_app(server: Server, more: Sequence[BaseRoute] = (), peers: Peers | None = None) -> Starlette:
    """The application: the table of routes, and `more` of them; `peers` are processes that serve with this one."""
    recommend: Handler = handlers.recommend
    forget: Handler = handlers.forget_user
    if peers is not None:
        recommend, forget = peers.at_owner(recommend), peers.forgetting(forget)
    routes = [
        route(server, "POST", "/v1/recommend", recommend),
        route(server, "POST", "/v1/events", handlers.append_events),
        route(server, "GET", "/v1/users/{user:text}", handlers.user_events),
        route(server, "DELETE", "/v1/users/{user:text}", forget),
        route(server, "POST", "/v1/items/similar", handlers.similar),
        route(server, "GET", "/health/live", handlers.live),
        route(server, "GET", "/health/ready", handlers.ready),
        *more,
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
    app.router.redirect_slashes = False  # a path is what it is, and a body is not sent twice
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    code, message = {
        404: ("no_such_route", "there is nothing here; GET /openapi.json lists what there is"),
        405: ("method_not_allowed", "this path does not answer to this method"),
    }.get(status, ("http_error", "the request cannot be answered"))
    headers = error.headers if isinstance(error, HTTPException) else None
    response = handlers.as_json(_error_body(ErrorDetail(code=code, message=message), request), status)
    response.headers.update(headers or {})
    return response
