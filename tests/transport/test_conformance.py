"""What any transport owes its callers, held against real servers: answers, ends, times, limits, cancellation.

Every test runs on both adapters. Where they may differ, the test says so.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading

import pytest

from proxy.errors import ConnectFailed, UpstreamBroken, UpstreamTimeout
from proxy.transport.base import Origin, Request
from tests.transport.adapters import AnyTransport, MakeTransport, body_of, fetch, soon, until
from tests.transport.servers import Peer, answers, black_hole, refusing, serve, uvicorn_echo

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

OK = b"HTTP/1.1 200 OK\r\n"
LENGTH = OK + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = (
    OK + b"Transfer-Encoding: chunked\r\nX-Empty:\r\nX-Pad: \t v \t\r\n\r\n"
    b"3;ext=1\r\nhel\r\n2\r\nlo\r\n0\r\nX-Trailer: dropped\r\n\r\n"
)
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"


# -- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "method", "status", "body", "reused"),
    [
        (LENGTH, b"POST", 200, b"hello", True),
        (OK + b"content-length: 0\r\n\r\n", b"POST", 200, b"", True),
        (CHUNKED, b"POST", 200, b"hello", True),
        (INTERIM + LENGTH, b"POST", 200, b"hello", True),
        (INTERIM + CHUNKED, b"GET", 200, b"hello", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"POST", 204, b"", True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", b"GET", 304, b"", True),
        (b"HTTP/1.1 500\r\nContent-Length: 6\r\n\r\nline\r\n", b"POST", 500, b"line\r\n", True),
        (b"HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno", b"POST", 404, b"no", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"POST", 200, b"ok", False),
    ],
)
async def test_body(
    make: MakeTransport, reply: bytes, method: bytes, status: int, body: bytes, *, reused: bool
) -> None:
    transport = make()
    async with serve(answers(reply)) as server:
        for _ in range(3):
            assert await fetch(transport, server.request(method)) == (status, body)
        assert server.accepted == (1 if reused else 3)


async def test_head_has_no_body(make: MakeTransport) -> None:
    transport = make()
    for reply in (LENGTH[:-5], CHUNKED[: CHUNKED.index(b"3;ext")], OK + b"Content-Length: 0\r\n\r\n", OK + b"\r\n"):
        async with serve(answers(reply)) as server:
            for _ in range(2):
                assert await fetch(transport, server.request(b"HEAD")) == (200, b"")


@pytest.mark.parametrize("end", ["fin", "reset"])
async def test_close_delimited(make: MakeTransport, end: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + b"X-A: b\r\n\r\nhel", b"lo")
        await asyncio.sleep(0.02)
        getattr(peer, end)()

    async with serve(script) as server:
        response = await make().send(server.request(), soon())
        if end == "fin":
            assert await body_of(response) == b"hello"
        else:  # a reset is never the regular end of anything
            with pytest.raises(UpstreamBroken):
                await body_of(response)


async def test_head_as_received(make: MakeTransport) -> None:
    reply = OK + b"Set-Cookie: a\r\nX-PAD: \t v \t\r\nset-cookie: b\r\nX-Empty:\r\nContent-Length: 0\r\n\r\n"
    async with serve(answers(reply)) as server:
        response = await make().send(server.request(), soon())
        await response.aclose()
    assert response.headers == [
        (b"set-cookie", b"a"),
        (b"x-pad", b"v"),
        (b"set-cookie", b"b"),
        (b"x-empty", b""),
        (b"content-length", b"0"),
    ]


async def test_request_as_written(make: MakeTransport) -> None:
    transport = make()
    async with serve(answers(LENGTH)) as server:
        for method, body, length in ((b"POST", b"{}", ["2"]), (b"POST", b"", ["0"]), (b"GET", b"", [])):
            headers = [(b"x-a", b"1"), (b"accept", b"*/*"), (b"x-a", b"2")]
            await fetch(transport, Request(server.origin, method, b"/a%2Fb/'c'?q=%7e&r=|", headers, body))
            received = server.requests[-1]
            assert received.head.startswith(method + b" /a%2Fb/'c'?q=%7e&r=| HTTP/1.1\r\n")
            assert received.body == body
            assert received.header("content-length") == length
            assert received.header("host") == [f"127.0.0.1:{server.port}"]
            assert received.header("x-a") == ["1", "2"]
            names = {line.partition(b":")[0].lower() for line in received.head.split(b"\r\n")[1:-2]}
            assert names - {b"content-length"} == {b"host", b"x-a", b"accept"}


@pytest.mark.parametrize(
    "spoiled",
    [
        {"headers": [(b"x-a", b"1\r\nx-b: 2")]},
        {"headers": [(b"x-a\n", b"1")]},
        {"headers": [(b"x-a", b"\0")]},
        {"target": b"/a b"},
        {"target": b"/a HTTP/1.1\r\nx: y"},
        {"method": b"GET /x HTTP/1.1\r\n"},
    ],
)
async def test_an_injected_request_does_not_leave(make: MakeTransport, spoiled: dict[str, object]) -> None:
    transport = make()
    async with serve(answers(LENGTH)) as server:
        fields = {"origin": server.origin, "method": b"GET", "target": b"/", "headers": [], **spoiled}
        with pytest.raises(ValueError, match="control character"):
            await transport.send(Request(**fields), soon())  # type: ignore[arg-type]
        assert server.accepted == 0


@pytest.mark.parametrize("reply", [LENGTH, INTERIM + CHUNKED], ids=["length", "interim+chunked"])
async def test_split_at_every_byte(make: MakeTransport, reply: bytes) -> None:
    splits = iter(range(1, len(reply)))

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            at = next(splits)
            await peer.send(reply[:at], reply[at:])

    transport = make()
    async with serve(script) as server:
        for _ in range(1, len(reply)):
            assert await fetch(transport, server.request()) == (200, b"hello")
        # A split inside the last empty line may cost a connection, never more.
        assert server.accepted <= 5


@pytest.mark.parametrize("reply", [LENGTH, INTERIM + CHUNKED], ids=["length", "interim+chunked"])
async def test_byte_by_byte(make: MakeTransport, reply: bytes) -> None:
    async with serve(answers(*[bytes([byte]) for byte in reply])) as server:
        assert await fetch(make(), server.request()) == (200, b"hello")


async def test_pieces_come_as_they_arrive(make: MakeTransport) -> None:
    told = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        for piece in (b"5\r\nfirst\r\n", b"6\r\nsecond\r\n", b"0\r\n\r\n"):
            await told.wait()
            told.clear()
            await peer.send(piece)

    async with serve(script) as server:
        response = await make().send(server.request(), soon())
        for expected in (b"first", b"second", b""):
            told.set()
            assert await response.read(soon()) == expected
        await response.aclose()


async def test_uvicorn(make: MakeTransport) -> None:
    """A real server: lengths and chunks of many sizes, one at a time and at once, small and larger than any buffer."""
    transport = make(max_connections=4)
    with uvicorn_echo() as origin:

        async def one(size: int, piece: int) -> None:
            body = bytes(range(256)) * (size // 256 + 1)
            query = b"?%d" % piece if piece else b""
            assert await fetch(transport, Request(origin, b"POST", b"/" + query, [], body[:size])) == (200, body[:size])

        await asyncio.gather(*[one(size, piece) for size in (0, 1, 1000, 70_000) for piece in (0, 1000, 65_536)])
        await asyncio.gather(*[one(3_000_000, piece) for piece in (0, 100_000)])


# -- connecting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "reason"),
    [
        (refusing, "refused"),
        (lambda: Origin("http", "label" * 20 + ".invalid", 80), "dns"),
        (lambda: Origin("https", "127.0.0.1", refusing().port), "refused"),
        (lambda: Origin("http", "localhost", refusing().port), "refused"),
    ],
)
async def test_connect_fails(make: MakeTransport, origin: type[Origin], reason: str) -> None:
    transport = make(max_connections=1)
    for _ in range(3):  # the one slot comes back each time
        with pytest.raises(ConnectFailed) as failure:
            await transport.send(Request(origin(), b"GET", b"/", []), soon())
        assert failure.value.reason == reason


@pytest.mark.parametrize("first", ["connect_timeout", "deadline"])
async def test_connect_times_out(make: MakeTransport, first: str) -> None:
    transport = make(max_connections=1, connect_timeout=0.1 if first == "connect_timeout" else 20.0)
    with black_hole() as origin:
        for _ in range(2):
            with pytest.raises(ConnectFailed) as failure:
                await transport.send(
                    Request(origin, b"GET", b"/", []), soon(20.0 if first == "connect_timeout" else 0.1)
                )
            assert failure.value.reason == "timeout"


async def test_tls(make: MakeTransport, serving: ssl.SSLContext) -> None:
    transport = make()
    big = b"x" * 300_000
    async with serve(answers(OK + b"Content-Length: %d\r\n\r\n" % len(big) + big), tls=serving) as server:
        for _ in range(3):
            assert await fetch(transport, server.request(body=big)) == (200, big)
        assert server.accepted == 1
        assert server.requests[0].body == big
        assert server.requests[0].header("host") == [f"localhost:{server.port}"]


async def test_tls_wrong_host(make: MakeTransport, serving: ssl.SSLContext) -> None:
    async with serve(answers(LENGTH), tls=serving) as server:
        request = Request(Origin("https", "127.0.0.1", server.port), b"GET", b"/", [])
        with pytest.raises(ConnectFailed) as failure:
            await make().send(request, soon())
    assert failure.value.reason == "tls"
    assert not server.requests


async def test_tls_untrusted(make: MakeTransport, serving: ssl.SSLContext) -> None:
    async with serve(answers(LENGTH), tls=serving) as server:
        with pytest.raises(ConnectFailed) as failure:
            await make(ssl_context=None).send(server.request(), soon())
    assert failure.value.reason == "tls"
    assert not server.requests


async def test_tls_not_spoken(make: MakeTransport) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(b"220 smtp.example.org ESMTP\r\n")
        await peer.gone()

    async with serve(script) as server:
        with pytest.raises(ConnectFailed) as failure:
            await make().send(Request(Origin("https", "localhost", server.port), b"GET", b"/", []), soon())
    assert failure.value.reason == "tls"


async def test_tls_handshake_times_out(make: MakeTransport) -> None:
    async with serve(Peer.gone) as server:
        with pytest.raises(ConnectFailed) as failure:
            await make(connect_timeout=0.1).send(
                Request(Origin("https", "localhost", server.port), b"GET", b"/", []), soon()
            )
        assert failure.value.reason == "timeout"
        await until(lambda: server.closed == server.accepted)


@pytest.mark.parametrize("notified", [True, False])
async def test_tls_close_delimited(
    make: MakeTransport, adapter: str, serving: ssl.SSLContext, *, notified: bool
) -> None:
    """Without TLS's own goodbye a body that ends by closing may have been cut by anybody."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + b"\r\nhello")
        if notified:
            peer.writer.close()
            await peer.gone()
        else:
            peer.writer.transport.abort()

    async with serve(script, tls=serving) as server:
        response = await make().send(server.request(), soon())
        if notified or adapter == "httpx":  # whose library does not tell the two ends apart
            assert await body_of(response) == b"hello"
        else:
            with pytest.raises(UpstreamBroken):
                await body_of(response)


