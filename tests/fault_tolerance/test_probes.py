"""One probe in the whole fleet: whoever leaves, hangs, or asks again before its news has got through."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.fault_tolerance.base import BreakerStore, View
from proxy.store.memory_circuits import MemoryCircuits
from tests.fault_tolerance.fleet import PLACE, Flight, Process, Time, broken

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


async def test_a_probe_that_hangs_keeps_no_other_from_being_sent_for_ever(outage: list[Process], time: Time) -> None:
    one, other = outage
    hangs = await one.begin()
    assert hangs is not None
    for _ in range(29):
        time.ms += 1000
        await one.circuits.sync()
        assert await other.begin() is None
    time.ms += 1001
    await one.circuits.sync()
    assert await other.request()  # the provider has recovered
    assert other.state == "closed"
    await other.circuits.sync()
    await one.circuits.sync()
    assert one.state == "closed"
    one.end(hangs, broken())
    assert (one.state, one.row["failures_in_a_row"]) == ("closed", 0)


async def late(one: Process, time: Time) -> Flight:
    """A probe that was not waited for any longer."""
    found = await one.begin()
    assert found is not None
    time.ms += 30_001
    await one.circuits.sync()
    assert (one.state, one.row["probe"]) == ("open", None)
    return found


@pytest.mark.parametrize("answered", [False, True])
async def test_a_probe_that_is_slow_still_closes_it_for_all(outage: list[Process], time: Time, answered: bool) -> None:
    one, other = outage
    slow = await late(one, time)
    if answered:
        slow.permit.answered()
    one.end(slow, None)
    assert one.state == "closed"
    await one.circuits.sync()
    await other.circuits.sync()
    assert other.state == "closed"
    assert one.moves()[-1] == "circuit.closed"


async def test_a_slow_probe_says_nothing_about_a_later_outage(outage: list[Process], time: Time) -> None:
    one, other = outage
    slow = await late(one, time)
    assert await one.request()
    for process in (one, other) * 2:
        await process.circuits.sync()
    time.ms += 100_000
    for process in outage:
        await process.fail(5)
    for process in outage * 2:
        await process.circuits.sync()
    one.end(slow, None)
    assert (one.state, other.state) == ("open", "open")


async def test_a_slow_probe_does_not_close_what_an_operator_opened(outage: list[Process], time: Time) -> None:
    one, _ = outage
    slow = await late(one, time)
    await one.circuits.command(*PLACE, "open")
    one.end(slow, None)
    assert (one.state, one.row["scope"]) == ("open", "hand")


async def test_a_circuit_that_is_new_meanwhile_disturbs_nothing(outage: list[Process], time: Time) -> None:
    one, _ = outage
    one.store.cut = "before"
    assert await one.request()  # a probe without a lease, whose success the fleet is still to hear of
    one.store.cut = ""
    before = one.store.conclude

    async def conclude(*words: Any, **more: Any) -> View:
        one.circuits.admit("openai", "never seen before")
        return await before(*words, **more)

    one.store.conclude = conclude  # type: ignore[method-assign]
    await one.circuits.sync()
    assert "circuit.closed" in one.moves()  # which holds no fault


async def test_what_has_closed_while_the_store_was_away_is_not_said_to_be_open(
    outage: list[Process], store: BreakerStore, time: Time
) -> None:
    one, _ = outage
    one.store.store = MemoryCircuits(clock=time.wall)  # it has lost everything
    await one.circuits.sync()
    one.store.cut = "before"
    assert await one.request()
    one.store.cut = ""
    await one.circuits.sync()
    report = await one.store.report("a newcomer", (), (), 0)
    assert not [view for view in report.views if view.is_open]
