"""How a response is written: uvicorn's, with the head and the first bytes of the body in one write.

An application sends the head and the body as two messages, and uvicorn writes each as it comes: two system calls and,
to a client that reads quickly, two packets. Here the head waits for the first body message, which every response has.
It also costs less: one look over the rendered head finds an injected line, where uvicorn searches each name and value.
"""

from __future__ import annotations

from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from proxy.errors import InternalError, envelope
from proxy.types import Headers

_FRAMING: Final = frozenset((b"content-length", b"transfer-encoding", b"connection"))
_SIZE_LINES: Final = [b"%x\r\n" % size for size in range(2048)]
"""The first lines of the chunks that streams are made of."""
_JOINED_BYTES: Final = 65536
"""A larger body is not copied to stand behind its head: two writes then, as the lesser cost."""


def _chunk(body: bytes) -> bytes:
    size = len(body)
    return (_SIZE_LINES[size] if size < len(_SIZE_LINES) else b"%x\r\n" % size) + body + b"\r\n"


class Cycle(RequestResponseCycle):
    """One request and its response."""

    _head = b""
    """Rendered, and not written yet."""

    async def send(self, message: Any) -> None:
        """ASGI's. Raises RuntimeError for messages out of order, and for a body that belies its announced length."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if not self.response_started:
            if message["type"] != "http.response.start":
                raise RuntimeError("The response must start with its head.")
            self._head = self._render(message["status"], list(message["headers"]))
            self.response_started = True
            self.waiting_for_100_continue = False
        elif self.response_complete or message["type"] != "http.response.body":
            raise RuntimeError("The response has its head, or is complete, already.")
        else:
            self._write(message.get("body", b""), last=not message.get("more_body", False))

    def take(self) -> bytes | None:
        """`receive`, where the whole body is there: the body. None: it is not, or nobody waits for an answer."""
        if self.more_body or self.waiting_for_100_continue or self.disconnected or self.response_complete:
            return None
        body = bytes(self.body)
        self.body = bytearray()
        return body

    def push(self, data: bytes) -> bool:
        """`send` for one more chunk of a body that has begun, where nothing stands in the way."""
        if self._head or not self.chunked_encoding or self.flow.write_paused or self.disconnected:
            return False  # (What has no body, as the answer to HEAD, is not in chunks.)
        if self.response_complete or not data:
            return False
        size = len(data)
        line = _SIZE_LINES[size] if size < len(_SIZE_LINES) else b"%x\r\n" % size
        self.transport.write(line + data + b"\r\n")
        return True

    def respond(self, status: int, headers: Headers, body: bytes) -> bool:
        """`send` for head and whole body together, where nothing stands in the way."""
        if self.response_started or self.flow.write_paused or self.disconnected:
            return False
        self._head = self._render(status, headers)
        self.response_started = True
        self.waiting_for_100_continue = False
        self._write(body, last=True)
        return True

    async def send_500_response(self) -> None:
        """Called by uvicorn for an application that broke before its response began."""
        body = envelope(InternalError())
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self.send(
            {"type": "http.response.start", "status": 500, "headers": [*headers, (b"connection", b"close")]}
        )
        await self.send({"type": "http.response.body", "body": body})

    def _render(self, status: int, headers: Headers) -> bytes:
        parts = [STATUS_LINE[status]]
        for name, value in self.default_headers:
            parts += (name, b": ", value, b"\r\n")
        closing = False
        lines = len(self.default_headers) + len(headers)
        for name, value in headers:
            if name in _FRAMING:
                if name == b"content-length":
                    self.expected_content_length = int(value)
                    self.chunked_encoding = False
                elif name == b"connection":
                    closing = value.lower() == b"close"
                else:
                    raise RuntimeError("The framing is the server's business.")
            parts += (name, b": ", value, b"\r\n")
        if closing:
            self.keep_alive = False
        elif not self.keep_alive:
            parts.append(b"connection: close\r\n")
            lines += 1
        bodiless = self.scope["method"] == "HEAD" or status in (204, 304)
        if self.chunked_encoding is None and not bodiless and self.scope["http_version"] != "1.0":
            self.chunked_encoding = True
            parts.append(b"transfer-encoding: chunked\r\n")
            lines += 1
        parts.append(b"\r\n")
        head = b"".join(parts)
        ends = lines + 2  # with the status line and the empty one
        if head.count(b"\n") != ends or head.count(b"\r") != ends or b"\0" in head:
            raise RuntimeError("A header holds a line end or a NUL.")
        return head

    def _write(self, body: bytes, *, last: bool) -> None:
        head, self._head = self._head, b""
        if self.scope["method"] == "HEAD":
            self.expected_content_length = 0
            framed = head
        elif self.chunked_encoding:
            framed = head + _chunk(body) if body else head
            if last:
                framed += b"0\r\n\r\n"
        else:
            if self.chunked_encoding is False:
                self.expected_content_length -= len(body)
                if self.expected_content_length < 0:
                    raise RuntimeError("The body is longer than its announced length.")
            if head and len(body) > _JOINED_BYTES:
                self.transport.write(head)
                head = b""
            framed = head + body if head else body
        if framed:
            self.transport.write(framed)
        if last:
            self._finish()

    def _finish(self) -> None:
        if self.expected_content_length:
            raise RuntimeError("The body is shorter than its announced length.")
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
