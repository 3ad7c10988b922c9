"""What only the second transport does: HTTP/2, and ways out through a proxy. Against real servers, here too."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import cast

import h2.config
import h2.connection
import h2.events
import pytest
import trustme

from proxy.errors import ConnectFailed, UpstreamBroken, UpstreamTimeout
from proxy.transport.base import Origin, Request
from proxy.transport.httpx import HttpxTransport
from tests.transport.adapters import fetch, soon, until
from tests.transport.servers import Peer, answers, refusing, serve

pytestmark = pytest.mark.anyio

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


class Http2Server(asyncio.Protocol):
    """Answers each stream as its path says: echo, reset, goaway, silent, half (an echo that does not end)."""

    connections = 0

    def __init__(self) -> None:
        self.state = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self.paths: dict[int, bytes] = {}
        self.bodies: dict[int, bytes] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        type(self).connections += 1
        self.state.initiate_connection()
        self._flush()

    def data_received(self, data: bytes) -> None:
        for event in self.state.receive_data(data):
            match event:
                case h2.events.RequestReceived():
                    headers = {bytes(name): bytes(value) for name, value in event.headers or ()}
                    self.paths[event.stream_id] = headers[b":path"]
                    self.bodies[event.stream_id] = b""
                case h2.events.DataReceived():
                    self.bodies[event.stream_id] += event.data
                    self.state.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                case h2.events.StreamEnded():
                    self._answer(event.stream_id)
        self._flush()

    def _answer(self, stream: int) -> None:
        path = self.paths[stream]
        if path == b"/reset":
            self.state.reset_stream(stream, error_code=2)
        elif path == b"/goaway":
            self.state.close_connection()
            self._flush()
            self.transport.close()
        elif path != b"/silent":
            self.state.send_headers(stream, [(":status", "200"), ("x-path", path.decode())])
            self.state.send_data(stream, self.bodies[stream], end_stream=path != b"/half")

    def _flush(self) -> None:
        self.transport.write(self.state.data_to_send())


@contextlib.asynccontextmanager
async def http2_server(authority: trustme.CA) -> AsyncIterator[tuple[Origin, type[Http2Server]]]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"])
    authority.issue_cert("localhost").configure_cert(context)
    kind = type("Counted", (Http2Server,), {"connections": 0})
    server = await asyncio.get_running_loop().create_server(kind, "127.0.0.1", 0, ssl=context)
    try:
        yield Origin("https", "localhost", server.sockets[0].getsockname()[1]), kind
    finally:
        server.close()


@contextlib.asynccontextmanager
async def transport(trusting: ssl.SSLContext, *, proxy: str | None = None) -> AsyncIterator[HttpxTransport]:
    made = HttpxTransport(max_connections=2, connect_timeout=5.0, http2=True, egress_proxy=proxy, ssl_context=trusting)
    try:
        yield made
        await until(lambda: made.stats().in_use == 0)
    finally:
        await made.aclose()


async def test_http2(authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    """Many requests at a time on one connection, each with its own answer, up to bodies beyond a flow window."""
    async with http2_server(authority) as (origin, server), transport(trusting) as client:
        bodies = [b"", *[b"%d" % number * 1000 for number in range(20)]]
        requests = [Request(origin, b"POST", b"/echo", [(b"x-a", b"b")], body) for body in bodies]
        assert await asyncio.gather(*[fetch(client, request) for request in requests]) == [(200, b) for b in bodies]
        assert server.connections == 1
        response = await client.send(requests[0], soon())
        assert (b"x-path", b"/echo") in response.headers
        await response.aclose()


@pytest.mark.parametrize("path", [b"/reset", b"/goaway"])
async def test_http2_broken(authority: trustme.CA, trusting: ssl.SSLContext, path: bytes) -> None:
    async with http2_server(authority) as (origin, _), transport(trusting) as client:
        for _ in range(3):
            with pytest.raises(UpstreamBroken):
                await fetch(client, Request(origin, b"POST", path, [], b"{}", replayable=True))
        assert await fetch(client, Request(origin, b"POST", b"/echo", [], b"{}")) == (200, b"{}")


async def test_http2_left_in_the_middle(authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    """Timeouts and cancellations end their stream; the others on the same connection go on."""
    async with http2_server(authority) as (origin, _), transport(trusting) as client:

        async def half(path: bytes) -> None:
            response = await client.send(Request(origin, b"POST", path, [], b"{}"), soon(0.1))
            assert await response.read(soon()) == b"{}"
            await response.read(soon(0.05))

        for path in (b"/silent", b"/half"):
            for _ in range(5):
                with pytest.raises(UpstreamTimeout):
                    await half(path)
                task = asyncio.create_task(fetch(client, Request(origin, b"POST", path, [], b"{}")))
                await asyncio.sleep(0.02)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert await fetch(client, Request(origin, b"POST", b"/echo", [], b"{}")) == (200, b"{}")


async def tunnel(peer: Peer) -> None:
    """An HTTP proxy: CONNECT, then bytes both ways."""
    received = await peer.request()
    host, _, port = received.head.split(b" ")[1].partition(b":")
    reader, writer = await asyncio.open_connection(host.decode(), int(port))
    await peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
        sink.close()

    try:
        await asyncio.gather(pump(peer.reader, writer), pump(reader, peer.writer))
    finally:
        writer.transport.abort()


async def test_egress_proxy(trusting: ssl.SSLContext, serving: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = f"http://127.0.0.1:{refusing().port}"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):  # not asked
        monkeypatch.setenv(name, nowhere)
    async with serve(answers(OK), tls=serving) as server, serve(tunnel) as way_out:
        proxy = f"http://user:pass@127.0.0.1:{way_out.port}"
        async with transport(trusting, proxy=proxy) as client:
            for _ in range(2):
                assert await fetch(client, server.request(body=b"secret")) == (200, b"hello")
        assert [received.head.split(b" ")[:2] for received in way_out.requests] == [
            [b"CONNECT", b"localhost:%d" % server.port]
        ]
        credentials = base64.b64encode(b"user:pass").decode()
        assert way_out.requests[0].header("proxy-authorization") == [f"Basic {credentials}"]
        assert server.requests[0].body == b"secret"
        assert not server.requests[0].header("proxy-authorization")


async def test_egress_proxy_in_plain(trusting: ssl.SSLContext) -> None:
    async with serve(answers(OK)) as way_out, transport(trusting, proxy=way_out.origin_url) as client:
        request = Request(Origin("http", "upstream.example", 80), b"POST", b"/v1/x?y=%20", [], b"{}")
        assert await fetch(client, request) == (200, b"hello")
        assert way_out.requests[0].head.startswith(b"POST http://upstream.example/v1/x?y=%20 HTTP/1.1\r\n")


@pytest.mark.parametrize("reply", [b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n", None])
async def test_egress_proxy_fails(trusting: ssl.SSLContext, reply: bytes | None) -> None:
    async def script(peer: Peer) -> None:
        if reply is not None:
            await peer.request()
            await peer.send(reply)
        await peer.gone()

    async with serve(script) as way_out:
        proxy = way_out.origin_url if reply is not None else f"http://127.0.0.1:{refusing().port}"
        async with transport(trusting, proxy=proxy) as client:
            for _ in range(3):
                with pytest.raises(ConnectFailed) as failure:
                    await client.send(Request(Origin("https", "localhost", 443), b"GET", b"/", []), soon())
                assert failure.value.reason == ("refused" if reply is None else "network")
        await until(lambda: way_out.closed == way_out.accepted)


async def test_a_silent_egress_proxy(trusting: ssl.SSLContext) -> None:
    """Nothing was sent to the upstream: a failure to connect, not a timeout of its answer."""
    async with serve(Peer.gone) as way_out, transport(trusting, proxy=way_out.origin_url) as client:
        with pytest.raises(ConnectFailed) as failure:
            await client.send(Request(Origin("https", "localhost", 443), b"GET", b"/", []), soon(0.1))
        assert failure.value.reason == "timeout"
        await until(lambda: way_out.closed == way_out.accepted)


@pytest.mark.parametrize("value", [b"a\x01b", b"a\x7fb", b"\x1b[31m"])
async def test_control_characters_in_a_header_are_refused(value: bytes) -> None:
    async with serve(answers(OK.replace(b"\r\n\r\n", b"\r\nX-A: %b\r\n\r\n" % value))) as server:
        transport = HttpxTransport(max_connections=1, connect_timeout=20.0)
        with pytest.raises(UpstreamBroken):
            await fetch(transport, server.request())
        await transport.aclose()
