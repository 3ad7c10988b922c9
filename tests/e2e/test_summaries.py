"""Summaries over real sockets: who makes them, who pays, and what is sent when there is none."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest

from proxy.observability.events import RequestFinished
from tests.e2e.scene import ANSWER, plain, until
from tests.e2e.stack import Stack
from tests.e2e.test_context import SYSTEM, TASK, Json, Upstream, ask, body, facts_of, gateway, trimmed, upstream
from tests.redis_server import RedisServer, redis_binary, running

pytestmark = pytest.mark.anyio
__all__ = ["redis_binary"]  # a fixture, found here by pytest

PRICE = {"input": 1000, "output": 1000}


def said(text: str, finish: str = "stop", usage: int = 100) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    figures = {"prompt_tokens": usage, "completion_tokens": 10, "total_tokens": usage + 10}
    return plain(json.dumps({"id": "c", "object": "chat.completion", "choices": [choice], "usage": figures}).encode())


def settings(**more: Any) -> Json:
    """`m` is answered by `a`, summaries are made by `maker`, which `s` answers."""
    return {
        "models": [{"name": "m", "targets": ["a/a-model"]}, {"name": "maker", "targets": ["s/s-model"]}],
        "context": {
            "trim_strategy": "summary",
            "summary_model": "maker",
            "max_tokens": 4000,
            **more.pop("context", {}),
        },
        **more,
    }


async def turn(client: httpx2.AsyncClient, count: int, **more: Any) -> httpx2.Response:
    answer = await ask(client, body(count, **more))
    assert answer.status_code == 200
    return answer


async def done(running_: Stack) -> list[RequestFinished]:
    await running_.quiet()
    return [one for one in running_.outcomes() if isinstance(one, RequestFinished)]


async def test_what_is_gone_is_summarised_once_for_each_cut_and_on_the_bill_of_the_request() -> None:
    async with upstream() as main, upstream() as maker:
        maker.play = lambda received: said("Facts - three ships.")
        places = {"a": main.settings(None, models={"*": {"price": PRICE}}), "s": maker.settings(None)}
        async with gateway(**places, sections=settings(budget={"tokens_per_minute": 1_000_000})) as (stack_, client):
            answer = await turn(client, 100)
            note = main.sent[0]["messages"][1]
            assert note["role"] == "user"
            assert note["content"].startswith("[breakwater] Summary of ")
            assert note["content"].endswith("made by maker:\nFacts - three ships.")
            assert main.sent[0]["messages"][0] == SYSTEM
            assert main.sent[0]["messages"][2] == TASK
            assert facts_of(answer.headers["x-breakwater-context-trimmed"])[""] == "summary"
            asked = maker.sent[0]
            assert (asked["model"], "tools" in asked, "stream" in asked) == ("s-model", False, False)
            assert "0: ship" in asked["messages"][1]["content"]
            await turn(client, 101)
            assert len(maker.bodies) == 1
            assert main.sent[1]["messages"][1] == note
            await turn(client, 200)  # the cut has moved: the summary before goes into the next one
            assert len(maker.bodies) == 2
            assert "Facts - three ships." in maker.sent[1]["messages"][1]["content"]
            first, second, _ = await done(stack_)
            assert first.usage is not None
            assert second.usage is not None
            assert first.usage.total == second.usage.total + 110
            assert first.attempts == 1
            assert {event.strategy for event in trimmed(stack_)} == {"summary"}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (plain(b'{"error":{"message":"down","type":"server_error"}}', 500), "upstream"),
        (plain(b'{"error":{"message":"no","type":"invalid_request_error"}}', 400), "upstream"),
        (said("Error: the service is overloaded, please try again later."), "upstream"),
        (said("I'm sorry, but I can't help with that."), "refused"),
        (said("Facts - thr", finish="length"), "cut_off"),
        (said(""), "empty"),
        (said("ship " * 2000), "too_long"),
        (plain(ANSWER), "malformed"),
    ],
)
async def test_every_failure_falls_back_and_says_so(answer: bytes, reason: str) -> None:
    async with upstream() as main, upstream() as maker:
        maker.play = lambda received: answer
        sections = settings(fault_tolerance={"retry": {"max_attempts": 1}})
        places = {"a": main.settings(None), "s": maker.settings(None)}
        async with gateway(**places, sections=sections) as (stack_, client):
            got = await turn(client, 100)
            facts = facts_of(got.headers["x-breakwater-context-trimmed"])
            assert (facts[""], facts["fallback"]) == ("oldest", reason)
            note = main.sent[0]["messages"][1]["content"]
            assert note.endswith("removed to fit the context window.")
            again = await turn(client, 100)  # it is not asked again at once
            assert facts_of(again.headers["x-breakwater-context-trimmed"])["fallback"] == reason
            assert len(maker.bodies) == 1
            (event, _) = trimmed(stack_)
            assert (event.strategy, event.fallback) == ("oldest", reason)


async def test_a_summary_that_the_budget_has_no_room_for_is_not_made() -> None:
    async with upstream() as main, upstream() as maker:
        maker.play = lambda received: said("Facts - three ships.")
        sections = settings(budget={"tokens_per_minute": 5000})
        async with gateway(a=main.settings(None), s=maker.settings(None), sections=sections) as (_, client):
            got = await turn(client, 100, max_tokens=500)
            assert facts_of(got.headers["x-breakwater-context-trimmed"])["fallback"] == "budget"
            assert not maker.bodies


async def test_a_client_that_leaves_during_a_summary_leaves_nothing_behind() -> None:
    async with upstream() as main, upstream() as maker:
        release = asyncio.Event()
        maker.play = lambda received: said("Facts - three ships.")
        sections = settings(budget={"tokens_per_minute": 1_000_000})
        async with gateway(a=main.settings(None), s=slow(maker, release), sections=sections) as (stack_, client):
            asking = asyncio.create_task(ask(client, body(100)))
            await until(lambda: maker.bodies, "the summary to be asked for")
            other = asyncio.create_task(ask(client, body(100)))
            await until(lambda: stack_.running.gateway.in_flight == 2, "the second request")
            asking.cancel()
            await until(lambda: len(maker.bodies) == 2, "the one that waited to take over")
            release.set()
            answer = await other
            assert answer.status_code == 200
            assert facts_of(answer.headers["x-breakwater-context-trimmed"])[""] == "summary"
            await stack_.quiet()
            (row,) = [one for one in await stack_.running.budget.report() if one.kind == "tenant"]
            assert {window.reserved for window in row.windows if window.reserved is not None} == {0}


def slow(maker: Upstream, release: asyncio.Event) -> Json:
    """The provider of summaries answers when it is released."""
    maker.release = release
    return maker.settings(None)


@pytest.fixture
def server(redis_binary: object, tmp_path: Any) -> Any:
    with running(tmp_path) as found:
        yield found


async def test_all_processes_send_the_same_summary(server: RedisServer) -> None:
    async with upstream() as main, upstream() as maker:
        texts = iter(("Facts - one.", "Facts - two."))
        maker.play = lambda received: said(next(texts))
        places = {"a": main.settings(None), "s": maker.settings(None)}
        sections = settings(state=server.url, state_timeout_ms=2000)
        for _ in range(2):
            async with gateway(**places, sections=sections) as (_, client):
                await turn(client, 100)
        assert main.sent[0] == main.sent[1]
        assert len(maker.bodies) == 1
