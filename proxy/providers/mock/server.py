"""Any `Handler` as an HTTP/1.1 server that is cheap per request and can fail for real.

One protocol object a connection, no tasks: what a read brings is parsed and answered in the same turn of the loop, a
paced stream is one timer. Cheap, because it is also the upstream that a proxy is measured against: an answer is
encoded once and kept with the answer, and a request costs one parse and one write.

    idle ──request──▶ waiting (delay) ──▶ sending ──▶ idle | closing
                          ╰── the client leaves: the tally is told how far it got ──╯

A reset is a real RST: SO_LINGER 0 and abort, once the kernel has taken every byte that was to go out before it. A
request that arrives while another is answered waits its turn, and reading pauses until it is served.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from typing import Final, cast

import httptools

from proxy.providers.mock.refusal import Refusal
from proxy.providers.mock.wire import Wire
from proxy.transport.answer import NEVER, Answer, End, Handler, Outcome, Serving
from proxy.types import Headers

_MAX_HEAD: Final = 64 * 1024
_MAX_HEADERS: Final = 200
_MAX_BODY: Final = 64 * 1024 * 1024
_MOST_QUEUED: Final = 64
_LAST_WORDS_S: Final = 2.0
"""How long a refused client may take to read why, before the connection is closed under what it still sends."""
_LINGER_ZERO: Final = struct.pack("ii", 1, 0)

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
    """One client. States as in the module's drawing; `_serving` is None exactly while idle."""

    __slots__ = (
        "_body", "_body_size", "_connections", "_due", "_ending", "_handler", "_head_size", "_headers", "_keep",
        "_loop", "_next", "_parser", "_paused", "_pumping", "_queue", "_reading", "_serving", "_target", "_timer",
        "_transport", "_wire",
    )  # fmt: skip

    def __init__(self, handler: Handler, connections: set[_Connection]) -> None:
        self._handler = handler
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self._target = b""
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._body_size = 0
        self._head_size = 0
        self._reading = True
        self._queue: deque[_Request] = deque()
        self._pumping = False
        self._serving: Serving | None = None
        self._wire: Wire | None = None
        self._keep = True
        self._next = 0
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self._ending: Outcome | None = None

    # ── the connection ──────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class derives from none of asyncio's
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._stop_timer()
        self._queue.clear()
        if self._serving is not None:
            self._close_tally(Outcome.CUT if self._ending is Outcome.CUT else Outcome.GONE)

    def drop(self) -> None:
        """Resets the connection."""
        sock = self._transport.get_extra_info("socket")
        if sock is not None and not self._transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        self._transport.abort()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._ending is not None:
            self._end()
        elif self._serving is None:
            self._serve_next()
        elif self._timer is None and self._wire is not None and self._next < len(self._wire.steps):
            self._tick()

    # ── the request ─────────────────────────────────────────────────────────────────────────────────────────────

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
        if self._serving is None and not self._queue and not self._paused:
            self._serve(request)
            return
        self._queue.append(request)
        if len(self._queue) == _MOST_QUEUED:  # not at the first: a paused socket does not tell that the client left
            self._transport.pause_reading()

    def _refuse(self, status: int, message: str) -> None:
        """Answers a request that could not be read, and closes; with another answer under way it just resets."""
        if not self._reading:
            return
        self._reading = False
        envelope = Refusal(status, message).envelope()
        answer = Answer(status, [(b"content-type", b"application/json")], ((0.0, envelope),), length=len(envelope))
        if self._serving is not None or self._queue:
            self.drop()
            return
        self._keep = False
        self._serving = Serving(answer)
        self._begin(Wire(answer, framed=True))

    # ── the answer ──────────────────────────────────────────────────────────────────────────────────────────────

    def _serve_next(self) -> None:
        if self._pumping:
            return
        self._pumping = True
        while self._queue and self._serving is None and not self._paused and not self._transport.is_closing():
            request = self._queue.popleft()
            if len(self._queue) == _MOST_QUEUED - 1:
                self._transport.resume_reading()
            self._serve(request)
        self._pumping = False

    def _serve(self, request: _Request) -> None:
        method, target, headers, body, keep, old = request
        serving = self._serving = self._handler.handle(method, target, headers, body)
        answer = serving.answer
        wire = answer.wire
        if old:
            wire = Wire(answer, framed=False)
            keep = False
        elif not isinstance(wire, Wire):
            wire = answer.wire = Wire(answer, framed=True)
        if method == b"HEAD":
            wire = Wire(Answer(answer.status, answer.headers, length=answer.length), framed=True)
            wire.whole = b""
        self._keep = keep
        self._next = 0
        self._wire = None
        if answer.delay == NEVER:
            self._finish()
        elif answer.delay > 0:
            self._timer = self._loop.call_later(answer.delay, self._begin, wire)
        else:
            self._begin(wire)

    def _begin(self, wire: Wire) -> None:
        """Sends the head, and with it the whole body unless that is paced."""
        serving = self._serving
        assert serving is not None
        self._timer = None
        self._wire = wire
        head = wire.head
        if serving.request_id:
            head += b"x-request-id: " + serving.request_id + b"\r\n"
        head += b"\r\n" if self._keep else b"connection: close\r\n\r\n"
        if not wire.paced:
            self._transport.write(head + wire.whole)
            self._next = len(wire.steps)
            self._finish()
            return
        self._due = self._loop.time() + wire.delays[0]
        if wire.delays[0] > 0:
            self._transport.write(head)
            self._timer = self._loop.call_at(self._due, self._tick)
        else:
            self._tick(head)

    def _tick(self, ahead: bytes = b"") -> None:
        """Sends every step that is due. Called by the timer, and when a full buffer has drained."""
        self._timer = None
        if self._paused:
            return
        wire = self._wire
        assert wire is not None
        steps, delays = wire.steps, wire.delays
        at = self._next
        end = at + 1
        now = self._loop.time()
        while end < len(steps) and self._due + delays[end] <= now:
            self._due += delays[end]
            end += 1
        last = end == len(steps)
        data = steps[at] if end == at + 1 else b"".join(steps[at:end])
        self._next = end
        self._transport.write(ahead + data + wire.tail if last else ahead + data)
        if last:
            self._finish()
            return
        self._due += delays[end]
        self._timer = self._loop.call_at(self._due, self._tick)

    def _finish(self) -> None:
        """Everything is written that will be: what now, once the kernel has it?"""
        serving = self._serving
        assert serving is not None
        end = serving.answer.end
        if end is End.COMPLETE and not self._paused:
            self._close_tally(Outcome.FINISHED)
            if not self._keep:
                self._close()
            elif self._queue:
                self._serve_next()
        elif end is not End.STALL:
            self._ending = Outcome.FINISHED if serving.answer.whole else Outcome.CUT
            if end is End.RESET:
                self._transport.set_write_buffer_limits(0)  # paused until the last byte is with the kernel
            if not self._paused:
                self._end()

    def _end(self) -> None:
        """The buffer has drained after the last byte."""
        serving, outcome = self._serving, self._ending
        assert serving is not None
        assert outcome is not None
        self._ending = None
        self._close_tally(outcome)
        if serving.answer.end is End.RESET:
            self.drop()
        elif serving.answer.end is End.CLOSE or not self._keep:
            self._close()
        else:
            self._serve_next()

    def _close(self) -> None:
        if self._reading:
            self._transport.close()
            return
        self._transport.write_eof()  # closing now would reset what the refused client has yet to read
        self._timer = self._loop.call_later(_LAST_WORDS_S, self._transport.close)

    def _close_tally(self, outcome: Outcome) -> None:
        serving = self._serving
        assert serving is not None
        self._serving = None
        serving.tally.close(self._next, outcome)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
