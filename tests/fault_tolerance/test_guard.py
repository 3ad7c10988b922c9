"""Permits and the registry: what a request sees, what the fleet hears, and that nothing waits for the store."""

from __future__ import annotations

import asyncio
import contextlib
from itertools import pairwise
from typing import Any

import pytest

from proxy.errors import InvalidRequest, UpstreamRateLimited
from proxy.fault_tolerance.base import BreakerStore
from proxy.fault_tolerance.breaker import Rules
from proxy.fault_tolerance.guard import Circuits, NoCircuits
from proxy.observability.events import Notice
from proxy.observability.upstream_events import CircuitClosed, CircuitOpened
from proxy.store.memory_circuits import MemoryCircuits
from tests.fault_tolerance.fleet import PLACE, Process, Time, broken, settled, unresolved

pytestmark = pytest.mark.anyio


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def store(time: Time) -> BreakerStore:
    return MemoryCircuits(clock=time.wall)


@pytest.fixture
def fleet(store: BreakerStore, time: Time) -> list[Process]:
    return [Process(store, time, number) for number in range(4)]


async def all_sync(fleet: list[Process]) -> None:
    for process in fleet:
        await process.circuits.sync()


def pass_open_time(time: Time) -> None:
    time.ms += 13_000  # more than a first open time, jitter included


# -- permits ---------------------------------------------------------------------------------------------------------


async def test_a_permit_ends_once(fleet: list[Process]) -> None:
    one = fleet[0]
    permit = one.circuits.admit(*PLACE)
    assert permit is not None
    permit.failed(broken())
    permit.failed(broken())
    permit.succeeded()
    assert one.row["failures_in_a_row"] == 1
    assert one.row["last_10_seconds"] == {"attempts": 1, "failed": 1}


