"""Summaries in place of what was removed: found, or made by one call, which all who need it share.

Who owns the call. A summary is made within the request that was first to need it: on its task, with its `ask`, on its
bill. Requests that need the same one meanwhile wait for it. If the first one leaves, its call ends with it, because
whatever it costs belongs to a reservation that is about to be settled, and a call that outlived it would be nobody's:
no bill, no deadline, no one to free its connection. One of those that wait then takes over with its own `ask`; what the
first had begun is lost. So there is never a task of our own, and nothing to close.

What fails stays failed for a while, or each request of a session would wait the full time for the same failure. Only a
budget that is used up for the moment, or a deadline that is near, is the caller's own matter: another one may well be
able to pay, or to wait.

Bounds. All that comes before the summary is there, waiting for others included, takes at most `seconds`. A store that
is away costs its own time limit, and the work goes on without it. A request needs one summary at a time, so there are
no more flights than requests; failures are remembered of so many keys, the latest ones.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import msgspec

from proxy.context.atoms import Atom
from proxy.context.digest import Raw, Reason, SummaryFailed, judge, keys_of, removed, request, text_in
from proxy.context.transcript import transcript
from proxy.context.trim import Cut
from proxy.errors import (
    BudgetExceeded,
    ModelPriceUnknown,
    ProviderFull,
    ProxyError,
    RequestExceedsBudget,
    UpstreamTimeout,
)
from proxy.errors import StoreUnavailable as BudgetUnavailable
from proxy.store.base import StoreUnavailable
from proxy.store.summaries import SummaryStore
from proxy.tokens.count import Counter
from proxy.tokens.encodings import encoding_of
from proxy.types import Dialect

TRANSCRIPT_CHARS: Final = 100_000
"""About 25,000 tokens."""
EARLIER: Final = 8
"""Stages before the newest one that are looked up, to begin from the nearest."""
REMEMBERED: Final = 4_096
LATE: Final = 0.25
"""Of the time for a summary, what must be left to whoever takes over from another."""
INLINE_BYTES: Final = 1_048_576
INLINE_MESSAGES: Final = 2_048
"""About a millisecond each. Longer conversations are hashed in a thread."""
_T = TypeVar("_T")

Ask = Callable[[bytes], Awaitable[bytes]]
"""Sends a chat body upstream and gives the body of its 200 reply, or raises ProxyError."""


class _NotNow(SummaryFailed):
    """`budget` or `timeout`, but only that of this caller and at this moment."""


class Summary(msgspec.Struct, frozen=True, gc=False):
    text: str
    source: Literal["kept", "shared", "made"]
    """kept: it was there. shared: another request made it meanwhile. made: by this request's `ask`."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the summary is of. `keys`: of the stages, the newest last. `covered`: tokens."""

    dialect: Dialect
    raws: Sequence[Raw]
    atoms: Sequence[Atom]
    cut: Cut
    covered: int
    keys: Sequence[bytes]

    @property
    def key(self) -> bytes:
        return self.keys[-1]


class _Landed(msgspec.Struct, frozen=True, gc=False):
    """How a flight ended: with a text, a failure, or neither: whoever was at it left, or could not pay."""

    text: str = ""
    reason: Reason | None = None


