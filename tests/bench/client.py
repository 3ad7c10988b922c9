"""One connection of the load: sends a request, checks the whole answer byte for byte, and goes on to the next."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Final, cast

HEAD_END: Final = b"\r\n\r\n"
LAST_CHUNK: Final = b"\r\n0\r\n\r\n"
QUOTE_BYTES: Final = 400


class WrongAnswer(Exception):
    """An answer that is not the right one, or none at all."""


class Run:
    """The requests of one phase, shared by its connections."""

    __slots__ = ("count", "expected", "finished", "frames", "latencies", "requests", "started")

    def __init__(self, requests: Iterator[bytes], expected: bytes, count: int) -> None:
        """`requests` has no end."""
        self.requests = requests
        self.expected = expected
        self.count = count
        self.started = 0
        self.frames = 0
        """HTTP chunks that came in: what the server had in hand at once, it sends as one."""
        self.latencies: list[float] = []
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def next_request(self) -> bytes | None:
        if self.started >= self.count:
            return None
        self.started += 1
        return next(self.requests)

    def answered(self, seconds: float) -> None:
        self.latencies.append(seconds)
        if len(self.latencies) == self.count and not self.finished.done():
            self.finished.set_result(None)

    def fail(self, reason: str) -> None:
        if not self.finished.done():
            self.finished.set_exception(WrongAnswer(reason))


class Client(asyncio.Protocol):
    """One connection. `idle` is called after an answer when there is nothing more to send on it."""

    __slots__ = ("_body_at", "_buffer", "_sent_at", "_total", "closed", "idle", "run", "transport")

    transport: asyncio.WriteTransport

    def __init__(self) -> None:
        self.run: Run | None = None
        self.idle: Callable[[Client], None] | None = None
        self.closed = False
        self._buffer = bytearray()
        self._body_at = 0
        self._total = 0
        self._sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self.run is not None and self._sent_at:
            self.run.fail(f"the connection closed in the middle of an answer, after {_quoted(self._buffer)}")

    def send_next(self, run: Run) -> None:
        """Sends the run's next request, if there is one left."""
        self.run = run
        request = run.next_request()
        if request is None:
            return
        self._sent_at = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        if not self._total and not self._read_head(buffer):
            return
        if self._total > 0:
            if len(buffer) >= self._total:
                self._answered(buffer[self._body_at : self._total])
        elif buffer.endswith(LAST_CHUNK):
            self._answered(self._dechunked(buffer))

    def _read_head(self, buffer: bytearray) -> bool:
        """Learns where the body begins and where it ends: `_total` is -1 for a chunked one. False: not all there."""
        end = buffer.find(HEAD_END)
        if end < 0:
            return False
        self._body_at = end + len(HEAD_END)
        head = buffer[:end].lower()
        at = head.find(b"\r\ncontent-length:")
        self._total = -1 if at < 0 else self._body_at + int(head[at + 17 :].split(b"\r\n", 1)[0])
        return True

    def _dechunked(self, buffer: bytearray) -> bytes:
        """The body inside chunked framing, complete and without trailers."""
        assert self.run is not None
        pieces: list[bytes] = []
        at = self._body_at
        while True:
            line = buffer.index(b"\r\n", at)
            size = int(buffer[at:line].split(b";", 1)[0], 16)
            if not size:
                self.run.frames += len(pieces)
                return b"".join(pieces)
            pieces.append(bytes(buffer[line + 2 : line + 2 + size]))
            at = line + 4 + size

    def _answered(self, body: bytearray | bytes) -> None:
        run = self.run
        assert run is not None
        if body != run.expected or not self._buffer.startswith(b"HTTP/1.1 200 "):
            run.fail(f"a wrong answer: {_quoted(self._buffer)}, body of {len(body)} bytes, {_difference(body, run)}")
            self.transport.abort()
            return
        run.answered(time.perf_counter() - self._sent_at)
        self._buffer.clear()
        self._total = 0
        self._sent_at = 0.0
        if self.idle is not None:
            self.idle(self)
        else:
            self.send_next(run)


def _difference(body: bytearray | bytes, run: Run) -> str:
    for at, (ours, theirs) in enumerate(zip(body, run.expected, strict=False)):
        if ours != theirs:
            return f"first different at byte {at}: {bytes(body[max(at - 40, 0) : at + 40])!r}"
    return f"expected {len(run.expected)} bytes"


def _quoted(data: bytearray) -> str:
    return repr(bytes(data[:QUOTE_BYTES])) + ("…" if len(data) > QUOTE_BYTES else "")
