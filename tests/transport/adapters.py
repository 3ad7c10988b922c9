"""The two adapters under one name, and small words for what every transport test does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from proxy.transport.base import Request, Response
from proxy.transport.http1 import Http1Transport
from proxy.transport.httpx import HttpxTransport

AnyTransport = Http1Transport | HttpxTransport
MakeTransport = Callable[..., AnyTransport]

ADAPTERS: dict[str, type[AnyTransport]] = {"http1": Http1Transport, "httpx": HttpxTransport}


def soon(seconds: float = 20.0) -> float:
    """A deadline. The default is for what must not time out, even on a machine that is busy."""
    return asyncio.get_running_loop().time() + seconds


async def body_of(response: Response) -> bytes:
    """The whole body; the response is closed, and the end stays the end."""
    pieces = []
    while piece := await response.read(soon()):
        pieces.append(piece)
    assert await response.read(soon()) == b""
    await response.aclose()
    return b"".join(pieces)


async def fetch(transport: AnyTransport, request: Request) -> tuple[int, bytes]:
    response = await transport.send(request, soon())
    return response.status, await body_of(response)


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for what another task or the kernel is about to do; fails if it never comes."""
    deadline = soon(seconds)
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it never came to pass"
        await asyncio.sleep(0.002)
