"""One HTTP request from its arrival to its answer, and what all handlers share."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from unipinrec.errors import BackendError, ConfigError, RequestError, TooFewItemsError
from unipinrec.runtime.batching import Answer
from unipinrec.runtime.requests import Slate
from unipinrec.runtime.server.access.access import Access
from unipinrec.runtime.server.admission import Admission, UsersInFlight, when_done
from unipinrec.runtime.server.bodies import ApiError, Limits, RecommendBody
from unipinrec.runtime.server.deployment import Deployment
from unipinrec.runtime.server.events.store import EventStore
from unipinrec.runtime.server.operations import Operation
from unipinrec.runtime.server.swap import Deployments

CLIENT_LEFT = 499
_ENCODER = msgspec.json.Encoder()
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
Phase = Literal["loading", "ready", "draining"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How the server treats requests.

    Attributes:
        limits: Limits of each request.
        queue: Most requests that are admitted and not yet answered; each request of a list counts.
        deadline_ms: How long an answer may take, from the request's arrival, unless X-Deadline-Ms says otherwise.
        max_deadline_ms: Longer deadlines of requests are lowered to this.
    """

    limits: Limits = field(default_factory=Limits)
    queue: int = 256
    deadline_ms: float = 2_000.0
    max_deadline_ms: float = 30_000.0

    def __post_init__(self) -> None:
        if not 0 < self.deadline_ms <= self.max_deadline_ms:
            raise ConfigError(
                f"deadline_ms={self.deadline_ms} must be more than 0 and at most max_deadline_ms={self.max_deadline_ms}"
            )
        if self.queue < self.limits.batch:
            raise ConfigError(f"queue={self.queue} must hold a list of {self.limits.batch} requests")


@dataclass(kw_only=True, eq=False)
class Call:
    """One HTTP request and its outcome, which observers see.

    Attributes:
        request: Starlette's request.
        id: The client's id of the request, or one made here.
        route: Path of the route, with its parameters as names.
        token: Name of its token; None = it needs none, or another process has checked it.
        began: Time of arrival, by `time.perf_counter`.
        deadline: When the answer is due, by the same clock.
        slates: Slates of the answer, recommended or ranked.
        answers: How the batcher answered each slate.
        requests: The request of each recommended slate by its id: that of the call, in a list with the index.
        users: Users in the request; logged only if the operator wants it.
        content: The body, after it was read.
        polled: See `Operation`.
        answered_elsewhere: Another process has answered it, and told its own observers.
        headers: Further headers of the answer; an observer may add some.
        status: Status of the answer; 499 = the client left first.
        code: Code of the error, if the answer is one.
        codes_in_list: Codes of the errors in an answer that is a list.
        seconds: From arrival until the answer was ready to send.
    """

    request: Request
    id: str
    route: str
    began: float
    deadline: float
    token: str | None = None
    slates: list[Slate] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    requests: dict[str, RecommendBody] = field(default_factory=dict)
    users: list[str] = field(default_factory=list)
    content: bytes | None = None
    answered_elsewhere: bool = False
    polled: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 0
    code: str | None = None
    codes_in_list: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.perf_counter()

    @property
    def from_peer(self) -> bool:
        """Whether another process of this server sent it, over a socket without a port."""
        server = self.request.scope.get("server")
        return server is not None and server[1] is None

    @property
    def address(self) -> str:
        """The client's address."""
        return self.request.client.host if self.request.client else ""

    async def body(self, limit: int) -> bytes:
        """The whole body, which is read once.

        Raises:
            ApiError: 400, it is compressed; 413, it is larger than `limit`; 408, it did not arrive before the deadline.
            ClientDisconnect: The client left.
        """
        if self.content is not None:
            return self.content
        coding = self.request.headers.get("content-encoding", "identity")
        if coding != "identity":
            message = f"Content-Encoding: {coding[:20]!r} is not supported; send the body as it is"
            raise ApiError(400, "invalid_request", message)
        declared = self.request.headers.get("content-length", "0")
        parts: list[bytes] = []
        left = limit
        too_large = ApiError(413, "too_large", f"the body is larger than {limit} bytes; send fewer requests at a time")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        try:
            async with asyncio.timeout(self.left_s):
                async for part in self.request.stream():
                    left -= len(part)
                    if left < 0:
                        raise too_large
                    parts.append(part)
        except TimeoutError as error:
            raise ApiError(408, "body_timeout", "the body did not arrive before the deadline") from error
        self.content = parts[0] if len(parts) == 1 else b"".join(parts)
        return self.content

    async def wait(self, futures: Sequence[Future[Any] | asyncio.Future[Any]]) -> None:
        """Wait until all are done. When the deadline passes or the client leaves, cancel the rest.

        Raises:
            ApiError: 504, the deadline has passed.
            ClientDisconnect: The client left.
        """
        loop = asyncio.get_running_loop()
        end: asyncio.Future[_End] = loop.create_future()
        late = loop.call_later(max(0.0, self.left_s), _resolve, end, "late")
        gone = loop.create_task(self._gone(end))
        _when_all_done(futures, end)
        try:
            if await end == "gone":
                raise ClientDisconnect
            if end.result() == "late":
                limit_ms = (self.deadline - self.began) * 1e3
                raise ApiError(504, "deadline_exceeded", f"there was no answer within {limit_ms:.0f} ms")
        finally:
            late.cancel()
            gone.cancel()
            for future in futures:
                future.cancel()

    async def _gone(self, end: asyncio.Future[_End]) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        _resolve(end, "gone")


