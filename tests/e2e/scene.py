"""A client and an upstream that both do exactly what a test says, with the application between them on one loop.

`scene()` also keeps watch: however a test ends its requests, afterwards no task, socket or pool slot is left over, and
nothing was thrown at the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from proxy.observability.events import RequestFinished, RequestRefused
from proxy.providers.openai import OpenAIProvider
from proxy.transport.http1 import Http1Transport
from proxy.transport.pool import PoolStats
from tests.e2e.stack import ALONE, Stack, stack
from tests.transport.servers import Peer, Script, Server, serve

PATIENCE = 20.0
"""Seconds before a test gives up. Never reached by a working program, however busy the machine."""
SOON = 0.5
"""Seconds in which the upstream must see that nobody listens any more: a promise of the program."""
CHAT = "/v1/chat/completions"
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
ANSWER = b'{"id":"c1","object":"chat.completion","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'


async def until(true: Callable[[], Any], what: str) -> None:
    """Waits for what the program is about to do."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while not true():
        assert asyncio.get_running_loop().time() < deadline, f"waited in vain: {what}"
        await asyncio.sleep(0.002)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def plain(body: bytes, status: int = 200, kind: bytes = b"application/json", more: bytes = b"") -> bytes:
    """A whole answer of an upstream. `more` are complete header lines."""
    head = b"HTTP/1.1 %d X\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b\r\n" % (status, kind, len(body), more)
    return head + body


async def flushed(peer: Peer) -> None:
    """Waits until the kernel has every byte: a reset throws away what it has not."""
    await until(lambda: peer.writer.transport.get_write_buffer_size() == 0, "the bytes to go out")
    await asyncio.sleep(0)


def piece_of(text: str) -> bytes:
    """An event of a chat stream that says `text`."""
    return b'data: {"choices":[{"index":0,"delta":{"content":%b}}]}\n\n' % json.dumps(text).encode()


class Client:
    """One connection to the application. Every wait ends after PATIENCE seconds."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.seen = b""
        """What was read of the current body, without its framing."""

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    def ask(
        self, model: str = "any", *, path: str = CHAT, headers: Mapping[str, str] | None = None, **body: Any
    ) -> None:
        """Sends one request, whole."""
        self.send(request(model, path=path, headers=headers, **body))

    async def head(self) -> tuple[int, dict[str, str]]:
        async with asyncio.timeout(PATIENCE):
            raw = await self._reader.readuntil(b"\r\n\r\n")
        first, *lines = raw[:-4].decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        self.seen = b""
        self._left = int(headers.get("content-length", 0))
        self._chunked = headers.get("transfer-encoding") == "chunked"
        return int(first.split()[1]), headers

    async def more(self) -> bool:
        """Reads a piece of the body into `seen`. False when the body is complete; raises when it was cut."""
        async with asyncio.timeout(PATIENCE):
            if not self._chunked:
                data = await self._reader.readexactly(self._left)
                self._left = 0
                self.seen += data
                return bool(data)
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            data = await self._reader.readexactly(size + 2)
            self.seen += data[:-2]
            return bool(size)

    async def rest(self) -> bytes:
        """The whole body."""
        while await self.more():
            pass
        return self.seen

    async def read_until(self, mark: bytes) -> None:
        while mark not in self.seen:
            assert await self.more(), self.seen

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        status, headers = await self.head()
        return status, headers, await self.rest()

    async def ended(self) -> bytes:
        """What comes until the server closes."""
        async with asyncio.timeout(PATIENCE):
            return await self._reader.read()

    def reset(self) -> None:
        """Leaves with a RST."""
        if not self._writer.transport.is_closing():
            sock = self._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()

    def close(self) -> None:
        """Leaves with a FIN."""
        self._writer.close()

    def half_close(self) -> None:
        """Says that it sends nothing more, and goes on reading."""
        self._writer.write_eof()


def request(model: str = "any", *, path: str = CHAT, headers: Mapping[str, str] | None = None, **body: Any) -> bytes:
    """The bytes of a POST; a chat unless `body` says otherwise."""
    sent: dict[str, Any] = {"model": model, **body}
    if path == CHAT:
        sent.setdefault("messages", [{"role": "user", "content": "Hello"}])
    data = json.dumps(sent).encode()
    lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{lines}"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data


@dataclass
class Scene:
    stack: Stack
    upstream: Server
    clients: list[Client] = field(default_factory=list)

    async def client(self, *, receive_buffer: int | None = None) -> Client:
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.stack.port))
        self.clients.append(Client(*await asyncio.open_connection(sock=sock)))
        return self.clients[-1]

    async def post(self, model: str = "any", **body: Any) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own."""
        client = await self.client()
        try:
            client.ask(model, **body)
            return await client.answer()
        finally:
            client.close()

    @property
    def slots(self) -> PoolStats:
        """Of the transport to the upstream."""
        provider = cast("OpenAIProvider", self.stack.running.gateway.service.pipeline.failover.providers["up"])
        return cast("Http1Transport", provider._transport).stats()

    @property
    def connections(self) -> set[Any]:
        """The server's open client connections."""
        return cast("set[Any]", self.stack.server._state.connections)

    async def ended(self, count: int = 1) -> list[RequestFinished | RequestRefused]:
        """The events, once `count` requests are over. There are exactly so many; others may still run."""
        await until(lambda: len(self.stack.outcomes()) >= count, f"the end of {count} requests")
        outcomes = self.stack.outcomes()
        assert len(outcomes) == count, outcomes
        return outcomes

    async def over(self, count: int = 1) -> list[RequestFinished | RequestRefused]:
        """The same, once nothing is in flight."""
        await self.ended(count)
        await self.stack.quiet(PATIENCE)
        return await self.ended(count)


