"""One client request from its first byte in to its last byte out: the owner of everything that happens on its account.

It runs in one task, the one that the server made for the request. A hang-up, a refusal of the guard and a shutdown all
cancel that task, each with its reason; nothing else listens. Whatever happens, exactly one `request.finished` or
`request.refused` is emitted, at the very end, in one place.

`Answer` is its way out: what the client is sent, and in which form an error still can be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import unquote_to_bytes

from proxy.edge.answer import Answer
from proxy.edge.connection import LostReason
from proxy.edge.headers import request_id, traceparent
from proxy.errors import (
    InternalError,
    Overloaded,
    ProxyError,
    RequestTooLarge,
    StreamInterrupted,
)
from proxy.observability.events import Bus, InternalFault, RequestFinished, RequestRefused
from proxy.pipeline import Pipeline
from proxy.types import Call
from proxy.validation.requests import route_of

CLIENT_LEFT: Final = 499
Reason = LostReason | Literal["shutdown"]
"""Why the task was cancelled."""
_ANSWERED_BY_GUARD: Final = {
    "too_large": (413, "request_too_large"),
    "body_timeout": (408, "request_timeout"),
    "malformed": (400, "invalid_request"),
}


@dataclass(slots=True)
class Service:
    """What all exchanges of a process share. `clock` is monotonic (seconds), `random(n)` gives n random bytes."""

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
    _over: list[Exchange] = field(default_factory=list)

    def over(self, exchange: Exchange) -> None:
        """Has `exchange` tell of itself at the end of this turn of the loop, before anybody who waits for its task goes
        on. What has ended together is told one after the other: half the price of telling it in between."""
        if not self._over:
            asyncio.get_running_loop().call_soon(self._tell)
        self._over.append(exchange)

    def _tell(self) -> None:
        over, self._over = self._over, []
        for exchange in over:
            exchange.tell()


class Exchange:
    """`scope`, `receive` and `send` are ASGI's."""

    __slots__ = (
        "_answer",
        "_bytes_in",
        "_connection",
        "_ended",
        "_path",
        "_reason",
        "_receive",
        "_request_id",
        "_scope",
        "_service",
        "_started",
        "_tags",
        "_task",
        "_timeout_ms",
        "_traceparent",
    )

    def __init__(self, service: Service, path: str, scope: Any, receive: Any, send: Any) -> None:
        self._service = service
        self._path = path
        self._scope = scope
        self._receive = receive
        self._connection = scope["extensions"]["breakwater"]
        headers = dict(scope["headers"])
        self._request_id = request_id(headers.get(b"x-request-id"), service.random)
        self._traceparent = traceparent(headers.get(b"traceparent"), service.random)
        self._timeout_ms = headers.get(b"x-breakwater-timeout-ms")
        self._tags = headers.get(b"x-breakwater-tags")
        self._started = service.clock()
        self._answer = Answer(
            send,
            self._connection,
            request_id=self._request_id,
            traceparent=self._traceparent,
            trailer=headers.get(b"x-breakwater-trailer") == b"1",
            clock=service.clock,
            silence=service.silence,
        )
        self._task: asyncio.Task[Any] | None = None
        self._reason: Reason | None = None
        self._answer.record.route = route_of(path)
        self._bytes_in = 0
        self._ended = 0.0

    # --- the task ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves the request to its end. Raises nothing but a cancellation that came from elsewhere."""
        self._task = asyncio.current_task()
        self._service.live.add(self)
        self._connection.on_lost(self._lost)
        try:
            try:
                await self._serve()
            except asyncio.CancelledError:
                if self._reason is None or self._task is None:
                    self._answer.status, self._answer.error_code = CLIENT_LEFT, "cancelled"
                    raise
                self._task.uncancel()
                await self._cancelled(self._reason)
            if self._answer.left_to_do:
                await self._finish()
        finally:
            self._connection.off_lost(self._lost)
            self._answer.close()
            self._service.live.discard(self)
            self._ended = self._ended or self._service.clock()
            self._service.over(self)

    async def _serve(self) -> None:
        try:
            if len(self._service.live) > self._service.max_in_flight:
                raise Overloaded(
                    "The gateway has as many requests in flight as it may (listen.max_in_flight).",
                    headers=[(b"retry-after", b"1")],
                )
            await self._service.pipeline.handle(self._call(), self._read, self._answer)
            if not self._answer.complete:
                await self._answer.end()
        except ProxyError as error:
            await self._answer.fail(error)
        except Exception as error:  # the boundary of our own faults: answered, logged whole, never the client's to see
            self._report("serving a request", error)
            await self._answer.fail(InternalError())

    async def _finish(self) -> None:
        self._ended = self._service.clock()  # what follows is nobody's waiting time
        for job in self._answer.left_to_do:
            try:
                await job()
            except asyncio.CancelledError:
                return  # the process ends, and whoever counts has gone before
            except Exception as error:  # the answer was given: what is wrong with the books is for the log
                self._report("keeping the books of a request", error)

    def _report(self, where: str, error: Exception) -> None:
        trace_id = self._traceparent[3:35]
        self._service.bus.emit(InternalFault(request_id=self._request_id, trace_id=trace_id, where=where, exc=error))

    def _lost(self, reason: LostReason) -> None:
        """The connection is gone, or the guard has refused the rest of the request."""
        if not self._answer.complete:
            self.interrupt(reason)

    def interrupt(self, reason: Reason) -> None:
        """Cancels the task. Only the first reason counts, and only while there is something to cancel."""
        if self._reason is None and self._task is not None and not self._answer.complete:
            self._reason = reason
            self._task.cancel()

    async def interrupt_and_wait(self) -> None:
        """For a shutdown: returns when the client has got its last byte, or cannot get it."""
        self.interrupt("shutdown")
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _cancelled(self, reason: Reason) -> None:
        if reason == "gone":
            self._answer.status, self._answer.error_code = CLIENT_LEFT, "client_disconnected"
        elif reason == "shutdown":
            await self._answer.fail(
                StreamInterrupted("The gateway is shutting down.")
                if self._answer.record.first_event
                else Overloaded("The gateway is shutting down.", headers=[(b"retry-after", b"1")])
            )
        else:
            self._answer.status, self._answer.error_code = _ANSWERED_BY_GUARD[reason]

    def _call(self) -> Call:
        scope = self._scope
        return Call(
            scope["method"],
            self._path,
            _with_prefix(scope["path"], scope["raw_path"]),
            scope["query_string"],
            scope["headers"],
            b"",
            self._request_id,
            self._traceparent,
            scope["client"][0] if scope["client"] else "",
            self._timeout_ms,
            self._tags,
        )

    async def _read(self) -> bytes:
        """The whole body. Raises RequestTooLarge."""
        body: bytes | None = self._connection.take()
        if body is None:
            body = await self._receive_all()
        self._bytes_in = len(body)
        if len(body) > self._service.max_body_bytes:
            raise RequestTooLarge(f"The body is larger than {self._service.max_body_bytes} bytes.")
        return body

    async def _receive_all(self) -> bytes:
        message = await self._receive()
        pieces = [message.get("body", b"")]
        while message.get("more_body"):
            message = await self._receive()
            pieces.append(message.get("body", b""))
        return b"".join(pieces)

    # --- the one event ----------------------------------------------------------------------------------------------

    def tell(self) -> None:
        """Emits what became of it."""
        answer = self._answer
        record = answer.record
        duration = self._ended - self._started
        trace_id = self._traceparent[3:35]
        if record.attempts == 0 and answer.status >= 400 and answer.status != CLIENT_LEFT and answer.error_code:
            self._service.bus.emit(
                RequestRefused(
                    request_id=self._request_id,
                    trace_id=trace_id,
                    route=record.route,
                    tenant=record.tenant,
                    model=record.model,
                    status=answer.status,
                    code=answer.error_code,
                    duration=duration,
                    bytes_in=self._bytes_in,
                    client=self._client(),
                )
            )
            return
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
                status=answer.status,
                stream=record.stream,
                duration=duration,
                overhead=max(duration - (upstream or 0.0) - record.elsewhere, 0.0),
                upstream_duration=upstream,
                time_to_first_token=record.first_event - self._started if streamed else None,
                usage=record.usage,
                nano_usd=record.nano_usd,
                unpriced=record.unpriced,
                counted=record.counted if record.attempts == 1 else 0,
                bytes_in=self._bytes_in,
                bytes_out=answer.bytes_out,
                attempts=record.attempts,
                error_code=answer.error_code or None,
                disconnected=self._reason == "gone",
                interrupted=answer.error_code == "stream_interrupted",
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
    if not path.startswith("/v1/"):
        return b"/v1" + raw
    first, slash, rest = raw[1:].partition(b"/")
    # With an escaped slash, the first segment is more than the prefix. Left as it is, no pass-through takes it.
    return b"/v1/" + rest if slash and unquote_to_bytes(first) == b"v1" else raw
