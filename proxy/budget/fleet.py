"""How many processes share the limits, as far as this one was told. Pure: `now` is any steady clock, in seconds.

While the store is away each process takes its share, and nobody can ask: the shares must not add up to more than the
limit. So the number is never counted lower while away, nor soon after: those who are not back yet are not gone. And who
joined so lately that others cannot have heard of it, or fell silent so long that they gave it up, has no share.
"""

from __future__ import annotations

from typing import Final

from proxy.store.base import Beat

BEAT_SECONDS: Final = 1.0
LIFE_SECONDS: Final = 10.0
"""A process that was not heard of for this long is not counted any more."""


class Fleet:
    """`beat_seconds`: how often each process beats, and hears how many others do."""

    def __init__(self, beat_seconds: float = BEAT_SECONDS) -> None:
        self.processes = 1
        self._beat_seconds = beat_seconds
        self._known_at: float | None = None
        self._last = 0.0
        self._lower_from = float("-inf")

    def heard(self, beat: Beat, now: float) -> None:
        """The store answered that so many live."""
        if self._known_at is None or now - self._last >= LIFE_SECONDS:
            # Others hear of this one at their next beat; who is alone need not wait for anybody.
            self._known_at = now + 2 * self._beat_seconds if beat.processes > 1 else now
        self._last = now
        if beat.processes > self.processes or now >= self._lower_from:
            self.processes = max(beat.processes, 1)

    def returned(self, now: float) -> None:
        """The store is back: others may need a while longer to find it."""
        self._lower_from = now + 2 * LIFE_SECONDS

    def has_share(self, now: float) -> bool:
        """Others count this process, if the store is away from now on."""
        return self._known_at is None or (self._known_at <= now and now - self._last < LIFE_SECONDS)
