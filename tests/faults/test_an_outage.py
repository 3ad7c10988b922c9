"""P7, P8: a provider that answers 503 to everything is asked hardly more often than the clients ask, and no client is
led to ask again. With the circuit open it is left alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import clear
from tests.faults.fleet import LONG, Config, Fleet, fleet, key_of, report, until
from tests.faults.load import Job, Stream
from tests.redis_server import RedisServer, running

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

RATE = 200
SECONDS = 60.0 if LONG else 4.0
OPEN_SECONDS = 60.0 if LONG else 2.0
MOST_CALLS = 1.10
MOST_CALLS_OPEN = 0.05
SHORT_DELAYS = {"max_attempts": 3, "base_delay_ms": 100, "max_delay_ms": 1000}
"""In the short form, retries are over within it."""
MODELS = {"down": "mock/500", "down-and-says-when": "mock/503"}
"""The second one has a Retry-After of a second with each answer."""
JOBS = {name: Job(name, None) for name in MODELS}


def changed(**tolerance: Any) -> Any:
    def change(config: Config, number: int) -> Config:
        models = [{"name": name, "targets": [target]} for name, target in MODELS.items()]
        return {**config, "models": models, "fault_tolerance": tolerance}

    return change


@pytest.fixture
def server(redis_binary: object, tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path) as found:
        yield found


async def calls_of(found: Fleet, model: str, seconds: float) -> tuple[int, int]:
    """Requests of clients for so many seconds, and the calls to the provider that came of them."""
    before = await found.mock.last_id()
    async with Stream(found, "t", JOBS[model], RATE) as stream:
        await stream.lasts(seconds)
    assert {one.status for one in stream.outcomes} == {503}
    return len(stream.outcomes), await found.mock.last_id() - before


@pytest.mark.parametrize("model", MODELS)
async def test_a_dead_provider_gets_at_most_a_tenth_more_calls(server: RedisServer, model: str) -> None:
    """With circuits that never open: retries alone, bounded by their budget."""
    tolerance = {"circuit_breaker": False, **({} if LONG else {"retry": SHORT_DELAYS})}
    with fleet(server, 1, {"t": {}}, change=changed(**tolerance)) as found:
        asked, calls = await calls_of(found, model, SECONDS)
        report(f"P7 {model}: calls per request, circuits off", asked, round(calls / asked, 3), MOST_CALLS)
        assert asked < calls  # it does try again
        assert calls / asked <= MOST_CALLS


async def test_with_its_circuit_open_it_gets_hardly_any(server: RedisServer) -> None:
    with fleet(server, 1, {"t": {}}, change=changed()) as found:
        async with Stream(found, "t", JOBS["down"], RATE):
            await until(lambda: found.events("circuit.opened"), "the circuit to open")
        asked, calls = await calls_of(found, "down", OPEN_SECONDS)
        report("P7 calls per request, once open", asked, round(calls / asked, 4), MOST_CALLS_OPEN)
        assert calls / asked <= MOST_CALLS_OPEN


@pytest.mark.parametrize("stream", [False, True])
async def test_the_official_client_does_not_ask_again(server: RedisServer, stream: bool) -> None:
    """At its defaults it makes three attempts on a 503, but ours says that it is of no use."""
    asked = 200 if LONG else 20
    tolerance = {"retry": SHORT_DELAYS}
    with fleet(server, 1, {"t": {}}, change=changed(**tolerance)) as found:
        options: Any = {"model": "down", "messages": [{"role": "user", "content": "Hello"}], "stream": stream}
        async with openai.AsyncOpenAI(
            base_url=f"{found.alive[0].url}/v1", api_key=key_of("t"), http_client=clear.async_client()
        ) as client:
            asks = [client.chat.completions.create(**options) for _ in range(asked)]
            answers = await asyncio.gather(*asks, return_exceptions=True)
        assert {type(one) for one in answers} == {openai.InternalServerError}

        def ended() -> int:  # once the circuit is open nothing is sent, and such a request was refused
            return len(found.events("request.finished")) + len(found.events("request.refused"))

        await until(lambda: ended() >= asked, "the requests to end")
        seen = ended()
        report(f"P8 attempts per call of the SDK, {'streams' if stream else 'plain'}", asked, seen / asked, 1.0)
        assert seen == asked
