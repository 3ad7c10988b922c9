"""A caller that leaves never shifts the answers of the others: each gets its own, or none."""

from __future__ import annotations

import asyncio
import os
from random import Random

import pytest

from proxy.store.address import parse_address
from proxy.store.base import Granted, StoreUnavailable
from proxy.store.dial import Dialer
from proxy.store.link import Link
from tests.conformance.stores import ask, settle, tenant
from tests.redis_server import RedisServer
from tests.store.faults import LONG_MS, TcpProxy, open_store, row_of

pytestmark = pytest.mark.anyio

CALLS = 100_000 if os.environ.get("BREAKWATER_FAULTS") else 20_000


@pytest.mark.slow
async def test_a_cancelled_command_never_gives_its_answer_to_another(redis_server: RedisServer) -> None:
    random = Random(20)
    async with TcpProxy(redis_server.port).running() as proxy:
        address = parse_address(f"redis://127.0.0.1:{proxy.port}")
        link = Link(Dialer(address, tag=b"", setup=LONG_MS / 1000), timeout=LONG_MS / 1000, texts={})
        answered = cancelled = lost = 0

        async def echo(number: int) -> None:
            nonlocal answered, cancelled, lost
            wanted = b"%d" % number
            try:
                assert await link.submit((b"ECHO", wanted)) == wanted
                answered += 1
            except asyncio.CancelledError:
                cancelled += 1
            except StoreUnavailable:
                lost += 1

        async def worker(first: int) -> None:
            for number in range(first, CALLS, 64):
                task = asyncio.ensure_future(echo(number))
                for _ in range(random.randrange(6)):
                    await asyncio.sleep(0)
                if random.random() < 0.5:
                    task.cancel()
                    await asyncio.sleep(0)
                else:
                    await task
                if random.random() < 0.002:
                    proxy.cut()

        await asyncio.gather(*(worker(first) for first in range(64)))
        await link.aclose()
    assert answered + cancelled + lost <= CALLS
    assert answered > CALLS // 3
    assert cancelled > CALLS // 10
    assert proxy.connections > 5, "and connections broke in between"


async def test_an_answer_that_nobody_asked_for_ends_the_connection() -> None:
    connections = 0

    async def talkative(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await reader.read(1 << 16):
            writer.write(b"+mine\r\n+nobody's\r\n")
        writer.close()

    server = await asyncio.start_server(talkative, "127.0.0.1", 0)
    address = parse_address(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    link = Link(Dialer(address, tag=b"", setup=LONG_MS / 1000), timeout=LONG_MS / 1000, texts={})
    for number in range(1, 4):
        assert await link.submit((b"PING",)) == b"mine"
        assert connections == number
    await link.aclose()
    server.close()


@pytest.mark.parametrize("said", [b"nonsense\r\n", b"$-7\r\n", b""])
async def test_an_answer_that_cannot_be_read_ends_the_connection(said: bytes) -> None:
    async def strange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(said)
        writer.close()

    server = await asyncio.start_server(strange, "127.0.0.1", 0)
    address = parse_address(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    link = Link(Dialer(address, tag=b"", setup=LONG_MS / 1000), timeout=LONG_MS / 1000, texts={})
    with pytest.raises(StoreUnavailable) as caught:
        await link.submit((b"PING",))
    assert (caught.value.reason, caught.value.uncertain) == ("closed", True)
    await link.aclose()
    server.close()


async def test_a_cancelled_reservation_is_undone_by_its_settlement_in_whatever_order(redis_server: RedisServer) -> None:
    scope, random = tenant(), Random(7)

    async def request(number: int) -> None:
        try:
            verdict = await store.reserve(ask(number, scope, tokens=number))
            assert isinstance(verdict, Granted)
            assert verdict.balances[0].row.held_tokens >= number
        finally:
            await asyncio.shield(asyncio.ensure_future(store.settle(settle(number, scope, requests=0))))

    async with open_store(redis_server.url, scope) as store:
        tasks = [asyncio.ensure_future(request(number)) for number in range(1, 400)]
        while pending := [task for task in tasks if not task.done()]:
            random.choice(pending).cancel()
            await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        row = await row_of(store, scope)
        assert (row.live, row.held_tokens, row.minute_tokens) == (0, 0, 0)
