"""The one task that looks after the store: it reaches for it, beats, keeps leases, and has what waits booked.

In reach, a beat a second tells the store that this process is there, and is answered how many are, and whether the
store is still the one it was; one call every ten seconds extends all leases of this process. Away, it tries four times
a second at first, every two seconds at last. Requests never wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from secrets import token_hex
from typing import TYPE_CHECKING, Final, Literal

from proxy.budget.amounts import Amounts
from proxy.budget.fleet import BEAT_SECONDS, LIFE_SECONDS
from proxy.observability.events import InternalFault, Notice, StoreMisconfigured
from proxy.store.base import Reason, Reservation, Scope, Server, Settlement, StoreUnavailable

if TYPE_CHECKING:
    from proxy.budget.access import Access

Op = Literal["reserve", "top_up", "settle", "extend", "balance", "seed", "beat", "server", "usage"]
"""Verbs of the store, as metrics call them."""

LEASE_MS: Final = 30_000
EXTEND_SECONDS: Final = 10.0
PROBE_SECONDS: Final = (0.25, 2.0)
"""First and longest pause between two attempts to reach a store that is away."""
FLAPPING_SECONDS: Final = 8.0
"""The longest first pause, of a store that goes away again and again."""

_PROBE: Final = Scope("global", "probe")
"""Limits nothing. A reservation in it shows that the store takes reservations."""


class Tender:
    """`clock` is the event loop's, in seconds. `process_id`: 32 hexadecimal digits that no other process has."""

    def __init__(
        self,
        access: Access,
        process_id: str,
        clock: Callable[[], float],
        emit: Callable[[Notice], None],
        *,
        extend_seconds: float = EXTEND_SECONDS,
        beat_seconds: float = BEAT_SECONDS,
    ) -> None:
        self._access = access
        self._id = process_id
        self._clock = clock
        self._emit = emit
        self._extend_seconds = extend_seconds
        self._beat_seconds = beat_seconds
        self._extend_at = clock() + extend_seconds
        self._beat_at = 0.0
        self._joined = False
        self._epoch = 0
        self._server: Server | None = None
        self._pause = PROBE_SECONDS[0]
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """The event loop must run."""
        self._task = asyncio.get_running_loop().create_task(self._tend())

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def leave(self) -> None:
        """Is not counted any more. If the store does not hear it, it gives this process up in time."""
        if self._joined:
            with suppress(StoreUnavailable):
                await self._access.store.beat(self._id, 0)

    def rest(self, *, flapping: bool) -> None:
        """The store has just gone away: how soon to try for the first time."""
        self._pause = min(self._pause * 2, FLAPPING_SECONDS) if flapping else PROBE_SECONDS[0]
        self._wake.set()

    async def _tend(self) -> None:
        pause = 0.0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            if self._wake.is_set():
                self._wake.clear()
                pause = self._pause
                continue
            try:
                if self._joined and not self._access.away:
                    await self._keep_up()
                else:
                    await self._reach()
            except StoreUnavailable as error:
                pause = self._after(error.reason)
            except Exception as exc:  # A fault of ours must not end the task that keeps every lease of the process.
                self._emit(InternalFault(where="tending the store", exc=exc))
                pause = self._after("corrupt")
            else:
                pause = max(min(self._beat_at, self._extend_at) - self._clock(), 0.0)

    def _after(self, reason: Reason) -> float:
        """How long to wait after a failure."""
        if not self._access.away:
            self._access.lost(reason)
            self._wake.clear()  # it is for a tender that sleeps
        elif reason == "open":
            return PROBE_SECONDS[0]  # Nobody was asked: the store's own circuit says when somebody may be.
        else:
            self._pause = max(min(self._pause * 2, PROBE_SECONDS[1]), PROBE_SECONDS[0])
        return self._pause

    # -- a store that is away, or was never reached ------------------------------------------------------------------

    async def _reach(self) -> None:
        access = self._access
        await self._beat()
        await self._inspect()
        await access.tell()
        if access.away:
            await access.catch_up()  # Before the try: a store whose memory is full takes settlements all the same.
            await self._try()
            await access.catch_up()  # What came meanwhile. Nothing waits between the last of it and `back`.
            access.back()
        else:
            await access.ask("balance", lambda: access.store.balance((_PROBE,)))
        self._joined = True
        await self._extend()

    async def _try(self) -> None:
        """A reservation that asks for nothing: it fails as the next one would."""
        access, probe = self._access, Reservation(token_hex(16), (_PROBE,), Amounts(), LEASE_MS, "refund")
        await access.ask("reserve", lambda: access.store.reserve(probe))
        await access.ask("settle", lambda: access.store.settle(Settlement(probe.id, probe.scopes, Amounts())))

    async def _inspect(self) -> None:
        """Says so, once, if the server will not do."""
        try:
            server = await self._access.store.server()
        except StoreUnavailable:
            self._access.failed("server")
            return  # What is wrong with it shows where it matters.
        if server is not None and server != self._server and server.shortcomings:
            self._emit(
                StoreMisconfigured(version=server.version, eviction=server.eviction, shortcomings=server.shortcomings)
            )
        self._server = server

    # -- a store that is there ---------------------------------------------------------------------------------------

    async def _keep_up(self) -> None:
        if self._clock() >= self._beat_at and await self._beat():
            # It began a new life without this process: what is remembered here may be more than it was told.
            await self._access.tell()
        if self._access.waiting:
            await self._access.replay()
        if self._clock() >= self._extend_at:
            await self._extend()

    async def _beat(self) -> bool:
        """True: the store is not the one that it was."""
        now = self._clock()
        self._beat_at = now + self._beat_seconds
        self._access.watch.second = int(now)
        try:
            beat = await self._access.store.beat(self._id, int(LIFE_SECONDS * 1000))
        except StoreUnavailable:
            self._access.failed("beat")
            raise
        self._access.fleet.heard(beat, self._clock())
        another = beat.epoch != self._epoch
        self._epoch = beat.epoch
        return another

    async def _extend(self) -> None:
        access = self._access
        self._extend_at = self._clock() + self._extend_seconds
        ids = list(access.live)
        if ids:
            lost = await access.ask("extend", lambda: access.store.extend(ids, LEASE_MS))
            # A store that began anew since the last beat knows none of them.
            await access.give([access.live[each] for each in lost if each in access.live])
