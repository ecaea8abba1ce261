"""Among processes that serve together a user has one that keeps what is cached of them: requests are handed to it.

Which one does not matter to an answer, for a cache entry proves itself and all read the same events. So a process that
cannot be reached is no fault: its requests are answered where they arrived.
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
from unipinrec.runtime.server.api import ForgetAnswer, Refusal
from unipinrec.runtime.server.call import Call, Handler, Server, as_json
from unipinrec.runtime.server.process.lifecycle import Place

PASSED_ON = ("authorization", "content-type", "traceparent", "tracestate", "x-trace")
PASSED_BACK = ("content-type", "retry-after", "x-trace")
HEAD_END = b"\r\n\r\n"
ASK_ALL_S = 2.0


class _Whose(msgspec.Struct):
    user: str | None = None


_whose = msgspec.json.Decoder(_Whose).decode


class PeerGoneError(Exception):
    """Another process did not answer."""


@dataclass(frozen=True, kw_only=True)
class PeerAnswer:
    """What another process answered; names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    content: bytes

    def response(self) -> Response:
        """The same for the client."""
        kept = {name: self.headers[name] for name in PASSED_BACK if name in self.headers}
        return Response(self.content, self.status, kept)


_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(kw_only=True, eq=False)
class Peers:
    """The other processes, as one of them sees them; used in the event loop's thread.

    Attributes:
        place: Of this process.
        handed_over: How many requests went to each process, by what became of them: answered or gone.
    """

    place: Place
    handed_over: Counter[tuple[int, str]] = field(default_factory=Counter)
    _idle: defaultdict[int, list[_Connection]] = field(default_factory=lambda: defaultdict(list))

    @property
    def others(self) -> Sequence[int]:
        """The indices of the other processes."""
        return [index for index in range(self.place.count) if index != self.place.index]

    def owner(self, user: str) -> int:
        """The process that keeps what is cached of a user."""
        return zlib.crc32(user.encode("utf-8", "surrogatepass")) % self.place.count

    async def ask(self, index: int, call: Call, content: bytes = b"") -> PeerAnswer:
        """Hand a request over as it came.

        Raises:
            PeerGoneError: The process cannot be reached, or went away.
        """
        connection: _Connection | None = None
        try:
            idle = self._idle[index]
            while idle and connection is None:
                connection = idle.pop()
                if connection[0].at_eof():
                    connection[1].transport.abort()
                    connection = None
            connection = connection or await asyncio.open_unix_connection(self.place.socket_of(index))
            reader, writer = connection
            writer.write(_message(call, content))
            answer = await _read(reader)
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
        """A handler whose requests are answered by the process of the user that their body names."""

        async def handed_over(server: Server, call: Call) -> Response:
            if not call.from_peer:
                with server.handed_over.admit(call.left_s, measured=False):
                    content = await call.body(server.options.limits.body_bytes)
                    user = _user_of(content)
                    index = self.place.index if user is None else self.owner(user)
                    if index != self.place.index and (answer := await self._handed_over(index, call, content)):
                        return answer
            return await handler(server, call)

        return handed_over

    async def _handed_over(self, index: int, call: Call, content: bytes) -> Response | None:
        """The answer of another process; None if there is none."""
        asked = asyncio.ensure_future(self.ask(index, call, content))
        await call.wait([asked])
        if isinstance(asked.exception(), PeerGoneError):
            self.handed_over[index, "gone"] += 1
            return None
        answer = asked.result()
        self.handed_over[index, "answered"] += 1
        call.answered_elsewhere = True
        return answer.response()

    def forgetting(self, handler: Handler) -> Handler:
        """The handler of DELETE /v1/users/{user}, which lets all processes forget."""

        async def forgotten(server: Server, call: Call) -> Response:
            response = await handler(server, call)
            if call.from_peer:
                return response
            bodies = [bytes(response.body)]
            for answer in (await self.ask_others(call)).values():
                if isinstance(answer, TimeoutError):
                    message = "one of the processes did not answer in time; forget them again"
                    raise Refusal(504, "deadline_exceeded", message)
                if isinstance(answer, PeerAnswer):
                    if answer.status != 200:
                        return answer.response()
                    bodies.append(answer.content)
            said = [msgspec.json.decode(body, type=ForgetAnswer) for body in bodies]
            events, cached = sum(one.events for one in said), any(one.cached for one in said)
            return as_json(ForgetAnswer(user=said[0].user, events=events, cached=cached))

        return forgotten

    def anywhere(self, handler: Handler) -> Handler:
        """A handler for what only one of the processes may know."""

        async def found_anywhere(server: Server, call: Call) -> Response:
            if not call.from_peer:
                for answer in (await self.ask_others(call)).values():
                    if isinstance(answer, PeerAnswer) and answer.status == 200:
                        return answer.response()
            return await handler(server, call)

        return found_anywhere

    async def ask_others(self, call: Call) -> dict[int, PeerAnswer | PeerGoneError | TimeoutError]:
        """The same request to all other processes."""

        async def ask(index: int) -> PeerAnswer | PeerGoneError | TimeoutError:
            try:
                async with asyncio.timeout(min(ASK_ALL_S, call.left_s)):
                    return await self.ask(index, call)
            except (PeerGoneError, TimeoutError) as error:
                return error

        return dict(zip(self.others, await asyncio.gather(*map(ask, self.others)), strict=True))


def _user_of(content: bytes) -> str | None:
    """The user of a request; None of a list, and of what is wrong with its body."""
    try:
        return _whose(content).user
    except MALFORMED:
        return None


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
