"""A process that runs for weeks: the store in memory keeps what it must know, and no more."""

from __future__ import annotations

import tracemalloc

import pytest

from proxy.store.base import Ended, Entry, Settled, Tally
from proxy.store.memory import MemoryStore
from tests.conformance.stores import Clock, ask, opened, settle, tenant

pytestmark = pytest.mark.anyio


async def used_bytes(store: MemoryStore, clock: Clock, first: int, count: int, step_ms: int) -> int:
    """Allocated after a number of requests, each with a roll-up field of its own."""
    scope = tenant()
    for number in range(first, first + count):
        entry = Entry(("acme", "", "m", "p", str(number % 7), "true"), Tally(requests=1), ("id", str(number)))
        await store.reserve(ask(number, scope, lease_ms=1000))
        if number % 2:  # every other one is lost
            await store.settle(settle(number, scope, entries=(entry,)))
        clock.now += step_ms
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.slow
async def test_a_long_run_does_not_grow() -> None:
    clock = Clock()
    store = MemoryStore(clock=clock, records=100)
    await opened(store, tenant())
    tracemalloc.start()
    try:
        # Six requests an hour, for seventy days: more than the roll-ups keep.
        after_long = await used_bytes(store, clock, 0, 70 * 24 * 6, 600_000)
        after_longer = await used_bytes(store, clock, 20_000, 70 * 24 * 6, 600_000)
    finally:
        tracemalloc.stop()
    assert after_longer < 1.1 * after_long
    assert len(await store.outbox("", 1000)) == 100


async def test_an_ended_reservation_is_known_until_its_time_is_over_even_under_load() -> None:
    clock, scope = Clock(), tenant()
    store = MemoryStore(clock=clock, tombstone_ms=60_000, settled_kept=50)
    await opened(store, scope)
    for number in range(200):
        await store.reserve(ask(number, scope, lease_ms=1000 if number == 0 else 500_000))
    clock.now += 1000
    for number in range(1, 200):
        await store.settle(settle(number, scope))
    assert await store.reserve(ask(190, scope)) == Ended()
    late = await store.settle(settle(0, scope))
    assert isinstance(late, Settled)
    assert late.outcome == "late", "what is only settled makes room; what expired waits for its settlement"
    again = await store.settle(settle(10, scope))
    assert isinstance(again, Settled)
    assert again.outcome == "unknown", "the oldest of what is settled was forgotten"
