"""Two hundred clients hit a 429 that says when to come back. They come back, and not together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.scene import plain
from tests.faults.fleet import LONG, Config, fleet, report
from tests.faults.load import Job, ask_once
from tests.faults.upstream import GOOD, upstream
from tests.redis_server import RedisServer, running
from tests.transport.servers import Peer, Received

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

CLIENTS = 200
BUCKET = 0.05
MOST = 0.15
"""Of the repeats, in any span of that length."""
WAIT = plain(
    b'{"error":{"message":"slow down","type":"requests","code":"rate_limit_exceeded"}}', 429, more=b"retry-after: 1\r\n"
)


@pytest.fixture
def server(redis_binary: object, tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path) as found:
        yield found


def densest(times: list[float]) -> int:
    """How many lie within one span, at most; wherever it begins."""
    return max(sum(begin <= one < begin + BUCKET for one in times) for begin in times)


@pytest.mark.parametrize("count", [1, 4 if LONG else 2])
async def test_they_come_back_when_they_were_told_to_and_not_together(server: RedisServer, count: int) -> None:
    """The provider refuses everything for a moment, as one that is at its limit does."""
    loop = asyncio.get_running_loop()
    until: list[float] = []

    async def plays(peer: Peer, received: Received) -> None:
        if not until:
            until.append(loop.time() + 0.9)
        await peer.send(WAIT if loop.time() < until[0] else GOOD)

    async with upstream(plays) as limited:

        def change(config: Config, number: int) -> Config:
            models = [{"name": "m", "targets": ["limited/m"]}]
            return {**config, "providers": {"limited": limited.settings()}, "models": models}

        with fleet(server, count, {"t": {}}, change=change) as found:
            ports = found.ports * (CLIENTS // count)
            outcomes = await asyncio.gather(*(ask_once(port, "t", Job("m", None)) for port in ports))
        assert {one.status for one in outcomes} == {200}
        repeats = [one for one in limited.arrivals if one >= until[0]]
        refused = limited.calls - len(repeats)

        share = densest(repeats) / len(repeats)
        report(f"429 storm, {count} processes: calls until nobody had to come back", CLIENTS, limited.calls, "-")
        report(f"429 storm, {count} processes: repeats within any 50 ms", len(repeats), round(share, 3), MOST)
        assert len(repeats) == CLIENTS
        assert refused <= CLIENTS
        assert min(repeats) >= until[0] + 0.1 - BUCKET  # nobody before the second was over
        assert share <= MOST
