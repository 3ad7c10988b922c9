"""The reading side of an exchange: what has arrived, how it ended, and the one future that a reader waits on.

This is the only place of the transport that suspends while a connection is held, so cancellation is handled here and
only here: a reader that is cancelled gives the connection up before anything else runs.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from proxy.errors import ProxyError, UpstreamBroken
from proxy.types import Headers


class Exchange(Protocol):
    """What a response needs of the connection it comes from, for as long as it has one."""

    def waiter(self, deadline: float) -> asyncio.Future[None]:
        """A future that is done when there is something new, the failure at `deadline` included."""

    def drained(self) -> None:
        """The reader took all there was."""

    def fail(self, error: ProxyError) -> None:
        """Ends the exchange and closes the connection."""


class Http1Response:
    """The port's `Response`. The connection fills it; `finish` is called exactly once."""

    __slots__ = (
        "_complete",
        "_error",
        "_exchange",
        "_waiter",
        "head_only",
        "headers",
        "pieces",
        "stale",
        "status",
    )

    def __init__(self, exchange: Exchange, *, head_only: bool) -> None:
        self.status = 0
        self.headers: Headers = []
        self.head_only = head_only
        self.pieces: list[bytes] = []
        """Of the body: arrived, and not read yet."""
        self.stale = False
        """A re-used connection turned out to be dead, soon after sending and before any byte came back."""
        self._exchange: Exchange | None = exchange
        self._complete = False
        self._error: ProxyError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def head(self, deadline: float) -> None:
        """Waits until status and headers are known. Raises UpstreamTimeout, UpstreamBroken."""
        while not self.status:
            if self._error is not None:
                raise self._error
            exchange = self._exchange
            assert exchange is not None, "a response that is not finished has its connection"
            waiter = self._waiter = exchange.waiter(deadline)
            try:
                await waiter
            except asyncio.CancelledError:
                self._give_up()  # nobody reads on: the slot is free now, whatever the caller does next
                raise
            finally:
                self._waiter = None

    async def read(self, deadline: float) -> bytes:
        pieces = self.pieces
        while not pieces:
            if self._error is not None:
                raise self._error
            if self._complete:
                return b""
            exchange = self._exchange
            assert exchange is not None, "a response that is not finished has its connection"
            waiter = self._waiter = exchange.waiter(deadline)
            try:  # not in a coroutine of its own: each chunk of a stream passes here
                await waiter
            except asyncio.CancelledError:
                self._give_up()
                raise
            finally:
                self._waiter = None
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if self._exchange is not None:
            self._exchange.drained()
        return data

    async def aclose(self) -> None:
        self._give_up()

    def wake(self) -> None:
        """There is something new for the reader, if one waits."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def waiting(self) -> bool:
        """A reader waits, and nothing has come for it."""
        return self._waiter is not None and not self._waiter.done()

    def finish(self, error: ProxyError | None) -> None:
        """Nothing more will come: the body is complete, or `error` is why it is not. Lets go of the connection."""
        self._exchange = None
        self._complete = error is None
        self._error = error
        self.wake()

    def _give_up(self) -> None:
        if self._exchange is not None:
            self._exchange.fail(UpstreamBroken("The response was given up before it was complete.", reason="closed"))
        self.pieces.clear()
