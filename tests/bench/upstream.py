"""The upstream: the cheapest HTTP/1.1 server that speaks the chat route, as a process of its own.

    python -m tests.bench.upstream [--cert FILE]

It prints one JSON line, `{"port": N, "tls_port": N or null}`, and serves until it is ended. Replies are computed once,
before the first request. The chunks of a paced stream are written one by one from one shared timer, `TICK` seconds a
step; a stream takes part in every `SLOTS`-th step. So every chunk is a write of its own, hence a read of its own in
whatever stands between, and the streams spread evenly over the steps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
from collections.abc import Callable
from typing import Final, cast

import httptools
import msgspec
import uvloop

from tests.bench.payloads import DONE, LONG, plain_reply, stream_events

TICK: Final = 0.001
SLOTS: Final = 4
MODELS: Final = ("bench", "bench-short", "bench-burst", "no-usage", *LONG)
SSE_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"x-request-id: req_bench\r\nopenai-processing-ms: 12\r\ntransfer-encoding: chunked\r\n\r\n"
)


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class Body(msgspec.Struct):
    """All that the upstream wants to know of a request."""

    model: str = "bench"
    stream: bool = False
    stream_options: StreamOptions | None = None


def plain_answer(model: str) -> bytes:
    return _answer(b"200 OK", plain_reply(model))


def stream_writes(model: str, usage: bool) -> list[bytes]:
    """A stream as the writes it takes: the head, each event in a chunk of its own, then the end."""
    events = [_framed(event) for event in stream_events(model, usage)]
    writes = [SSE_HEAD, *events, _framed(DONE) + b"0\r\n\r\n"]
    return [b"".join(writes)] if model == "bench-burst" else writes


def _framed(event: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(event), event)


def _answer(status: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\nx-request-id: req_bench\r\nopenai-processing-ms: 12\r\n"
    return head % status + b"content-length: %d\r\n\r\n%s" % (len(body), body)


PLAIN: Final = {model: plain_answer(model) for model in MODELS}
STREAMS: Final = {(model, usage): stream_writes(model, usage) for model in MODELS for usage in (False, True)}
UNKNOWN: Final = _answer(b"404 Not Found", b'{"error":{"message":"not served here","type":"invalid_request_error"}}')
decode: Final = msgspec.json.Decoder(Body).decode


class Pacer:
    """Writes the next chunk of every stream when its step comes. Runs only while there are streams."""

    __slots__ = ("_active", "_due", "_loop", "_next_slot", "_slots", "_step")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._slots: list[list[Stream]] = [[] for _ in range(SLOTS)]
        self._next_slot = 0
        self._step = 0
        self._active = 0
        self._due = 0.0

    def add(self, stream: Stream) -> None:
        self._slots[self._next_slot].append(stream)
        self._next_slot = (self._next_slot + 1) % SLOTS
        self._active += 1
        if self._active == 1:
            self._due = self._loop.time() + TICK
            self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        slot = self._slots[self._step]
        kept = [stream for stream in slot if stream.write_next()]
        self._active -= len(slot) - len(kept)
        self._slots[self._step] = kept
        self._step = (self._step + 1) % SLOTS
        if self._active:
            # A late step is not made up for: two chunks in one write would be one read for the server under test.
            self._due = max(self._due + TICK, self._loop.time())
            self._loop.call_at(self._due, self._tick)


class Stream:
    """One paced reply on its way. `write_next` is False once there is nothing more to do."""

    __slots__ = ("_connection", "_index", "_writes")

    def __init__(self, connection: Connection, writes: list[bytes]) -> None:
        self._connection = connection
        self._writes = writes
        self._index = 1

    def write_next(self) -> bool:
        connection = self._connection
        if connection.lost:
            return False
        if connection.paused:
            return True
        connection.transport.write(self._writes[self._index])
        self._index += 1
        return self._index < len(self._writes)


class Connection(asyncio.Protocol):
    __slots__ = ("_body", "_pacer", "_parser", "_url", "lost", "paused", "transport")

    transport: asyncio.WriteTransport

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer
        self._parser = httptools.HttpRequestParser(self)
        self._body: list[bytes] = []
        self._url = b""
        self.lost = False
        self.paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = b"".join(self._body)
        self._body.clear()
        if self._url != b"/v1/chat/completions":
            self.transport.write(UNKNOWN)
            return
        try:
            ask = decode(body)
        except msgspec.MsgspecError:
            self.transport.write(_answer(b"400 Bad Request", b'{"error":{"message":"not a chat request"}}'))
            return
        if not ask.stream:
            self.transport.write(PLAIN.get(ask.model, UNKNOWN))
            return
        usage = ask.stream_options is not None and ask.stream_options.include_usage
        writes = STREAMS.get((ask.model, usage))
        self.transport.write(UNKNOWN if writes is None else writes[0])
        if writes is not None and len(writes) > 1:
            self._pacer.add(Stream(self, writes))


async def serve(cert: str | None) -> None:
    loop = asyncio.get_running_loop()
    pacer = Pacer(loop)
    factory: Callable[[], Connection] = lambda: Connection(pacer)  # noqa: E731 - named for its type
    plain = await loop.create_server(factory, "127.0.0.1", 0, backlog=1024)
    ports: dict[str, int | None] = {"port": plain.sockets[0].getsockname()[1], "tls_port": None}
    if cert is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(cert)
        secure = await loop.create_server(factory, "127.0.0.1", 0, ssl=context, backlog=1024)
        ports["tls_port"] = secure.sockets[0].getsockname()[1]
    print(json.dumps(ports), flush=True)
    await plain.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="tests.bench.upstream")
    parser.add_argument("--cert", help="PEM with key and certificate: serve TLS too, on a port of its own")
    uvloop.run(serve(parser.parse_args().cert))
