"""The provider port: one method, `open`.

A provider turns an ask into one request of its vendor's API and the answer into a `Reply` in the client's dialect.
It holds the credentials, and knows which of them rest; it does not retry, choose, or wait (that is `fault_tolerance`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from proxy.errors import Cooling
from proxy.types import Ask, Reply


class Resting(NamedTuple):
    """`seconds` until the first credential is ready again, and why it is not."""

    seconds: float
    why: Cooling


class Provider(Protocol):
    name: str

    async def open(
        self, ask: Ask, model: str, *, output_cap: int | None = None, deadline: float | None = None
    ) -> Reply:
        """Sends `ask` for the vendor's `model` and waits for the head and, of a stream, the first event with content.

        `output_cap`: output tokens for one choice that the vendor is told, where the client set no maximum.
        `deadline`: on the loop's clock, where something else than the provider's own limits may come first.
        Raises UpstreamError and its kin; a reply with a 4xx that is the client's own fault is returned, not raised.
        """

    def resting(self, model: str) -> Resting | None:
        """That no credential may be used for `model` now, and for how long; None: one is ready."""

    async def aclose(self) -> None: ...
