"""P9, P10: several processes on one store agree on an outage and on its end, and only one of them looks whether it is
over. What is one process's own trouble, or one tenant's impatience, shuts nothing for the others."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.scene import Client
from tests.faults.fleet import LONG, PATIENCE, Config, Fleet, fleet, key_of, report, until
from tests.faults.load import Caller, Job, Stream
from tests.faults.upstream import DOWN, GOOD, Upstream, saying, upstream
from tests.faults.wire import Wire, wired
from tests.redis_server import RedisServer, running
from tests.transport.servers import Peer, Received

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

PROCESSES = 4 if LONG else 3
INTERVAL = 10.0 if LONG else 1.5
"""Seconds that a circuit stays open before it is probed, the first time."""
SLACK = 0.0 if LONG else 1.0
"""Seconds that the news take on a busy machine: nothing beside a real interval, but something beside a short one."""
PROBES = 4 if LONG else 2
LEASE = 5.0
"""Seconds, as the docs say."""
PLACE = ("up", "m")
JOB = Job("m", None)


@pytest.fixture
def server(redis_binary: object, tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path) as found:
        yield found


@contextlib.asynccontextmanager
async def wires(target: Upstream) -> AsyncIterator[list[Wire]]:
    """A way to the provider for each process: so it is seen who asks."""
    async with contextlib.AsyncExitStack() as parts:
        yield [await parts.enter_async_context(wired(target.port)) for _ in range(PROCESSES)]


def changed(up: Upstream, other: Upstream, ports: list[int], **more: Any) -> Any:
    def change(config: Config, number: int) -> Config:
        return {
            **config,
            "providers": {"up": up.settings(ports[number], **more), "other": other.settings()},
            "models": [{"name": "m", "targets": ["up/m", "other/m"]}],
            "fault_tolerance": {"circuit_breaker": {"recovery_timeout_ms": int(INTERVAL * 1000)}},
        }

    return change


async def ask(port: int, times: int) -> None:
    caller = Caller(port, "t")
    try:
        for _ in range(times):
            assert (await caller.ask(JOB)).status == 200
    finally:
        caller.close()


async def states(found: Fleet) -> list[str]:
    rows = [await found.circuits(process) for process in range(len(found.alive))]
    return [row[PLACE]["state"] if PLACE in row else "closed" for row in rows]


async def all_are(found: Fleet, state: str) -> bool:
    return set(await states(found)) == {state}


def opened(found: Fleet) -> list[float]:
    """When each process first opened its circuit, in seconds, in turn."""
    told: list[float] = []
    for process in found.processes:
        lines = [line for line in process.lines() if line["event"] == "circuit.opened"]
        if lines:
            told.append(datetime.fromisoformat(lines[0]["ts"]).timestamp())
    return sorted(told)


async def test_an_outage_from_its_first_vote_to_its_end(server: RedisServer) -> None:
    async with upstream(saying(DOWN)) as up, upstream(saying(GOOD)) as other, wires(up) as ways:
        with fleet(server, PROCESSES, {"t": {}}, change=changed(up, other, [way.port for way in ways])) as found:
            await two_of_them_vote(found)
            async with Stream(found, "t", JOB, 40) as stream:
                await one_of_them_probes(up)
                if LONG:  # its lease lasts; tests/fault_tolerance kills a prober in every run
                    await the_prober_is_killed(found, up, ways)
                await it_is_over(found, up)
            lost = [one for one in stream.outcomes if one.status != 200]
            # Nobody but the clients of the process that was killed noticed anything.
            assert {one.status for one in lost} <= {0}


async def two_of_them_vote(found: Fleet) -> None:
    await found.opened()
    await ask(found.ports[0], 5)
    await until(lambda: len(opened(found)) == 1, "the first to open its own")
    assert (await states(found)).count("closed") == PROCESSES - 1  # one alone decides for itself
    await ask(found.ports[1], 5)
    await until(lambda: len(opened(found)) == PROCESSES, "all to open")
    times = opened(found)
    report("P9 seconds from the second vote until all were open", PROCESSES, round(times[-1] - times[1], 3), 1.0)
    assert times[-1] - times[1] <= 1.0


async def one_of_them_probes(up: Upstream) -> None:
    """All of them have requests for it; the probes take a while, and fail."""
    await until(lambda: up.active == 0, "what was under way to end")
    up.plays = saying(DOWN, after=0.2)
    up.most_active, before = 0, up.calls
    await until(lambda: up.calls >= before + PROBES, "the probes", seconds=2 * INTERVAL * PROBES + PATIENCE)
    await until(lambda: up.active == 0, "the last of them to end")
    report("P10 probes at a time, at most", up.calls - before, up.most_active, 1)
    assert up.most_active == 1


async def the_prober_is_killed(found: Fleet, up: Upstream, ways: list[Wire]) -> None:
    released = asyncio.Event()

    async def held(peer: Peer, received: Received) -> None:
        await released.wait()
        await peer.send(DOWN)

    up.plays, up.most_active = held, 0
    await until(lambda: up.active == 1, "a probe")
    (prober,) = [number for number, way in enumerate(ways) if is_waiting(way)]
    before = up.calls
    found.processes[prober].process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    found.processes[prober].process.wait()
    await until(lambda: up.calls > before, "the next probe")
    seconds = time.monotonic() - killed
    report("P10 seconds until the next probe, after its prober was killed", 1, round(seconds, 2), LEASE + 1)
    assert seconds <= LEASE + 1
    released.set()


def is_waiting(way: Wire) -> bool:
    """A request has gone up last, and no answer has come down since."""
    return any(link.up.last > link.down.last for link in way.live)


async def it_is_over(found: Fleet, up: Upstream) -> None:
    await until(lambda: up.active == 0, "the last failure")
    up.plays = saying(GOOD)
    recovered = time.monotonic()
    await until(lambda: all_are(found, "closed"), "all to close")
    seconds = time.monotonic() - recovered
    report("P9 seconds until all were closed, after the recovery", len(found.alive), round(seconds, 2), 2 * INTERVAL)
    assert seconds <= 2 * INTERVAL + SLACK


async def test_what_is_one_processs_own_trouble_shuts_nothing_for_the_others(server: RedisServer) -> None:
    """One of them cannot resolve the provider's name. One tenant wants every answer within a millisecond."""
    async with upstream(saying(GOOD, after=0.02)) as up, upstream(saying(GOOD)) as other:

        def change(config: Config, number: int) -> Config:
            mine = changed(up, other, [up.port] * PROCESSES, timeouts={"connect_ms": 1000})(config, number)
            if number == 0:
                mine["providers"]["up"]["base_url"] = "http://provider.invalid/v1"  # a name that nobody resolves
            return mine

        with fleet(server, PROCESSES, {"t": {}, "hasty": {}}, change=change) as found:
            await found.opened()
            await ask(found.ports[0], 10)
            assert up.calls == 0
            assert (await found.circuits())[PLACE]["state"] == "open"
            hasty = [haste(port) for port in found.ports for _ in range(25)]
            refused = await asyncio.gather(*hasty)
            before, others = up.calls, other.calls
            async with Stream(found, "t", JOB, 40) as stream:
                await stream.lasts(2.0)  # the fleet exchanges its news four times meanwhile
            asked = len(stream.outcomes)
            moved = sum(state != "closed" for state in (await states(found))[1:])
        assert set(refused) == {504}
        assert {one.status for one in stream.outcomes} == {200}
        assert up.calls - before + other.calls - others == asked
        assert up.calls - before >= asked * (PROCESSES - 1) // PROCESSES  # all of the others'
        report("circuits that one broken resolver and one hasty tenant opened elsewhere", PROCESSES - 1, moved, 0)
        assert moved == 0


async def haste(port: int) -> int:
    """The status of a request that may take a millisecond."""
    client = Client(*await asyncio.open_connection("127.0.0.1", port))
    try:
        client.ask("m", headers={"authorization": f"Bearer {key_of('hasty')}", "x-breakwater-timeout-ms": "1"})
        status, _, _ = await client.answer()
        return status
    finally:
        client.close()
