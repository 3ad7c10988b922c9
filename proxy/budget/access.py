"""The way to the budget store: what it has forgotten is told to it, what it cannot take now is kept for it.

Three states::

    never reached ──an answer──▶ in reach ──a failure──▶ away ──everything booked again──▶ in reach

In reach, every verb goes to the store. Away, none does: no request waits for a store that is gone, settlements queue
up, and one task, the `tender`, tries to reach it. It is in reach again only after it was told what this process
remembers and holds, the queue is empty, and a reservation came through: what was spent meanwhile counts before anything
new is admitted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from secrets import token_hex
from typing import Final, TypeVar

from proxy.budget.amounts import Amounts
from proxy.budget.fleet import BEAT_SECONDS, Fleet
from proxy.budget.tender import EXTEND_SECONDS, Op, Tender
from proxy.budget.watch import Watch
from proxy.observability.events import (
    InternalFault,
    Notice,
    SettlementsLost,
    StoreDegraded,
    StoreRecovered,
    StoreReset,
)
from proxy.store.base import (
    SEED_MS,
    Balance,
    BudgetStore,
    Cold,
    Dimension,
    Ended,
    Granted,
    Reason,
    Refused,
    Remembered,
    Reservation,
    Scope,
    Settled,
    Settlement,
    StoreUnavailable,
    UsageRow,
)

QUEUED: Final = 20_000
"""Settlements that wait for the store at most. When it is full, nothing more is admitted that would need a place."""
REPLAYED_AT_ONCE: Final = 64
SEEDED_AT_ONCE: Final = 200
"""Scopes that one call tells of: a script of thousands would hold up everybody, and be late itself."""
GIVEN_AT_ONCE: Final = 64
"""Reservations, likewise."""
AGAIN_SECONDS: Final = 0.25
"""Between two attempts at the end of the process."""
STEADY_SECONDS: Final = 5.0
"""A store that was back for less than this is flapping."""

_Answer = TypeVar("_Answer")


def _to_come(settlement: Settlement) -> Reservation:
    """What a settlement will take, as long as it waits."""
    return Reservation(settlement.id, settlement.scopes, settlement.actual)


class Access:
    """`clock` is the event loop's, in seconds. `process_id`: as the id of a reservation; made up if there is none.

    `collect_ms`: how long an empty store collects what processes remember; 0 for one that no other process uses.
    """

    def __init__(
        self,
        store: BudgetStore,
        watch: Watch,
        *,
        clock: Callable[[], float],
        emit: Callable[[Notice], None],
        process_id: str = "",
        collect_ms: int = SEED_MS,
        queued: int = QUEUED,
        extend_seconds: float = EXTEND_SECONDS,
        beat_seconds: float = BEAT_SECONDS,
    ) -> None:
        self.store = store
        self.watch = watch
        self.fleet = Fleet(beat_seconds)
        self.failed: Callable[[Op], None] = lambda op: None
        """Told of every call that the store did not answer as it should."""
        self.reached = False
        """The store answered once, and was open."""
        self.seeding = False
        """The store is empty, and collects what processes remember."""
        self.away = False
        self.outages = 0
        """How often it went away."""
        self.has_share = False
        """Of the outage that is, or was last: this process may go on with its share of what it knew before."""
        self.waiting: deque[Settlement] = deque()
        """Settlements that the store has not taken yet, the oldest first."""
        self.live: dict[str, Reservation] = {}
        """What this process was granted, by the store or by its own share, as it was last raised, and has not settled.
        By id."""
        self.taken: dict[str, Reservation] = {}
        """Those of them that its own share granted, and the store was not told of yet."""
        self.dropped = 0
        self._clock = clock
        self._emit = emit
        self._collect_ms = collect_ms
        self._queued = queued
        self._seeds = 0
        self._seeds_failed = 0
        self._seeding = asyncio.Lock()
        self._away_since = 0.0
        self._back_since = float("-inf")
        self._replayed = 0
        self._tender = Tender(
            self, process_id or token_hex(16), clock, emit, extend_seconds=extend_seconds, beat_seconds=beat_seconds
        )

    @property
    def has_room(self) -> bool:
        """One more settlement can be kept."""
        return len(self.waiting) < self._queued

    @property
    def processes(self) -> int:
        """How many share the limits, as last seen, at least 1; never counted lower while the store is away."""
        return self.fleet.processes

    def start(self) -> None:
        """Begins to reach for the store, to keep leases and to replay. The event loop must run."""
        self._tender.start()

    async def aclose(self, grace_seconds: float = 2.0) -> None:
        """Tries for so long to book everything that waits, then leaves. A lease books what it still holds by itself;
        what it never heard of is lost, and counted in one event."""
        await self._tender.stop()
        until = self._clock() + grace_seconds
        while self.waiting:
            try:
                await self.replay()
            except StoreUnavailable:
                if self._clock() + AGAIN_SECONDS >= until:
                    break
                await asyncio.sleep(AGAIN_SECONDS)
        if lost := len(self.waiting) + self.dropped:
            self._emit(SettlementsLost(count=lost))
        await self._tender.leave()

    # -- verbs -------------------------------------------------------------------------------------------------------

    async def reserve(self, reservation: Reservation) -> Granted | Refused | Ended:
        """Raises StoreUnavailable. After that, or when cancelled, the reservation may stand: settle it either way."""
        if not self.away:
            outages = self.outages
            try:  # not by `_call`: the answer that nearly always comes needs none of what that does
                verdict = await self.store.reserve(reservation)
            except StoreUnavailable as error:
                self._missed("reserve", error, outages)
                raise
            if not isinstance(verdict, Cold):
                self.reached = True
                return self._seen(verdict, reservation)
        return self._seen(await self._call("reserve", lambda: self.store.reserve(reservation)), reservation)

    def took(self, reservation: Reservation) -> None:
        """This process's own share granted it, while the store is away."""
        self.live[reservation.id] = self.taken[reservation.id] = reservation

    async def top_up(
        self, reservation_id: str, ask: Amounts, scopes: tuple[Scope, ...], leave: tuple[tuple[Scope, Amounts], ...]
    ) -> Granted | Refused | Ended:
        """Raises StoreUnavailable."""
        verdict = self._seen(await self._call("top_up", lambda: self.store.top_up(reservation_id, ask, scopes, leave)))
        known = self.live.get(reservation_id)
        if known is not None and isinstance(verdict, Granted):
            self.live[reservation_id] = Reservation(reservation_id, scopes, ask, known.lease_ms, known.on_lost)
        return verdict

    async def balance(self, scopes: tuple[Scope, ...]) -> tuple[Balance, ...]:
        """The figures of scopes, those that the store has never seen included. Raises StoreUnavailable."""
        balances = await self._call("balance", lambda: self.store.balance(scopes)) if scopes else ()
        self.watch.saw(balances)
        return balances

    async def settle(self, settlement: Settlement) -> Settled | None:
        """Books it now; None: it is kept until the store takes it. Never raises StoreUnavailable."""
        if not self.away:
            outages, told = self.outages, False
            try:
                settled = await self.store.settle(settlement)
                if isinstance(settled, Cold):
                    told = True
                    settled = await self._call("settle", lambda: self.store.settle(settlement))
            except StoreUnavailable as error:
                if not told:
                    self._missed("settle", error, outages)
            except asyncio.CancelledError:
                self.later(settlement)
                raise
            else:
                self.reached = True
                # Not before: an empty store that is told of it meanwhile must keep its room.
                self.live.pop(settlement.id, None)
                self.watch.saw(settled.balances)
                return settled
        self.later(settlement)
        return None

    def later(self, settlement: Settlement) -> None:
        """Books it as soon as the store takes it, whatever becomes of the caller."""
        self.live.pop(settlement.id, None)
        self.taken.pop(settlement.id, None)
        if len(self.waiting) >= self._queued:
            self.waiting.popleft()
            self.dropped += 1
        self.waiting.append(settlement)

    def _seen(
        self, verdict: Granted | Refused | Ended, reservation: Reservation | None = None
    ) -> Granted | Refused | Ended:
        if isinstance(verdict, Granted):
            if reservation is not None:
                self.live[reservation.id] = reservation
            self.watch.saw(verdict.balances)
        return verdict

    async def usage(self, since_ms: int, until_ms: int, by: Sequence[Dimension]) -> list[UsageRow]:
        """As the store's. A slow answer says nothing against the store. Raises StoreUnavailable."""
        try:
            return await self.store.usage(since_ms, until_ms, by)
        except StoreUnavailable:
            self.failed("usage")
            raise

    async def _call(self, op: Op, verb: Callable[[], Awaitable[_Answer | Cold]]) -> _Answer:
        """The answer of a verb, once the store knows what it must know for it."""
        if self.away:
            raise StoreUnavailable("open")
        outages = self.outages
        try:
            return await self.ask(op, verb)
        except StoreUnavailable as error:
            if outages == self.outages:  # Else it was asked before the last outage, and says nothing of now.
                self.lost(error.reason)
            raise

    def _missed(self, op: Op, error: StoreUnavailable, outages: int) -> None:
        """A verb got no answer. `outages`: when it was asked; one from before the last outage says nothing of now."""
        self.failed(op)
        if outages == self.outages:
            self.lost(error.reason)

    async def ask(self, op: Op, verb: Callable[[], Awaitable[_Answer | Cold]]) -> _Answer:
        """As `_call`, away or not, and a failure changes nothing: for those who try whether it is back."""
        for _ in range(3):  # an empty store, then a scope that it does not know, then the answer
            seeds = self._seeds
            try:
                answer = await verb()
            except StoreUnavailable:
                self.failed(op)
                raise
            if not isinstance(answer, Cold):
                self.reached = True
                return answer
            await self._seed(answer.scopes, seeds)
        raise StoreUnavailable("refused")

    # -- a store that forgot -----------------------------------------------------------------------------------------

    async def tell(self) -> None:
        """Tells the store all that is remembered. Raises StoreUnavailable."""
        await self._seed((), self._seeds)

    async def _seed(self, scopes: tuple[Scope, ...], seeds: int) -> None:
        failed = self._seeds_failed
        async with self._seeding:
            if not scopes and self._seeds != seeds:
                return  # Somebody told it everything while we waited for the lock.
            if self._seeds_failed != failed:
                raise StoreUnavailable("timeout")  # Somebody tried: a hundred who wait need not each try in turn.
            try:
                self.watch.second = int(self._clock())
                await self._tell(self.watch.remembered(scopes), scopes)
            except StoreUnavailable:
                self._seeds_failed += 1
                self.failed("seed")
                raise
            finally:
                self.seeding = False

    async def _tell(self, remembered: list[Remembered], scopes: tuple[Scope, ...]) -> None:
        """Until the store is open, and knows all that, and what is held in `scopes`; in all if none is named."""
        until = self._clock() + self._collect_ms / 1000 + 1.0
        while True:
            wait_ms, first = 0, False
            for start in range(0, len(remembered) or 1, SEEDED_AT_ONCE):
                seeded = await self.store.seed(remembered[start : start + SEEDED_AT_ONCE], self._collect_ms)
                wait_ms, first = seeded.wait_ms, first or seeded.first
            held = self._held(scopes)
            if wait_ms:
                # As long as it collects, nobody can be given the room that these settlements will take.
                held += [_to_come(each) for each in self.waiting]
            wait_ms = await self.give(held, wait_ms)
            if first and self._collect_ms:
                self._emit(StoreReset(scopes=sum(any(one.spent) for one in remembered)))
            if not wait_ms:
                self._seeds += 1
                return
            if self._clock() >= until:
                raise StoreUnavailable("timeout")
            self.seeding = True
            await asyncio.sleep(wait_ms / 1000)

    def _held(self, scopes: tuple[Scope, ...]) -> list[Reservation]:
        places = {scope.place for scope in scopes}
        return [
            each
            for each in self.live.values()
            if not places or not places.isdisjoint([scope.place for scope in each.scopes])
        ]

    async def give(self, held: Sequence[Reservation], wait_ms: int = 0) -> int:
        """Has the store hold what this process was granted already. Returns how long the store still collects, in
        milliseconds; `wait_ms` if there is nothing to give. Raises StoreUnavailable."""
        for start in range(0, len(held), GIVEN_AT_ONCE):
            # One that is settled meanwhile has ended, which the store knows.
            wait_ms = (await self.store.seed((), self._collect_ms, held[start : start + GIVEN_AT_ONCE])).wait_ms
        return wait_ms

    # -- a store that is away ----------------------------------------------------------------------------------------

    def lost(self, reason: Reason) -> None:
        """It does not answer. Said once, until `back`."""
        if self.away:
            return
        now = self._clock()
        self._tender.rest(flapping=now - self._back_since < STEADY_SECONDS)
        self.away = True
        self.outages += 1
        self.has_share = self.reached and self.fleet.has_share(now)
        self._away_since = now
        self._replayed = 0
        self._emit(StoreDegraded(reason=reason, processes=self.processes))

    def back(self) -> None:
        """It takes reservations again, and knows all that is known here."""
        now = self._back_since = self._clock()
        self.away = False
        self.fleet.returned(now)
        lost, self.dropped = self.dropped, 0
        self._emit(StoreRecovered(away=now - self._away_since, replayed=self._replayed, lost=lost))

    async def catch_up(self) -> None:
        """Books what waits, and has the store hold what was granted without it. Raises StoreUnavailable."""
        while self.waiting or self.taken:
            await self.replay()
            taken, self.taken = self.taken, {}
            try:
                await self.give(list(taken.values()))
            except BaseException:
                self.taken = {each: one for each, one in taken.items() if each in self.live} | self.taken
                raise

    async def replay(self) -> None:
        """Books what waits, in order. Raises StoreUnavailable."""
        while self.waiting:
            batch = [self.waiting[index] for index in range(min(len(self.waiting), REPLAYED_AT_ONCE))]
            answers = await asyncio.gather(*(self._book(one) for one in batch), return_exceptions=True)
            away: BaseException | None = None
            for settlement, answer in zip(batch, answers, strict=True):
                if isinstance(answer, StoreUnavailable):
                    away = answer
                    continue
                self._replayed += 1
                with suppress(ValueError):  # a full queue may have dropped it meanwhile
                    self.waiting.remove(settlement)
                if answer is not None:
                    # What no store can take must not stand in the way of all that come after it.
                    assert isinstance(answer, Exception)
                    self._emit(InternalFault(where="booking a settlement", exc=answer))
            if away is not None:
                raise away

    async def _book(self, settlement: Settlement) -> None:
        settled = await self.ask("settle", lambda: self.store.settle(settlement))
        self.watch.saw(settled.balances)
