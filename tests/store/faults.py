"""A TCP proxy in front of a server that does what networks do, and a store that goes through it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator

from proxy.store.base import BudgetStore, Scope
from proxy.store.redis import RedisStore
from tests.conformance.stores import namespace, opened

LONG_MS = 10_000
"""For tests in which nothing is late: a busy machine must not look like a fault."""


class TcpProxy:
    """Forwards bytes both ways, and counts the pieces that came from the client.

    `swallow_replies`: what the server says is thrown away; `reset`: and the client's connection is then reset.
    `delay`: seconds that each piece of a reply is held back.
    """

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._port = port
        self._tls = tls
        self.port = 0
        self.pieces = 0
        self.connections = 0
        self.swallow_replies = self.reset = False
        self.swallowed = asyncio.Event()
        self.delay = 0.0
        self._writers: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[TcpProxy]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await server.wait_closed()

    def cut(self) -> None:
        """Resets every connection."""
        for writer in list(self._writers):
            sock = writer.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0 and self._tls is None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers |= {writer, upstream_writer}
        ways = [
            asyncio.ensure_future(self._up(reader, upstream_writer)),
            asyncio.ensure_future(self._down(upstream_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._writers -= {writer, upstream_writer}
            for each in (writer, upstream_writer):
                each.transport.abort()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            self.pieces += 1
            writer.write(data)

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            if self.swallow_replies:
                self.swallowed.set()
                if self.reset:
                    self.swallow_replies = False
                    return
                continue
            if self.delay:
                await asyncio.sleep(self.delay)
            writer.write(data)


@contextlib.asynccontextmanager
async def open_store(url: str, *scopes: Scope, timeout_ms: int = LONG_MS, **more: object) -> AsyncIterator[RedisStore]:
    """A store in a namespace of its own, open, with these scopes known to it."""
    more.setdefault("namespace", namespace())
    store = RedisStore(url, timeout_ms=timeout_ms, setup_ms=LONG_MS, **more)  # type: ignore[arg-type]
    try:
        if scopes:
            await opened(store, *scopes)
        yield store
    finally:
        await store.aclose()


async def row_of(store: BudgetStore, scope: Scope):
    found = await store.balance([scope])
    assert isinstance(found, tuple)
    return found[0].row
