"""Credentials that rest: a provider answered 429, and said, or left open, for how long. Pure.

That is no evidence against the provider's health: it answers, and another credential may still be served.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final

from proxy.fault_tolerance.backoff import delay

LONGEST_SECONDS: Final = 3600.0
"""However long a provider asks for: a header alone must not switch a credential off for a day."""
_FORGET_SECONDS: Final = 300.0
"""After this much quiet, the next refusal is a first one again."""


class _Rest:
    __slots__ = ("refusals", "until")

    def __init__(self) -> None:
        self.refusals = 0
        self.until = 0.0


class Cooldowns:
    """By key: a provider's name, or one of its credentials. `clock` is monotonic, in seconds; `random` from [0, 1).

    `base` and `cap` (seconds) bound the rest where the provider names none: it doubles with each refusal in a row.
    Keys are those of the configuration, so their number is bounded.
    """

    __slots__ = ("_base", "_cap", "_clock", "_random", "_rests")

    def __init__(
        self, clock: Callable[[], float], random: Callable[[], float], *, base: float = 1.0, cap: float = 30.0
    ) -> None:
        self._clock = clock
        self._random = random
        self._base = base
        self._cap = cap
        self._rests: dict[Hashable, _Rest] = {}

    def left(self, key: Hashable) -> float:
        """Seconds that `key` still rests; 0.0 if it may be used."""
        rest = self._rests.get(key)
        return 0.0 if rest is None else max(rest.until - self._clock(), 0.0)

    def refused(self, key: Hashable, asked: float | None = None) -> float:
        """A 429 came. `asked`: what the provider asked for. Returns the seconds that the key rests from now on."""
        now = self._clock()
        rest = self._rests.get(key)
        if rest is None:
            rest = self._rests[key] = _Rest()
        elif now >= rest.until + _FORGET_SECONDS:
            rest.refusals = 0
        elif asked is None and now < rest.until:
            return rest.until - now  # an answer to something sent before the rest began: not another refusal
        if asked is None:
            # At least the base: a rest of nearly nothing would be no rest.
            seconds = max(delay(rest.refusals, self._base, self._cap, self._random), min(self._base, self._cap))
            rest.refusals += 1
        else:
            seconds = min(asked, LONGEST_SECONDS)
        rest.until = max(rest.until, now + seconds)
        return rest.until - now

    def rest(self, key: Hashable, seconds: float) -> None:
        """`key` is not used for that long: its credential was not accepted."""
        rest = self._rests.setdefault(key, _Rest())
        rest.until = max(rest.until, self._clock() + min(seconds, LONGEST_SECONDS))

    def served(self, key: Hashable) -> None:
        """An answer came with this key: the next refusal is a first one. A rest that goes on is not cut short."""
        rest = self._rests.get(key)
        if rest is not None and self._clock() >= rest.until:
            del self._rests[key]