# -- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"HTT", OK + b"X-A: ", INTERIM])
async def test_no_head_in_time(make: MakeTransport, sent: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(sent)
        await peer.gone()

    transport = make(max_connections=1)
    async with serve(script) as server:
        with pytest.raises(UpstreamTimeout):
            await transport.send(server.request(replayable=True), soon(0.1))
        await until(lambda: server.closed == 1)
        assert len(server.requests) == 1


async def test_no_piece_in_time(make: MakeTransport) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + b"Content-Length: 10\r\n\r\n", b"hello")
        await peer.gone()

    transport = make(max_connections=1)
    async with serve(script) as server:
        response = await transport.send(server.request(), soon())
        assert await response.read(soon()) == b"hello"
        for _ in range(2):  # an error stays
            with pytest.raises(UpstreamTimeout):
                await response.read(soon(0.05))
        await until(lambda: server.closed == 1)
        await response.aclose()


async def test_each_read_has_its_own_deadline(make: MakeTransport) -> None:
    """Nearer and farther deadlines in turn: a far one must not shadow a near one, nor a near one outlive its read."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + b"Content-Length: 10\r\n\r\n")
        for _ in range(3):
            await asyncio.sleep(0.1)
            await peer.send(b"xx")
        await peer.gone()

    async with serve(script) as server:
        response = await make().send(server.request(), soon(300))
        assert await response.read(float("inf")) == b"xx"
        assert await response.read(soon(10)) == b"xx"
        assert await response.read(soon(300)) == b"xx"
        with pytest.raises(UpstreamTimeout):
            await response.read(soon(0.05))


# -- broken answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["fin", "reset"])
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"HTTP/1.1 20",
        OK + b"Content-Le",
        INTERIM,
        LENGTH[:-1],
        OK + b"Content-Length: 10\r\n\r\n",
        CHUNKED[:-1],
        CHUNKED[: CHUNKED.index(b"lo\r\n0")],
    ],
)
async def test_early_end(make: MakeTransport, sent: bytes, end: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(sent)
        await asyncio.sleep(0.01)
        getattr(peer, end)()

    transport = make(max_connections=1)
    async with serve(script) as server:
        with pytest.raises(UpstreamBroken) as failure:
            await fetch(transport, server.request(replayable=True))
        assert failure.value.reason in {"closed", "reset", "protocol"}
        assert len(server.requests) == 1  # on a fresh connection nothing is resent


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"RTSP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        OK + b"no colon\r\n\r\n",
        OK + b"X-A : 1\r\n\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        OK + b"Content-Length: -5\r\n\r\n",
        OK + b"Content-Length: 0x5\r\n\r\nhello",
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nhello",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloX\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        OK + b"X-A: " + b"a" * 200_000 + b"\r\nContent-Length: 0\r\n\r\n",
        OK + b"X-A: 1\r\n" * 30_000 + b"\r\n",
        OK + b"X-A: " + b"a" * 1_000_000,
    ],
)
async def test_bad_framing(make: MakeTransport, reply: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(reply)
        await peer.gone()

    transport = make(max_connections=1)
    async with serve(script) as server:
        with pytest.raises(UpstreamBroken) as failure:
            await fetch(transport, server.request(replayable=True))
        assert failure.value.reason == "protocol"
        await until(lambda: server.closed == 1)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "surplus",
    [b"X", b"\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"HTTP/1.1 200 OK\r\nContent-Le"],
)
@pytest.mark.parametrize("reply", [LENGTH, CHUNKED, b"HTTP/1.1 204 No Content\r\n\r\n"])
@pytest.mark.parametrize("together", [True, False])
async def test_surplus_is_never_an_answer(make: MakeTransport, reply: bytes, surplus: bytes, *, together: bool) -> None:
    """Bytes after a complete response: it is delivered, and its connection is not used again."""
    sent = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(*([reply + surplus] if together else [reply, surplus]))
        sent.set()
        await peer.gone()

    transport = make(max_connections=1, keepalive=60.0)
    async with serve(script) as server:
        first = await fetch(transport, server.request())
        await sent.wait()
        await until(lambda: transport.stats().idle == 0)  # seen, where the adapter tells
        assert await fetch(transport, server.request()) == first
        assert [request.connection for request in server.requests] == [0, 1]


# -- flow ------------------------------------------------------------------------------------------------------------


async def test_a_slow_reader_holds_little(make: MakeTransport) -> None:
    """What a reader does not take stays with the server: its writes stop, though it has far more to say."""
    total, written = 64 * 1024 * 1024, 0

    async def script(peer: Peer) -> None:
        nonlocal written
        await peer.request()
        await peer.send(OK + b"Content-Length: %d\r\n\r\n" % total)
        while written < total:
            await peer.send(b"x" * 65_536)
            written += 65_536

    async with serve(script) as server:
        response = await make().send(server.request(), soon())
        before = -1
        while written != before:  # until the server stands still
            before = written
            await asyncio.sleep(0.1)
        assert written < total / 4
        assert len(await response.read(soon())) <= 1024 * 1024
        assert sum([len(piece) async for piece in _pieces(response)]) > total / 2
        await response.aclose()


async def _pieces(response: object):  # type: ignore[no-untyped-def]
    while piece := await response.read(soon()):  # type: ignore[attr-defined]
        yield piece


async def test_a_server_that_does_not_read(make: MakeTransport) -> None:
    stalled = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await stalled.wait()

    transport = make(max_connections=1)
    async with serve(script) as server:
        with pytest.raises(UpstreamTimeout):
            await transport.send(server.request(body=b"x" * 50_000_000), soon(0.3))
        stalled.set()
        assert transport.stats().in_use == 0


@pytest.mark.parametrize("end", ["fin", "reset"])
async def test_an_answer_before_the_request_is_sent(make: MakeTransport, adapter: str, end: str) -> None:
    """413 while the body is still going out. The answer counts; the connection, with half a request on it, does not."""
    reply = b"HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\n\r\nhello"

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(reply)
        if end == "fin":  # says no, and lets the client find out
            await asyncio.sleep(0.2)
        await asyncio.sleep(0.02)
        getattr(peer, end)()

    transport = make(max_connections=1)
    async with serve(script) as server:
        for _ in range(2):
            try:
                assert await fetch(transport, server.request(body=b"x" * 20_000_000)) == (413, b"hello")
            except UpstreamBroken:
                assert adapter == "httpx"  # whose library does not read while it writes
        assert server.accepted == 2


# -- the pool --------------------------------------------------------------------------------------------------------


async def test_the_pool_is_bounded_and_fair(make: MakeTransport) -> None:
    now, most = 0, 0
    order: list[bytes] = []

    async def script(peer: Peer) -> None:
        nonlocal now, most
        while True:
            received = await peer.request()
            order.append(received.body)
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.005)
            now -= 1
            await peer.send(LENGTH)

    transport = make(max_connections=3)
    async with serve(script) as server:
        bodies = [b"%02d" % number for number in range(30)]
        tasks = [asyncio.create_task(fetch(transport, server.request(body=body))) for body in bodies]
        await until(lambda: transport.stats().waiting == 27)
        assert await asyncio.gather(*tasks) == [(200, b"hello")] * 30
        assert (server.accepted, most) == (3, 3)
        for place, body in enumerate(order):  # first come, first served, but for the three that run side by side
            assert abs(int(body) - place) < 3


async def test_no_slot_in_time(make: MakeTransport) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + b"Content-Length: 5\r\n\r\n")
        await peer.gone()

    transport = make(max_connections=1)
    async with serve(script) as server:
        response = await transport.send(server.request(), soon())
        for _ in range(2):
            with pytest.raises(ConnectFailed) as failure:
                await transport.send(server.request(), soon(0.05))
            assert failure.value.reason == "pool"
        assert (transport.stats().in_use, transport.stats().waiting) == (1, 0)
        await response.aclose()
        await response.aclose()
        assert transport.stats().in_use == 0
        second = await transport.send(server.request(), soon())
        await second.aclose()
        assert server.accepted == 2


async def test_origins_do_not_share_a_bound(make: MakeTransport) -> None:
    transport = make(max_connections=1)
    async with serve(answers(OK + b"Content-Length: 9\r\n\r\n")) as one, serve(answers(LENGTH)) as other:
        held = await transport.send(one.request(), soon())
        assert await fetch(transport, other.request()) == (200, b"hello")
        await held.aclose()


async def test_idle_connections_end(make: MakeTransport) -> None:
    """Too old, or closed by the server: neither costs the next request anything."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(LENGTH)
        if peer.number == 1:
            peer.fin()
        await peer.gone()

    transport = make(max_connections=1, keepalive=0.1)
    async with serve(script) as server:
        await fetch(transport, server.request())
        await asyncio.sleep(0.15)
        await fetch(transport, server.request())
        await asyncio.sleep(0.02)
        await fetch(transport, server.request())
        assert [request.connection for request in server.requests] == [0, 1, 2]


