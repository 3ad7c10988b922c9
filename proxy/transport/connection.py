"""One HTTP/1.1 connection, and the exchange that is on it.

The life of an exchange::

    start ──▶ head ──▶ body ──▶ complete ──▶ back to the pool, if nothing speaks against it; else closed
      └─────────┴────────┴──▶ fail: timeout, loss, bad framing, cancelled, given up: closed

Everything here runs synchronously in the event loop's callbacks; the only suspension is the reader's, in `response`.
An exchange ends exactly once, in `_end`, where connection and response let go of each other: later bytes cannot reach
an old response, nor can an old response touch the next exchange.

Flow: reading stops while more than `_BUFFER` bytes wait for a reader. A large request body is written slice by slice as
the socket takes it, while the answer may already be coming in.

Trust: the parser (llhttp, strict) knows no size limits, so they are kept here. Bytes that carry no body (heads, chunk
extensions, trailers) may not exceed `max_head_bytes` in a row; a head has at most `_MAX_HEADERS` headers.
"""

from __future__ import annotations

import asyncio
import select
from typing import cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from proxy.errors import ProxyError, UpstreamBroken, UpstreamTimeout
from proxy.transport.framing import Framing, ends_exactly, framing, header_bytes
from proxy.transport.lazytimer import LazyTimer
from proxy.transport.pool import Pool
from proxy.transport.response import Http1Response
from proxy.types import Headers

_BUFFER = 256 * 1024
_INLINE = 64 * 1024
"""Bodies up to here are joined to their head: one write. Larger ones are not copied."""
_SLICE = 256 * 1024
_MAX_HEADERS = 200
_STALE_WITHIN = 1.0
"""Seconds after sending in which the death of a re-used connection is put down to the idle time before."""
_VERSION = b"HTTP/1."


class _Refused(Exception):
    """Raised inside a parser callback to stop the parser: surplus bytes, or a head that is not acceptable."""


