"""Long conversations over real sockets: what each target is sent, and what the client is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import openai
import pytest

from proxy.observability.context_events import ContextTrimmed
from proxy.observability.events import RequestFinished, RequestRefused
from proxy.observability.upstream_events import UpstreamFailedOver
from tests.e2e.scene import ANSWER, plain
from tests.e2e.stack import Stack, stack
from tests.transport.servers import Peer, Received, serve

pytestmark = pytest.mark.anyio

Json = dict[str, Any]
Play = Callable[[Received], bytes]
WINDOW = 2000
SYSTEM: Json = {"role": "system", "content": "You keep a harbour. The code of the gate is 4711."}
TASK: Json = {"role": "user", "content": "Count the ships, and write the numbers down."}
TOO_LONG = {
    "error": {
        "message": "This model's maximum context length is 2000 tokens. However, your messages resulted in 4000 "
        "tokens.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
}


def turns(count: int, size: int = 60) -> list[Json]:
    """Rounds of a tool: one call and its result, about `size` tokens each."""
    found: list[Json] = []
    for number in range(count):
        call = {"id": f"call_{number}", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        found.append({"role": "assistant", "content": None, "tool_calls": [call]})
        found.append({"role": "tool", "tool_call_id": f"call_{number}", "content": f"{number}:" + " ship" * size})
    return found


def body(count: int, **more: Any) -> Json:
    return {"model": "m", "messages": [SYSTEM, TASK, *turns(count)], **more}


class Upstream:
    """A provider that records what it is sent and answers as it is told."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.play: Play = lambda received: plain(ANSWER)
        self.release: asyncio.Event | None = None
        """Until then it does not answer."""
        self.port = 0

    @property
    def sent(self) -> list[Json]:
        return [json.loads(one) for one in self.bodies]

    def settings(self, window: int | None = WINDOW, **more: Any) -> Json:
        facts = {} if window is None else {"models": {"*": {"context_window": window}}}
        return {"kind": "openai", "base_url": f"http://127.0.0.1:{self.port}/v1", **facts, **more}


@contextlib.asynccontextmanager
async def upstream() -> AsyncIterator[Upstream]:
    found = Upstream()

    async def script(peer: Peer) -> None:
        while True:
            received = await peer.request()
            found.bodies.append(received.body)
            if found.release is not None:
                await found.release.wait()
            await peer.send(found.play(received))

    async with serve(script) as server:
        found.port = server.port
        yield found


@contextlib.asynccontextmanager
async def gateway(**providers: Json) -> AsyncIterator[tuple[Stack, httpx2.AsyncClient]]:
    """`m` leads to all `providers` in their order; the keyword `sections` holds the rest of the configuration."""
    sections = providers.pop("sections", {})
    config = {
        "providers": providers,
        "models": [{"name": "m", "targets": [f"{name}/{name}-model" for name in providers]}],
        "listen": {"drain_ms": 0, "grace_ms": 1000},
        **sections,
    }
    async with (
        stack(config) as running,
        httpx2.AsyncClient(base_url=f"{running.url}/v1", timeout=20) as client,
    ):
        yield running, client


async def ask(client: httpx2.AsyncClient, sent: Json | bytes, path: str = "/chat/completions") -> httpx2.Response:
    content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    return await client.post(path, content=content, headers={"content-type": "application/json"})


def facts_of(header: str) -> dict[str, str]:
    """`a;b=1` as {"": "a", "b": "1"}."""
    parts = [part.rpartition("=") for part in header.split(";")]
    return {name: value for name, _, value in parts}


def trimmed(running: Stack) -> list[ContextTrimmed]:
    return [event for event in running.events if isinstance(event, ContextTrimmed)]


async def test_what_is_far_below_the_window_travels_as_it_came() -> None:
    sections = {"models": [{"name": "a-model", "targets": ["a/a-model"]}]}
    async with upstream() as one, gateway(a=one.settings(), sections=sections) as (running, client):
        sent = b'{ "model": "a-model",  "messages" : [{"role":"user","content":"\\u0041 \xc3\xa9"}] }'
        answer = await ask(client, sent)
        assert answer.status_code == 200
        assert one.bodies == [sent]
        facts = facts_of(answer.headers["x-breakwater-context-tokens"])
        assert facts["method"] == "bound"
        assert int(facts["limit"]) == WINDOW - 20
        assert "x-breakwater-context-trimmed" not in answer.headers
        assert not trimmed(running)


