"""P12: streams that end before their end, at any byte and in every way in which they do. The official client raises
each time, none ends as if it were whole, and none is billed twice."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import clear
from tests.e2e.scene import END, SSE, chunk, piece_of
from tests.faults.books import agree, closed
from tests.faults.fleet import LONG, STRICT, Config, Fleet, fleet, key_of, limited, report, until
from tests.faults.upstream import DONE, Upstream, upstream, usage_of
from tests.faults.wire import Ending, Faults, Plan, Wire, overwritten, wired
from tests.redis_server import RedisServer, running
from tests.transport.servers import Peer, Received

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

STREAMS = 400 if LONG else 24
"""Of each kind."""
AT_ONCE = 20 if LONG else 12
WORDS = 40
MOST_TOKENS = 12
"""That one word can come to."""
ENDINGS = {"reset": Ending.RESET, "fin": Ending.FIN, "stall": Ending.STALL}
KINDS = (*ENDINGS, "half an event", "broken UTF-8")
EVENTS = [*(piece_of(f"Grüße ✓ {number} ") for number in range(WORDS)), usage_of(WORDS), DONE]
BODY = b"".join(EVENTS)
HEAD = SSE.removesuffix(b"\r\n") + b"connection: close\r\n\r\n"
"""One answer to a connection: the faults go by its number."""
ANSWER = HEAD + b"".join(chunk(event) for event in EVENTS) + END
SETTINGS = {
    # Without circuits every stream gets as far as it was meant to.
    "circuit_breaker": False,
    "retry": {"base_delay_ms": 1, "max_delay_ms": 10},
}


@pytest.fixture
def server(redis_binary: object, tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path) as found:
        yield found


def before_the_terminator(body: bytes, chance: random.Random, first: int = 1) -> int:
    """A place in an answer such that what lies in front of it has no terminator."""
    return chance.randrange(first, body.index(b"[DONE]") + 5)


def spoiling(kind: str, provider: Upstream, wire: Wire, chance: random.Random) -> None:
    """From now on every answer ends in this way, each somewhere else."""

    async def whole(peer: Peer, received: Received) -> None:
        await peer.send(ANSWER)

    async def half(peer: Peer, received: Received) -> None:  # and the framing says that all is well
        await peer.send(HEAD + chunk(BODY[: before_the_terminator(BODY, chance)]) + END)

    def script(number: int) -> Plan:
        if kind in ENDINGS:
            return Plan(down=Faults(after=before_the_terminator(ANSWER, chance), then=ENDINGS[kind]))
        return Plan(down=Faults(corrupt=overwritten(before_the_terminator(ANSWER, chance, len(HEAD)), b"\xff")))

    provider.plays = half if kind == "half an event" else whole
    wire.script = (lambda number: Plan()) if kind == "half an event" else script


@dataclass(frozen=True)
class Seen:
    name: str
    words: int
    raised: str
    """The class of what was raised; empty: it ended as if it were whole."""


async def read(client: openai.AsyncOpenAI, name: str) -> Seen:
    words = 0
    messages: Any = [{"role": "user", "content": "Hello"}]
    try:
        stream = await client.chat.completions.create(
            model="m", messages=messages, stream=True, extra_headers={"x-request-id": name}
        )
        async for piece in stream:
            words += sum(1 for choice in piece.choices if choice.delta.content)
    except openai.APIError as error:
        return Seen(name, words, type(error).__name__)
    return Seen(name, words, "")


async def read_all(found: Fleet, kind: str) -> list[Seen]:
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(client: openai.AsyncOpenAI, number: int) -> Seen:
        async with turn:
            return await read(client, f"{KINDS.index(kind)}.{number}")

    async with openai.AsyncOpenAI(
        base_url=f"{found.alive[0].url}/v1", api_key=key_of("t"), http_client=clear.async_client()
    ) as client:
        return list(await asyncio.gather(*(one(client, number) for number in range(STREAMS))))


def changed(provider: Upstream, port: int, **tolerance: Any) -> Any:
    timeouts = {"first_event_ms": 300, "idle_ms": 300}

    def change(config: Config, number: int) -> Config:
        return {
            **config,
            "providers": {"up": provider.settings(port, timeouts=timeouts)},
            "models": [{"name": "m", "targets": ["up/m"]}],
            "fault_tolerance": tolerance,
        }

    return change


async def test_each_of_them_raises_and_none_is_billed_twice(server: RedisServer) -> None:
    chance = random.Random(12)
    seen: list[Seen] = []
    async with upstream(lambda peer, received: peer.send(ANSWER)) as provider, wired(provider.port) as wire:
        budget = {"t": limited(100_000_000, **STRICT)}
        with fleet(server, 1, budget, change=changed(provider, wire.port, **SETTINGS)) as found:
            for kind in KINDS:
                spoiling(kind, provider, wire, chance)
                some = await read_all(found, kind)
                clean = sum(not one.raised for one in some)
                classes = ", ".join(f"{name} {count}" for name, count in Counter(one.raised for one in some).items())
                report(f"P12 {kind}: ended as if whole ({classes})", len(some), clean, 0)
                seen += some
            books = await closed(found, "t", 0)
    assert [one for one in seen if not one.raised] == []
    begun = [one for one in seen if one.words]
    assert len(begun) > len(seen) / 2  # most of them are cut in the middle
    agree(books)
    bills = Counter(one["request_id"] for one in books.records)
    twice = sum(count > 1 for count in bills.values())
    unbilled = sum(bills[one.name] != 1 for one in begun)
    report("P12 streams billed twice", len(seen), twice, 0)
    report("P12 streams of which something came, not billed", len(begun), unbilled, 0)
    assert (twice, unbilled) == (0, 0)
    output = {one["request_id"]: one["output"] for one in books.records}
    assert all(one.words <= output[one.name] <= WORDS * MOST_TOKENS for one in begun)


async def test_the_circuit_hears_of_streams_that_are_cut(server: RedisServer) -> None:
    """They all began well: only what came later tells that something is wrong."""
    at = len(HEAD) + len(chunk(EVENTS[0])) + 10
    cut = Plan(down=Faults(after=at, then=Ending.RESET))
    async with upstream(lambda peer, received: peer.send(ANSWER)) as provider, wired(provider.port) as wire:
        wire.plan(cut)
        with fleet(server, 1, {"t": {}}, change=changed(provider, wire.port)) as found:
            async with openai.AsyncOpenAI(
                base_url=f"{found.alive[0].url}/v1", api_key=key_of("t"), http_client=clear.async_client()
            ) as client:
                seen = [await read(client, f"c.{number}") for number in range(5)]
                assert [(one.words, one.raised) for one in seen] == [(1, "APIError")] * 5
                await until(lambda: found.events("circuit.opened"), "the circuit to open")
                assert (await read(client, "c.5")).raised == "InternalServerError"
                assert provider.calls == 5
