"""The provider port: one method, `open`.

A provider turns an ask into one request of its vendor's API and the answer into a `Reply` in the client's dialect.
It holds the credential; it does not retry, choose, or wait (that is `fault_tolerance`).
"""

from __future__ import annotations

from typing import Protocol

from proxy.types import Ask, Reply


class Provider(Protocol):
    name: str

    async def open(self, ask: Ask, model: str, *, output_cap: int | None = None) -> Reply:
        """Sends `ask` for the vendor's `model` and waits for the head and, of a stream, the first event.

        `output_cap`: output tokens for one choice that the vendor is told, where the client set no maximum.
        Raises UpstreamError and its kin; a reply with a 4xx that is the client's own fault is returned, not raised.
        """

    async def aclose(self) -> None: ...
