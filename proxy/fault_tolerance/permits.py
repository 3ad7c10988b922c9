"""What an attempt needs of its surroundings: leave to be made, and somebody who pays for it."""

from __future__ import annotations

from typing import Final, Protocol

from proxy.errors import ProxyError, UpstreamError
from proxy.types import Target


class Permit(Protocol):
    """Leave to send one request to one target; told once what became of it."""

    def succeeded(self) -> None: ...
    def failed(self, error: UpstreamError) -> None: ...
    def ignored(self) -> None: ...


class Circuits(Protocol):
    def admit(self, provider: str, model: str) -> Permit | None:
        """None: the circuit is open. `model` is the configured name or glob."""


class Charge(Protocol):
    """What `budget.hold` gives: each attempt is covered before it, and billed by what it is told."""

    output_cap: int | None

    async def cover(self, target: Target) -> None: ...
    def answered(self, status: int) -> None: ...
    def failed(self, error: ProxyError) -> None: ...


class Unwatched:
    """Circuits that never open, for a breaker that is switched off."""

    def admit(self, provider: str, model: str) -> Permit:
        return _FREE


class _Free:
    """The permit of those who keep no count."""

    def succeeded(self) -> None: ...
    def failed(self, error: UpstreamError) -> None: ...
    def ignored(self) -> None: ...


_FREE: Final = _Free()
