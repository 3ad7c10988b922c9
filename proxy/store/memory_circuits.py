"""The breaker's store of a single process, or of several that share this object: nothing in it waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from proxy.fault_tolerance.base import (
    ALIVE_MS,
    LEASE_MS,
    QUORUM,
    SETTLED_MS,
    Action,
    Granted,
    Outcome,
    Place,
    Probe,
    Report,
    View,
    Vote,
)
from proxy.fault_tolerance.fleet import STEPS_MS, Record


class MemoryCircuits:
    """`BreakerStore` in memory. `clock` reads milliseconds. Bounded by the number of circuits and processes."""

    def __init__(self, *, clock: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000) -> None:
        self._clock = clock
        self._records: dict[Place, Record] = {}
        self._processes: dict[str, tuple[int, int]] = {}
        """When each came, and when it is given up."""

    async def report(
        self, process: str, votes: Sequence[Vote], probes: Sequence[Probe], since_ms: int, *, alive_ms: int = ALIVE_MS
    ) -> Report:
        now = self._clock()
        self._processes = {who: life for who, life in self._processes.items() if life[1] > now}
        came, _ = self._processes.pop(process, (now, 0))
        if alive_ms:
            self._processes[process] = (came, now + alive_ms)
        for record in self._records.values():
            record.expire(now)
        lost = tuple(probe for probe in probes if not self._renew(process, probe, now))
        said = {vote.place: vote for vote in votes}
        for place, vote in said.items():
            if place not in self._records:
                record = self._records[place] = Record(place, vote.generation)
                if vote.restores:
                    record.restore(vote, process, now)
        live = self._processes
        quorum = 1 if len(live) == 1 and now - came >= SETTLED_MS else QUORUM
        views = []
        for place, record in list(self._records.items()):
            own = said.get(place)
            record.vote(process, own if own is not None and not own.restores else None, live, quorum, now)
            if not alive_ms and record.owner == process:
                record.probe_until = now
                record.expire(now)
            if record.idle(now):
                del self._records[place]
            elif record.concerns(since_ms):
                views.append(record.view(now))
        return Report(tuple(views), len(live), now, lost)

    def _renew(self, process: str, probe: Probe, now: int) -> bool:
        record = self._records.get(probe.place)
        return record is not None and record.renew(process, probe.number, LEASE_MS, now)

    async def lease(
        self, place: Place, process: str, generation: int, *, early: bool, lease_ms: int = LEASE_MS
    ) -> Granted | View:
        now = self._clock()
        record = self._record(place, generation)
        return record.lease(process, generation, lease_ms, now, early=early) or record.view(now)

    async def conclude(
        self, place: Place, process: str, number: int, outcome: Outcome, *, open_ms: int, generation: int
    ) -> View:
        now = self._clock()
        record = self._records.get(place) or Record(place, generation)
        if now < record.changed - STEPS_MS:
            record.expire(now)
        record.conclude(process, number, outcome, open_ms, generation, now)
        return record.view(now)

    async def command(self, place: Place, action: Action, who: str) -> View:
        now = self._clock()
        record = self._record(place, 0)
        record.expire(now)
        record.command(action, who, now)
        return record.view(now)

    def _record(self, place: Place, generation: int) -> Record:
        record = self._records.get(place)
        if record is None:
            record = self._records[place] = Record(place, generation)
        return record
