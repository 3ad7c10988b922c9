"""A client that sends exactly the bytes it is given, and a server in a thread to send them to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvloop

from proxy.edge.head import Limits
from proxy.edge.server import Listener, Server

PATIENCE = 20.0
"""Seconds before a test gives up. Never reached by a working server, however busy the machine."""


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


class Wire:
    """One TCP connection. Everything it waits for, it waits for at most PATIENCE seconds."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = bytearray()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def offer(self, data: bytes) -> bool:
        """Sends to a server that may have closed already. False when it had."""
        try:
            self.socket.sendall(data)
        except (ConnectionResetError, BrokenPipeError):
            return False
        return True

    def reset(self) -> None:
        """Leaves with a RST instead of a FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _more(self) -> None:
        piece = self.socket.recv(1 << 20)
        if not piece:
            raise EOFError
        self._unread += piece

    def until(self, mark: bytes) -> bytes:
        while mark not in self._unread:
            self._more()
        found, _, self._unread = self._unread.partition(mark)
        return bytes(found) + mark

    def exactly(self, count: int) -> bytes:
        while len(self._unread) < count:
            self._more()
        found, self._unread = self._unread[:count], self._unread[count:]
        return bytes(found)

    def head(self) -> tuple[int, dict[str, str]]:
        first, *lines = self.until(b"\r\n\r\n")[:-4].decode("latin-1").split("\r\n")
        pairs = [line.split(": ", 1) for line in lines]
        return int(first.split(" ")[1]), {name.lower(): value for name, value in pairs}

    def answer(self) -> Answer:
        """The next final response."""
        status, headers = self.head()
        while status < 200:
            status, headers = self.head()
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.until(b"\r\n"), 16):
                body += self.exactly(size + 2)[:-2]
            self.exactly(2)
        else:
            body = self.exactly(int(headers.get("content-length", "0")))
        return Answer(status, headers, body)

    def rest(self) -> bytes:
        """What still comes until the server closes; a reset is an end like any other."""
        with contextlib.suppress(ConnectionResetError, EOFError):
            while True:
                self._more()
        found, self._unread = self._unread, bytearray()
        return bytes(found)


def eventually(true: Callable[[], Any]) -> None:
    """Waits for what the server's thread is about to do."""
    give_up = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.005)


App = Callable[["Site", dict[str, Any], Any, Any], Awaitable[None]]


@dataclass
class Site:
    """A guarded server in a thread of its own, with what it heard and refused."""

    limits: Limits
    app: App
    port: int = 0
    heard: list[dict[str, Any]] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    """What reached the loop's exception handler: always none."""
    loop: asyncio.AbstractEventLoop | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    """For an application that waits until the test lets it answer."""

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.heard.append(scope)
        await self.app(self, scope, receive, send)

    def begin_drain(self) -> None:
        pass

    async def interrupt_all(self) -> None:
        pass

    def wire(self) -> Wire:
        return Wire(self.port)

    def ask(self, data: bytes) -> Answer:
        with self.wire() as wire:
            wire.send(data)
            return wire.answer()

    def clear(self) -> None:
        self.heard.clear()
        self.refused.clear()
        self.lost.clear()


@contextlib.contextmanager
def serving(app: App, limits: Limits) -> Iterator[Site]:
    site = Site(limits, app)
    listening = threading.Event()
    failures: list[BaseException] = []

    def ready(host: str, port: int) -> None:
        site.port = port
        listening.set()

    server = Server(
        site,
        [Listener(site, "127.0.0.1", 0)],
        limits=limits,
        drain_ms=0,
        grace_ms=0,
        on_ready=ready,
        on_refused=lambda status, code: site.refused.append((status, code)),
        own_signals=False,
    )

    async def main() -> None:
        site.loop = asyncio.get_running_loop()
        site.loop.set_exception_handler(lambda loop, context: site.faults.append(context))
        await server.serve()

    def thread() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(main())
        except BaseException as failure:
            failures.append(failure)
            listening.set()

    runner = threading.Thread(target=thread)
    runner.start()
    assert listening.wait(PATIENCE)
    assert not failures, failures
    try:
        yield site
    finally:
        assert site.loop is not None
        site.loop.call_soon_threadsafe(server.stop)
        runner.join(PATIENCE)
        assert not runner.is_alive()
        assert not failures, failures
        assert site.faults == []
