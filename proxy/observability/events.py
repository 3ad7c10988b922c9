"""What happened, as values. Layers emit one frozen event; metrics and logs subscribe, and nothing else is told.

`event` is the name in the log, a class constant. Units: durations are seconds, sizes bytes, counts plain integers;
None is "does not apply" and never a zero. `request_id` and `trace_id` stand in every event that belongs to a request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ClassVar

import msgspec

from proxy.observability.context_events import ContextTrimmed
from proxy.observability.upstream_events import (
    CircuitClosed,
    CircuitHalfOpen,
    CircuitOpened,
    UpstreamFailedOver,
    UpstreamRetried,
)
from proxy.types import Usage

_log = logging.getLogger("breakwater.events")


class RequestFinished(msgspec.Struct, frozen=True, kw_only=True):
    """A request is over, however it ended: exactly one of these or one `RequestRefused` for each request."""

    event: ClassVar[str] = "request.finished"

    request_id: str
    trace_id: str
    route: str
    tenant: str
    model: str
    """The configured name or glob, or `other`: a label, never what the client wrote."""
    provider: str = ""
    upstream_model: str = ""
    upstream_request_id: str = ""
    status: int
    """As sent; 499 when the client left before its answer was complete, whatever had been sent by then. Where an SSE
    error event took the place of a status, that error's status."""
    stream: bool = False
    duration: float
    """From the first byte of the request to the end of the answer."""
    overhead: float | None = None
    """Time that was ours: `duration` less all waiting for the provider and for the client."""
    upstream_duration: float | None = None
    time_to_first_token: float | None = None
    """Streams only: until the first forwarded event."""
    usage: Usage | None = None
    nano_usd: int | None = None
    """What `usage` costs, in nano-dollars; None: nobody knows."""
    counted: int = 0
    """Tokens of the prompt by our own count, where it was counted and sent once; else 0."""
    unpriced: bool = False
    """Something was used at a cost that nobody knows, even where `usage` is None: a reply that was passed through."""
    bytes_in: int = 0
    bytes_out: int = 0
    attempts: int = 0
    error_code: str | None = None
    disconnected: bool = False
    interrupted: bool = False
    """The upstream died after the first forwarded event."""
    client: str = ""
    warnings: tuple[str, ...] = ()


class RequestRefused(msgspec.Struct, frozen=True, kw_only=True):
    """We said no before anything went upstream."""

    event: ClassVar[str] = "request.refused"

    request_id: str
    trace_id: str
    route: str
    tenant: str
    model: str
    status: int
    code: str
    duration: float
    bytes_in: int = 0
    client: str = ""