@pytest.mark.parametrize(
    ("end", "replayable", "partial", "wait", "resent"),
    [
        ("fin", True, b"", 0.0, True),
        ("reset", True, b"", 0.0, True),
        ("fin", False, b"", 0.0, False),  # it may have been acted on
        ("reset", False, b"", 0.0, False),
        ("fin", True, b"HTTP/1.1 20", 0.0, False),  # it was acted on
        ("reset", True, b"H", 0.0, False),
        ("fin", True, b"", 1.1, False),  # too late to be the keep-alive race
    ],
)
async def test_a_dead_connection_is_replaced_once(
    make: MakeTransport, adapter: str, end: str, partial: bytes, wait: float, *, replayable: bool, resent: bool
) -> None:
    """The keep-alive race: the server gives up an idle connection just as the next request is on its way."""

    async def script(peer: Peer) -> None:
        received = await peer.request()
        while received.body != b"race":
            await peer.send(LENGTH)
            received = await peer.request()
        await peer.send(partial)
        await asyncio.sleep(wait + 0.01)
        getattr(peer, end)()

    transport = make(max_connections=2)
    async with serve(script) as server:
        await asyncio.gather(*[fetch(transport, server.request()) for _ in range(2)])
        with pytest.raises(UpstreamBroken):  # the fresh connection dies as well: no second resend
            await fetch(transport, server.request(body=b"race", replayable=replayable))
        races = [request.connection for request in server.requests if request.body == b"race"]
        if resent and adapter == "http1":
            assert len(races) == 2
            assert races[1] == 2, "resent on an idle connection, which may be as dead"
        else:
            assert len(races) == 1
        assert await fetch(transport, server.request()) == (200, b"hello")


