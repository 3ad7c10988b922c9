"""Several addresses of one name: any of them may be dead."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest

from proxy.transport.base import Origin
from proxy.transport.connect import Names, first_to_answer
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


class Resolver:
    """Four threads, as the event loop has them. One name hangs until it is let go."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self.asked: list[str] = []
        self.freed = Event()

    async def __call__(self, host: str, port: int, **more: Any) -> list[Any]:
        self.asked.append(host)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._find, host)

    def _find(self, host: str) -> list[Any]:
        if host == "hangs.test":
            self.freed.wait(30)
            raise socket.gaierror("no such name")
        return [host]


async def test_a_name_whose_resolver_hangs_takes_one_thread_however_often_it_is_asked_for() -> None:
    with ThreadPoolExecutor(4) as pool:
        resolver = Resolver(pool)
        names = Names(resolver)
        try:
            for _ in range(10):
                for work in [asyncio.create_task(names.addresses("hangs.test", 80)) for _ in range(3)]:
                    await asyncio.sleep(0)
                    work.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await work
            async with asyncio.timeout(5):
                assert await names.addresses("healthy.test", 80) == ["healthy.test"]
            assert resolver.asked == ["hangs.test", "healthy.test"]
            waiting = [asyncio.create_task(names.addresses("hangs.test", 80)) for _ in range(2)]
            await asyncio.sleep(0)
        finally:
            resolver.freed.set()
        for one in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(one, socket.gaierror)
        with pytest.raises(socket.gaierror):
            await names.addresses("hangs.test", 80)  # an answer is not kept
        assert resolver.asked.count("hangs.test") == 2


async def test_an_answer_that_nobody_waits_for_any_more_is_dropped_without_a_word() -> None:
    never: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def resolve(*words: Any, **more: Any) -> Any:
        return await never

    names = Names(resolve)
    work = asyncio.create_task(names.addresses("hangs.test", 80))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    names.close()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert never.cancelled()
