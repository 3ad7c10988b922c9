"""What other rooms know of the context layer: what of a request is sent to a target."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from proxy.types import Ask, Target, TooLong

Complete = Callable[[bytes], Awaitable[bytes]]
"""Sends the body of a chat request on behalf of a client's, and gives the body of its answer of 200. Raises
ProxyError."""


class Sent(NamedTuple):
    """What one target gets."""

    ask: Ask
    tokens: int
    """Of its prompt, as counted."""
    most: int
    """What its prompt can be at most, by its size in bytes; never below `tokens`."""


class View(Protocol):
    """One request, as each of its targets sees it."""

    needed: bool
    """False: every target gets the request as it came, and nothing has to be waited for."""
    most: int | None
    """What the prompt can be at most, by its size in bytes; None: nobody has looked yet."""
    complete: Complete | None
    """Set by whoever holds the charge: how a model is asked for a summary."""

    async def size(self, target: Target) -> Sent:
        """What `target` gets, but for a summary, whose room is counted. Raises ContextExceeded."""

    async def fit(self, target: Target) -> Ask:
        """What `target` gets. Raises ContextExceeded: what must stay does not fit."""

    async def refit(self, target: Target, refusal: TooLong) -> Ask | None:
        """Less than before, because the provider finds it too long; once for each target. None: nothing can go."""


class Whole:
    """The view of a request that is sent as it came, whatever its length. A null object."""

    needed = False
    most: int | None = None

    def __init__(self, ask: Ask) -> None:
        self.complete: Complete | None = None
        self._ask = ask

    async def size(self, target: Target) -> Sent:
        return Sent(self._ask, 0, 0)

    async def fit(self, target: Target) -> Ask:
        return self._ask

    async def refit(self, target: Target, refusal: TooLong) -> Ask | None:
        return None