@pytest.mark.parametrize("replayable", [True, False])
@pytest.mark.parametrize("end", ["fin", "reset"])
async def test_an_end_that_the_loop_has_not_seen(make: MakeTransport, end: str, *, replayable: bool) -> None:
    """The idle connection ended while the loop was busy. A request that may be sent only once gets through, too."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = threading.Event()

        def serve_two() -> None:
            for number in range(2):
                with listener.accept()[0] as sock:
                    sock.recv(65536)
                    sock.sendall(LENGTH)
                    ended.wait()
                    if end == "reset" and number == 0:
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if number == 0:
                    gone.set()

        gone = threading.Event()
        server = threading.Thread(target=serve_two)
        server.start()
        transport = make(max_connections=1)
        request = Request(Origin("http", *listener.getsockname()), b"POST", b"/", [], b"{}", replayable=replayable)
        assert await fetch(transport, request) == (200, b"hello")
        ended.set()
        gone.wait()  # and the loop stands still
        assert await fetch(transport, request) == (200, b"hello")
        server.join()


# -- cancellation ----------------------------------------------------------------------------------------------------


async def _cancelled(transport: AnyTransport, request: Request, *, read: bool = False) -> None:
    """Starts a request, lets it come to its point of waiting, and cancels it there."""

    async def run() -> None:
        response = await transport.send(request, soon())
        while read and await response.read(soon()):
            pass
        await response.aclose()  # not in a `finally`: a cancelled read has given up by itself

    task = asyncio.create_task(run())
    await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("phase", ["connect", "handshake", "write", "head", "interim", "body", "chunks"])
async def test_cancelled(make: MakeTransport, adapter: str, phase: str) -> None:
    """Whatever it waits for: the slot is free at once, the server sees the end, the next request is served."""
    sent = {"interim": INTERIM, "body": OK + b"Content-Length: 9\r\n\r\nhel", "chunks": CHUNKED[:-9]}.get(phase, b"")

    async def script(peer: Peer) -> None:
        if phase == "write":
            await peer.reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.1)
        elif phase != "handshake":
            await peer.request()
        await peer.send(sent)
        await peer.gone()

    transport = make(max_connections=1)
    async with serve(script) as server:
        origin = Origin("https", "localhost", server.port) if phase == "handshake" else server.origin
        request = Request(origin, b"POST", b"/", [], b"x" * (30_000_000 if phase == "write" else 10))
        if phase == "connect":
            with black_hole() as request.origin:
                await _cancelled(transport, request)
                await _cancelled(transport, request)
        else:
            await _cancelled(transport, request, read=True)
            await _cancelled(transport, request, read=True)
        if adapter == "http1":
            assert transport.stats().in_use == 0
        await until(lambda: transport.stats().in_use == 0 and server.closed == server.accepted)


async def test_cancelled_while_waiting_for_a_slot(make: MakeTransport) -> None:
    transport = make(max_connections=1)
    answer = asyncio.Event()

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await answer.wait()
            await peer.send(LENGTH)

    async with serve(script) as server:
        first = asyncio.create_task(fetch(transport, server.request()))
        waiting = [asyncio.create_task(fetch(transport, server.request())) for _ in range(3)]
        await until(lambda: transport.stats().waiting == 3)
        waiting[0].cancel()
        waiting[1].cancel()
        await asyncio.sleep(0)
        answer.set()
        assert await asyncio.gather(first, waiting[2]) == [(200, b"hello")] * 2


async def test_a_slot_handed_to_a_cancelled_waiter_goes_on(make: MakeTransport) -> None:
    """The classical leak: the slot is handed over and its new owner cancelled in the same turn of the loop."""
    transport = make(max_connections=1)
    async with serve(answers(LENGTH[:-1])) as server:
        for _ in range(20):
            response = await transport.send(server.request(), soon())
            waiting = asyncio.create_task(transport.send(server.request(), soon()))
            await until(lambda: transport.stats().waiting == 1)
            await response.aclose()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(lambda: transport.stats().in_use == 0)


async def test_closing_the_transport(make: MakeTransport) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + b"Content-Length: 9\r\n\r\nhel")
        await peer.gone()

    transport = make(max_connections=1)
    async with serve(script) as server:
        response = await transport.send(server.request(), soon())
        assert await response.read(soon()) == b"hel"
        reading = asyncio.create_task(response.read(soon()))
        await asyncio.sleep(0.01)
        await transport.aclose()
        with pytest.raises(UpstreamBroken):
            await reading
        await response.aclose()
        with pytest.raises(ConnectFailed):
            await transport.send(Request(Origin("http", "127.0.0.2", server.port), b"GET", b"/", []), soon())
        await until(lambda: server.closed == 1)
