"""Campaigns of random cancellation: what they leave behind must be nothing.

Short forms run always; `BREAKWATER_FAULTS=1` selects the long ones (60 seconds; 100,000 requests). A failure names its
seed.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter

import pytest

from proxy.errors import ProxyError
from proxy.transport.base import Request
from tests.transport.adapters import AnyTransport, MakeTransport, fetch, soon, until
from tests.transport.servers import Peer, Script, Server, serve

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

LONG = bool(os.environ.get("BREAKWATER_FAULTS"))
SECONDS = 60.0 if LONG else 2.0
REQUESTS = {"http1": 100_000 if LONG else 3_000, "httpx": 20_000 if LONG else 1_000}
WORKERS = 40
SLOTS = 10


def whims(rng: random.Random, busy: set[Peer]) -> Script:
    """A server of moods: prompt, slow, in pieces, closing, resetting, babbling on. Each answer names its request.

    `busy` holds the connections on which it may still say something."""

    async def script(peer: Peer) -> None:
        try:
            while True:
                received = await peer.request()
                busy.add(peer)
                if not await answer(peer, received.header("x-echo")[0].encode()):
                    return
                busy.discard(peer)
        finally:
            busy.discard(peer)

    async def answer(peer: Peer, name: bytes) -> bool:
        """False: the connection is over."""
        await asyncio.sleep(rng.choice((0, 0, 0.001, 0.005, 0.02)))
        plain = b"HTTP/1.1 200 OK\r\nX-Echo: %b\r\nContent-Length: %d\r\n\r\n%b" % (name, len(name), name)
        match rng.randrange(12) if name.isdigit() else 0:
            case 0 | 1 | 2 | 3:
                await peer.send(plain)
            case 4:
                at = rng.randrange(1, len(plain))
                await peer.send(plain[:at], plain[at:])
            case 5 | 6:
                head = b"HTTP/1.1 200 OK\r\nX-Echo: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % name
                await peer.send(head, *[b"1\r\n%c\r\n" % byte for byte in name], b"0\r\n\r\n")
            case 7:
                await peer.send(b"HTTP/1.1 103 Early Hints\r\nX-Echo: wrong\r\n\r\n", plain)
            case 8:  # an answer that nobody asked for
                await peer.send(plain + plain.replace(name, b"x" * len(name)))
            case 9:  # (a whole answer that comes this late could be told from the next one's by nobody)
                await peer.send(plain, b"babble")
            case 10:
                await peer.send(plain.replace(b"\r\nX", b"\r\nConnection: close\r\nX", 1))
                peer.fin()
            case 11:
                await peer.send(plain[: rng.randrange(len(plain))])
                peer.reset()
                return False
        return True

    return script


def named(server: Server, name: str) -> Request:
    return Request(server.origin, b"POST", b"/", [(b"x-echo", name.encode())], b"{}", replayable=True)


async def one(transport: AnyTransport, request: Request, rng: random.Random) -> None:
    """One request, read to the end or left in the middle. A wrong answer is an AssertionError."""
    name = request.headers[0][1]
    response = await transport.send(request, soon(rng.choice((0.002, 0.05, 20.0, 20.0, 20.0, 20.0))))
    try:
        echoed = [value for header, value in response.headers if header == b"x-echo"]
        assert echoed == [name], f"{name!r} got the head of {echoed!r}"
        body = b""
        while piece := await response.read(soon(rng.choice((0.002, 20.0, 20.0, 20.0)))):
            body += piece
            assert name.startswith(body), f"{name!r} got the body of {body!r}"
            if rng.random() < 0.02:
                return
        assert body == name
    finally:
        await response.aclose()


async def cancelled_at_random(transport: AnyTransport, request: Request, rng: random.Random) -> str:
    """`done`, `cancelled`, or the name of the transport's error."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(one(transport, request, rng))
    timers = []
    if rng.random() < 0.35:
        at = rng.choice((0.0, rng.random() * 0.002, rng.random() * 0.03))
        timers = [loop.call_later(at, task.cancel) for _ in range(rng.choice((1, 1, 1, 2)))]
    await asyncio.wait([task])
    for timer in timers:
        timer.cancel()
    if task.cancelled():
        return "cancelled"
    error = task.exception()
    if error is None:
        return "done"
    if isinstance(error, ProxyError):
        return type(error).__name__
    raise error


async def settled(transport: AnyTransport, server: Server, busy: set[Peer]) -> None:
    """After the storm: no slot is lost, no socket left open beyond the idle ones, and everything is served."""
    await until(lambda: transport.stats().in_use == transport.stats().waiting == 0)
    # What is still babbled behind an answer would be taken for the next one's, and rightly so.
    await until(lambda: not busy)
    for _ in range(3):  # all of it is in the sockets: a turn of the loop reads it
        await asyncio.sleep(0)
    good = [fetch(transport, named(server, f"good-{number}")) for number in range(100)]
    assert await asyncio.gather(*good) == [(200, b"good-%d" % number) for number in range(100)]
    stats = transport.stats()
    assert (stats.in_use, stats.waiting) == (0, 0)
    assert stats.idle <= SLOTS
    await until(lambda: server.accepted - server.closed <= SLOTS)


async def test_cancellations_lose_no_slot(make: MakeTransport) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    transport = make(max_connections=SLOTS)
    outcomes: Counter[str] = Counter()
    async with serve(whims(rng, busy := set())) as server:
        end = soon(SECONDS)

        async def work() -> None:
            while asyncio.get_running_loop().time() < end:
                request = named(server, str(rng.randrange(10**12)))
                outcomes[await cancelled_at_random(transport, request, rng)] += 1

        await asyncio.gather(*[work() for _ in range(WORKERS)])
        print(f"seed {seed}: {dict(outcomes)}; connections: {server.accepted}")
        assert outcomes["done"] > WORKERS, f"seed {seed}: {outcomes}"
        assert outcomes["cancelled"] > WORKERS, f"seed {seed}: {outcomes}"
        await settled(transport, server, busy)


async def test_no_answer_reaches_another_request(make: MakeTransport, adapter: str) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    transport = make(max_connections=SLOTS)
    names = iter(range(10**9, 10**9 + REQUESTS[adapter]))
    outcomes: Counter[str] = Counter()
    async with serve(whims(rng, busy := set())) as server:

        async def work() -> None:
            for name in names:
                outcomes[await cancelled_at_random(transport, named(server, str(name)), rng)] += 1

        await asyncio.gather(*[work() for _ in range(WORKERS)])
        print(f"seed {seed}: {dict(outcomes)}; connections: {server.accepted}")
        assert outcomes.total() == REQUESTS[adapter]
        assert outcomes["done"] > REQUESTS[adapter] / 10, f"seed {seed}: {outcomes}"
        await settled(transport, server, busy)
