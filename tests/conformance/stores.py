"""What the tests of every store share: a clock to set, scopes, and the stores themselves, opened and closed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeVar

import uvloop

from proxy.budget.amounts import Amounts, Limits
from proxy.store.base import BudgetStore, Remembered, Reservation, Scope, Settlement
from proxy.store.memory import MemoryStore
from proxy.store.redis import RedisStore

T = TypeVar("T")
_names = itertools.count()

TOMBSTONE_MS = 900_000


def wall(*moment: int) -> int:
    """Milliseconds of a moment in UTC: year, month, day, hour, minute, second."""
    return int(datetime(*moment, tzinfo=UTC).timestamp()) * 1000  # type: ignore[arg-type,misc]


NEW_YEAR = wall(2025, 12, 31, 23, 59, 50)
"""Ten seconds before an hour, a day, a month and a year begin."""


class Clock:
    """Wall milliseconds that stand still until they are told to move."""

    def __init__(self, now: int = NEW_YEAR) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def reservation_id(number: int) -> str:
    return f"{number:032x}"


def namespace() -> str:
    """One that no other test of this server uses."""
    return f"test-{next(_names)}"


Make = Callable[[Clock], BudgetStore]
"""A store that is cold, on a clock of the test's. Called within an event loop."""


def make_memory(clock: Clock) -> BudgetStore:
    return MemoryStore(clock=clock, tombstone_ms=TOMBSTONE_MS)


def make_redis(url: str) -> Make:
    # A test that waits for a busy machine proves nothing about the store: the short timeout has tests of its own.
    return lambda clock: RedisStore(
        url, namespace=namespace(), clock=clock, tombstone_ms=TOMBSTONE_MS, timeout_ms=10_000
    )


class Driver:
    """Runs verbs one after the other, for tests that are not coroutines."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)

    def __call__(self, awaitable: Awaitable[T]) -> T:
        async def run() -> T:
            return await awaitable

        return self.runner.run(run())

    def make(self, make: Make, clock: Clock) -> BudgetStore:
        async def run() -> BudgetStore:
            return make(clock)

        return self.runner.run(run())

    def close(self) -> None:
        self.runner.close()


async def opened(store: BudgetStore, *scopes: Scope) -> BudgetStore:
    """The store, told that nothing is remembered of these scopes."""
    await store.seed([Remembered(scope) for scope in scopes], 0)
    return store


def tenant(name: str = "acme", **limits: int) -> Scope:
    return Scope("tenant", name, Limits(**limits))


def ask(
    number: int, *scopes: Scope, requests: int = 1, tokens: int = 0, nano_usd: int = 0, **more: object
) -> Reservation:
    return Reservation(reservation_id(number), scopes, Amounts(requests, tokens, nano_usd), **more)  # type: ignore[arg-type]


def settle(
    number: int, *scopes: Scope, requests: int = 1, tokens: int = 0, nano_usd: int = 0, **more: object
) -> Settlement:
    return Settlement(reservation_id(number), scopes, Amounts(requests, tokens, nano_usd), **more)  # type: ignore[arg-type]
