"""The mock on a real socket, in a thread of this process, and a raw client for it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import uvloop
from hypothesis import HealthCheck, settings

from proxy.providers.mock.handler import Mock
from proxy.providers.mock.server import MockServer

CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For a machine that does other things too: no example is judged by the clock."""


def words(text: str) -> int:
    """A counter that a test can check by eye: every piece that the mock streams is one token."""
    return len(text.split())


class Running:
    """A `MockServer` and the thread that runs it."""

    def __init__(self, mock: Mock) -> None:
        self._loop = uvloop.new_event_loop()
        self._ready = threading.Event()
        self._server = MockServer(mock)
        self.port = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def connections(self) -> int:
        return self._server.connections

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def ledger(self, query: str = "") -> dict[str, Any]:
        _, _, body = exchange(self, b"GET", f"/__ledger{query}")
        return json.loads(body)

    def last(self) -> dict[str, Any]:
        """The newest entry of the books, once it is closed."""
        return self.wait_for(lambda: (self.ledger()["entries"] or [{"in_flight": True}])[-1], "in_flight", False)

    def wait_for(self, look: Callable[[], dict[str, Any]], name: str, value: object) -> dict[str, Any]:
        end = time.monotonic() + 10
        while (found := look())[name] != value:
            assert time.monotonic() < end, found
            time.sleep(0.002)
        return found

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self.port = self._loop.run_until_complete(self._server.start("127.0.0.1", 0))
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._server.aclose())
        self._loop.close()


def request(method: bytes, target: str, body: object = None, *headers: bytes) -> bytes:
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [b"%b %b HTTP/1.1" % (method, target.encode()), b"host: mock", b"content-length: %d" % len(data), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + data


def exchange(server: Running, method: bytes, target: str, body: object = None) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own. (status, headers, body with its framing taken off)."""
    with server.connect() as line:
        line.sendall(request(method, target, body, b"connection: close"))
        raw = read_all(line)
    return answer(raw)


def answer(raw: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    if headers.get("transfer-encoding") == "chunked":
        body = dechunk(body)
    return int(first.split()[1]), headers, body


def dechunk(body: bytes) -> bytes:
    out = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            assert body == b"\r\n"
            return out
        out += body[:length]
        assert body[length : length + 2] == b"\r\n"
        body = body[length + 2 :]


def read_all(line: socket.socket) -> bytes:
    out = b""
    while data := line.recv(65536):
        out += data
    return out
