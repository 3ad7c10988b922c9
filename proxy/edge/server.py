"""Listening, and ending well. uvicorn speaks HTTP; when to stop, and in which order, is decided here.

What a signal (SIGTERM or SIGINT) starts::

    1st signal   begin_drain()            /readyz says 503; the listeners stay open, everything is served
    + drain      the listeners close      idle connections close, busy ones with the end of their answer
    + grace      interrupt_all()          streams get an error event; bounded by INTERRUPT_SECONDS
                 sockets are cut          and serve() returns

As soon as nothing is in flight after the drain, serve() returns. A second signal skips what is left of drain and
grace. Nothing here waits without a bound.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Final, Protocol

import uvicorn
import uvloop
from uvicorn.server import ServerState

from proxy.edge.guard import GuardedProtocol, OnRefused
from proxy.edge.head import Limits

INTERRUPT_SECONDS: Final = 2.0
"""For interrupt_all() and for its last bytes to leave, together."""
_CUT_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 0.02
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_REASONS: Final = {
    errno.EADDRINUSE: "the port is in use",
    errno.EACCES: "permission denied",
    errno.EADDRNOTAVAIL: "this machine has no such address",
}

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]


class Drainable(Protocol):
    """What must hear of the end: the application whose requests are worth waiting for."""

    def begin_drain(self) -> None:
        """From now on not ready; goes on serving. Called at most once, possibly before the first request."""

    async def interrupt_all(self) -> None:
        """Ends what still runs. Is cancelled after INTERRUPT_SECONDS."""


class ListenFailed(Exception):
    """An address could not be bound. The text says which and why, in one line."""


@dataclass(frozen=True, slots=True)
class Listener:
    """One address and the application behind it. Port 0 takes any free one."""

    app: ASGIApp
    host: str
    port: int


class Server:
    """Serves until it is told to stop. One per process; `serve` may be called once."""

    def __init__(
        self,
        app: Drainable,
        listeners: Sequence[Listener],
        *,
        limits: Limits,
        drain_ms: int,
        grace_ms: int,
        on_ready: Callable[[str, int], None] = lambda host, port: None,
        on_refused: OnRefused = lambda status, code: None,
        own_signals: bool = True,
    ) -> None:
        """`on_ready(host, port)` is called for each listener, in order and with its real port, once all listen.
        `own_signals` needs the main thread; without it, call `stop`."""
        self._app = app
        self._listeners = listeners
        self._limits = limits
        self._on_refused = on_refused
        self._drain = drain_ms / 1000
        self._grace = grace_ms / 1000
        self._on_ready = on_ready
        self._own_signals = own_signals
        self._state = ServerState()
        self._servers: list[asyncio.Server] = []
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._clock: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        """What a signal does. From the loop's own thread."""
        if self._stopping.is_set():
            self._hurry.set()
        else:
            self._stopping.set()
            self._app.begin_drain()

    async def serve(self) -> None:
        """Listens, serves, ends. Raises ListenFailed, with nothing left open."""
        loop = asyncio.get_running_loop()
        try:
            if self._own_signals:
                for number in _SIGNALS:
                    loop.add_signal_handler(number, self.stop)
            self._set_date(loop)
            for listener in self._listeners:
                self._servers.append(await self._listen(loop, listener))
            if self._stopping.is_set():
                return  # nobody has been told of us yet
            for listener, server in zip(self._listeners, self._servers, strict=True):
                self._on_ready(listener.host, server.sockets[0].getsockname()[1])
            await self._stopping.wait()
            await _wait(self._hurry, self._drain)
            self._close_listeners()
            if not await self._emptied(self._grace, self._hurry):
                await self._interrupt(loop)
        finally:
            self._close_listeners()
            self._cut()
            if self._clock is not None:
                self._clock.cancel()
            if self._own_signals:
                for number in _SIGNALS:
                    loop.remove_signal_handler(number)

    async def _listen(self, loop: asyncio.AbstractEventLoop, listener: Listener) -> asyncio.Server:
        config = uvicorn.Config(
            listener.app,
            http=GuardedProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=self._limits.keep_alive_seconds,  # type: ignore[arg-type]  # goes to call_later as it is
        )
        config.load()

        def accept() -> GuardedProtocol:
            return GuardedProtocol(config, self._state, {}, loop, limits=self._limits, refused=self._on_refused)

        try:
            return await loop.create_server(accept, listener.host, listener.port, backlog=config.backlog)
        except OSError as failure:
            host = f"[{listener.host}]" if ":" in listener.host else listener.host
            raise ListenFailed(f"cannot listen on {host}:{listener.port}: {_reason(failure)}") from failure

    def _set_date(self, loop: asyncio.AbstractEventLoop) -> None:
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        self._clock = loop.call_later(1.0, self._set_date, loop)

    def _close_listeners(self) -> None:
        for server in self._servers:
            server.close()

    async def _emptied(self, seconds: float, hurry: asyncio.Event) -> bool:
        """Lets connections end with their answers. False when some are left after this time, or for the hurry.

        Asks again and again, for a connection that the kernel had accepted before the listeners closed may show up
        late.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            for connection in list(self._state.connections):
                connection.shutdown()
            await asyncio.sleep(0)  # an idle connection is lost one turn of the loop after its close
            left = deadline - loop.time()
            if not self._state.connections and not self._state.tasks:
                return True
            if left <= 0 or hurry.is_set():
                return False
            await _wait(hurry, min(left, _POLL_SECONDS))

    async def _interrupt(self, loop: asyncio.AbstractEventLoop) -> None:
        deadline = loop.time() + INTERRUPT_SECONDS
        interrupting = loop.create_task(self._app.interrupt_all())
        try:
            await asyncio.wait([interrupting], timeout=INTERRUPT_SECONDS)
        finally:
            interrupting.cancel()  # if it is not done
        interrupted = interrupting.done() and not interrupting.cancelled()
        if interrupted and interrupting.exception() is None:
            await self._emptied(deadline - loop.time(), asyncio.Event())
        self._cut()
        if self._state.tasks:
            # They have been told that their client is gone: time to write that down.
            await asyncio.wait(list(self._state.tasks), timeout=_CUT_SECONDS)
        if interrupted:
            interrupting.result()

    def _cut(self) -> None:
        for connection in list(self._state.connections):
            connection.transport.abort()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a process's main coroutine on the loop that this server is made for."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """For the event, but no longer than this."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass


def _reason(failure: OSError) -> str:
    if isinstance(failure, socket.gaierror) or failure.errno is None:
        return "the host name is not known here"
    return _REASONS.get(failure.errno) or os.strerror(failure.errno)
