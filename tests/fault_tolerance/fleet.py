"""Several processes in one: each with circuits of its own, one clock, one store that can go away, one provider."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

from proxy.errors import ConnectFailed, ProxyError, UpstreamUnavailable
from proxy.fault_tolerance.base import BreakerStore, Granted, Report, View
from proxy.fault_tolerance.breaker import Rules
from proxy.fault_tolerance.guard import Circuits, Permit
from proxy.observability.events import InternalFault, Notice
from proxy.store.base import StoreUnavailable

PLACE = ("openai", "gpt-4o")
RECOVERY = 10.0


class Time:
    """Milliseconds for the store, seconds for processes, moved by hand."""

    def __init__(self) -> None:
        self.ms = 1_700_000_000_000

    def wall(self) -> int:
        return self.ms

    def monotonic(self) -> float:
        return self.ms / 1000 - 1_700_000_000 + 1000


class Away:
    """A store that can be cut off, before or after it did what it was asked to."""

    def __init__(self, store: BreakerStore) -> None:
        self.store = store
        self.cut = ""
        self.calls = 0

    async def _pass(self, call: Any) -> Any:
        self.calls += 1
        if self.cut == "before":
            call.close()
            raise StoreUnavailable("timeout")
        answer = await call
        if self.cut == "after":
            raise StoreUnavailable("timeout", uncertain=True)
        return answer

    async def report(self, *words: Any, **more: Any) -> Report:
        return await self._pass(self.store.report(*words, **more))

    async def lease(self, *words: Any, **more: Any) -> Granted | View:
        return await self._pass(self.store.lease(*words, **more))

    async def conclude(self, *words: Any, **more: Any) -> View:
        return await self._pass(self.store.conclude(*words, **more))

    async def command(self, *words: Any, **more: Any) -> View:
        return await self._pass(self.store.command(*words, **more))


class Flight:
    """A request that is under way."""

    def __init__(self, permit: Permit) -> None:
        self.permit = permit
        self.was_probe = permit.is_probe


class Process:
    def __init__(self, store: BreakerStore, time: Time, number: int = 0, **rules: Any) -> None:
        self.name = f"process-{number}"
        self.store = Away(store)
        self.events: list[Notice] = []
        rules = {"threshold": 5, "recovery": RECOVERY, **rules}
        self.circuits = Circuits(
            self.store,
            Rules(time.monotonic, Random(self.name).random, **rules),
            process=self.name,
            emit=self.events.append,
        )
        self.flights: list[Flight] = []
        self.resolver_broken = False

    def moves(self) -> list[str]:
        faults = [event.exc for event in self.events if isinstance(event, InternalFault)]
        assert not faults, faults
        return [event.event for event in self.events]

    @property
    def row(self) -> dict[str, Any]:
        return next((row for row in self.circuits.shown() if (row["provider"], row["model"]) == PLACE), {})

    @property
    def state(self) -> str:
        """Its own: half open where it has the probe."""
        return {0: "closed", 1: "half_open", 2: "open"}[int(self.circuits.states().get(PLACE, 0))]

    async def begin(self, *, last: bool = False) -> Flight | None:
        permit = self.circuits.admit(*PLACE)
        if permit is None:
            found = await self.circuits.probe([PLACE], all_open=last)
            permit = found[1] if found is not None else None
        await settled()
        if permit is None:
            return None
        self.flights.append(Flight(permit))
        return self.flights[-1]

    def end(self, flight: Flight, error: ProxyError | None) -> None:
        self.flights.remove(flight)
        if error is None:
            flight.permit.succeeded()
        else:
            flight.permit.failed(error)

    async def request(self, error: ProxyError | None = None, *, last: bool = False) -> bool:
        """Whether it was sent."""
        flight = await self.begin(last=last)
        if flight is None:
            return False
        self.end(flight, error)
        return True

    async def fail(self, times: int, error: Callable[[], ProxyError] | None = None) -> None:
        for _ in range(times):
            await self.request((error or broken)())


def broken() -> ProxyError:
    return UpstreamUnavailable("The provider answered 503.").but(reason="overloaded")


def unresolved() -> ProxyError:
    return ConnectFailed("The provider's name was not found.", reason="dns")


async def settled() -> None:
    """Waits for what runs beside: questions to the store."""
    asking = [task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__name__", "") == "_ask"]
    if asking:
        await asyncio.wait(asking, timeout=10)
