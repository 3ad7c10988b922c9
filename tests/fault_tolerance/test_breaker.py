"""One process's circuit: the table, what counts, how long it stays open, and the ramp."""

from __future__ import annotations

from random import Random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.fault_tolerance.base import View
from proxy.fault_tolerance.breaker import MOST, TABLE, Change, Circuit, Happening, Rules, State, after, grown
from proxy.fault_tolerance.evidence import Evidence

PLACE = ("openai", "gpt-4o")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.5

    def __call__(self) -> float:
        return self.now


def made(clock: Clock, *, drawn: float = 0.5, threshold: int = 5, recovery: float = 60.0) -> Circuit:
    return Circuit(PLACE, Rules(clock, lambda: drawn, threshold, recovery))


def fail(circuit: Circuit, times: int = 5, *, local: bool = False) -> Change | None:
    for _ in range(times - 1):
        assert circuit.failed(circuit.generation, "failed", local=local) is None
    return circuit.failed(circuit.generation, "failed", local=local)


def fleet_says(*, is_open: bool, generation: int, due_ms: int = 5000, by_hand: bool = False) -> View:
    why = (("a", "upstream_timeout"), ("b", "failed")) if is_open else ()
    return View(PLACE, is_open, generation, due_ms, 0, by_hand, why, (), "", 0)


def test_the_table_is_whole() -> None:
    assert TABLE.keys() == set(get_args(Happening))
    assert {state for row in TABLE.values() for state in row} == set(get_args(State))
    assert [after(state, "success") for state in ("closed", "half_open", "open")] == ["closed", "closed", "open"]


def test_nothing_but_a_lease_leads_into_half_open() -> None:
    into = {name for name, row in TABLE.items() for was, to in zip(get_args(State), row, strict=True) if to != was
            and to == "half_open"}  # fmt: skip
    assert into == {"granted"}
    assert TABLE["granted"][0] == "closed", "a circuit that closed meanwhile is not reopened by a lease that comes late"


# -- evidence --------------------------------------------------------------------------------------------------------


def test_failures_in_a_row_open_it() -> None:
    clock = Clock()
    circuit = made(clock)
    assert fail(circuit, 4) is None
    circuit.succeeded(circuit.generation)
    change = fail(circuit)
    assert change is not None
    assert (change.was, change.to, change.scope, change.why) == ("closed", "open", "process", (("", "failed"),))
    assert not circuit.way_is_free
    assert not circuit.admits()


def test_half_of_at_least_twenty_in_ten_seconds_open_it() -> None:
    clock = Clock()
    circuit = made(clock)
    for number in range(18):
        clock.now += 0.4
        circuit.succeeded(circuit.generation) if number % 2 else circuit.failed(circuit.generation, "x", local=False)
    assert circuit.state == "closed", "fewer than twenty have no rate"
    circuit.succeeded(circuit.generation)
    assert circuit.failed(circuit.generation, "x", local=False) is not None


def test_what_is_older_than_ten_seconds_has_no_say() -> None:
    clock = Clock()
    circuit = made(clock, threshold=1000)
    for _ in range(19):
        circuit.failed(circuit.generation, "x", local=False)
    clock.now += 10
    assert circuit.failed(circuit.generation, "x", local=False) is None
    assert circuit.evidence.rate(clock.now) == (1, 1)


@given(st.lists(st.tuples(st.floats(0, 12), st.booleans(), st.booleans()), max_size=120))
def test_the_ring_counts_like_a_list(steps: list[tuple[float, bool, bool]]) -> None:
    evidence, now, seen = Evidence(10_000), 500.0, []
    for span, failed, local in steps:
        now += span
        if failed:
            evidence.failure(now, local=local)
        else:
            evidence.success(now)
        seen.append((int(now), failed))
        recent = [one for second, one in seen if second > int(now) - 10]
        assert evidence.rate(now) == (len(recent), sum(recent))


def test_failures_of_local_origin_open_it_and_are_no_vote() -> None:
    circuit = made(Clock())
    assert fail(circuit, local=True) is not None
    assert circuit.vote() is None


def test_what_is_not_local_must_have_been_enough_alone() -> None:
    circuit = made(Clock())
    for local in (True, True, False, False, True):
        circuit.failed(circuit.generation, "x", local=local)
    assert circuit.state == "open"
    assert circuit.vote() is None
    other = made(Clock())
    fail(other)
    vote = other.vote()
    assert vote is not None
    assert (vote.place, vote.generation, vote.why, vote.restores) == (PLACE, 0, "failed", "")


# -- how long --------------------------------------------------------------------------------------------------------


@given(recovery=st.floats(0.1, 3600), drawn=st.floats(0, 1, exclude_max=True), times=st.integers(0, 100))
def test_no_circuit_is_left_alone_for_two_recovery_times(recovery: float, drawn: float, times: int) -> None:
    rules = Rules(Clock(), lambda: drawn, recovery=recovery)
    assert recovery * 800 - 2 <= grown(rules.open_ms(), times) < 2 * recovery * 1000
    assert grown(1000, times) <= grown(1000, times + 1) <= 1000 * MOST


def test_it_grows_with_each_probe_that_fails() -> None:
    clock = Clock()
    circuit = made(clock)
    fail(circuit)
    spans = []
    for _ in range(5):
        spans.append(round(circuit.due - clock.now, 2))
        clock.now = circuit.due
        assert circuit.wants_probe()
        circuit.granted(1, clock.now + 5, early=False)
        lease = circuit.take()
        assert lease is not None
        assert circuit.take() is None, "there is one probe"
        circuit.ended(lease, success=False, why="failed")
    assert spans == [60.0, 75.0, 93.75, 96.0, 96.0]


