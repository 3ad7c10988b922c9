"""The port of the breaker's store: how the processes of a fleet agree on the state of a circuit.

The store keeps a record for each circuit that was ever in trouble, and who lives. Nothing asks it while a request is
served: a background task reports what this process sees, and reads what the others made of it.

    report ── I live; these circuits I have opened; these probes of mine go on ──▶ what changed
    lease ── may I send the one probe? ──▶ Granted | the record, which says why not
    conclude ── the probe succeeded, failed or was given back ──▶ the record
    command ── an operator opens or resets by hand ──▶ the record

A record's *generation* changes whenever it opens or closes; what was begun under an older one no longer moves it. A
probe has a *number* of its own, under which alone it is renewed and concluded. Both only rise, also over a store that
lost everything. Times are milliseconds of the store's own clock, and leave it as spans from now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, Protocol

import msgspec

Place = tuple[str, str]
"""Of a circuit: the provider's name, and a configured model name or glob."""

Outcome = Literal["success", "failure", "lost"]
"""Of a probe. lost: it was given back, and says nothing about the provider."""

Action = Literal["open", "reset"]

LEASE_MS: Final = 5000
"""How long a probe is another's after its owner was last heard of."""
ALIVE_MS: Final = 3000
"""How long a process counts as living after it was last heard of."""
EARLY_MS: Final = 1000
"""At least this much between a probe before its time and the one before it, in the whole fleet."""
QUORUM: Final = 2
"""Processes that must have opened a circuit until the fleet's opens; one, where only one lives."""
SETTLED_MS: Final = 1000
"""How long a process must have lived before it is believed to live alone: after an outage of the store every one of
them is the first to come back."""
KEPT_MS: Final = 3_600_000
"""How long a record is kept that is closed and says nothing more."""


class Vote(msgspec.Struct, frozen=True, gc=False):
    """A circuit that this process has opened by itself, or (`restores`) that the fleet had opened before the store
    lost its record."""

    place: Place
    generation: int
    """Of the record that was last seen, 0 for none. A vote about another one is not counted."""
    open_ms: int
    """How long the circuit should stay open if this vote decides it, before it grows with repetition."""
    why: str
    restores: Literal["", "fleet", "hand"] = ""


class Probe(msgspec.Struct, frozen=True, gc=False):
    """A probe that goes on."""

    place: Place
    number: int


class View(msgspec.Struct, frozen=True, gc=False):
    """A record, as of one answer. Spans are milliseconds from now."""

    place: Place
    is_open: bool
    generation: int
    due_ms: int
    """Until it may be probed; 0 or less: from now on."""
    reopened: int
    """How often in a row a probe failed, or the circuit opened again soon after it had closed."""
    by_hand: bool
    """Opened by an operator: nothing but a reset closes it."""
    why: tuple[tuple[str, str], ...]
    """Who opened it and why: process and reason, in turn of their names."""
    votes: tuple[tuple[str, str], ...]
    """Who has opened its own circuit now, and why, while the fleet's is closed."""
    prober: str
    """The process that has the probe; empty: nobody."""
    probe_ms: int
    """Until its lease ends, unless it is renewed."""


class Report(msgspec.Struct, frozen=True, gc=False):
    """`views`: every record that is open, has votes or a probe, or changed since the last report of this process."""

    views: tuple[View, ...]
    live: int
    """Processes that live, this one included."""
    now_ms: int
    """By the store's clock: what the next report gives as `since_ms`."""
    lost: tuple[Probe, ...]
    """Probes of this process that it no longer has."""


class Granted(msgspec.Struct, frozen=True, gc=False):
    """The probe is this process's until its lease ends."""

    number: int


class BreakerStore(Protocol):
    """Every verb raises `proxy.store.base.StoreUnavailable`, and may be repeated."""

    async def report(
        self, process: str, votes: Sequence[Vote], probes: Sequence[Probe], since_ms: int, *, alive_ms: int = ALIVE_MS
    ) -> Report:
        """`votes` take the place of all that this process said before. `alive_ms` 0: it leaves."""

    async def lease(
        self, place: Place, process: str, generation: int, *, early: bool, lease_ms: int = LEASE_MS
    ) -> Granted | View:
        """Asks for the probe, knowing `generation`. `early`: before its time, since all targets are open."""

    async def conclude(
        self, place: Place, process: str, number: int, outcome: Outcome, *, open_ms: int, generation: int
    ) -> View:
        """How the probe ended. After a failure the circuit stays open for `open_ms`, grown.

        Number 0 is a probe that was sent while the store was away: its success closes the record of `generation`.
        """

    async def command(self, place: Place, action: Action, who: str) -> View:
        """By hand: opens the circuit until a reset, or closes it and forgets what led there."""
