"""Any `Handler` as an HTTP/1.1 server that is cheap per request and can fail for real.

One protocol object a connection, no tasks: what a read brings is parsed and answered in the same turn of the loop, a
paced stream is one timer. Cheap, because it is also the upstream that a proxy is measured against: an answer is
encoded once and kept with the answer, and a request costs one parse and one write.

This half reads: bounded heads and bodies, one request after another. A request that arrives while another is answered
waits its turn; when many wait, reading pauses. `sender` is the half that answers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, cast

import httptools

from proxy.providers.mock.refusal import Refusal
from proxy.providers.mock.sender import Sender
from proxy.providers.mock.wire import Wire
from proxy.transport.answer import Answer, Handler, Serving
from proxy.types import Headers

_MAX_HEAD: Final = 64 * 1024
_MAX_HEADERS: Final = 200
_MAX_BODY: Final = 64 * 1024 * 1024
_MOST_QUEUED: Final = 64  # not one: a socket that is not read does not tell that its client left

_Request = tuple[bytes, bytes, Headers, bytes, bool, bool]
"""(method, target, headers, body, keep-alive, HTTP/1.0)."""


class MockServer:
    """Listens, and knows its connections so that it can end them."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Returns the port it listens on (`port` 0: a free one). Raises OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self._handler, self._connections), host, port, backlog=2048
        )
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._connections)

    async def aclose(self) -> None:
        """Stops listening and resets what is still under way. Idempotent."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        for connection in list(self._connections):
            connection.drop()
        await server.wait_closed()


class _Connection(asyncio.Protocol):
    """One client: reads its requests and has them answered in order."""

    __slots__ = (
        "_body", "_body_size", "_connections", "_handler", "_head_size", "_headers", "_parser", "_pumping", "_queue",
        "_reading", "_sender", "_target", "_transport",
    )  # fmt: skip

    def __init__(self, handler: Handler, connections: set[_Connection]) -> None:
        self._handler = handler
        self._connections = connections
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self._sender: Sender = None  # type: ignore[assignment]
        self._target = b""
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._body_size = 0
        self._head_size = 0
        self._reading = True
        self._queue: deque[_Request] = deque()
        self._pumping = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class derives from none of asyncio's
        self._sender = Sender(self._transport, self._serve_next)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._queue.clear()
        self._sender.lost()

    def drop(self) -> None:
        """Resets the connection."""
        self._sender.reset()

    def pause_writing(self) -> None:
        self._sender.pause()

    def resume_writing(self) -> None:
        self._sender.resume()

    def data_received(self, data: bytes) -> None:
        if not self._reading:
            return
        self._head_size += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # ours, not the client's: the loop reports it and closes the connection
        except httptools.HttpParserUpgrade:
            pass  # refused already, when its head was complete
        except httptools.HttpParserError:
            self._refuse(400, "The request is not valid HTTP.")
        else:
            if self._head_size > _MAX_HEAD and self._reading:
                self._refuse(431, "The request's head is too large.")

    def on_message_begin(self) -> None:
        self._target = b""
        self._headers = []
        self._body = []
        self._body_size = 0

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))
        if len(self._headers) > _MAX_HEADERS:
            self._refuse(431, "The request has too many headers.")

    def on_headers_complete(self) -> None:
        if self._parser.should_upgrade():
            self._refuse(400, "The mock speaks HTTP/1.1 only.")
        self._head_size = -(1 << 60)  # from here on the body's own limit holds

    def on_body(self, data: bytes) -> None:
        self._body_size += len(data)
        if self._body_size > _MAX_BODY:
            self._refuse(413, "The request's body is too large.")
        elif self._reading:
            self._body.append(data)

    def on_message_complete(self) -> None:
        self._head_size = 0
        if not self._reading or self._transport.is_closing():
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        old = self._parser.get_http_version() == "1.0"
        request = (
            self._parser.get_method(), self._target, self._headers, body, self._parser.should_keep_alive(), old,
        )  # fmt: skip
        if not self._queue and self._sender.ready:
            self._serve(request)
            return
        self._queue.append(request)
        if len(self._queue) == _MOST_QUEUED:
            self._transport.pause_reading()

    def _refuse(self, status: int, message: str) -> None:
        """Answers a request that could not be read, and closes; with another answer under way it just resets."""
        if not self._reading:
            return
        self._reading = False
        envelope = Refusal(status, message).envelope()
        answer = Answer(status, [(b"content-type", b"application/json")], ((0.0, envelope),), length=len(envelope))
        if self._sender.busy or self._queue:
            self.drop()
            return
        self._sender.send(Serving(answer), Wire(answer, framed=True), keep=False, last_words=True)

    def _serve_next(self) -> None:
        """Serves what waits, as far as it can be served now."""
        if self._pumping:
            return
        self._pumping = True
        while self._queue and self._sender.ready:
            request = self._queue.popleft()
            if len(self._queue) == _MOST_QUEUED - 1:
                self._transport.resume_reading()
            self._serve(request)
        self._pumping = False

    def _serve(self, request: _Request) -> None:
        method, target, headers, body, keep, old = request
        serving = self._handler.handle(method, target, headers, body)
        answer = serving.answer
        wire = answer.wire
        if method == b"HEAD":
            wire = Wire(answer, framed=not old, bodiless=True)
        elif old:
            wire = Wire(answer, framed=False)
        elif not isinstance(wire, Wire):
            wire = answer.wire = Wire(answer, framed=True)
        self._sender.send(serving, wire, keep=keep and not old)
