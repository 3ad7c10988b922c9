"""Real servers that misbehave on demand.

A script is an async function over one accepted connection (`Peer`): it reads requests and sends exactly the bytes, ends
and silences that a test wants. What came in is recorded on the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import uvicorn

from proxy.transport.base import Origin, Request


@dataclass
class Received:
    """One request as it arrived."""

    connection: int
    """Number of the connection, counted from 0 in the order of acceptance."""
    head: bytes
    body: bytes

    def header(self, name: str) -> list[str]:
        """All values of a header."""
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.lower() == name]


class Peer:
    """The server's end of one connection."""

    def __init__(self, server: Server, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self._server = server
        self.reader = reader
        self.writer = writer

    async def request(self) -> Received:
        """Reads one whole request; IncompleteReadError when the client closes first."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        received = Received(self.number, head, b"")
        length = received.header("content-length")
        received.body = await self.reader.readexactly(int(length[0])) if length else b""
        self._server.requests.append(received)
        return received

    async def send(self, *pieces: bytes) -> None:
        """Sends pieces so that the other side sees each in a read of its own (as far as a test can bring it about)."""
        for number, piece in enumerate(pieces):
            if number:
                await asyncio.sleep(0.001)
            if self.writer.is_closing():
                raise ConnectionResetError("the client left")
            self.writer.write(piece)
            await self.writer.drain()

    def fin(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """RST instead of FIN: unsent bytes are dropped, the other side sees ECONNRESET."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Waits until the client has closed, and swallows what it still sends."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


Script = Callable[[Peer], Awaitable[None]]


@dataclass
class Server:
    """A listening script. `closed` counts connections that have ended, on whichever side's account."""

    port: int = 0
    scheme: str = "http"
    requests: list[Received] = field(default_factory=list)
    accepted: int = 0
    closed: int = 0
    failures: list[BaseException] = field(default_factory=list)

    @property
    def origin(self) -> Origin:
        return Origin(self.scheme, "localhost" if self.scheme == "https" else "127.0.0.1", self.port)

    @property
    def origin_url(self) -> str:
        return f"{self.scheme}://{self.origin.host}:{self.port}"

    def request(self, method: bytes = b"POST", body: bytes = b"{}", **more: Any) -> Request:
        return Request(
            self.origin, method, b"/v1/x?y=%20z", [(b"x-a", b"b")], body if method == b"POST" else b"", **more
        )


@contextlib.asynccontextmanager
async def serve(script: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    """Plays `script` on every connection. An exception of the script other than the client's leaving fails the test."""
    server = Server(scheme="https" if tls else "http")
    tasks: set[asyncio.Task[None]] = set()

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(server, server.accepted, reader, writer)
        server.accepted += 1
        try:
            await script(peer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client left, or the test is over
        except Exception as error:  # kept for the end of the test, which fails with it
            server.failures.append(error)
        finally:
            writer.transport.abort()
            server.closed += 1

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(play(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listener = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls, backlog=1024)  # a crowd may come at once
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        while tasks:  # one that was just being accepted may join meanwhile
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        await listener.wait_closed()
    if server.failures:
        raise server.failures[0]


def answers(*pieces: bytes) -> Script:
    """Answers every request with the same bytes, piece by piece."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(*pieces)

    return script


@contextlib.contextmanager
def black_hole() -> Iterator[Origin]:
    """An address where a connection is neither accepted nor refused: a listener whose queue is full."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(4):
            filler = sockets.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(address)
        yield Origin("http", address[0], address[1])


def refusing() -> Origin:
    """An address where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return Origin("http", "127.0.0.1", sock.getsockname()[1])


async def echo(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """An ASGI application: the request's body comes back in pieces of `?N` bytes; with a length if there is no `?`."""
    assert scope["type"] == "http"
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    size = int(scope["query_string"] or 0)
    headers = [(b"x-echo", dict(scope["headers"]).get(b"x-echo", b""))]
    if not size:
        headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for start in range(0, len(body), size or len(body) or 1):
        await send({"type": "http.response.body", "body": body[start : start + (size or len(body))], "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@contextlib.contextmanager
def uvicorn_echo() -> Iterator[Origin]:
    """The echo application on a real uvicorn, in a thread and on a loop of its own."""
    sock = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(cast("Any", echo), log_level="error", lifespan="off", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield Origin("http", "127.0.0.1", sock.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        sock.close()
