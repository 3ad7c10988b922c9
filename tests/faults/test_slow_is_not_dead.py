"""Slow is not dead: replies of 90 seconds, streams that are silent for 120, streams of 20 minutes. They all finish,
each by one call, and no circuit moves.

Everything is shorter by one factor: what the provider takes, and every time-out and delay of the settings, which are
otherwise the defaults.
"""

from __future__ import annotations

import asyncio
import json

import pytest

from proxy.observability.events import (
    CircuitClosed,
    CircuitHalfOpen,
    CircuitOpened,
    UpstreamFailedOver,
    UpstreamRetried,
)
from tests.e2e.scene import ANSWER, END, SSE, Client, chunk, piece_of
from tests.e2e.stack import stack
from tests.faults.fleet import LONG, report
from tests.faults.upstream import DONE, GOOD, Answer, hanging, saying, streaming, upstream
from tests.transport.servers import Peer, Received

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

SCALE = 20 if LONG else 200
"""Seconds of the world in one of ours."""
EACH = 50 if LONG else 10
PLAIN, SILENT, LASTING = 90 / SCALE, 120 / SCALE, 1200 / SCALE
WORDS = 200
DEFAULTS_MS = {"first_event_ms": 300_000, "idle_ms": 300_000, "total_ms": 600_000}
NOTICED = CircuitOpened | CircuitHalfOpen | CircuitClosed | UpstreamRetried | UpstreamFailedOver


async def silent_between(peer: Peer, received: Received) -> None:
    await peer.send(SSE + chunk(piece_of("Well")))
    await asyncio.sleep(SILENT)
    await peer.send(chunk(piece_of("done")) + chunk(DONE) + END)


SLOW: dict[str, Answer] = {
    "plain": saying(GOOD, after=PLAIN),
    "silent-before": streaming(3, before=SILENT),
    "silent-between": silent_between,
    "lasting": streaming(WORDS, gap=LASTING / WORDS),
}


async def by_model(peer: Peer, received: Received) -> None:
    await SLOW[json.loads(received.body)["model"]](peer, received)


async def ask(port: int, model: str) -> bool:
    """Whether the answer came, and came whole."""
    client = Client(*await asyncio.open_connection("127.0.0.1", port))
    try:
        client.ask(model, stream=model != "plain")
        status, _ = await client.head()
        body = await client.rest()
        return status == 200 and (json.loads(body) == json.loads(ANSWER) if model == "plain" else body.endswith(DONE))
    finally:
        client.close()


def scaled(milliseconds: int) -> int:
    return milliseconds // SCALE


async def test_what_is_slow_finishes_by_one_call_and_no_circuit_moves() -> None:
    async with upstream(by_model) as slow, upstream(saying(GOOD)) as other:
        timeouts = {name: scaled(value) for name, value in DEFAULTS_MS.items()}
        config = {
            "providers": {"slow": slow.settings(timeouts=timeouts), "other": other.settings()},
            "models": [{"name": name, "targets": [f"slow/{name}", "other/m"]} for name in SLOW],
            "listen": {"drain_ms": 0, "grace_ms": 1000},
            "fault_tolerance": {
                "deadline_ms": scaled(900_000),
                "retry": {"base_delay_ms": scaled(1000), "max_delay_ms": scaled(30_000)},
                "circuit_breaker": {"recovery_timeout_ms": scaled(60_000)},
            },
        }
        async with stack(config, silence=10 / SCALE) as running:
            asks = [ask(running.port, model) for model in SLOW for _ in range(EACH)]
            whole = await asyncio.gather(*asks)
            await running.quiet(60)
            moved = [event for event in running.events if isinstance(event, NOTICED)]
            states = running.running.circuits.states()
        report("slow is not dead: finished", len(asks), sum(whole), len(asks))
        report("slow is not dead: calls per request", len(asks), slow.calls / len(asks), 1.0)
        report("slow is not dead: circuits that moved", len(asks), len(moved), 0)
        assert all(whole)
        assert (slow.calls, other.calls) == (len(asks), 0)
        assert moved == []
        assert set(states.values()) == {0}


async def test_and_what_is_dead_is_not_slow() -> None:
    """The same scale: what never answers is noticed, and somebody else answers."""
    async with upstream(hanging) as dead, upstream(streaming(3)) as other:
        timeouts = {name: scaled(value) for name, value in DEFAULTS_MS.items()}
        config = {
            "providers": {"slow": dead.settings(timeouts=timeouts), "other": other.settings()},
            "models": [{"name": "m", "targets": ["slow/m", "other/m"]}],
            "listen": {"drain_ms": 0, "grace_ms": 1000},
        }
        async with stack(config, silence=10 / SCALE) as running:
            whole = await asyncio.gather(*(ask(running.port, "m") for _ in range(5)))
            await running.quiet(60)
            assert all(whole)
            assert any(isinstance(event, CircuitOpened) for event in running.events)
        assert (dead.calls, other.calls) == (5, 5)
