"""The connections to one origin: who may hold one, and who waits for one.

Theory. A *slot* is the right to have one connection in use. There are `limit` of them; `in_use` counts those given out,
whether their holder is still connecting or already talking. A connection is in exactly one of three places:

    held by a request    counted in `in_use`
    on the idle stack    not counted; newest on top, so the warmest is used again and the surplus ages and is closed
    closed

A request connects only when the idle stack is empty, so sockets never exceed `limit`. A slot that is given back while
somebody waits is *handed over*: `in_use` does not change, and the first waiter gets the connection itself, or None, the
bare right to connect. Hence two invariants: while somebody waits no connection is idle, and `in_use == limit`.

The race that loses slots for good elsewhere: a slot is handed to a waiter whose task is cancelled in the same turn of
the loop. Its future then holds a result that nobody will read. `acquire` finds it there and passes it on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from proxy.errors import ConnectFailed

KEEPALIVE = 4.0
"""Seconds idle before we close. Below the 5 s of uvicorn and Node, which most self-hosted model servers run on: the
side that closes first meets no race. The public providers keep connections for a minute and more."""


class Poolable(Protocol):
    """What a pool needs to know of a connection."""

    idle_since: float
    """Loop time at which it was put on the idle stack."""

    def usable(self) -> bool:
        """Open, and nothing has arrived since the last response ended."""

    def abort(self) -> None:
        """Closes the socket at once. Idempotent."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Connections in use (those still being opened included), connections idle, requests waiting for a slot."""

    in_use: int
    idle: int
    waiting: int


C = TypeVar("C", bound=Poolable)


class Pool(Generic[C]):
    """Slots and idle connections of one origin.

    `limit`: connections at a time. `keepalive`: seconds that a connection may stay idle before it is closed.
    Every slot that `reuse` or `acquire` gave out comes back by exactly one `put` or `free`.
    """

    __slots__ = ("_closed", "_idle", "_keepalive", "_limit", "_loop", "_open", "_sweep_timer", "_waiters", "in_use")

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int, keepalive: float) -> None:
        self._loop = loop
        self._limit = limit
        self._keepalive = keepalive
        self._open: set[C] = set()
        self._idle: list[C] = []
        self._waiters: deque[asyncio.Future[C | None]] = deque()
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.in_use = 0

    def reuse(self) -> C | None:
        """The warmest idle connection together with a slot, without waiting; None if there is none fit for use.

        Age is not looked at: a loop that was held up runs its timers, and with them `_sweep`, before its tasks.
        """
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.usable():
                self.in_use += 1
                return connection
            connection.abort()
        return None

    async def acquire(self, deadline: float) -> C | None:
        """A slot, first come first served: with a connection that was just given back, or with None.

        The connection may have died since; the caller asks it. Raises ConnectFailed(pool) at `deadline`.
        """
        if self._closed:
            raise _no_slot("The transport is closed.")
        if self.in_use < self._limit and not self._waiters:
            self.in_use += 1
            return None
        waiter: asyncio.Future[C | None] = self._loop.create_future()
        self._waiters.append(waiter)
        timer = self._loop.call_at(deadline, _expire, waiter)
        try:
            return await waiter
        except BaseException:  # cancelled, or no slot in time: nothing may be left behind
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._give_back(waiter.result())
            raise
        finally:
            timer.cancel()

    def put(self, connection: C) -> None:
        """Takes a slot back with its connection, which is fit for another request."""
        if self._closed:
            connection.abort()
            self.in_use -= 1
        elif not self._hand_over(connection):
            self.in_use -= 1
            connection.idle_since = self._loop.time()
            self._idle.append(connection)
            if self._sweep_timer is None:
                self._sweep_timer = self._loop.call_later(self._keepalive, self._sweep)

    def free(self) -> None:
        """Takes a slot back whose connection is closed, or was never opened."""
        if not self._hand_over(None):
            self.in_use -= 1

    def add(self, connection: C) -> None:
        """Notes a connection that was opened, so that `close` finds it wherever it is."""
        self._open.add(connection)
        if self._closed:
            connection.abort()

    def discard(self, connection: C) -> None:
        """Forgets a connection that is closed."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Closes all connections and turns the waiters away. Slots in use still come back through `put` and `free`."""
        self._closed = True
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        self._idle.clear()
        for connection in self._open:
            connection.abort()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(_no_slot("The transport was closed while waiting for a connection."))

    def stats(self) -> PoolStats:
        return PoolStats(self.in_use, len(self._idle), len(self._waiters))

    def _hand_over(self, connection: C | None) -> bool:
        waiters = self._waiters
        while waiters:
            waiter = waiters.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return True
        return False

    def _give_back(self, connection: C | None) -> None:
        if connection is None:
            self.free()
        elif connection.usable():
            self.put(connection)
        else:
            connection.abort()
            self.free()

    def _sweep(self) -> None:
        """One timer for all idle connections: closes those that are too old, comes back for the oldest that is left."""
        idle = self._idle
        oldest = self._loop.time() - self._keepalive
        old = 0
        while old < len(idle) and idle[old].idle_since <= oldest:
            idle[old].abort()
            old += 1
        del idle[:old]
        self._sweep_timer = self._loop.call_at(idle[0].idle_since + self._keepalive, self._sweep) if idle else None


def _expire(waiter: asyncio.Future[C | None]) -> None:
    if not waiter.done():
        waiter.set_exception(_no_slot("No connection to the upstream came free in time."))


def _no_slot(message: str) -> ConnectFailed:
    return ConnectFailed(message, reason="pool")
