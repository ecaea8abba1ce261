"""Of several processes one caches a user's keys and values: the others hand it the requests of that user.

Any process gives the same answer, for a cache entry is checked and all read the same events. So if a process cannot be
reached, its requests are answered where they arrived.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from starlette.responses import Response

from unipinrec.errors import MALFORMED
from unipinrec.runtime.server.bodies import ApiError, ForgetAnswer
from unipinrec.runtime.server.call import Call, Handler, Server, as_json
from unipinrec.runtime.server.process.lifecycle import Worker

PASSED_ON = ("authorization", "content-type", "traceparent", "tracestate", "x-trace")
PASSED_BACK = ("content-type", "retry-after", "x-trace")
HEAD_END = b"\r\n\r\n"
ASK_ALL_S = 2.0


class _Body(msgspec.Struct):
    user: str | int | None = None


_decode = msgspec.json.Decoder(_Body).decode


class PeerGoneError(Exception):
    """Another process did not answer."""


@dataclass(frozen=True, kw_only=True)
class PeerAnswer:
    """The answer of another process; header names are in lower case."""

    status: int
    headers: dict[str, str]
    content: bytes

    def response(self) -> Response:
        """The same answer for the client."""
        kept = {name: self.headers[name] for name in PASSED_BACK if name in self.headers}
        return Response(self.content, self.status, kept)


_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(kw_only=True, eq=False)
class Peers:
    """The other processes of a worker; used in the event loop's thread.

    Attributes:
        worker: This process.
        handed_over: Requests handed to each process, by result: answered or gone.
    """

    worker: Worker
    handed_over: Counter[tuple[int, str]] = field(default_factory=Counter)
    _idle: defaultdict[int, list[_Connection]] = field(default_factory=lambda: defaultdict(list))

    @property
    def others(self) -> Sequence[int]:
        """The indices of the other processes."""
        return [index for index in range(self.worker.count) if index != self.worker.index]

    def owner(self, user: str) -> int:
        """The process that caches a user's keys and values."""
        return zlib.crc32(user.encode("utf-8", "surrogatepass")) % self.worker.count

    async def ask(self, index: int, call: Call, content: bytes = b"") -> PeerAnswer:
        """Hand a request over as it came.

        Raises:
            PeerGoneError: The process cannot be reached, or ended.
        """
        connection: _Connection | None = None
        try:
            idle = self._idle[index]
            while idle and connection is None:
                connection = idle.pop()
                if connection[0].at_eof():
                    connection[1].transport.abort()
                    connection = None
            connection = connection or await asyncio.open_unix_connection(self.worker.socket_of(index))
            connection[1].write(_message(call, content))
            answer = await _read(connection[0])
            if answer.headers.get("connection") != "close":
                idle.append(connection)
                connection = None
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise PeerGoneError(f"process {index}: {error!r}") from error
        finally:
            if connection is not None:
                connection[1].transport.abort()
        return answer

    def at_owner(self, handler: Handler) -> Handler:
        """A handler that hands each request to the process of its user; it answers a request itself if that is gone."""

        async def handed_over(server: Server, call: Call) -> Response:
            if not call.from_peer:
                with server.handed_over.admit(call.left_s, measured=False):
                    content = await call.body(server.options.limits.body_bytes)
                    user = _user_of(content)
                    index = self.worker.index if user is None else self.owner(user)
                    if index != self.worker.index:
                        request = asyncio.ensure_future(self.ask(index, call, content))
                        await call.wait([request])
                        if not isinstance(request.exception(), PeerGoneError):
                            self.handed_over[index, "answered"] += 1
                            call.answered_elsewhere = True
                            return request.result().response()
                        self.handed_over[index, "gone"] += 1
            return await handler(server, call)

        return handed_over

    def forgetting(self, handler: Handler) -> Handler:
        """A handler of DELETE /v1/users/{user} for all processes."""

        async def forgotten(server: Server, call: Call) -> Response:
            response = await handler(server, call)
            if call.from_peer:
                return response
            bodies = [bytes(response.body)]
            for reply in (await self.ask_others(call)).values():
                if isinstance(reply, TimeoutError):
                    message = "one of the processes did not answer in time; forget the user again"
                    raise ApiError(504, "deadline_exceeded", message)
                if isinstance(reply, PeerAnswer):
                    if reply.status != 200:
                        return reply.response()
                    bodies.append(reply.content)
            answers = [msgspec.json.decode(body, type=ForgetAnswer) for body in bodies]
            events, cached = sum(answer.events for answer in answers), any(answer.cached for answer in answers)
            return as_json(ForgetAnswer(user=answers[0].user, events=events, cached=cached))

        return forgotten

    def anywhere(self, handler: Handler) -> Handler:
        """A handler for something that only one of the processes may have."""

        async def found_anywhere(server: Server, call: Call) -> Response:
            if not call.from_peer:
                for answer in (await self.ask_others(call)).values():
                    if isinstance(answer, PeerAnswer) and answer.status == 200:
                        return answer.response()
            return await handler(server, call)

        return found_anywhere

    async def ask_others(self, call: Call) -> dict[int, PeerAnswer | PeerGoneError | TimeoutError]:
        """Send a request to all other processes."""

        async def ask(index: int) -> PeerAnswer | PeerGoneError | TimeoutError:
            try:
                async with asyncio.timeout(min(ASK_ALL_S, call.left_s)):
                    return await self.ask(index, call)
            except (PeerGoneError, TimeoutError) as error:
                return error

        return dict(zip(self.others, await asyncio.gather(*map(ask, self.others)), strict=True))


def _user_of(content: bytes) -> str | None:
    """The user of a request; None for a list or a malformed body."""
    try:
        user = _decode(content).user
    except MALFORMED:
        return None
    return None if user is None else str(user)


def _message(call: Call, content: bytes) -> bytes:
    request = call.request
    left_ms = max(1, round(call.left_s * 1e3))
    target = request.scope["raw_path"].decode("latin-1")
    lines = [
        f"{request.method} {target} HTTP/1.1",
        "host: peer",
        f"content-length: {len(content)}",
        f"x-request-id: {call.id}",
        f"x-deadline-ms: {left_ms}",
        *(f"{name}: {request.headers[name]}" for name in PASSED_ON if name in request.headers),
    ]
    return "\r\n".join(lines).encode("latin-1") + HEAD_END + content


async def _read(reader: asyncio.StreamReader) -> PeerAnswer:
    head, *lines = (await reader.readuntil(HEAD_END))[: -len(HEAD_END)].decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    content = await reader.readexactly(int(headers.get("content-length", "0")))
    return PeerAnswer(status=int(head.split(" ", 2)[1]), headers=headers, content=content)
