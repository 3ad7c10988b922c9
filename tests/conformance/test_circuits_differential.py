"""The breaker's store in memory and in Redis: the same verbs at the same moments give the same answers on both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.fault_tolerance.base import BreakerStore, Granted, Probe, Report, View, Vote
from proxy.store.memory_circuits import MemoryCircuits
from proxy.store.redis import RedisStore
from tests.conformance.stores import Clock, Driver, namespace
from tests.redis_server import RedisServer

PROCESSES = ("a", "b", "c")
PLACES = (("openai", "gpt-4o"), ("backup", "meta/llama"))

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.sampled_from((1, 250, 999, 1000, 3000, 5000, 61_000, 3_700_000, -999, -5000))),
        st.tuples(
            st.just("report"),
            st.sampled_from(PROCESSES),
            st.lists(
                st.tuples(
                    st.sampled_from(PLACES),
                    st.sampled_from((-1, 0, 1)),
                    st.sampled_from((500, 5000)),
                    st.sampled_from(("", "", "", "fleet", "hand")),
                ),
                max_size=2,
                unique_by=lambda vote: vote[0],
            ),
            st.sampled_from((0, 3000, 3000, 3000)),
            st.booleans(),
        ),
        st.tuples(
            st.just("lease"),
            st.sampled_from(PLACES),
            st.sampled_from(PROCESSES),
            st.sampled_from((-1, 0, 0, 0, 1)),
            st.booleans(),
        ),
        st.tuples(
            st.just("conclude"),
            st.sampled_from(PLACES),
            st.sampled_from(PROCESSES),
            st.sampled_from(("mine", "mine", "mine", "old", "zero")),
            st.sampled_from(("success", "failure", "lost")),
        ),
        st.tuples(st.just("command"), st.sampled_from(PLACES), st.sampled_from(("open", "reset"))),
        st.tuples(
            st.just("lose"),
        ),
    ),
    max_size=40,
)


class Side:
    """One store, and what the processes know from its answers."""

    def __init__(self, store: BreakerStore, drive: Driver, clock: Clock, forget: Callable[[], BreakerStore]) -> None:
        self.store, self.drive, self.clock, self.forget = store, drive, clock, forget
        self.generations = dict.fromkeys(PLACES, 0)
        self.numbers: dict[Any, int] = {}
        self.since = dict.fromkeys(PROCESSES, 0)

    def seen(self, answer: Any) -> Any:
        for view in answer.views if isinstance(answer, Report) else (answer,):
            if isinstance(view, View):
                self.generations[view.place] = view.generation
        if isinstance(answer, Report):
            views = tuple(sorted(answer.views, key=lambda view: view.place))
            return (views, answer.live, answer.now_ms, sorted((p.place, p.number) for p in answer.lost))
        return answer

    def run(self, step: tuple[Any, ...]) -> Any:
        kind, *words = step
        if kind == "lose":
            self.store = self.forget()
            return None
        return self.seen(getattr(self, kind)(*words))

    def report(self, process: str, said: list[Any], alive: int, all_of_it: bool) -> Report:
        votes = [
            Vote(place, max(self.generations[place] + shift, 0), open_ms, f"of {process}", restores)
            for place, shift, open_ms, restores in said
        ]
        probes = [Probe(place, number) for (place, owner), number in self.numbers.items() if owner == process]
        since = 0 if all_of_it else self.since[process]
        report = self.drive(self.store.report(process, votes, probes, since, alive_ms=alive))
        self.since[process] = report.now_ms
        for probe in report.lost:
            del self.numbers[probe.place, process]
        return report

    def lease(self, place: Any, process: str, shift: int, early: bool) -> Any:
        known = max(self.generations[place] + shift, 0)
        answer = self.drive(self.store.lease(place, process, known, early=early))
        if isinstance(answer, Granted):
            self.numbers[place, process] = answer.number
        return answer

    def conclude(self, place: Any, process: str, which: str, outcome: Any) -> View:
        number = self.numbers.get((place, process), 7)
        number = {"mine": number, "old": max(number - 1, 1), "zero": 0}[which]
        return self.drive(
            self.store.conclude(place, process, number, outcome, open_ms=700, generation=self.generations[place])
        )

    def command(self, place: Any, action: Any) -> View:
        return self.drive(self.store.command(place, action, "admin"))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_both_stores_answer_alike(steps: list[Any], redis_server: RedisServer, drive: Driver) -> None:
    clock = Clock()
    name = namespace()

    async def open_redis() -> RedisStore:
        return RedisStore(redis_server.url, namespace=name, clock=clock, timeout_ms=10_000)

    store = drive(open_redis())

    def flushed() -> BreakerStore:
        with redis_server.client() as client:
            client.delete(f"{{bw:{name}}}circuits", f"{{bw:{name}}}circuit-processes")
        return store.circuits

    try:
        sides = [
            Side(MemoryCircuits(clock=clock), drive, clock, lambda: MemoryCircuits(clock=clock)),
            Side(store.circuits, drive, clock, flushed),
        ]
        for step in steps:
            if step[0] == "wait":
                clock.now += step[1]
            else:
                one, other = (side.run(step) for side in sides)
                assert one == other, step
    finally:
        drive(store.aclose())
