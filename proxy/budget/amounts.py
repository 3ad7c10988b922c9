"""The words of a budget: what is asked for, what limits it, and the figures that a scope answers with. Values only.

Money is nano-dollars, an integer like every count. All stays below 2**53, for the store in Redis computes in doubles.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import msgspec

Window = Literal[
    "requests_per_minute",
    "tokens_per_minute",
    "usd_per_minute",
    "usd_per_hour",
    "usd_per_day",
    "usd_per_month",
    "max_concurrent",
]
"""Windows are called by the configuration key of their limit."""

WINDOWS: Final[tuple[Window, ...]] = (
    "requests_per_minute",
    "tokens_per_minute",
    "usd_per_minute",
    "usd_per_hour",
    "usd_per_day",
    "usd_per_month",
    "max_concurrent",
)
MAX_SUM: Final = 2**53 - 1
MAX_AMOUNT: Final = 2**43
"""Largest amount of one reservation: a thousand of them still add up exactly."""

_UNLIMITED: Final = 2**62

Part = tuple[int, int, int, int]
"""One step of a reservation in one scope: its second, and the requests, tokens and nano-USD that it added."""

Bounds = tuple[int, ...]
"""The limits in the order of `WINDOWS`; an absent one is larger than every sum."""


class Amounts(msgspec.Struct, frozen=True, gc=False):
    """Something asked for or used: requests, tokens, nano-dollars."""

    requests: int = 0
    tokens: int = 0
    nano_usd: int = 0


class Limits(msgspec.Struct, frozen=True, gc=False):
    """The limits of one scope; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    nano_usd_per_minute: int | None = None
    nano_usd_per_hour: int | None = None
    nano_usd_per_day: int | None = None
    nano_usd_per_month: int | None = None
    max_concurrent: int | None = None

    def values(self) -> tuple[int | None, ...]:
        """In the order of `WINDOWS`."""
        return msgspec.structs.astuple(self)

    def bounds(self) -> Bounds:
        return tuple(_UNLIMITED if limit is None else limit for limit in self.values())


class Shortfall(NamedTuple):
    """Why an ask does not fit. Of several windows that are full: the one that takes longest."""

    window: Window
    limit: int
    used: int
    reserved: int
    wait_ms: int | None
    """An upper bound, provided nothing else is admitted or settled above its ask; None: the ask alone is too large."""
    reset_ms: int
    """Until the window is empty (minute), or the next one begins (calendar)."""

    def outlasts(self, other: Shortfall) -> bool:
        """Takes longer than the other one; `never` outlasts all."""
        if other.wait_ms is None:
            return False
        return self.wait_ms is None or self.wait_ms > other.wait_ms


class Row(NamedTuple):
    """A scope's figures at one moment, as a store answers them."""

    minute_requests: int
    minute_tokens: int
    minute_nano_usd: int
    """Spent in the minute that ends now."""
    minute_held_requests: int
    minute_held_tokens: int
    minute_held_nano_usd: int
    """Reserved in the minute that ends now."""
    held_requests: int
    held_tokens: int
    held_nano_usd: int
    """Reserved, whenever that was."""
    live: int
    """Reservations that are neither settled nor lost."""
    hour: int
    day: int
    month: int
    """Calendar windows, as whole hours, days and months since 1970 (hour, day) and since year 0 (month)."""
    hour_nano_usd: int
    day_nano_usd: int
    month_nano_usd: int
    """Spent in them."""
    minute_reset_ms: int
    """Until the minute windows are empty, if nothing more is admitted."""
