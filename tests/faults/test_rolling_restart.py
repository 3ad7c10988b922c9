"""P15: the processes of a fleet are replaced one after the other under live streams. Inside the grace period none of
them breaks, and who asks meanwhile is served by those that are ready."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.scene import Client
from tests.faults.books import agree, agree_with_the_provider, closed
from tests.faults.fleet import LONG, PATIENCE, Config, Fleet, fleet, limited, report, until
from tests.faults.load import Job, Outcome, ask_once
from tests.redis_server import RedisServer, running

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

PROCESSES = 4 if LONG else 2
STREAMS = 500 if LONG else 40
"""That live at any time, over all processes."""
JOB = Job("bench-60-5" if LONG else "bench-20-20", 100, stream=True)
GRACE_MS = 60_000
"""Far more than a stream takes."""
DRAIN_MS = 1000
"""In which a process still serves what comes, while its readiness says that it will not."""
READY_SECONDS = 0.1 if LONG else 0.5
BUDGET = {"t": limited(100_000_000)}


@pytest.fixture
def server(redis_binary: object, tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path) as found:
        yield found


def changed(config: Config, number: int) -> Config:
    return {**config, "listen": {"drain_ms": DRAIN_MS, "grace_ms": GRACE_MS}}


class Balancer:
    """Clients, each with one stream after another, at whatever process is in service."""

    def __init__(self, ports: list[int]) -> None:
        self.ports = ports
        self.outcomes: list[Outcome] = []
        self.live: Counter[int] = Counter()
        """Streams at each port."""
        self._next = 0
        self._over = False
        self._clients: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Balancer:
        self._clients = [asyncio.create_task(self._client()) for _ in range(STREAMS)]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._over = True
        await asyncio.gather(*self._clients)

    async def _client(self) -> None:
        while not self._over:
            self._next += 1
            port = self.ports[self._next % len(self.ports)]
            self.live[port] += 1
            try:
                self.outcomes.append(await ask_once(port, "t", JOB))
            finally:
                self.live[port] -= 1


async def is_ready(port: int) -> bool:
    """On a socket of its own: a client of HTTP takes longer to be made than the answer takes to come."""
    client = Client(*await asyncio.open_connection("127.0.0.1", port))
    try:
        client.send(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        status, _, _ = await client.answer()
        return status == 200
    finally:
        client.close()


async def replaced(found: Fleet, config: Config, balancer: Balancer, old: int) -> tuple[int, float]:
    """One process takes the place of another. Returns the streams that were live at the old one when it was told to
    end, and the seconds until it no longer called itself ready."""
    process = found.start(config)
    await asyncio.to_thread(process.wait_until_ready)
    await until(lambda: is_ready(process.port), "the new process to be ready")
    leaving = found.processes[old]
    await until(lambda: balancer.live[leaving.port] >= STREAMS // PROCESSES // 2, "streams at the old one")
    live = balancer.live[leaving.port]
    leaving.process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    while await is_ready(leaving.port):
        assert time.monotonic() - told < PATIENCE
    seconds = time.monotonic() - told
    balancer.ports = [port for port in balancer.ports if port != leaving.port] + [process.port]
    await until(lambda: leaving.process.poll() is not None, "the old process to end")
    assert leaving.process.returncode == 0
    return live, seconds


async def test_no_stream_breaks_when_each_process_is_replaced(server: RedisServer) -> None:
    configs: list[Config] = []

    def change(config: Config, number: int) -> Config:
        configs.append(changed(config, number))
        return configs[-1]

    with fleet(server, PROCESSES, BUDGET, change=change) as found:
        await found.opened()
        async with Balancer(found.ports) as balancer:
            told = [await replaced(found, configs[0], balancer, old) for old in range(PROCESSES)]
        outcomes = balancer.outcomes
        broken = [one for one in outcomes if one.status != 200 or not one.complete]
        report("P15 streams live at a process that was told to end", PROCESSES, min(live for live, _ in told), "> 0")
        report("P15 streams that broke", len(outcomes), len(broken), 0)
        slowest = max(seconds for _, seconds in told)
        report("P15 seconds until it was not ready any more", PROCESSES, round(slowest, 3), READY_SECONDS)
        assert broken == []
        assert slowest <= READY_SECONDS
        books = await closed(found, "t", 0)
    assert len(books.records) == len(outcomes)
    agree(books)
    agree_with_the_provider(books)
