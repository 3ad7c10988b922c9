"""The HTTP/1.1 protocol of the listener: uvicorn's connection and response, with our own reader in front of them.

Three rules make the rest follow:

- **Reading does not stop while a request runs**, but for a body that its own task has not taken yet: only from a
  socket that is read do we learn that the client has left. What may queue up meanwhile is bounded (`PIPELINED`
  requests, each with a body of at most `HIGH_WATER_LIMIT`); beyond that the connection answers what it has, and closes.
- **Answers keep their order.** A refusal waits for the answers to earlier requests of its connection. After the last
  answer we are *deaf*: we read on for `LINGER_SECONDS` and throw away what comes, for to close on unread bytes sends
  a reset, which can destroy the answer on its way.
- **A request that comes in one piece sets no timer.** The one for reading is set when a read ends within a message; the
  one for a connection that rests is left where it is, and looks at the deadline when it fires.

Of a request that is refused before its task has begun, the application hears nothing, and `refused` is called; a
running one is told through its `Connection`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from fcntl import ioctl
from termios import TIOCOUTQ
from typing import Any, Final, NoReturn

from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from proxy.edge.connection import Connection, LostReason
from proxy.edge.cycle import Cycle
from proxy.edge.head import Limits, Target
from proxy.edge.reader import BODY, HEAD, IDLE, Reader, Stop
from proxy.edge.refusals import BODY_TIMEOUT, BODY_TOO_LARGE, CHUNK_FRAMING, HEAD_TIMEOUT, render
from proxy.edge.watch import NEVER, Watch
from proxy.errors import ProxyError

OnRefused = Callable[[int, str], None]
"""Called with (status, code) for each request that was refused before the application heard of it."""

PIPELINED: Final = 32
"""Requests that may wait behind the running one."""
LINGER_SECONDS: Final = 2.0

_ASGI: Final[Any] = {"version": "3.0", "spec_version": "2.3"}


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    __slots__ = (
        "_connection",
        "_deaf",
        "_entered",
        "_extensions",
        "_limits",
        "_pending",
        "_reader",
        "_refused",
        "_rest",
        "_running",
        "_stall",
        "_unsent",
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
        self.parser = None  # type: ignore[assignment]  # the reader has one
        self._reader = Reader(self, limits)
        self._watch = Watch(self.loop, self._due)
        self._rest = Watch(self.loop, self.timeout_keep_alive_handler)
        self._stall: Watch | None = None
        self._unsent = 0  # bytes of the answer that waited for the client when it was last looked at
        self._limits = limits
        self._refused = refused
        self._wrapped: Callable[[Any, Any, Any], Awaitable[None]] = self.app
        self.app = self._enter
        self._running: RequestResponseCycle | None = None
        self._entered = False  # the application has heard of it
        self._deaf = False
        self._pending: ProxyError | None = None  # to be sent after the answers that are due before it

    # --- the transport's side ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connection = Connection(transport)
        self._extensions: Any = {"breakwater": self._connection}
        self._watch.within(self._limits.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deaf = True
        self._watch.close()
        self._rest.close()
        if self._stall is not None:
            self._stall.close()
        self._reader.close()
        self.pipeline.clear()
        super().connection_lost(exc)
        # Both hold on to this object: nothing shall be left for the collector.
        self.app = self._wrapped
        self.cycle = None  # type: ignore[assignment]
        # uvicorn tells its latest cycle only; with pipelining the running one is another.
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
            self._connection.lose("gone")

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        reader = self._reader
        fault = reader.feed(data)
        if fault is not None:
            if not self._deaf:
                self._refuse(fault)
        elif reader.phase != IDLE and self._watch.deadline == NEVER:
            if reader.phase == HEAD:
                self._rest.deadline = NEVER
                self._watch.within(self._limits.head_seconds)
            else:
                self._watch.within(self._limits.body_seconds)

    def _due(self) -> None:
        phase = self._reader.phase
        if self._deaf:
            self.transport.abort()
        elif phase == HEAD:
            self._refuse_head(HEAD_TIMEOUT)
        elif phase == BODY and self.flow.read_paused:
            self._watch.within(self._limits.body_seconds)
        elif phase == BODY:
            self._refuse_body(BODY_TIMEOUT, "body_timeout")
        else:
            self.transport.close()  # nothing was asked, nothing is answered

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self._waiting_bytes()
        if self._stall is None:
            self._stall = Watch(self.loop, self._stalled)
        self._stall.within(self._limits.write_seconds)

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.deadline = NEVER
        super().resume_writing()

    def _stalled(self) -> None:
        """A client that takes its answer slowly is served; one that takes none of it holds a provider for nothing."""
        assert self._stall is not None
        unsent = self._waiting_bytes()
        if unsent < self._unsent:
            self._unsent = unsent
            self._stall.within(self._limits.write_seconds)
        else:
            self.transport.abort()

    def _waiting_bytes(self) -> int:
        """What the client has not acknowledged: ours and the kernel's, which is megabytes and moves in large steps."""
        queued = ioctl(self.transport.get_extra_info("socket").fileno(), TIOCOUTQ, b"\0\0\0\0")
        return self.transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    # --- the reader's side ------------------------------------------------------------------------------------------

    def begin(self, method: str, version: str, target: Target, keep_alive: bool) -> None:
        if len(self.pipeline) >= PIPELINED:
            self._stop_after(self.cycle)
        self._watch.deadline = NEVER
        self._rest.deadline = NEVER
        reader = self._reader
        self.scope = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "method": method,
            "scheme": self.scheme or "http",
            "path": target.path,
            "raw_path": target.raw,
            "query_string": target.query,
            "root_path": "",
            "headers": reader.headers,
            "client": self.client,
            "server": self.server,
            "extensions": self._extensions,
        }
        cycle = self.cycle = Cycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=reader.expects_continue,
            keep_alive=keep_alive,
            on_response=self.on_response_complete,
        )
        if self._running is None or self._running.response_complete:
            self._start_asgi_task(cycle, self.app)
        else:
            self.pipeline.appendleft((cycle, self.app))

    def body(self, data: bytes) -> None:
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += data
        cycle.message_event.set()
        if len(cycle.body) > HIGH_WATER_LIMIT:
            if cycle is not self._running:
                # To let it wait would mean to stop reading, and then to miss that the client has left.
                self.pipeline.popleft()
                self._stop_after(self.pipeline[0][0] if self.pipeline else self._running)
            self.flow.pause_reading()

    def complete(self) -> None:
        self._watch.deadline = NEVER
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()
        # A large body may have paused reading, and its task need not come to take more.
        if self.flow.read_paused:
            self.flow.resume_reading()

    def _stop_after(self, last: RequestResponseCycle | None) -> NoReturn:
        """Serves no request after `last`, whose answer closes the connection. Never harmful: clients ask again."""
        assert last is not None
        self._turn_deaf()
        last.keep_alive = False
        raise Stop

    # --- the application's side -------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        self._entered = False
        self._connection.next_request(cycle)
        super()._start_asgi_task(cycle, app)

    def _enter(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        """Stands in front of the application: between the making of a task and its start a request can be lost."""
        assert self._running is not None
        if self._running.disconnected:
            return _nothing()
        self._entered = True
        return self._wrapped(scope, receive, send)

    def on_response_complete(self) -> None:
        """uvicorn's, but that it makes no timer for each time that the connection rests."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:
            self.flow.resume_reading()
            self._start_asgi_task(*self.pipeline.pop())
        elif self._pending is not None:
            self._answer(self._pending)
        else:
            self.flow.resume_reading()
            self._rest.within(self.timeout_keep_alive)

    # --- refusals ---------------------------------------------------------------------------------------------------

    def _refuse(self, error: ProxyError) -> None:
        if self._reader.phase == BODY or error is CHUNK_FRAMING:
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
        if self._entered:
            self._connection.lose(reason)
        else:
            self._refused(error.status, error.code)
        if cycle.response_started:
            self._linger()
        else:
            self._answer(error)

    def _answer(self, error: ProxyError) -> None:
        self.transport.write(render(error, self.server_state.default_headers, self._reader.headers))
        self._linger()

    def _turn_deaf(self) -> None:
        self._deaf = True
        self._watch.deadline = NEVER
        self.flow.resume_reading()

    def _linger(self) -> None:
        """Says that nothing more comes, and waits for the client to close, for a while."""
        self._watch.within(LINGER_SECONDS)
        if self.transport.can_write_eof():
            self.transport.write_eof()


async def _nothing() -> None:
    """The application of a request that is already lost."""
