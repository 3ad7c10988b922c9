"""One client request from its first byte in to its last byte out: the owner of everything that happens on its account.

It runs in one task, the one that the server made for the request. A hang-up, a refusal of the guard and a shutdown all
cancel that task, each with its reason; nothing else listens. Whatever happens, exactly one `request.finished` or
`request.refused` is emitted, at the very end, in one place.

What the client has been sent decides how an error reaches it::

    nothing yet               a status and the envelope
    200 of an event stream    one error event, the last event
    part of another body      the connection is cut: a clean end would look like success
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import orjson

from proxy.edge.connection import LostReason
from proxy.edge.headers import request_id, traceparent
from proxy.errors import (
    InternalError,
    Overloaded,
    ProxyError,
    RequestTooLarge,
    StreamInterrupted,
    UpstreamUnavailable,
    envelope,
    sse_event,
)
from proxy.observability.events import Bus, InternalFault, RequestFinished, RequestRefused
from proxy.pipeline import Pipeline
from proxy.types import Call, Event, Headers, Record

CLIENT_LEFT: Final = 499
_KEEP_ALIVE: Final = b": keep-alive\n\n"
_JSON: Final = (b"content-type", b"application/json")
_STREAM_HEADERS: Final[Headers] = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
Reason = LostReason | Literal["shutdown"]
"""Why the task was cancelled."""
_ANSWERED_BY_GUARD: Final = {
    "too_large": (413, "request_too_large"),
    "body_timeout": (408, "request_timeout"),
    "malformed": (400, "invalid_request"),
}


@dataclass(slots=True)
class Service:
    """What all exchanges of a process share. `clock` is the event loop's, `random(n)` gives n random bytes."""

    pipeline: Pipeline
    bus: Bus
    max_in_flight: int
    max_body_bytes: int
    clock: Callable[[], float]
    random: Callable[[int], bytes]
    silence: float
    """Seconds. A stream that has nothing to say for this long says a comment, so that nobody on the way takes it for
    dead."""
    live: set[Exchange] = field(default_factory=set)


