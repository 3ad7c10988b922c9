"""The HTTP/1.1 protocol of the listener: uvicorn's, with bounds on everything a client can make us hold or wait for.

A connection is in one of four phases::

            first byte            head complete          body complete
    IDLE ───────────────▶ HEAD ─────────────────▶ BODY ─────────────────▶ IDLE
                            │                       │
                            └──── refusal ──────────┴──▶ DEAF: what still comes is read and thrown away

Two rules make the rest follow:

- **Reading does not stop while a request runs**, but for a body that its own task has not taken yet: only from a
  socket that is read do we learn that the client has left. What may queue up meanwhile is bounded (`PIPELINED`
  requests, each with a body of at most `HIGH_WATER_LIMIT`); beyond that the connection answers what it has, and closes.
- **Answers keep their order.** A refusal waits for the answers to earlier requests of its connection. After it we
  read on for `LINGER_SECONDS`: to close on unread bytes sends a reset, which can destroy the answer on its way.

A request that arrives in one piece touches no clock: the connection's one timer is set only when a read ends within
a message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from proxy.edge.connection import Connection, LostReason
from proxy.edge.head import WATCHED, ChunkAudit, Limits, head_size, judge
from proxy.edge.refusals import (
    BODY_TIMEOUT,
    BODY_TOO_LARGE,
    CHUNK_FRAMING,
    HEAD_TIMEOUT,
    HEAD_TOO_LARGE,
    MALFORMED,
    TOO_MANY_HEADERS,
    render,
)
from proxy.edge.watch import NEVER, Watch
from proxy.errors import ProxyError
from proxy.types import Headers

OnRefused = Callable[[int, str], None]
"""Called with (status, code) for each request that was refused before the application heard of it."""

PIPELINED: Final = 32
"""Requests that may wait behind the running one."""
LINGER_SECONDS: Final = 2.0

IDLE, HEAD, BODY, DEAF = range(4)


class _Stop(Exception):
    """Leaves the parser from within one of its callbacks."""


class GuardedProtocol(HttpToolsProtocol):
    """One connection. `_Stop` never leaves it: the parser turns it into an error of its own."""

    __slots__ = (
        "_audit",
        "_begun",
        "_body_bytes",
        "_connection",
        "_entered",
        "_extensions",
        "_fault",
        "_head_more",
        "_limits",
        "_named",
        "_pending",
        "_phase",
        "_read",
        "_refused",
        "_running",
        "_watch",
        "_wrapped",
    )

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Limits,
        refused: OnRefused,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._refused = refused
        self._wrapped: Callable[[Any, Any, Any], Awaitable[None]] = self.app
        self.app = self._enter
        self._watch = Watch(self.loop, self._due)
        self._phase = IDLE
        self._running: RequestResponseCycle | None = None
        self._entered = False  # the application has heard of it
        self._fault: ProxyError | None = None
        self._pending: ProxyError | None = None  # to be sent after the answers that are due before it
        self._named: Headers = []
        self._audit: ChunkAudit | None = None
        self._read = 0  # bytes of the read in hand
        self._begun = 0  # messages that began in it
        self._head_more = 0  # bytes of the later reads of a head that did not come in one
        self._body_bytes = 0

    # --- the transport's side ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connection = Connection(transport)
        self._extensions = {"breakwater": self._connection}
        self._watch.within(self._limits.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._phase = DEAF
        self._watch.close()
        self.pipeline.clear()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        # uvicorn tells its latest cycle only; with pipelining the running one is another.
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
            self._connection.lose("gone")

    def data_received(self, data: bytes) -> None:
        phase = self._phase
        if phase == DEAF:
            return
        self._read = len(data)
        self._begun = 0
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            if self._phase != DEAF:
                self._refuse(self._fault or MALFORMED)
            return
        if self._audit is not None:
            self._check_chunks(phase)
        if self._phase != IDLE:
            self._await_rest(phase)

    def _await_rest(self, phase: int) -> None:
        """The read ended within a message: bounds the head so far, and the time for what is missing."""
        if self._phase == HEAD:
            if phase == HEAD and self._begun == 0:
                self._head_more += self._read
            if self._head_more > self._limits.head_bytes:
                self._refuse_head(HEAD_TOO_LARGE)
            elif len(self.headers) > self._limits.header_count:
                self._refuse_head(TOO_MANY_HEADERS)
            elif self._watch.deadline == NEVER:
                self._watch.within(self._limits.head_seconds)
        elif self._phase == BODY and self._watch.deadline == NEVER:
            self._watch.within(self._limits.body_seconds)

    def _check_chunks(self, phase: int) -> None:
        """A read with bytes of several messages is let by, bounded as it is: only the parser knows where they meet."""
        assert self._audit is not None
        mixed = self._begun > (1 if phase == IDLE else 0)
        if not mixed and self._audit.exceeded(self._read, self._body_bytes):
            self._refuse_body(CHUNK_FRAMING, "malformed")
        if self._phase != BODY:
            self._audit = None

    def _due(self) -> None:
        if self._phase == HEAD:
            self._refuse_head(HEAD_TIMEOUT)
        elif self._phase == BODY and self.flow.read_paused:
            self._watch.within(self._limits.body_seconds)
        elif self._phase == BODY:
            self._refuse_body(BODY_TIMEOUT, "body_timeout")
        elif self._phase == IDLE:
            self.transport.close()  # nothing was asked, nothing is answered
        else:
            self.transport.abort()

    # --- the parser's side ------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= PIPELINED:
            self._stop_after(self.cycle)
        super().on_message_begin()
        self.scope["extensions"] = self._extensions  # type: ignore[typeddict-item]
        self._phase = HEAD
        self._begun += 1
        self._head_more = 0
        self._named = []
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase == BODY:
            return  # a trailer: nobody here reads one, and it must never pass for a header
        name = name.lower()
        if name in WATCHED:
            self._named.append((name, value))
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        limits = self._limits
        if len(self.headers) > limits.header_count:
            self._stop(TOO_MANY_HEADERS)
        in_one_read = self._head_more == 0 and self._read <= limits.head_bytes
        if not in_one_read and head_size(self.url, self.headers) > limits.head_bytes:
            self._stop(HEAD_TOO_LARGE)
        fault = judge(self.url, self._named, self.parser.get_http_version(), limits)
        if fault is not None:
            self._stop(fault)
        if self.parser.should_upgrade():
            self._stop(MALFORMED)  # CONNECT: what follows it is not HTTP
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        super().on_headers_complete()
        if self.pipeline:
            self.flow.resume_reading()
        self._phase = BODY
        self._watch.deadline = NEVER
        self._body_bytes = 0
        self._audit = None
        for name, _ in self._named:
            if name == b"transfer-encoding":
                self._audit = ChunkAudit(head_size(self.url, self.headers))

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.body_bytes:
            self._stop(BODY_TOO_LARGE)
        if self._body_bytes > HIGH_WATER_LIMIT and self.cycle is not self._running:
            # To let it wait would mean to stop reading, and then to miss that the client has left.
            self.pipeline.popleft()
            self._stop_after(self.pipeline[0][0] if self.pipeline else self._running)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        # A large body may have paused reading, and its task need not come to take more.
        self.flow.resume_reading()
        self._phase = IDLE
        self._watch.deadline = NEVER

    def _stop(self, fault: ProxyError) -> NoReturn:
        self._fault = fault
        raise _Stop

    def _stop_after(self, last: RequestResponseCycle | None) -> NoReturn:
        """Serves no request after `last`, whose answer closes the connection. Never harmful: clients ask again."""
        assert last is not None
        self._turn_deaf()
        self.cycle = last
        last.keep_alive = False
        raise _Stop

    # --- the application's side -------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        self._entered = False
        self._connection.next_request()
        super()._start_asgi_task(cycle, app)

    def _enter(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        """Stands in front of the application: between the making of a task and its start a request can be lost."""
        assert self._running is not None
        if self._running.disconnected:
            return _nothing()
        self._entered = True
        return self._wrapped(scope, receive, send)

    def on_response_complete(self) -> None:
        if self._pending is None or self.pipeline or self.transport.is_closing():
            super().on_response_complete()
        else:
            self.server_state.total_requests += 1
            self._answer(self._pending)

    # --- refusals ---------------------------------------------------------------------------------------------------

    def _refuse(self, error: ProxyError) -> None:
        if self._phase == BODY:
            self._refuse_body(error, "too_large" if error is BODY_TOO_LARGE else "malformed")
        else:
            self._refuse_head(error)

    def _refuse_head(self, error: ProxyError) -> None:
        """The request at fault is not a cycle yet."""
        self._turn_deaf()
        self._refused(error.status, error.code)
        if self._running is None or self._running.response_complete:
            self._answer(error)
        else:
            self._pending = error

    def _refuse_body(self, error: ProxyError, reason: LostReason) -> None:
        """The request at fault is the latest cycle: running, answered already, or waiting for its turn."""
        cycle = self.cycle
        self._turn_deaf()
        if cycle is not self._running:
            self.pipeline.popleft()
            self._refused(error.status, error.code)
            self._pending = error
            return
        if cycle.response_complete:
            self._linger()
            return
        cycle.disconnected = True
        cycle.message_event.set()
        self.flow.resume_writing()
        if self._entered:
            self._connection.lose(reason)
        else:
            self._refused(error.status, error.code)
        if cycle.response_started:
            self._linger()
        else:
            self._answer(error)

    def _answer(self, error: ProxyError) -> None:
        self.transport.write(render(error, self.server_state.default_headers, self.headers or []))
        self._linger()

    def _turn_deaf(self) -> None:
        self._phase = DEAF
        self._watch.deadline = NEVER
        self.flow.resume_reading()

    def _linger(self) -> None:
        """Says that nothing more comes, and reads on for a while."""
        self._watch.within(LINGER_SECONDS)
        if self.transport.can_write_eof():
            self.transport.write_eof()


async def _nothing() -> None:
    """The application of a request that is already lost."""