_End = Literal["done", "late", "gone"]


def _resolve(end: asyncio.Future[_End], how: _End) -> None:
    if not end.done():
        end.set_result(how)


def _when_all_done(futures: Sequence[Future[Any] | asyncio.Future[Any]], end: asyncio.Future[_End]) -> None:
    """Resolve `end` when all are done, with results or errors."""
    left = len(futures)

    def count() -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            _resolve(end, "done")

    for future in futures:
        when_done(future, count)
    if not futures:
        count()


Observer = Callable[[Call], None]


@dataclass(kw_only=True, eq=False)
class Server:
    """What the handlers share; all of it is used in the event loop's thread.

    Attributes:
        options: How requests are treated.
        access: Who may send them, and how many.
        store: The events of users.
        deployments: The active deployment and those it replaced; None until the bundle is loaded.
        admission: For requests that need the device.
        writes: For requests that need the store.
        handed_over: For requests that another process may have to answer.
        users: Users with requests in flight.
        threads: For work that must hold up neither the event loop nor a batch.
        observers: Called with every request when its answer is ready.
        phase: loading, ready or draining.
    """

    options: ServerOptions
    access: Access = field(default_factory=Access)
    store: EventStore
    deployments: Deployments | None = None
    admission: Admission = field(init=False)
    writes: Admission = field(init=False)
    handed_over: Admission = field(init=False)
    users: UsersInFlight = field(default_factory=UsersInFlight)
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "unipinrec-server"))
    observers: list[Observer] = field(default_factory=list)
    phase: Phase = "loading"

    def __post_init__(self) -> None:
        self.admission, self.writes, self.handed_over = (Admission(self.options.queue) for _ in range(3))

    def open(self, deployments: Deployments) -> None:
        """Begin to answer, with these deployments."""
        self.deployments = deployments
        if self.phase == "loading":
            self.phase = "ready"

    def close(self) -> None:
        """Release threads and the store; the caller closes deployments."""
        self.threads.shutdown()
        self.store.close()

    @contextmanager
    def acquire(self) -> Iterator[Deployment]:
        """The active deployment, which stays open until it is released.

        Raises:
            ApiError: 503, the server is still loading, or is shutting down.
        """
        with ExitStack() as held:
            try:
                deployment = held.enter_context(self.loaded().acquire())
            except BackendError as error:
                raise ApiError(503, "shutting_down", str(error), {"retry-after": "1"}) from error
            yield deployment

    def loaded(self) -> Deployments:
        """The deployments.

        Raises:
            ApiError: 503, the server is still loading.
        """
        if self.deployments is None:
            raise ApiError(503, "not_ready", "the server is still loading its bundle", {"retry-after": "1"})
        return self.deployments

    def call(self, request: Request, operation: Operation) -> Call:
        """A new call for a request."""
        began = time.perf_counter()
        return Call(
            request=request,
            id=id_of(request),
            route=operation.documented,
            polled=operation.polled,
            began=began,
            deadline=began + self.options.deadline_ms / 1e3,
        )

    def set_deadline(self, call: Call) -> None:
        """Read the deadline in the request's X-Deadline-Ms header.

        Raises:
            ApiError: 400, it is not a number of milliseconds.
        """
        header = call.request.headers.get("x-deadline-ms")
        if header is None:
            return
        if not header.isascii() or not header.isdecimal() or len(header) > 12 or not int(header):
            message = f"X-Deadline-Ms: {header[:40]!r} must be an integer number of ms, at least 1"
            raise ApiError(400, "invalid_request", message)
        call.deadline = call.began + min(int(header), self.options.max_deadline_ms) / 1e3


