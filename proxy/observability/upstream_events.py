"""What became of providers, as values (see `events`): attempts that were repeated or moved, and circuits."""

from __future__ import annotations

from typing import ClassVar

import msgspec


class UpstreamRetried(msgspec.Struct, frozen=True, kw_only=True):
    """A request is sent to the same target again."""

    event: ClassVar[str] = "upstream.retried"

    request_id: str
    trace_id: str
    tenant: str
    model: str
    provider: str
    target: str
    reason: str
    """Why the last attempt there failed, in one word of a closed set."""
    wait: float = 0.0
    attempt: int
    """Of the request, from 1."""


class UpstreamFailedOver(msgspec.Struct, frozen=True, kw_only=True):
    """A request goes on at another target."""

    event: ClassVar[str] = "upstream.failed_over"

    request_id: str
    trace_id: str
    tenant: str
    model: str
    from_provider: str
    to_provider: str
    source: str
    target: str
    """PROVIDER/MODEL."""
    reason: str
    """Why the last attempt failed, or why the source was not asked: circuit_open, rate_limited, …"""
    attempt: int


class CircuitOpened(msgspec.Struct, frozen=True, kw_only=True):
    """A target is left alone from now on; or (`was` open) another authority says so now."""

    event: ClassVar[str] = "circuit.opened"

    provider: str
    model: str
    """A configured name or glob, or `other`."""
    mode: str
    was: str
    """closed, half_open or open."""
    scope: str
    """Who decided: `process` (this one, by what it saw), `fleet` (enough processes voted), `hand` (an operator)."""
    why: tuple[str, ...]
    """Who voted and why: `PROCESS: REASON`."""
    open_ms: int
    """Until it may be probed; 0 for one that was opened by hand, which waits for a reset."""


class CircuitHalfOpen(msgspec.Struct, frozen=True, kw_only=True):
    """This process was granted the one probe."""

    event: ClassVar[str] = "circuit.half_open"

    provider: str
    model: str
    mode: str
    was: str


class CircuitClosed(msgspec.Struct, frozen=True, kw_only=True):
    event: ClassVar[str] = "circuit.closed"

    provider: str
    model: str
    mode: str
    was: str
    cause: str
    """success: a probe of this process; healed: one of another process; reset: by hand."""
    open_seconds: float
