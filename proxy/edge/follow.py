"""Follows the registry of keys: one task asks each second whether anything has changed, and takes it over.

A key is looked up in memory, so a request costs the store nothing for it, and goes on while the store is away. What has
changed is in force at the next look, a second later at most, or as soon as the store is back. Ends that are known
before (an expiry, the end of an overlap) need no look: they come by a timer, on the registry's clock as last heard.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from proxy.edge.auth import KeyedTenants
from proxy.edge.keyring import Keyring
from proxy.observability.events import InternalFault, KeysFollowed, KeysLost, KeysStale, Notice
from proxy.store.base import StoreUnavailable
from proxy.store.registry import KeyRefused, KeyRegistry, Stamp

LOOK_SECONDS: Final = 1.0
PAUSE_SECONDS: Final = 2.0
"""The longest pause between two looks while they fail."""
STALE_SECONDS: Final = 5.0
"""A registry that could not be asked for so long is worth a line in the log."""


class KeyFollower:
    """`clock` is the event loop's, in seconds. Closed before the store that the registry stands on."""

    def __init__(
        self,
        registry: KeyRegistry,
        ring: Keyring,
        door: KeyedTenants,
        *,
        clock: Callable[[], float],
        emit: Callable[[Notice], None],
        look_seconds: float = LOOK_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        self._registry = registry
        self._ring = ring
        self._door = door
        self._clock = clock
        self._emit = emit
        self._look_seconds = look_seconds
        self._stale_seconds = stale_seconds
        self._pause = look_seconds
        self._known: str | None = None
        """The stamp of what was taken over last."""
        self._ahead_ms = 0.0
        """Of the registry's clock over ours."""
        self._asked = clock()
        """When the registry answered last."""
        self._stale = False
        self._again: set[str] = set()
        """Keys whose revocation the registry is still to be told once more."""
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Before anything is served. Takes two seconds at most, and goes on without a registry that is away."""
        await self._look()
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def aclose(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._pause)
            await self._look()

    async def _look(self) -> None:
        try:
            stamp = await self._registry.stamp()
            if stamp.text != self._known:
                await self._take()
            else:
                self._heard(stamp)
            await self._revoke_again()
        except StoreUnavailable as error:
            self._failed(error.reason)
        except Exception as error:  # Without this task no revocation would be heard of: it must outlive any fault.
            self._emit(InternalFault(where="following the registry of keys", exc=error))
            self._failed("corrupt")
        else:
            self._pause = self._look_seconds
            if self._stale:
                self._stale = False
                self._emit(KeysFollowed(stale=self._clock() - self._asked))
            self._asked = self._clock()
            self._sweep()

    async def _take(self) -> None:
        snapshot = await self._registry.snapshot()
        self._heard(snapshot.stamp)
        taken = self._ring.take(snapshot)
        self._door.complete = True
        self._known = snapshot.stamp.text
        self._again.update(taken.again)
        if taken.lost:
            self._emit(KeysLost(known=taken.lost))

    async def _revoke_again(self) -> None:
        for key_id in tuple(self._again):
            with suppress(KeyRefused):
                await self._registry.revoke(key_id)
            self._again.discard(key_id)

    def _failed(self, reason: str) -> None:
        self._pause = min(self._pause * 2, max(PAUSE_SECONDS, self._look_seconds))
        if not self._stale and self._clock() - self._asked >= self._stale_seconds:
            self._stale = True
            self._emit(KeysStale(reason=reason))

    # -- ends --------------------------------------------------------------------------------------------------------

    def _heard(self, stamp: Stamp) -> None:
        self._ahead_ms = stamp.now_ms - self._clock() * 1000

    def _wind(self) -> None:
        """Sets the timer to the next end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        end = self._ring.next_end_ms
        if end is not None:
            # Years ahead is further than a loop's timer reaches; an hour early is as good.
            wait = min((end - self._ahead_ms) / 1000 - self._clock(), 3600.0)
            self._timer = asyncio.get_running_loop().call_later(max(wait, 0.001), self._sweep)

    def _sweep(self) -> None:
        self._ring.sweep(self._clock() * 1000 + self._ahead_ms)
        self._wind()
