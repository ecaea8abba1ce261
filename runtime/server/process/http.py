"""uvicorn's HTTP/1.1, with limits on connections, and on the size and time of request line and headers."""

from __future__ import annotations

import asyncio
import logging

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
HEAD_TIMEOUT_S = 20.0
LOG_EVERY_S = 10.0
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-type: application/json\r\ncontent-length: 80\r\n\r\n"
    b'{"error":{"code":"overloaded","message":"too many connections to this server"}}\n'
)
log = logging.getLogger(__name__)


class BoundedHttp(HttpToolsProtocol):
    """Closes connections whose request line and headers are too large or too late."""

    _refused_at = -LOG_EVERY_S
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """A client has connected; its first request is due."""
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency:
            self._refuse()
        else:
            self._expect_head()

    def _refuse(self) -> None:
        now = self.loop.time()
        if now > BoundedHttp._refused_at + LOG_EVERY_S:
            BoundedHttp._refused_at = now
            limit = self.limit_concurrency
            log.error("more than %d connections are open; raise the limit of open files (ulimit -n)", limit)
        self.transport.write(FULL)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left."""
        self._head_complete()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the bytes, unless they are too many."""
        super().data_received(data)
        if self._head_timer is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("The request line and headers are too large.")

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        if self._head_timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """All headers have arrived."""
        self._head_complete()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _head_complete(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
