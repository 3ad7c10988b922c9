"""A connection without a socket: reads are cut exactly where a test says, and nothing takes time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from proxy.errors import UpstreamBroken
from proxy.transport.connection import Connection
from proxy.transport.pool import Pool
from proxy.transport.response import Http1Response

MAX_HEAD = 65536


class Wire(asyncio.Transport):
    """A transport in memory: reads are cut exactly where the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


@dataclass
class Outcome:
    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    complete: bool = False
    refused: bool = False
    """The bytes are not HTTP to this reader."""
    kept: bool = False
    """The connection would be used again."""


def read_with_ours(loop: asyncio.AbstractEventLoop, pieces: list[bytes]) -> Outcome:
    """The pieces, each as a read of its own, then the end of the connection."""
    pool: Pool[Connection] = Pool(loop, 1, 60.0)
    loop.run_until_complete(pool.acquire(loop.time() + 60))
    wire = Wire()
    connection = Connection(loop, pool, MAX_HEAD)
    connection.connection_made(wire)
    response = Http1Response(connection, head_only=False)
    connection.start(response, b"POST / HTTP/1.1\r\n\r\n", b"")
    for piece in pieces:
        if not wire.closed:
            connection.data_received(piece)
    kept = not wire.closed and pool.stats().idle == 1
    if not wire.closed:
        connection.eof_received()
    connection.connection_lost(None)
    assert pool.stats().in_use == pool.stats().idle == 0
    pool.close()
    return loop.run_until_complete(_outcome(response, kept=kept))


async def _outcome(response: Http1Response, *, kept: bool) -> Outcome:
    outcome = Outcome(kept=kept)
    try:
        await response.head(0.0)
        outcome.status, outcome.headers = response.status, response.headers
        while piece := await response.read(0.0):
            outcome.body += piece
        outcome.complete = True
    except UpstreamBroken as error:
        outcome.refused = error.reason == "protocol"
    return outcome
