"""A store that is away, that forgot, or loses answers: what is admitted meanwhile, and what is booked in the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from proxy.budget.amounts import Limits, Row
from proxy.budget.settings import BudgetSettings
from proxy.budget.watch import Watch, slice_of
from proxy.errors import BudgetExceeded, StoreUnavailable
from proxy.observability.events import StoreDegraded, StoreRecovered, StoreReset
from proxy.store import base
from proxy.store.base import Balance, Scope
from proxy.store.memory import MemoryStore
from proxy.types import Record, Usage
from tests.budget.scene import TARGET, TENANT, WALL_MS, Clock, Scene, chunk, usage_event, usd, want

pytestmark = pytest.mark.anyio

_Answer = TypeVar("_Answer")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Distant:
    """A memory store behind a line that can be cut. `inner` is replaced by an empty one, for a store that forgot."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.inner = MemoryStore(clock=clock)
        self.down = False
        self.loses_next = False
        self.asked = 0

    async def _pass(self, verb: Callable[[], Awaitable[_Answer]]) -> _Answer:
        self.asked += 1
        await asyncio.sleep(0)
        if self.down:
            raise base.StoreUnavailable("timeout", uncertain=True)
        answer = await verb()
        if self.loses_next:
            self.loses_next = False
            raise base.StoreUnavailable("timeout", uncertain=True)
        return answer

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        return lambda *given: self._pass(lambda: getattr(self.inner, name)(*given))


def scene_with(store: Distant, section: BudgetSettings | None = None, **more: Any) -> Scene:
    return Scene(section or BudgetSettings(tokens_per_minute=10_000), store=store, clock=store.clock, **more)  # type: ignore[arg-type]


async def back(scene: Scene) -> None:
    async with asyncio.timeout(10):
        while scene.access.away or scene.access.waiting:
            await asyncio.sleep(0.01)


async def spent(store: Distant, tenant: str = TENANT) -> Row:
    balances = await store.inner.balance([Scope("tenant", tenant)])
    assert isinstance(balances, tuple)
    return balances[0].row


async def test_an_outage_is_bridged_and_everything_is_booked_once() -> None:
    store = Distant(Clock())
    scene = scene_with(store)
    scene.budget.start()
    await scene.serve(usage=Usage(10, 10))
    store.down = True
    for _ in range(4):
        record = Record()
        async with scene.budget.hold(TENANT, "", want(), [TARGET], record) as charge:
            assert charge.degraded
            await charge.cover(TARGET)
            charge.answered(200)
            charge.see(usage_event(Usage(100, 100)))
        assert record.usage == Usage(100, 100)
    assert (await spent(store)).minute_tokens == 20
    asked = store.asked
    assert len(scene.access.waiting) == 4
    store.down = False
    await back(scene)
    row = await spent(store)
    assert (row.minute_tokens, row.live, row.held_tokens) == (820, 0, 0)
    assert store.asked - asked < 30
    kinds = [type(event) for event in scene.events]
    assert kinds.count(StoreDegraded) == kinds.count(StoreRecovered) == 1
    (recovered,) = (event for event in scene.events if isinstance(event, StoreRecovered))
    assert recovered.replayed == 4
    await scene.serve()
    await scene.budget.aclose()


async def test_only_the_first_request_waits_for_a_store_that_is_gone() -> None:
    store = Distant(Clock())
    scene = scene_with(store)
    await scene.serve()
    store.down = True
    await scene.serve()
    asked = store.asked
    for _ in range(5):
        await scene.serve()
    assert store.asked == asked


async def test_in_an_outage_each_process_has_its_share_and_no_more() -> None:
    store = Distant(Clock())
    scene = scene_with(store, BudgetSettings(tokens_per_minute=20_000), processes=4)
    await scene.serve(usage=Usage(10, 10))
    store.down = True
    admitted = []

    async def serve_all() -> None:
        for _ in range(100):
            record = await scene.serve(usage=Usage(500, 500))
            admitted.append(record)

    with pytest.raises(BudgetExceeded):
        await serve_all()
    assert 3 <= len(admitted) <= 5