class Connection(asyncio.Protocol):
    """A socket with its parser. One exchange at a time holds it; between exchanges the pool owns it.

    `pool` counts its slot: whoever starts an exchange has taken one, and `_end` gives it back.
    """

    __slots__ = (
        "_begun",
        "_done",
        "_dry",
        "_framing",
        "_headers",
        "_held",
        "_keep_alive",
        "_loop",
        "_max_head",
        "_parser",
        "_pieces",
        "_pool",
        "_read_paused",
        "_read_size",
        "_response",
        "_reused",
        "_sent_at",
        "_timer",
        "_transport",
        "_unread",
        "_unsent",
        "_write_paused",
        "idle_since",
    )

    _transport: asyncio.Transport
    _framing: Framing

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: Pool[Connection], max_head_bytes: int) -> None:
        self._loop = loop
        self._pool = pool
        self._max_head = max_head_bytes
        self._parser = HttpResponseParser(self)
        self._response: Http1Response | None = None
        self._headers: Headers = []
        self._pieces: list[bytes] = []
        self._timer = LazyTimer(loop, self._timed_out)
        self._sent_at = self.idle_since = 0.0
        self._unsent: memoryview | None = None
        self._reused = self._read_paused = self._write_paused = False

    # What the response and the pool call.

    def usable(self) -> bool:
        return not self._transport.is_closing()

    def silent(self) -> bool:
        """Nothing has arrived that the loop has not seen yet, an end least of all. A system call: about 1 us."""
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    def abort(self) -> None:
        self._timer.cancel()
        self._transport.abort()

    def start(self, response: Http1Response, head: bytes, body: bytes) -> None:
        """Writes a request. From here on the exchange owns the slot that its caller took."""
        self._response = response
        self._pieces = response.pieces
        self._held = b""
        self._begun = self._done = self._keep_alive = False
        self._dry = self._unread = 0
        self._sent_at = self._loop.time()
        if len(body) <= _INLINE:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._unsent = memoryview(body)
            self._pump()

    def waiter(self, deadline: float) -> asyncio.Future[None]:
        """A future that is done when there is something new for the response, its failure at `deadline` included."""
        self._timer.set(deadline)
        return self._loop.create_future()

    def drained(self) -> None:
        """The reader took all there was."""
        self._unread = 0
        if self._read_paused:
            self._read_paused = False
            self._transport.resume_reading()

    def fail(self, error: ProxyError) -> None:
        """Ends the exchange, if there is one, with `error` for whoever reads its response."""
        if self._response is not None:
            self._end(self._response, error)

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by inheritance

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:
            self.abort()  # nobody asked: what follows could be taken for the answer to the next request
            return
        if not self._begun:
            data = self._begin(data)
            if not data:
                return
        unread = self._unread
        self._read_size = len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            if not self._done:
                self.fail(UpstreamBroken("The upstream's answer is not valid HTTP/1.1.", reason="protocol"))
                return
            self._keep_alive = False  # surplus bytes after a complete response
        if self._done:
            self._complete(response, data, self._unread > unread)
            return
        if self._unread > unread:
            self._dry = 0
            if self._unread > _BUFFER and not self._read_paused:
                self._read_paused = True
                self._transport.pause_reading()
        else:
            self._dry += len(data)
            if self._dry > self._max_head:
                self.fail(UpstreamBroken("The head of the upstream's answer is too large.", reason="protocol"))
                return
        if response.status:
            response.wake()

    def eof_received(self) -> None:
        response = self._response
        if response is None:
            self.abort()
        elif response.status and self._framing == "close":
            self._end(response)
        else:
            self._lost("closed")

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.discard(self)
        self._lost("closed" if exc is None else "reset")
        self._timer.cancel()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._unsent is not None:
            self._pump()

    # What the parser calls. An exception here stops it and comes out of `feed_data` as an HttpParserError.

    def on_message_begin(self) -> None:
        if self._done:
            raise _Refused
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"transfer-encoding" and b"\t" in value:
            raise _Refused  # the parser overlooks `chunked` before a tab, and would hand out the chunks unparsed
        self._headers.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        parser = self._parser
        status = parser.get_status_code()
        if status < 200:
            if status < 100 or status == 101:
                raise _Refused
            return
        response = self._response
        assert response is not None, "the parser runs for an exchange only"
        headers = self._headers
        kind = framing(status, headers, head_only=response.head_only)
        if (
            kind is None
            or (kind == "chunked" and parser.get_http_version() != "1.1")
            or len(headers) > _MAX_HEADERS
            or (self._dry + self._read_size > self._max_head and header_bytes(headers) > self._max_head)
        ):
            raise _Refused
        self._framing = kind
        response.headers = headers
        response.status = status
        self._headers = []  # trailers go there, and are dropped
        if response.head_only:
            # The parser cannot be told that no body follows: what it takes for one goes nowhere, and as `_keep_alive`
            # stays False the connection is not used again.
            self._pieces = []
            self._done = True

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)
        self._unread += len(data)

    def on_message_complete(self) -> None:
        response = self._response
        if response is not None and response.status and not response.head_only:
            self._done = True
            self._keep_alive = self._parser.should_keep_alive()

    # The rest is private.

    def _begin(self, data: bytes) -> bytes:
        """The first bytes of an answer, once enough came to tell: the parser would take RTSP or blank lines as well."""
        data = self._held + data
        if data.startswith(_VERSION):
            self._begun = True
            return data
        if _VERSION.startswith(data):
            self._held = data
        else:
            self.fail(UpstreamBroken("The upstream does not speak HTTP/1.", reason="protocol"))
        return b""

    def _complete(self, response: Http1Response, data: bytes, has_body: bool) -> None:
        last = self._pieces[-1] if has_body and self._framing == "length" else None
        reusable = (
            self._keep_alive
            and self._unsent is None
            and ends_exactly(data, last)
            and not self._transport.is_closing()
            and self._transport.get_write_buffer_size() == 0
        )
        self._end(response, reusable=reusable)

    def _end(self, response: Http1Response, error: ProxyError | None = None, *, reusable: bool = False) -> None:
        self._response = self._unsent = None
        if reusable:
            self._reused = True
            if self._read_paused:
                self.drained()
            self._pool.put(self)
        else:
            self.abort()
            self._pool.free()
        response.finish(error)

    def _lost(self, reason: str) -> None:
        response = self._response
        if response is None:
            return
        if self._reused and not self._begun and not self._held:
            response.stale = self._loop.time() - self._sent_at < _STALE_WITHIN
        self.fail(UpstreamBroken("The upstream closed the connection before its answer was complete.", reason=reason))

    def _pump(self) -> None:
        rest = self._unsent
        while rest and not self._write_paused and not self._transport.is_closing():
            self._transport.write(rest[:_SLICE])
            rest = rest[_SLICE:]
        self._unsent = rest or None

    def _timed_out(self) -> None:
        response = self._response
        if response is not None and response.waiting():
            self.fail(UpstreamTimeout("The upstream sent nothing in time."))