def test_one_that_opens_again_soon_goes_on_growing() -> None:
    clock = Clock()
    circuit = made(clock)
    fail(circuit)
    clock.now = circuit.due
    circuit.granted(1, clock.now + 5, early=False)
    lease = circuit.take()
    assert lease is not None
    assert circuit.ended(lease, success=True) is not None
    clock.now += 20
    fail(circuit)
    assert circuit.due - clock.now == pytest.approx(75.0)


# -- the probe and what follows --------------------------------------------------------------------------------------


def half_open(clock: Clock, circuit: Circuit, **lease: bool) -> None:
    fail(circuit)
    clock.now = circuit.due
    circuit.granted(1, clock.now + 5, early=lease.get("early", False))


def test_success_closes_it_with_a_ramp() -> None:
    clock, random = Clock(), Random(1)
    circuit = Circuit(PLACE, Rules(clock, random.random, recovery=60.0))
    half_open(clock, circuit)
    lease = circuit.take()
    assert lease is not None
    change = circuit.ended(lease, success=True)
    assert change is not None
    assert (change.was, change.to) == ("half_open", "closed")
    parts = []
    for _ in range(5):
        parts.append(sum(circuit.admits() for _ in range(400)) / 400)
        clock.now += 2.5
    assert parts[0] == pytest.approx(0.1, abs=0.06)
    assert parts == sorted(parts)
    assert parts[2] == pytest.approx(0.5, abs=0.1)
    assert parts[4] == 1.0
    assert circuit.way_is_free


def test_a_probe_that_is_given_back_is_free_at_once() -> None:
    clock = Clock()
    circuit = made(clock)
    half_open(clock, circuit)
    lease = circuit.take()
    assert lease is not None
    change = circuit.given_back(lease)
    assert change is not None
    assert (change.was, change.to, circuit.wants_probe()) == ("half_open", "open", True)
    assert circuit.ended(lease, success=True) is None, "it ended already"


def test_an_early_probe_that_fails_puts_nothing_off() -> None:
    clock = Clock()
    circuit = made(clock)
    fail(circuit)
    due, times = circuit.due, circuit.reopened
    for _ in range(19):
        assert not circuit.admits()
    assert not circuit.wants_early_probe(), "one in twenty requests at most"
    circuit.admits()
    assert circuit.wants_early_probe()
    circuit.granted(1, clock.now + 5, early=True)
    lease = circuit.take()
    assert lease is not None
    circuit.ended(lease, success=False, why="failed")
    assert (circuit.state, circuit.due, circuit.reopened) == ("open", due, times)
    assert not circuit.wants_early_probe()


def test_what_was_sent_before_a_change_is_no_news_after_it() -> None:
    clock = Clock()
    circuit = made(clock)
    old = circuit.generation
    half_open(clock, circuit)
    lease = circuit.take()
    assert lease is not None
    circuit.ended(lease, success=True)
    for _ in range(10):
        assert circuit.failed(old, "failed", local=False) is None
    assert (circuit.state, circuit.evidence.row) == ("closed", 0)


# -- the fleet -------------------------------------------------------------------------------------------------------


def test_it_follows_the_fleet() -> None:
    clock = Clock()
    circuit = made(clock)
    opened = circuit.adopt(fleet_says(is_open=True, generation=7))
    assert opened is not None
    assert (opened.was, opened.to, circuit.scope) == ("closed", "open", "fleet")
    assert opened.why == (("a", "upstream_timeout"), ("b", "failed"))
    assert circuit.due == clock.now + 5
    assert circuit.adopt(fleet_says(is_open=True, generation=7, due_ms=9000)) is None
    assert circuit.due == clock.now + 9, "another's probe failed"
    assert circuit.vote() is None, "it saw nothing itself"
    closed = circuit.adopt(fleet_says(is_open=False, generation=8))
    assert closed is not None
    assert (closed.to, closed.happening) == ("closed", "healed")
    assert circuit.adopt(fleet_says(is_open=True, generation=7)) is None, "older than what it knows"


def test_a_closed_record_that_it_sees_for_the_first_time_is_no_news() -> None:
    circuit = made(Clock())
    fail(circuit)
    assert circuit.adopt(fleet_says(is_open=False, generation=7)) is None
    assert circuit.state == "open"
    vote = circuit.vote()
    assert vote is not None
    assert vote.generation == 7


def test_what_an_operator_opened_waits_for_an_operator() -> None:
    clock = Clock()
    circuit = made(clock)
    circuit.adopt(fleet_says(is_open=True, generation=7, by_hand=True, due_ms=0))
    clock.now += 10_000
    assert not circuit.wants_probe()
    assert circuit.granted(1, clock.now + 5, early=False) is None
    assert circuit.adopt(fleet_says(is_open=False, generation=8)) is not None


def test_a_prober_with_trouble_of_its_own_does_not_probe_again_at_once() -> None:
    clock = Clock()
    circuit = made(clock)
    circuit.adopt(fleet_says(is_open=True, generation=7, due_ms=0))
    circuit.granted(1, clock.now + 5, early=False)
    lease = circuit.take()
    assert lease is not None
    circuit.ended(lease, success=False, why="dns", local=True)
    circuit.adopt(fleet_says(is_open=True, generation=7, due_ms=0))
    assert not circuit.wants_probe()
    clock.now += 2 * 60
    assert circuit.wants_probe()


def test_what_a_store_forgot_is_said_again() -> None:
    circuit = made(Clock())
    assert circuit.restatement() is None
    circuit.adopt(fleet_says(is_open=True, generation=7, by_hand=True))
    said = circuit.restatement()
    assert said is not None
    assert (said.generation, said.restores, said.open_ms) == (7, "hand", 5000)
