"""The fleet in real time over a real Redis: how soon it agrees, a prober that is killed, a Redis that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from proxy.fault_tolerance.base import LEASE_MS
from proxy.fault_tolerance.breaker import Rules
from proxy.fault_tolerance.guard import Circuits
from proxy.store.redis import RedisStore
from tests.conformance.stores import namespace
from tests.fault_tolerance.fleet import PLACE, broken
from tests.redis_server import RedisServer, running

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@contextlib.asynccontextmanager
async def processes(
    url: str, name: str, count: int, *, recovery: float = 60.0, timeout_ms: int = 2000
) -> AsyncIterator[list[Circuits]]:
    """As many as on one machine, each with a connection of its own."""
    stores = [RedisStore(url, namespace=name, timeout_ms=timeout_ms) for _ in range(count)]
    fleet = [
        Circuits(
            store.circuits,
            Rules(time.monotonic, random.random, threshold=5, recovery=recovery),
            process=f"process-{number}",
            emit=lambda event: None,
        )
        for number, store in enumerate(stores)
    ]
    try:
        for circuits in fleet:
            circuits.start()
        yield fleet
    finally:
        for circuits in fleet:
            await circuits.aclose()
        for store in stores:
            await store.aclose()


def fail(circuits: Circuits) -> None:
    for _ in range(5):
        permit = circuits.admit(*PLACE)
        assert permit is not None
        permit.failed(broken())


async def until(condition: Callable[[], bool], seconds: float) -> float:
    """How long it took. Fails if it takes longer."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        await asyncio.sleep(0.005)
    return time.monotonic() - began


def all_are(fleet: list[Circuits], state: int) -> Callable[[], bool]:
    return lambda: all(circuits.states().get(PLACE, 0) == state for circuits in fleet)


async def test_open_everywhere_within_a_second_and_closed_within_two_intervals(redis_server: RedisServer) -> None:
    async with processes(redis_server.url, namespace(), 4, recovery=0.5) as fleet:
        await until(lambda: all(circuits.live == 4 for circuits in fleet), 5)
        fail(fleet[0])
        fail(fleet[1])
        await until(all_are(fleet, 2), 1.0)
        began = time.monotonic()
        under_way = most = 0
        while not all_are(fleet, 0)():
            assert time.monotonic() - began < 2 * 0.5 + 1.0
            for circuits in fleet:
                found = await circuits.probe([PLACE], all_open=False)
                if found is not None:
                    under_way += 1
                    most = max(most, under_way)
                    await asyncio.sleep(0.05)
                    under_way -= 1
                    found[1].succeeded()
            await asyncio.sleep(0.01)
        assert most == 1


async def test_a_prober_that_is_killed_frees_the_probe_when_its_lease_ends(redis_server: RedisServer) -> None:
    name = namespace()
    script = Path(__file__).parent / "prober.py"
    async with processes(redis_server.url, name, 1, recovery=0.05) as (survivor,):
        await until(lambda: survivor.live == 1, 5)
        child = await asyncio.create_subprocess_exec(
            sys.executable, str(script), redis_server.url, name, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert child.stdout is not None
            assert await asyncio.wait_for(child.stdout.readline(), 20) == b"probing\n"
            fail(survivor)
            await asyncio.sleep(LEASE_MS / 1000)  # it renews its lease: what lasts long is not dead
            assert await survivor.probe([PLACE], all_open=False) is None
            child.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            found = None
            while found is None:
                assert time.monotonic() - killed < LEASE_MS / 1000 + 1
                await asyncio.sleep(0.02)
                found = await survivor.probe([PLACE], all_open=False)
            found[1].succeeded()
            assert survivor.states() == {PLACE: 0}
        finally:
            if child.returncode is None:
                child.kill()
            await child.wait()


async def test_while_redis_hangs_nothing_waits(redis_binary: Path, tmp_path: Path) -> None:
    with running(tmp_path) as server:
        async with processes(server.url, "0", 2, recovery=0.2, timeout_ms=50) as fleet:
            await until(lambda: all(circuits.live == 2 for circuits in fleet), 5)
            server.signal(signal.SIGSTOP)
            try:
                fail(fleet[0])
                assert fleet[0].admit(*PLACE) is None
                await asyncio.sleep(0.4)
                began = time.monotonic()
                found = await fleet[0].probe([PLACE], all_open=False)
                assert time.monotonic() - began < 0.5
                assert found is not None
                found[1].succeeded()
                assert fleet[0].states() == {PLACE: 0}
                assert fleet[1].admit(*PLACE) is not None
            finally:
                server.signal(signal.SIGCONT)
            await until(lambda: all(circuits.live == 2 for circuits in fleet), 15)
            assert fleet[1].states().get(PLACE, 0) == 0


async def test_what_is_no_record_is_dropped(redis_server: RedisServer) -> None:
    name = namespace()
    with redis_server.client() as client:
        for raw in ("no record", "7", "{}", '{"s": "open"}'):
            client.hset(f"{{bw:{name}}}circuits", f"openai/{raw}", raw)
        async with processes(redis_server.url, name, 2) as fleet:
            await asyncio.sleep(0.1)
            client.hdel(f"{{bw:{name}}}circuits", 'openai/{"s": "open"}')  # of another layout: then the store is away
            await until(lambda: all(circuits.live == 2 for circuits in fleet), 5)
            fail(fleet[0])
            fail(fleet[1])
            await until(lambda: client.hkeys(f"{{bw:{name}}}circuits") == [b"openai/gpt-4o"], 2.0)