@contextlib.asynccontextmanager
async def scene(
    script: Script, *, silence: float | None = None, timeouts: Mapping[str, int] | None = None, **provider: Any
) -> AsyncIterator[Scene]:
    """The application with one provider `up` that plays `script`; `provider` are further settings of it."""
    loop = asyncio.get_running_loop()
    thrown: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: thrown.append(context))
    try:
        async with serve(script) as upstream:
            up = {"kind": "openai", "base_url": f"{upstream.origin.scheme}://127.0.0.1:{upstream.port}/v1"}
            config = {
                "providers": {"up": {**up, "timeouts": dict(timeouts or {}), **provider}, "spare": {"kind": "mock"}},
                "models": [{"name": "spare", "targets": ["spare/echo"]}, {"name": "*", "targets": ["up/*"]}],
                "listen": {"drain_ms": 0, "grace_ms": 1000},
                **ALONE,
            }
            async with stack(config, silence=silence) as running:
                before = asyncio.all_tasks()
                on_stage = Scene(running, upstream)
                try:
                    yield on_stage
                except BaseException:  # the test has failed: its clients are not to fail the next one, too
                    for client in on_stage.clients:
                        client.reset()
                    raise
                await _nothing_left(on_stage, before)
    finally:
        loop.set_exception_handler(None)
    assert thrown == []


async def _nothing_left(on_stage: Scene, before: set[asyncio.Task[Any]]) -> None:
    await on_stage.stack.quiet(PATIENCE)
    await until(lambda: on_stage.slots.in_use == 0, "a slot of the pool to come back")
    assert on_stage.slots.waiting == 0
    await until(lambda: not on_stage.connections, "the client's connection to close")
    pipeline = on_stage.stack.running.gateway.service.pipeline
    transport = cast("OpenAIProvider", pipeline.failover.providers["up"])._transport
    await transport.aclose()  # its idle connections have a player each at the upstream
    await until(lambda: on_stage.upstream.closed == on_stage.upstream.accepted, "the upstream's sockets to close")
    await until(lambda: asyncio.all_tasks() <= before, "the tasks to end")


def playing(parts: Mapping[str, Callable[[Peer], Awaitable[None]]]) -> Script:
    """A script that answers by the request's model: its own part, or a good plain answer."""

    async def script(peer: Peer) -> None:
        while True:
            received = await peer.request()
            part = parts.get(json.loads(received.body)["model"]) if received.body else None
            if part is None:
                await peer.send(plain(ANSWER))
            else:
                await part(peer)

    return script
