"""Keeps this process's circuits in step with the fleet's: what waits for the store, and nobody waits for.

One background task reports what this process has opened and which probes it has under way, and adopts what the fleet
made of that: at once after a change of its own, four times a second while anything is not closed, and twice a second
otherwise, which is also how the others know that this process lives. With the store away every circuit goes on by
itself: votes are said again with each report, so nothing has to be kept for its return.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import msgspec

from proxy.fault_tolerance.base import (
    ALIVE_MS,
    EARLY_MS,
    LEASE_MS,
    Action,
    BreakerStore,
    Granted,
    Outcome,
    Place,
    Probe,
    View,
)
from proxy.fault_tolerance.breaker import Change, Circuit
from proxy.store.base import StoreUnavailable

BUSY_SECONDS: Final = 0.25
CALM_SECONDS: Final = 0.5
_MARGIN: Final = 0.1
"""Of a lease: we stop believing in it before the store does."""
_MOST_WAITING: Final = 1000


class Conclusion(msgspec.Struct, frozen=True):
    """How a probe ended, for the store."""

    circuit: Circuit
    number: int
    outcome: Outcome
    open_ms: int
    generation: int


class Keeper:
    """`circuits` gives all of this process, `of` one by its place; `tell` hears of each change, `fault` of our own
    faults. `clock` is monotonic, in seconds. `process` names this one in the fleet, and is used by no other."""

    def __init__(
        self,
        store: BreakerStore,
        process: str,
        *,
        clock: Callable[[], float],
        circuits: Callable[[], Iterable[Circuit]],
        of: Callable[[Place], Circuit],
        tell: Callable[[Change | None], None],
        fault: Callable[[Exception], None],
    ) -> None:
        self._store = store
        self._process = process
        self._clock = clock
        self._circuits = circuits
        self._of = of
        self._tell = tell
        self._fault = fault
        self.live = 1
        """Processes that live, as last seen."""
        self._since_ms = 0
        self._wake = asyncio.Event()
        self._conclusions: deque[Conclusion] = deque(maxlen=_MOST_WAITING)
        self._forgotten: list[Circuit] = []
        """Open ones whose record the store has lost."""
        self._asking: dict[Place, asyncio.Task[None]] = {}
        self._ask_again: dict[Place, float] = {}
        self._tender: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._tender = asyncio.get_running_loop().create_task(self._tend())

    async def aclose(self) -> None:
        """Leaves the fleet: its votes, its probes and its sign of life."""
        tasks = [*self._asking.values(), *([self._tender] if self._tender is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(StoreUnavailable):
            await self._conclude()
            await self._store.report(self._process, (), (), self._since_ms, alive_ms=0)

    def hurry(self) -> None:
        """Something changed: the others should know."""
        self._wake.set()

    def conclude(self, conclusion: Conclusion) -> None:
        self._conclusions.append(conclusion)
        self._wake.set()

    async def command(self, circuit: Circuit, action: Action) -> bool:
        """By hand, for the whole fleet; False where the store is away and it holds for this process alone."""
        opened = action == "open"
        try:
            view = await self._store.command(circuit.place, action, self._process)
        except StoreUnavailable:
            self._tell(circuit.force(opened=opened))
            return False
        self._tell(circuit.adopt(view))
        if opened != (circuit.state != "closed"):
            self._tell(circuit.force(opened=opened))  # it was this process's alone
        return True

    # -- the probe ---------------------------------------------------------------------------------------------------

    def ask(self, circuit: Circuit, *, early: bool = False) -> asyncio.Task[None] | None:
        """Asks for the probe of a circuit, unless the answer is known. What it waits for ends by itself."""
        place = circuit.place
        asking = self._asking.get(place)
        if asking is None and self._clock() >= self._ask_again.get(place, 0.0):
            asking = asyncio.get_running_loop().create_task(self._ask(circuit, early))
            self._asking[place] = asking
            asking.add_done_callback(lambda _: self._asking.pop(place, None))
        return asking

    async def _ask(self, circuit: Circuit, early: bool) -> None:
        sent = self._clock()
        if early:
            self._ask_again[circuit.place] = sent + EARLY_MS / 1000
        until = sent + LEASE_MS / 1000 - _MARGIN
        try:
            answer = await self._store.lease(circuit.place, self._process, circuit.fleet or 0, early=early)
        except StoreUnavailable:
            self._tell(circuit.granted(0, until, early=early))  # each process by itself
            return
        except Exception as error:  # A fault of ours must not turn into a request that waits, or a task that is lost.
            self._ask_again[circuit.place] = sent + BUSY_SECONDS
            self._fault(error)
            return
        if isinstance(answer, Granted):
            self._granted(circuit, answer.number, until, early)
        else:
            self._ask_again[circuit.place] = self._clock() + BUSY_SECONDS
            self._tell(circuit.adopt(answer))

    def _granted(self, circuit: Circuit, number: int, until: float, early: bool) -> None:
        generation = circuit.fleet or 0
        change = circuit.granted(number, until, early=early)
        self._tell(change)
        if change is None:  # meanwhile it closed, or was opened by hand
            self.conclude(Conclusion(circuit, number, "lost", 0, generation))

    # -- the fleet ---------------------------------------------------------------------------------------------------

    async def round(self) -> None:
        """One exchange with the fleet. Raises nothing."""
        try:
            self._expire()
            await self._conclude()
            await self._report()
        except StoreUnavailable:
            pass  # its owner says so; every circuit goes on by itself
        except Exception as error:  # The circuits of this process must not fall out of step for good.
            self._fault(error)

    async def _tend(self) -> None:
        while True:
            await self.round()
            with suppress(TimeoutError):
                async with asyncio.timeout(BUSY_SECONDS if self._is_busy() else CALM_SECONDS):
                    await self._wake.wait()
            self._wake.clear()

    def _is_busy(self) -> bool:
        return bool(self._conclusions) or any(
            circuit.state != "closed" or circuit.healed is not None for circuit in self._circuits()
        )

    def _expire(self) -> None:
        """Gives back probes that nobody sent, or that go on for too long."""
        for circuit in self._circuits():
            lease = circuit.expired()
            if lease is not None:
                self._tell(circuit.given_back(lease, over=True))
                if lease.number:
                    self._conclusions.append(Conclusion(circuit, lease.number, "lost", 0, lease.generation))

    async def _conclude(self) -> None:
        for circuit in list(self._circuits()):  # a request that comes meanwhile may bring a new one
            healed = circuit.healed
            if healed is not None:
                view = await self._conclusion(Conclusion(circuit, 0, "success", 0, healed))
                if circuit.healed == healed:
                    circuit.healed = None
                self._tell(circuit.adopt(view))
        while self._conclusions:
            one = self._conclusions.popleft()
            try:
                view = await self._conclusion(one)
            except StoreUnavailable:
                # The lease ends by itself. That the provider is well must not be lost.
                if one.outcome == "success" and one.circuit.fleet == one.generation:
                    one.circuit.healed = one.generation
                raise
            self._tell(one.circuit.adopt(view))

    async def _conclusion(self, one: Conclusion) -> View:
        return await self._store.conclude(
            one.circuit.place, self._process, one.number, one.outcome, open_ms=one.open_ms, generation=one.generation
        )

    async def _report(self) -> None:
        circuits = list(self._circuits())
        votes = [vote for circuit in circuits if (vote := circuit.vote()) is not None]
        leases = {circuit.place: circuit.lease for circuit in circuits if circuit.lease is not None}
        probes = [Probe(place, lease.number) for place, lease in leases.items() if lease.number and lease.taken]
        votes += [said for circuit in self._forgotten if (said := circuit.restatement()) is not None]
        until = self._clock() + LEASE_MS / 1000 - _MARGIN
        report = await self._store.report(self._process, votes, probes, self._since_ms, alive_ms=ALIVE_MS)
        self._since_ms, self.live = report.now_ms, report.live
        for probe in probes:
            lease = leases[probe.place]
            if probe in report.lost:
                self._tell(self._of(probe.place).given_back(lease, over=True))
            else:
                lease.until = until
        for view in report.views:
            self._tell(self._of(view.place).adopt(view))
        known = {view.place for view in report.views}
        self._forgotten = [one for one in circuits if one.place not in known and one.restatement() is not None]
