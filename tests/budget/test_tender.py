"""What the tender does for a store that is away, empty, full or another one; and how a process ends without it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from proxy.budget.settings import BudgetSettings
from proxy.errors import BudgetExceeded, StoreUnavailable
from proxy.observability.events import (
    InternalFault,
    SettlementsLost,
    StoreDegraded,
    StoreMisconfigured,
    StoreRecovered,
    StoreReset,
)
from proxy.store import base
from proxy.store.base import Balance, Scope, Server
from proxy.store.memory import MemoryStore
from proxy.types import Record, Usage
from tests.budget.scene import TARGET, TENANT, Clock, Scene, usage_event, usd, want
from tests.conformance.stores import reservation_id

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Faulty:
    """A memory store whose verbs fail as told: `faults` by verb, called before it. `asked`: what was called."""

    def __init__(self, clock: Clock) -> None:
        self.inner = MemoryStore(clock=clock)
        self.faults: dict[str, Callable[[], None]] = {}
        self.asked: list[str] = []
        self.told: list[int] = []
        """How many scopes each `seed` told of."""
        self.info: Server | None = None

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def verb(*given: Any) -> Any:
            self.asked.append(name)
            if name == "seed":
                self.told.append(len(given[0]))
            await asyncio.sleep(0)
            if (fault := self.faults.get(name, self.faults.get("*"))) is not None:
                fault()
            return self.info if name == "server" else await getattr(self.inner, name)(*given)

        return verb


def fails(reason: base.Reason) -> Callable[[], None]:
    def fault() -> None:
        raise base.StoreUnavailable(reason, uncertain=reason == "timeout")

    return fault


def scene_of(section: BudgetSettings | None = None, **more: Any) -> tuple[Scene, Faulty]:
    clock = Clock()
    store = Faulty(clock)
    section = section or BudgetSettings(tokens_per_minute=100_000)
    return Scene(section, store=store, clock=clock, **more), store  # type: ignore[arg-type]


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def count(scene: Scene, kind: type) -> int:
    return sum(isinstance(event, kind) for event in scene.events)


async def test_it_reaches_for_the_store_before_anybody_asks() -> None:
    scene, store = scene_of()
    scene.budget.start()
    await until(lambda: scene.access.reached)
    assert store.asked[:3] == ["beat", "server", "seed"]
    assert scene.events == []
    await scene.budget.aclose()
    assert store.asked[-1] == "beat", "it leaves"
    assert (await store.inner.beat(reservation_id(1), 1000)).processes == 1


async def test_a_store_that_is_not_there_at_the_start_is_said_once_and_waited_for() -> None:
    scene, store = scene_of()
    store.faults["*"] = fails("connect")
    failed: list[str] = []
    scene.access.failed = failed.append  # type: ignore[assignment]
    scene.budget.start()
    await until(lambda: store.asked.count("beat") >= 3)
    with pytest.raises(StoreUnavailable):
        await scene.serve()
    assert "reserve" not in store.asked, "no request waits for it"
    assert (count(scene, StoreDegraded), scene.access.reached, scene.access.has_share) == (1, False, False)
    store.faults.clear()
    await until(lambda: not scene.access.away)
    await scene.serve()
    assert (count(scene, StoreDegraded), count(scene, StoreRecovered)) == (1, 1)
    assert set(failed) == {"beat"}
    await scene.budget.aclose()


async def test_a_store_whose_memory_is_full_is_away_once_and_takes_settlements() -> None:
    scene, store = scene_of()
    scene.budget.start()
    async with scene.budget.hold(TENANT, "", want(), [TARGET], Record()) as charge:
        store.faults["reserve"] = fails("full")
        await scene.serve(usage=Usage(30, 30))  # of its share
        await charge.cover(TARGET)
        charge.answered(200)
        charge.see(usage_event(Usage(10, 10)))
    assert scene.access.away
    await until(lambda: not scene.access.waiting)
    tries = store.asked.count("reserve")
    await until(lambda: store.asked.count("reserve") >= tries + 1)
    assert (scene.access.away, count(scene, StoreDegraded), count(scene, StoreRecovered)) == (True, 1, 0)
    found = await store.inner.balance([Scope("tenant", TENANT)])
    assert isinstance(found, tuple)
    assert (found[0].row.minute_tokens, found[0].row.live) == (80, 0)
    store.faults.clear()
    await until(lambda: not scene.access.away)
    (recovered,) = (event for event in scene.events if isinstance(event, StoreRecovered))
    assert recovered.replayed == 2
    await scene.budget.aclose()


async def test_an_old_failure_says_nothing_of_a_store_that_is_back() -> None:
    scene, store = scene_of()
    scene.budget.start()
    await scene.serve()
    late = asyncio.Event()

    async def slow() -> base.Granted:
        await late.wait()
        raise base.StoreUnavailable("timeout", uncertain=True)

    asked = asyncio.create_task(scene.access._call("reserve", slow))
    await asyncio.sleep(0)
    store.faults["*"] = fails("closed")
    await scene.serve()
    store.faults.clear()
    await until(lambda: not scene.access.away)
    late.set()
    with pytest.raises(base.StoreUnavailable):
        await asked
    assert not scene.access.away
    await scene.budget.aclose()


async def test_of_many_who_wait_for_an_empty_store_that_hangs_only_the_first_tries() -> None:
    scene, store = scene_of(BudgetSettings(tokens_per_minute=100_000, on_store_error="deny"))
    await scene.serve()
    store.inner = MemoryStore(clock=scene.clock)
    store.faults["seed"] = fails("timeout")
    store.asked.clear()
    outcomes = await asyncio.gather(*(scene.serve() for _ in range(50)), return_exceptions=True)
    assert {type(one) for one in outcomes} == {StoreUnavailable}
    assert store.asked.count("seed") == 1


async def test_who_did_not_hear_that_the_store_began_anew_tells_it_all_the_same() -> None:
    """Another process seeded it, with less than this one knows."""
    scene, store = scene_of(BudgetSettings(usd_per_day=usd("0.010")), beat_seconds=0.01)
    scene.budget.start()
    await scene.serve(usage=Usage(0, 4500))
    scene.clock.ms += 1000
    store.inner = MemoryStore(clock=scene.clock)
    await store.inner.seed([base.Remembered(Scope("tenant", TENANT))], 0)
    store.asked.clear()
    await until(lambda: "seed" in store.asked and store.asked.count("beat") > 3)
    assert store.asked.count("seed") == 1
    with pytest.raises(BudgetExceeded):
        await scene.serve(want(max_tokens=600))
    assert (await scene.row()).day_nano_usd == 9_000_000
    await scene.budget.aclose()


async def test_thousands_of_scopes_are_told_in_parts() -> None:
    scene, store = scene_of()
    await scene.serve()
    row = await scene.row()
    scene.watch.saw([Balance(Scope("tenant", f"t{number}"), row._replace(day_nano_usd=1)) for number in range(1000)])
    store.inner = MemoryStore(clock=scene.clock)
    store.told.clear()
    await scene.serve()
    assert sum(store.told) >= 1001
    assert max(store.told) <= 200
    assert isinstance(await store.inner.balance([Scope("tenant", f"t{number}") for number in range(1000)]), tuple)


async def test_a_server_that_will_not_do_is_said_once_however_often_it_comes_back() -> None:
    scene, store = scene_of()
    store.info = Server("6.0.16", "allkeys-lru", ("version", "eviction"))
    scene.budget.start()
    await until(lambda: scene.access.reached)
    for faults in ({"server": fails("timeout")}, {}):
        store.faults = {"*": fails("closed")}
        await scene.serve()
        store.faults = dict(faults)
        await until(lambda: not scene.access.away)
    assert [event for event in scene.events if isinstance(event, StoreMisconfigured)] == [
        StoreMisconfigured(version="6.0.16", eviction="allkeys-lru", shortcomings=("version", "eviction"))
    ]
    await scene.budget.aclose()


async def test_a_fault_of_ours_does_not_end_it() -> None:
    scene, store = scene_of(beat_seconds=0.01)
    scene.budget.start()
    await until(lambda: scene.access.reached)

    def fault() -> None:
        raise KeyError("a bug")

    store.faults["beat"] = fault
    await until(lambda: scene.access.away)
    store.faults.clear()
    await until(lambda: not scene.access.away)
    assert count(scene, InternalFault) >= 1
    await scene.budget.aclose()


async def test_a_process_that_ends_without_its_store_says_what_is_lost() -> None:
    scene, store = scene_of()
    await scene.serve()
    store.faults["*"] = fails("closed")
    await scene.serve()
    await scene.access.aclose(0.0)
    assert scene.events[-1] == SettlementsLost(count=1)


async def test_a_process_that_ends_waits_a_while_for_its_store() -> None:
    scene, store = scene_of()
    await scene.serve()
    store.faults["*"] = fails("closed")
    await scene.serve(usage=Usage(7, 7))
    closing = asyncio.create_task(scene.access.aclose(5.0))
    await until(lambda: store.asked.count("settle") >= 2)
    store.faults.clear()
    await closing
    assert not scene.access.waiting
    assert count(scene, SettlementsLost) == 0


async def test_it_is_seeding_while_it_collects() -> None:
    scene, _ = scene_of(collect_ms=200)
    scene.budget.start()
    await until(lambda: scene.access.seeding)
    assert not scene.access.reached
    scene.clock.ms += 1000
    await until(lambda: scene.access.reached)
    assert not scene.access.seeding
    assert count(scene, StoreReset) == 1
    await scene.budget.aclose()


async def test_what_is_reserved_can_be_overspent_where_what_is_lost_is_given_back() -> None:
    for on_lost, expected in (("charge", 0), ("refund", 1)):
        section = BudgetSettings(tokens_per_minute=5000, estimate="max", on_overrun="cut", on_lost=on_lost)  # type: ignore[arg-type]
        scene, _ = scene_of(section)
        async with scene.budget.hold(TENANT, "", want(max_tokens=50), [TARGET], Record()):
            (report,) = await scene.budget.report()
            (tokens,) = (one for one in report.windows if one.window == "tokens_per_minute")
            assert tokens.reserved >= 50
            assert tokens.bound == expected * tokens.reserved
