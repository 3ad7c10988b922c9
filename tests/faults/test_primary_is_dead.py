"""P11: the first target is dead, in each of the ways in which a provider dies, and the second one is well. Clients see
nothing but its answers; and once the circuit is open, they do not even wait longer for them."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.fleet import LONG, Config, Fleet, fleet, report
from tests.faults.load import Caller, Job, Outcome
from tests.faults.upstream import DOWN, GOOD, Upstream, hanging, saying, upstream
from tests.faults.wire import DEAD, wired
from tests.redis_server import RedisServer, running
from tests.transport.servers import black_hole

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

DEATHS = ("refused", "black-hole", "5xx", "hang", "reset")
OWN = 0.1
"""Seconds that the healthy provider takes."""
PATIENCE_MS = 1000 if LONG else 500
"""With the dead one: to connect, and to answer."""
ROUNDS = 200 if LONG else 4
AT_ONCE = 10
MOST_ADDED = 0.05
"""Of the healthy provider's own latency."""
LEAST_SUCCESS = 0.999


@pytest.fixture
def server(redis_binary: object, tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path) as found:
        yield found


@contextlib.asynccontextmanager
async def providers() -> AsyncIterator[tuple[Upstream, dict[str, int]]]:
    """The healthy one, and the ports of the dead ones by their deaths."""
    async with (
        upstream(saying(GOOD, after=OWN)) as healthy,
        upstream(saying(DOWN)) as down,
        upstream(hanging) as hung,
        wired(healthy.port) as refusing,
        wired(healthy.port, lambda number: DEAD) as resetting,
    ):
        await refusing.refuse()
        with black_hole() as hole:
            ports = (refusing.port, hole.port, down.port, hung.port, resetting.port)
            yield healthy, dict(zip(DEATHS, ports, strict=True))


def changed(healthy: Upstream, ports: dict[str, int]) -> Any:
    """A model for each death, which leads to the dead provider and then to the healthy one; and the latter alone."""
    timeouts = {"connect_ms": PATIENCE_MS, "first_event_ms": PATIENCE_MS, "total_ms": PATIENCE_MS}
    dead = {death: healthy.settings(port, timeouts=timeouts) for death, port in ports.items()}
    models = [{"name": death, "targets": [f"{death}/m", "healthy/m"]} for death in ports]

    def change(config: Config, number: int) -> Config:
        return {
            **config,
            "providers": {"healthy": healthy.settings(), **dead},
            "models": [*models, {"name": "alone", "targets": ["healthy/m"]}],
        }

    return change


async def is_open(found: Fleet, death: str) -> bool:
    circuits = await found.circuits()
    return (death, death) in circuits and circuits[death, death]["state"] == "open"


async def ask(callers: list[Caller], model: str) -> list[Outcome]:
    return list(await asyncio.gather(*(caller.ask(Job(model, None)) for caller in callers)))


async def test_nobody_notices_that_the_first_target_is_dead(server: RedisServer) -> None:
    async with providers() as (healthy, ports):
        with fleet(server, 1, {"t": {}}, change=changed(healthy, ports)) as found:
            callers = [Caller(found.ports[0], "t") for _ in range(AT_ONCE)]
            try:
                await ask(callers, "alone")  # connections are there
                for death in DEATHS:
                    await noticed_by_nobody(found, callers, death)
            finally:
                for caller in callers:
                    caller.close()


async def noticed_by_nobody(found: Fleet, callers: list[Caller], death: str) -> None:
    began = time.monotonic()
    before = await ask(callers, death)
    while not await is_open(found, death):
        before += await ask(callers, death)
    seconds = time.monotonic() - began
    opened: list[Outcome] = []
    alone: list[Outcome] = []
    for _ in range(ROUNDS):  # in turn, so that what else the machine does hurts both alike
        opened += await ask(callers, death)
        alone += await ask(callers, "alone")
    asked = [*before, *opened]
    success = sum(one.status == 200 for one in asked) / len(asked)
    own = statistics.median(one.seconds for one in alone)
    added = statistics.median(one.seconds for one in opened) / own - 1
    detection = statistics.mean(one.seconds for one in before) - own
    report(f"P11 {death}: success", len(asked), success, LEAST_SUCCESS)
    report(f"P11 {death}: latency added at the median, once open", len(opened), round(added, 4), MOST_ADDED)
    report(f"P11 {death}: seconds until it opened", 1, round(seconds, 2), "-")
    report(f"P11 {death}: seconds added until then, each", len(before), round(detection, 3), "-")
    assert success >= LEAST_SUCCESS
    assert added <= MOST_ADDED
    assert all(one.status == 200 for one in alone)
