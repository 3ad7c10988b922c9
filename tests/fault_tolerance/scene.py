"""Failover over real parts: providers without a network, budgets in memory, time that the test reads afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from proxy.budget.plan import want_of
from proxy.context.base import View
from proxy.errors import ProxyError, UpstreamError
from proxy.fault_tolerance.failover import Failover
from proxy.fault_tolerance.guard import NoCircuits
from proxy.fault_tolerance.permits import Guard, Permit
from proxy.fault_tolerance.retry import RetryPolicy
from proxy.observability.events import Notice
from proxy.observability.upstream_events import UpstreamFailedOver, UpstreamRetried
from proxy.providers.base import Provider
from proxy.types import Ask, Record, Target
from tests.budget.scene import RATES, Scene
from tests.providers.upstream import Upstream, chat


def failover_of(
    providers: Mapping[str, Provider],
    *,
    circuits: Guard | None = None,
    deadline: float = 900.0,
    max_calls: int = 6,
    emit: Callable[[Notice], None] = lambda event: None,
    sleep: Callable[[float], Any] = asyncio.sleep,
    **policy: Any,
) -> Failover:
    now = asyncio.get_running_loop().time
    return Failover(
        providers,
        circuits or NoCircuits(),
        RetryPolicy(**policy),
        deadline=deadline,
        max_calls=max_calls,
        clock=now,
        now=now,
        random=lambda: 0.5,
        emit=emit,
        sleep=sleep,
    )


class Told:
    """A permit that remembers what it was told."""

    def __init__(self, told: list[tuple[str, str]], provider: str) -> None:
        self._told = told
        self._provider = provider

    def answered(self) -> None:
        self._told.append((self._provider, "answered"))

    def succeeded(self) -> None:
        self._told.append((self._provider, "succeeded"))

    def failed(self, error: ProxyError) -> None:
        assert isinstance(error, UpstreamError)
        self._told.append((self._provider, f"failed: {error.reason}"))

    def ignored(self) -> None:
        self._told.append((self._provider, "ignored"))


class Switches:
    """Circuits that are open where the test says so: `due` ones are to be probed, `early` ones only by a request that
    has nowhere else to go."""

    def __init__(self, *open_ones: str, due: Sequence[str] = (), early: Sequence[str] = ()) -> None:
        self.open_ones = set(open_ones)
        self.due = set(due)
        self.early = set(early)
        self.told: list[tuple[str, str]] = []
        self.asked: list[tuple[list[tuple[str, str]], bool]] = []

    def admit(self, provider: str, model: str) -> Permit | None:
        return None if provider in self.open_ones else Told(self.told, provider)

    async def probe(self, places: Sequence[tuple[str, str]], *, all_open: bool = True) -> tuple[int, Permit] | None:
        self.asked.append((list(places), all_open))
        await asyncio.sleep(0)
        for index, (provider, _) in enumerate(places):
            if provider in self.due or (all_open and provider in self.early):
                return index, Told(self.told, provider)
        return None


class Stage:
    """Providers by name, each with the answers that it gives in turn. Waits are noted and take no time."""

    def __init__(self, *, scene: dict[str, Any] | None = None, **more: Any) -> None:
        self.ups: dict[str, Upstream] = {}
        self.events: list[Notice] = []
        self.waits: list[float] = []
        self.record = Record(tenant="acme", model="m")
        self._more = more
        self._scene = scene or {}
        self.circuits = more.setdefault("circuits", Switches())
        self.view: View | None = None
        """What of the request each target gets; None: all."""
        self.providers: dict[str, Any] = {}

    def add(self, name: str, *answers: Any, **more: Any) -> Upstream:
        upstream = self.ups[name] = Upstream(*answers)
        self.providers[name] = upstream.provider(**more)
        return upstream

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        await asyncio.sleep(0)

    async def run(self, *targets: str, ask: Ask | None = None) -> bytes:
        """The whole answer. Raises what the client is told."""
        failover = failover_of(self.providers, emit=self.events.append, **{"sleep": self.sleep, **self._more})
        self.failover = failover
        ask = ask or chat()
        places = [Target(*target.partition("/")[::2], "m") for target in targets or self.ups]  # type: ignore[arg-type]
        self.scene = Scene(rates=dict.fromkeys(self.ups, RATES), **self._scene)
        bounds = failover.bounds(ask.call)
        self.bounds = bounds
        hold = self.scene.budget.hold("acme", "", want_of(ask), places, self.record)
        async with hold as charge, failover.open(ask, places, charge, self.record, bounds, self.view) as reply:
            parts = []
            async for event in reply.events:
                charge.see(event)
                parts.append(event.data)
                self.record.first_event = 1.0
            return b"".join(parts)

    @property
    def asked(self) -> dict[str, int]:
        return {name: len(upstream.asked) for name, upstream in self.ups.items()}

    def told(self) -> list[tuple[str, ...]]:
        """What the events say."""
        found: list[tuple[str, ...]] = []
        for event in self.events:
            if isinstance(event, UpstreamRetried):
                found.append(("retried", event.provider, event.reason))
            elif isinstance(event, UpstreamFailedOver):
                found.append(("failed over", event.from_provider, event.to_provider, event.reason))
        return found
