"""The circuit breaker of one target, as one process sees it. Pure: it decides, and `guard` waits, sends and tells.

One table says where every event leads, for a process's circuit here and for the fleet's record in the stores:

    closed ── limit, vote, open ──▶ open ── granted ──▶ half_open ── success ──▶ closed, with a ramp
                                     ▲                      │
                                     └── failure, lost, time ┘

*A process's own circuit* opens by what it saw itself (`limit`). *The fleet's* opens when enough processes have opened
theirs (`vote`), or by hand; each process then follows. While a circuit is open nothing is sent, until its time is over:
then one request in the whole fleet is let through, under a lease with a number. Its success closes the circuit, which
then admits a growing part over a few seconds; its failure opens it again, for longer.

*Generations*. Every request is admitted under the circuit's present generation, and each change of state begins a new
one. What a request of an older generation comes to is dropped: it was sent to a provider in another state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from proxy.fault_tolerance.base import Place, View, Vote
from proxy.fault_tolerance.evidence import Evidence

State = Literal["closed", "half_open", "open"]
Happening = Literal["success", "failure", "limit", "vote", "granted", "lost", "time", "healed", "open", "reset"]
Scope = Literal["process", "fleet", "hand"]

TABLE: Final[dict[Happening, tuple[State, State, State]]] = {
    # in:        closed       half_open    open
    "success": ("closed", "closed", "open"),  # of a request; in half_open, of the probe
    "failure": ("closed", "open", "open"),  # one that the limit allows; in half_open, of the probe
    "limit": ("open", "open", "open"),  # the failure that is one too many
    "vote": ("open", "open", "open"),  # enough processes say so
    "granted": ("closed", "half_open", "half_open"),  # the lease of the probe
    "lost": ("closed", "open", "open"),  # the probe was given back, or is another's
    "time": ("closed", "open", "open"),  # the lease of the probe is over
    "healed": ("closed", "closed", "closed"),  # another process's probe succeeded
    "open": ("open", "open", "open"),  # by hand
    "reset": ("closed", "closed", "closed"),  # by hand
}
_COLUMN: Final[dict[State, int]] = {"closed": 0, "half_open": 1, "open": 2}

GROWTH: Final = 1.25
MOST: Final = 1.6
"""Of the recovery time, before jitter: with U(0.8, 1.2) no circuit is left alone for two of them."""
RAMP_SECONDS: Final = 10.0
RAMP_FROM: Final = 0.1
FLAPS_SECONDS: Final = 60.0
"""A circuit that opens again within this time of closing has not recovered: its open time goes on growing."""
EARLY_PART: Final = 0.05
"""Of the requests that find all targets open, those that may be sent as a probe before its time."""
EARLY_SAVED: Final = 5.0
LONGEST_PROBE: Final = 30.0
"""Seconds, or the recovery time where that is longer, after which a probe that goes on keeps no other from being sent:
it may hang at a provider that has recovered meanwhile. If it succeeds after all, that still counts."""


def after(state: State, happening: Happening) -> State:
    """The table."""
    return TABLE[happening][_COLUMN[state]]


def grown(open_ms: float, reopened: int) -> int:
    """Milliseconds that a circuit stays open when it opened `reopened` times before."""
    return int(open_ms * min(GROWTH ** min(reopened, 16), MOST))


@dataclass(frozen=True, slots=True)
class Rules:
    """What circuits have in common. `clock` is monotonic, in seconds; `random` draws from [0, 1)."""

    clock: Callable[[], float]
    random: Callable[[], float]
    threshold: int = 5
    recovery: float = 60.0
    """Seconds."""
    ramp: float = RAMP_SECONDS

    def open_ms(self) -> int:
        """How long a circuit that opens now stays open, jittered: processes and circuits do not probe in step."""
        return int(self.recovery * 1000 * (0.8 + 0.4 * self.random()))


class Change(msgspec.Struct, frozen=True, gc=False):
    """A circuit moved, or an open one is now open for another reason."""

    place: Place
    was: State
    to: State
    happening: Happening
    scope: Scope
    why: tuple[tuple[str, str], ...]
    """Who says so, and why: process and reason. The process itself is the empty text."""
    seconds: float
    """Opened: until it may be probed. Closed: since it opened."""


class Lease:
    """The right to send one probe."""

    __slots__ = ("early", "generation", "late", "number", "opened_at", "since", "taken", "until")

    def __init__(self, number: int, since: float, until: float, generation: int, *, early: bool) -> None:
        self.number = number
        """Names it in the store; 0: the store is away, and it is this process's alone."""
        self.since = since
        self.until = until
        self.generation = generation
        """Of the fleet's record, as last seen."""
        self.early = early
        self.taken = False
        """The probe is under way."""
        self.late = False
        """It was not waited for any longer."""
        self.opened_at = 0.0
        """Of the circuit: it was opened then."""