async def test_without_a_known_window_nothing_is_said() -> None:
    async with upstream() as one, gateway(a=one.settings(window=None)) as (_, client):
        answer = await ask(client, body(60))
        assert answer.status_code == 200
        assert not [name for name in answer.headers if "context" in name]
        assert one.sent[0]["messages"] == body(60)["messages"]


async def test_what_is_counted_and_fits_travels_as_it_came() -> None:
    async with upstream() as one, gateway(a=one.settings()) as (_, client):
        answer = await ask(client, body(20))
        facts = facts_of(answer.headers["x-breakwater-context-tokens"])
        assert facts["method"] == "counted"
        assert 1000 < int(facts["est"]) < WINDOW
        assert answer.headers["x-breakwater-context-trimmed"] == "none"
        assert one.sent[0]["messages"] == body(20)["messages"]


async def test_a_long_conversation_loses_its_oldest_rounds_and_nothing_else() -> None:
    async with upstream() as one, gateway(a=one.settings()) as (running, client):
        sent = body(60, temperature=0.5, tools=[{"type": "function", "function": {"name": "look"}}])
        answer = await ask(client, sent)
        assert answer.status_code == 200
        got = one.sent[0]
        assert {name: value for name, value in got.items() if name not in ("messages", "model")} == {
            name: value for name, value in sent.items() if name not in ("messages", "model")
        }
        messages = got["messages"]
        assert messages[0] == SYSTEM
        assert messages[1]["role"] == "user"
        assert messages[1]["content"].startswith("[breakwater] ")
        assert messages[2] == TASK
        kept = messages[3:]
        assert kept == sent["messages"][-len(kept) :]
        assert kept[0]["role"] == "assistant"
        facts = facts_of(answer.headers["x-breakwater-context-trimmed"])
        assert facts[""] == "oldest"
        assert int(facts["dropped"]) == len(sent["messages"]) - 2 - len(kept)
        assert int(facts["cut"]) == len(sent["messages"]) - len(kept)
        (event,) = trimmed(running)
        assert (event.mode, event.strategy, event.limit) == ("enforce", "oldest", WINDOW - 20)
        assert event.after <= event.limit < event.before
        page = (await client.get(f"{running.url}/metrics")).text
        assert 'breakwater_context_trims_total{strategy="oldest"} 1' in page
        assert f"breakwater_context_tokens_trimmed_total {event.before - event.after}" in page


async def test_the_cut_stays_until_the_limit_is_reached_again() -> None:
    async with upstream() as one, gateway(a=one.settings()) as (_, client):
        for count in range(30, 60):
            assert (await ask(client, body(count))).status_code == 200
        notes = [
            sent["messages"][1]["content"] for sent in one.sent if "[breakwater]" in sent["messages"][1]["content"]
        ]
        assert len(notes) > 20
        assert len(set(notes)) < 6
        for before, after in zip(one.sent, one.sent[1:], strict=False):
            first, second = before["messages"], after["messages"]
            if first[1] == second[1]:
                assert second[: len(first)] == first


