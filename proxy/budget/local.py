"""This process's share of the limits while the store is away: windows of its own, begun anew with each outage.

The shell around `watch.slice_of`. What is admitted here is booked in the store when it is back, under the same ids.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.budget.clocks import HOUR_MS
from proxy.budget.watch import Watch, slice_of
from proxy.store.base import (
    BudgetStore,
    Cold,
    Ended,
    Granted,
    Refused,
    Remembered,
    Reservation,
    Scope,
    StoreUnavailable,
)


class Slices:
    """`store` makes an empty store of this process's own memory."""

    def __init__(self, store: Callable[[], BudgetStore], watch: Watch, wall_ms: Callable[[], int]) -> None:
        self._make = store
        self._watch = watch
        self._wall_ms = wall_ms
        self._processes = 1
        self._outage = 0
        self._sliced: dict[tuple[Scope, int], Scope] = {}
        self.store: BudgetStore | None = None

    def begin(self, outage: int, processes: int) -> None:
        """What was last seen is shared among `processes`, who cannot tell each other what they take. Once an outage."""
        if outage == self._outage:
            return
        self._outage = outage
        self._processes = max(processes, 1)
        self._sliced = {}
        self.store = self._make()

    async def reserve(self, reservation: Reservation) -> Granted | Refused | Ended:
        """In the slices of the reservation's scopes. Raises StoreUnavailable before `begin`."""
        store = self.store
        if store is None:
            raise StoreUnavailable("stopped")
        scopes = tuple([self._slice(scope) for scope in reservation.scopes])
        sliced = Reservation(reservation.id, scopes, reservation.ask, reservation.lease_ms, reservation.on_lost)
        for _ in range(3):
            # Memory answers at once: no other outage can begin between here and the answer.
            verdict = await store.reserve(sliced)
            if not isinstance(verdict, Cold):
                return verdict
            await store.seed([Remembered(scope) for scope in verdict.scopes or scopes], 0)
        raise StoreUnavailable("refused")

    def _slice(self, scope: Scope) -> Scope:
        """Made anew each hour, when a calendar window may have begun."""
        now = self._wall_ms()
        key = (scope, now // HOUR_MS)
        sliced = self._sliced.get(key)
        if sliced is None:
            sliced = self._sliced[key] = slice_of(scope, self._watch.row(scope), self._processes, now)
        return sliced
