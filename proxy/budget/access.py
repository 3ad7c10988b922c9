"""The way to the budget store: what it has forgotten is told to it, what it cannot take now is kept for it.

Three states::

    never reached ──an answer──▶ in reach ──a failure──▶ away ──everything booked again──▶ in reach

In reach, every verb goes to the store. Away, none does: no request waits for a store that is gone, settlements queue
up, and one task tries four times a second at first, every eight seconds at last. It is in reach again only after the
queue is empty: what was spent meanwhile counts before anything new is admitted.

Leases are kept here too: one call every ten seconds extends all that are live in this process.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

from proxy.budget.amounts import Amounts
from proxy.budget.watch import Watch
from proxy.observability.events import InternalFault, Notice, StoreDegraded, StoreRecovered, StoreReset
from proxy.store.base import (
    SEED_MS,
    Balance,
    BudgetStore,
    Cold,
    Ended,
    Granted,
    Refused,
    Reservation,
    Scope,
    Settled,
    Settlement,
    StoreUnavailable,
)

LEASE_MS: Final = 30_000
EXTEND_SECONDS: Final = 10.0
QUEUED: Final = 20_000
"""Settlements that wait for the store at most. When it is full, nothing more is admitted that would need a place."""
REPLAYED_AT_ONCE: Final = 64
PROBE_SECONDS: Final = (0.25, 8.0)
"""First and longest pause between two attempts to reach a store that is away."""
STEADY_SECONDS: Final = 5.0
"""A store that was back for less than this is tried again at the longer pause of last time."""

_PROBE: Final = Scope("global", "")
"""Every deployment has it, with limits or without."""

_Answer = TypeVar("_Answer")


class Access:
    """`clock` is the event loop's, in seconds. `processes`: how many share the limits, as last seen, at least 1.

    `collect_ms`: how long an empty store collects what processes remember; 0 for one that no other process uses.
    """

    def __init__(
        self,
        store: BudgetStore,
        watch: Watch,
        *,
        clock: Callable[[], float],
        emit: Callable[[Notice], None],
        processes: Callable[[], int] = lambda: 1,
        collect_ms: int = SEED_MS,
        queued: int = QUEUED,
        extend_seconds: float = EXTEND_SECONDS,
    ) -> None:
        self.store = store
        self.watch = watch
        self.reached = False
        """The store answered once: what it knew then is a ground to go on from while it is away."""
        self.away = False
        self.outages = 0
        """How often it went away."""
        self.waiting: deque[Settlement] = deque()
        """Settlements that the store has not taken yet, the oldest first."""
        self.live: set[str] = set()
        """Reservations of this process that may be live in the store."""
        self.dropped = 0
        self.processes = processes
        self._clock = clock
        self._emit = emit
        self._collect_ms = collect_ms
        self._queued = queued
        self._extend_seconds = extend_seconds
        self._seeds = 0
        self._seeding = asyncio.Lock()
        self._wake = asyncio.Event()
        self._away_since = 0.0
        self._back_since = float("-inf")
        self._pause = PROBE_SECONDS[0]
        self._extend_at = clock() + extend_seconds
        self._tender: asyncio.Task[None] | None = None

    @property
    def has_room(self) -> bool:
        """One more settlement can be kept."""
        return len(self.waiting) < self._queued

    def start(self) -> None:
        """Begins to keep leases and to replay. The event loop must run."""
        self._tender = asyncio.get_running_loop().create_task(self._tend())

    async def aclose(self) -> None:
        """One last attempt for everything that waits. What even that does not book, its lease will."""
        if self._tender is not None:
            self._tender.cancel()
            with suppress(asyncio.CancelledError):
                await self._tender
            self._tender = None
        with suppress(StoreUnavailable):
            await self._replay()

    # -- verbs -------------------------------------------------------------------------------------------------------

    async def reserve(self, reservation: Reservation) -> Granted | Refused | Ended:
        """Raises StoreUnavailable. After that, or when cancelled, the reservation may stand: settle it either way."""
        if not self.away:
            try:
                verdict = await self.store.reserve(reservation)
            except StoreUnavailable as error:
                self._lost(error.reason)
                raise
            if not isinstance(verdict, Cold):
                self.reached = True
                return self._seen(verdict)
        return self._seen(await self._call(lambda: self.store.reserve(reservation)))

    async def top_up(
        self, reservation_id: str, ask: Amounts, scopes: tuple[Scope, ...], leave: tuple[tuple[Scope, Amounts], ...]
    ) -> Granted | Refused | Ended:
        """Raises StoreUnavailable."""
        return self._seen(await self._call(lambda: self.store.top_up(reservation_id, ask, scopes, leave)))

    async def balance(self, scopes: tuple[Scope, ...]) -> tuple[Balance, ...]:
        """The figures of scopes, those that the store has never seen included. Raises StoreUnavailable."""
        balances = await self._call(lambda: self.store.balance(scopes)) if scopes else ()
        self.watch.saw(balances)
        return balances

    async def settle(self, settlement: Settlement) -> Settled | None:
        """Books it now; None: it is kept until the store takes it. Never raises StoreUnavailable."""
        self.live.discard(settlement.id)
        if not self.away:
            try:
                settled = await self.store.settle(settlement)
                if isinstance(settled, Cold):
                    settled = await self._call(lambda: self.store.settle(settlement))
            except StoreUnavailable as error:
                self._lost(error.reason)
            except asyncio.CancelledError:
                self._keep(settlement)
                raise
            else:
                self.watch.saw(settled.balances)
                return settled
        self._keep(settlement)
        return None

    def _keep(self, settlement: Settlement) -> None:
        if len(self.waiting) >= self._queued:
            self.waiting.popleft()
            self.dropped += 1
        self.waiting.append(settlement)

    def _seen(self, verdict: Granted | Refused | Ended) -> Granted | Refused | Ended:
        if isinstance(verdict, Granted):
            self.watch.saw(verdict.balances)
        return verdict

    async def _call(self, verb: Callable[[], Awaitable[_Answer | Cold]]) -> _Answer:
        """The answer of a verb, once the store knows what it must know for it."""
        if self.away:
            raise StoreUnavailable("open")
        try:
            return await self._ask(verb)
        except StoreUnavailable as error:
            self._lost(error.reason)
            raise

    async def _ask(self, verb: Callable[[], Awaitable[_Answer | Cold]]) -> _Answer:
        for _ in range(3):  # an empty store, then a scope that it does not know, then the answer
            seeds = self._seeds
            answer = await verb()
            if not isinstance(answer, Cold):
                self.reached = True
                return answer
            await self._seed(answer.scopes, seeds)
        raise StoreUnavailable("refused")

    # -- a store that forgot -----------------------------------------------------------------------------------------

    async def _seed(self, scopes: tuple[Scope, ...], seeds: int) -> None:
        async with self._seeding:
            if not scopes and self._seeds != seeds:
                return  # Somebody told it everything while we waited for the lock.
            remembered = self.watch.remembered(scopes)
            until = self._clock() + self._collect_ms / 1000 + 1.0
            while True:
                seeded = await self.store.seed(remembered, self._collect_ms)
                if seeded.first and self._collect_ms:
                    self._emit(StoreReset(scopes=sum(any(one.spent) for one in remembered)))
                if not seeded.wait_ms:
                    self._seeds += 1
                    return
                if self._clock() >= until:
                    raise StoreUnavailable("timeout")
                await asyncio.sleep(seeded.wait_ms / 1000)

    # -- a store that is away ----------------------------------------------------------------------------------------

    def _lost(self, reason: str) -> None:
        if self.away:
            return
        now = self._clock()
        steady = now - self._back_since >= STEADY_SECONDS
        self._pause = PROBE_SECONDS[0] if steady else min(self._pause * 2, PROBE_SECONDS[1])
        self.away = True
        self.outages += 1
        self._away_since = now
        self._emit(StoreDegraded(reason=reason, processes=self.processes()))
        self._wake.set()

    async def _tend(self) -> None:
        while True:
            pause = self._pause if self.away else max(self._extend_at - self._clock(), 0.0)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            if self._wake.is_set():
                self._wake.clear()
                continue
            try:
                if self.away:
                    await self._recover()
                else:
                    await self._extend()
            except StoreUnavailable as error:
                self._pause = min(self._pause * 2, PROBE_SECONDS[1])
                self._lost(error.reason)

    async def _recover(self) -> None:
        await self._ask(lambda: self.store.balance((_PROBE,)))
        replayed = await self._replay()
        self._back_since = self._clock()
        self.away = False
        lost, self.dropped = self.dropped, 0
        self._emit(StoreRecovered(away=self._back_since - self._away_since, replayed=replayed, lost=lost))
        await self._extend()

    async def _replay(self) -> int:
        """Books what waits, in order. Returns how many were booked."""
        replayed = 0
        while self.waiting:
            batch = [self.waiting[index] for index in range(min(len(self.waiting), REPLAYED_AT_ONCE))]
            answers = await asyncio.gather(*(self._book(one) for one in batch), return_exceptions=True)
            away: BaseException | None = None
            for settlement, answer in zip(batch, answers, strict=True):
                if isinstance(answer, StoreUnavailable):
                    away = answer
                    continue
                replayed += 1
                with suppress(ValueError):  # a full queue may have dropped it meanwhile
                    self.waiting.remove(settlement)
                if answer is not None:
                    # What no store can take must not stand in the way of all that come after it.
                    assert isinstance(answer, Exception)
                    self._emit(InternalFault(where="booking a settlement", exc=answer))
            if away is not None:
                raise away
        return replayed

    async def _book(self, settlement: Settlement) -> None:
        settled = await self._ask(lambda: self.store.settle(settlement))
        self.watch.saw(settled.balances)

    async def _extend(self) -> None:
        self._extend_at = self._clock() + self._extend_seconds
        if self.waiting and not self.away:
            await self._replay()
        ids = list(self.live)
        if ids:
            lost = await self._ask(lambda: self.store.extend(ids, LEASE_MS))
            self.live.difference_update(lost)
