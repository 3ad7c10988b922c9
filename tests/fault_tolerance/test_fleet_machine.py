"""Circuits of a fleet, whatever happens in whatever order: one probe, no old news, nobody wedged."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import pytest
import uvloop
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from proxy.fault_tolerance.base import BreakerStore
from proxy.fault_tolerance.breaker import LONGEST_PROBE
from proxy.store.memory_circuits import MemoryCircuits
from proxy.store.redis import RedisStore
from tests.conformance.stores import namespace
from tests.fault_tolerance.fleet import PLACE, RECOVERY, Process, Time, broken, unresolved
from tests.redis_server import RedisServer

T = TypeVar("T")
PROCESSES = 3
which = st.integers(0, PROCESSES - 1)
BOUND_MS = int(2 * RECOVERY * 1000) + 8000
"""Two of the longest intervals, a lease that a dead prober left behind, and a few rounds."""


class Fleet(RuleBasedStateMachine):
    """`url` of a Redis; None: memory."""

    url: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.time = Time()
        self.redis: RedisStore | None = None
        self.store: BreakerStore = self.run(self._open())
        self.born = PROCESSES
        self.processes = [Process(self.store, self.time, number) for number in range(PROCESSES)]
        self.healthy = True
        self.by_hand = False

    async def _open(self) -> BreakerStore:
        if self.url is None:
            return MemoryCircuits(clock=self.time.wall)
        self.redis = RedisStore(self.url, namespace=namespace(), clock=self.time.wall, timeout_ms=10_000)
        return self.redis.circuits

    def run(self, work: Awaitable[T]) -> T:
        async def go() -> T:
            return await work

        return self.runner.run(go())

    def error(self, process: Process) -> Any:
        return unresolved() if process.resolver_broken else None if self.healthy else broken()

    @rule(who=which, times=st.integers(1, 6), last=st.booleans())
    def requests(self, who: int, times: int, last: bool) -> None:
        process = self.processes[who]
        for _ in range(times):
            self.run(process.request(self.error(process), last=last))

    @rule(who=which, last=st.booleans())
    def begins(self, who: int, last: bool) -> None:
        self.run(self.processes[who].begin(last=last))

    @precondition(lambda self: any(process.flights for process in self.processes))
    @rule(data=st.data(), how=st.sampled_from(("ends", "ends", "left", "answers", "twice")))
    def goes_on(self, data: st.DataObject, how: str) -> None:
        process = data.draw(st.sampled_from([one for one in self.processes if one.flights]))
        flight = data.draw(st.sampled_from(process.flights))

        async def go() -> None:
            if how == "answers":
                flight.permit.answered()
            elif how == "left":
                process.flights.remove(flight)
                flight.permit.ignored()
            else:
                process.end(flight, self.error(process))
                if how == "twice":
                    flight.permit.failed(broken())

        self.run(go())

    @rule(ms=st.sampled_from((1, 100, 250, 1000, 4000, 6000, 12_000)))
    def time_passes(self, ms: int) -> None:
        self.time.ms += ms

    @rule(who=which)
    def exchanges(self, who: int) -> None:
        self.run(self.processes[who].circuits.sync())

    @rule()
    def all_exchange(self) -> None:
        for process in self.processes:
            self.run(process.circuits.sync())

    @rule()
    def the_provider_breaks_or_recovers(self) -> None:
        self.healthy = not self.healthy

    @rule(who=which)
    def its_resolver_breaks_or_recovers(self, who: int) -> None:
        self.processes[who].resolver_broken ^= True

    @rule(who=which, how=st.sampled_from(("", "before", "after")))
    def the_store_goes_or_comes(self, who: int, how: str) -> None:
        self.processes[who].store.cut = how

    @rule(who=which)
    def it_dies(self, who: int) -> None:
        self.processes[who] = Process(self.store, self.time, self.born)
        self.born += 1

    @rule(who=which)
    def an_outage_comes_and_goes(self, who: int) -> None:
        """What long chances would bring about: requests that outlive an open and a closed circuit."""
        process = self.processes[who]

        async def go() -> None:
            await process.begin()
            await process.fail(5)
            self.time.ms += 17_000
            await process.circuits.sync()
            await process.request()

        self.run(go())

    @rule(who=which, action=st.sampled_from(("open", "reset", "reset")))
    def by_an_operator(self, who: int, action: Any) -> None:
        self.run(self.processes[who].circuits.command(*PLACE, action))

    @invariant()
    def at_most_one_probe_is_under_way(self) -> None:
        """As far as leases go: of processes that the store answers, or whose lease it still honours."""
        now = self.time.monotonic()
        holders = []
        for process in self.processes:
            leases = [flight.permit._lease for flight in process.flights if flight.permit.is_probe]
            holders += [lease for lease in leases if lease is not None and lease.number and now < lease.until]
        assert len(holders) <= 1

    @invariant()
    def no_fault_of_ours(self) -> None:
        for process in self.processes:
            process.moves()

    def teardown(self) -> None:
        try:
            self.run(self._recovers())
        finally:
            if self.redis is not None:
                self.run(self.redis.aclose())
            self.runner.close()

    async def _recovers(self) -> None:
        """Everything is well again: some bounded time later every circuit is closed, and so is the fleet's record."""
        self.healthy = True
        for process in self.processes:
            process.resolver_broken = False
            process.store.cut = ""
            for flight in list(process.flights):
                process.end(flight, None)
        for process in self.processes:
            await process.circuits.sync()
        for process in self.processes:  # what an operator opened, only an operator closes
            await process.circuits.command(*PLACE, "reset") if process.row.get("scope") == "hand" else None
        for _ in range(0, BOUND_MS, 250):
            self.time.ms += 250
            for process in self.processes:
                await process.circuits.sync()
                await process.request()
        states = [(process.state, process.row) for process in self.processes]
        assert all(state == "closed" for state, _ in states), states
        report = await self.store.report("a newcomer", (), (), 0)
        assert not any(view.is_open or view.votes or view.prober for view in report.views), report.views


class OldNews(Fleet):
    """The same, and what was sent before a change never moves a circuit after it."""

    @precondition(lambda self: any(process.flights for process in self.processes))
    @rule(data=st.data())
    def old_news(self, data: st.DataObject) -> None:
        process = data.draw(st.sampled_from([one for one in self.processes if one.flights]))
        flight = data.draw(st.sampled_from(process.flights))
        circuit = flight.permit._circuit
        assert circuit is not None
        if flight.permit._generation == circuit.generation:
            return
        before = (circuit.state, circuit.due, circuit.reopened, circuit.evidence.row, len(process.events))

        async def go() -> None:
            process.end(flight, broken())

        self.run(go())
        assert before == (circuit.state, circuit.due, circuit.reopened, circuit.evidence.row, len(process.events))


QUICK = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
def test_a_fleet_in_memory() -> None:
    run_state_machine_as_test(OldNews, settings=QUICK)


@pytest.mark.slow
def test_a_fleet_over_redis(redis_server: RedisServer) -> None:
    class OverRedis(OldNews):
        url = redis_server.url

    run_state_machine_as_test(OverRedis, settings=settings(QUICK, max_examples=15))


def test_the_bounds_make_sense() -> None:
    assert LONGEST_PROBE * 1000 > BOUND_MS
