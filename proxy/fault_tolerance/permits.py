"""What an attempt needs of its surroundings: leave to be made, and somebody who pays for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from proxy.errors import ProxyError
from proxy.fault_tolerance.base import Place
from proxy.types import Target


class Permit(Protocol):
    """Leave to send one request to one target; told once what became of it."""

    def answered(self) -> None:
        """The answer has begun: a probe has found out what it was for."""

    def succeeded(self) -> None: ...
    def failed(self, error: ProxyError) -> None: ...
    def ignored(self) -> None: ...


class Guard(Protocol):
    """What attempts need of circuits: `guard.Circuits`, or `guard.NoCircuits` where they are switched off."""

    def admit(self, provider: str, model: str) -> Permit | None:
        """`model`: a configured name or glob, never what a client wrote. None: the circuit is open, or on its ramp."""

    async def probe(self, places: Sequence[Place], *, all_open: bool = True) -> tuple[int, Permit] | None:
        """Which of `places`, all refused by `admit`, may be tried all the same, and the permit for it. `all_open`: the
        request has nowhere else to go."""


class Charge(Protocol):
    """What `budget.hold` gives: each attempt is covered before it, and billed by what it is told."""

    output_cap: int | None

    async def cover(self, target: Target) -> None: ...
    def answered(self, status: int) -> None: ...
    def failed(self, error: ProxyError) -> None: ...
