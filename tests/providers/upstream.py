"""A provider without a network: what it was asked, and answers that are laid out beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from proxy.providers.openai import OpenAIProvider, Timeouts
from proxy.transport.answer import Answer, Outcome, Serving
from proxy.transport.scripted import ScriptedTransport
from proxy.types import Ask, Call, Headers, Reply, Tenant
from proxy.validation import requests

ANYONE = Tenant("default", passthrough=None)
TIMEOUTS = Timeouts(first_event=20.0, idle=20.0, total=20.0)
HEADERS: Headers = [(b"host", b"localhost")]
MESSAGES = [{"role": "user", "content": "Hello"}]


@dataclass
class Asked:
    """One request as the provider got it."""

    method: bytes
    target: bytes
    headers: Headers
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    def header(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]


class Upstream:
    """A handler of `ScriptedTransport`: gives its answers in turn, the last one again and again."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[Asked] = []
        self.ended: list[Outcome] = []

    def handle(self, method: bytes, target: bytes, headers: Headers, body: bytes) -> Serving:
        self.asked.append(Asked(method, target, headers, body))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return Serving(answer, b"their-id", self)

    def close(self, steps: int, outcome: Outcome) -> None:
        self.ended.append(outcome)

    def provider(self, base_url: str = "http://provider.test/v1", **more: Any) -> OpenAIProvider:
        return OpenAIProvider("up", base_url, ScriptedTransport(self), more.pop("timeouts", TIMEOUTS), **more)


def whole(
    body: bytes | Any, status: int = 200, *headers: tuple[bytes, bytes], kind: bytes = b"application/json"
) -> Answer:
    """A plain answer."""
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    typed = [(b"content-type", kind)] if kind else []
    return Answer(status, [*typed, *headers], [(0.0, data)] if data else [], length=len(data))


def events(*data: bytes, done: bool = True, kind: bytes = b"text/event-stream") -> Answer:
    """An event stream; each of `data` is the value of one data line, sent in a piece of its own."""
    lines = [*data, b"[DONE]"] if done else data
    typed = [(b"content-type", kind)] if kind else []
    return Answer(200, typed, [(0.0, b"data: " + line + b"\n\n") for line in lines])


def call(
    body: bytes | Mapping[str, Any] = b"",
    path: str = "/v1/chat/completions",
    *,
    method: str = "POST",
    headers: Headers = HEADERS,
    query: bytes = b"",
) -> Call:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return Call(method, path, path.encode(), query, headers, data, "req_1", "00-trace-span-01", "127.0.0.1")


def ask(*args: Any, tenant: Tenant = ANYONE, **more: Any) -> Ask:
    """The ask that a call becomes; arguments as in `call`."""
    return requests.parse(call(*args, **more), tenant, tenants_configured=False)


def chat(model: str = "m", **more: Any) -> Ask:
    headers = more.pop("headers", HEADERS)
    return ask({"model": model, "messages": MESSAGES, **more}, headers=headers)


async def body_of(reply: Reply) -> bytes:
    """All that the client gets; the reply is closed."""
    try:
        return b"".join([event.data async for event in reply.events])
    finally:
        await reply.aclose()
