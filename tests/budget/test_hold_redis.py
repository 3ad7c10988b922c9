"""Charges over a real Redis: two processes' budgets that share one store, cancels, a server that hangs or forgets."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from uuid import uuid4

import pytest

from proxy.budget.settings import BudgetSettings, LimitSettings
from proxy.errors import BudgetExceeded, ProxyError
from proxy.observability.events import StoreDegraded, StoreRecovered
from proxy.store.redis import RedisStore
from proxy.types import Record, Usage
from tests.budget.scene import TARGET, TENANT, Scene, chunk, usage_event, usd, want
from tests.redis_server import RedisServer, running

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def processes(
    server: RedisServer, count: int, section: BudgetSettings, timeout_ms: int = 10_000
) -> AsyncIterator[list[Scene]]:
    """As many budgets on one store, each with a connection of its own."""
    name = f"hold-{uuid4().hex[:8]}"
    scenes = []
    for _ in range(count):
        store = RedisStore(server.url, namespace=name, timeout_ms=timeout_ms)
        scene = Scene(section, store=store, collect_ms=50, processes=count)
        scene.budget.start()
        scenes.append(scene)
    try:
        yield scenes
    finally:
        for scene in scenes:
            await scene.budget.aclose()
            await scene.store.aclose()


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_two_processes_share_one_budget(redis_server: RedisServer) -> None:
    async with processes(redis_server, 2, BudgetSettings(tokens_per_minute=20_000)) as (one, two):
        served = refused = 0

        async def client(scene: Scene, number: int) -> None:
            nonlocal served, refused
            try:
                await scene.serve(want(max_tokens=500), usage=Usage(10, 490))
                served += 1
            except BudgetExceeded:
                refused += 1

        for _ in range(6):
            await asyncio.gather(*(client(scene, number) for number in range(20) for scene in (one, two)))
        row = await one.row()
        assert (row.live, row.held_tokens) == (0, 0)
        assert row.minute_tokens == served * 500 <= 20_000
        assert row.minute_tokens >= 0.97 * 20_000
        assert refused
        assert (await two.row()).minute_tokens == row.minute_tokens
        assert (await two.used())[0].usage.requests == served


async def test_nothing_stays_held_though_many_leave(redis_server: RedisServer) -> None:
    section = BudgetSettings(tokens_per_minute=10**7, usd_per_day=usd("100"))
    random = Random(11)
    async with processes(redis_server, 2, section) as scenes:

        async def client(scene: Scene) -> None:
            async with scene.budget.hold(TENANT, "", want(stream=True), [TARGET], Record()) as charge:
                await charge.cover(TARGET)
                charge.answered(200)
                for _ in range(random.randrange(40)):
                    if charge.see(chunk(" some words of the reply")):
                        await charge.grow()
                    await asyncio.sleep(0)

        tasks = [asyncio.create_task(client(scene)) for _ in range(100) for scene in scenes]
        for task in tasks:
            if random.random() < 0.6:
                await asyncio.sleep(random.random() * 0.002)
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: not any(scene.access.waiting or scene.budget._finishing for scene in scenes))
        row = await scenes[0].row()
        assert (row.live, row.held_tokens, row.held_nano_usd) == (0, 0, 0)


async def test_a_server_that_hangs_costs_no_request_its_life(redis_server: RedisServer) -> None:
    section = BudgetSettings(tokens_per_minute=10**6)
    async with processes(redis_server, 1, section, timeout_ms=50) as (scene,):
        await scene.serve(usage=Usage(1, 1))
        redis_server.signal(signal.SIGSTOP)
        try:
            loop = asyncio.get_running_loop()
            begun = loop.time()
            await asyncio.gather(*(scene.serve(usage=Usage(10, 10)) for _ in range(50)))
            assert loop.time() - begun < 2
            assert scene.access.away
        finally:
            redis_server.signal(signal.SIGCONT)
        await until(lambda: not scene.access.away and not scene.access.waiting)
        assert (await scene.row()).minute_tokens == 2 + 50 * 20
        kinds = [type(event) for event in scene.events]
        assert kinds.count(StoreDegraded) == kinds.count(StoreRecovered) >= 1


async def test_a_server_that_lost_everything_does_not_open_a_spent_budget(redis_server: RedisServer) -> None:
    async with processes(redis_server, 2, BudgetSettings(usd_per_day=usd("0.010"))) as (one, two):
        await one.serve(usage=Usage(0, 3000))
        await two.serve(usage=Usage(0, 1500))
        redis_server.client().flushall()
        outcomes = await asyncio.gather(
            one.serve(want(max_tokens=900)), two.serve(want(max_tokens=900)), return_exceptions=True
        )
        assert all(isinstance(outcome, BudgetExceeded) for outcome in outcomes), outcomes
        assert (await one.row()).day_nano_usd == 9_000_000


async def test_a_full_server_is_away_once_and_takes_settlements(redis_binary: Path, tmp_path: Path) -> None:
    with running(tmp_path) as server:
        async with processes(server, 1, BudgetSettings(tokens_per_minute=10**6)) as (scene,):
            await scene.serve(usage=Usage(1, 1))
            client = server.client()
            client.config_set("maxmemory", "1")
            for _ in range(3):
                await scene.serve(usage=Usage(10, 10))
            assert scene.access.away
            await until(lambda: not scene.access.waiting)
            kinds = [type(event) for event in scene.events]
            assert (kinds.count(StoreDegraded), kinds.count(StoreRecovered)) == (1, 0)
            degraded = next(event for event in scene.events if isinstance(event, StoreDegraded))
            assert degraded.reason == "full"
            client.config_set("maxmemory", "0")
            await until(lambda: not scene.access.away)
            assert (await scene.row()).minute_tokens == 62


async def test_the_script_cache_may_be_flushed_at_any_time(redis_server: RedisServer) -> None:
    async with processes(redis_server, 1, BudgetSettings(tokens_per_minute=10**6)) as (scene,):
        client = redis_server.client()
        for _ in range(5):
            await scene.serve(usage=Usage(5, 5))
            client.script_flush()
        assert (await scene.row()).minute_tokens == 50


async def test_accounts_limit_all_processes_together(redis_server: RedisServer) -> None:
    store_name = f"hold-{uuid4().hex[:8]}"
    accounts = {"alpha": LimitSettings(max_concurrent=3)}
    scenes = []
    for _ in range(2):
        store = RedisStore(redis_server.url, namespace=store_name, timeout_ms=10_000)
        scenes.append(Scene(store=store, collect_ms=0, accounts=accounts))
    held = []
    refused = 0
    for number in range(6):
        charge = scenes[number % 2].budget.hold(TENANT, "", want(), [TARGET], Record())
        try:
            held.append(await charge.__aenter__())
        except ProxyError:
            refused += 1
    assert (len(held), refused) == (3, 3)
    for charge in held:
        await charge.cover(TARGET)
        charge.answered(200)
        charge.see(usage_event(Usage(1, 1)))
        await charge.__aexit__(None, None, None)
    assert (await scenes[0].row("provider")).live == 0
    for scene in scenes:
        await scene.budget.aclose()
        await scene.store.aclose()