class ConnectionRefused(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP guard answered before there was a request: broken framing, oversized head, a missed deadline."""

    event: ClassVar[str] = "connection.refused"

    status: int
    code: str


class BudgetRefused(msgspec.Struct, frozen=True, kw_only=True):
    """A window was full. `mode` is `enforce` for an answer of 429 and `observe` for what would have been one."""

    event: ClassVar[str] = "budget.refused"

    request_id: str = ""
    trace_id: str = ""
    tenant: str
    scope: str
    """provider, global, tenant or key."""
    name: str
    window: str
    """The configuration key of the limit."""
    mode: str
    limit: int
    used: int
    reserved: int
    """Requests, tokens or nano-dollars, as the window counts."""
    retry_after_ms: int | None = None
    """None: never, for the request is larger than the window."""
    unsaid: int = 0
    """Further ones of this tenant and window in mode observe, since the last event, that had no event of their own."""


class StoreDegraded(msgspec.Struct, frozen=True, kw_only=True):
    """The store went away: until it is back, each tenant's `on_store_error` decides."""

    event: ClassVar[str] = "store.degraded"

    reason: str
    processes: int
    """By how many the limits are divided meanwhile."""


class StoreRecovered(msgspec.Struct, frozen=True, kw_only=True):
    """The store is back, and everything that waited for it is booked."""

    event: ClassVar[str] = "store.recovered"

    away: float
    replayed: int
    """Settlements that had waited."""
    lost: int = 0
    """Settlements that found no room to wait in, and were dropped."""


class StoreReset(msgspec.Struct, frozen=True, kw_only=True):
    """The store was empty, and begins again with what processes remembered. Roll-ups start anew."""

    event: ClassVar[str] = "store.reset"

    scopes: int
    """Scopes that this process remembered something of."""


class KeysLost(msgspec.Struct, frozen=True, kw_only=True):
    """The registry of keys lost everything. Keys that this process knows stay valid here until it ends."""

    event: ClassVar[str] = "keys.lost"

    known: int
    """Keys that this process still lets in."""


class KeysStale(msgspec.Struct, frozen=True, kw_only=True):
    """The registry of keys cannot be asked: keys are those of before, and revocations are not heard of."""

    event: ClassVar[str] = "keys.stale"

    reason: str


class KeysFollowed(msgspec.Struct, frozen=True, kw_only=True):
    """The registry of keys can be asked again, and its keys are in force."""

    event: ClassVar[str] = "keys.followed"

    stale: float
    """For how long it could not."""


class OwnershipLost(msgspec.Struct, frozen=True, kw_only=True):
    """Whose some stored objects are could not be kept: with tenants, they are nobody's now."""

    event: ClassVar[str] = "store.ownership_lost"

    objects: int


class StoreMisconfigured(msgspec.Struct, frozen=True, kw_only=True):
    """The server of the store will not do for long. Nothing is refused for it."""

    event: ClassVar[str] = "store.misconfigured"

    version: str
    eviction: str
    """Its `maxmemory-policy`."""
    shortcomings: tuple[str, ...]
    """version: older than 6.2. eviction: it throws keys away when its memory is full."""


class SettlementsLost(msgspec.Struct, frozen=True, kw_only=True):
    """The process ended while the store was away, and nobody else knows of these settlements."""

    event: ClassVar[str] = "store.settlements_lost"

    count: int


class LedgerStalled(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the ledger cannot be written. It is tried again; the store keeps the newest records meanwhile."""

    event: ClassVar[str] = "ledger.stalled"

    file: str
    reason: str
    """full: the disk or a quota. missing: the directory. forbidden: no permission, or a read-only file system. locked:
    another process writes it. io: any other fault of the system. internal: a fault of ours."""


class LedgerResumed(msgspec.Struct, frozen=True, kw_only=True):
    """The file is written again, and everything that the store still had is in it."""

    event: ClassVar[str] = "ledger.resumed"

    file: str
    away: float
    gap: bool
    """The store may have dropped records that never reached the file."""


class LedgerRestored(msgspec.Struct, frozen=True, kw_only=True):
    """The store began empty, and was told what the file knows of this hour, day and month."""

    event: ClassVar[str] = "ledger.restored"

    file: str
    records: int
    """Records of this month."""
    complete: bool
    """False: there was not enough time, or a file could not be read; windows may be below what was spent."""


class ServerStarted(msgspec.Struct, frozen=True, kw_only=True):
    event: ClassVar[str] = "server.started"

    version: str
    listen: str
    """As in a URL: `127.0.0.1:8080`."""
    config_hash: str


class ServerDraining(msgspec.Struct, frozen=True, kw_only=True):
    event: ClassVar[str] = "server.draining"

    in_flight: int


class ServerStopped(msgspec.Struct, frozen=True, kw_only=True):
    event: ClassVar[str] = "server.stopped"

    uptime: float
    cut: int = 0
    """Requests that were still running when the grace period ended."""


class InternalFault(msgspec.Struct, frozen=True, kw_only=True):
    """A fault of ours, caught at the last line of defence. `request_id` is empty outside of a request."""

    event: ClassVar[str] = "internal.error"

    request_id: str = ""
    trace_id: str = ""
    where: str
    """A fixed phrase of ours: which part was at work."""
    exc: BaseException


Notice = (
    RequestFinished
    | RequestRefused
    | ConnectionRefused
    | ServerStarted
    | ServerDraining
    | ServerStopped
    | InternalFault
    | BudgetRefused
    | StoreDegraded
    | StoreRecovered
    | StoreReset
    | KeysLost
    | KeysStale
    | KeysFollowed
    | OwnershipLost
    | StoreMisconfigured
    | SettlementsLost
    | LedgerStalled
    | LedgerResumed
    | LedgerRestored
    | CircuitOpened
    | CircuitHalfOpen
    | CircuitClosed
    | UpstreamRetried
    | UpstreamFailedOver
    | ContextTrimmed
)
"""Any event. (The word `Event` belongs to the pieces of a reply.)"""

Subscriber = Callable[[Notice], None]


class Bus:
    """Tells every subscriber, at once and in order of subscription. A subscriber must not block."""

    __slots__ = ("_reported", "_subscribers")

    def __init__(self) -> None:
        self._subscribers: tuple[Subscriber, ...] = ()
        self._reported: set[int] = set()

    def subscribe(self, subscriber: Subscriber) -> None:
        self._subscribers += (subscriber,)

    def emit(self, event: Notice) -> None:
        for index, subscriber in enumerate(self._subscribers):
            try:
                subscriber(event)
            except Exception as exc:  # Watching must never break what is watched: not the request, not the others.
                self._report(index, subscriber, event, exc)

    def _report(self, index: int, subscriber: Subscriber, event: Notice, exc: Exception) -> None:
        """Once per subscriber: a fault in the hot path must not become a flood. The fault's text stays out."""
        if index in self._reported:
            return
        self._reported.add(index)
        tb = exc.__traceback__
        while tb is not None and tb.tb_next is not None:
            tb = tb.tb_next
        line = tb.tb_lineno if tb is not None else 0
        name = getattr(subscriber, "__qualname__", type(subscriber).__qualname__)
        _log.error("subscriber %s failed on %s: %s, line %d", name, event.event, type(exc).__name__, line)
