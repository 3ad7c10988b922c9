"""Conversations that no client should send: forwarded as they came or refused with 400, never an error of ours, never
repaired, and never at the expense of others."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from tests.e2e.test_context import SYSTEM, TASK, Json, ask, body, gateway, turns, upstream

pytestmark = pytest.mark.anyio

LONG = "word " * 6000
CALL: Json = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ODD: dict[str, Any] = {
    "orphan result": [SYSTEM, TASK, {"role": "tool", "tool_call_id": "x", "content": LONG}],
    "two results": [
        TASK,
        {"role": "assistant", "tool_calls": [CALL]},
        *2 * [{"role": "tool", "tool_call_id": "c", "content": LONG}],
    ],
    "unanswered call": [TASK, {"role": "assistant", "content": LONG, "tool_calls": [CALL]}, TASK],
    "unknown role": [TASK, {"role": "narrator", "content": LONG}],
    "no role": [TASK, {"content": LONG}],
    "no object": [TASK, LONG],
    "numbers": list(range(6000)),
    "nulls": [None] * 6000,
    "lists in lists": [[[[[LONG]]]]],
    "odd members": [{"role": ["user"], "content": {"text": LONG}, "tool_calls": 7, "tool_call_id": {}}],
    "odd calls": [{"role": "assistant", "content": LONG, "tool_calls": [None, 1, {"id": None}]}],
    "control characters": [{"role": "user", "content": "\x00\x01\x1f\x7f" * 6000}],
    "special tokens": [{"role": "user", "content": "<|endoftext|><|im_start|>system" * 3000}],
    "one long word": [{"role": "user", "content": "a" * 60_000}],
    "deep": json.loads("[" * 500 + "]" * 500),
}


@pytest.mark.parametrize("messages", ODD.values(), ids=ODD)
@pytest.mark.parametrize("checked", [True, False])
async def test_an_odd_conversation_is_sent_as_it_came_or_refused(messages: Any, checked: bool) -> None:
    async with (
        upstream() as one,
        gateway(a=one.settings(), sections={"context": {"preflight_check": checked}}) as (_, client),
    ):
        answer = await ask(client, {"model": "m", "messages": messages})
        if answer.status_code == 200:
            assert one.sent[0]["messages"] == messages
        else:
            assert answer.status_code == 400
            assert answer.json()["error"]["type"] == "invalid_request_error"
            assert not one.bodies


@pytest.mark.parametrize(
    "messages", [[], [{}], [SYSTEM], [{"role": "user", "content": ""}], [{"role": "user", "content": []}]]
)
async def test_what_is_odd_and_short_is_the_provider_s_to_judge(messages: Any) -> None:
    async with upstream() as one, gateway(a=one.settings()) as (_, client):
        assert (await ask(client, {"model": "m", "messages": messages})).status_code == 200
        assert one.sent[0]["messages"] == messages


async def test_messages_without_content_are_messages() -> None:
    empty = [{"role": "user", "content": None}, {"role": "assistant", "content": None}]
    async with upstream() as one, gateway(a=one.settings()) as (_, client):
        assert (await ask(client, {"model": "m", "messages": [SYSTEM, TASK, *empty * 600]})).status_code == 200
        first, note, second, *rest = one.sent[0]["messages"]
        assert (first, second) == (SYSTEM, TASK)
        assert note["content"].startswith("[breakwater] ")
        assert rest == (empty * 600)[-len(rest) :]


FLOODS = {
    "a million messages": b'{"model":"m","messages":[' + b",".join([b'{"role":"u"}'] * 1_000_000) + b"]}",
    "a string of 20 MB": b'{"model":"m","messages":[{"role":"user","content":"' + b"a b " * 5_000_000 + b'"}]}',
    "tiny parts": b'{"model":"m","messages":[{"role":"user","content":['
    + b",".join([b'{"type":"text","text":"a"}'] * 400_000)
    + b"]}]}",
}


@pytest.mark.slow
@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
async def test_a_flood_is_refused_in_time_and_delays_nobody(flood: bytes) -> None:
    """What the loop is held for is what decoding such a body takes in one piece."""
    async with (
        upstream() as one,
        gateway(a=one.settings(), sections={"listen": {"max_body_bytes": 30_000_000, "drain_ms": 0}}) as (_, client),
    ):
        await ask(client, body(2))
        flooding = asyncio.create_task(ask(client, flood))
        waits = []
        while not flooding.done():
            begun = time.monotonic()
            assert (await ask(client, {"model": "m", "messages": [SYSTEM, *turns(1)]})).status_code == 200
            waits.append(time.monotonic() - begun)
        answer = await flooding
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert max(waits) < 5
