"""The fault proxy itself: each of its faults, as a client and a server on real sockets see it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from tests.faults.fleet import until
from tests.faults.wire import CLEAN, DEAD, HUNG, Ending, Faults, Link, Plan, Wire, overwritten, wired

pytestmark = pytest.mark.anyio

PATIENCE = 20.0
TEXT = bytes(range(256)) * 40


@dataclass
class Side:
    """One end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def exactly(self, count: int) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readexactly(count)

    async def rest(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.reader.read()

    async def nothing_comes(self) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await self.reader.read(1)
                return False
        return True


@dataclass
class Net:
    wire: Wire
    servers: list[Side] = field(default_factory=list)
    clients: list[Side] = field(default_factory=list)

    async def connect(self) -> tuple[Side, Side, Link]:
        """A client, its server, and the link between them."""
        count = len(self.wire.links)
        client = Side(*await asyncio.open_connection("127.0.0.1", self.wire.port))
        self.clients.append(client)
        await until(lambda: len(self.wire.links) > count and len(self.servers) > count, "the connection")
        return client, self.servers[count], self.wire.links[count]


@contextlib.asynccontextmanager
async def net(script: Callable[[int], Plan] | None = None) -> AsyncIterator[Net]:
    """A server that does what the test does, behind a fault proxy. Afterwards the proxy has nothing left over."""
    servers: list[Side] = []
    before = asyncio.all_tasks()
    listener = await asyncio.start_server(lambda *pair: servers.append(Side(*pair)), "127.0.0.1", 0)
    try:
        async with wired(listener.sockets[0].getsockname()[1], script) as wire:
            found = Net(wire, servers)
            yield found
    finally:
        listener.close()
        for side in (*servers, *found.clients):
            side.writer.transport.abort()
        await listener.wait_closed()
    assert not wire.live
    await until(lambda: asyncio.all_tasks() <= before, "the tasks to end")


async def test_without_faults_everything_passes_both_ways_and_ends_where_it_ended() -> None:
    async with net() as found:
        client, server, link = await found.connect()
        client.writer.write(TEXT * 100)
        client.writer.write_eof()
        assert await server.rest() == TEXT * 100
        server.writer.write(TEXT)
        server.writer.close()
        assert await client.rest() == TEXT
        await until(lambda: link.over, "the link to end")
        assert (link.up.passed, link.down.passed) == (len(TEXT) * 100, len(TEXT))


async def test_latency_delays_each_byte_once_and_keeps_the_order() -> None:
    async with net(lambda _: Plan(down=Faults(latency=0.1, jitter=0.05))) as found:
        client, server, _ = await found.connect()
        began = time.monotonic()
        for piece in range(20):
            server.writer.write(bytes([piece]))
            await asyncio.sleep(0.005)
        assert await client.exactly(1) == b"\0"
        assert time.monotonic() - began >= 0.1
        assert await client.exactly(19) == bytes(range(1, 20))
        assert time.monotonic() - began < 20 * 0.1  # they travel at the same time, not one after the other
        client.writer.write(b"now")  # the other way is as fast as ever
        assert await server.exactly(3) == b"now"


async def test_bandwidth_is_limited_from_the_first_byte() -> None:
    async with net(lambda _: Plan(down=Faults(bytes_per_second=50_000))) as found:
        client, server, _ = await found.connect()
        began = time.monotonic()
        server.writer.write(TEXT)
        assert await client.exactly(len(TEXT)) == TEXT
        assert time.monotonic() - began >= len(TEXT) / 50_000 * 0.95


@pytest.mark.parametrize("count", [0, 1, 1000, len(TEXT)])
async def test_a_reset_comes_after_exactly_so_many_bytes(count: int) -> None:
    async with net(lambda _: Plan(down=Faults(after=count, then=Ending.RESET))) as found:
        client, server, link = await found.connect()
        if count:  # else it has come already
            server.writer.write(TEXT)
            assert await client.exactly(count) == TEXT[:count]
        with pytest.raises(ConnectionResetError):
            await client.rest()
        with pytest.raises(ConnectionResetError):
            await server.rest()
        await until(lambda: link.over, "the link to end")


async def test_a_half_close_ends_one_way_and_leaves_the_other() -> None:
    async with net(lambda _: Plan(down=Faults(after=1000, then=Ending.FIN))) as found:
        client, server, link = await found.connect()
        server.writer.write(TEXT)
        assert await client.rest() == TEXT[:1000]
        client.writer.write(TEXT)
        assert await server.exactly(len(TEXT)) == TEXT
        assert not link.over
        client.writer.close()
        assert await server.rest() == b""
        server.writer.close()
        await until(lambda: link.over, "the link to end")


async def test_a_stall_holds_what_comes_until_the_faults_change() -> None:
    async with net(lambda _: Plan(down=Faults(after=1000))) as found:
        client, server, link = await found.connect()
        server.writer.write(TEXT)
        assert await client.exactly(1000) == TEXT[:1000]
        assert await client.nothing_comes()
        link.down.faults = CLEAN
        assert await client.exactly(len(TEXT) - 1000) == TEXT[1000:]


async def test_a_stall_is_felt_by_who_sends() -> None:
    async with net(lambda _: Plan(down=Faults(after=0))) as found:
        _, server, link = await found.connect()
        server.writer.write(bytes(64_000_000))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await server.writer.drain()
        assert link.down.passed == 0


async def test_what_is_dropped_never_comes() -> None:
    async with net(lambda _: Plan(down=Faults(after=1000, then=Ending.DROP))) as found:
        client, server, link = await found.connect()
        server.writer.write(TEXT)
        await until(lambda: link.down.dropped == len(TEXT) - 1000, "the rest to be dropped")
        assert await client.exactly(1000) == TEXT[:1000]
        assert await client.nothing_comes()
        link.down.faults = CLEAN
        server.writer.write(b"again")
        assert await client.exactly(5) == b"again"


@pytest.mark.parametrize("then", [Ending.STALL, Ending.DROP])
async def test_a_link_is_over_when_the_receiver_of_a_stalled_way_leaves(then: Ending) -> None:
    async with net(lambda _: Plan(down=Faults(after=10, then=then))) as found:
        client, server, link = await found.connect()
        server.writer.write(TEXT)
        await client.exactly(10)
        client.writer.close()
        assert await server.rest() == b""
        server.writer.close()
        await until(lambda: link.over, "the link to end")


@pytest.mark.parametrize("rate", [float("inf"), 1_000_000])
async def test_bytes_are_altered_where_it_was_said(rate: float) -> None:
    corrupt = overwritten(5119, b"\xff\xfe\xfd")  # across pieces, where they are small
    async with net(lambda _: Plan(down=Faults(corrupt=corrupt, bytes_per_second=rate))) as found:
        client, server, _ = await found.connect()
        server.writer.write(TEXT)
        assert await client.exactly(len(TEXT)) == TEXT[:5119] + b"\xff\xfe\xfd" + TEXT[5122:]


async def test_the_script_goes_by_the_connections_number_and_may_change() -> None:
    async with net(lambda number: Plan(down=Faults(after=number * 10, then=Ending.FIN))) as found:
        for number in range(3):
            client, server, _ = await found.connect()
            server.writer.write(TEXT)
            assert await client.rest() == TEXT[: number * 10]
        found.wire.plan(Plan(down=Faults(after=7, then=Ending.FIN)))
        client, server, link = await found.connect()
        server.writer.write(TEXT)
        assert await client.rest() == TEXT[:7]
        assert found.wire.accepted == 4
        assert link in found.wire.live


async def test_a_plan_reaches_the_connections_that_are_there() -> None:
    async with net() as found:
        client, server, _ = await found.connect()
        server.writer.write(b"hello")
        assert await client.exactly(5) == b"hello"
        found.wire.plan(DEAD)
        with pytest.raises(ConnectionResetError):
            await client.rest()


async def test_hung_accepts_and_says_nothing_and_dead_resets() -> None:
    async with net(lambda number: (HUNG, DEAD)[number]) as found:
        client, server, _ = await found.connect()
        client.writer.write(b"?")
        server.writer.write(b"!")
        assert await client.nothing_comes()
        assert await server.nothing_comes()
        client, _, _ = await found.connect()
        with pytest.raises(ConnectionResetError):
            await client.rest()


async def test_who_leaves_with_a_reset_is_seen_by_the_other_as_a_reset() -> None:
    async with net() as found:
        client, server, link = await found.connect()
        link.reset()
        with pytest.raises(ConnectionResetError):
            await client.rest()
        with pytest.raises(ConnectionResetError):
            await server.rest()


async def test_a_port_that_refuses_and_listens_again() -> None:
    async with net() as found:
        client, _, _ = await found.connect()
        await found.wire.refuse()
        with pytest.raises(ConnectionResetError):
            await client.rest()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", found.wire.port)
        await found.wire.listen()
        client, server, _ = await found.connect()
        client.writer.write(b"back")
        assert await server.exactly(4) == b"back"
