"""The two times that a budget knows: steady milliseconds, and calendar windows in UTC. Pure integers.

*Wall* time is milliseconds since 1970 in UTC, as a clock of the machine reads it; it names hours, days and months.
*Steady* time is wall time plus the sum of all steps back that were seen; minute windows and leases run on it. It knows
a step only to a second, so that it need not be written down at every reading: it may go back by less than two, and
whoever keeps seconds keeps the largest.
"""

from __future__ import annotations

from typing import Final, NamedTuple

STEP_MS: Final = 1000
"""A wall clock that is behind by more than this was set back; less is the difference between two readings."""
HOUR_MS: Final = 3_600_000
DAY_MS: Final = 86_400_000


class Moment(NamedTuple):
    """One reading of the clock, in all the forms that windows need."""

    steady_ms: int
    wall_ms: int
    second: int
    """Steady."""
    hour: int
    day: int
    """Since 1970."""
    month: int
    """Since year 0."""


class Steady:
    """Turns readings of a wall clock, which may be set back, into moments of a steady time, which goes on."""

    __slots__ = ("_day", "_month", "last_ms", "shift_ms")

    def __init__(self, wall_ms: int) -> None:
        self.last_ms = wall_ms
        self.shift_ms = 0
        self._day = wall_ms // DAY_MS
        self._month = month_of(self._day)

    def read(self, wall_ms: int) -> Moment:
        """The moment of a reading. After a step back, steady time goes on from where it was."""
        if wall_ms < self.last_ms - STEP_MS:
            self.shift_ms += self.last_ms - wall_ms
            self.last_ms = wall_ms
        elif wall_ms >= self.last_ms + STEP_MS:
            self.last_ms = wall_ms
        day = wall_ms // DAY_MS
        if day != self._day:
            self._day, self._month = day, month_of(day)
        steady = wall_ms + self.shift_ms
        return Moment(steady, wall_ms, steady // 1000, wall_ms // HOUR_MS, day, self._month)


def month_of(day: int) -> int:
    """Months since year 0 of a day since 1970-01-01 (Howard Hinnant's `civil_from_days`, from 1970 on)."""
    shifted = day + 719_468
    era, of_era = divmod(shifted, 146_097)
    year = (of_era - of_era // 1460 + of_era // 36_524 - of_era // 146_096) // 365
    of_year = of_era - (365 * year + year // 4 - year // 100)
    return (era * 400 + year) * 12 + (5 * of_year + 2) // 153 + 2


def month_start(month: int) -> int:
    """Wall milliseconds at which a month since year 0 begins."""
    from_march = month - 2
    year, of_year = divmod(from_march, 12)
    era, of_era = divmod(year, 400)
    day = era * 146_097 + of_era * 365 + of_era // 4 - of_era // 100 + (153 * of_year + 2) // 5 - 719_468
    return day * DAY_MS
