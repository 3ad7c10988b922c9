"""The ledger's files, as the configuration wants them: read before anything is served, written until all is booked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from proxy.budget.restore import Restored, restored
from proxy.budget.settings import LedgerSettings
from proxy.budget.sink import FileSink, LedgerFile
from proxy.config.settings import Settings
from proxy.observability.events import Bus, LedgerRestored, Notice, StoreReset
from proxy.store.address import MEMORY
from proxy.store.base import SEED_MS, BudgetStore, Cold, Scope, StoreUnavailable

_PROBE = Scope("global", "")
_AT_ONCE = 100
"""Scopes in one call: a script keeps everybody waiting."""


class Ledger:
    """`alone`: the store is this process's memory. It owns the tasks of its sinks; the store is somebody else's."""

    def __init__(
        self,
        settings: LedgerSettings,
        store: BudgetStore,
        *,
        alone: bool,
        emit: Callable[[Notice], None],
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._store = store
        self._alone = alone
        self._emit = emit
        self._clock = clock
        self._wall_ms = wall_ms
        self._sinks = [
            FileSink(
                store,
                LedgerFile(sink.file, max_bytes=sink.max_bytes, keep=sink.keep),
                shared=not alone,
                clock=clock,
                emit=emit,
            )
            for sink in settings.sinks
        ]

    async def start(self) -> None:
        """Tells an empty store what the files know, then follows its outbox."""
        if self._sinks and await self._is_empty():
            for sink in self._sinks:
                await self._restore(sink.file)
        for sink in self._sinks:
            sink.start()

    async def aclose(self) -> None:
        await asyncio.gather(*(sink.aclose() for sink in self._sinks))

    async def _is_empty(self) -> bool:
        try:
            answer = await self._store.balance((_PROBE,))
        except StoreUnavailable:
            return False  # What it knows when it is back cannot be known now.
        return isinstance(answer, Cold) and not answer.scopes

    async def _restore(self, file: LedgerFile) -> None:
        found: Restored = await asyncio.to_thread(restored, file.paths, self._wall_ms(), self._clock)
        try:
            # Of several files, and of what other processes remember, each window becomes the largest.
            for start in range(0, len(found.remembered), _AT_ONCE):
                some = found.remembered[start : start + _AT_ONCE]
                seeded = await self._store.seed(some, 0 if self._alone else SEED_MS)
                if seeded.first and not self._alone:
                    self._emit(StoreReset(scopes=len(found.remembered)))
        except StoreUnavailable:
            return
        if found.records or not found.complete:
            self._emit(LedgerRestored(file=str(file.path), records=found.records, complete=found.complete))


def ledger_of(settings: Settings, store: BudgetStore, bus: Bus) -> Ledger:
    alone = settings.state.get_secret_value() == MEMORY
    return Ledger(settings.ledger, store, alone=alone, emit=bus.emit)
