"""What this process last saw of each scope: for headers and reports, and for a store that forgot or is away. Pure.

Nobody keeps a journal. Every answer of the store shows the figures of the scopes it touched, and the newest of them are
kept here. A store that comes back empty is told of them; while it is away, each process may spend its share of what
they leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from proxy.budget.amounts import Limits, Row
from proxy.budget.clocks import DAY_MS, HOUR_MS, month_of
from proxy.store.base import Balance, Remembered, Scope

MINUTE_SECONDS: Final = 62
"""Longer than what counts in a minute stays there: `second` may lag behind by one."""


class Watch:
    """Bounded by the number of configured scopes."""

    def __init__(self) -> None:
        self.second = 0
        """What time it is, on any clock that does not step back. Its owner sets it each second, and before it asks."""
        self._seen: dict[str, tuple[Scope, Row, int]] = {}
        """The newest figures of each place, and the second of them."""
        self._highest: dict[str, _Calendar] = {}
        """Only where the newest figures are lower than earlier ones of the same window."""

    def saw(self, balances: Iterable[Balance]) -> None:
        for balance in balances:
            scope, row = balance.scope, balance.row
            place = scope.place
            known = self._seen.get(place)
            if known is not None and row.month_nano_usd < known[1].month_nano_usd and row.month == known[1].month:
                before = self._highest.get(place)
                most = _calendar(known[1])
                self._highest[place] = most if before is None else _most(most, before)
            self._seen[place] = (scope, row, self.second)

    def row(self, scope: Scope) -> Row | None:
        found = self._seen.get(scope.place)
        return None if found is None else found[1]

    def remembered(self, scopes: Sequence[Scope] = ()) -> list[Remembered]:
        """The most that was seen spent in `scopes`, known or not; in all that are known if none are named."""
        wanted = scopes or [scope for scope, _, _ in self._seen.values()]
        return [self._remembered(scope) for scope in wanted]

    def _remembered(self, scope: Scope) -> Remembered:
        found = self._seen.get(scope.place)
        if found is None:
            return Remembered(scope)
        _, row, seen = found
        known = _calendar(row)
        highest = self._highest.get(scope.place)
        windows, spent = known if highest is None else _most(known, highest)
        recent = self.second - seen < MINUTE_SECONDS
        minute = (row.minute_requests, row.minute_tokens, row.minute_nano_usd) if recent else (0, 0, 0)
        return Remembered(scope, windows, spent, minute)


_Calendar = tuple[tuple[int, int, int], tuple[int, int, int]]
"""Hour, day and month, and what was spent in each."""


def _most(newer: _Calendar, older: _Calendar) -> _Calendar:
    """In the newer windows: of a window that is over, the older figures count no more."""
    hour, day, month = (
        max(newer[1][index], older[1][index]) if newer[0][index] == older[0][index] else newer[1][index]
        for index in range(3)
    )
    return newer[0], (hour, day, month)


def _calendar(row: Row) -> _Calendar:
    return (row.hour, row.day, row.month), (row.hour_nano_usd, row.day_nano_usd, row.month_nano_usd)


def slice_of(scope: Scope, row: Row | None, processes: int, wall_ms: int) -> Scope:
    """What one of `processes` may take of a scope while the store is away.

    Minutes: its share of the limit. Calendar windows: its share of what was neither spent nor held when last seen; a
    window that is over since then is full again, less what was held. Of a scope that this process never saw, nothing
    is known to be left.
    """
    limits = scope.limits
    hour, day = wall_ms // HOUR_MS, wall_ms // DAY_MS
    left = _Left(row, processes)
    return Scope(
        scope.kind,
        scope.name,
        Limits(
            _share(limits.requests_per_minute, processes),
            _share(limits.tokens_per_minute, processes),
            _share(limits.nano_usd_per_minute, processes),
            left.of(limits.nano_usd_per_hour, row and (row.hour, row.hour_nano_usd), hour),
            left.of(limits.nano_usd_per_day, row and (row.day, row.day_nano_usd), day),
            left.of(limits.nano_usd_per_month, row and (row.month, row.month_nano_usd), month_of(day)),
            _share(limits.max_concurrent, processes),
        ),
        scope.enforced,
    )


class _Left:
    def __init__(self, row: Row | None, processes: int) -> None:
        self._held = 0 if row is None else row.held_nano_usd
        self._processes = processes

    def of(self, limit: int | None, seen: tuple[int, int] | None, now: int) -> int | None:
        if limit is None:
            return None
        if seen is None:
            return 0
        window, spent = seen
        return max(limit - self._held - (spent if window >= now else 0), 0) // self._processes


def _share(limit: int | None, processes: int) -> int | None:
    return None if limit is None else limit // processes
