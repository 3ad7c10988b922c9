"""Long conversations: what one request must not do to another, and what is let be although it looks long."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from typing import Any

import pytest

from proxy.observability.events import RequestFinished
from tests.e2e.scene import ANSWER, plain, until
from tests.e2e.test_context import (
    SYSTEM,
    TASK,
    TOO_LONG,
    WINDOW,
    ask,
    body,
    facts_of,
    gateway,
    items,
    trimmed,
    upstream,
)
from tests.transport.servers import Peer, Received, serve

pytestmark = pytest.mark.anyio

Json = dict[str, Any]
KEY, OTHER = "bw-acme-0123456789abcdef", "bw-beta-0123456789abcdef"


async def test_what_a_tenant_makes_a_provider_say_of_its_window_concerns_that_tenant_alone() -> None:
    """Providers quote the client's own words when they refuse them."""
    quoted = "prompt is too long: 900 tokens > 30 maximum"
    refusal = {
        "error": {
            "message": f"Invalid value: '{quoted}'. Supported values are: 'low', 'medium' and 'high'.",
            "type": "invalid_request_error",
            "param": "reasoning_effort",
            "code": "invalid_value",
        }
    }

    def play(received: Received) -> bytes:
        return plain(json.dumps(refusal).encode(), 400) if quoted.encode() in received.body else plain(ANSWER)

    sections = {"tenants": [{"name": "acme", "keys": [KEY]}, {"name": "beta", "keys": [OTHER]}]}
    async with upstream() as one, gateway(a=one.settings(), sections=sections) as (_, client):
        one.play = play
        client.headers["authorization"] = f"Bearer {KEY}"
        assert (await ask(client, body(5, reasoning_effort=quoted))).status_code == 400
        client.headers["authorization"] = f"Bearer {OTHER}"
        answer = await ask(client, body(20))
        assert answer.status_code == 200
        assert facts_of(answer.headers["x-breakwater-context-tokens"])["limit"] == str(WINDOW - 20)
        assert one.sent[-1]["messages"] == body(20)["messages"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64," + "A" * 40_000}},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "input_audio", "input_audio": {"format": "mp3", "data": b64encode(b"\xff\xfb" * 300_000).decode()}},
    ],
    ids=["file", "file by id", "audio"],
)
async def test_what_media_may_come_to_is_no_reason_to_refuse_or_remove(part: Json) -> None:
    """Nobody knows how many tokens a provider makes of them: it says so itself when they are too many."""
    message = {"role": "user", "content": [{"type": "text", "text": "Read this."}, part]}
    async with upstream() as one, gateway(a=one.settings()) as (_, client):
        sent = {"model": "m", "messages": [SYSTEM, TASK, {"role": "assistant", "content": "Yes?"}, message]}
        answer = await ask(client, sent)
        assert answer.status_code == 200
        assert one.sent[0]["messages"] == sent["messages"]


async def test_a_compaction_is_given_all_that_it_is_to_compact() -> None:
    sections = {"context": {"max_tokens": 1000}}
    async with upstream() as one, gateway(a=one.settings(), sections=sections) as (running, client):
        answer = await ask(client, {"model": "m", "input": items(40)}, "/responses/compact")
        assert answer.status_code == 200
        assert one.sent[0]["input"] == items(40)
        assert not trimmed(running)


async def test_a_retry_is_no_second_cut() -> None:
    left = [plain(b'{"error":{"message":"down"}}', 500)]
    sections = {"fault_tolerance": {"retry": {"base_delay_ms": 1}}}
    async with upstream() as one, gateway(a=one.settings(), sections=sections) as (running, client):
        one.play = lambda received: left.pop() if left else plain(ANSWER)
        answer = await ask(client, body(60))
        assert answer.headers["x-breakwater-attempts"] == "2"
        assert len(trimmed(running)) == 1


async def test_a_minute_has_to_hold_all_choices() -> None:
    sections = {"budget": {"tokens_per_minute": 1500}}
    async with upstream() as one, gateway(a=one.settings(), sections=sections) as (_, client):
        answer = await ask(client, body(60, n=4, max_tokens=200))
        assert answer.status_code == 200


SUMMARY = {
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Ships were seen."}}],
    "usage": {"prompt_tokens": 3000, "completion_tokens": 4, "total_tokens": 3004},
}


def summarising() -> Json:
    """Sections in which `s` makes the summaries of `m`."""
    return {
        "models": [{"name": "m", "targets": ["a/a-model"]}, {"name": "s", "targets": ["b/s-model"]}],
        "context": {"trim_strategy": "summary", "summary_model": "s"},
    }


