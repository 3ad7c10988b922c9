"""When to send again, and how often altogether: jittered delays, what a provider asks for, a budget of retries. Pure.

Three rules, each against a way in which retries make an outage worse:

- *Full jitter*: the delay before repetition n is drawn from U(0, min(cap, base * 2^n)). Clients that failed together
  do not come back together.
- *What the provider asks for is a lower bound*, with something drawn from U(0, max(base, 10 %)) on top. Ten percent
  of one second alone would put half of the clients into one bucket of 50 ms.
- *A budget of retries for each provider*: every first send puts in a little, every repetition takes out one. However
  many requests fail, repetitions stay below a tenth of them.

Delays are seconds. `random` draws from [0, 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

JITTER_PART: Final = 0.1
_LARGEST_EXPONENT: Final = 62
_NUMBER: Final = re.compile(rb"[0-9]{1,12}(?:\.[0-9]{0,9})?")
"""A plain decimal in ASCII, and short: no sign, no exponent, no words such as `nan` and `inf`."""
_LONGEST_DATE: Final = 64


def delay(attempt: int, base: float, cap: float, random: Callable[[], float], *, jitter: bool = True) -> float:
    """Seconds to wait before repetition number `attempt`, counted from 0. Without jitter: the upper end itself."""
    most: float = min(cap, base * 2.0 ** min(attempt, _LARGEST_EXPONENT))
    return most * random() if jitter else most


def asked(headers: Iterable[tuple[bytes, bytes]], now: float) -> float | None:
    """Seconds that a provider asks to wait for; None if it does not, or not in a way that can be understood.

    `headers` have lower-case names; `now` is the wall clock in seconds since 1970, for dates. The finer
    `retry-after-ms` wins over `retry-after`. What is zero, negative, infinite or no number at all is no wish.
    """
    milliseconds = seconds = None
    for name, value in headers:
        if name == b"retry-after-ms" and milliseconds is None:
            milliseconds = value
        elif name == b"retry-after" and seconds is None:
            seconds = value
    found = _number(milliseconds)
    if found is not None:
        return found / 1000
    return _number(seconds) or _until(seconds, now)


def _number(value: bytes | None) -> float | None:
    if value is None or not _NUMBER.fullmatch(text := value.strip()):
        return None
    number = float(text)
    return number if number > 0 else None


def _until(value: bytes | None, now: float) -> float | None:
    """Seconds until an HTTP date that lies ahead."""
    if value is None or len(value) > _LONGEST_DATE or not value.isascii():
        return None
    try:
        date = parsedate_to_datetime(value.decode())
        moment = (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
    return moment - now if moment > now and math.isfinite(moment) else None


def wait(asked: float, base: float, random: Callable[[], float]) -> float:
    """Seconds to wait where a provider asked for `asked`: never less, and not all clients at once."""
    return asked + max(base, asked * JITTER_PART) * random()


def fits(asked: float, max_delay: float, left: float) -> bool:
    """Whether the wish of a provider can be granted: within the longest delay, and with time `left` afterwards."""
    return asked <= max_delay and asked < left


class RetryBudget:
    """How many repetitions one provider is spared or sent. One for each provider and process; `clock` in seconds.

    A balance between 0 and `cap`, which begins full. `deposit` with each first send, `withdraw` before each repeated
    send to the same provider after a connect error, a 5xx or a timeout. Waits that the provider asked for and attempts
    at another provider draw nothing. The floor lets a quiet process repeat something now and then.

    Over `n` requests in `t` seconds: at most `cap + deposit * n + floor * t` repetitions.
    """

    __slots__ = ("_at", "_cap", "_clock", "_deposit", "_floor", "balance")

    def __init__(
        self, clock: Callable[[], float], *, deposit: float = 0.08, cap: float = 10.0, floor: float = 0.2
    ) -> None:
        self._clock = clock
        self._deposit = deposit
        self._cap = cap
        self._floor = floor
        self._at = clock()
        self.balance = cap

    def deposit(self) -> None:
        """A request is sent to this provider for the first time."""
        balance = self.balance
        if balance < self._cap:
            self.balance = min(balance + self._deposit, self._cap)

    def withdraw(self) -> bool:
        """Whether a repeated send is covered, which takes one. Denied, the balance is left as it is."""
        now = self._clock()
        self.balance = min(self.balance + max(now - self._at, 0.0) * self._floor, self._cap)
        self._at = now
        if self.balance < 1.0:
            return False
        self.balance -= 1.0
        return True
