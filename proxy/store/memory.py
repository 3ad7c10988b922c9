"""The budget store of a single process: the same verbs and the same answers as the one in Redis, with no server.

Nothing here waits, so every verb is one step that no other request can come between. What decides stands in
`budget.windows`; here stand the reservations and their leases.

Bounded: windows are one per configured scope, reservations end by lease, and what is remembered of ended ones leaves
by age and, for settled ones, by number. (A settle is repeated where a reply was lost. Here none can be.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from proxy.budget.amounts import Amounts, Bounds, Part, Shortfall
from proxy.budget.clocks import Moment, Steady
from proxy.budget.windows import ScopeWindows
from proxy.store.base import (
    SEED_MS,
    Balance,
    Beat,
    Cold,
    Dimension,
    Ended,
    Granted,
    Outcome,
    Record,
    Refused,
    Remembered,
    Reservation,
    Scope,
    Seeded,
    Server,
    Settled,
    Settlement,
    StoreUnavailable,
    UsageRow,
    checked_amounts,
    checked_entries,
    checked_id,
    checked_scopes,
)
from proxy.store.ledger import MemoryLedger
from proxy.store.reservations import Held, Over, Reservations, Triple

_PREPARED: Final = 10_000


class _Prepared:
    """What a tuple of scopes comes to: their places and bounds, looked up once."""

    __slots__ = ("bounds", "enforced", "places", "scopes")

    def __init__(self, scopes: tuple[Scope, ...]) -> None:
        self.scopes = scopes
        self.places = checked_scopes(scopes)
        self.bounds: tuple[Bounds, ...] = tuple(scope.limits.bounds() for scope in scopes)
        self.enforced = all(scope.enforced for scope in scopes)


class MemoryStore:
    """`BudgetStore` in this process's memory.

    `clock` reads wall milliseconds in UTC. `tombstone_ms`: how long an expired reservation can still be settled late.
    `records`: how many records the outbox keeps. `settled_kept`: how many settled ids are known as such.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        tombstone_ms: int = 900_000,
        records: int = 10_000,
        settled_kept: int = 100_000,
    ) -> None:
        self._clock = clock
        self._tombstone_ms = tombstone_ms
        self._steady: Steady | None = None  # None while the store is cold
        self._collects_since: int | None = None
        self._epoch = 0
        self._windows: dict[str, ScopeWindows] = {}
        self._reservations = Reservations(settled_kept)
        self._ledger = MemoryLedger(records)
        self._prepared: dict[tuple[Scope, ...], _Prepared] = {}
        self._processes: dict[str, int] = {}
        self._closed = False

    # -- verbs -------------------------------------------------------------------------------------------------------

    async def reserve(self, reservation: Reservation) -> Granted | Refused | Ended | Cold:
        known = checked_id(reservation.id)
        ask = checked_amounts(reservation.ask)
        prepared = self._prepare(reservation.scopes)
        now = self._now()
        if now is None:
            return Cold()
        found = self._reservations.find(known, now.steady_ms)
        if found is not None:
            return self._granted(prepared, now) if isinstance(found, Held) and not found.expired else Ended()
        held = Held(now.steady_ms + reservation.lease_ms, reservation.on_lost)
        verdict = self._cover(held, prepared, ask, now)
        if isinstance(verdict, Granted):
            self._reservations.add(known, held)
        return verdict

    async def top_up(
        self,
        reservation_id: str,
        ask: Amounts,
        scopes: tuple[Scope, ...],
        leave: tuple[tuple[Scope, Amounts], ...] = (),
    ) -> Granted | Refused | Ended | Cold:
        known = checked_id(reservation_id)
        amounts = checked_amounts(ask)
        prepared = self._prepare(scopes)
        left = {scope.place: checked_amounts(used) for scope, used in leave}
        if not left.keys().isdisjoint(prepared.places):
            raise ValueError("a scope is either covered or left")
        now = self._now()
        if now is None:
            return Cold()
        held = self._reservations.live(known, now.steady_ms)
        if held is None:
            return Ended()
        verdict = self._cover(held, prepared, amounts, now)
        if isinstance(verdict, Granted):
            for place, used in left.items():
                if place in held.parts:
                    windows = self._windows[place]
                    windows.roll(now)
                    windows.release(held.parts.pop(place), *used)
        return verdict

    async def settle(self, settlement: Settlement) -> Settled | Cold:
        known = checked_id(settlement.id)
        actual = checked_amounts(settlement.actual)
        prepared = self._prepare(settlement.scopes)
        apart = {scope.place: checked_amounts(used) for scope, used in settlement.apart} if settlement.apart else {}
        entries = checked_entries(settlement.entries)
        now = self._now()
        if now is None:
            return Cold()
        if missing := self._roll(prepared, now):
            return missing
        held = self._reservations.find(known, now.steady_ms)
        outcome: Outcome
        if held is None:
            outcome = "unknown"
            for place in prepared.places:
                self._windows[place].charge(*apart.get(place, actual))
        elif isinstance(held, Over):
            return Settled("already", self._balances(prepared, now), self._epoch)
        else:
            outcome = "late" if held.expired else "settled"
            for place, parts in held.parts.items():
                self._end(held, place, parts, apart.get(place, actual), now)
        self._reservations.settle(known, now.steady_ms + self._tombstone_ms)
        self._ledger.book(entries, now.wall_ms)
        return Settled(outcome, self._balances(prepared, now), self._epoch)

    async def extend(self, reservation_ids: Sequence[str], lease_ms: int) -> tuple[str, ...] | Cold:
        for each in reservation_ids:
            checked_id(each)
        now = self._now(reap=False)
        if now is None:
            return Cold()
        lost = []
        until = now.steady_ms + lease_ms
        for known in reservation_ids:
            held = self._reservations.live(known, now.steady_ms)
            if held is None:
                lost.append(known)
            else:
                self._reservations.renew(known, held, until)
        self._reap(now)
        return tuple(lost)

    async def balance(self, scopes: Sequence[Scope]) -> tuple[Balance, ...] | Cold:
        prepared = self._prepare(tuple(scopes))
        now = self._now()
        if now is None:
            return Cold()
        return self._roll(prepared, now) or self._balances(prepared, now)

    async def seed(
        self, remembered: Sequence[Remembered], collect_ms: int = SEED_MS, held: Sequence[Reservation] = ()
    ) -> Seeded:
        given = [(checked_id(one.id), self._prepare(one.scopes), checked_amounts(one.ask), one) for one in held]
        if self._closed:
            raise StoreUnavailable("stopped")
        wall = self._clock()
        now = (self._steady or Steady(wall)).read(wall)
        first = self._steady is None and self._collects_since is None
        for each in remembered:
            windows, new = self._begun(each.scope.place, now)
            windows.raise_to(each.windows, each.spent)
            if new or self._steady is None:
                windows.raise_minute(each.minute)
        for known, prepared, ask, one in given:
            self._give(known, prepared, ask, one, now)
        if self._steady is not None:
            return Seeded(0, first)
        if self._collects_since is None:
            self._collects_since = wall
        wait = self._collects_since + collect_ms - wall
        if wait > 0:
            return Seeded(min(wait, collect_ms), first)
        self._steady = Steady(wall)
        self._epoch = wall
        return Seeded(0, first)

    async def beat(self, process_id: str, life_ms: int) -> Beat:
        known = checked_id(process_id)
        if self._closed:
            raise StoreUnavailable("stopped")
        wall = self._clock()
        now = wall if self._steady is None else self._steady.read(wall).steady_ms
        self._processes[known] = now + life_ms
        self._processes = {each: until for each, until in self._processes.items() if until > now}
        return Beat(len(self._processes), 0 if self._steady is None else self._epoch)

    async def server(self) -> Server | None:
        return None

    async def usage(self, since_ms: int, until_ms: int, by: Sequence[Dimension]) -> list[UsageRow]:
        return self._ledger.usage(since_ms, until_ms, by)

    async def outbox(self, after: str, count: int) -> list[Record]:
        return self._ledger.records(after, count)

    async def aclose(self) -> None:
        self._closed = True

    # -- the shared way ----------------------------------------------------------------------------------------------

    def _prepare(self, scopes: tuple[Scope, ...]) -> _Prepared:
        prepared = self._prepared.get(scopes)
        if prepared is None:
            if len(self._prepared) >= _PREPARED:
                self._prepared.clear()
            prepared = self._prepared[scopes] = _Prepared(scopes)
        return prepared

    def _now(self, *, reap: bool = True) -> Moment | None:
        """The moment of this call, what is overdue done; None while the store is cold."""
        if self._closed:
            raise StoreUnavailable("stopped")
        if self._steady is None:
            return None
        now = self._steady.read(self._clock())
        if reap:
            self._reap(now)
        self._reservations.forget(now.steady_ms)
        return now

    def _roll(self, prepared: _Prepared, now: Moment) -> Cold | None:
        """Brings all windows up to now; Cold if there are none for a scope."""
        windows = self._windows
        try:
            for place in prepared.places:
                windows[place].roll(now)
        except KeyError:
            for place in prepared.places:
                if place in windows:
                    windows[place].roll(now)  # Those behind the missing one too: the store in Redis looks at all.
            return Cold(tuple(scope for scope in prepared.scopes if scope.place not in windows))
        return None

    def _cover(self, held: Held, prepared: _Prepared, ask: Triple, now: Moment) -> Granted | Refused | Cold:
        """Holds what is missing up to `ask`, in all scopes or none."""
        if missing := self._roll(prepared, now):
            return missing
        windows, parts = self._windows, held.parts
        all_new = (*ask, 1)
        wants = [_wanted(ask, parts[place]) if place in parts else all_new for place in prepared.places]
        over: Refused | None = None
        for place, bounds, want in zip(prepared.places, prepared.bounds, wants, strict=True):
            if not windows[place].fits(bounds, *want):
                refused, over = self._refusal(prepared, wants, now)
                if refused is not None:
                    return refused
                break
        for place, want in zip(prepared.places, wants, strict=True):
            if any(want):
                parts.setdefault(place, []).append(windows[place].take(*want))
        return Granted(self._balances(prepared, now), self._epoch, over)

    def _refusal(
        self, prepared: _Prepared, wants: list[tuple[int, int, int, int]], now: Moment
    ) -> tuple[Refused | None, Refused | None]:
        """The worst of what is enforced, and the worst of what is only watched."""
        worst: dict[bool, tuple[Scope, Shortfall]] = {}
        for scope, place, bounds, want in zip(prepared.scopes, prepared.places, prepared.bounds, wants, strict=True):
            found = self._windows[place].shortfall(bounds, want[:3], want[3], now)
            known = worst.get(scope.enforced)
            if found is not None and (known is None or found.outlasts(known[1])):
                worst[scope.enforced] = (scope, found)
        refused, over = (Refused(worst[each][0], *worst[each][1]) if each in worst else None for each in (True, False))
        return refused, over

    def _granted(self, prepared: _Prepared, now: Moment) -> Granted | Cold:
        return self._roll(prepared, now) or Granted(self._balances(prepared, now), self._epoch)

    def _balances(self, prepared: _Prepared, now: Moment) -> tuple[Balance, ...]:
        windows, steady = self._windows, now.steady_ms
        return tuple(
            [
                Balance(scope, windows[place].row(steady))
                for scope, place in zip(prepared.scopes, prepared.places, strict=True)
            ]
        )

    # -- what others remember ----------------------------------------------------------------------------------------

    def _begun(self, place: str, now: Moment) -> tuple[ScopeWindows, bool]:
        """The windows of a scope as of now, and whether they begin with this call."""
        windows = self._windows.get(place)
        new = windows is None
        if windows is None:
            windows = self._windows[place] = ScopeWindows(now)
        windows.roll(now)
        return windows, new

    def _give(self, known: str, prepared: _Prepared, ask: Triple, one: Reservation, now: Moment) -> None:
        """Holds what is missing up to the ask, whether or not it fits; what ended stays ended."""
        all_windows = [self._begun(place, now)[0] for place in prepared.places]
        found = self._reservations.find(known, now.steady_ms)
        if found is not None and (isinstance(found, Over) or found.expired):
            return
        held = found or Held(now.steady_ms + one.lease_ms, one.on_lost)
        for place, windows in zip(prepared.places, all_windows, strict=True):
            want = _wanted(ask, held.parts[place]) if place in held.parts else (*ask, 1)
            if any(want):
                held.parts.setdefault(place, []).append(windows.take(*want))
        if found is None:
            self._reservations.add(known, held)

    # -- ends --------------------------------------------------------------------------------------------------------

    def _end(self, held: Held, place: str, parts: list[Part], used: Triple, now: Moment) -> None:
        windows = self._windows[place]
        windows.roll(now)
        if held.expired:
            windows.correct(parts, held.charged[place], used, held.windows[place])
        else:
            windows.release(parts, *used)

    def _reap(self, now: Moment) -> None:
        """Books reservations whose lease is over."""
        for known, held in self._reservations.overdue(now.steady_ms):
            most = (0, 0, 0)
            for place, parts in held.parts.items():
                windows = self._windows[place]
                windows.roll(now)
                charged = _asked(parts) if held.on_lost == "charge" else (0, 0, 0)
                windows.release(parts, *charged)
                held.charged[place] = charged
                held.windows[place] = (windows.hour, windows.day, windows.month)
                most = (max(most[0], charged[0]), max(most[1], charged[1]), max(most[2], charged[2]))
            self._reservations.expire(known, held, now.steady_ms + self._tombstone_ms)
            fields = ("lost", known, "requests", str(most[0]), "tokens", str(most[1]), "nano_usd", str(most[2]))
            self._ledger.post(fields, now.wall_ms)


def _asked(parts: Sequence[Part]) -> Triple:
    if len(parts) == 1:
        return parts[0][1:]
    return sum(part[1] for part in parts), sum(part[2] for part in parts), sum(part[3] for part in parts)


def _wanted(ask: Triple, parts: Sequence[Part]) -> tuple[int, int, int, int]:
    """What a scope lacks, that holds `parts`; never less than nothing."""
    has = _asked(parts)
    return max(0, ask[0] - has[0]), max(0, ask[1] - has[1]), max(0, ask[2] - has[2]), 0