class Summaries:
    """Used within one event loop. `counter` counts what comes back.

    `model`: the configured model that makes the summaries; `seconds`: how long one may take; `again_seconds`: how long
    a failure stands, of the latest `most_failures`; `most_chars`: of a transcript. `clock` is monotonic (seconds).
    `executor` runs what would hold up the loop (None: the loop's own); its owner closes it.
    """

    def __init__(
        self,
        store: SummaryStore,
        *,
        counter: Counter,
        model: str,
        seconds: float = 20.0,
        again_seconds: float = 60.0,
        most_chars: int = TRANSCRIPT_CHARS,
        most_failures: int = REMEMBERED,
        clock: Callable[[], float] = time.monotonic,
        executor: Executor | None = None,
    ) -> None:
        self.model = model
        self._store = store
        self._counter = counter
        self._encoding = encoding_of(model)
        self._seconds = seconds
        self._again_seconds = again_seconds
        self._most_chars = most_chars
        self._most_failures = most_failures
        self._clock = clock
        self._executor = executor
        self._flights: dict[bytes, asyncio.Future[_Landed]] = {}
        """Summaries that are being made. Whoever makes one always sets the result."""
        self._failed: dict[bytes, tuple[float, Reason]] = {}
        """Until when, and why; the earliest first."""

    @property
    def under_way(self) -> int:
        """Summaries that are being made right now."""
        return len(self._flights)

    async def summary(
        self,
        tenant: str,
        dialect: Dialect,
        raws: Sequence[Raw],
        atoms: Sequence[Atom],
        each: Sequence[int],
        cut: Cut,
        ask: Ask,
        *,
        seconds: float = math.inf,
    ) -> Summary:
        """Of everything that `cut` removes, which is something. `each`: tokens of each message; `seconds`: how long
        this caller can wait for it.

        Raises SummaryFailed, and whatever `ask` raises that is no ProxyError.
        """
        now = asyncio.get_running_loop().time
        seconds = min(seconds, self._seconds)
        deadline = now() + seconds

        def seen() -> _Wanted:
            covered = sum([each[position] for position in removed(atoms, cut)])
            return _Wanted(dialect, raws, atoms, cut, covered, keys_of(tenant, self.model, dialect, raws, atoms, cut))

        short = len(raws) <= INLINE_MESSAGES and sum(map(len, raws)) <= INLINE_BYTES
        wanted = seen() if short else await self._in_thread(seen)
        while (flight := self._flights.get(wanted.key)) is not None:
            await asyncio.wait([flight], timeout=deadline - now())
            if not flight.done():
                raise SummaryFailed("timeout")
            landed = flight.result()
            if landed.reason is not None:
                raise SummaryFailed(landed.reason)
            if landed.text:
                return Summary(landed.text, "shared")
            if deadline - now() < seconds * LATE:
                raise SummaryFailed("timeout")  # not to begin a call that would be paid for and then given up
        return await self._fly(wanted, ask, deadline, hurried=seconds < self._seconds)

    # -- by whoever is first -----------------------------------------------------------------------------------------

    async def _fly(self, wanted: _Wanted, ask: Ask, deadline: float, *, hurried: bool) -> Summary:
        flight = self._flights[wanted.key] = asyncio.get_running_loop().create_future()
        landed = _Landed()
        try:
            summary = await self._found_or_made(wanted, ask, deadline, hurried=hurried)
            landed = _Landed(summary.text)
        except _NotNow:
            raise
        except SummaryFailed as failure:
            landed = _Landed(reason=failure.reason)
            raise
        finally:
            del self._flights[wanted.key]
            flight.set_result(landed)
        return summary

    async def _found_or_made(self, wanted: _Wanted, ask: Ask, deadline: float, *, hurried: bool) -> Summary:
        try:
            async with asyncio.timeout_at(deadline) as bound:
                found = await self._find(wanted.keys[-1:])
                if found is not None:
                    return Summary(found[1], "kept")
                self._check(wanted.key)
                text = await self._make(wanted, ask)
        except TimeoutError:
            if not bound.expired():
                raise
            raise (_NotNow("timeout") if hurried else self._remember(wanted.key, "timeout")) from None
        except _NotNow:
            raise
        except SummaryFailed as failure:
            if not failure.remembered:
                self._remember(wanted.key, failure.reason)
            raise
        # Beyond the time bound, for it is paid for; the store has its own.
        return Summary(await self._keep(wanted.key, text), "made")

    async def _make(self, wanted: _Wanted, ask: Ask) -> str:
        body = await self._request(wanted)
        try:
            reply = await ask(body)
        except ProviderFull as error:  # not this caller's limit, but the account's
            raise SummaryFailed("upstream") from error
        except (BudgetExceeded, BudgetUnavailable) as error:
            raise _NotNow("budget") from error
        except (RequestExceedsBudget, ModelPriceUnknown) as error:
            raise SummaryFailed("budget") from error
        except UpstreamTimeout as error:
            raise SummaryFailed("timeout") from error
        except ProxyError as error:
            raise SummaryFailed("upstream") from error
        text = text_in(reply)
        judge(await self._counter.count_text(text, self._encoding), wanted.covered)
        return text

    async def _request(self, wanted: _Wanted) -> bytes:
        """Begins with the nearest summary of an earlier stage: then only what was removed since is new."""
        earlier = wanted.keys[-2 : -2 - EARLIER : -1]
        found = await self._find(earlier) if earlier else None
        since, previous = (0, None) if found is None else (len(wanted.keys) - 1 - found[0], found[1])
        raws = [wanted.raws[position] for position in removed(wanted.atoms, wanted.cut, since)]

        def written() -> bytes:
            return request(self.model, transcript(wanted.dialect, raws, self._most_chars), previous)

        return await self._in_thread(written)

    # -- what was learnt ---------------------------------------------------------------------------------------------

    async def _find(self, keys: Sequence[bytes]) -> tuple[int, str] | None:
        try:
            return await self._store.find(keys)
        except StoreUnavailable:
            return None  # the work goes on without it, if need be by one call more

    async def _keep(self, key: bytes, text: str) -> str:
        self._failed.pop(key, None)
        try:
            return await self._store.keep(key, text)
        except StoreUnavailable:
            return text

    def _check(self, key: bytes) -> None:
        until, reason = self._failed.get(key, (0.0, None))
        if reason is None:
            return
        if self._clock() < until:
            raise SummaryFailed(reason, remembered=True)
        del self._failed[key]

    def _remember(self, key: bytes, reason: Reason) -> SummaryFailed:
        self._failed.pop(key, None)
        self._failed[key] = (self._clock() + self._again_seconds, reason)
        if len(self._failed) > self._most_failures:
            del self._failed[next(iter(self._failed))]
        return SummaryFailed(reason)

    # -- off the loop ------------------------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)