class Exchange:
    """Implements `Out` for the pipeline. `scope`, `receive` and `send` are ASGI's."""

    def __init__(self, service: Service, path: str, scope: Any, receive: Any, send: Any) -> None:
        self.record = Record()
        self._service = service
        self._path = path
        self._scope = scope
        self._receive = receive
        self._send = send
        self._connection = scope["extensions"]["breakwater"]
        headers = dict(scope["headers"])
        self._request_id = request_id(headers.get(b"x-request-id"), service.random)
        self._traceparent = traceparent(headers.get(b"traceparent"), service.random)
        self._trailer = headers.get(b"x-breakwater-trailer") == b"1"
        self._started = service.clock()
        self._task: asyncio.Task[Any] | None = None
        self._reason: Reason | None = None
        self._status = 0
        self._error_code = ""
        self._committed = False
        self._streaming = False
        self._complete = False
        self._left: int | None = None
        """Bytes of the body still to come, where its length was announced."""
        self._late: int | None = None
        self._bytes_in = 0
        self._bytes_out = 0
        self._last_write = self._started
        self._timer: asyncio.TimerHandle | None = None
        self._beating: asyncio.Task[None] | None = None

    # --- the task ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves the request to its end. Raises nothing but a cancellation that came from elsewhere."""
        self._task = asyncio.current_task()
        self._connection.on_lost(self._lost)
        try:
            await self._serve()
        except asyncio.CancelledError:
            if self._reason is None or self._task is None:
                self._status, self._error_code = CLIENT_LEFT, "cancelled"
                raise
            self._task.uncancel()
            await self._cancelled(self._reason)
        finally:
            self._connection.off_lost(self._lost)
            self._stop_beats()
            if self._beating is not None:
                self._beating.cancel()
            self._emit()

    async def _serve(self) -> None:
        try:
            if len(self._service.live) > self._service.max_in_flight:
                raise Overloaded(
                    "The gateway has as many requests in flight as it may (listen.max_in_flight).",
                    headers=[(b"retry-after", b"1")],
                )
            call = await self._read()
            await self._service.pipeline.handle(call, self)
            await self._end()
        except ProxyError as error:
            await self._fail(error)
        except Exception as error:  # the boundary of our own faults: answered, logged whole, never the client's to see
            self._service.bus.emit(
                InternalFault(
                    request_id=self._request_id,
                    trace_id=self._traceparent[3:35],
                    where="serving a request",
                    exc=error,
                )
            )
            await self._fail(InternalError())

    def _lost(self, reason: LostReason) -> None:
        """The connection is gone, or the guard has refused the rest of the request."""
        if not self._complete:
            self.interrupt(reason)

    def interrupt(self, reason: Reason) -> None:
        """Cancels the task. Only the first reason counts, and only while there is something to cancel."""
        if self._reason is None and self._task is not None and not self._complete:
            self._reason = reason
            self._task.cancel()

    async def interrupt_and_wait(self) -> None:
        """For a shutdown: returns when the client has got its last byte, or cannot get it."""
        self.interrupt("shutdown")
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _cancelled(self, reason: Reason) -> None:
        if reason == "gone":
            self._status, self._error_code = CLIENT_LEFT, "client_disconnected"
        elif reason == "shutdown":
            await self._fail(
                StreamInterrupted("The gateway is shutting down.")
                if self.record.first_event
                else Overloaded("The gateway is shutting down.", headers=[(b"retry-after", b"1")])
            )
        else:
            self._status, self._error_code = _ANSWERED_BY_GUARD[reason]

    async def _read(self) -> Call:
        scope = self._scope
        message = await self._receive()
        body = message.get("body", b"")
        if message.get("more_body"):
            pieces = [body]
            while message.get("more_body"):
                message = await self._receive()
                pieces.append(message.get("body", b""))
            body = b"".join(pieces)
        self._bytes_in = len(body)
        if len(body) > self._service.max_body_bytes:
            raise RequestTooLarge(f"The body is larger than {self._service.max_body_bytes} bytes.")
        return Call(
            scope["method"],
            self._path,
            _with_prefix(scope["path"], scope["raw_path"]),
            scope["query_string"],
            scope["headers"],
            body,
            self._request_id,
            self._traceparent,
            scope["client"][0] if scope["client"] else "",
        )

    # --- Out --------------------------------------------------------------------------------------------------------

    def expect_stream(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._service.silence, self._tick)

    async def start(self, status: int, headers: Headers, *, stream: bool = False, length: int | None = None) -> None:
        if self._beating is not None:
            await self._beat_done(self._beating)
        if self._committed:
            if not stream:
                self._late = status
            return
        if stream:
            self._streaming = True
            headers = _STREAM_HEADERS + [header for header in headers if header[0] != b"content-type"]
        await self._commit(status, headers, length)

    async def write(self, event: Event) -> None:
        if self._beating is not None:
            await self._beat_done(self._beating)
        data = event.data
        if self._late is not None:
            data = self._as_error_event(data)
        elif event.terminator and self._trailer:
            data = data[: -event.terminator] + self._trailer_comment() + data[-event.terminator :]
        if event.terminator:
            # Not a moment later: a client may leave with the terminator in hand, and has had its whole answer then.
            await self._end(data)
        elif data:
            await self._body(data)

    def _as_error_event(self, data: bytes) -> bytes:
        """A provider's refusal that came after 200 was committed with keep-alives: the same, as the last event."""
        self._status, self._late = self._late or 0, None
        try:
            error = orjson.loads(data)["error"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            error = None
        if not error:  # no SDK would raise on it
            return sse_event(UpstreamUnavailable("The provider refused the request."))
        return b"data: " + orjson.dumps({"error": error}) + b"\n\n"

    def _trailer_comment(self) -> bytes:
        record = self.record
        facts: dict[str, Any] = {"request_id": self._request_id, "provider": record.provider}
        facts["model"] = record.upstream_model
        if record.usage is not None:
            facts["usage_total"] = record.usage.total
        return b": breakwater " + orjson.dumps(facts) + b"\n\n"

    # --- bytes out --------------------------------------------------------------------------------------------------

    async def _commit(self, status: int, headers: Headers, length: int | None = None) -> None:
        if not self._streaming:
            self._stop_beats()  # in any other body a comment would be garbage, however slowly the client takes it
        self._committed = True
        self._status = status
        self._left = length
        own: Headers = [(b"x-request-id", self._request_id.encode()), (b"traceparent", self._traceparent.encode())]
        record = self.record
        if record.provider:
            own.append((b"x-breakwater-provider", record.provider.encode()))
            if record.upstream_model:
                own.append((b"x-breakwater-model", _header_text(record.upstream_model)))
            own.append((b"x-breakwater-attempts", b"%d" % record.attempts))
        if record.upstream_request_id:
            own.append((b"x-breakwater-upstream-request-id", _header_text(record.upstream_request_id)))
        if record.usage is not None and not self._streaming:
            own.append((b"x-breakwater-usage-total", b"%d" % record.usage.total))
        if record.warnings:
            own.append((b"x-breakwater-warnings", _header_text("; ".join(record.warnings))))
        if length is not None:
            own.append((b"content-length", b"%d" % length))
        await self._send({"type": "http.response.start", "status": status, "headers": own + headers})

    async def _body(self, data: bytes) -> None:
        self._bytes_out += len(data)
        self._last_write = self._service.clock()
        if self._left is not None:
            self._left -= len(data)
        last = self._left == 0
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        self._complete = last

    async def _end(self, data: bytes = b"") -> None:
        """Sends the last bytes, unless the answer has ended with its length or its terminator."""
        if self._beating is not None:
            await self._beat_done(self._beating)
        if self._complete:
            return
        self._stop_beats()
        self._bytes_out += len(data)
        await self._send({"type": "http.response.body", "body": data, "more_body": False})
        self._complete = True  # not before: it waits while the client's buffer is full, and the client may leave then

    async def _fail(self, error: ProxyError) -> None:
        if self._beating is not None:
            await self._beat_done(self._beating)
        if self._complete:
            return
        self._error_code = error.code
        if not self._committed:
            body = envelope(error)
            await self._commit(error.status, [_JSON, *error.headers], len(body))
            await self._body(body)
        elif self._streaming:
            if not isinstance(error, StreamInterrupted):
                self._status = error.status
            await self._end(sse_event(error))
        else:
            self._complete = True
            self._connection.abort()

    # --- keep-alives ------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = self._last_write + self._service.silence
        if due <= now:
            due = now + self._service.silence
            if self._beating is None or self._beating.done():  # else the client has not taken the last one yet
                self._beating = loop.create_task(self._beat())
        self._timer = loop.call_at(due, self._tick)

    async def _beat(self) -> None:
        """Commits 200 if nothing was sent yet, and sends a comment. The pipeline's next write waits for its end."""
        if not self._committed:
            self._streaming = True
            await self._commit(200, _STREAM_HEADERS)
        await self._body(_KEEP_ALIVE)

    def _stop_beats(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _beat_done(self, beating: asyncio.Task[None]) -> None:
        await asyncio.wait([beating])
        self._beating = None

    # --- the one event ----------------------------------------------------------------------------------------------

    def _emit(self) -> None:
        record = self.record
        ended = self._service.clock()
        trace_id = self._traceparent[3:35]
        if record.attempts == 0 and self._status >= 400 and self._status != CLIENT_LEFT and self._error_code:
            self._service.bus.emit(
                RequestRefused(
                    request_id=self._request_id,
                    trace_id=trace_id,
                    route=record.route,
                    tenant=record.tenant,
                    model=record.model,
                    status=self._status,
                    code=self._error_code,
                    duration=ended - self._started,
                    bytes_in=self._bytes_in,
                    client=self._client(),
                )
            )
            return
        duration = ended - self._started
        upstream = record.upstream_ended - record.upstream_started if record.attempts else None
        streamed = record.stream and record.first_event
        self._service.bus.emit(
            RequestFinished(
                request_id=self._request_id,
                trace_id=trace_id,
                route=record.route,
                tenant=record.tenant,
                model=record.model,
                provider=record.provider,
                upstream_model=record.upstream_model,
                upstream_request_id=record.upstream_request_id,
                status=self._status,
                stream=record.stream,
                duration=duration,
                overhead=max(duration - (upstream or 0.0), 0.0),
                upstream_duration=upstream,
                time_to_first_token=record.first_event - self._started if streamed else None,
                usage=record.usage,
                bytes_in=self._bytes_in,
                bytes_out=self._bytes_out,
                attempts=record.attempts,
                error_code=self._error_code or None,
                disconnected=self._reason == "gone",
                interrupted=self._error_code == "stream_interrupted",
                client=self._client(),
                warnings=tuple(record.warnings),
            )
        )

    def _client(self) -> str:
        client = self._scope["client"]
        return client[0] if client else ""


def _with_prefix(path: str, raw: bytes) -> bytes:
    """`raw` with the prefix as such: it may lack it, or hold it percent-encoded."""
    if raw.startswith(b"/v1/"):
        return raw
    return b"/v1/" + (raw.split(b"/", 2)[2] if path.startswith("/v1/") else raw[1:])


def _header_text(text: str) -> bytes:
    """Text of a provider or a client as a header value: one line of printable ASCII."""
    if len(text) <= 256 and text.isascii() and text.isprintable():
        return text.encode()
    return "".join(c if " " <= c <= "~" else "?" for c in text[:256]).encode()
