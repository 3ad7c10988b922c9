"""The circuit of the store's own server: after five failures in a row nobody waits for it any more. Pure.

closed ──5 failures──▶ open for 1 s ──▶ one call may try ──success──▶ closed
                          ▲                   │
                          └──failure: twice as long, at most 10 s
"""

from __future__ import annotations

from typing import Final

FAILURES: Final = 5
OPEN_SECONDS: Final = 1.0
MAX_OPEN_SECONDS: Final = 10.0


class Circuit:
    """`now` is any clock that does not step back, in seconds."""

    __slots__ = ("_failures", "_open_for", "_open_until", "_trying_until", "is_open", "troubled")

    def __init__(self) -> None:
        self.is_open = False
        self.troubled = False
        """A success would change something."""
        self._failures = 0
        self._open_for = OPEN_SECONDS
        self._open_until = 0.0
        self._trying_until = 0.0

    def allows(self, now: float) -> bool:
        """Whether a call may go out. While open: one call, once the time is over, and none until it has ended."""
        if not self.is_open:
            return True
        if now < self._open_until or now < self._trying_until:
            return False
        # An answer always comes, by success or failure; if the caller was cancelled before, the next may try.
        self._trying_until = now + OPEN_SECONDS
        return True

    def failed(self, now: float) -> bool:
        """Notes a failure. True if this one opened the circuit."""
        self.troubled = True
        self._failures += 1
        if self.is_open:
            if now < self._open_until:
                return False  # an answer to something sent before it opened
            self._open_for = min(2 * self._open_for, MAX_OPEN_SECONDS)
        elif self._failures < FAILURES:
            return False
        opened = not self.is_open
        self.is_open = True
        self._open_until = now + self._open_for
        self._trying_until = 0.0
        return opened

    def succeeded(self) -> bool:
        """Notes a success. True if this one closed the circuit."""
        closed = self.is_open
        self.is_open = self.troubled = False
        self._failures = 0
        self._open_for = OPEN_SECONDS
        return closed
