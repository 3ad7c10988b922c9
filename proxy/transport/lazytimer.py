"""A deadline that mostly moves away, without a timer being set each time it moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_RECHECK = 86400.0


class LazyTimer:
    """Calls `fire` once the latest deadline has passed. One loop timer at most; only a nearer deadline sets it anew.

    The timer stays where it was set, and looks at the deadline when it fires: a stream of a thousand reads, each with
    its own deadline, costs one timer.
    """

    __slots__ = ("_at", "_deadline", "_fire", "_loop", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, fire: Callable[[], None]) -> None:
        self._loop = loop
        self._fire = fire
        self._timer: asyncio.TimerHandle | None = None
        self._at = self._deadline = 0.0

    def set(self, deadline: float) -> None:
        """`deadline`: on the loop's clock, seconds; infinity is allowed."""
        self._deadline = deadline
        if self._timer is None:
            self._start()
        elif deadline < self._at:
            self._timer.cancel()
            self._start()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self) -> None:
        self._at = min(self._deadline, self._loop.time() + _RECHECK)  # the loop refuses infinity
        self._timer = self._loop.call_at(self._at, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._loop.time() < self._deadline:
            self._start()
        else:
            self._fire()
