"""A place to wait for room in a budget: bounded, first come first served within a tenant, in turn between tenants.

What wakes a waiter is a reservation that ended, or its own clock: whoever is woken tries again and, if that succeeds,
wakes the next. So a tenant with a thousand waiting requests delays another one by one request at most.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import Final

WAITING: Final = 1000
"""Requests that may wait at once; further ones are refused as if they would not wait."""

_Place = asyncio.Future[None]


class Waiting:
    def __init__(self, capacity: int = WAITING) -> None:
        self._capacity = capacity
        self._tenants: OrderedDict[str, deque[_Place]] = OrderedDict()
        self.size = 0
        """Requests that wait now."""

    def has_room(self) -> bool:
        return self.size < self._capacity

    def queued(self, tenant: str) -> bool:
        """Somebody of this tenant waits already: whoever comes now is behind."""
        return tenant in self._tenants

    async def turn(self, tenant: str, seconds: float, *, again: bool = False) -> None:
        """Returns when it is this waiter's turn, or after `seconds`. `again`: it had its turn, and keeps its place."""
        place: _Place = asyncio.get_running_loop().create_future()
        queue = self._tenants.setdefault(tenant, deque())
        if again:
            queue.appendleft(place)
            self._tenants.move_to_end(tenant, last=False)
        else:
            queue.append(place)
        self.size += 1
        try:
            async with asyncio.timeout(seconds):
                await place
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.wake()  # It had been called and left: the turn is the next one's.
            raise
        finally:
            self._leave(tenant, place)

    def _leave(self, tenant: str, place: _Place) -> None:
        self.size -= 1
        queue = self._tenants.get(tenant)
        if queue is not None:
            if place in queue:
                queue.remove(place)
            if not queue:
                del self._tenants[tenant]

    def wake(self) -> None:
        """Calls the next waiter, of the tenant whose turn it is."""
        for tenant in list(self._tenants):
            queue = self._tenants[tenant]
            self._tenants.move_to_end(tenant)
            while queue:
                place = queue.popleft()
                if not place.done():
                    place.set_result(None)
                    return
