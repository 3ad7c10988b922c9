"""What the client is sent: the way out of one request.

What it has been sent already decides how an error reaches it::

    nothing yet               a status and the envelope
    200 of an event stream    one error event, the last event
    part of another body      the connection is cut: a clean end would look like success

A stream that is silent for too long says a comment. That can commit 200 before the provider has said anything; what was
to be a status then becomes the error event. Only one task writes, but for the comment, and the next write waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any, Final

import orjson

from proxy.edge.connection import Connection
from proxy.errors import ProxyError, StreamInterrupted, UpstreamUnavailable, envelope, sse_event
from proxy.money import usd_text
from proxy.types import Event, Headers, Record

_KEEP_ALIVE: Final = b": keep-alive\n\n"
_EARLY: Final = 0.002
"""Seconds by which the loop's timers, which know milliseconds only, may come before their time."""
_JSON: Final = (b"content-type", b"application/json")
_STREAM_HEADERS: Final[Headers] = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Answer:
    """Implements `Out` for the pipeline. `send` is ASGI's; `clock` and `silence` are seconds."""

    __slots__ = (
        "_beating",
        "_clock",
        "_committed",
        "_connection",
        "_held",
        "_last_write",
        "_late",
        "_left",
        "_request_id",
        "_send",
        "_silence",
        "_streaming",
        "_timer",
        "_traceparent",
        "_trailer",
        "bytes_out",
        "complete",
        "error_code",
        "left_to_do",
        "record",
        "status",
    )

    def __init__(
        self,
        send: Callable[[Any], Awaitable[None]],
        connection: Connection,
        *,
        request_id: str,
        traceparent: str,
        trailer: bool,
        clock: Callable[[], float],
        silence: float,
    ) -> None:
        """`trailer`: the client wants what was not known before as a comment in front of the terminator."""
        self.record = Record()
        self.status = 0
        """As sent; where an error event took the place of a status, that error's."""
        self.error_code = ""
        self.bytes_out = 0
        self.complete = False
        """The client has its last byte."""
        self.left_to_do: list[Callable[[], Awaitable[None]]] = []
        """Once it has."""
        self._send = send
        self._connection = connection
        self._request_id = request_id
        self._traceparent = traceparent
        self._trailer = trailer
        self._clock = clock
        self._silence = silence
        self._committed = False
        self._streaming = False
        self._left: int | None = None
        """Bytes of the body still to come, where its length was announced."""
        self._held: Headers | None = None
        """The head of a body of known length: it leaves together with the body's first bytes."""
        self._late: int | None = None
        """The status that came too late: 200 was out already."""
        self._last_write = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._beating: asyncio.Task[None] | None = None

    # --- Out --------------------------------------------------------------------------------------------------------

    def expect_stream(self) -> None:
        self._last_write = self._clock()
        self._timer = asyncio.get_running_loop().call_later(self._silence, self._tick)

    async def start(self, status: int, headers: Headers, *, stream: bool = False, length: int | None = None) -> None:
        if self._beating is not None:
            await self._beats_done()
        if self._committed:
            if not stream:
                self._late = status
            return
        if stream:
            self._streaming = True
            headers = _STREAM_HEADERS + [header for header in headers if header[0] != b"content-type"]
        head = self._commit(status, headers, length)
        if head is not None:
            await self._send(head)

    def push(self, event: Event) -> bool:
        if self._beating is not None or self._late is not None:
            return False
        data = event.data
        if self._held is not None:
            return self._respond(data)
        if event.terminator or self._left is not None or not self._connection.push(data):
            return False
        self.bytes_out += len(data)
        self._last_write = self._clock()
        return True

    async def write(self, event: Event) -> None:
        if self._beating is not None:
            await self._beats_done()
        data = event.data
        if self._late is not None:
            await self._body(self._as_error_event(data))
        elif event.terminator:
            # Not a moment later: a client may leave with the terminator in hand, and has had its whole answer then.
            await self.end(self._with_trailer(event) if self._trailer else data)
        elif self._left is None:
            if data:
                self.bytes_out += len(data)
                self._last_write = self._clock()
                if not self._connection.push(data):
                    await self._send({"type": "http.response.body", "body": data, "more_body": True})
        else:
            await self._body(data)

    def _as_error_event(self, data: bytes) -> bytes:
        """A provider's refusal that came after 200 was committed with keep-alives: the same, as the last event."""
        self.status, self._late = self._late or 0, None
        try:
            error = orjson.loads(data)["error"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            error = None
        if not error:  # no SDK would raise on it
            return sse_event(UpstreamUnavailable("The provider refused the request."))
        return b"data: " + orjson.dumps({"error": error}) + b"\n\n"

    def _with_trailer(self, event: Event) -> bytes:
        record = self.record
        facts: dict[str, Any] = {"request_id": self._request_id, "provider": record.provider}
        facts["model"] = record.upstream_model
        if record.usage is not None:
            facts["usage_total"] = record.usage.total
        if record.costs:
            facts["cost_usd"] = "unknown" if record.nano_usd is None else usd_text(record.nano_usd)
        comment = b": breakwater " + orjson.dumps(facts) + b"\n\n"
        return event.data[: -event.terminator] + comment + event.data[-event.terminator :]

    def afterwards(self, job: Callable[[], Awaitable[None]]) -> None:
        self.left_to_do.append(job)

    # --- ends -------------------------------------------------------------------------------------------------------

    async def end(self, data: bytes = b"") -> None:
        """Sends the last bytes, unless the answer has ended with its length or its terminator."""
        if self._beating is not None:
            await self._beats_done()
        if self.complete:
            return
        self._stop_beats()
        if self._held is not None:
            await self._send_held(self._held)
        self.bytes_out += len(data)
        await self._send({"type": "http.response.body", "body": data, "more_body": False})
        self.complete = True  # not before: it waits while the client's buffer is full, and the client may leave then

    async def fail(self, error: ProxyError) -> None:
        """Ends the answer with an error, in the form that is still possible."""
        if self._beating is not None:
            await self._beats_done()
        if self.complete:
            return
        self.error_code = error.code
        if not self._committed or self._held is not None:
            body = envelope(error)
            self._commit(error.status, [_JSON, *error.headers], len(body))
            await self._body(body)
        elif self._streaming:
            if not isinstance(error, StreamInterrupted):
                self.status = error.status
            await self.end(sse_event(error))
        else:
            self.complete = True
            self._connection.abort()

    def close(self) -> None:
        """Nothing more is written. Called on every way out."""
        self._stop_beats()
        if self._beating is not None:
            self._beating.cancel()

    # --- bytes ------------------------------------------------------------------------------------------------------

    def _commit(
        self, status: int, headers: Headers, length: int | None = None, *, answered: bool = True
    ) -> dict[str, Any] | None:
        """Decides on the head. ASGI's message of it, to be sent; None: it is held until the body's first bytes.

        `answered`: it is known who answers. Before that, another provider than the one being asked still may."""
        if not self._streaming:
            self._stop_beats()  # in any other body a comment would be garbage, however slowly the client takes it
        self._committed = True
        self.status = status
        self._left = length
        own = self._own_headers(answered=answered)
        if self.record.rate_limits:
            names = {name for name, _ in headers}  # an error that speaks of limits itself knows better
            own += [header for header in self.record.rate_limits if header[0] not in names]
        if length is not None:
            own.append((b"content-length", b"%d" % length))
        if length:
            self._held = own + headers
            return None
        return {"type": "http.response.start", "status": status, "headers": own + headers}

    def _own_headers(self, *, answered: bool) -> Headers:
        own: Headers = [(b"x-request-id", self._request_id.encode()), (b"traceparent", self._traceparent.encode())]
        record = self.record
        if record.attempts and answered:
            own.append((b"x-breakwater-provider", record.provider.encode()))
            if record.upstream_model:
                own.append((b"x-breakwater-model", _header_name(record.upstream_model)))
            own.append((b"x-breakwater-attempts", b"%d" % record.attempts))
        if record.upstream_request_id:
            own.append((b"x-breakwater-upstream-request-id", _header_text(record.upstream_request_id)))
        if record.usage is not None and not self._streaming:
            own.append((b"x-breakwater-usage-total", b"%d" % record.usage.total))
        if record.costs and not self._streaming:
            cost = b"unknown" if record.nano_usd is None else usd_text(record.nano_usd).encode()
            own.append((b"x-breakwater-cost-usd", cost))
        if record.context_tokens:
            own.append((b"x-breakwater-context-tokens", record.context_tokens.encode()))
        if record.context_trimmed:
            own.append((b"x-breakwater-context-trimmed", record.context_trimmed.encode()))
        if record.degraded:
            own.append((b"x-breakwater-degraded", b"store"))
        if record.warnings:
            own.append((b"x-breakwater-warnings", _header_text("; ".join(record.warnings))))
        return own

    def _respond(self, data: bytes) -> bool:
        """Sends the held head and the whole body at once. False: that is not possible, or `data` is not all of it."""
        if self._held is None or len(data) != self._left:
            return False
        if not self._connection.respond(self.status, self._held, data):
            return False
        self.bytes_out += len(data)
        self.complete = True
        return True

    async def _body(self, data: bytes) -> None:
        if self._respond(data):
            return
        self.bytes_out += len(data)
        self._last_write = self._clock()
        if self._held is not None:
            await self._send_held(self._held)
        if self._left is not None:
            self._left -= len(data)
        last = self._left == 0
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        self.complete = last

    async def _send_held(self, headers: Headers) -> None:
        self._held = None
        await self._send({"type": "http.response.start", "status": self.status, "headers": headers})

    # --- keep-alives ------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        wait = self._last_write + self._silence - self._clock()
        if wait <= _EARLY:
            wait = self._silence
            if self._beating is None or self._beating.done():  # else the client has not taken the last one yet
                self._beating = loop.create_task(self._beat())
        self._timer = loop.call_later(wait, self._tick)

    async def _beat(self) -> None:
        """Commits 200 if nothing was sent yet, and sends a comment. The pipeline's next write waits for its end."""
        if not self._committed:
            self._streaming = True
            head = self._commit(200, _STREAM_HEADERS, answered=False)
            if head is not None:
                await self._send(head)
        await self._body(_KEEP_ALIVE)

    def _stop_beats(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _beats_done(self) -> None:
        """Returns without having waited since it last looked: no further comment can have begun meanwhile."""
        while (beating := self._beating) is not None:
            if beating.done():
                self._beating = None
            else:
                await asyncio.wait([beating])


def _header_text(text: str) -> bytes:
    """Text of a provider or a client as a header value: one line of printable ASCII."""
    if len(text) <= 256 and text.isascii() and text.isprintable():
        return text.encode()
    return "".join(c if " " <= c <= "~" else "?" for c in text[:256]).encode()


_header_name: Final = lru_cache(1024)(_header_text)
"""Of texts that come again and again."""
