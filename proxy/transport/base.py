"""The transport port: one method, `send`.

A transport moves one HTTP request to one origin and hands back the head of its answer, then the body piece by piece.
It knows nothing of models, JSON or SSE. Two adapters stand behind it: `http1` (ours, the default) and `httpx`
(HTTP/2, egress proxies). Both pass `tests/transport/test_conformance.py`.

Time is always an absolute deadline on the event loop's clock (`loop.time()`, seconds), given by the caller call by
call: so one request can have a deadline for its first event, another for each gap, and one over everything, without
the transport knowing which it is.

Ownership: whoever got a `Response` calls `aclose()` exactly once or more; `send` that raises (also by cancellation) has
already given everything back. A connection is used again only after a complete response with nothing left over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

from proxy.types import Headers


@dataclass(frozen=True, slots=True)
class Origin:
    """Where to connect: one pool per origin. `host` is a name or an address without brackets."""

    scheme: str
    host: str
    port: int

    @property
    def authority(self) -> bytes:
        """The value of the Host header: port left out when it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.scheme == "https" else 80
        return host.encode("idna" if not host.isascii() else "ascii") + (
            b"" if self.port == default else b":%d" % self.port
        )


class Request(msgspec.Struct):
    """One request, body complete. The transport adds Host, Content-Length and nothing else.

    `headers` must not hold framing or hop-by-hop headers. `replayable` allows one silent resend on a fresh connection
    when a *re-used* one turns out to be dead: within one second of the first byte sent and before any response byte;
    otherwise that is allowed only if no request byte was written.
    """

    origin: Origin
    method: bytes
    target: bytes
    """Origin-form: absolute path and optional query, percent-encoded."""
    headers: Headers
    body: bytes = b""
    replayable: bool = False


class Response(Protocol):
    """The head of an answer, and its body to come."""

    status: int
    headers: Headers
    """Names lower-case, in order, duplicates kept; framing headers included as received."""

    async def read(self, deadline: float) -> bytes:
        """The next piece of the body, never empty; b"" once the body is complete, and again after that.

        Raises UpstreamTimeout when nothing came by `deadline`, UpstreamBroken when the body cannot be completed
        (early close, reset, bad framing). After either the connection is gone. A close-delimited body ends with b"".
        """

    async def aclose(self) -> None:
        """Gives the connection back if the response was complete, closes its socket otherwise. Idempotent.

        Never raises, and finishes its essential work before its first suspension, so that a cancelled caller leaks
        nothing.
        """


class Transport(Protocol):
    async def send(self, request: Request, deadline: float) -> Response:
        """Connects or re-uses, writes the request, and waits for the final response head (1xx are skipped).

        Raises ConnectFailed (nothing was sent), UpstreamTimeout (no head by `deadline`), UpstreamBroken.
        """

    async def aclose(self) -> None:
        """Closes every connection, idle or in use."""