@pytest.mark.parametrize(
    ("error", "attempts", "failed"),
    [
        (None, 1, 0),
        (broken(), 1, 1),
        (unresolved(), 1, 1),
        (UpstreamRateLimited("429"), 0, 0),
        (InvalidRequest("a client's own fault"), 0, 0),
        (asyncio.CancelledError(), 0, 0),
        (ZeroDivisionError(), 0, 0),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_as_a_context_it_ends_as_the_error_says(
    fleet: list[Process], error: BaseException | None, attempts: int, failed: int
) -> None:
    permit = fleet[0].circuits.admit(*PLACE)
    assert permit is not None
    with contextlib.suppress(type(error)) if error is not None else contextlib.nullcontext(), permit:
        if error is not None:
            raise error
    assert fleet[0].row["last_10_seconds"] == {"attempts": attempts, "failed": failed}


async def test_a_probe_whose_client_left_is_free_for_others_at_once(fleet: list[Process], time: Time) -> None:
    first, second, *_ = fleet
    await all_sync(fleet)
    await first.fail(5)
    await second.fail(5)
    await all_sync(fleet)
    await all_sync(fleet)
    pass_open_time(time)
    started = asyncio.Event()

    async def request() -> None:
        flight = await first.begin()
        assert flight is not None
        assert flight.was_probe
        with flight.permit:
            started.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(request())
    await started.wait()
    assert await second.begin() is None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await first.circuits.sync()
    time.ms += 250
    flight = await second.begin()
    assert flight is not None
    assert flight.was_probe


async def test_the_first_event_of_a_stream_is_enough_for_a_probe(fleet: list[Process], time: Time) -> None:
    one = fleet[0]
    await one.fail(5)
    pass_open_time(time)
    flight = await one.begin()
    assert flight is not None
    flight.permit.answered()
    assert one.state == "closed"
    flight.permit.failed(broken())
    assert one.row["failures_in_a_row"] == 1, "what comes after it counts as with any other"
    assert one.moves() == ["circuit.opened", "circuit.half_open", "circuit.closed"]


# -- the fleet -------------------------------------------------------------------------------------------------------


async def test_two_of_four_open_it_for_all_and_one_probe_closes_it_for_all(fleet: list[Process], time: Time) -> None:
    await all_sync(fleet)
    await fleet[0].fail(5)
    await all_sync(fleet)
    assert [process.state for process in fleet] == ["open", "closed", "closed", "closed"]
    assert fleet[1].row["votes"] == [{"process": "process-0", "why": "overloaded"}]
    await fleet[1].fail(5)
    await all_sync(fleet)
    await all_sync(fleet)
    assert [process.state for process in fleet] == ["open"] * 4
    (opened,) = [event for event in fleet[3].events if isinstance(event, CircuitOpened)]
    assert (opened.scope, opened.was, opened.mode) == ("fleet", "closed", "enforce")
    assert opened.why == ("process-0: overloaded", "process-1: overloaded")
    pass_open_time(time)
    flights = [await process.begin() for process in fleet]
    assert [flight is not None for flight in flights] == [True, False, False, False]
    await all_sync(fleet)
    assert [process.state for process in fleet] == ["half_open"] * 4
    fleet[0].end(fleet[0].flights[0], None)
    await all_sync(fleet)
    assert [process.state for process in fleet] == ["closed"] * 4
    (closed,) = [event for event in fleet[3].events if isinstance(event, CircuitClosed)]
    assert (closed.cause, closed.was) == ("healed", "open")
    assert closed.open_seconds == pytest.approx(13.0)


async def test_one_process_with_a_broken_resolver_shuts_nobody_else_out(fleet: list[Process], time: Time) -> None:
    for _ in range(40):
        await fleet[0].fail(6, unresolved)
        await all_sync(fleet)
        time.ms += 1000
    assert fleet[0].state == "open"
    assert [process.moves() for process in fleet[1:]] == [[]] * 3
    assert fleet[1].row.get("votes", []) == []


async def test_one_that_lives_alone_is_the_fleet(store: BreakerStore, time: Time) -> None:
    one = Process(store, time)
    await one.circuits.sync()
    await one.fail(5)
    await one.circuits.sync()
    assert one.row["scope"] == "process", "the others may only be slower to come"
    time.ms += 1000
    await one.circuits.sync()
    assert one.row["scope"] == "fleet"
    assert one.moves() == ["circuit.opened"], "what the process has told the fleet need not tell it"
    late = Process(store, time, 1)
    await late.circuits.sync()
    assert late.state == "open", "one that starts into an outage does not need failures of its own"
    await one.circuits.command(*PLACE, "open")
    assert one.moves() == ["circuit.opened"] * 2, "an operator's word is another"


async def test_votes_of_the_dead_do_not_count(fleet: list[Process], time: Time) -> None:
    await all_sync(fleet)
    await fleet[0].fail(5)
    await fleet[0].circuits.sync()
    time.ms += 3001
    await all_sync(fleet[1:])
    await fleet[1].fail(5)
    await all_sync(fleet[1:])
    assert [process.state for process in fleet[1:]] == ["open", "closed", "closed"]


async def test_leaving_takes_votes_and_probes_along(fleet: list[Process], time: Time) -> None:
    await all_sync(fleet)
    await fleet[0].fail(5)
    for _ in range(13):
        time.ms += 1000
        await all_sync(fleet)
    assert await fleet[0].begin() is not None
    await fleet[0].circuits.aclose()
    await fleet[1].circuits.sync()
    assert (fleet[1].row["votes"], fleet[1].row["probe"], fleet[1].circuits.live) == ([], None, 3)


async def test_a_store_that_lost_everything_is_told_again(fleet: list[Process], time: Time) -> None:
    await fleet[0].circuits.command(*PLACE, "open")
    await all_sync(fleet)
    assert [process.state for process in fleet] == ["open"] * 4
    empty = MemoryCircuits(clock=time.wall)
    for process in fleet:
        process.store.store = empty
    await all_sync(fleet)
    await all_sync(fleet)
    late = Process(empty, time, 9)
    await late.circuits.sync()
    assert (late.state, late.row["scope"]) == ("open", "hand")


async def test_after_an_outage_of_the_store_one_vote_is_still_one_vote(fleet: list[Process], time: Time) -> None:
    await all_sync(fleet)
    await fleet[0].fail(5)
    time.ms += 9000
    await all_sync(fleet)
    time.ms += 1500
    await all_sync(fleet)
    assert [process.state for process in fleet] == ["open", "closed", "closed", "closed"]


async def test_a_store_whose_clock_went_back_holds_nobody_up(fleet: list[Process], time: Time) -> None:
    wall = [time.ms]
    store = MemoryCircuits(clock=lambda: wall[0])
    for process in fleet:
        process.store.store = store
    await all_sync(fleet)
    await fleet[0].fail(5)
    await fleet[1].fail(5)
    await all_sync(fleet)
    await all_sync(fleet)
    wall[0] -= 3_600_000
    await all_sync(fleet)
    assert await fleet[2].request(), "an hour back is not an hour more to wait"
    await all_sync(fleet)
    await all_sync(fleet)
    assert [process.state for process in fleet] == ["closed"] * 4


# -- without the store -----------------------------------------------------------------------------------------------


async def test_without_the_store_each_process_goes_on_by_itself(fleet: list[Process], time: Time) -> None:
    for process in fleet:
        process.store.cut = "before"
    await fleet[0].fail(5)
    await all_sync(fleet)
    assert [process.state for process in fleet] == ["open", "closed", "closed", "closed"]
    pass_open_time(time)
    first = await fleet[0].begin()
    assert first is not None
    assert first.was_probe
    assert await fleet[0].begin() is None, "one at a time, here too"
    fleet[0].end(first, None)
    assert fleet[0].state == "closed"
    assert (await fleet[0].circuits.command(*PLACE, "open"))["fleet"] is False
    assert await fleet[0].begin(last=True) is None
    assert (await fleet[0].circuits.command(*PLACE, "reset"))["fleet"] is False
    assert await fleet[0].request()


async def test_what_was_proved_while_the_store_was_away_is_told_to_it(fleet: list[Process], time: Time) -> None:
    await all_sync(fleet)
    await fleet[0].fail(5)
    await fleet[1].fail(5)
    await all_sync(fleet)
    await all_sync(fleet)
    fleet[0].store.cut = "before"
    pass_open_time(time)
    assert await fleet[0].request()
    assert [process.state for process in fleet] == ["closed", "open", "open", "open"]
    fleet[0].store.cut = ""
    await all_sync(fleet)
    assert [process.state for process in fleet] == ["closed"] * 4


# -- where all targets are open --------------------------------------------------------------------------------------


async def test_all_open_lets_few_requests_through_before_their_time(fleet: list[Process], time: Time) -> None:
    await all_sync(fleet)
    for process in fleet:
        await process.fail(5)
    await all_sync(fleet)
    await all_sync(fleet)
    asked = sent = 0
    moments = []
    for _ in range(700):
        time.ms += 10
        for process in fleet:
            asked += 1
            if await process.request(broken(), last=True):
                sent += 1
                moments.append(time.ms)
        await all_sync(fleet)
    assert 1 <= sent <= 0.05 * asked
    assert all(later - earlier >= 1000 for earlier, later in pairwise(moments))


async def test_a_ramp_turns_nobody_away_who_has_no_other_target(fleet: list[Process], time: Time) -> None:
    one = fleet[0]
    await one.fail(5)
    pass_open_time(time)
    assert await one.request()
    answers = [await one.request(last=True) for _ in range(50)]
    assert all(answers)
    found = await one.circuits.probe([("down", "x"), PLACE])
    assert found is not None


async def test_the_target_that_is_due_is_asked_first(time: Time, store: BreakerStore) -> None:
    one = Process(store, time)
    for model in ("a", "b"):
        for _ in range(5):
            permit = one.circuits.admit("openai", model)
            assert permit is not None
            permit.failed(broken())
        time.ms += 11_500
    found = await one.circuits.probe([("openai", "b"), ("openai", "a")], all_open=False)
    assert found is not None
    index, permit = found
    assert (index, permit.is_probe) == (1, True)


async def test_the_next_request_has_the_probe_where_nobody_waited_for_it(fleet: list[Process], time: Time) -> None:
    one = fleet[0]
    await one.fail(5)
    pass_open_time(time)
    assert one.circuits.admit(*PLACE) is None
    await settled()
    permit = one.circuits.admit(*PLACE)
    assert permit is not None
    assert permit.is_probe


async def test_a_probe_that_nobody_sent_is_given_back(fleet: list[Process], time: Time) -> None:
    one = fleet[0]
    await one.fail(5)
    pass_open_time(time)
    one.circuits.admit(*PLACE)
    await settled()
    await all_sync(fleet)
    time.ms += 5000
    assert one.circuits.admit(*PLACE) is None
    await one.circuits.sync()
    await one.circuits.sync()
    assert (one.state, one.row["probe"]) == ("open", None)
    assert await one.request()


# -- modes, operators, bounds ----------------------------------------------------------------------------------------


async def test_observing_refuses_nothing_and_says_everything(store: BreakerStore, time: Time) -> None:
    events: list[Notice] = []
    circuits = Circuits(
        store, Rules(time.monotonic, lambda: 0.5, recovery=10.0), process="p", emit=events.append, refuses=False
    )

    def request(error: Any = None) -> None:
        permit = circuits.admit(*PLACE)
        assert permit is not None
        permit.succeeded() if error is None else permit.failed(error)

    for _ in range(30):
        request(broken())
    assert circuits.states() == {PLACE: 2}
    pass_open_time(time)
    for _ in range(3):
        request()
        await settled()
    assert circuits.states() == {PLACE: 0}
    assert [event.event for event in events] == ["circuit.opened", "circuit.half_open", "circuit.closed"]
    assert {event.mode for event in events if isinstance(event, CircuitOpened | CircuitClosed)} == {"observe"}


async def test_switched_off_there_is_nothing_to_ask() -> None:
    guard = NoCircuits()
    permit = guard.admit(*PLACE)
    assert permit is not None
    for _ in range(20):
        with permit:
            permit.failed(broken())
    assert guard.admit(*PLACE) is permit
    assert await guard.probe([]) is None
    assert guard.states() == {}


async def test_by_hand(fleet: list[Process]) -> None:
    one, other, *_ = fleet
    row = await one.circuits.command(*PLACE, "open")
    assert (row["state"], row["scope"], row["fleet"], row["open_for_ms"]) == ("open", "hand", True, None)
    await other.circuits.sync()
    assert other.row["opened_by"] == [{"process": "process-0", "why": "by hand"}]
    assert not await other.request(last=True)
    row = await other.circuits.command(*PLACE, "reset")
    assert (row["state"], row["scope"]) == ("closed", None)
    await one.circuits.sync()
    assert all([await one.request() for _ in range(20)]), "no ramp after a reset"
    one.store.cut = "before"
    await one.circuits.command(*PLACE, "open")
    one.store.cut = ""
    assert (await one.circuits.command(*PLACE, "reset"))["state"] == "closed"


async def test_by_hand_where_the_fleet_never_heard_of_it(fleet: list[Process]) -> None:
    one = fleet[0]
    one.store.cut = "before"
    await one.circuits.command(*PLACE, "open")
    one.store.cut = ""
    assert (await one.circuits.command(*PLACE, "reset"))["state"] == "closed"
    assert one.moves() == ["circuit.opened", "circuit.closed"]


async def test_circuits_have_a_bound(store: BreakerStore, time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.fault_tolerance.guard.MAX_CIRCUITS", 3)
    one = Process(store, time)
    for number in range(50):
        permit = one.circuits.admit("openai", f"model-{number}")
        assert permit is not None
        permit.succeeded()
    assert len(one.circuits.states()) == 4
    assert ("openai", "other") in one.circuits.states()
