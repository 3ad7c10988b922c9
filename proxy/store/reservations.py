"""Reservations in memory: which live, until when, and which ended a while ago."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import Final

from proxy.budget.amounts import Part
from proxy.store.base import OnLost

REAPED_PER_CALL: Final = 20
"""Lost reservations that one call books: no request pays for the crash of a thousand others."""

Triple = tuple[int, int, int]


class Held:
    """A reservation that lives, or has expired and can still be settled late."""

    __slots__ = ("charged", "expired", "forget_at", "lease_until", "on_lost", "parts", "windows")

    def __init__(self, lease_until: int, on_lost: OnLost) -> None:
        self.lease_until = lease_until
        self.on_lost = on_lost
        self.parts: dict[str, list[Part]] = {}
        """By place of the scope."""
        self.expired = False
        self.charged: dict[str, Triple] = {}
        """Once expired: what it was charged, and the calendar windows of that, by place."""
        self.windows: dict[str, Triple] = {}
        self.forget_at = 0


class Over:
    """A reservation that is over for good."""

    __slots__ = ("forget_at",)

    def __init__(self, forget_at: int) -> None:
        self.forget_at = forget_at


class Reservations:
    """All that are known, by id. Times are steady milliseconds.

    Bounded: leases end, and what is remembered of ended ones leaves by age and, where they were settled, by number.
    """

    __slots__ = ("_expired", "_kept", "_known", "_leases", "_over")

    def __init__(self, settled_kept: int) -> None:
        self._kept = settled_kept
        self._known: dict[str, Held | Over] = {}
        self._leases: list[tuple[int, str]] = []  # a heap; the entry of an older lease is skipped when it comes up
        self._over: deque[tuple[int, str]] = deque()  # when to forget it, and its id; likewise below
        self._expired: deque[tuple[int, str]] = deque()

    def find(self, known: str, now: int) -> Held | Over | None:
        held = self._known.get(known)
        return None if held is not None and 0 < held.forget_at <= now else held

    def live(self, known: str, now: int) -> Held | None:
        held = self.find(known, now)
        return held if isinstance(held, Held) and not held.expired else None

    def add(self, known: str, held: Held) -> None:
        self._known[known] = held
        heapq.heappush(self._leases, (held.lease_until, known))

    def renew(self, known: str, held: Held, until: int) -> None:
        """A lease never becomes shorter."""
        if held.lease_until < until:
            held.lease_until = until
            heapq.heappush(self._leases, (until, known))

    def settle(self, known: str, forget_at: int) -> None:
        self._known[known] = Over(forget_at)
        self._over.append((forget_at, known))

    def expire(self, known: str, held: Held, forget_at: int) -> None:
        held.expired = True
        held.forget_at = forget_at
        self._expired.append((forget_at, known))

    def overdue(self, now: int) -> Iterator[tuple[str, Held]]:
        """Those whose lease is over, the oldest first, at most 20. Each is expired before the next is asked for."""
        leases = self._leases
        found = 0
        while leases and leases[0][0] <= now and found < REAPED_PER_CALL:
            until, known = heapq.heappop(leases)
            held = self._known.get(known)
            if isinstance(held, Held) and not held.expired and held.lease_until == until:
                found += 1
                yield known, held

    def forget(self, now: int) -> None:
        """Lets go of what ended long ago, and of the oldest settled ones where there are too many."""
        over, expired = self._over, self._expired
        while over and (over[0][0] <= now or len(over) > self._kept):
            self._drop(*over.popleft())
        while expired and expired[0][0] <= now:
            self._drop(*expired.popleft())

    def _drop(self, forget_at: int, known: str) -> None:
        held = self._known.get(known)
        if held is not None and held.forget_at == forget_at:
            del self._known[known]
