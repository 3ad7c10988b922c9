"""A timed-out attempt is counted while the next one is under way: nobody waits for its books, and nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from proxy.budget.plan import Want
from proxy.budget.settings import BudgetSettings
from proxy.errors import UpstreamTimeout
from proxy.store.base import UsageRow
from proxy.tokens.count import Counter
from proxy.types import Record, Usage
from tests.budget.scene import OTHER_TARGET, TARGET, TENANT, Scene, usage_event, want

pytestmark = pytest.mark.anyio

LIMITED = BudgetSettings(mode="enforce", tokens_per_minute=1_000_000)
TOLD = Usage(100, 5)
WORDS = 20_000


class Busy:
    """A tokenizer's thread with something else to do."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._freed = Event()
        self.counter = Counter(executor=pool)
        pool.submit(self._freed.wait)

    def is_free(self) -> None:
        self._freed.set()


@pytest.fixture
def busy() -> Iterator[Busy]:
    with ThreadPoolExecutor(1) as pool:
        found = Busy(pool)
        try:
            yield found
        finally:
            found.is_free()


def total(row: UsageRow) -> int:
    return row.usage.input + row.usage.output


def long() -> Want:
    """More than is counted on the loop."""
    return want("many words " * (WORDS // 2))


async def test_the_next_attempt_does_not_wait_for_the_books_of_the_last(busy: Busy) -> None:
    scene, record = Scene(), Record()
    scene.budget.counter = busy.counter
    async with scene.budget.hold(TENANT, "", long(), [TARGET, OTHER_TARGET], record) as tab:
        await tab.cover(TARGET)
        tab.failed(UpstreamTimeout("late"))
        async with asyncio.timeout(5):
            await tab.cover(OTHER_TARGET)
        tab.answered(200)
        tab.see(usage_event(TOLD))
        assert (record.usage, record.costs) == (None, False)  # nobody knows the whole of it yet
        busy.is_free()
    assert record.usage is not None
    assert record.usage.input > WORDS + TOLD.input
    assert record.usage.output > TOLD.output
    assert record.usage.estimated
    rows = {row.dimensions: row for row in await scene.used("provider")}
    assert total(rows["beta",]) == TOLD.total
    assert total(rows["alpha",]) == record.usage.total - TOLD.total


async def test_what_was_counted_in_time_is_told_with_the_reply(busy: Busy) -> None:
    scene, record = Scene(), Record()
    scene.budget.counter = busy.counter
    async with scene.budget.hold(TENANT, "", long(), [TARGET, OTHER_TARGET], record) as tab:
        await tab.cover(TARGET)
        tab.failed(UpstreamTimeout("late"))
        await tab.cover(OTHER_TARGET)
        tab.answered(200)
        tab.see(usage_event(TOLD))
        busy.is_free()
        async with asyncio.timeout(5):
            while not record.costs:
                await asyncio.sleep(0.001)
        told = record.usage
        assert told is not None
        assert told.input > WORDS + TOLD.input
    assert record.usage == told


@pytest.mark.parametrize("section", [None, LIMITED], ids=["free", "limited"])
async def test_a_client_that_leaves_meanwhile_is_billed_for_it_once(busy: Busy, section: BudgetSettings | None) -> None:
    scene, record = Scene(section), Record()
    asks = long()
    covered = asyncio.Event()

    async def request() -> None:
        async with scene.budget.hold(TENANT, "", asks, [TARGET, OTHER_TARGET], record) as tab:
            scene.budget.counter = busy.counter  # a limit has counted before this
            asks.input_bound = 0
            await tab.cover(TARGET)
            tab.failed(UpstreamTimeout("late"))
            covered.set()
            await tab.cover(OTHER_TARGET)
            await asyncio.sleep(60)

    task = asyncio.create_task(request())
    await covered.wait()
    task.cancel()
    busy.is_free()
    with pytest.raises(asyncio.CancelledError):
        await task
    await scene.budget.aclose()
    rows = {row.dimensions: row for row in await scene.used("provider")}
    assert record.usage is not None
    assert record.usage.output > 0
    assert WORDS < total(rows["alpha",]) < 2 * WORDS
