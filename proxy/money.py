"""Money: integer nano-dollars, and their way from and to decimal dollars. Floats never enter a sum.

Rates are nano-dollars per million tokens. Every amount stays below 2^53, so that it is exact in JSON and in Lua.
"""

from __future__ import annotations

import re
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Final

NANO: Final = 1_000_000_000
PER_MILLION: Final = 1_000_000
LARGEST: Final = 2**53 - 1
"""The largest amount of anything that is counted: 9,007,199.25 USD, or as many tokens."""

_USD: Final = re.compile(r"[0-9]{1,16}(\.[0-9]{1,9})?", re.ASCII)


def nano_usd(usd: Decimal) -> int:
    """Dollars as nano-dollars, rounded to the nearest. Raises OverflowError above LARGEST, ValueError below 0."""
    if not usd.is_finite() or usd < 0:
        raise ValueError("an amount of money is a finite number, 0 or more")
    if usd > LARGEST:  # before the scaling, whose digits would otherwise grow with the exponent
        raise OverflowError("an amount of money stays below 2^53 nano-dollars")
    nano = int((usd * NANO).to_integral_value(ROUND_HALF_EVEN))
    if nano > LARGEST:
        raise OverflowError("an amount of money stays below 2^53 nano-dollars")
    return nano


def usd_text(nano: int) -> str:
    """Nano-dollars as decimal dollars without needless zeros: 1_500_000 is `0.0015`, 2_000_000_000 is `2`."""
    whole, rest = divmod(nano, NANO)
    return f"{whole}.{rest:09d}".rstrip("0").rstrip(".")


def nano_of(text: str) -> int:
    """The inverse of `usd_text`. Raises ValueError for a text that is no such amount, or not below 2^53."""
    if not _USD.fullmatch(text):
        raise ValueError("an amount of dollars has digits, and at most nine of them after a point")
    whole, _, rest = text.partition(".")
    nano = int(whole) * NANO + int(rest.ljust(9, "0"))
    if nano > LARGEST:
        raise ValueError("an amount of money stays below 2^53 nano-dollars")
    return nano
