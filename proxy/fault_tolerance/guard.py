"""Circuits at work: who may be sent a request now, and what came of it.

A request asks with `admit`, which answers at once, and gets a permit that ends exactly once: the request succeeded,
failed, or says nothing about the provider (a client that left, a deadline of its own, an answer of 4xx). As a context
manager it ends by itself, whatever happens, and a probe that was cancelled is given back.

    permit = circuits.admit(provider, model)        None: open; take another target
    with permit:
        ...                                         an error in here ends it as that error says
        permit.answered()                           of a stream, once its first event is there

Where every target refuses, `probe` asks for the one thing that is left: to be the probe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Literal

from proxy.errors import ProxyError, UpstreamError
from proxy.fault_tolerance.base import Action, BreakerStore, Place
from proxy.fault_tolerance.breaker import Change, Circuit, Lease, Rules, State
from proxy.fault_tolerance.keeper import Conclusion, Keeper
from proxy.observability.events import InternalFault, Notice
from proxy.observability.upstream_events import CircuitClosed, CircuitHalfOpen, CircuitOpened
from proxy.types import OTHER

MAX_CIRCUITS: Final = 10_000
"""A belt: names are those of the configuration. What comes beyond shares one circuit for each provider."""
STATES: Final[Mapping[State, int]] = {"closed": 0, "half_open": 1, "open": 2}
"""As the metric counts them."""


class Permit:
    """For one attempt. The first ending counts, and every further one is ignored."""

    __slots__ = ("_circuit", "_generation", "_guard", "_lease")

    def __init__(self, guard: Circuits, circuit: Circuit, lease: Lease | None = None) -> None:
        self._guard = guard
        self._circuit: Circuit | None = circuit
        self._generation = circuit.generation
        self._lease = lease

    @property
    def is_probe(self) -> bool:
        return self._lease is not None

    def answered(self) -> None:
        """The provider began to answer: as a probe that is enough, and what comes later counts as with any other."""
        circuit, lease = self._circuit, self._lease
        if circuit is not None and lease is not None:
            self._guard.ended(circuit, lease, success=True)
            self._lease = None
            self._generation = circuit.generation

    def succeeded(self) -> None:
        circuit, self._circuit = self._circuit, None
        if circuit is None:
            return
        if self._lease is None:
            circuit.succeeded(self._generation)
        else:
            self._guard.ended(circuit, self._lease, success=True)

    def failed(self, error: ProxyError) -> None:
        """Counts as the error says of itself: `trips_breaker`, and `local_origin` for what may be our own trouble."""
        if not (isinstance(error, UpstreamError) and error.trips_breaker):
            self.ignored()
            return
        circuit, self._circuit = self._circuit, None
        if circuit is None:
            return
        why, local = error.reason, error.local_origin
        if self._lease is None:
            self._guard.moved(circuit.failed(self._generation, why, local=local))
        else:
            self._guard.ended(circuit, self._lease, success=False, why=why, local=local)

    def ignored(self) -> None:
        """It says nothing about the provider."""
        circuit, self._circuit = self._circuit, None
        if circuit is not None and self._lease is not None:
            self._guard.given_back(circuit, self._lease)

    def __enter__(self) -> Permit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._circuit is None:
            return
        if error is None:
            self.succeeded()
        elif isinstance(error, ProxyError):
            self.failed(error)
        else:  # cancelled, or a fault of ours
            self.ignored()


class Circuits:
    """The circuits of one process. Made within the event loop; `start` and `aclose` bracket its work.

    `refuses` False: circuits open, are told of, and let everything through. `process` names this one in the fleet.
    """

    def __init__(
        self,
        store: BreakerStore,
        rules: Rules,
        *,
        process: str,
        emit: Callable[[Notice], None],
        refuses: bool = True,
    ) -> None:
        self._rules = rules
        self._process = process
        self._emit = emit
        self._refuses = refuses
        self._circuits: dict[Place, Circuit] = {}
        self._keeper = Keeper(
            store,
            process,
            clock=rules.clock,
            circuits=self._circuits.values,
            of=self._of,
            tell=self.moved,
            fault=lambda error: emit(InternalFault(where="keeping circuits in step", exc=error)),
        )

    def start(self) -> None:
        self._keeper.start()

    async def aclose(self) -> None:
        await self._keeper.aclose()

    async def sync(self) -> None:
        """Exchanges news with the fleet now; `start` does so all the time."""
        await self._keeper.round()

    # -- requests ----------------------------------------------------------------------------------------------------

    def admit(self, provider: str, model: str) -> Permit | None:
        """See `permits.Guard.admit`."""
        circuit = self._circuits.get((provider, model))
        if circuit is None:
            circuit = self._of((provider, model))
        if circuit.way_is_free or circuit.admits():
            return Permit(self, circuit)
        lease = circuit.take()
        if lease is not None:
            return Permit(self, circuit, lease)
        if circuit.wants_probe():
            self._keeper.ask(circuit)  # for the next request; `probe` is for one that would rather wait
        return None if self._refuses else Permit(self, circuit)

    async def probe(self, places: Sequence[Place], *, all_open: bool = True) -> tuple[int, Permit] | None:
        """See `permits.Guard.probe`. Waits for one answer of the store, and only where there is something to ask.

        A circuit whose time is over is asked for first. With `all_open`, one that is on its ramp serves all the same,
        and the one due first may be probed before its time: one in flight in the whole fleet, one a second, and 5 % of
        the requests that found it open.
        """
        circuits = [(self._of(place), index) for index, place in enumerate(places)]
        if all_open:
            for circuit, index in circuits:
                if circuit.state == "closed":
                    return index, Permit(self, circuit)
        circuits.sort(key=lambda one: one[0].due)
        for circuit, index in circuits:
            if circuit.state == "half_open" or circuit.wants_probe():
                permit = await self._turn(circuit, early=False)
                if permit is not None:
                    return index, permit
        if all_open:
            for circuit, index in circuits:
                if circuit.by_hand:
                    continue
                permit = await self._turn(circuit, early=True) if circuit.wants_early_probe() else None
                return None if permit is None else (index, permit)
        return None

    async def _turn(self, circuit: Circuit, *, early: bool) -> Permit | None:
        if circuit.state == "open":
            asking = self._keeper.ask(circuit, early=early)
            if asking is not None:
                await asyncio.shield(asking)  # a client that leaves here leaves the probe to the next
        lease = circuit.take()
        return None if lease is None else Permit(self, circuit, lease)

    # -- what came of it ---------------------------------------------------------------------------------------------

    def ended(self, circuit: Circuit, lease: Lease, *, success: bool, why: str = "", local: bool = False) -> None:
        self.moved(circuit.ended(lease, success=success, why=why, local=local))
        if lease.number:
            # What is local to us says nothing to the fleet but that the probe is free again.
            outcome: Literal["success", "failure", "lost"] = "success" if success else "lost" if local else "failure"
            self._keeper.conclude(Conclusion(circuit, lease.number, outcome, self._rules.open_ms(), lease.generation))

    def given_back(self, circuit: Circuit, lease: Lease) -> None:
        self.moved(circuit.given_back(lease))
        if lease.number:
            self._keeper.conclude(Conclusion(circuit, lease.number, "lost", 0, lease.generation))

    def moved(self, change: Change | None) -> None:
        """Tells of a change, and has the fleet know."""
        if change is None:
            return
        if (
            change.was == change.to
            and change.happening == "vote"
            and all(who == self._process for who, _ in change.why)
        ):
            return  # it lives alone: the fleet says what this process has told already
        provider, model = change.place
        mode = "enforce" if self._refuses else "observe"
        why = tuple(f"{who or self._process}: {reason}" for who, reason in change.why)
        if change.to == "open":
            scope = self._circuits[change.place].scope
            self._emit(
                CircuitOpened(
                    provider=provider, model=model, mode=mode, was=change.was, scope=scope, why=why,
                    open_ms=int(change.seconds * 1000),
                )
            )  # fmt: skip
        elif change.to == "half_open":
            self._emit(CircuitHalfOpen(provider=provider, model=model, mode=mode, was=change.was))
        else:
            self._emit(
                CircuitClosed(
                    provider=provider, model=model, mode=mode, was=change.was, cause=change.happening,
                    open_seconds=change.seconds,
                )
            )  # fmt: skip
        self._keeper.hurry()

    # -- operators ---------------------------------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """Processes of the fleet that live, as last seen; this one included."""
        return self._keeper.live

    def states(self) -> dict[tuple[str, ...], float]:
        """By provider and model: 0 closed, 1 half-open, 2 open."""
        return {place: STATES[_seen(circuit)] for place, circuit in self._circuits.items()}

    def shown(self) -> list[dict[str, Any]]:
        """As JSON: every circuit of this process, and what the fleet's record says of it."""
        return [self._row(circuit) for _, circuit in sorted(self._circuits.items())]

    async def command(self, provider: str, model: str, action: Action) -> dict[str, Any]:
        """Opens a circuit until a reset, or closes it. Returns its row; `fleet` False: for this process alone."""
        circuit = self._of((provider, model))
        fleet = await self._keeper.command(circuit, action)
        return {**self._row(circuit), "fleet": fleet}

    def _row(self, circuit: Circuit) -> dict[str, Any]:
        now = self._rules.clock()
        attempts, failed = circuit.evidence.rate(now)
        view, is_open = circuit.view, circuit.state != "closed"
        return {
            "provider": circuit.place[0],
            "model": circuit.place[1],
            "state": _seen(circuit),
            "scope": circuit.scope if is_open else None,
            "open_for_ms": max(int((circuit.due - now) * 1000), 0) if is_open and not circuit.by_hand else None,
            "reopened": circuit.reopened,
            "failures_in_a_row": circuit.evidence.row,
            "last_10_seconds": {"attempts": attempts, "failed": failed},
            "opened_by": _said(view.why) if view is not None and view.is_open else [],
            "votes": _said(view.votes) if view is not None else [],
            "probe": view.prober or None if view is not None else None,
            "generation": circuit.fleet,
        }

    def _of(self, place: Place) -> Circuit:
        circuit = self._circuits.get(place)
        if circuit is None:
            if len(self._circuits) >= MAX_CIRCUITS and place[1] != OTHER:
                return self._of((place[0], OTHER))
            circuit = self._circuits[place] = Circuit(place, self._rules)
        return circuit


def _seen(circuit: Circuit) -> State:
    """Half open for everybody while one process has the probe."""
    if circuit.state == "open" and circuit.view is not None and circuit.view.is_open and circuit.view.prober:
        return "half_open"
    return circuit.state


def _said(words: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"process": who, "why": why} for who, why in words]


class _Free(Permit):
    """Where circuits are switched off, one permit serves all: it has nothing to end."""

    __slots__ = ()

    def __init__(self) -> None:
        self._circuit = None
        self._lease = None


class NoCircuits:
    """Every target may always be tried."""

    def __init__(self) -> None:
        self._permit = _Free()

    def start(self) -> None:
        pass

    async def aclose(self) -> None:
        pass

    def states(self) -> dict[tuple[str, ...], float]:
        return {}

    def admit(self, provider: str, model: str) -> Permit | None:
        return self._permit

    async def probe(self, places: Sequence[Place], *, all_open: bool = True) -> tuple[int, Permit] | None:
        return (0, self._permit) if places else None