class Circuit:
    """One target's. Every method that may move it returns the Change, or None."""

    __slots__ = (
        "_rules",
        "_why",
        "attempts_early",
        "by_hand",
        "closed_at",
        "due",
        "evidence",
        "fleet",
        "generation",
        "healed",
        "lease",
        "not_before",
        "open_ms",
        "opened_at",
        "place",
        "ramp_since",
        "reopened",
        "scope",
        "shared",
        "state",
        "view",
        "way_is_free",
    )

    def __init__(self, place: Place, rules: Rules) -> None:
        self._rules = rules
        self.place = place
        self.state: State = "closed"
        self.way_is_free = True
        """Closed, and not on a ramp: nothing to ask."""
        self.generation = 0
        self.evidence = Evidence(rules.threshold)
        self.scope: Scope = "process"
        """Of an open circuit: who opened it."""
        self.shared = False
        """The process's own evidence counts for the fleet."""
        self.by_hand = False
        self.due = 0.0
        self.not_before = float("-inf")
        """Our own trouble: whatever the fleet says, this process does not probe before."""
        self.open_ms = 0
        self.reopened = 0
        self.opened_at = 0.0
        self.closed_at = float("-inf")
        self.ramp_since = float("-inf")
        self.lease: Lease | None = None
        self.fleet: int | None = None
        """Generation of the fleet's record, as last seen; None before it was first seen."""
        self.view: View | None = None
        self.healed: int | None = None
        """A generation of the fleet's record that a probe of ours proved wrong without a lease: the store was away, or
        the lease was over."""
        self.attempts_early = 0.0
        self._why = ""

    # -- requests ----------------------------------------------------------------------------------------------------

    def admits(self) -> bool:
        """Whether an ordinary request may be sent now. Not for the hot path: see `way_is_free`."""
        if self.state != "closed":
            self.attempts_early = min(self.attempts_early + EARLY_PART, EARLY_SAVED)
            return False
        passed = self._rules.clock() - self.ramp_since
        if passed >= self._rules.ramp:
            self.way_is_free = True
            return True
        return self._rules.random() < max(passed / self._rules.ramp, RAMP_FROM)

    def take(self) -> Lease | None:
        """The probe, if it is ours to send and not under way yet."""
        lease = self.lease
        if lease is None or lease.taken or self._rules.clock() >= lease.until:
            return None
        lease.taken = True
        return lease

    def succeeded(self, generation: int) -> None:
        """An ordinary request did."""
        if generation == self.generation and self.state == "closed":
            self.evidence.success(self._rules.clock())

    def failed(self, generation: int, why: str, *, local: bool) -> Change | None:
        """An ordinary request did."""
        if generation != self.generation or self.state != "closed":
            return None
        now = self._rules.clock()
        if not self.evidence.failure(now, local=local):
            return None
        self.shared = self.evidence.counts_for_the_fleet
        self.healed = None
        self.open_ms = self._rules.open_ms()
        self.reopened = self.reopened + 1 if now - self.closed_at < FLAPS_SECONDS else 0
        self.scope, self._why = "process", why
        return self._move("limit", due=now + grown(self.open_ms, self.reopened) / 1000, why=(("", why),))

    # -- probes ------------------------------------------------------------------------------------------------------

    def wants_probe(self) -> bool:
        """It is open, its time is over, and nobody is known to probe it."""
        return self.state == "open" and not self.by_hand and self._rules.clock() >= self.due

    def wants_early_probe(self) -> bool:
        """The same before its time: where all targets are open, and few enough were tried so."""
        ripe = self.state == "open" and not self.by_hand and self.attempts_early >= 1.0
        return ripe and self._rules.clock() >= self.not_before

    def granted(self, number: int, until: float, *, early: bool) -> Change | None:
        if self.state != "open" or self.by_hand:
            return None
        if early:
            self.attempts_early -= 1.0
        self.lease = Lease(number, self._rules.clock(), until, self.fleet or 0, early=early)
        self.lease.opened_at = self.opened_at
        return self._move("granted")

    def ended(self, lease: Lease, *, success: bool, why: str = "", local: bool = False) -> Change | None:
        """The probe came back. Dropped if it is not, or no longer, this circuit's."""
        if lease is not self.lease:
            return self._ended_late(lease) if success and lease.late else None
        now = self._rules.clock()
        if success:
            if lease.number == 0 and self.scope == "fleet":
                self.healed = lease.generation
            return self._move("success")
        self._why = why
        self.shared = self.shared and not local
        due = self.due
        if not (lease.early and now < due):  # a probe before its time does not put the next one off
            self.reopened += 1
            self.open_ms = self._rules.open_ms()
            due = now + grown(self.open_ms, self.reopened) / 1000
            if local:
                self.not_before = due
        return self._move("failure", due=due, why=(("", why),))

    def _ended_late(self, lease: Lease) -> Change | None:
        """The provider is slow, and not dead: of the same outage, that is as good as a success in time."""
        if self.state == "closed" or self.by_hand or lease.opened_at != self.opened_at:
            return None
        if self.scope == "fleet":
            if lease.generation != self.fleet:
                return None
            self.healed = lease.generation
        return self._move("healed")

    def expired(self) -> Lease | None:
        """The probe, if nobody has sent it in time, or it goes on for too long."""
        lease, now = self.lease, self._rules.clock()
        if lease is None:
            return None
        if not lease.taken:
            return lease if now >= lease.until else None
        if now < lease.since + max(self._rules.recovery, LONGEST_PROBE):
            return None
        lease.late, lease.until = True, now
        return lease

    def given_back(self, lease: Lease, *, over: bool = False) -> Change | None:
        """The probe says nothing, or its lease is `over`: the next may be sent at once."""
        return self._move("time" if over else "lost", due=self.due) if lease is self.lease else None

    # -- the fleet, and operators ------------------------------------------------------------------------------------

    def adopt(self, view: View) -> Change | None:
        """What the fleet's record says now."""
        self.view = view
        if self.fleet is not None and view.generation <= self.fleet:
            if view.generation == self.fleet and view.is_open and self.state == "open" and self.scope != "process":
                self.due = max(self._rules.clock() + view.due_ms / 1000, self.not_before)  # another's probe failed
                self.reopened = view.reopened
            return None  # an older one: the store lost its record, and somebody knew less than we do
        first = self.fleet is None
        self.fleet = view.generation
        if view.is_open:
            self.scope = "hand" if view.by_hand else "fleet"
            self.by_hand, self.reopened = view.by_hand, view.reopened
            due = max(self._rules.clock() + view.due_ms / 1000, self.not_before)
            return self._move("open" if view.by_hand else "vote", due=due, why=view.why)
        if first:
            return None  # it was closed before we looked: that is no news about what we have seen since
        return self._move("reset" if view.why else "healed", why=view.why)  # only a reset is somebody's word

    def force(self, *, opened: bool) -> Change | None:
        """By hand, where the fleet cannot be told."""
        self.by_hand = opened
        self.scope = "hand"
        return self._move("open" if opened else "reset", due=self._rules.clock(), why=(("", "by hand"),))

    def vote(self) -> Vote | None:
        """What this process has to say to the fleet about it."""
        if self.state == "closed" or self.scope != "process" or not self.shared:
            return None
        return Vote(self.place, self.fleet or 0, self.open_ms, self._why)

    def restatement(self) -> Vote | None:
        """The fleet's decision, for a store that lost it."""
        if self.state == "closed" or self.scope == "process" or self.fleet is None:
            return None
        left = max(int((self.due - self._rules.clock()) * 1000), 0)
        return Vote(self.place, self.fleet, left, self._why, "hand" if self.by_hand else "fleet")

    # -- moving ------------------------------------------------------------------------------------------------------

    def _move(self, happening: Happening, *, due: float = 0.0, why: tuple[tuple[str, str], ...] = ()) -> Change | None:
        was, to = self.state, after(self.state, happening)
        now = self._rules.clock()
        seconds = 0.0
        scope = self.scope
        if to == "open":
            self.due = due
            self.lease = None
            if was == "closed":
                self.opened_at = now
                self.attempts_early = 0.0
            self._why = ", ".join(dict.fromkeys(reason for _, reason in why)) or self._why
            seconds = max(due - now, 0.0)
        elif to == "closed":
            if was != "closed":
                self._close(now, ramp=happening != "reset")
                seconds = now - self.opened_at
            elif happening == "reset":
                self._close(now, ramp=False)
                self.way_is_free = True
        if was == to and happening not in ("vote", "open"):
            return None
        self.state = to
        if was != to:
            self.generation += 1
            self.way_is_free = to == "closed" and self.ramp_since == float("-inf")
        return Change(self.place, was, to, happening, scope, why, seconds)

    def _close(self, now: float, *, ramp: bool) -> None:
        self.lease = None
        self.not_before = float("-inf")
        self.scope, self.shared, self.by_hand = "process", False, False
        self.evidence.clear()
        if ramp:
            self.closed_at = self.ramp_since = now
        else:
            self.closed_at = self.ramp_since = float("-inf")
            self.reopened = 0
