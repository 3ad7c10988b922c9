"""One probe in the whole fleet: whoever leaves, hangs, or asks again before its news has got through."""

from __future__ import annotations

import pytest

from proxy.fault_tolerance.base import BreakerStore
from proxy.store.memory_circuits import MemoryCircuits
from tests.fault_tolerance.fleet import Process, Time

pytestmark = pytest.mark.anyio


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def store(time: Time) -> BreakerStore:
    return MemoryCircuits(clock=time.wall)


@pytest.fixture
async def outage(store: BreakerStore, time: Time) -> list[Process]:
    """Two processes whose circuit is open and due."""
    fleet = [Process(store, time, number) for number in range(2)]
    for process in fleet:
        await process.circuits.sync()
    for process in fleet:
        await process.fail(5)
    for process in fleet * 2:
        await process.circuits.sync()
    assert [process.state for process in fleet] == ["open", "open"]
    time.ms += 13_000  # more than a first open time, jitter included
    return fleet


async def test_a_probe_that_is_taken_over_from_a_client_that_left_is_not_freed_by_the_late_news_of_it(
    outage: list[Process], time: Time
) -> None:
    one, other = outage
    first = await one.begin()
    assert first is not None
    assert first.was_probe
    one.flights.remove(first)
    first.permit.ignored()
    second = await one.begin()  # before the store has heard that the first is over
    assert second is not None
    assert second.was_probe
    await one.circuits.sync()
    time.ms += 300
    assert await other.begin() is None
    one.end(second, None)
    assert one.state == "closed"
