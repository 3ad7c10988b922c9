"""The slots of one origin, without sockets: the same turn of the loop can be hit exactly here."""

from __future__ import annotations

import asyncio

import pytest

from proxy.errors import ConnectFailed
from proxy.transport.pool import Pool, PoolStats
from tests.transport.adapters import soon

pytestmark = pytest.mark.anyio


class Line:
    """The least that a pool can hold."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.open = True

    def usable(self) -> bool:
        return self.open

    def abort(self) -> None:
        self.open = False


def pool(limit: int = 1, keepalive: float = 60.0) -> Pool[Line]:
    return Pool(asyncio.get_running_loop(), limit, keepalive)


async def waiting(slots: Pool[Line], count: int = 1) -> list[asyncio.Task[Line | None]]:
    tasks = [asyncio.create_task(slots.acquire(soon())) for _ in range(count)]
    await asyncio.sleep(0)
    assert slots.stats().waiting == count
    return tasks


@pytest.mark.parametrize("given", ["connection", "dead connection", "bare slot"])
@pytest.mark.parametrize("others", [0, 1])
async def test_handed_over_and_cancelled_in_one_turn(given: str, others: int) -> None:
    slots = pool()
    line = Line()
    assert await slots.acquire(soon()) is None
    first, *rest = await waiting(slots, 1 + others)
    if given == "bare slot":
        slots.free()
    else:
        slots.put(line)
        line.open = given == "connection"
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    if others:
        assert await rest[0] is (line if given == "connection" else None)
        assert slots.stats() == PoolStats(in_use=1, idle=0, waiting=0)
    else:
        assert slots.stats() == PoolStats(in_use=0, idle=int(given == "connection"), waiting=0)


async def test_cancelled_then_handed_over_in_one_turn() -> None:
    slots = pool()
    assert await slots.acquire(soon()) is None
    first, second = await waiting(slots, 2)
    first.cancel()
    slots.free()
    assert await second is None
    with pytest.raises(asyncio.CancelledError):
        await first
    slots.free()
    assert slots.stats() == PoolStats(0, 0, 0)


async def test_a_waiter_that_times_out_and_is_cancelled_in_one_turn() -> None:
    slots = pool()
    assert await slots.acquire(soon()) is None
    task = asyncio.create_task(slots.acquire(soon(0.001)))
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    loop.call_at(soon(0.001), task.cancel)
    with pytest.raises((ConnectFailed, asyncio.CancelledError)):
        await task
    slots.free()
    assert slots.stats() == PoolStats(0, 0, 0)


async def test_nobody_overtakes_a_waiter() -> None:
    slots = pool()
    line = Line()
    assert await slots.acquire(soon()) is None
    (first,) = await waiting(slots)
    slots.put(line)
    assert slots.reuse() is None
    with pytest.raises(ConnectFailed):
        await slots.acquire(soon(0.01))
    assert await first is line


async def test_the_warmest_is_used_and_the_old_are_closed() -> None:
    slots = pool(limit=3, keepalive=0.05)
    lines = [Line(), Line(), Line()]
    for _ in lines:
        assert await slots.acquire(soon()) is None
    for line in lines:
        slots.add(line)
        slots.put(line)
    assert slots.reuse() is lines[2]
    lines[1].open = False
    assert slots.reuse() is lines[0]
    slots.put(lines[0])
    slots.put(lines[2])
    await asyncio.sleep(0.12)
    assert slots.stats() == PoolStats(0, 0, 0)
    assert not any(line.open for line in lines)


async def test_closing_turns_waiters_away() -> None:
    slots = pool()
    used, late = Line(), Line()
    assert await slots.acquire(soon()) is None
    slots.add(used)
    (first,) = await waiting(slots)
    slots.close()
    with pytest.raises(ConnectFailed):
        await first
    with pytest.raises(ConnectFailed):
        await slots.acquire(soon())
    slots.add(late)  # was being opened meanwhile
    slots.put(used)
    assert not used.open
    assert not late.open
    assert slots.stats() == PoolStats(0, 0, 0)