Handler = Callable[[Server, Call], Coroutine[Any, Any, Response]]


def id_of(request: Request) -> str:
    """The client's id of a request, if it is printable and short, or a new one."""
    sent = request.headers.get("x-request-id", "")
    return sent if REQUEST_ID.fullmatch(sent) else f"{random.getrandbits(64):016x}"


def as_json(answer: Any, status: int = 200) -> Response:
    """An answer as JSON."""
    return Response(_ENCODER.encode(answer), status, media_type="application/json")


def refusal_of(error: Exception, call_id: str) -> ApiError:
    """The error answer for the client; an unexpected error is logged, and its answer says only that it is internal."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return invalid(error)
    log.error("request %s failed", call_id, exc_info=error)
    return ApiError(500, "internal", f"the server failed to answer; its log has more about request {call_id}")


def invalid(error: RequestError) -> ApiError:
    """The error answer, without the frames of the error: they would keep the bundle alive."""
    return ApiError(400, "too_few_items" if isinstance(error, TooFewItemsError) else "invalid_request", str(error))


@dataclass(frozen=True, kw_only=True, eq=False)
class Endpoint:
    """A handler as an ASGI application, with a request id, a deadline, and errors as JSON."""

    server: Server
    operation: Operation
    handler: Handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        call = self.server.call(Request(scope, receive, send), self.operation)
        try:
            access = self.server.access
            checked = self.operation.scope == "admin" or access.tokens is not None or access.limit is not None
            if checked and not call.from_peer:
                authorization = call.request.headers.get("authorization", "")
                token = access.token(self.operation.scope, authorization)
                call.token = token and token[0]
                access.admit(self.operation.scope, token, call.address)
            self.server.set_deadline(call)
            response = await self.handler(self.server, call)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_LEFT)
        except Exception as error:
            refusal = refusal_of(error, call.id)
            call.code = refusal.detail.code
            response = as_json(self.operation.error.of(refusal.detail), refusal.status)
            response.headers.update(refusal.headers or {})
            _drop_frames(error)
        response.headers["x-request-id"] = call.id
        if self.server.phase == "draining":
            response.headers["connection"] = "close"
        call.status, call.seconds = response.status_code, time.perf_counter() - call.began
        for observe in () if call.answered_elsewhere else self.server.observers:
            try:
                observe(call)
            except Exception:
                log.exception("request %s was answered, but %s failed", call.id, observe)
        response.headers.update(call.headers)
        await response(scope, receive, send)


def _drop_frames(error: BaseException | None) -> None:
    """Drop the frames of a traceback: they hold the request, its body, and often a future that holds the error.

    Only the garbage collector would find that cycle, and it counts objects, not bytes.
    """
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
