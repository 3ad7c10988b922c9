"""Several addresses of one name: any of them may be dead."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from proxy.transport.base import Origin
from proxy.transport.connect import first_to_answer
from tests.transport.adapters import soon, until
from tests.transport.servers import Peer, black_hole, refusing, serve

pytestmark = pytest.mark.anyio


def address(origin: Origin) -> tuple[Any, ...]:
    """As the resolver puts it."""
    return socket.AF_INET, socket.SOCK_STREAM, 0, "", (origin.host, origin.port)


async def test_the_first_that_accepts() -> None:
    loop = asyncio.get_running_loop()
    with black_hole() as silent:
        async with serve(Peer.gone) as server:
            for number, dead in enumerate(([], [refusing()], [silent], [refusing(), silent, refusing()])):
                addresses = [address(origin) for origin in [*dead, server.origin]]
                sock = await first_to_answer(loop, addresses, soon(0.4))
                assert sock.getpeername()[1] == server.port
                sock.close()
                await until(lambda expected=number + 1: server.closed == expected)


async def test_none() -> None:
    loop = asyncio.get_running_loop()
    with black_hole() as silent:
        with pytest.raises(ConnectionRefusedError):
            await first_to_answer(loop, [address(silent), address(refusing())], soon(0.2))
        with pytest.raises(TimeoutError):
            await first_to_answer(loop, [address(refusing()), address(silent)], soon(0.2))