async def test_of_a_calendar_window_a_process_may_take_its_share_of_what_was_left() -> None:
    store = Distant(Clock())
    scene = scene_with(store, BudgetSettings(usd_per_day=usd("0.010")), processes=2)
    await scene.serve(usage=Usage(0, 2000))  # 0.004 of 0.010
    store.down = True
    paid: list[int] = []

    async def serve_all() -> None:
        for _ in range(100):
            record = await scene.serve(want(max_tokens=100), usage=Usage(0, 100))
            paid.append(record.nano_usd or 0)

    with pytest.raises(StoreUnavailable) as caught:
        await serve_all()
    assert caught.value.status == 503
    assert 0 < sum(paid) <= 3_000_000


async def test_deny_refuses_and_allow_lets_pass() -> None:
    store = Distant(Clock())
    scene = scene_with(store, BudgetSettings(tokens_per_minute=2000, on_store_error="deny"))
    await scene.serve()
    store.down = True
    with pytest.raises(StoreUnavailable) as caught:
        await scene.serve()
    assert (caught.value.status, caught.value.code) == (503, "store_unavailable")
    store = Distant(Clock())
    scene = scene_with(store, BudgetSettings(tokens_per_minute=2000, on_store_error="allow"))
    scene.budget.start()
    store.down = True
    for _ in range(5):
        await scene.serve(usage=Usage(1000, 900))
    store.down = False
    await back(scene)
    assert (await spent(store)).minute_tokens == 5 * 1900
    await scene.budget.aclose()


async def test_a_process_that_never_reached_its_store_refuses() -> None:
    store = Distant(Clock())
    store.down = True
    scene = scene_with(store)
    with pytest.raises(StoreUnavailable):
        await scene.serve()
    assert not scene.access.reached


async def test_whoever_only_watches_is_served_without_a_store() -> None:
    store = Distant(Clock())
    store.down = True
    scene = scene_with(store, BudgetSettings(mode="observe", tokens_per_minute=10, on_store_error="deny"))
    record = await scene.serve()
    assert record.usage is not None


async def test_a_reservation_whose_answer_was_lost_is_given_back() -> None:
    store = Distant(Clock())
    scene = scene_with(store, BudgetSettings(tokens_per_minute=10_000, on_store_error="deny"))
    scene.budget.start()
    await scene.serve(usage=Usage(1, 1))
    store.loses_next = True
    with pytest.raises(StoreUnavailable):
        await scene.serve()
    await back(scene)
    row = await spent(store)
    assert (row.live, row.held_tokens, row.minute_tokens) == (0, 0, 2)
    await scene.budget.aclose()


async def test_a_settlement_whose_answer_was_lost_is_booked_once() -> None:
    store = Distant(Clock())
    scene = scene_with(store)
    scene.budget.start()
    async with scene.budget.hold(TENANT, "", want(), [TARGET], Record()) as charge:
        await charge.cover(TARGET)
        charge.answered(200)
        charge.see(usage_event(Usage(30, 30)))
        store.loses_next = True
    await back(scene)
    row = await spent(store)
    assert (row.minute_tokens, row.minute_requests, row.live) == (60, 1, 0)
    assert (await scene.used())[0].usage.requests == 1
    await scene.budget.aclose()


async def test_a_store_that_forgot_is_told_what_was_spent() -> None:
    store = Distant(Clock())
    scene = scene_with(store, BudgetSettings(usd_per_day=usd("0.010")), collect_ms=20)

    async def time_passes() -> None:
        while True:
            await asyncio.sleep(0.005)
            store.clock.ms += 10

    ticking = asyncio.create_task(time_passes())
    await scene.serve(usage=Usage(0, 4000))
    store.inner = MemoryStore(clock=store.clock)
    with pytest.raises(BudgetExceeded):
        await scene.serve(want(max_tokens=1500))
    await scene.serve(want(max_tokens=500), usage=Usage(0, 10))
    ticking.cancel()
    assert (await spent(store)).day_nano_usd == 8_020_000
    resets = [event for event in scene.events if isinstance(event, StoreReset)]
    assert [event.scopes for event in resets[-1:]] == [1]


async def test_settlements_that_find_no_room_are_counted_and_nothing_more_is_admitted() -> None:
    store = Distant(Clock())
    scene = scene_with(store, queued=3)
    await scene.serve()
    charges = [scene.budget.hold(TENANT, "", want(max_tokens=10), [TARGET], Record()) for _ in range(5)]
    for charge in charges:
        await charge.__aenter__()
    store.down = True
    for charge in charges:
        await charge.__aexit__(None, None, None)
    assert (len(scene.access.waiting), scene.access.dropped) == (3, 2)
    with pytest.raises(StoreUnavailable):
        await scene.serve()
    scene.budget.start()
    store.down = False
    await back(scene)
    (recovered,) = (event for event in scene.events if isinstance(event, StoreRecovered))
    assert (recovered.replayed, recovered.lost) == (3, 2)
    await scene.budget.aclose()


