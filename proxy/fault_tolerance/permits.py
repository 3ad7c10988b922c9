"""What an attempt needs of its surroundings: leave to be made, and somebody who pays for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from proxy.errors import ProxyError, UpstreamError
from proxy.types import Target


class Permit(Protocol):
    """Leave to send one request to one target; told once what became of it."""

    def answered(self) -> None:
        """The answer has begun: a probe has found out what it was for."""

    def succeeded(self) -> None: ...
    def failed(self, error: UpstreamError) -> None: ...
    def ignored(self) -> None: ...


class Circuits(Protocol):
    def admit(self, provider: str, model: str) -> Permit | None:
        """None: the circuit is open. `model` is the configured name or glob."""

    async def probe(self, places: Sequence[tuple[str, str]], *, all_open: bool = True) -> tuple[int, Permit] | None:
        """Which of `places` (provider and model, all refused by `admit`) may be tried all the same."""


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

    async def probe(self, places: Sequence[tuple[str, str]], *, all_open: bool = True) -> tuple[int, Permit] | None:
        return (0, _FREE) if places else None


class _Free:
    """The permit of those who keep no count."""

    def answered(self) -> None: ...
    def succeeded(self) -> None: ...
    def failed(self, error: UpstreamError) -> None: ...
    def ignored(self) -> None: ...


_FREE: Final = _Free()
