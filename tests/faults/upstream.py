"""A provider in the test's own process: it does exactly what the test says, and knows who asked when."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tests.e2e.scene import ANSWER, END, SSE, chunk, piece_of, plain
from tests.transport.servers import Peer, Received, serve

Answer = Callable[[Peer, Received], Awaitable[None]]
DONE = b"data: [DONE]\n\n"
DOWN = plain(b'{"error":{"message":"down","type":"server_error","code":null}}', 503)
GOOD = plain(ANSWER)


@dataclass
class Upstream:
    port: int
    plays: Answer
    arrivals: list[float]
    """When each request was there, on the loop's clock."""
    active: int = 0
    most_active: int = 0
    """Requests at a time, at most, since it was last set."""

    @property
    def calls(self) -> int:
        return len(self.arrivals)

    def settings(self, port: int | None = None, **more: Any) -> dict[str, Any]:
        """As a provider of the configuration. `port`: another way there."""
        facts = {"price": {"input": 1, "output": 1}, "context_window": 128_000, "max_output_tokens": 8_000}
        return {
            "kind": "openai",
            "base_url": f"http://127.0.0.1:{self.port if port is None else port}/v1",
            "api_key": "sk-0123456789abcdef",
            "vendor": "none",
            "max_connections": 1000,
            "models": {"*": facts},
            **more,
        }

    async def script(self, peer: Peer) -> None:
        while True:
            received = await peer.request()
            self.arrivals.append(asyncio.get_running_loop().time())
            self.active += 1
            self.most_active = max(self.most_active, self.active)
            try:
                await self.plays(peer, received)
            finally:
                self.active -= 1


def saying(answer: bytes, *, after: float = 0.0) -> Answer:
    async def plays(peer: Peer, received: Received) -> None:
        await asyncio.sleep(after)
        await peer.send(answer)

    return plays


async def hanging(peer: Peer, received: Received) -> None:
    await peer.gone()


def streaming(words: int, *, gap: float = 0.0, before: float = 0.0, text: str = "Grüße ✓ ") -> Answer:
    """`words` events that are `gap` seconds apart, the first of them after `before`; then usage, and the terminator."""

    async def plays(peer: Peer, received: Received) -> None:
        await peer.send(SSE)
        await asyncio.sleep(before)
        for number in range(words):
            await peer.send(chunk(piece_of(f"{text}{number} ")))
            await asyncio.sleep(gap)
        await peer.send(chunk(usage_of(words)) + chunk(DONE) + END)

    return plays


def usage_of(words: int) -> bytes:
    return b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":%d,"total_tokens":%d}}\n\n' % (
        words,
        words + 7,
    )


@contextlib.asynccontextmanager
async def upstream(plays: Answer) -> AsyncIterator[Upstream]:
    found = Upstream(0, plays, [])
    async with serve(found.script) as server:
        found.port = server.port
        yield found
