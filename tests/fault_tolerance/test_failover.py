"""The attempts of one request, over real providers without a network: who is asked, who pays, who hears of it."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from proxy.budget.plan import want_of
from proxy.budget.settings import BudgetSettings, LimitSettings
from proxy.context.base import Whole
from proxy.errors import (
    BudgetExceeded,
    ContextExceeded,
    InvalidRequest,
    ProviderFull,
    UpstreamBroken,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.providers.openai import Timeouts
from proxy.transport.answer import NEVER, Answer, End, Outcome
from proxy.types import Ask, Target
from tests.fault_tolerance.scene import Stage, Switches
from tests.providers.upstream import HEADERS, MESSAGES, ask, chat, events, whole

pytestmark = pytest.mark.anyio

A, B = Target("a", "", "m"), Target("b", "", "m")

REPLY = {"choices": [{"message": {"content": "Hi"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
CHUNK = b'{"choices":[{"index":0,"delta":{"content":"Hi"}}]}'
ROLE = b'{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}'
GOOD = whole(REPLY)
DOWN = whole(b"{}", 500)
HANGS = Answer(200, [], delay=NEVER, end=End.STALL)
SHORT = {"timeouts": Timeouts(0.05, 0.05, 0.05)}
QUOTA = b'{"error":{"type":"insufficient_quota","code":"insufficient_quota","message":"You exceeded your quota."}}'


def limited(seconds: bytes = b"1") -> Answer:
    return whole(b"{}", 429, (b"retry-after", seconds))


def entries(error: UpstreamError) -> list[tuple[str, int | None, str]]:
    return [(one["target"], one["status"], one["reason"]) for one in error.details["attempts"]]


async def test_a_request_that_is_served_at_once_is_one_attempt() -> None:
    stage = Stage()
    stage.add("a", GOOD)
    stage.add("b", GOOD)
    assert b"Hi" in await stage.run()
    assert stage.asked == {"a": 1, "b": 0}
    assert (stage.record.attempts, stage.record.provider, stage.record.elsewhere) == (1, "a", 0.0)
    assert (stage.told(), stage.waits, stage.bounds.calls) == ([], [], 5)
    assert stage.circuits.told == [("a", "succeeded")]


@pytest.mark.parametrize(
    ("answer", "reason", "told"),
    [
        (DOWN, "server_error", "failed: server_error"),
        (whole(b"{}", 503), "overloaded", "failed: overloaded"),
        (whole(b"{}", 529), "overloaded", "failed: overloaded"),
        (whole(b"{}", 504), "server_error", "failed: server_error"),
        (whole(b"{}", 302), "redirect", "failed: redirect"),
        (whole(b"{}", 401), "credential", "failed: credential"),
        (whole(b"{}", 402), "quota", "failed: quota"),
        (whole(b"{}", 403), "credential", "failed: credential"),
        (whole(QUOTA, 429), "quota", "failed: quota"),
        (limited(), "rate_limited", "failed: rate_limited"),
        (whole(b"<html>"), "protocol", "failed: protocol"),
        (whole(b'{"error":{"message":"down","type":"server_error"}}'), "error_event", "failed: error_event"),
        (Answer(200, [], delay=NEVER, end=End.RESET), "reset", "failed: reset"),
        (HANGS, "upstream_timeout", "failed: upstream_timeout"),
    ],
)
async def test_a_healthy_next_target_is_asked_at_once(answer: Answer, reason: str, told: str) -> None:
    stage = Stage()
    stage.add("a", answer, **SHORT)
    stage.add("b", GOOD)
    assert b"Hi" in await stage.run()
    assert stage.asked == {"a": 1, "b": 1}
    assert stage.waits == []
    assert stage.told() == [("failed over", "a", "b", reason)]
    assert (stage.record.attempts, stage.record.provider, stage.record.upstream_status) == (2, "b", 200)
    assert stage.circuits.told == [("a", told), ("b", "succeeded")]


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
async def test_the_client_s_own_fault_is_passed_and_sent_nowhere_else(status: int) -> None:
    stage = Stage()
    stage.add("a", whole(b'{"error":{"code":"context_length_exceeded"}}', status))
    stage.add("b", GOOD)
    assert b"context_length_exceeded" in await stage.run()
    assert stage.asked == {"a": 1, "b": 0}
    assert stage.circuits.told == [("a", "ignored")]


@pytest.mark.parametrize("status", [401, 402, 403])
async def test_a_caller_s_own_key_is_the_caller_s_affair(status: int) -> None:
    stage = Stage()
    stage.add("a", whole(b'{"error":{"message":"your key"}}', status), callers_key=True)
    stage.add("b", GOOD)
    assert b"your key" in await stage.run()
    assert stage.asked == {"a": 1, "b": 0}
    assert stage.providers["a"].resting("a") is None


async def test_a_return_to_the_same_target_waits_with_jitter() -> None:
    stage = Stage()
    stage.add("a", DOWN, DOWN, GOOD)
    assert b"Hi" in await stage.run()
    assert stage.waits == [0.5, 1.0]
    assert stage.told() == [("retried", "a", "server_error")] * 2
    assert stage.record.attempts == 3


async def test_what_a_provider_asks_for_is_waited_for() -> None:
    stage = Stage(sleep=asyncio.sleep, base_delay=0.02)
    stage.add("a", whole(b"{}", 429, (b"retry-after-ms", b"60")), GOOD)
    started = asyncio.get_running_loop().time()
    assert b"Hi" in await stage.run()
    assert asyncio.get_running_loop().time() - started >= 0.06
    assert stage.told() == [("retried", "a", "rate_limited")]


async def test_a_longer_wait_than_allowed_is_passed_on() -> None:
    stage = Stage()
    stage.add("a", limited(b"3600"))
    with pytest.raises(UpstreamRateLimited) as raised:
        await stage.run()
    assert stage.asked == {"a": 1}
    assert raised.value.headers == [(b"retry-after", b"3600"), (b"x-should-retry", b"false")]


async def test_so_is_that_of_a_provider_that_is_down() -> None:
    stage = Stage()
    stage.add("a", whole(b"{}", 503, (b"retry-after", b"60")))
    with pytest.raises(UpstreamUnavailable) as raised:
        await stage.run()
    assert stage.asked == {"a": 1}
    assert raised.value.headers == [(b"retry-after", b"60"), (b"x-should-retry", b"false")]
    stage.add("b", whole(b"{}", 504, (b"retry-after", b"40")))
    with pytest.raises(UpstreamUnavailable) as raised:
        await stage.run()
    assert raised.value.headers == [(b"retry-after", b"40"), (b"x-should-retry", b"false")]
    stage.add("c", whole(b"{}", 401))  # nobody knows when
    with pytest.raises(UpstreamUnavailable) as raised:
        await stage.run()
    assert raised.value.headers == [(b"x-should-retry", b"false")]


async def test_while_its_only_credential_rests_a_target_is_not_asked() -> None:
    stage = Stage()
    stage.add("a", limited(b"3600"), GOOD)
    stage.add("b", GOOD)
    await stage.run("a/m", "b/m")
    await stage.run("a/m", "b/m")
    assert stage.asked == {"a": 1, "b": 2}
    assert stage.told() == [("failed over", "a", "b", "rate_limited")] * 2
    with pytest.raises(UpstreamRateLimited) as raised:
        await stage.run("a/m")
    assert entries(raised.value) == [("a/m", None, "rate_limited")]
    (after,) = [value for name, value in raised.value.headers if name == b"retry-after"]
    assert 290 <= int(after) <= 300
    assert await stage.run("a/other-model")


@pytest.mark.parametrize("status", [401, 429])
async def test_the_next_key_of_the_same_provider_is_used_at_once(status: int) -> None:
    stage = Stage()
    upstream = stage.add("a", whole(b"{}", status), GOOD, api_keys=["sk-one", "sk-two"])
    stage.add("b", GOOD)
    await stage.run()
    first, second = (asked.header(b"authorization") for asked in upstream.asked)
    assert first != second
    assert (stage.waits, stage.asked["b"]) == ([], 0)
    assert [told[:2] for told in stage.told()] == [("retried", "a")]
    await stage.run()
    await stage.run()
    assert upstream.asked[2].header(b"authorization") == upstream.asked[3].header(b"authorization") == second


async def test_a_client_s_key_never_meets_the_pool() -> None:
    stage = Stage()
    upstream = stage.add("a", limited(), callers_key=True)
    for _ in range(2):
        with pytest.raises(UpstreamRateLimited):
            await stage.run(ask=chat(headers=[*HEADERS, (b"authorization", b"Bearer sk-mine")]))
    assert len(upstream.asked) == 8  # nothing rests


async def test_an_account_without_quota_is_the_caller_s_affair_with_the_caller_s_key() -> None:
    stage = Stage()
    stage.add("a", whole(QUOTA, 429), callers_key=True)
    assert await stage.run() == QUOTA


# --- bounds ---------------------------------------------------------------------------------------------------------


async def test_attempts_are_bounded_over_all_targets_and_every_one_is_listed() -> None:
    stage = Stage(max_attempts=3)
    stage.add("a", DOWN)
    stage.add("b", whole(b"{}", 401))
    with pytest.raises(UpstreamUnavailable) as raised:
        await stage.run()
    found = entries(raised.value)
    assert found == [("a", 500, "server_error"), ("b", 401, "credential"), ("a", 500, "server_error")]
    assert all(one["ms"] >= 0 for one in raised.value.details["attempts"])
    assert (raised.value.status, raised.value.code) == (503, "upstream_unavailable")
    assert (b"x-should-retry", b"false") in raised.value.headers


async def test_calls_are_bounded_over_everything() -> None:
    stage = Stage(max_calls=2, max_attempts=10)
    stage.add("a", DOWN)
    with pytest.raises(UpstreamUnavailable):
        await stage.run()
    assert stage.asked == {"a": 2}
    assert stage.bounds.calls == 0


async def test_the_retry_budget_bounds_what_a_dying_provider_gets() -> None:
    stage = Stage(max_attempts=2)
    stage.add("a", DOWN)
    with pytest.raises(UpstreamUnavailable):
        await stage.run()
    failover = stage.failover
    assert stage.asked == {"a": 2}
    failover.budgets["a"].balance = 0.0
    hold = stage.scene.budget.hold("acme", "", want_of(chat()), [A], stage.record)
    with pytest.raises(UpstreamUnavailable):
        async with hold as charge, failover.open(chat(), [A], charge, stage.record, failover.bounds(chat().call)):
            pass
    assert stage.asked == {"a": 3}


async def test_one_deadline_holds_over_everything() -> None:
    stage = Stage(deadline=0.1, sleep=asyncio.sleep)
    stage.add("a", HANGS)
    stage.add("b", GOOD)
    with pytest.raises(UpstreamTimeout) as raised:
        await stage.run()
    assert stage.asked == {"a": 1, "b": 0}
    assert entries(raised.value)[0][2] == "upstream_timeout"
    assert stage.circuits.told == [("a", "failed: upstream_timeout")]  # it had all the time that a request has


async def test_an_attempt_that_had_only_the_rest_of_the_time_is_no_evidence() -> None:
    stage = Stage(deadline=1.0)
    stage.add("a", HANGS, timeouts=Timeouts(0.8, 0.8, 0.8))
    stage.add("b", HANGS)
    with pytest.raises(UpstreamTimeout):
        await stage.run()
    assert stage.circuits.told == [("a", "failed: upstream_timeout"), ("b", "ignored")]


@pytest.mark.parametrize("wanted", [b"80", b"0080"])
async def test_the_client_may_lower_it_and_its_hurry_is_no_evidence(wanted: bytes) -> None:
    stage = Stage(deadline=0.1)
    stage.add("a", HANGS)
    asking = chat()
    asking.call.timeout_ms = wanted
    async with asyncio.timeout(5):
        with pytest.raises(UpstreamTimeout):
            await stage.run(ask=asking)
    assert stage.circuits.told == [("a", "ignored")]


async def test_the_client_cannot_raise_it() -> None:
    stage = Stage(deadline=0.05)
    stage.add("a", HANGS)
    asking = chat()
    asking.call.timeout_ms = b"9999999999"
    async with asyncio.timeout(5):
        with pytest.raises(UpstreamTimeout):
            await stage.run(ask=asking)


@pytest.mark.parametrize("wanted", [b"0", b"-1", b"1.5", b"", b"1e3", "١".encode(), b"1" * 11])
async def test_a_time_that_is_none_is_refused(wanted: bytes) -> None:
    stage = Stage()
    stage.add("a", GOOD)
    asking = chat()
    asking.call.timeout_ms = wanted
    with pytest.raises(InvalidRequest):
        await stage.run(ask=asking)
    assert stage.asked == {"a": 0}


async def test_after_the_deadline_nothing_is_sent() -> None:
    stage = Stage(deadline=-1.0)
    stage.add("a", GOOD)
    with pytest.raises(UpstreamTimeout) as raised:
        await stage.run()
    assert stage.asked == {"a": 0}
    assert raised.value.details["attempts"] == []


async def after(seconds: float, work: Any, *words: Any, **more: Any) -> Any:
    await asyncio.sleep(seconds)
    return await work(*words, **more)


@pytest.mark.parametrize(
    "error", [DOWN, limited(), whole(b"{}", 401), Answer(0, [], end=End.RESET)], ids=["500", "429", "401", "reset"]
)
async def test_whatever_came_before_a_deadline_that_has_passed_is_a_timeout(error: Answer) -> None:
    """The time is over when the second one would be sent, and nothing is."""
    stage = Stage(deadline=0.4)
    stage.add("a", error)
    stage.add("b", GOOD)
    for name, seconds in (("a", 0.35), ("b", 0.1)):
        provider = stage.providers[name]
        provider.open = partial(after, seconds, provider.open)
    with pytest.raises(UpstreamTimeout) as raised:
        await stage.run()
    assert (raised.value.status, stage.asked) == (504, {"a": 1, "b": 0})
    assert entries(raised.value)[1:] == [("b", None, "timeout")]
    assert stage.circuits.told[-1] == ("b", "ignored")
    assert stage.record.usage is None  # what was not sent costs nothing


async def test_what_may_not_be_sent_twice_is_not() -> None:
    stage = Stage()
    stage.add("a", DOWN)
    stage.add("b", GOOD)
    stored = ask({"model": "m", "messages": MESSAGES, "store": True})
    with pytest.raises(UpstreamUnavailable):
        await stage.run(ask=stored)
    assert stage.asked == {"a": 1, "b": 0}


# --- the final error ------------------------------------------------------------------------------------------------


async def test_where_every_target_says_429_so_do_we_with_the_shortest_wait() -> None:
    stage = Stage()
    stage.add("a", limited(b"100"))
    stage.add("b", limited(b"40"))
    with pytest.raises(UpstreamRateLimited) as raised:
        await stage.run()
    (after,) = [int(value) for name, value in raised.value.headers if name == b"retry-after"]
    assert 39 <= after <= 40
    assert (b"x-should-retry", b"false") in raised.value.headers


async def test_where_every_target_times_out_so_do_we() -> None:
    stage = Stage()
    stage.add("a", HANGS, **SHORT)
    stage.add("b", HANGS, **SHORT)
    with pytest.raises(UpstreamTimeout) as raised:
        await stage.run()
    assert stage.asked == {"a": 1, "b": 1}
    assert len(raised.value.details["attempts"]) == 2


async def test_a_mixture_is_unavailable() -> None:
    stage = Stage()
    stage.add("a", limited(b"100"))
    stage.add("b", whole(b"{}", 401))
    with pytest.raises(UpstreamUnavailable):
        await stage.run()


# --- circuits -------------------------------------------------------------------------------------------------------


async def test_an_open_circuit_is_passed_over() -> None:
    stage = Stage(circuits=Switches("a"))
    stage.add("a", GOOD)
    stage.add("b", GOOD)
    await stage.run()
    assert stage.asked == {"a": 0, "b": 1}
    assert stage.told() == [("failed over", "a", "b", "circuit_open")]
    assert stage.circuits.asked == [([("a", "m")], False)]


async def test_an_open_circuit_that_is_due_is_probed_although_another_target_is_well() -> None:
    stage = Stage(circuits=Switches("a", due=["a"]))
    stage.add("a", GOOD)
    stage.add("b", GOOD)
    await stage.run()
    assert stage.asked == {"a": 1, "b": 0}
    assert stage.told() == []
    assert stage.circuits.told == [("a", "succeeded")]


async def test_a_probe_that_fails_costs_its_request_nothing_but_time() -> None:
    stage = Stage(circuits=Switches("a", due=["a"]))
    stage.add("a", DOWN)
    stage.add("b", GOOD)
    assert b"Hi" in await stage.run()
    assert stage.asked == {"a": 1, "b": 1}
    assert stage.circuits.told == [("a", "failed: server_error"), ("b", "succeeded")]


async def test_one_target_that_is_open_is_asked_for_once() -> None:
    stage = Stage(circuits=Switches("a"))
    stage.add("a", GOOD)
    with pytest.raises(UpstreamUnavailable):
        await stage.run()
    assert stage.circuits.asked == [([("a", "m")], True)]
    assert stage.waits == []


async def test_where_all_are_open_the_answer_is_at_once_and_lists_them() -> None:
    stage = Stage(circuits=Switches("a", "b"))
    stage.add("a", GOOD)
    stage.add("b", GOOD)
    with pytest.raises(UpstreamUnavailable) as raised:
        await stage.run("a/m", "b/m")
    assert entries(raised.value) == [("a/m", None, "circuit_open"), ("b/m", None, "circuit_open")]
    assert stage.asked == {"a": 0, "b": 0}
    assert stage.circuits.asked[-1] == ([("a", "m"), ("b", "m")], True)
    assert len(stage.circuits.asked) == 3


async def test_where_all_are_open_one_may_be_the_probe() -> None:
    stage = Stage(circuits=Switches("a", "b", early=["b"]))
    stage.add("a", GOOD)
    stage.add("b", GOOD)
    assert b"Hi" in await stage.run()
    assert stage.asked == {"a": 0, "b": 1}
    assert stage.circuits.told == [("b", "succeeded")]


async def test_where_the_others_have_failed_an_open_one_may_be_due() -> None:
    stage = Stage(circuits=Switches("a", early=["a"]))
    stage.add("a", DOWN)
    stage.add("b", whole(b"{}", 401))
    with pytest.raises(UpstreamUnavailable) as raised:
        await stage.run("a/m", "b/m")
    assert stage.circuits.asked == [([("a", "m")], False), ([("a", "m")], True)]
    assert entries(raised.value)[-1] == ("a/m", 500, "server_error")
    assert stage.asked == {"a": 1, "b": 1}  # one probe, and no second


# --- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [
        events(b'{"error":{"message":"down","type":"server_error"}}', done=False),
        events(ROLE, b'{"error":{"message":"down","type":"server_error"}}', done=False),
        Answer(200, [(b"content-type", b"text/event-stream")], [(0.0, b"data: %b\n\n" % ROLE)], end=End.RESET),
        Answer(200, [(b"content-type", b"text/event-stream")], [(0.0, b"data: %b\n\n" % ROLE)], end=End.CLOSE),
        Answer(200, [(b"content-type", b"text/event-stream")], [(0.0, b"data: %b\n\n" % ROLE)], end=End.STALL),
        events(ROLE, b"{", done=False),
    ],
    ids=["error", "error-after-role", "reset", "close", "stall", "garbage"],
)
async def test_a_stream_that_breaks_before_it_says_anything_fails_over(broken: Answer) -> None:
    stage = Stage()
    stage.add("a", broken, **SHORT)
    stage.add("b", events(ROLE, CHUNK))
    got = await stage.run(ask=chat(stream=True))
    assert got == b"data: %b\n\ndata: %b\n\ndata: [DONE]\n\n" % (ROLE, CHUNK)
    assert stage.asked == {"a": 1, "b": 1}


async def test_a_response_that_failed_before_it_said_anything_fails_over() -> None:
    failed = b'{"type":"response.failed","response":{"error":{"code":"server_error","message":"x"},"usage":null}}'
    good = [
        b'{"type":"response.created","response":{}}',
        b'{"type":"response.output_text.delta","delta":"Hi"}',
        b'{"type":"response.completed","response":{"usage":{"input_tokens":1,"output_tokens":1}}}',
    ]
    stage = Stage()
    stage.add("a", events(good[0], failed, done=False))
    stage.add("b", events(*good, done=False))
    asking = ask({"model": "m", "input": "x", "stream": True, "store": False}, "/v1/responses")
    assert b"Hi" in await stage.run(ask=asking)
    assert stage.asked == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("code", "told"), [("server_error", "failed: interrupted"), ("rate_limit_exceeded", "succeeded")]
)
async def test_a_response_that_fails_after_its_content_is_passed_and_the_circuit_hears_of_it(
    code: str, told: str
) -> None:
    failed = b'{"type":"response.failed","response":{"error":{"code":"%b","message":"x"}}}' % code.encode()
    stage = Stage()
    stage.add("a", events(b'{"type":"response.output_text.delta","delta":"Hi"}', failed, done=False))
    asking = ask({"model": "m", "input": "x", "stream": True, "store": False}, "/v1/responses")
    assert (await stage.run(ask=asking)).endswith(b"data: %b\n\n" % failed)
    assert stage.circuits.told == [("a", "answered"), ("a", told)]


async def test_after_the_first_content_nothing_is_tried_again() -> None:
    stage = Stage()
    cut = Answer(200, [(b"content-type", b"text/event-stream")], [(0.0, b"data: %b\n\n" % CHUNK)], end=End.CLOSE)
    stage.add("a", cut)
    stage.add("b", events(CHUNK))
    with pytest.raises(UpstreamError) as raised:
        await stage.run(ask=chat(stream=True))
    assert raised.value.code == "stream_interrupted"
    assert stage.asked == {"a": 1, "b": 0}
    assert stage.circuits.told == [("a", "answered"), ("a", "failed: interrupted")]


# --- money ----------------------------------------------------------------------------------------------------------


async def test_each_attempt_is_billed_once_and_only_what_was_used() -> None:
    stage = Stage()
    stage.add("a", DOWN)
    stage.add("b", GOOD)
    await stage.run()
    usage = stage.record.usage
    assert usage is not None
    assert (usage.input, usage.output, usage.estimated) == (3, 2, False)
    rows = await stage.scene.used("provider")
    assert [row.dimensions for row in rows] == [("b",)]


async def test_a_timed_out_attempt_stays_charged_beside_the_one_that_answered() -> None:
    stage = Stage()
    stage.add("a", HANGS, **SHORT)
    stage.add("b", GOOD)
    await stage.run()
    usage = stage.record.usage
    assert usage is not None
    assert usage.estimated
    assert usage.input > 3
    assert usage.output > 2


async def test_a_provider_that_says_it_was_late_has_answered_and_bills_nothing() -> None:
    stage = Stage()
    stage.add("a", whole(b"{}", 504))
    stage.add("b", GOOD)
    await stage.run()
    usage = stage.record.usage
    assert usage is not None
    assert (usage.input, usage.output, usage.estimated) == (3, 2, False)


async def test_a_full_account_is_passed_over_and_where_all_are_full_the_answer_says_so() -> None:
    full = {"a": LimitSettings(requests_per_minute=1)}
    stage = Stage(scene={"section": BudgetSettings(mode="enforce"), "accounts": full})
    stage.add("a", GOOD)
    stage.add("b", GOOD)
    await stage.run()
    scene = stage.scene
    failover = stage.failover
    targets = [A, B]
    hold = scene.budget.hold("acme", "", want_of(chat()), targets, stage.record)
    async with hold as charge, failover.open(chat(), targets, charge, stage.record, failover.bounds(chat().call)):
        pass
    assert stage.asked == {"a": 1, "b": 1}
    assert stage.told() == [("failed over", "a", "b", "account_full")]
    with pytest.raises(ProviderFull):
        async with scene.budget.hold("acme", "", want_of(chat()), targets[:1], stage.record):
            pass


# --- cancellation ---------------------------------------------------------------------------------------------------


async def cancelled(stage: Stage, at: Any, **more: Any) -> None:
    task = asyncio.create_task(stage.run(**more))
    async with asyncio.timeout(5):
        while not at():
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_client_that_leaves_while_it_waits_ends_the_wait() -> None:
    stage = Stage(sleep=asyncio.sleep, base_delay=30.0)
    stage.add("a", DOWN)
    await cancelled(stage, lambda: stage.circuits.told == [("a", "failed: server_error")])
    assert stage.asked == {"a": 1}
    assert stage.record.usage is None


async def test_a_client_that_leaves_during_the_second_attempt_closes_it() -> None:
    stage = Stage()
    stage.add("a", DOWN)
    second = stage.add("b", HANGS)
    await cancelled(stage, lambda: second.asked)
    assert second.ended == [Outcome.GONE]
    assert stage.circuits.told == [("a", "failed: server_error"), ("b", "ignored")]
    assert stage.failover.sharing._in_flight == {}
    usage = stage.record.usage
    assert usage is not None
    assert (usage.output, usage.estimated) == (0, True)


async def test_a_client_that_leaves_during_a_probe_gives_it_back() -> None:
    stage = Stage(circuits=Switches("a", early=["a"]))
    probed = stage.add("a", HANGS)
    await cancelled(stage, lambda: probed.asked)
    assert probed.ended == [Outcome.GONE]
    assert stage.circuits.told == [("a", "ignored")]


class Fitting(Whole):
    """A view that has to be looked at, and then does what it is told."""

    needed = True

    def __init__(self, error: ContextExceeded | None) -> None:
        super().__init__(chat())
        self.entered = False
        self._error = error

    async def fit(self, target: Target) -> Ask:
        self.entered = True
        if self._error is not None:
            raise self._error
        return await asyncio.get_running_loop().create_future()


async def test_a_target_that_the_conversation_does_not_fit_gets_its_permit_back() -> None:
    stage = Stage(circuits=Switches("a", early=["a"]))
    stage.add("a", GOOD)
    stage.view = Fitting(ContextExceeded("too long"))
    with pytest.raises(ContextExceeded):
        await stage.run()
    assert stage.asked == {"a": 0}
    assert stage.circuits.told == [("a", "ignored")]


async def test_a_client_that_leaves_while_the_conversation_is_cut_gives_the_permit_back() -> None:
    stage = Stage(circuits=Switches("a", early=["a"]))
    stage.add("a", GOOD)
    stage.view = view = Fitting(None)
    await cancelled(stage, lambda: view.entered)
    assert stage.asked == {"a": 0}
    assert stage.circuits.told == [("a", "ignored")]


async def test_a_client_that_leaves_in_the_middle_of_a_stream_is_no_evidence() -> None:
    stage = Stage()
    stalling = Answer(200, [(b"content-type", b"text/event-stream")], [(0.0, b"data: %b\n\n" % CHUNK)], end=End.STALL)
    upstream = stage.add("a", stalling)
    await cancelled(stage, lambda: stage.record.first_event, ask=chat(stream=True))
    assert upstream.ended == [Outcome.GONE]
    assert stage.circuits.told == [("a", "answered"), ("a", "ignored")]


async def test_a_fault_of_ours_is_no_evidence_either() -> None:
    stage = Stage()
    stage.add("a", GOOD)
    stage.add("b", GOOD)

    async def boom(*args: Any, **more: Any) -> Any:
        raise RuntimeError("a fault of ours")

    stage.providers["a"].open = boom
    with pytest.raises(RuntimeError):
        await stage.run()
    assert stage.asked == {"a": 0, "b": 0}
    assert stage.circuits.told == [("a", "ignored")]
    assert stage.failover.sharing._in_flight == {}


async def test_a_broken_pass_through_is_told_of_with_its_attempt() -> None:
    stage = Stage()
    stage.add("a", Answer(200, [(b"content-type", b"x/y")], end=End.RESET))
    with pytest.raises(UpstreamBroken) as raised:
        await stage.run("a/", ask=ask(b"", "/v1/files/f", method="GET"))
    assert entries(raised.value) == [("a", None, "reset")]


# --- shared by a whole request --------------------------------------------------------------------------------------


async def test_children_of_a_request_share_its_calls() -> None:
    stage = Stage(max_calls=3)
    stage.add("a", GOOD)
    await stage.run()
    failover, bounds = stage.failover, stage.bounds
    hold = stage.scene.budget.hold("acme", "", want_of(chat()), [A], stage.record)
    async with hold as charge:
        for left in (1, 0):
            child = charge.child(want_of(chat()))
            async with child, failover.open(chat(), [A], child, stage.record, bounds):
                assert bounds.calls == left
        child = charge.child(want_of(chat()))
        with pytest.raises(UpstreamUnavailable):
            async with child, failover.open(chat(), [A], child, stage.record, bounds):
                pass
    assert stage.asked == {"a": 3}


async def test_nobody_waits_for_room_beyond_the_deadline_of_the_request() -> None:
    section = BudgetSettings(mode="enforce", requests_per_minute=1, wait_ms=20_000)
    stage = Stage(scene={"section": section})
    stage.add("a", GOOD)
    await stage.run()
    want = want_of(chat())
    want.deadline = asyncio.get_running_loop().time() + 0.05
    async with asyncio.timeout(5):
        with pytest.raises(BudgetExceeded):
            async with stage.scene.budget.hold("acme", "", want, [A], stage.record):
                pass