async def test_leases_are_kept_while_a_request_lives() -> None:
    store = Distant(Clock())
    scene = scene_with(store, extend_seconds=0.01)
    scene.budget.start()
    async with scene.budget.hold(TENANT, "", want(), [TARGET], Record()) as charge:
        for _ in range(6):
            store.clock.pass_seconds(20)
            asked = store.asked
            async with asyncio.timeout(5):
                while store.asked < asked + 2:
                    await asyncio.sleep(0.005)
        assert (await spent(store)).live == 1
        await charge.cover(TARGET)
        charge.answered(200)
        charge.see(usage_event(Usage(1, 1)))
    assert (await spent(store)).live == 0
    await scene.budget.aclose()


async def test_a_lease_that_was_lost_is_corrected_by_the_settlement() -> None:
    store = Distant(Clock())
    scene = scene_with(store)
    async with scene.budget.hold(TENANT, "", want(), [TARGET], Record()) as charge:
        await charge.cover(TARGET)
        charge.answered(200)
        charge.see(usage_event(Usage(5, 5)))
        store.clock.pass_seconds(31)
        assert (await spent(store)).live == 0
    row = await spent(store)
    assert (row.minute_tokens, row.held_tokens) == (10, 0)


async def test_a_failover_after_a_lost_lease_reserves_anew() -> None:
    store = Distant(Clock())
    scene = scene_with(store, BudgetSettings(usd_per_day=usd("1")))
    record = Record()
    async with scene.budget.hold(TENANT, "", want(), [TARGET], record) as charge:
        await charge.cover(TARGET)
        charge.answered(200)
        charge.see(usage_event(Usage(5, 5)))
        store.clock.pass_seconds(31)
        await charge.cover(TARGET)
        assert (await spent(store)).live == 1
        charge.answered(200)
        charge.see(usage_event(Usage(7, 7)))
    row = await spent(store)
    assert row.live == 0
    assert row.day_nano_usd == record.nano_usd == 12 * 1000 + 12 * 2000
    assert (await scene.used())[0].usage.nano_usd == 36_000


async def test_a_growing_stream_meets_an_outage() -> None:
    store = Distant(Clock())
    scene = scene_with(store, BudgetSettings(tokens_per_minute=50_000, on_overrun="cut"))
    async with scene.budget.hold(TENANT, "", want(stream=True), [TARGET], Record()) as charge:
        await charge.cover(TARGET)
        charge.answered(200)
        store.down = True
        cut = False
        for _ in range(3000):
            if charge.see(chunk(" word")) and not await charge.grow():
                cut = True
                break
        assert cut, "nobody could say that there is room"


async def test_what_the_share_admitted_is_held_before_the_store_is_in_reach_again() -> None:
    store = Distant(Clock())
    scene = scene_with(store)
    scene.budget.start()
    await scene.serve(usage=Usage(10, 10))
    store.down = True
    await scene.serve(usage=Usage(10, 10))
    async with scene.budget.hold(TENANT, "", want(max_tokens=100), [TARGET], Record()) as charge:
        await charge.cover(TARGET)
        charge.answered(200)
        store.down = False
        await back(scene)
        row = await spent(store)
        assert (row.live, row.held_tokens) == (1, charge.held.ask.tokens)
        charge.see(usage_event(Usage(5, 5)))
    row = await spent(store)
    assert (row.live, row.held_tokens, row.minute_tokens, row.minute_requests) == (0, 0, 50, 3)
    assert not scene.access.live
    assert not scene.access.taken
    await scene.budget.aclose()


