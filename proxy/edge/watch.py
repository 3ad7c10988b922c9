"""One timer for a deadline that moves often and fires rarely."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

NEVER: Final = 0.0


class Watch:
    """Calls `due` at the deadline. To move the deadline, or to lift it, costs an assignment in most cases.

    The timer is left as it is while it would fire no later than the deadline; when it does, it looks again.
    """

    __slots__ = ("_at", "_due", "_loop", "_timer", "deadline")

    def __init__(self, loop: asyncio.AbstractEventLoop, due: Callable[[], None]) -> None:
        self._loop = loop
        self._due = due
        self._timer: asyncio.TimerHandle | None = None
        self._at = NEVER
        self.deadline = NEVER
        """On the loop's clock, in seconds. Set it to NEVER to lift it; to anything else only by `within`."""

    def within(self, seconds: float) -> None:
        self.deadline = self._loop.time() + seconds
        self._arm()

    def close(self) -> None:
        """No call comes after this. Lets go of `due`, whose object may hold this one."""
        self.deadline = NEVER
        self._due = _nothing
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        if self._timer is not None:
            if self._at <= self.deadline:
                return
            self._timer.cancel()
        self._at = self.deadline
        self._timer = self._loop.call_at(self._at, self._look)

    def _look(self) -> None:
        self._timer = None
        if self.deadline == NEVER:
            return
        if self._loop.time() < self.deadline:
            self._arm()
        else:
            self.deadline = NEVER
            self._due()


def _nothing() -> None:
    pass
