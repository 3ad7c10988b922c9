"""Keep-alives: how often they come, and what silence costs."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from proxy.edge.answer import Answer
from proxy.edge.connection import Connection
from tests.e2e.scene import scene
from tests.transport.servers import Peer

pytestmark = pytest.mark.anyio

SILENCE = 0.02
COMMENT = b": keep-alive\n\n"


async def says_nothing(peer: Peer) -> None:
    await peer.request()
    await peer.gone()


async def test_they_come_again_and_again_for_as_long_as_the_silence_lasts() -> None:
    async with scene(says_nothing, silence=SILENCE) as there:
        client = await there.client()
        client.ask(stream=True)
        assert (await client.head())[0] == 200
        await client.read_until(COMMENT * 5)
        client.close()


class Ticking(Answer):
    """Counts how often it looks whether a keep-alive is due."""

    ticks = 0

    def _tick(self) -> None:
        self.ticks += 1
        super()._tick()


async def test_silence_costs_one_look_each_time_also_when_the_client_takes_nothing() -> None:
    taken = asyncio.Event()

    async def send(message: Any) -> None:
        await taken.wait()

    connection = Connection(asyncio.Transport())
    answer = Ticking(
        send, connection, request_id="r", traceparent="t", trailer=False, clock=time.monotonic, silence=SILENCE
    )
    started = time.monotonic()
    answer.expect_stream()
    async with asyncio.timeout(20):
        while answer.ticks < 20:
            await asyncio.sleep(SILENCE / 4)
    assert time.monotonic() - started >= 10 * SILENCE
    taken.set()
    answer.close()


@pytest.mark.parametrize("later", range(6))
async def test_none_comes_after_the_end_when_both_fall_due_together(later: int) -> None:
    """One comment is just out and the next is due, `later` turns of the loop after it, while the end is written."""
    loop = asyncio.get_running_loop()
    sent: list[bytes] = []
    now = [0.0]

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if sent[-1] == COMMENT and sent.count(COMMENT) == 1:
            now[0] += 1000.0
            loop.call_soon(turn, later)

    def turn(left: int) -> None:
        if left:
            loop.call_soon(turn, left - 1)
        elif answer._timer is not None:  # which would have fired now
            answer._tick()

    answer = Answer(
        send,
        Connection(asyncio.Transport()),
        request_id="r",
        traceparent="t",
        trailer=False,
        clock=lambda: now[0],
        silence=600.0,
    )
    answer.expect_stream()
    now[0] = 1000.0
    answer._tick()
    await asyncio.sleep(0)
    await answer.end(b"data: [DONE]\n\n")
    for _ in range(10):
        await asyncio.sleep(0)
    answer.close()
    assert sent[-1] == b"data: [DONE]\n\n"