async def test_the_bill_of_a_summary_is_no_error_of_our_count() -> None:
    async with upstream() as one, upstream() as two:
        two.play = lambda received: plain(json.dumps(SUMMARY).encode())
        sections = summarising()
        async with gateway(a=one.settings(4000), b=two.settings(None), sections=sections) as (running, client):
            answer = await ask(client, body(100))
            assert answer.status_code == 200
            assert facts_of(answer.headers["x-breakwater-context-trimmed"])[""] == "summary"
            await running.quiet()
            (outcome,) = [event for event in running.outcomes() if isinstance(event, RequestFinished)]
            assert outcome.usage is not None
            assert outcome.usage.input > 3000
            assert not outcome.counted


async def test_a_second_try_has_a_summary_too() -> None:
    refusals = [
        plain(
            json.dumps(
                {
                    "error": {
                        "message": "prompt is too long: 9000 tokens > 4000 maximum",
                        "type": "invalid_request_error",
                    }
                }
            ).encode(),
            400,
        )
    ]
    async with upstream() as one, upstream() as two:
        one.play = lambda received: refusals.pop() if refusals else plain(ANSWER)
        two.play = lambda received: plain(json.dumps(SUMMARY).encode())
        sections = summarising()
        async with gateway(a=one.settings(None), b=two.settings(None), sections=sections) as (_, client):
            answer = await ask(client, body(100))
            assert answer.status_code == 200
            assert facts_of(answer.headers["x-breakwater-context-trimmed"])[""] == "summary"
            assert "Ships were seen." in one.sent[1]["messages"][1]["content"]


async def test_a_summary_leaves_the_answer_half_of_the_time() -> None:
    """Of a request whose own deadline is nearer than the time that a summary may take."""
    async with upstream() as one, serve(asleep) as server:
        sleeper = {"kind": "openai", "base_url": f"http://127.0.0.1:{server.port}/v1"}
        async with gateway(a=one.settings(), b=sleeper, sections=summarising()) as (running, client):
            client.headers["x-breakwater-timeout-ms"] = "2000"
            answer = await ask(client, body(100))
            assert answer.status_code == 200
            facts = facts_of(answer.headers["x-breakwater-context-trimmed"])
            assert (facts[""], facts["fallback"]) == ("oldest", "timeout")
            await running.quiet()
            (outcome,) = [event for event in running.outcomes() if isinstance(event, RequestFinished)]
            assert outcome.overhead is not None
            assert outcome.overhead < 0.9  # the second of waiting is another model's


async def asleep(peer: Peer) -> None:
    """Takes a request, and says nothing until the other side has gone."""
    await peer.request()
    await peer.reader.read()


async def test_a_provider_that_counts_more_refuses_once_and_not_at_each_turn() -> None:
    """Else every turn of a long session would be sent twice, and be cut now at one place and now at another."""
    refused = 0

    def play(received: Received) -> bytes:
        nonlocal refused
        tokens = len(received.body) // 4  # about 1.4 times our count
        if tokens <= 4000:
            return plain(ANSWER)
        refused += 1
        message = f"prompt is too long: {tokens} tokens > 4000 maximum"
        return plain(json.dumps({"error": {"message": message, "type": "invalid_request_error"}}).encode(), 400)

    async with upstream() as one, gateway(a=one.settings(4000)) as (_, client):
        one.play = play
        cuts = []
        for count in range(30, 110):
            answer = await ask(client, body(count))
            assert answer.status_code == 200
            cuts.append(answer.headers.get("x-breakwater-context-trimmed", "").rpartition("cut=")[2])
        assert refused == 1
        assert len(set(cuts)) < 12
        assert sorted(cuts[10:], key=int) == cuts[10:]


async def test_a_second_try_that_nobody_waits_for_is_billed_as_what_was_sent() -> None:
    async with upstream() as one, gateway(a=one.settings(None)) as (running, client):
        held = asyncio.Event()

        def play(received: Received) -> bytes:
            one.release = held
            return plain(json.dumps(TOO_LONG).encode(), 400)

        one.play = play
        asking = asyncio.create_task(ask(client, body(60)))
        await until(lambda: len(one.bodies) == 2, "the second one")
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await running.quiet()
        (outcome,) = [event for event in running.outcomes() if isinstance(event, RequestFinished)]
        held.set()
        assert outcome.usage is not None
        assert outcome.usage.estimated
        assert 0 < outcome.usage.input < WINDOW


async def test_a_second_try_that_fails_is_repeated_as_short_as_it_was() -> None:
    plays = [plain(json.dumps(TOO_LONG).encode(), 400), plain(b'{"error":{"message":"down"}}', 500), plain(ANSWER)]
    sections = {"fault_tolerance": {"retry": {"base_delay_ms": 1}}}
    async with upstream() as one, gateway(a=one.settings(None), sections=sections) as (_, client):
        one.play = lambda received: plays.pop(0)
        answer = await ask(client, body(60))
        assert (answer.status_code, answer.headers["x-breakwater-attempts"]) == (200, "3")
        assert one.bodies[1] == one.bodies[2]
        assert len(one.bodies[1]) < len(one.bodies[0])
