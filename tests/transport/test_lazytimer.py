from __future__ import annotations

import asyncio

import pytest

from proxy.transport.lazytimer import LazyTimer
from tests.transport.adapters import soon, until

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "deadlines",
    [
        [0.01],
        [0.01, 0.03, 0.08],  # ever farther: it looks again
        [60.0, 0.02],  # nearer: set anew
        [0.05, 0.02, float("inf"), 0.08],
    ],
)
async def test_the_latest_deadline_counts(deadlines: list[float]) -> None:
    fired: list[float] = []
    timer = LazyTimer(asyncio.get_running_loop(), lambda: fired.append(soon(0)))
    for seconds in deadlines:
        deadline = soon(seconds)
        timer.set(deadline)
    await until(lambda: bool(fired))
    assert fired[0] >= deadline
    timer.set(soon(0.01))  # and it can be used again
    await until(lambda: len(fired) == 2)


async def test_cancelled() -> None:
    fired: list[float] = []
    timer = LazyTimer(asyncio.get_running_loop(), lambda: fired.append(soon(0)))
    timer.cancel()
    timer.set(soon(0.01))
    timer.cancel()
    await asyncio.sleep(0.03)
    assert not fired
