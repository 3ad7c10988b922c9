"""Whatever is cancelled, and wherever: nothing stays held, and each id is settled once. On the store that counts."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.budget.amounts import Amounts
from proxy.budget.settings import BudgetSettings, LimitSettings
from proxy.errors import BudgetExceeded, ConnectFailed, ProxyError, UpstreamTimeout
from proxy.store.base import Cold, Ended, Granted, Refused, Reservation, Scope, Settled, Settlement, StoreUnavailable
from proxy.store.memory import MemoryStore
from proxy.types import Record, Usage
from tests.budget.scene import OTHER_TARGET, TARGET, TENANT, Clock, Scene, chunk, usage_event, want

pytestmark = pytest.mark.slow


class SlowStore(MemoryStore):
    """A memory store across a network: each verb waits before and after it takes effect, and may lose its answer."""

    def __init__(self, random: Random, clock: Clock, *, loses: float = 0.0) -> None:
        super().__init__(clock=clock)
        self._random = random
        self._loses = loses
        self.reserved: set[str] = set()
        self.outcomes: dict[str, list[str]] = {}

    async def _pause(self) -> None:
        for _ in range(self._random.randrange(3)):
            await asyncio.sleep(0)

    def _lose(self) -> None:
        if self._random.random() < self._loses:
            raise StoreUnavailable("timeout", uncertain=True)

    async def reserve(self, reservation: Reservation) -> Granted | Refused | Ended | Cold:
        await self._pause()
        verdict = await super().reserve(reservation)
        if isinstance(verdict, Granted) and reservation.ask != Amounts():
            self.reserved.add(reservation.id)  # one that asks for nothing only shows that the store is back
        await self._pause()
        self._lose()
        return verdict

    async def top_up(
        self,
        reservation_id: str,
        ask: Amounts,
        scopes: tuple[Scope, ...],
        leave: tuple[tuple[Scope, Amounts], ...] = (),
    ) -> Granted | Refused | Ended | Cold:
        await self._pause()
        verdict = await super().top_up(reservation_id, ask, scopes, leave)
        await self._pause()
        self._lose()
        return verdict

    async def settle(self, settlement: Settlement) -> Settled | Cold:
        await self._pause()
        settled = await super().settle(settlement)
        if isinstance(settled, Settled):
            self.outcomes.setdefault(settlement.id, []).append(settled.outcome)
        await self._pause()
        self._lose()
        return settled

    async def seed(self, remembered: Sequence[Any], collect_ms: int = 0) -> Any:
        await self._pause()
        return await super().seed(remembered, 0)


async def one_request(scene: Scene, random: Random) -> None:
    """A client's request, as the pipeline would drive it, with whatever may happen to it."""
    streams = random.random() < 0.5
    targets = [TARGET, OTHER_TARGET] if random.random() < 0.5 else [TARGET]
    try:
        async with scene.budget.hold(TENANT, "", want(stream=streams), targets, Record()) as charge:
            for target in targets:
                await charge.cover(target)
                await asyncio.sleep(0)
                if random.random() < 0.3:
                    charge.failed(random.choice([UpstreamTimeout("t"), ConnectFailed("c", reason="refused")]))
                    continue
                charge.answered(200)
                await stream(charge, random) if streams else charge.see(usage_event(Usage(5, random.randrange(50))))
                if random.random() < 0.3:
                    async with charge.child(want("again")) as repair:
                        await repair.cover(target)
                        repair.answered(200)
                        await asyncio.sleep(0)
                        repair.see(usage_event(Usage(7, 7)))
                break
    except (BudgetExceeded, ProxyError):
        pass


async def stream(charge: Any, random: Random) -> None:
    for _ in range(random.randrange(400)):
        if charge.see(chunk(" a few more words of the reply")) and not await charge.grow():
            return
        if random.random() < 0.05:
            await asyncio.sleep(0)


async def storm(seed: int, requests: int, loses: float = 0.0) -> None:
    random = Random(seed)
    clock = Clock()
    store = SlowStore(random, clock, loses=loses)
    scene = Scene(
        BudgetSettings(
            tokens_per_minute=random.choice([5_000, 50_000, 10**7]),
            max_concurrent=random.choice([None, 5]),
            on_overrun=random.choice(["finish", "cut"]),
            on_store_error=random.choice(["local", "deny", "allow"]),
            wait_ms=random.choice([0, 50]),
        ),
        accounts={"alpha": LimitSettings(tokens_per_minute=20_000)} if random.random() < 0.5 else None,
        store=store,
        clock=clock,
    )
    scene.budget.start()
    tasks = [asyncio.create_task(one_request(scene, random)) for _ in range(requests)]
    for _each in tasks:
        for _ in range(random.randrange(6)):
            await asyncio.sleep(0)
        if random.random() < 0.6:
            random.choice(tasks).cancel()
            if random.random() < 0.2:
                await asyncio.sleep(0)
                random.choice(tasks).cancel()  # a second time, while it settles
    await asyncio.gather(*tasks, return_exceptions=True)
    store._loses = 0.0
    for _ in range(400):
        if not scene.access.away and not scene.access.waiting and not scene.budget._finishing:
            break
        await asyncio.sleep(0.01)
    await scene.budget.aclose()
    await check(scene, store)


async def check(scene: Scene, store: SlowStore) -> None:
    assert not scene.access.waiting
    assert not scene.access.live
    assert scene.budget.waiting.size == 0
    for scope in scene.policies.scopes:
        balances = await store.balance((scope,))
        if isinstance(balances, tuple):
            row = balances[0].row
            assert (row.live, row.held_tokens, row.held_nano_usd) == (0, 0, 0), scope.place
    booked = Counter({known: sum(one != "already" for one in found) for known, found in store.outcomes.items()})
    assert all(count == 1 for count in booked.values()), "settled twice, or never"
    assert store.reserved <= booked.keys(), "held, and never settled"
    for exposure in scene.budget.admission.exposures.values():
        assert (exposure.tokens, exposure.nano_usd, exposure.running) == (0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_nothing_stays_held_however_requests_are_cancelled(seed: int) -> None:
    asyncio.run(storm(seed, requests=12))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_nothing_stays_held_though_answers_of_the_store_are_lost(seed: int) -> None:
    asyncio.run(storm(seed, requests=8, loses=0.1))


@pytest.mark.parametrize("step", range(60))
def test_a_cancel_at_each_step_of_one_request(step: int) -> None:
    """The task is cancelled after so many turns of the event loop: before, in and after every verb."""

    async def run() -> None:
        clock = Clock()
        store = SlowStore(Random(7), clock)
        scene = Scene(BudgetSettings(tokens_per_minute=50_000), store=store, clock=clock)
        task = asyncio.create_task(one_request(scene, Random(step % 5)))
        for _ in range(step):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await scene.budget.aclose()
        await check(scene, store)

    asyncio.run(run())
    gc.collect()