async def test_the_sdk_streams_from_a_trimmed_conversation() -> None:
    config: Json = {"kind": "mock", "models": {"*": {"context_window": WINDOW}}}
    async with gateway(a=config) as (running, _):
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as sdk:
            stream = await sdk.chat.completions.create(model="m", messages=body(60)["messages"], stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        assert text
        await running.quiet()
        (outcome,) = [one for one in running.outcomes() if isinstance(one, RequestFinished)]
        assert outcome.usage is not None


# -- several targets -------------------------------------------------------------------------------------------------


async def test_a_failover_to_a_smaller_window_trims_again() -> None:
    async with upstream() as large, upstream() as small:
        large.play = lambda received: plain(b'{"error":{"message":"down"}}', 500)
        async with gateway(large=large.settings(100_000), small=small.settings()) as (running, client):
            answer = await ask(client, body(60))
            assert answer.status_code == 200
            assert answer.headers["x-breakwater-provider"] == "small"
            assert large.sent[0]["messages"] == body(60)["messages"]
            assert len(small.sent[0]["messages"]) < 60
            assert small.sent[0]["messages"][0] == SYSTEM
            assert [event.target for event in trimmed(running)] == ["small/small-model"]


async def test_a_target_that_can_not_hold_what_must_stay_is_skipped() -> None:
    async with upstream() as small, upstream() as large:
        sizes = {"small": small.settings(100), "large": large.settings(100_000)}
        async with gateway(**sizes) as (running, client):
            answer = await ask(client, body(20))
            assert answer.status_code == 200
            assert answer.headers["x-breakwater-provider"] == "large"
            assert not small.bodies
            (moved,) = [event for event in running.events if isinstance(event, UpstreamFailedOver)]
            assert moved.reason == "context_length"


@pytest.mark.parametrize("stream", [False, True])
async def test_where_no_target_can_hold_it_the_client_is_told_the_figures(stream: bool) -> None:
    async with upstream() as one, upstream() as two:
        sizes = {"one": one.settings(100), "two": two.settings(90)}
        async with gateway(**sizes) as (running, client):
            answer = await ask(client, body(20, stream=stream))
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert (error["code"], error["type"], error["param"]) == (
                "context_length_exceeded",
                "invalid_request_error",
                "messages",
            )
            figures = error["breakwater"]
            assert figures["limit"] == 99
            assert figures["limit"] < figures["pinned"] < figures["tokens"]
            assert 0 < figures["newest"] < figures["pinned"]
            assert not one.bodies
            assert not two.bodies
            await running.quiet()
            (outcome,) = running.outcomes()
            assert isinstance(outcome, RequestRefused)
            assert outcome.code == "context_length_exceeded"


# -- modes and settings ----------------------------------------------------------------------------------------------


async def test_without_the_check_the_provider_has_the_last_word() -> None:
    async with upstream() as one:
        one.play = lambda received: plain(json.dumps(TOO_LONG).encode(), 400)
        async with gateway(a=one.settings(100), sections={"context": {"preflight_check": False}}) as (_, client):
            answer = await ask(client, body(20))
            assert (answer.status_code, answer.json()) == (400, TOO_LONG)
            assert len(one.bodies) == 1
            assert one.sent[0]["messages"][0] == SYSTEM


async def test_observing_changes_no_byte_and_says_what_would_be() -> None:
    sections = {"context": {"mode": "observe"}, "models": [{"name": "a-model", "targets": ["a/a-model"]}]}
    async with upstream() as one, gateway(a=one.settings(), sections=sections) as (running, client):
        sent = json.dumps(body(60, model="a-model")).encode()
        answer = await ask(client, sent)
        assert one.bodies == [sent]
        facts = facts_of(answer.headers["x-breakwater-context-trimmed"])
        assert (facts[""], facts["mode"]) == ("oldest", "observe")
        (event,) = trimmed(running)
        assert event.mode == "observe"
        page = (await client.get(f"{running.url}/metrics")).text
        assert "breakwater_context_trims_total{" not in page
        answer = await ask(
            client,
            json.dumps({"model": "a-model", "messages": [TASK, {"role": "user", "content": "x " * 3000}]}).encode(),
        )
        assert answer.status_code == 200
        assert answer.headers["x-breakwater-context-trimmed"] == "none;reason=cannot_fit"


async def test_switched_off_nothing_is_looked_at() -> None:
    async with upstream() as one, gateway(a=one.settings(), sections={"context": False}) as (_, client):
        answer = await ask(client, body(60))
        assert answer.status_code == 200
        assert one.sent[0]["messages"] == body(60)["messages"]
        assert not [name for name in answer.headers if "context" in name]


async def test_a_tenant_has_a_section_of_its_own() -> None:
    key, other = "bw-acme-0123456789abcdef", "bw-beta-0123456789abcdef"
    sections = {
        "context": {"max_tokens": 1500},
        "tenants": [
            {"name": "acme", "keys": [key], "context": {"max_tokens": 800, "trim_to": 0.5}},
            {"name": "beta", "keys": [other]},
        ],
    }
    async with upstream() as one, gateway(a=one.settings(), sections=sections) as (running, client):
        for bearer in (key, other):
            client.headers["authorization"] = f"Bearer {bearer}"
            assert (await ask(client, body(60))).status_code == 200
        assert [event.limit for event in trimmed(running)] == [800, 1500]
        assert trimmed(running)[0].after <= 800


async def test_a_minute_of_the_budget_is_a_limit_too() -> None:
    """Else a conversation would one day be larger than any minute, and be refused for ever."""
    sections = {"budget": {"tokens_per_minute": 1000}}
    async with upstream() as one, gateway(a=one.settings(), sections=sections) as (running, client):
        answer = await ask(client, body(60, max_tokens=100))
        assert answer.status_code == 200
        (event,) = trimmed(running)
        assert event.limit == 900
        assert event.after <= 900


async def test_what_just_fits_into_a_minute_is_not_refused_for_the_reply_that_it_may_get() -> None:
    sections = {"budget": {"tokens_per_minute": 1000}}
    async with upstream() as one, gateway(a=one.settings(None), sections=sections) as (running, client):
        answer = await ask(client, body(12))
        assert answer.status_code == 200
        assert not trimmed(running)


async def test_the_budget_reserves_what_is_sent() -> None:
    sections = {"budget": {"tokens_per_minute": 100_000}}
    async with upstream() as one, gateway(a=one.settings(), sections=sections) as (_, client):
        answer = await ask(client, body(400, max_tokens=10))
        left = int(answer.headers["x-ratelimit-remaining-tokens"])
        assert 100_000 - WINDOW - 100 <= left < 100_000


# -- the provider finds it too long ----------------------------------------------------------------------------------


def refusing_once(refusal: Json, status: int = 400) -> Play:
    left = [refusal]

    def play(received: Received) -> bytes:
        return plain(json.dumps(left.pop()).encode(), status) if left else plain(ANSWER)

    return play


async def test_an_unknown_window_is_found_out_by_one_refusal() -> None:
    async with upstream() as one, gateway(a=one.settings(None)) as (running, client):
        one.play = refusing_once(TOO_LONG)
        answer = await ask(client, body(60))
        assert answer.status_code == 200
        assert answer.headers["x-breakwater-attempts"] == "2"
        assert len(one.sent[0]["messages"]) == 122
        assert len(one.sent[1]["messages"]) < 80
        assert one.sent[1]["messages"][0] == SYSTEM
        assert len(trimmed(running)) == 1
        answer = await ask(client, body(61))  # it is known now
        assert answer.headers["x-breakwater-attempts"] == "1"
        assert len(one.bodies) == 3
        assert facts_of(answer.headers["x-breakwater-context-tokens"])["limit"] == "1980"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_without_figures_cuts_a_tenth_off(stream: bool) -> None:
    refusal = {
        "error": {
            "message": "Please reduce the length of the messages or completion.",
            "type": "invalid_request_error",
            "code": "context_length_exceeded",
        }
    }
    async with upstream() as one, gateway(a=one.settings(None)) as (_, client):
        one.play = refusing_once(refusal)
        answer = await ask(client, body(60, stream=stream))
        assert answer.status_code == 200
        assert len(one.bodies) == 2
        assert len(one.sent[1]["messages"]) < 122


async def test_a_provider_that_names_no_window_is_believed_all_the_same() -> None:
    """A session goes on beyond the size at which it was refused first, and each turn costs one call."""
    message = "Please reduce the length of the messages or completion."
    refusal = {"error": {"message": message, "type": "invalid_request_error", "code": "context_length_exceeded"}}

    def play(received: Received) -> bytes:
        long = len(received.body) > 20_000
        return plain(json.dumps(refusal).encode(), 400) if long else plain(ANSWER)

    async with upstream() as one, gateway(a=one.settings(None)) as (_, client):
        one.play = play
        answers = [await ask(client, body(count)) for count in range(30, 90)]
        assert {answer.status_code for answer in answers} == {200}
        attempts = [int(answer.headers["x-breakwater-attempts"]) for answer in answers]
        assert sum(attempts) <= len(answers) + 3


async def test_it_is_tried_once_more_and_not_twice() -> None:
    async with upstream() as one, gateway(a=one.settings(None)) as (running, client):
        one.play = lambda received: plain(json.dumps(TOO_LONG).encode(), 400)
        answer = await ask(client, body(60))
        assert (answer.status_code, answer.json()) == (400, TOO_LONG)
        assert len(one.bodies) == 2
        await running.quiet()
        (outcome,) = running.outcomes()
        assert isinstance(outcome, RequestFinished)
        assert outcome.usage is None


async def test_where_nothing_can_go_the_refusal_is_passed() -> None:
    async with upstream() as one, gateway(a=one.settings(None)) as (_, client):
        one.play = lambda received: plain(json.dumps(TOO_LONG).encode(), 400)
        answer = await ask(client, {"model": "m", "messages": [SYSTEM, {"role": "user", "content": "word " * 5000}]})
        assert (answer.status_code, answer.json()) == (400, TOO_LONG)
        assert len(one.bodies) == 1


# -- shapes ----------------------------------------------------------------------------------------------------------


async def test_what_is_not_understood_is_refused_or_sent_untouched_and_never_repaired() -> None:
    orphan = {"role": "tool", "tool_call_id": "nobody", "content": "lost"}
    sent = body(60)
    sent["messages"].insert(40, orphan)
    async with upstream() as one:
        async with gateway(a=one.settings()) as (_, client):
            answer = await ask(client, sent)
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", "messages[40]")
            assert error["breakwater"]["reason"] == "orphan_result"
            assert not one.bodies
        async with gateway(a=one.settings(), sections={"context": {"preflight_check": False}}) as (_, client):
            answer = await ask(client, sent)
            assert answer.status_code == 200
            assert one.sent[0]["messages"] == sent["messages"]
            assert answer.headers["x-breakwater-context-trimmed"] == "none;reason=orphan_result"


def items(count: int) -> list[Json]:
    found: list[Json] = [
        {"role": "developer", "content": "Keep a harbour."},
        {"role": "user", "content": "Count the ships."},
    ]
    for number in range(count):
        found += [
            {"type": "reasoning", "id": f"rs_{number}", "summary": [], "encrypted_content": "x" * 80},
            {"type": "function_call", "call_id": f"c{number}", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": f"c{number}", "output": f"{number}:" + " ship" * 60},
        ]
    return found


async def test_items_of_a_response_stay_with_the_reasoning_before_them() -> None:
    async with upstream() as one, gateway(a=one.settings()) as (_, client):
        answer = await ask(client, {"model": "m", "input": items(60), "store": False}, "/responses")
        assert answer.status_code == 200
        sent = one.sent[0]["input"]
        assert sent[0] == items(0)[0]
        assert sent[1]["content"].startswith("[breakwater] ")
        assert sent[2] == items(0)[1]
        assert [item["type"] for item in sent[3:]] == ["reasoning", "function_call", "function_call_output"] * (
            len(sent[3:]) // 3
        )


async def test_history_that_the_provider_keeps_is_not_touched_and_the_header_says_so() -> None:
    async with upstream() as one, gateway(a=one.settings()) as (_, client):
        sent = {"model": "m", "input": items(60), "previous_response_id": "resp_1", "store": False}
        answer = await ask(client, sent, "/responses")
        assert answer.status_code == 200
        assert one.sent[0]["input"] == items(60)
        assert answer.headers["x-breakwater-context-trimmed"] == "none;reason=previous_response_id"


async def test_a_provider_that_shortens_by_itself_is_let_do_it() -> None:
    async with upstream() as one, gateway(a=one.settings()) as (_, client):
        answer = await ask(
            client, {"model": "m", "input": items(60), "truncation": "auto", "store": False}, "/responses"
        )
        assert answer.status_code == 200
        assert one.sent[0]["input"] == items(60)


@pytest.mark.parametrize(
    ("path", "sent", "param"),
    [
        ("/completions", {"prompt": "word " * 4000}, "prompt"),
        ("/responses", {"input": "word " * 4000, "store": False}, "input"),
    ],
)
async def test_one_text_that_does_not_fit_is_refused(path: str, sent: Json, param: str) -> None:
    async with upstream() as one, gateway(a=one.settings()) as (_, client):
        answer = await ask(client, {"model": "m", **sent}, path)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert not one.bodies


async def test_an_image_counts_by_its_formula() -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]}
    async with upstream() as one, gateway(a=one.settings()) as (_, client):
        answer = await ask(client, {"model": "m", "messages": [SYSTEM, TASK, image, *turns(25)]})
        assert answer.status_code == 200
        assert facts_of(answer.headers["x-breakwater-context-trimmed"])["dropped"] != "0"


async def test_old_outputs_are_masked_before_anything_is_removed() -> None:
    sections = {"context": {"mask_tool_outputs": True}}
    async with upstream() as one, gateway(a=one.settings(), sections=sections) as (running, client):
        answer = await ask(client, body(30))
        assert answer.status_code == 200
        messages = one.sent[0]["messages"]
        assert len(messages) == 62
        masked = [one for one in messages if "output removed by proxy" in str(one.get("content"))]
        assert masked
        assert messages[-1] == body(30)["messages"][-1]
        assert int(facts_of(answer.headers["x-breakwater-context-trimmed"])["masked"]) == len(masked)
        (event,) = trimmed(running)
        assert (event.dropped, event.masked) == (0, len(masked))
