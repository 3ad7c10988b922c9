"""Agents whose sessions go through a fleet, and a provider that knows what it was sent: the mock, on sockets of this
process, with its prompt cache on. Its ledger says what a prompt had; what the prompt held is read on the way in.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from proxy.providers.mock.counting import real_counts
from proxy.providers.mock.handler import Mock
from proxy.providers.mock.ledger import Entry
from proxy.providers.mock.prefixes import LEAST, STEP
from proxy.providers.mock.server import MockServer
from proxy.transport.answer import Serving
from proxy.types import Headers
from tests.e2e.scene import CHAT, Client
from tests.faults.conversation import Fact, Session
from tests.faults.fleet import key_of

CACHED_PER_CENT: Final = 10
"""Of the price of a token: what it costs where the provider had it cached."""
_CODE: Final = re.compile(rb"The code of [^.]{1,64} is ([A-Z0-9-]{9})\.")
_NOT_A_CUT: Final = STEP + 8
"""Tokens of the prompt before that need not be told as cached although all of it came again: steps are rounded down,
and the opening of its reply was no part of the conversation."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """As the provider saw it. `tokens` are 0 if it was refused."""

    status: int
    model: str
    tokens: int
    cached: int
    codes: frozenset[str]
    """Of the facts that it states."""

    @property
    def cost(self) -> float:
        """In tokens at the full price."""
        return self.tokens - self.cached * (100 - CACHED_PER_CENT) / 100


class Provider:
    """A `Handler`: the mock, with a look at each chat before it answers."""

    def __init__(self) -> None:
        self.port = 0
        self.prompts: dict[str, list[Prompt]] = defaultdict(list)
        """By the key that asked."""
        self._mock = Mock(real_counts(), prompt_cache=True)

    def handle(self, method: bytes, target: bytes, headers: Headers, body: bytes) -> Serving:
        serving = self._mock.handle(method, target, headers, body)
        entry = serving.tally
        if target == CHAT.encode() and isinstance(entry, Entry):
            (key,) = [value for name, value in headers if name == b"authorization"]
            codes = frozenset(code.decode() for code in _CODE.findall(body))
            prompt = Prompt(entry.status, entry.model, entry.prompt_tokens, entry.cached_tokens, codes)
            self.prompts[key.decode().removeprefix("Bearer ")].append(prompt)
        return serving

    def outage(self) -> None:
        """From now on everything is answered 503."""
        self._mock.handle(b"POST", b"/__outage", [], b"")

    def settings(self, key: str, **facts: Any) -> dict[str, Any]:
        """As a provider of the configuration, with what is known of its models."""
        return {
            "kind": "openai",
            "base_url": f"http://127.0.0.1:{self.port}/v1",
            "api_key": key,
            "vendor": "none",
            "models": {"*": {"price": {"input": 1, "output": 1}, **facts}},
        }


@contextlib.asynccontextmanager
async def provider() -> AsyncIterator[Provider]:
    found = Provider()
    server = MockServer(found)
    found.port = await server.start("127.0.0.1", 0)
    try:
        yield found
    finally:
        await server.aclose()


@dataclass(frozen=True, slots=True)
class Turn:
    number: int
    """Turns of the session that the request held."""
    sent: int
    """Tokens of the conversation as the client sent it."""
    status: int
    """That the client got."""
    trimmed: str
    """What the answer's header says was done."""
    tries: tuple[Prompt, ...]
    """What the providers got of it, the last one answered."""
    cut: bool
    """The prompt is no continuation of the one before."""

    @property
    def prompt(self) -> Prompt:
        return self.tries[-1]


def sizes(session: Session) -> list[int]:
    """Tokens of the conversation after each turn, as the provider counts; the first is that of the opening alone."""
    mock = Mock(real_counts())

    def size(messages: Sequence[bytes]) -> int:
        body = b'{"model":"bench-1","messages":[%b]}' % b",".join(messages)
        serving = mock.handle(b"POST", CHAT.encode(), [], body)
        assert isinstance(serving.tally, Entry)
        assert serving.tally.status == 200
        return serving.tally.prompt_tokens - 3

    found = [size(session.opening)]
    for turn in session.turns:
        found.append(found[-1] + size(turn))
    return found


async def run(
    port: int,
    name: str,
    session: Session,
    tokens: Sequence[int],
    prompts: Sequence[list[Prompt]],
    between: Callable[[int], object] = lambda turn: None,
) -> list[Turn]:
    """Sends the session turn by turn, as the tenant `name` to the model `name`. `tokens`: of the session, by `sizes`;
    `prompts`: where its prompts turn up; `between` is called before each turn."""
    client = Client(*await asyncio.open_connection("127.0.0.1", port))
    turns: list[Turn] = []
    try:
        for number, (body, sent) in enumerate(zip(session.bodies(name), tokens, strict=True)):
            between(number)
            seen = [len(each) for each in prompts]
            client.send(_request(port, key_of(name), body))
            status, headers, answer = await client.answer()
            assert status == 200, (number, answer[:1000])
            assert json.loads(answer)["object"] == "chat.completion"
            tries = tuple(one for each, before in zip(prompts, seen, strict=True) for one in each[before:])
            cut = bool(turns) and _cut(turns[-1].prompt, tries[-1])
            trimmed = headers.get("x-breakwater-context-trimmed", "")
            turns.append(Turn(number, sent, status, trimmed, tries, cut))
    finally:
        client.close()
    return turns


def _cut(before: Prompt, now: Prompt) -> bool:
    return before.tokens >= LEAST + _NOT_A_CUT and now.cached < before.tokens - _NOT_A_CUT


def _request(port: int, key: str, body: bytes) -> bytes:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def refused(turns: Iterable[Turn]) -> int:
    """Prompts that a provider found too long."""
    return sum(one.status == 400 for turn in turns for one in turn.tries)


def hit_ratio(turns: Iterable[Turn]) -> float:
    prompts = [turn.prompt for turn in turns]
    return sum(one.cached for one in prompts) / sum(one.tokens for one in prompts)


def cost(prompts: Iterable[Prompt]) -> float:
    """Of the input, in tokens at the full price."""
    return sum(one.cost for one in prompts)


def lost(turns: Iterable[Turn], facts: Iterable[Fact]) -> int:
    """Prompts that lack one of these facts, which all of them should state."""
    codes = {fact.code for fact in facts}
    return sum(not codes <= one.codes for turn in turns for one in turn.tries if one.status == 200)


def recall(turns: Sequence[Turn], facts: Sequence[Fact], ages: Sequence[int] = ()) -> dict[str, float]:
    """Of the facts stated so far the share that the prompt still holds, by how many turns ago they were stated:
    `ages` are the upper ends of the classes, in turns, and what is older makes the last one. `all` is over all ages."""
    held = [0] * (len(ages) + 1)
    stated = [0] * (len(ages) + 1)
    for turn in turns:
        for fact in facts:
            age = turn.number - fact.turn
            if age >= 0:
                place = bisect_left(ages, age)
                stated[place] += 1
                held[place] += fact.code in turn.prompt.codes
    found = {"all": round(sum(held) / sum(stated), 3)}
    names = [f"to {end}" for end in ages] + [f"over {ages[-1]}" if ages else ""]
    for name, mine, every in zip(names, held, stated, strict=True):
        if ages and every:
            found[name] = round(mine / every, 3)
    return found
