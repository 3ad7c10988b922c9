"""The credentials of one provider, and which of them should rest.

A key that was refused rests for the model that it was refused for: rate limits and permissions are given per model,
and one model that a key may not use must not take the others from everybody. While it rests, the others are used.

Where none is left, the provider itself rests: at once after a 429, for that says when to come back; but only after some
refusals in a row of a key that is not accepted, for one can be a slip of the provider's; and never for a 403, which
may be about the text of one request, and so in the hands of one client.

Requests that belong together (one run, one prompt cache) stay with one key while it is ready; the others go round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Final

from proxy.errors import Cooling
from proxy.providers.base import Resting
from proxy.types import Headers

RATE_SECONDS: Final = 1.0
"""The first rest after a 429 that names no time; each in a row is twice as long."""
MAX_RATE_SECONDS: Final = 30.0
MAX_ASKED_SECONDS: Final = 300.0
"""A provider that names a longer time is asked again after this one all the same: it may have been mistaken."""
CREDENTIAL_SECONDS: Final = 60.0
MAX_CREDENTIAL_SECONDS: Final = 600.0
SURE: Final = 3
"""Refusals in a row after which a key is taken to be no good."""
_REMEMBERED: Final = 4096


class _Rest:
    __slots__ = ("refusals", "until", "why")

    def __init__(self, why: Cooling) -> None:
        self.why = why
        self.until = 0.0
        self.refusals = 0
        """In a row."""

    @property
    def blocks(self) -> bool:
        """The key is of no use meanwhile, even where there is no other."""
        return self.why == "rate" or (self.why == "credential" and self.refusals >= SURE)


class Keys:
    """`headers`: what each key adds to a request. `now` is monotonic (seconds), `random` uniform in [0, 1)."""

    __slots__ = ("_headers", "_next", "_now", "_random", "rests")

    def __init__(self, headers: Sequence[Headers], *, now: Callable[[], float], random: Callable[[], float]) -> None:
        self._headers = tuple(headers)
        self._now = now
        self._random = random
        self._next = 0
        self.rests: dict[tuple[int, str], _Rest] = {}
        """By key and model. Empty: there is nothing to know."""

    def headers(self, key: int) -> Headers:
        return self._headers[key]

    def pick(self, model: str, together: bytes = b"") -> int:
        """The key for the next request; where all of them rest, the one that is ready first.

        `together`: what related requests have in common."""
        count = len(self._headers)
        if count == 1:
            return 0
        if together:
            start = int.from_bytes(blake2b(together, digest_size=4).digest(), "big") % count
        else:
            start = self._next = (self._next + 1) % count
        if not self.rests:
            return start
        return min(range(start, start + count), key=lambda turn: self._wait(turn % count, model)) % count

    def resting(self, model: str) -> Resting | None:
        """The shortest rest of a key; None: one may be used."""
        shortest: Resting | None = None
        for key in range(len(self._headers)):
            rest = self.rests.get((key, model))
            seconds = 0.0 if rest is None else rest.until - self._now()
            if rest is None or seconds <= 0.0 or not rest.blocks:
                return None
            if shortest is None or seconds < shortest.seconds:
                shortest = Resting(seconds, rest.why)
        return shortest

    def refused(self, key: int, model: str, why: Cooling, asked: float | None) -> bool:
        """Lays `key` to rest. True: another one is ready. `asked`: the seconds that the provider named."""
        now = self._now()
        rest = self.rests.get((key, model))
        if rest is None:
            self._make_room(now)
            rest = self.rests[key, model] = _Rest(why)
        if rest.why != why:
            rest.why, rest.refusals = why, 0
        if now >= rest.until or why != "rate":  # else it is the answer to something that was sent before the last one
            rest.refusals += 1
        rest.until = max(rest.until, now + self._seconds(why, asked, rest.refusals))
        return any(self._wait(other, model) == 0.0 for other in range(len(self._headers)))

    def accepted(self, key: int, model: str) -> None:
        """The provider has answered with this key."""
        rest = self.rests.get((key, model))
        if rest is not None and (rest.why != "rate" or self._now() >= rest.until):
            del self.rests[key, model]

    def _wait(self, key: int, model: str) -> float:
        rest = self.rests.get((key, model))
        return 0.0 if rest is None else max(rest.until - self._now(), 0.0)

    def _seconds(self, why: Cooling, asked: float | None, refusals: int) -> float:
        if why == "rate" and asked is not None:
            return min(asked, MAX_ASKED_SECONDS)
        first, most = RATE_SECONDS, MAX_RATE_SECONDS
        if why != "rate":
            first, most, refusals = CREDENTIAL_SECONDS, MAX_CREDENTIAL_SECONDS, max(refusals - SURE + 1, 1)
        # From half to the whole: what was refused together does not come back together.
        return min(first * 2.0 ** min(refusals - 1, 16), most) * (0.5 + self._random() / 2)

    def _make_room(self, now: float) -> None:
        """Under a glob clients choose the names of models."""
        if len(self.rests) < _REMEMBERED:
            return
        for place in [place for place, rest in self.rests.items() if rest.until <= now]:
            del self.rests[place]
        while len(self.rests) >= _REMEMBERED:
            del self.rests[next(iter(self.rests))]