async def test_an_empty_store_holds_what_runs_and_remembers_the_minute() -> None:
    store = Distant(Clock())
    scene = scene_with(store, BudgetSettings(tokens_per_minute=1000, estimate="max"))
    await scene.serve(want(max_tokens=100), usage=Usage(100, 100))
    async with scene.budget.hold(TENANT, "", want(max_tokens=700), [TARGET], Record()) as charge:
        await charge.cover(TARGET)
        charge.answered(200)
        store.inner = MemoryStore(clock=store.clock)
        with pytest.raises(BudgetExceeded):
            await scene.serve(want(max_tokens=200))
        row = await spent(store)
        assert (row.live, row.held_tokens, row.minute_tokens) == (1, charge.held.ask.tokens, 200)
        charge.see(usage_event(Usage(5, 5)))
    row = await spent(store)
    assert (row.live, row.held_tokens, row.minute_tokens) == (0, 0, 210)


async def test_a_stream_whose_lease_was_lost_reserves_anew_and_goes_on() -> None:
    store = Distant(Clock())
    scene = scene_with(store, BudgetSettings(tokens_per_minute=100_000, on_overrun="cut"))
    async with scene.budget.hold(TENANT, "", want(stream=True), [TARGET], Record()) as charge:
        await charge.cover(TARGET)
        charge.answered(200)
        before = charge.held.id
        store.clock.pass_seconds(31)
        assert (await spent(store)).live == 0
        for _ in range(3000):
            assert not charge.see(chunk(" word")) or await charge.grow()
        assert charge.held.id != before
        assert (await spent(store)).live == 1
    await scene.access.replay()
    row = await spent(store)
    assert (row.live, row.held_tokens, row.minute_requests) == (0, 0, 1)
    assert 3000 <= row.minute_tokens < 3100


# -- what is known while it is away ----------------------------------------------------------------------------------


def row(**figures: int) -> Row:
    hour = WALL_MS // 3_600_000
    base_figures = dict.fromkeys(Row._fields, 0) | {"hour": hour, "day": hour // 24, "month": 0}
    return Row(**(base_figures | figures))


LIMITS = Limits(60, 6000, 600, 1000, 2000, None, 8)


def test_a_slice_is_a_share_of_what_is_left() -> None:
    scope = Scope("tenant", "t", LIMITS)
    seen = row(hour_nano_usd=400, day_nano_usd=1900, held_nano_usd=50)
    assert slice_of(scope, seen, 2, WALL_MS).limits == Limits(30, 3000, 300, 275, 25, None, 4)


def test_a_window_that_is_over_is_full_again_less_what_is_held() -> None:
    scope = Scope("tenant", "t", LIMITS)
    seen = row(hour_nano_usd=1000, day_nano_usd=1990, held_nano_usd=50)
    later = slice_of(scope, seen, 1, WALL_MS + 3_600_000).limits
    assert (later.nano_usd_per_hour, later.nano_usd_per_day) == (950, 0)
    tomorrow = slice_of(scope, seen, 1, WALL_MS + 24 * 3_600_000).limits
    assert tomorrow.nano_usd_per_day == 1950


def test_of_a_scope_nobody_saw_nothing_is_known_to_be_left() -> None:
    limits = slice_of(Scope("tenant", "t", LIMITS), None, 1, WALL_MS).limits
    assert (limits.nano_usd_per_hour, limits.nano_usd_per_day, limits.nano_usd_per_month) == (0, 0, None)
    assert limits.tokens_per_minute == 6000


def test_the_highest_figures_of_a_window_are_remembered() -> None:
    watch, scope = Watch(), Scope("tenant", "t", LIMITS)

    def see(**figures: int) -> None:
        watch.saw([Balance(scope, row(**figures))])

    see(hour_nano_usd=5, day_nano_usd=50, month_nano_usd=500)
    see(hour_nano_usd=2, day_nano_usd=20, month_nano_usd=200)
    (found,) = watch.remembered()
    assert found.spent == (5, 50, 500)
    hour = WALL_MS // 3_600_000
    see(hour=hour + 1, hour_nano_usd=3, day_nano_usd=60, month_nano_usd=600)
    (found,) = watch.remembered([scope])
    assert found.spent == (3, 60, 600)
    assert watch.remembered([Scope("tenant", "u")])[0].spent == (0, 0, 0)


def test_the_highest_figures_of_a_second_loss_are_remembered_too() -> None:
    watch, scope = Watch(), Scope("tenant", "t", LIMITS)
    for spent in (500, 200, 900, 300):
        watch.saw([Balance(scope, row(hour_nano_usd=spent, day_nano_usd=spent, month_nano_usd=spent))])
    assert watch.remembered()[0].spent == (900, 900, 900)
